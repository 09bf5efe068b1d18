"""What 2:4 sparsity costs in accuracy: a small GPT is trained, its projections pruned, compared.

    python bench/sparsity.py                       # one to two minutes on a CPU
    python bench/sparsity.py --steps 100 --out .   # shorter, and the page elsewhere

For the reciprocal columns alone and for all (:func:`sparsify_weight`): the error of the projection
by lane group and of attention against FP64, of the logits, and the validation loss. And why a
W_recip alone is nothing for 2:4. Writes ``sparsity-cpu.json`` and ``sparsity-cpu.md``. Nothing is
trained after pruning.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.models import accuracy
from bench.models.accuracy import Trained
from ra_triton import SparseWeight, sparsify_weight
from ra_triton.nn import RACausalSelfAttention
from ra_triton.nn.composed import ComposedLinear
from ra_triton.weights import sparsity

SLUG = "sparsity-cpu"
NEEDS = "W_fused must have "  # how a refusal begins


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return accuracy.main(argv, "sparsity.py", __doc__, SLUG, measure, markdown)


def measure(trained: Trained) -> dict[str, Any]:
    """A row for each choice of columns: what changes, and the share of ``zeros``; the factors."""
    rows = []
    for which in sparsity.WHICH:
        weights, errors = trained.compare(partial(pruned, which=which))
        zeros = [_zeros(W.dense()) for W in weights if isinstance(W, SparseWeight)]
        rows.append({"which": which, "zeros": sum(zeros) / len(zeros), **errors})
    with torch.no_grad():
        return {"rows": rows, "factors": [*map(factor_row, accuracy.layers_of(trained.model))]}


def pruned(layer: RACausalSelfAttention, which: str) -> SparseWeight:
    """Prune a layer's weight in place."""
    options: Any = {"which": which, "n_head": layer.n_head, "weight_layout": "packed"}
    sparse = sparsify_weight(accuracy.fused(layer)[0], layer.R, **options)
    accuracy.set_weight(layer, sparse.dense())
    return sparse


def factor_row(layer: RACausalSelfAttention) -> dict[str, Any]:
    """A layer's W_recip, pruned on its own: does any backend take it, what is left of its zeros.

    Returns:
        ``shape``: of W_recip; ``refused``: what each backend says, held either way; ``zeros``: its
        share of zeros after pruning along D, and that of ``W_q W_recip`` and ``W_k W_recip`` then.
    """
    linear = layer.c_attn
    assert isinstance(linear, ComposedLinear)
    assert linear.W_recip is not None  # R > 0
    W_recip, n_head = linear.W_recip, layer.n_head
    pruned = sparsity.prune(W_recip.mT.contiguous()).mT
    low = [
        torch.einsum("chd,dr->chr", W.unflatten(-1, (n_head, -1)), pruned)
        for W in (linear.W_q, linear.W_k)
    ]
    D, R = W_recip.shape
    refused = {}
    for kernels in sparsity.LIMITS:
        for rows, channels in ((R, D), (D, R)):
            try:
                sparsity.check_limits(kernels, "all", rows, channels, torch.float16)
            except ValueError as error:
                refused[f"{kernels}, [{rows}, {channels}]"] = str(error)
    return {
        "shape": [D, R],
        "refused": refused,
        "zeros": [_zeros(pruned), _zeros(torch.cat(low, dim=-1))],
    }


def _zeros(t: Tensor) -> float:
    return (t == 0).double().mean().item()


def markdown(document: dict[str, Any]) -> str:
    """The page: what ran, the table, what it says."""
    titles = ("pruned", "zeros")
    rows = accuracy.table(document, titles, lambda row: (row["which"], f"{row['zeros']:.1%}"))
    factors = document["factors"]
    refused = "\n".join(
        f"- {what}: {why.removeprefix(NEEDS)}" for what, why in factors[0]["refused"].items()
    )
    shape, before = factors[0]["shape"], factors[0]["zeros"][0]
    after = max(row["zeros"][1] for row in factors)
    return f"""# 2:4 sparse weights: accuracy on a small GPT

{accuracy.heading(document, "sparsity.py")}
Pruned to 2 of 4 by magnitude along the input dimension, and not trained after that.

{rows}

{accuracy.NOTE} "zeros" is their share of the projections' weights.

Speed: 2:4 products run on a GPU alone; `sparse-reciprocal` and `sparse-all` of `bench/ladder.py`
time them there.

## Why not W_recip itself

W_recip of this model is [{shape[0]}, {shape[1]}], and no backend takes it, held either way; at R
below 16 none ever does. What each needs:

{refused}

Nor would its zeros last. Pruned to 2 of 4 along D it has {before:.0%} zeros; the columns
`W_q W_recip` and `W_k W_recip`, which attention reads, have {after:.2%}: each is a sum over the
{shape[0] // 2} rows that are left. So it is the composed columns that are pruned.
"""


if __name__ == "__main__":
    sys.exit(main())

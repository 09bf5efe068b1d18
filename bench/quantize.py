"""What int8 costs in accuracy: a small GPT is trained, its projections are rounded, and compared.

    python bench/quantize.py                       # one to two minutes on a CPU
    python bench/quantize.py --steps 100 --out .   # shorter, and the page elsewhere

For each choice of columns and activations (:func:`quantize_weight`), and for weights rounded to
bfloat16 as a yardstick: the error of the projection against FP64 by lane group, of attention, of
the logits, and the validation loss. Writes ``int8-cpu.json`` and ``int8-cpu.md``.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.models import accuracy
from bench.models.accuracy import Trained, Weight
from ra_triton import SparseWeight
from ra_triton.nn import RACausalSelfAttention

SLUG = "int8-cpu"
WAYS = {
    "weights in bfloat16": None,
    "reciprocal, weight-only": ("reciprocal", "none"),
    "reciprocal, W8A8": ("reciprocal", "int8"),
    "all, weight-only": ("all", "none"),
    "all, W8A8": ("all", "int8"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return accuracy.main(argv, "quantize.py", __doc__, SLUG, measure, markdown)


def measure(trained: Trained) -> dict[str, Any]:
    """A row for each way: what changes, and ``bytes`` over those of weights in bfloat16."""
    rows = []
    for way in WAYS:
        weights, errors = trained.compare(partial(rounded, way=way))
        rows.append({"way": way, "bytes": weight_bytes(weights), **errors})
    return {"rows": rows}


def rounded(layer: RACausalSelfAttention, way: str) -> Weight:
    """Round a layer's weight, not its bias, in place."""
    choice = WAYS[way]
    if choice is None:
        accuracy.set_weight(layer, accuracy.fused(layer)[0].bfloat16().float())
    else:
        which, activations = choice
        layer.quantize_(which, activations=activations)
    return layer.fused_weight()[0]


def weight_bytes(weights: Sequence[Weight]) -> float:
    """Bytes of the weights over those of bfloat16, the other columns in bfloat16."""
    read = dense = 0
    for W in weights:
        assert not isinstance(W, SparseWeight)
        read += W.to(dtype=torch.bfloat16).nbytes
        dense += 2 * W.shape[0] * W.shape[1]
    return read / dense


def markdown(document: dict[str, Any]) -> str:
    """The page: what ran, the table, what it says."""
    titles = ("c_attn", "bytes")
    rows = accuracy.table(document, titles, lambda row: (row["way"], f"{row['bytes']:.3f}"))
    return f"""# int8 weights: accuracy on a small GPT

{accuracy.heading(document, "quantize.py")}

{rows}

{accuracy.NOTE} "bytes" are those of the projections' weights over a bfloat16 weight's, scales
included. The backend is `sdpa`, which computes what the kernels do
(`tests/projection/test_projection_int8.py`).
"""


if __name__ == "__main__":
    sys.exit(main())

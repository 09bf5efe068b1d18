"""What 2:4 sparsity costs in accuracy: a small GPT is trained, its projections pruned, compared.

    python bench/sparsity.py                       # one to two minutes on a CPU
    python bench/sparsity.py --steps 100 --out .   # shorter, and the page elsewhere

Trains the GPT of ``train_tiny.py``, composed reciprocal attention, in float32 on bytes of Python's
standard library. Then, for the reciprocal columns alone and for all (:func:`sparsify_weight`): the
error of the projection by lane group and of attention against FP64, of the logits, and the
validation loss. And why a W_recip alone is nothing for 2:4. Writes ``sparsity-cpu.json`` and
``sparsity-cpu.md``. Nothing is trained after pruning.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ra_triton
from bench import train_tiny
from bench.data import VOCAB_SIZE, batch_of, load_text
from bench.gpt import GPT, GPTConfig, next_token_loss
from bench.options import count, parser_of
from bench.quantize import GROUPS, layers_of
from bench.report import environment
from ra_triton import sparsity
from ra_triton.layout import RALayout
from ra_triton.nn import RACausalSelfAttention
from ra_triton.nn.composed import ComposedLinear
from ref import reciprocal_attention as ref

RESULTS = Path(__file__).parent / "results"
SLUG = "sparsity-cpu"
NEEDS = "W_fused must have "  # how a refusal begins
SIZES = ("steps", "batch", "block", "layers", "heads", "width", "R", "seed", "batches")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"--out: no such folder: {args.out}")
    config = GPTConfig(args.block, VOCAB_SIZE, args.layers, args.heads, args.width)
    text = load_text(min_bytes=args.block + 1)
    model = train_tiny.train(config, text, args, "sdpa").model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    batches = [
        batch_of(text.val, args.batch, args.block + 1, generator) for _ in range(args.batches)
    ]
    with torch.no_grad():
        logits = [model(tokens[:, :-1]) for tokens in batches]
        exact = _mean_loss(logits, batches)
        rows = [compare(model, which, batches, logits, exact) for which in sparsity.WHICH]
        factors = [factor_row(layer) for layer in layers_of(model)]
    document = {
        "benchmark": "sparsity",
        "environment": environment(torch.device("cpu")),
        "settings": {name: getattr(args, name) for name in SIZES},
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": exact,
        "rows": rows,
        "factors": factors,
    }
    document = _short(document)
    (args.out / f"{SLUG}.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / f"{SLUG}.md").write_text(markdown(document))
    print(table(document))
    return 0


def compare(
    model: GPT, which: str, batches: Sequence[Tensor], logits: Sequence[Tensor], exact: float
) -> dict[str, Any]:
    """Prune a copy of the model and measure what changes.

    Returns:
        ``zeros``: share of the projections' weights; ``lanes`` and ``attention``: errors over all
        layers; ``logits``: error, without their mean; ``same_choice``: share of positions with the
        same likeliest next byte; ``loss`` and ``loss_change``, nats a byte. Errors are RMS over RMS
        of what is exact.
    """
    pruned = copy.deepcopy(model)
    zeros = [_prune(layer, which) for layer in layers_of(pruned)]
    lanes, attention = layer_errors(model, which, batches[0][:, :-1])
    after = [pruned(tokens[:, :-1]) for tokens in batches]
    pairs = list(zip(after, logits, strict=True))
    wrong = sum((a - b).double().square().sum().item() for a, b in pairs)
    size = sum((b - b.mean(-1, keepdim=True)).double().square().sum().item() for b in logits)
    same = [(a.argmax(-1) == b.argmax(-1)).double().mean().item() for a, b in pairs]
    loss = _mean_loss(after, batches)
    return {
        "which": which,
        "zeros": sum(zeros) / len(zeros),
        "lanes": lanes,
        "attention": attention,
        "logits": (wrong / size) ** 0.5,
        "same_choice": sum(same) / len(same),
        "loss": loss,
        "loss_change": loss - exact,
    }


def layer_errors(model: GPT, which: str, tokens: Tensor) -> tuple[dict[str, float], float]:
    """Errors of the projection by lane group and of attention: each layer on the exact model's x.

    The exact numbers are FP64 on the float32 weights.
    """
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        for layer in layers_of(model)
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    wrong, size = dict.fromkeys((*GROUPS, "out"), 0.0), dict.fromkeys((*GROUPS, "out"), 0.0)
    for x, layer in zip(seen, layers_of(model), strict=True):
        W_fused, bias = _fused(layer)
        layout = RALayout.from_columns(W_fused.shape[1], layer.R, layer.n_head)
        y = x.double() @ W_fused.double() + (0.0 if bias is None else bias.double())
        sparse = _sparse(layer, which)
        options: Any = {"bias": bias, "weight_layout": "packed", "backend": "sdpa"}
        operands = ra_triton.project(x, sparse, layer.R, **options)
        found = _groups(layout, torch.cat(operands, dim=2).flatten(2))
        found["out"] = ra_triton.ra_attention(x, sparse, layer.R, **options)
        expected = _groups(layout, y)
        expected["out"] = ref.packed_attention(*layout.views(y))[0].flatten(2)
        for name in wrong:
            wrong[name] += (found[name] - expected[name]).square().sum().item()
            size[name] += expected[name].square().sum().item()
    errors = {name: (wrong[name] / size[name]) ** 0.5 for name in wrong}
    return {name: errors[name] for name in GROUPS}, errors["out"]


def factor_row(layer: RACausalSelfAttention) -> dict[str, Any]:
    """A layer's W_recip, pruned on its own: does any backend take it, what is left of its zeros.

    Returns:
        ``shape``: of W_recip; ``refused``: what each backend says, held either way; ``zeros``: its
        share of zeros after pruning along D, and that of ``W_q W_recip`` and ``W_k W_recip`` then.
    """
    linear = layer.c_attn
    assert isinstance(linear, ComposedLinear)
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


def _fused(layer: RACausalSelfAttention) -> tuple[Tensor, Tensor | None]:
    W_fused, bias = layer.fused_weight()
    assert isinstance(W_fused, Tensor)
    return W_fused, bias


def _sparse(layer: RACausalSelfAttention, which: str) -> ra_triton.SparseWeight:
    W_fused, _ = _fused(layer)
    options: Any = {"which": which, "n_head": layer.n_head, "weight_layout": "packed"}
    return ra_triton.sparsify_weight(W_fused, layer.R, **options)


def _prune(layer: RACausalSelfAttention, which: str) -> float:
    """``c_attn`` as a linear layer with the pruned weight; its share of zeros."""
    weight, bias = _sparse(layer, which).dense(), _fused(layer)[1]
    channels, columns = weight.shape
    linear = nn.Linear(channels, columns, bias=bias is not None)
    linear.weight.copy_(weight.mT)
    if bias is not None:
        linear.bias.copy_(bias)
    layer.c_attn = linear
    return _zeros(weight)


def _zeros(t: Tensor) -> float:
    return (t == 0).double().mean().item()


def _mean_loss(logits: Sequence[Tensor], batches: Sequence[Tensor]) -> float:
    losses = [next_token_loss(t, tokens) for t, tokens in zip(logits, batches, strict=True)]
    return torch.stack(losses).mean().item()


def _groups(layout: RALayout, y: Tensor) -> dict[str, Tensor]:
    return layout.split_columns(layout.unpack(y.double()))


def markdown(document: dict[str, Any]) -> str:
    """The page: what ran, the table, what it says."""
    env, s = document["environment"], document["settings"]
    tokens = s["batches"] * s["batch"] * s["block"]
    factors = document["factors"]
    refused = "\n".join(
        f"- {what}: {why.removeprefix(NEEDS)}" for what, why in factors[0]["refused"].items()
    )
    shape, before = factors[0]["shape"], factors[0]["zeros"][0]
    after = max(row["zeros"][1] for row in factors)
    return f"""# 2:4 sparse weights: accuracy on a small GPT

{env["device"]}, {env["threads"]} thread(s), torch {env["torch"]}, triton {env["triton"]},
python {env["python"]}, commit {env["commit"]}; `python bench/sparsity.py`.

{document["parameters"]:,} parameters ({s["layers"]} layers, {s["heads"]} heads, width {s["width"]},
composed reciprocal attention, R = {s["R"]}), trained in float32 for {s["steps"]} steps of
{s["batch"]} x {s["block"]} bytes, seed {s["seed"]}; validation loss {document["loss"]:.4f} nats a
byte over {tokens:,} bytes. Pruned to 2 of 4 by magnitude along the input dimension, and not trained
after that. One model and one seed: nothing here is a claim about another model.

{table(document)}

Errors are RMS over the RMS of the exact numbers. Those of lanes and of attention are against FP64
on the same float32 weights and inputs, layer by layer, over all layers; those of logits (without
their mean over the vocabulary) against the model in float32. "zeros" is their share of the
projections' weights. "same choice" is the share of positions whose likeliest next byte stays the
same.

Speed: 2:4 products run on a GPU alone; not yet measured (`sparse-reciprocal` and `sparse-all` of
`bench/ladder.py`).

## Why not W_recip itself

W_recip of this model is [{shape[0]}, {shape[1]}], and no backend takes it, held either way; at R
below 16 none ever does. What each needs:

{refused}

Nor would its zeros last. Pruned to 2 of 4 along D it has {before:.0%} zeros; the columns
`W_q W_recip` and `W_k W_recip`, which attention reads, have {after:.2%}: each is a sum over the
{shape[0] // 2} rows that are left. So it is the composed columns that are pruned.
"""


def table(document: dict[str, Any]) -> str:
    """One line per choice of columns."""
    titles = ["pruned", "zeros", *GROUPS, "attention", "logits", "same choice", "loss", "change"]
    lines = [titles, ["---"] * len(titles)]
    for row in document["rows"]:
        cells = [row["which"], f"{row['zeros']:.1%}"]
        cells += [f"{row['lanes'][name]:.1e}" for name in GROUPS]
        cells += [f"{row[name]:.1e}" for name in ("attention", "logits")]
        cells += [f"{row['same_choice']:.1%}", f"{row['loss']:.4f}", f"{row['loss_change']:+.4f}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(value: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("sparsity.py", __doc__)
    add: Any = parser.add_argument
    add("--steps", type=count(1), default=400)
    add("--batch", type=count(1), default=8, help="sequences a step")
    add("--block", type=count(1), default=128, help="tokens a sequence")
    add("--layers", type=count(1), default=4)
    add("--heads", type=count(1), default=4)
    add("--width", type=count(1), default=128, help="channels")
    add("--R", type=count(1), default=4, help="reciprocal rank")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--seed", type=int, default=0)
    add("--batches", type=count(1), default=16, help="validation batches")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results")
    parser.set_defaults(attention="ra", parametrisation="composed")
    return parser


if __name__ == "__main__":
    sys.exit(main())

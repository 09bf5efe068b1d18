"""What int8 costs in accuracy: a small GPT is trained, its projections are rounded, and compared.

    python bench/quantize.py                       # one to two minutes on a CPU
    python bench/quantize.py --steps 100 --out .   # shorter, and the page elsewhere

Trains the GPT of ``train_tiny.py``, composed reciprocal attention, in float32 on bytes of Python's
standard library. Then, for each choice of columns and activations (:func:`quantize_weight`) and for
weights rounded to bfloat16 as a yardstick: the error of the projection against FP64 by lane group,
of attention, of the logits, and the validation loss. Writes ``int8-cpu.json`` and ``int8-cpu.md``.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ra_triton
from bench import train_tiny
from bench.data import VOCAB_SIZE, batch_of, load_text
from bench.gpt import GPT, GPTConfig
from bench.options import count, parser_of
from bench.report import environment
from ra_triton.layout import RALayout
from ra_triton.nn import RACausalSelfAttention
from ref import reciprocal_attention as ref

RESULTS = Path(__file__).parent / "results"
SLUG = "int8-cpu"
GROUPS = ("q_std", "k_low", "k_std", "q_low", "v")
WAYS = {
    "weights in bfloat16": None,
    "reciprocal, weight-only": ("reciprocal", "none"),
    "reciprocal, W8A8": ("reciprocal", "int8"),
    "all, weight-only": ("all", "none"),
    "all, W8A8": ("all", "int8"),
}
Round = Callable[[RACausalSelfAttention], Any]  # rounds a layer in place


@dataclass
class Row:
    """One way to round, against the model in float32. Errors are RMS over RMS of what is exact.

    Attributes:
        way: a key of ``WAYS``.
        bytes: of the projections' weights over those in bfloat16.
        lanes: error of the projection by lane group, over all layers.
        attention: error of what attention returns, over all layers.
        logits: error of the logits.
        same_choice: share of tokens after which the likeliest next byte is the same.
        kl: mean divergence of the next byte's distribution from the exact one, nats.
        loss: validation loss, nats a byte.
        loss_change: that minus the exact model's on the same batches.
    """

    way: str
    bytes: float
    lanes: dict[str, float]
    attention: float
    logits: float
    same_choice: float
    kl: float
    loss: float
    loss_change: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"--out: no such folder: {args.out}")
    config = GPTConfig(args.block, VOCAB_SIZE, args.layers, args.heads, args.width)
    text = load_text(min_bytes=args.block + 1)
    run = train_tiny.train(config, text, args, "sdpa")
    model = run.model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    batches = [
        batch_of(text.val, args.batch, args.block + 1, generator) for _ in range(args.batches)
    ]
    with torch.no_grad():
        exact = torch.stack([model.loss(tokens) for tokens in batches]).mean().item()
        rows = [compare(model, name, batches, exact) for name in WAYS]
    settings = {name: getattr(args, name) for name in ("steps", "batch", "block", "layers")}
    settings |= {name: getattr(args, name) for name in ("heads", "width", "R", "seed", "batches")}
    document = {
        "benchmark": "int8",
        "environment": environment(torch.device("cpu")),
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": exact,
        "rows": [asdict(row) for row in rows],
    }
    document = _short(document)
    (args.out / f"{SLUG}.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / f"{SLUG}.md").write_text(markdown(document))
    print(table(document))
    return 0


def compare(model: GPT, way: str, batches: Sequence[Tensor], exact_loss: float) -> Row:
    """Round a copy of the model one way and measure what changes."""
    rounded = copy.deepcopy(model)
    for layer in layers_of(rounded):
        rounding(way)(layer)
    lanes, attention = layer_errors(model, rounded, batches[0][:, :-1])
    losses, wrong, size, same, kl = [], 0.0, 0.0, 0.0, 0.0
    for tokens in batches:
        before, after = (m(tokens[:, :-1]) for m in (model, rounded))
        losses.append(F.cross_entropy(after.flatten(0, 1), tokens[:, 1:].flatten().long()).item())
        wrong += (after - before).double().square().sum().item()
        size += (before - before.mean(-1, keepdim=True)).double().square().sum().item()
        same += (before.argmax(-1) == after.argmax(-1)).double().mean().item()
        p, q = (F.log_softmax(t.double(), -1) for t in (before, after))
        kl += (p.exp() * (p - q)).sum(-1).mean().item()
    loss = sum(losses) / len(losses)
    return Row(
        way,
        weight_bytes(rounded),
        lanes,
        attention,
        (wrong / size) ** 0.5,
        same / len(batches),
        kl / len(batches),
        loss,
        loss - exact_loss,
    )


def rounding(way: str) -> Round:
    """What a key of ``WAYS`` does to a layer."""
    choice = WAYS[way]
    if choice is None:
        return _to_bfloat16
    which, activations = choice
    return lambda layer: layer.quantize_(which, activations=activations)


def _to_bfloat16(layer: RACausalSelfAttention) -> None:
    """``c_attn`` as a linear layer whose weight, not its bias, has passed through bfloat16."""
    W_fused, bias = layer.fused_weight()
    assert isinstance(W_fused, Tensor)
    C, N = W_fused.shape
    linear = torch.nn.Linear(C, N, bias=bias is not None)
    linear.weight.copy_(W_fused.mT.bfloat16())
    if bias is not None:
        linear.bias.copy_(bias)
    layer.c_attn = linear


def layers_of(model: GPT) -> Iterator[RACausalSelfAttention]:
    """Its attention layers."""
    return (m for m in model.modules() if isinstance(m, RACausalSelfAttention))


def weight_bytes(model: GPT) -> float:
    """Bytes of the projections' weights over those of bfloat16, the other columns in bfloat16."""
    read = dense = 0
    for layer in layers_of(model):
        W_fused, _ = layer.fused_weight()
        read += W_fused.to(dtype=torch.bfloat16).nbytes
        dense += 2 * W_fused.shape[0] * W_fused.shape[1]
    return read / dense


def layer_errors(exact: GPT, rounded: GPT, tokens: Tensor) -> tuple[dict[str, float], float]:
    """Errors of the projection by lane group and of attention: each layer on the exact model's x.

    The exact numbers are FP64 on the exact model's float32 weights.
    """
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        for layer in layers_of(exact)
    ]
    exact(tokens)
    for handle in handles:
        handle.remove()
    wrong, size = dict.fromkeys((*GROUPS, "out"), 0.0), dict.fromkeys((*GROUPS, "out"), 0.0)
    for x, layer, other in zip(seen, layers_of(exact), layers_of(rounded), strict=True):
        W_fused, bias = layer.fused_weight()
        assert isinstance(W_fused, Tensor)
        H, R = layer.n_head, layer.R
        y = x.double() @ W_fused.double() + (0.0 if bias is None else bias.double())
        found, expected = (_lanes(other, x), _split(y, H, R))
        for name in found:
            wrong[name] += (found[name] - expected[name]).square().sum().item()
            size[name] += expected[name].square().sum().item()
    errors = {name: (wrong[name] / size[name]) ** 0.5 for name in wrong}
    return {name: errors[name] for name in GROUPS}, errors["out"]


def _lanes(layer: RACausalSelfAttention, x: Tensor) -> dict[str, Tensor]:
    """What a rounded layer computes: lane groups, and what attention returns."""
    W_fused, bias = layer.fused_weight()
    options: Any = {"n_head": layer.n_head, "bias": bias, "weight_layout": "packed"}
    packed = ra_triton.project(x, W_fused, layer.R, **options)
    out = ra_triton.ra_attention(x, W_fused, layer.R, **options)
    y = torch.cat(packed, dim=2).flatten(2).double()
    return {**_groups(y, layer.n_head, layer.R), "out": out.double()}


def _split(y: Tensor, H: int, R: int) -> dict[str, Tensor]:
    """The exact lane groups of ``y`` in packed order, and the exact attention over them."""
    operands = RALayout.from_columns(y.shape[-1], R, H).views(y)
    return {**_groups(y, H, R), "out": ref.packed_attention(*operands)[0].flatten(2)}


def _groups(y: Tensor, H: int, R: int) -> dict[str, Tensor]:
    layout = RALayout.from_columns(y.shape[-1], R, H)
    return layout.split_columns(layout.unpack(y))


def markdown(document: dict[str, Any]) -> str:
    """The page: what ran, the table, what it says."""
    env, s = document["environment"], document["settings"]
    layers, heads, width = (s[name] for name in ("layers", "heads", "width"))
    tokens = s["batches"] * s["batch"] * s["block"]
    return f"""# int8 weights: accuracy on a small GPT

{env["device"]}, {env["threads"]} thread(s), torch {env["torch"]}, triton {env["triton"]},
python {env["python"]}, commit {env["commit"]}; `python bench/quantize.py`.

{document["parameters"]:,} parameters ({layers} layers, {heads} heads, width {width}, composed
reciprocal attention, R = {s["R"]}), trained in float32 for {s["steps"]} steps of {s["batch"]} x
{s["block"]} bytes, seed {s["seed"]}; validation loss {document["loss"]:.4f} nats a byte over
{tokens:,} bytes. One model and one seed: nothing here is a claim about another model.

{table(document)}

Errors are RMS over the RMS of the exact numbers. Those of lanes and of attention are against FP64
on the same float32 weights and inputs, layer by layer, over all layers; those of logits (without
their mean over the vocabulary) against the model in float32, so they hold what all layers add up
to. "bytes" are those of the projections' weights over a bfloat16 weight's, scales included. "same
choice" is the share of positions whose likeliest next byte stays the same; KL is the mean
divergence of the next byte's distribution, and loss the validation loss, in nats a byte. The
backend is `sdpa`, which computes what the kernels do (`tests/test_projection_int8.py`).
"""


def table(document: dict[str, Any]) -> str:
    """One line per way to round."""
    titles = ["c_attn", "bytes", *GROUPS, "attention", "logits", "same choice", "KL", "loss change"]
    lines = [titles, ["---"] * len(titles)]
    for row in document["rows"]:
        cells = [row["way"], f"{row['bytes']:.3f}"]
        cells += [f"{row['lanes'][name]:.1e}" for name in GROUPS]
        cells += [f"{row[name]:.1e}" for name in ("attention", "logits")]
        cells += [f"{row['same_choice']:.2%}", f"{row['kl']:.1e}", f"{row['loss_change']:+.1e}"]
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
    parser = parser_of("quantize.py", __doc__)
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

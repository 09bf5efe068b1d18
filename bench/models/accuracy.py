"""What another weight costs in accuracy: what ``quantize.py`` and ``sparsity.py`` share.

Trains the GPT of ``train_tiny.py``, composed reciprocal attention, in float32 on bytes of Python's
standard library. Then, for each way to change the weight of its projections, changes a copy of it,
compares that with the model as it was, and writes the figures and their page.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ra_triton
from bench import train_tiny
from bench.harness.options import check_outputs, count, parser_of, use_few_threads
from bench.harness.report import environment
from bench.models.data import VOCAB_SIZE, batch_of, load_text
from bench.models.gpt import GPT, GPTConfig
from ra_triton import QuantizedWeight, SparseWeight
from ra_triton.nn import RACausalSelfAttention
from ref import reciprocal_attention as ref

RESULTS = Path(__file__).parents[1] / "results"
GROUPS = ("q_std", "k_low", "k_std", "q_low", "v")
SIZES = ("steps", "batch", "block", "layers", "heads", "width", "R", "seed", "batches")
NOTE = """\
Errors are RMS over the RMS of the exact numbers. Those of lanes and of attention are against FP64
on the same float32 weights and inputs, layer by layer, over all layers; those of logits (without
their mean over the vocabulary) against the model in float32, so they hold what all layers add up
to. "same choice" is the share of positions whose likeliest next byte stays the same; KL is the mean
divergence of the next byte's distribution, and "loss change" that of the validation loss, in nats a
byte."""

Weight = Tensor | QuantizedWeight | SparseWeight
Change = Callable[[RACausalSelfAttention], Weight]  # in place; returns what projects from then on


@dataclass
class Trained:
    """The model as it was trained.

    Attributes:
        model: in ``eval()``.
        batches: validation batches, ``[batch, block + 1]`` each.
        logits: the model's, for each batch.
        loss: its mean over them, nats a byte.
    """

    model: GPT
    batches: list[Tensor]
    logits: list[Tensor]
    loss: float

    @torch.no_grad()
    def compare(self, change: Change) -> tuple[list[Weight], dict[str, Any]]:
        """Change each layer of a copy, and measure what that does.

        Returns:
            The layers' weights, and ``lanes`` (error by group) and ``attention``, over all layers;
            ``logits``, without their mean; ``same_choice``, a share of positions; ``kl``, ``loss``
            and ``loss_change`` in nats a byte. Errors are RMS over RMS of what is exact.
        """
        changed = copy.deepcopy(self.model)
        weights = [change(layer) for layer in layers_of(changed)]
        lanes, attention = layer_errors(self.model, weights, self.batches[0][:, :-1])
        wrong = size = same = kl = 0.0
        after = [changed(tokens[:, :-1]) for tokens in self.batches]
        for a, b in zip(after, self.logits, strict=True):
            wrong += (a - b).double().square().sum().item()
            size += (b - b.mean(-1, keepdim=True)).double().square().sum().item()
            same += (a.argmax(-1) == b.argmax(-1)).double().mean().item()
            p, q = (F.log_softmax(t.double(), -1) for t in (b, a))
            kl += (p.exp() * (p - q)).sum(-1).mean().item()
        loss = mean_loss(after, self.batches)
        return weights, {
            "lanes": lanes,
            "attention": attention,
            "logits": (wrong / size) ** 0.5,
            "same_choice": same / len(after),
            "kl": kl / len(after),
            "loss": loss,
            "loss_change": loss - self.loss,
        }


def main(
    argv: Sequence[str] | None,
    script: str,
    description: str | None,
    slug: str,
    measure: Callable[[Trained], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> int:
    """Run a command line: train, measure, write ``slug.json`` and ``slug.md``.

    Args:
        argv: the command line.
        script: its name.
        description: its docstring.
        slug: names the files.
        measure: the trained model to fields of the document.
        markdown: the document to its page.
    """
    parser = _parser(script, description)
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"--out: no such folder: {args.out}")
    check_outputs(parser, {}, "tqdm")
    use_few_threads()
    try:
        trained = _train(args)
        fields = measure(trained)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    document = {
        "benchmark": slug.removesuffix("-cpu"),
        "environment": environment(torch.device("cpu")),
        "settings": {name: getattr(args, name) for name in SIZES},
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "loss": trained.loss,
        **fields,
    }
    document = _short(document)
    (args.out / f"{slug}.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / f"{slug}.md").write_text(markdown(document))
    print(markdown(document))
    return 0


@torch.no_grad()
def layer_errors(
    model: GPT, weights: Sequence[Weight], tokens: Tensor
) -> tuple[dict[str, float], float]:
    """Errors of the projection by lane group and of attention: each layer on the exact model's x.

    The exact numbers are FP64 on the exact model's float32 weights.
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
    for x, layer, weight in zip(seen, layers_of(model), weights, strict=True):
        layout, (W_fused, bias) = layer.layout, fused(layer)
        y = x.double() @ W_fused.double() + (0.0 if bias is None else bias.double())
        options: Any = {"n_head": layer.n_head, "bias": bias, "weight_layout": "packed"}
        options["backend"] = "sdpa"
        packed = torch.cat(ra_triton.project(x, weight, layer.R, **options), dim=2).flatten(2)
        found = layout.split_columns(layout.unpack(packed))
        found["out"] = ra_triton.ra_attention(x, weight, layer.R, **options)
        expected = layout.split_columns(layout.unpack(y))
        expected["out"] = ref.packed_attention(*layout.views(y))[0].flatten(2)
        for name in wrong:
            wrong[name] += (found[name] - expected[name]).square().sum().item()
            size[name] += expected[name].square().sum().item()
    errors = {name: (wrong[name] / size[name]) ** 0.5 for name in wrong}
    return {name: errors[name] for name in GROUPS}, errors["out"]


def mean_loss(logits: Sequence[Tensor], batches: Sequence[Tensor]) -> float:
    """Mean over batches of the next byte's loss; in float64, as changes of 1e-7 are to show."""
    losses = [
        F.cross_entropy(t.double().flatten(0, 1), tokens[:, 1:].flatten().long()).item()
        for t, tokens in zip(logits, batches, strict=True)
    ]
    return sum(losses) / len(losses)


def layers_of(model: GPT) -> Iterator[RACausalSelfAttention]:
    """Its attention layers."""
    return (m for m in model.modules() if isinstance(m, RACausalSelfAttention))


def fused(layer: RACausalSelfAttention) -> tuple[Tensor, Tensor | None]:
    """``W_fused [C, N]`` and its bias, of an unmodified layer."""
    W_fused, bias = layer.fused_weight()
    assert isinstance(W_fused, Tensor)
    return W_fused, bias


def set_weight(layer: RACausalSelfAttention, W_fused: Tensor) -> None:
    """``c_attn`` as a linear layer of this weight ``[C, N]`` and the same bias."""
    _, bias = fused(layer)
    channels, columns = W_fused.shape
    linear = nn.Linear(channels, columns, bias=bias is not None)
    linear.weight.copy_(W_fused.mT)
    if bias is not None:
        linear.bias.copy_(bias)
    layer.c_attn = linear


def heading(document: dict[str, Any], script: str) -> str:
    """What ran, and on what."""
    env, s = document["environment"], document["settings"]
    tokens = s["batches"] * s["batch"] * s["block"]
    return f"""\
{env["device"]}, {env["threads"]} thread(s), torch {env["torch"]}, triton {env["triton"]},
python {env["python"]}, commit {env["commit"]}; `python bench/{script}`.

{document["parameters"]:,} parameters ({s["layers"]} layers, {s["heads"]} heads, width {s["width"]},
composed reciprocal attention, R = {s["R"]}), trained in float32 for {s["steps"]} steps of
{s["batch"]} x {s["block"]} bytes, seed {s["seed"]}; validation loss {document["loss"]:.4f} nats a
byte over {tokens:,} bytes. One model and one seed: nothing here is a claim about another model."""


def table(document: dict[str, Any], titles: tuple[str, str], cells: Callable[[Any], Any]) -> str:
    """One line per way to change the weight; ``cells`` are the first two of a row."""
    columns = [*titles, *GROUPS, "attention", "logits", "same choice", "KL", "loss change"]
    lines = [columns, ["---"] * len(columns)]
    for row in document["rows"]:
        line = [*cells(row), *(f"{row['lanes'][name]:.1e}" for name in GROUPS)]
        line += [f"{row[name]:.1e}" for name in ("attention", "logits")]
        line += [f"{row['same_choice']:.2%}", f"{row['kl']:.1e}", f"{row['loss_change']:+.1e}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _train(args: argparse.Namespace) -> Trained:
    config = GPTConfig(args.block, VOCAB_SIZE, args.layers, args.heads, args.width)
    text = load_text(min_bytes=args.block + 1)
    model = train_tiny.train(config, text, args, "sdpa").model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    batches = [
        batch_of(text.val, args.batch, args.block + 1, generator) for _ in range(args.batches)
    ]
    with torch.no_grad():
        logits = [model(tokens[:, :-1]) for tokens in batches]
    return Trained(model, batches, logits, mean_loss(logits, batches))


def _short(value: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _parser(script: str, description: str | None) -> argparse.ArgumentParser:
    parser = parser_of(script, description)
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

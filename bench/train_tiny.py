"""Train a tiny GPT with reciprocal attention on Python's own standard library, bytes as tokens.

    python bench/train_tiny.py                                  # one to two minutes on a CPU
    python bench/train_tiny.py --parametrisation composed
    python bench/train_tiny.py --attention plain                # nanoGPT's own layer
    python bench/train_tiny.py --steps 5 --batch 2 --block 32 --backend sdpa triton

The last one prints two loss curves side by side; without a GPU, set TRITON_INTERPRET=1 for it.
Runs of one command start from the same weights and see the same batches.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness.options import check_outputs, count, parser_of, use_few_threads
from bench.models.data import VOCAB_SIZE, Text, batch_of, load_text
from bench.models.gpt import GPT, AttentionMaker, CausalSelfAttention, GPTConfig
from bench.study.probe import observe
from ra_triton.backend import CHOICES
from ra_triton.nn import RACausalSelfAttention
from ra_triton.nn.attention import PARAMETRISATIONS

VAL_BATCHES = 4
CURVE_POINTS = 10  # lines of the printed loss curve
WARMUP_SHARE = 0.1


@dataclass
class Run:
    """One training run.

    Attributes:
        model: trained in place.
        losses: training loss of each step.
        val: ``{step: validation loss}``.
        seconds: of training, without validation.
    """

    model: GPT
    losses: list[float] = field(default_factory=list)
    val: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_outputs(parser, {}, "tqdm")
    if not args.prompt:
        parser.error("--prompt must have at least one byte")
    use_few_threads()
    config = GPTConfig(args.block, VOCAB_SIZE, args.layers, args.heads, args.width, args.dropout)
    try:
        for backend in args.backend:  # whatever cannot train here says so before another trains
            small = GPT(replace(config, block_size=1), attention_maker(args, backend))
            small.loss(torch.zeros(1, 2, dtype=torch.int64))
        text = load_text(args.text, min_bytes=args.block + 1)
        runs = {
            backend: train(config, text, args, backend)
            for backend in dict.fromkeys(args.backend)  # each once
        }
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        parser.error(str(error))

    model = next(iter(runs.values())).model
    size = sum(p.numel() for p in model.parameters())
    layer = (
        args.attention if args.attention == "plain" else f"{args.parametrisation} RA, R={args.R}"
    )
    print(f"{size:,} parameters, {layer}; {len(text.train):,} bytes of text, seed {args.seed}")
    print(curve(runs))
    for backend, run in runs.items():
        print(f"{backend}: {run.seconds:.0f} s, {run.seconds / args.steps * 1000:.0f} ms a step")
    if len(runs) > 1:
        print(f"largest difference between two losses of one step: {spread(runs):.2g}")
    print(reciprocal_report(model, batch_of(text.val, 1, args.block, _generator(args.seed))))
    print(
        f"\nA sample after {args.prompt!r}:\n{sample(model, args.prompt, args.sample, args.seed)}"
    )
    return 0


def train(config: GPTConfig, text: Text, args: argparse.Namespace, backend: str) -> Run:
    """Train a new model: AdamW, linear warm-up, cosine decay to a tenth.

    Progress goes to stderr: a bar on a terminal, else a line at each point of the curve.
    """
    from tqdm import trange

    sizes = f"{args.steps} steps of {args.batch} x {args.block} bytes"
    say = partial(print, file=sys.stderr, flush=True)
    say(f"training on {backend}: {sizes}, CPU threads: {torch.get_num_threads()}")
    torch.manual_seed(args.seed)
    model = GPT(config, attention_maker(args, backend))
    run, batches = Run(model), _generator(args.seed)
    optimizer = model.adamw(args.lr)
    warmup = max(1, round(WARMUP_SHARE * args.steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, args.steps - warmup), eta_min=args.lr / 10
            ),
        ],
        milestones=[warmup],
    )
    with trange(args.steps, desc=backend, disable=None, leave=False) as bar:
        for step in bar:
            if step in curve_steps(args.steps):
                run.val[step] = validation_loss(model, text.val, args)
                if bar.disable:
                    say(f"step {step}: validation loss {run.val[step]:.3f}")
            began = time.perf_counter()
            loss = model.loss(batch_of(text.train, args.batch, config.block_size + 1, batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            run.seconds += time.perf_counter() - began
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
    run.val[args.steps] = validation_loss(model, text.val, args)
    return run


def attention_maker(args: argparse.Namespace, backend: str) -> AttentionMaker:
    """What :class:`GPT` calls for each layer."""
    if args.attention == "plain":
        return CausalSelfAttention
    return partial(
        RACausalSelfAttention.from_config,
        R=args.R,
        parametrisation=args.parametrisation,
        backend=backend,
    )


@torch.no_grad()
def validation_loss(model: GPT, text: Tensor, args: argparse.Namespace) -> float:
    """Mean loss of the same batches each time, without dropout."""
    generator = _generator(args.seed + 1)
    model.eval()
    batches = 1 if args.steps < CURVE_POINTS else VAL_BATCHES
    losses = [
        model.loss(batch_of(text, args.batch, args.block + 1, generator)) for _ in range(batches)
    ]
    model.train()
    return torch.stack(losses).mean().item()


def curve_steps(steps: int) -> list[int]:
    """Where the loss curve is printed: ten places, the last step aside."""
    return sorted({steps * i // CURVE_POINTS for i in range(CURVE_POINTS)})


def curve(runs: dict[str, Run]) -> str:
    """Validation loss in nats per byte over steps, one column per run."""
    lines = ["  step" + "".join(f"{name:>12}" for name in runs) + "   validation loss, nats a byte"]
    for step in next(iter(runs.values())).val:
        lines.append(f"{step:6}" + "".join(f"{run.val[step]:12.4f}" for run in runs.values()))
    return "\n".join(lines)


def spread(runs: dict[str, Run]) -> float:
    """The largest difference between the runs' training losses of one step."""
    losses = zip(*(run.losses for run in runs.values()), strict=True)
    return max(max(step) - min(step) for step in losses)


def reciprocal_report(model: GPT, tokens: Tensor) -> str:
    """Share of the reciprocal term in the scores and its gates, per layer and head."""
    seen = observe(model, tokens)
    lines = ["reciprocal share of the scores' variance, and gate on it, per head:"]
    for name, share in seen["share"].items():
        line = f"  {name}: share {_numbers(share)}"
        if gate := seen["gate"].get(f"{name}.w_rec"):
            line += f", w_rec {_numbers(gate)}"
        lines.append(line)
    return "\n".join(lines) if seen["share"] else ""


def sample(model: GPT, prompt: str, count: int, seed: int) -> str:
    """``prompt`` and ``count`` bytes that the model draws after it."""
    tokens = torch.tensor([list(prompt.encode())])
    drawn = model.eval().generate(tokens, count, _generator(seed))
    return bytes(drawn[0].tolist()).decode(errors="replace")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("train_tiny.py", __doc__)
    parser.add_argument("--attention", choices=("ra", "plain"), default="ra")
    parser.add_argument(
        "--backend", nargs="+", choices=CHOICES, default=["sdpa"], help="one run for each"
    )
    add_training_options(parser)
    return parser


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Sizes, steps, text, seed, and the sample at the end."""
    add = parser.add_argument
    add("--parametrisation", choices=PARAMETRISATIONS, default="composed")
    add("--R", type=int, default=4, help="reciprocal rank")
    add("--steps", type=count(1), default=600)
    add("--batch", type=count(1), default=8, help="sequences a step")
    add("--block", type=count(1), default=128, help="tokens a sequence")
    add("--layers", type=count(1), default=4)
    add("--heads", type=count(1), default=4)
    add("--width", type=count(1), default=128, help="channels")
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--seed", type=int, default=0)
    add("--text", type=Path, metavar="FOLDER", help="default: Python's standard library")
    add("--prompt", default="def ", help="where the sample starts")
    add("--sample", type=count(1), default=200, help="bytes to draw at the end")


if __name__ == "__main__":
    sys.exit(main())

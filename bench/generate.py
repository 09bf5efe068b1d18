"""Train a tiny GPT with reciprocal attention for a minute on a CPU, then let it write.

    python bench/generate.py                                    # Python's standard library, bytes
    python bench/generate.py --prompt "import " --temperature 0.5 --top-k 40 --seed 3
    python bench/generate.py --text my_project --steps 1000     # .py files of your own

Says also what a token costs with a key/value cache and without. Where there is a GPU the model
trains on the CPU all the same, and writes on the GPU, also with a decoding step as one CUDA graph.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.harness.options import check_outputs, parser_of, resolve_device, use_few_threads
from bench.models.data import VOCAB_SIZE, load_text
from bench.models.gpt import GPT, GPTConfig
from bench.models.sampling import sampler
from bench.train_tiny import add_training_options, curve, train
from ra_triton.nn import RACausalSelfAttention


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_device(parser, args)
    check_outputs(parser, {}, "tqdm")
    prompt = list(args.prompt.encode())
    if not 0 < len(prompt) < args.block:
        parser.error(f"--prompt must have 1 to {args.block - 1} bytes, got {len(prompt)}")
    use_few_threads()
    config = GPTConfig(args.block, VOCAB_SIZE, args.layers, args.heads, args.width, args.dropout)
    try:
        sampler(args.temperature, args.top_k, None)  # raises now, not after a minute
        text = load_text(args.text, min_bytes=args.block + 1)
        run = train(config, text, args, "auto")
        model = fused(run.model.to(args.device).eval())
        tokens = torch.tensor([prompt], device=args.device)
        ways = ways_of(args.device)
        drawn = [sample(model, tokens, args, **options) for options in ways.values()]
    except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        parser.error(str(error))

    print(curve({"ra": run}))
    print(f"trained for {run.seconds:.0f} s; a token more costs")
    for name, (_, ms) in zip(ways, drawn, strict=True):
        print(f"  {name}: {ms:.2f} ms")
    written, _ = drawn[-1]
    print(f"\n{bytes(written[0].tolist()).decode(errors='replace')}")
    return 0


def fused(model: GPT) -> GPT:
    """``model``, its weights composed once and not for every token: to write, not to train."""
    for module in model.modules():
        if isinstance(module, RACausalSelfAttention):
            module.fuse_()
    return model


def ways_of(device: str) -> dict[str, dict[str, bool]]:
    """The ways to generate, the fastest last: options of ``GPT.generate`` by what they are."""
    ways = {"without a cache": {"use_cache": False}, "with a cache": {"use_cache": True}}
    if device == "cuda":
        ways["with a cache and a CUDA graph"] = {"use_cache": True, "cuda_graph": True}
    return ways


def sample(
    model: GPT, tokens: Tensor, args: argparse.Namespace, **options: bool
) -> tuple[Tensor, float]:
    """The prompt and what the model writes after it, and the milliseconds of a token."""
    chance = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    model.generate(tokens, min(4, args.sample), **chance, **options)  # type: ignore[arg-type]
    began = time.perf_counter()
    drawn = model.generate(tokens, args.sample, **chance, **options)  # type: ignore[arg-type]
    drawn = drawn.cpu()  # synchronizes
    return drawn, (time.perf_counter() - began) / args.sample * 1e3


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("generate.py", __doc__)
    add_training_options(parser)
    add = parser.add_argument
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    add("--top-k", type=int, metavar="K", help="draw among so many likeliest bytes")
    add("--device", choices=("cpu", "cuda"), help="where it writes; default: cuda if there is one")
    parser.set_defaults(attention="ra", layers=2, steps=900, lr=4e-3, sample=120)
    return parser


if __name__ == "__main__":
    sys.exit(main())

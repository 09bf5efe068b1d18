"""Command line options that the benchmarks share."""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FEW_THREADS = 4


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the description as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=name, description=description, formatter_class=form)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--dtype``, ``--seconds``."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--seconds", type=seconds, metavar="S", help="timing per case")


def resolve_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in device and dtype; an absent GPU is an error."""
    resolve_device(parser, args)
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")


def resolve_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the device; an absent GPU is an error."""
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here; available: cpu")
    args.device = args.device or ("cuda" if has_cuda else "cpu")


def check_outputs(
    parser: argparse.ArgumentParser, files: dict[str, Path | None], *packages: str
) -> None:
    """Fail early on missing packages and on files that cannot be written.

    Args:
        parser: what reports the error.
        files: path by the name of its option; None if it was not given. ``plot`` is a picture.
        packages: what it cannot run without, besides matplotlib for ``--plot``.
    """
    for package in (*packages, *["matplotlib"] * bool(files.get("plot"))):
        try:
            __import__(package)
        except ImportError:
            parser.error(f"{package} is not installed: python -m pip install {package}")
    for option, path in files.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            parser.error(f"--{option}: no such folder: {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            parser.error(f"--{option}: cannot write to {path}")
        if option == "plot":
            _check_picture(parser, path)


def _check_picture(parser: argparse.ArgumentParser, path: Path) -> None:
    """The suffix is a format that matplotlib writes."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        known = ", ".join(f".{suffix}" for suffix in sorted(formats))
        parser.error(f"--plot: {path.name!r} must end in one of {known}")


def check_runnable(
    parser: argparse.ArgumentParser, option: str, reasons: Mapping[str, str | None]
) -> None:
    """Fail early on anything named by the user that this machine cannot run.

    Args:
        parser: what reports the error.
        option: its name.
        reasons: by what was named: why it cannot run here, or None.
    """
    for name, reason in reasons.items():
        if reason is not None:
            parser.error(f"--{option} {name}: {reason}")


def use_few_threads() -> None:
    """At most four threads: an operation of a model this small is too short to share among more."""
    torch.set_num_threads(min(FEW_THREADS, torch.get_num_threads()))


def count(least: int) -> Any:
    """An argparse type: an int of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """An argparse type: a finite float of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value

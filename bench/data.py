"""Text for the training example: Python's own standard library, as bytes.

It is on every machine that runs this. A file is in the validation text if its name's hash says so,
so the split does not depend on order or chance, and no file is in both texts.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
VAL_SHARE = 0.1  # of files
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Bytes as ``uint8`` tensors ``[n]``."""

    train: Tensor
    val: Tensor


def load_text(
    folder: Path | None = None, *, min_bytes: int = 1, max_bytes: int = 4_000_000
) -> Text:
    """Read the ``.py`` files below ``folder`` in the order of their names.

    Args:
        folder: where to look; ``None`` means the running Python's standard library.
        min_bytes: what each of the two texts must have.
        max_bytes: stop after this many bytes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no text in it, or too little for one of the two texts.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    texts = {"train": bytearray(), "val": bytearray()}
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder)
        if SKIPPED.isdisjoint(name.parts):
            texts[split_of(name.as_posix())] += file.read_bytes()
        if sum(map(len, texts.values())) >= max_bytes:
            break
    if not any(texts.values()):
        raise ValueError(f"no text in .py files below {folder}")
    for split, text in texts.items():
        if len(text) < max(min_bytes, 1):
            raise ValueError(
                f"the {split} text from {folder} has {len(text)} bytes, needs {min_bytes}; "
                "files are split by their names, so more files help"
            )
    train, val = (torch.frombuffer(texts[s], dtype=torch.uint8) for s in ("train", "val"))
    return Text(train, val)


def split_of(name: str) -> str:
    """``"val"`` for about a tenth of all names, else ``"train"``."""
    hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "val" if hashed < VAL_SHARE * 2**64 else "train"


def batch_of(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``batch`` pieces of ``length`` tokens from random places: ``[batch, length]`` int64.

    Raises:
        ValueError: the text is shorter than one piece.
    """
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes, a piece needs {length}")
    starts = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()

"""Text to train on: Python's own standard library as bytes, or given files.

The standard library is on every machine that runs this. A file of it is in the validation text if
its name's hash says so, so the split does not depend on order or chance, and no file is in both
texts. Other files are memory-mapped: ``.bin`` is nanoGPT's uint16 tokens, all else bytes.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
VAL_SHARE = 0.1  # of files, or of a file
SCANNED = 2**24  # tokens looked at in one go
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
        max_bytes: stop after this many bytes, once both texts have enough.

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
        lengths = [len(text) for text in texts.values()]
        if sum(lengths) >= max_bytes and min(lengths) >= min_bytes:
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


@dataclass(frozen=True)
class Corpus:
    """Tokens in pieces of memory: ``uint8`` or ``uint16`` tensors ``[n]``, one for each file.

    Attributes:
        train: texts to train on; no batch crosses from one to the next.
        val: texts to validate on.
        name: what it is, for the record.
        bytes_per_token: 1 for bytes, None where it is not known.
    """

    train: tuple[Tensor, ...]
    val: tuple[Tensor, ...]
    name: str
    bytes_per_token: float | None = 1.0

    def fingerprint(self) -> str:
        """Twelve hex digits over the validation text and the size of the training text."""
        hashed = hashlib.sha256(str([len(t) for t in self.train]).encode())
        for t in self.val:
            for chunk in t.split(SCANNED):
                hashed.update(chunk.numpy().tobytes())
        return hashed.hexdigest()[:12]


def load_corpus(
    files: Sequence[Path] = (),
    val_files: Sequence[Path] = (),
    *,
    length: int,
    vocab_size: int = VOCAB_SIZE,
    max_bytes: int = 4_000_000,
) -> Corpus:
    """The standard library, or ``files``; every file is mapped, checked and never copied.

    Args:
        files: text files, or ``.bin`` files of uint16 tokens. None: the standard library.
        val_files: validation texts; None: the last tenth of each of ``files``.
        length: tokens of one piece, what each text must have at least.
        vocab_size: ids from here on are refused.
        max_bytes: of the standard library.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty, too short or no whole number of tokens; a token id beyond
            the vocabulary; text beside ``.bin``; validation files without training files.
    """
    if not files:
        if val_files:
            raise ValueError("validation files need training files beside them (--data)")
        text = load_text(min_bytes=length, max_bytes=max_bytes)
        corpus = Corpus((text.train,), (text.val,), "Python's standard library, bytes")
    else:
        kinds = {path.suffix == ".bin" for path in (*files, *val_files)}
        if len(kinds) > 1:
            raise ValueError("text and .bin files cannot be mixed: bytes and tokens differ")
        texts = [_map_file(path, length) for path in files]
        held_out = [_map_file(path, length) for path in val_files]
        if not held_out:
            cuts = [len(t) - int(VAL_SHARE * len(t)) for t in texts]
            held_out = [t[cut:] for t, cut in zip(texts, cuts, strict=True)]
            texts = [t[:cut] for t, cut in zip(texts, cuts, strict=True)]
        name = ", ".join(path.name for path in files)
        corpus = Corpus(tuple(texts), tuple(held_out), name, None if kinds.pop() else 1.0)
    for t in (*corpus.train, *corpus.val):
        _check_vocabulary(t, vocab_size, corpus.name)
    for texts_of_split in (corpus.train, corpus.val):
        count_places(texts_of_split, length)
    return corpus


def _map_file(path: Path, length: int) -> Tensor:
    """The file's tokens ``[n]``, mapped: nothing is read yet."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    dtype = torch.uint16 if path.suffix == ".bin" else torch.uint8
    if size == 0:
        raise ValueError(f"{path} is empty")
    if size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes: not a whole number of uint16 tokens")
    if (count := size // dtype.itemsize) < length:
        raise ValueError(f"{path} has {count} tokens, a piece needs {length}")
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def _check_vocabulary(text: Tensor, vocab_size: int, name: str) -> None:
    """ValueError for an id that the model has no row for; reads the whole text once."""
    if vocab_size >= 2 ** (8 * text.element_size()):
        return
    for i, chunk in enumerate(text.split(SCANNED)):
        at = int(chunk.int().argmax())
        if (token := int(chunk[at])) >= vocab_size:
            raise ValueError(
                f"{name}: token {token} at {i * SCANNED + at} is beyond the vocabulary of "
                f"{vocab_size}; vocab_size (--vocab-size) must be at least {token + 1}"
            )


def count_places(texts: Sequence[Tensor], length: int) -> int:
    """How many pieces of ``length`` tokens start somewhere in ``texts``, within one text each.

    Raises:
        ValueError: none does.
    """
    places = sum(max(0, len(t) - length + 1) for t in texts)
    if not places:
        longest = max((len(t) for t in texts), default=0)
        raise ValueError(f"the text has {longest} tokens, a piece needs {length}")
    return places


def pieces_at(texts: Sequence[Tensor], places: Tensor, length: int) -> Tensor:
    """Pieces ``[len(places), length]`` int64; a place is a number below :func:`count_places`."""
    pieces = []
    for place in places.tolist():
        for t in texts:
            starts = max(0, len(t) - length + 1)
            if place < starts:
                pieces.append(t[place : place + length].long())
                break
            place -= starts
    return torch.stack(pieces)


def batch_of(
    texts: Tensor | Sequence[Tensor], batch: int, length: int, generator: torch.Generator
) -> Tensor:
    """``batch`` pieces of ``length`` tokens from random places: ``[batch, length]`` int64.

    Raises:
        ValueError: no text is as long as one piece.
    """
    texts = (texts,) if isinstance(texts, Tensor) else texts
    places = torch.randint(count_places(texts, length), (batch,), generator=generator)
    return pieces_at(texts, places, length)

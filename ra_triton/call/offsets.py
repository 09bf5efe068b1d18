"""Offsets of sequences of different lengths that are concatenated without padding."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Offsets(NamedTuple):
    """Sequence b is tokens ``cu_seqlens[b] ... cu_seqlens[b + 1]``, of queries and of keys.

    Attributes:
        cu_seqlens_q: ``[B + 1]`` int32.
        cu_seqlens_k: likewise.
        max_seqlen_q: the most queries of a sequence.
        max_seqlen_k: the most keys.
        complete: whether the sequences are known to cover all tokens.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    complete: bool = False

    def within(self, queries: int, keys: int) -> "Offsets":
        """The same for these numbers of tokens: both maxima are checked, then clamped.

        A traced call gets here when it runs; while it was traced the sizes had no values.
        """
        check_longest("max_seqlen_q", self.max_seqlen_q, queries)
        check_longest("max_seqlen_k", self.max_seqlen_k, keys)
        most_q, most_k = min(self.max_seqlen_q, queries), min(self.max_seqlen_k, keys)
        return self._replace(max_seqlen_q=most_q, max_seqlen_k=most_k)

    def sequences(self) -> list[tuple[slice, slice]]:
        """Queries and keys of each sequence; reads the offsets back from their device."""
        queries, keys = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        return [
            (slice(*queries[b : b + 2]), slice(*keys[b : b + 2])) for b in range(len(queries) - 1)
        ]


def lengths(offsets: Offsets) -> tuple[int, int, int]:
    """Number of sequences, and the most queries and keys of one: what a launch needs."""
    return len(offsets.cu_seqlens_q) - 1, offsets.max_seqlen_q, offsets.max_seqlen_k


def flat(offsets: Offsets | None) -> tuple[Any, ...]:
    """As operators take them: two tensors, then constants."""
    return (None, None, 0, 0, True) if offsets is None else tuple(offsets)


def check_offsets(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """``cu_seqlens`` is ``[B + 1]`` int32 on ``device``: all checks that need no values."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {cu_seqlens.layout}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on {device} like the tokens, got {cu_seqlens.device}")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"{name} must be [B + 1], got {tuple(cu_seqlens.shape)}")


def check_longest(name: str, longest: object, total: int) -> None:
    """``longest`` is an int that fits ``total`` tokens: at least 1 if there are any."""
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {longest!r}")
    if torch.compiler.is_compiling():
        return  # it may be an unbacked SymInt: `Offsets.within` checks it when the call runs
    if longest < min(total, 1):
        raise ValueError(f"{name} must be at least 1 with {total} tokens, got {longest}")


def check_values(name: str, cu_seqlens: Tensor, total: int) -> int:
    """The length of the longest sequence; synchronizes.

    Raises:
        ValueError: offsets that do not begin with 0, decrease, or do not end with ``total``.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {offsets[0]}")
    lengths = [end - begin for begin, end in pairwise(offsets)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name} must not decrease, got {offsets[b + 1]} after {offsets[b]} at {b + 1}"
            )
    if offsets[-1] != total:
        raise ValueError(f"{name} must end with the number of tokens {total}, got {offsets[-1]}")
    return max(lengths, default=0)


def longest_of(
    cu_seqlens: Tensor, total: int, device: torch.device, *, check: bool, name: str = ""
) -> int:
    """The longest sequence: ``max_seqlen`` if the caller omits it; synchronizes."""
    check_offsets(f"cu_seqlens{name}", cu_seqlens, device)
    if not check or torch.compiler.is_compiling():
        where = "with check=False" if not check else "where the call is compiled"
        raise ValueError(f"max_seqlen{name} must be an int {where}, got None")
    return check_values(f"cu_seqlens{name}", cu_seqlens, total)


def checked(
    cu_seqlens: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    totals: tuple[int, int],
    device: torch.device,
    *,
    check: bool,
    names: tuple[str, str] = ("_q", "_k"),
) -> Offsets:
    """Validated offsets; values are checked only with ``check`` and outside of tracing."""
    if type(check) is not bool:
        raise TypeError(f"check must be a bool, got {check!r}")
    rows = list(zip(names, cu_seqlens, longest, totals, strict=True))
    rows = rows[:1] if cu_seqlens[0] is cu_seqlens[1] and names[0] == names[1] else rows
    for name, offsets, most, total in rows:
        check_offsets(f"cu_seqlens{name}", offsets, device)
        check_longest(f"max_seqlen{name}", most, total)
        if total and len(offsets) < 2:
            raise ValueError(f"cu_seqlens{name} must end with the number of tokens {total}")
    if len(cu_seqlens[0]) != len(cu_seqlens[1]):
        raise ValueError(
            f"cu_seqlens{names[1]} must be [B + 1] = [{len(cu_seqlens[0])}] like "
            f"cu_seqlens{names[0]}, got [{len(cu_seqlens[1])}]"
        )
    if check and not torch.compiler.is_compiling():
        for name, offsets, most, total in rows:
            found = check_values(f"cu_seqlens{name}", offsets, total)
            if most < found:
                raise ValueError(
                    f"max_seqlen{name} must be at least {found}, the longest sequence of "
                    f"cu_seqlens{name}, got {most}"
                )
    queries, keys = (t.contiguous() for t in cu_seqlens)
    if torch.compiler.is_compiling():
        return Offsets(queries, keys, *longest)
    return Offsets(queries, keys, *longest, complete=check).within(*totals)

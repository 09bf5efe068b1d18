"""A key/value cache for generation: ``[K_std|Q_low]`` and V of every token so far."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ra_triton.backend import choose
from ra_triton.checks import (
    DTYPES,
    check_dims,
    check_float_tensor,
    check_rows,
    check_same,
    check_shape,
    needs_grad,
)

FEW_TOKENS = 16  # new tokens a sequence that decode_attention takes in one call


class KVCache:
    """Packed keys and values of a batch of sequences, each with a length of its own.

    As many bytes as plain attention's cache: a key of reciprocal attention is ``[K_std|Q_low]``,
    D lanes like any other. Memory is allocated once; appending, cropping and reordering write in
    place. For calls without gradients.

    The lengths live on the device, where the kernels read them, so a captured decoding step can be
    replayed. The host keeps a copy to check against, and no call synchronizes, with two exceptions:
    a reordering of sequences of different lengths by indices on the GPU, and a call that needs the
    lengths after a CUDA graph has captured an append, because the host does not see replays. A
    replay cannot raise: the caller counts, and tokens that do not fit are lost.

    A compiled step is like a captured one: lengths on the host would be constants of its code, one
    compilation a token. So it does not read them, and cannot raise where there is no room; the next
    eager call that needs them synchronizes once. More than 16 tokens at a time are compiled for the
    lengths that the host knows.

    A cache belongs to the layer that appends to it; :meth:`reset` lets another one have it.

    Attributes:
        k_pack: ``[batch, max_len, n_kv_head, head_dim]``; undefined beyond a length.
        v: likewise.
        lengths: ``[batch]`` int32, tokens of each sequence; to be read only.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty cache.

        Args:
            batch: sequences ``B``.
            max_len: tokens that a sequence may reach.
            n_kv_head: key/value heads ``H_kv``.
            head_dim: ``D``, the packed head dim.
            dtype: float16, bfloat16 or float32; ``None`` means PyTorch's default.
            device: ``None`` means PyTorch's default.

        Raises:
            TypeError: sizes that are no ints, another dtype.
            ValueError: sizes below 1 or too large, a CUDA device where there is none.
        """
        sizes = {"batch": batch, "max_len": max_len, "n_kv_head": n_kv_head, "head_dim": head_dim}
        for name, size in sizes.items():
            if type(size) is not int:
                raise TypeError(f"{name} must be an int, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        shape = (batch, max_len, n_kv_head, head_dim)
        check_rows("the cache", shape[:3])
        # Tensors born in inference mode could not be written outside of it.
        try:
            with torch.inference_mode(False):
                self.k_pack = torch.empty(shape, dtype=dtype, device=device)
                self.v = torch.empty(shape, dtype=dtype, device=device)
                self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        except (AssertionError, RuntimeError) as error:  # what PyTorch raises without CUDA
            if torch.cuda.is_available() or torch.device(device or "cpu").type != "cuda":
                raise
            raise ValueError(f"device={str(device)!r}, but no CUDA device is available") from error
        self._known: list[int] | None = [0] * batch  # None: what the host does not know
        self._captured = False
        self._layer: weakref.ref[object] | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.k_pack.shape[0]

    @property
    def max_len(self) -> int:
        """Tokens that a sequence may reach."""
        return self.k_pack.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k_pack.nbytes + self.v.nbytes

    @property
    def longest(self) -> int:
        """An upper bound of the lengths that the host knows, without reading from the device."""
        if self._known is None or self._captured or self._capturing():
            return self.max_len
        return max(self._known)

    def known_lengths(self, tokens: int = FEW_TOKENS + 1) -> list[int] | None:
        """The lengths as the host knows them, before ``tokens`` more.

        Returns:
            One int a sequence; None while a CUDA graph is captured, and under a compiler for up to
            16 tokens, or where the host does not know. After such a capture, and once after a
            compiled append, this synchronizes.
        """
        if torch.compiler.is_compiling():
            return None if tokens <= FEW_TOKENS else self._known
        if self._capturing():
            self._captured = True  # from here on replays may change the lengths unseen
            return None
        if self._captured or self._known is None:
            self._known = self.lengths.tolist()
        return self._known

    def claim(self, layer: object) -> None:
        """Note that ``layer`` is the one that appends; eager calls alone.

        Raises:
            ValueError: the tokens here are another layer's.
        """
        if torch.compiler.is_compiling():
            return
        owner = None if self._layer is None else self._layer()
        if owner is None:
            self._layer = weakref.ref(layer)
        elif owner is not layer:
            raise ValueError(
                "cache belongs to another layer: each layer needs one of its own; after reset() "
                "another one can have it"
            )

    def check_fits(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Raise where :meth:`append` of keys of this shape, dtype and device would.

        Raises:
            TypeError: another dtype than the cache's.
            ValueError: a shape that does not fit, another device, a sequence without room.
        """
        B, _, H_kv, D = self.k_pack.shape
        if len(shape) != 4 or (shape[0], *shape[2:]) != (B, H_kv, D):
            raise ValueError(
                f"cache takes keys [batch, T, n_kv_head, head_dim] = [{B}, T, {H_kv}, {D}], "
                f"got {tuple(shape)}"
            )
        if dtype != self.k_pack.dtype:
            raise TypeError(f"cache takes {self.k_pack.dtype} keys, got {dtype}")
        if device != self.k_pack.device:
            raise ValueError(f"cache takes keys on {self.k_pack.device}, got {device}")
        self.check_room(shape[1])

    def check_room(self, tokens: int) -> None:
        """Raise where so many more tokens do not fit into every sequence.

        Raises:
            ValueError: the longest sequence would exceed ``max_len``.
        """
        known = self.known_lengths(tokens)
        fullest = 0 if known is None else max(known)
        if fullest + tokens > self.max_len:
            raise ValueError(
                f"cache has room for max_len = {self.max_len} tokens a sequence; its longest has "
                f"{fullest}, and {tokens} more do not fit"
            )

    def append(self, k_pack: Tensor, v: Tensor, *, backend: str = "auto") -> None:
        """Write new tokens, as many for each sequence, after its last one.

        Args:
            k_pack: ``[batch, T, n_kv_head, head_dim]`` in the cache's dtype, last stride 1.
            v: likewise.
            backend: ``"triton"``, ``"sdpa"`` (here: plain torch) or ``"auto"``.

        Raises:
            TypeError: not tensors, or not in the cache's dtype.
            ValueError: shapes that do not fit, another device, a sequence that would exceed
                ``max_len``, a gradient that is needed.
            NotImplementedError: the backend cannot run the call.
        """
        for name, t in (("k_pack", k_pack), ("v", v)):
            check_float_tensor(name, t)
            check_dims(name, t, "[batch, T, n_kv_head, head_dim]")
        check_same("k_pack", k_pack, v=v)
        check_shape("v", v, tuple(k_pack.shape), "of the shape of k_pack")
        self.check_fits(tuple(k_pack.shape), k_pack.dtype, k_pack.device)
        if needs_grad(k_pack, v):
            raise ValueError("a cache cannot be used while a gradient is needed; use no_grad()")
        module, _ = choose(backend, (k_pack, v))
        known = self.known_lengths(k_pack.shape[1])
        with torch.no_grad():
            module.append_(self.k_pack, self.v, self.lengths, k_pack, v)
        self._know(None if known is None else [length + k_pack.shape[1] for length in known])

    @torch.no_grad()
    def crop(self, length: int | Sequence[int]) -> None:
        """Keep the first tokens of each sequence; a shorter one stays as it is.

        Rejects drafted tokens, and makes sequences ragged that were appended with padding.

        Args:
            length: tokens to keep, of all sequences or of each.

        Raises:
            TypeError: no ints.
            ValueError: not one for each sequence, or outside of ``0..max_len``.
        """
        lengths = list(length) if isinstance(length, Sequence) else [length] * self.batch
        if any(type(n) is not int for n in lengths):
            raise TypeError(f"length must be an int, or one for each sequence, got {length!r}")
        if len(lengths) != self.batch or not all(0 <= n <= self.max_len for n in lengths):
            raise ValueError(
                f"length must be within 0..{self.max_len}, one or {self.batch} of them, "
                f"got {length!r}"
            )
        known = self.known_lengths(0)
        if all(n == lengths[0] for n in lengths):
            self.lengths.clamp_(max=lengths[0])
        else:
            limits = self._moved(torch.tensor(lengths, dtype=torch.int32))
            self.lengths.copy_(self.lengths.minimum(limits))
        if known is not None:
            known = [min(n, limit) for n, limit in zip(known, lengths, strict=True)]
        self._know(known)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all tokens and the layer that appended them; does not synchronize."""
        if not torch.compiler.is_compiling() and self._capturing():
            self._captured = True
        self.lengths.zero_()
        self._known, self._layer = [0] * self.batch, None

    @torch.no_grad()
    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``indices[i]`` was, for beam search.

        In place; what is in use of the keys, then of the values, is copied once more for a moment.

        Args:
            indices: ``[batch]`` ints, repeated or not; on a GPU, PyTorch checks their range.

        Raises:
            TypeError: no ints.
            ValueError: not one for each sequence, or no sequence of that number.
        """
        if not isinstance(indices, Tensor):
            if not isinstance(indices, Sequence) or any(type(i) is not int for i in indices):
                raise TypeError(f"indices must be ints, one for each sequence, got {indices!r}")
            self._check_range(list(indices))
            indices = torch.tensor(indices, dtype=torch.int64)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
        if indices.shape != (self.batch,):
            raise ValueError(f"indices must be [{self.batch}], got {tuple(indices.shape)}")
        known = self.known_lengths(0)
        on_host = not indices.is_cuda and not torch.compiler.is_compiling()
        if on_host or (known is not None and len(set(known)) > 1):
            numbers = indices.tolist()
            self._check_range(numbers)
            if known is not None:
                known = [known[i] for i in numbers]
        self._know(known)
        rows, used = self._moved(indices.long()), self.longest
        for t in (self.k_pack, self.v):
            t[:, :used] = t[rows, :used]
        self.lengths.copy_(self.lengths[rows])

    def _know(self, lengths: list[int] | None) -> None:
        """What the host knows from here on; a capture leaves what it knew before."""
        if lengths is not None or torch.compiler.is_compiling():
            self._known = lengths

    def _check_range(self, indices: list[int]) -> None:
        if not all(0 <= i < self.batch for i in indices):
            raise ValueError(f"indices must be within 0..{self.batch - 1}, got {indices}")

    def _moved(self, t: Tensor) -> Tensor:
        """``t`` on the cache's device, without synchronizing."""
        if self.lengths.is_cuda and not t.is_cuda:
            t = t.pin_memory()
        return t.to(self.lengths.device, non_blocking=True)

    def _capturing(self) -> bool:
        return self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()

    def __repr__(self) -> str:
        """Sizes."""
        B, max_len, H_kv, D = self.k_pack.shape
        return (
            f"KVCache(batch={B}, max_len={max_len}, n_kv_head={H_kv}, head_dim={D}, "
            f"dtype={self.k_pack.dtype}, device={str(self.k_pack.device)!r})"
        )

    def __getstate__(self) -> dict[str, object]:
        """Copies and files belong to no layer yet."""
        return {**self.__dict__, "_layer": None}

"""Buffers for inference that outlive a call: equal sizes reuse the same memory."""

import math
import threading

import torch
from torch import Tensor

from ra_triton.checks import may_keep, needs_grad

Key = tuple[str, torch.device, torch.dtype, int]  # name, device, dtype, stream


class Workspace:
    """Memory for calls without gradients; grows on demand and never shrinks by itself.

    Each name has one flat storage per device, dtype and stream; threads do not share. A call that
    fits allocates nothing. A buffer's contents are valid until the next call with the workspace, so
    backward must never read one: :meth:`refuse_gradients`. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        """An empty workspace."""
        self._local = threading.local()  # two threads may interleave launches on one stream

    def buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """A contiguous tensor whose contents are left over from earlier calls.

        While a CUDA graph is captured the memory is the graph's own: storage that later grew would
        leave the graph with a dangling address. A traced or transformed call gets new memory too.

        Args:
            name: what the buffer is for; equal names share memory.
            shape: its sizes.
            dtype: of its elements.
            device: where it lives; ``"cuda"`` means the current GPU.

        Returns:
            ``shape`` in ``dtype`` on ``device``: a view of the storage, or new memory if that is
            too small.

        Raises:
            ValueError: a negative size.
        """
        if any(size < 0 for size in shape):
            raise ValueError(f"shape must have no negative size, got {tuple(shape)}")
        device = _with_index(torch.device(device))
        if not may_keep(device):
            return torch.empty(shape, dtype=dtype, device=device)
        storages = self._storages()
        key = (name, device, dtype, stream_id(device))
        storage, numel = storages.get(key), math.prod(shape)
        if storage is None or storage.numel() < numel:
            # A tensor born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                storage = storages[key] = torch.empty(numel, dtype=dtype, device=device)
        return storage[:numel].view(shape)

    def refuse_gradients(self, *tensors: Tensor | None) -> None:
        """Raise where autograd would record a call on these tensors.

        Raises:
            ValueError: backward would read buffers that a later call overwrites.
        """
        if needs_grad(*tensors):
            raise ValueError(
                "workspace cannot be used while a gradient is needed; "
                "use torch.no_grad(), or pass workspace=None"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that this thread's buffers hold."""
        return sum(storage.nbytes for storage in self._storages().values())

    def clear(self) -> None:
        """Release this thread's buffers."""
        self._storages().clear()

    def _storages(self) -> dict[Key, Tensor]:
        try:
            return self._local.storages
        except AttributeError:
            self._local.storages = {}
            return self._local.storages

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copies and pickles carry no memory."""
        return type(self), ()


def stream_id(device: torch.device) -> int:
    """The current stream of a CUDA device, 0 elsewhere."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``: one key for one GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

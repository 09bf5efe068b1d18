"""Processes that train one model together, as torchrun starts them; one process without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among ``size``; rank 0 writes, draws and prints."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def device(self, choice: str) -> torch.device:
        """The device of this process for ``auto``, ``cpu`` or ``cuda``.

        Raises:
            ValueError: cuda where PyTorch sees none.
        """
        has_cuda = torch.cuda.is_available()
        if choice == "cuda" and not has_cuda:
            raise ValueError("device is cuda, but PyTorch sees no CUDA device here")
        if choice == "cpu" or not has_cuda:
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def share(self, tokens: Tensor) -> Tensor:
        """This process's rows of a global batch ``[B, T]``.

        Raises:
            ValueError: a batch that does not divide.
        """
        if len(tokens) % self.size:
            raise ValueError(f"a batch of {len(tokens)} does not divide by {self.size} processes")
        return tokens.chunk(self.size)[self.rank]

    def mean(self, t: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size == 1:
            return t
        t = t.clone()
        dist.all_reduce(t)
        return t / self.size

    def wait(self) -> None:
        """Until all processes are here: what rank 0 wrote can be read afterwards."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The world that torchrun made, NCCL on GPUs and gloo on CPUs; left at the end."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World()
        return
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    on_gpu = world.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()

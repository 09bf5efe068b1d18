"""What a step costs: FLOPs, the matmul peak to hold them against, memory."""

import contextlib
import resource
import time
from functools import cache
from pathlib import Path

import torch

from bench.models.gpt import GPT
from bench.study.arms import parameter_count

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
SECONDS = 0.5


def flops_per_token(model: GPT, length: int) -> float:
    """``6 N + 12 L C T``: forward and backward of a token, after nanoGPT and PaLM (App. B).

    N is all parameters but the position embedding; the scores are counted in full, not as causal.
    """
    config = model.config
    N = parameter_count(model) - config.block_size * config.n_embd
    return 6.0 * N + 12.0 * config.n_layer * config.n_embd * length


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of many square matrix products on this machine.

    Args:
        device: where.
        dtype: of the operands.
        threads: of PyTorch, so that another number of threads is measured again.
    """
    n = SIDE[device.type]
    generator = torch.Generator().manual_seed(0)  # not the one that dropout draws from
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU never lags."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start the count of :func:`peak_memory_mb` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # then the figure is the highest since the process started
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """MB at the highest: what tensors took of a GPU, or what the whole process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

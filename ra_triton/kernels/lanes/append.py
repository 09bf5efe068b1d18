"""Append a few tokens to a key/value cache, each sequence at its own length.

    k_cache[b, lengths[b] + t] = k[b, t],  v_cache[b, lengths[b] + t] = v[b, t],  lengths[b] += T

k and v ``[B, T, H_kv, D]``, caches ``[B, max_len, H_kv, D]``, lengths int32 ``[B]``. Grid ``(B,)``:
one program a sequence, so that no other needs the length that it changes. Overwrites those rows of
the caches, and lengths. A token beyond ``max_len`` is dropped, and lengths stay at ``max_len``: a
replayed graph cannot raise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.tiles import follow, row_at, strides_of, target_of
from ra_triton.launch.configs import launch_config
from ra_triton.launch.plans import Layout, Plan, layout_of, on_16_bytes, planned


@triton.jit
def _append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    k_strides,
    v_strides,
    T,
    H_kv,
    max_len,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """``cache[b, lengths[b] + t, h] = new[b, t, h]`` for the T tokens of one sequence."""
    b = tl.cast(tl.program_id(0), tl.int64)
    follow(PDL)
    length = tl.load(lengths_ptr + b)
    tl.debug_barrier()  # every thread has loaded it before one of them overwrites it
    lane = tl.arange(0, LANES)[None, :]
    for first in tl.range(0, T * H_kv, ROWS):
        row = first + tl.arange(0, ROWS)
        t, h = row // H_kv, row % H_kv
        place = length + t
        inside = (t < T) & (place >= 0) & (place < max_len)
        mask = inside[:, None] & (lane < D)
        t, h = t.to(tl.int64)[:, None], h.to(tl.int64)[:, None]
        k = tl.load(row_at(k_ptr, k_strides, b, t, h) + lane, mask=mask, other=0.0)
        v = tl.load(row_at(v_ptr, v_strides, b, t, h) + lane, mask=mask, other=0.0)
        offset = ((b * max_len + place.to(tl.int64)[:, None]) * H_kv + h) * D + lane
        tl.store(k_cache_ptr + offset, k, mask=mask)
        tl.store(v_cache_ptr + offset, v, mask=mask)
    tl.store(lengths_ptr + b, tl.minimum(length + T, max_len))


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` in any layout with unit last stride; the others are contiguous."""
    if k.numel() == 0:
        return
    others = on_16_bytes(k_cache, v_cache, lengths)
    target = target_of(k.device)
    plan = _plan(k.device, k.dtype, layout_of(k), layout_of(v), others, k_cache.shape[1], target)
    plan(k, v, k_cache, v_cache, lengths)


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    k: Layout,
    v: Layout,
    others: tuple[bool | None, ...],
    max_len: int,
    target: str,
) -> Plan:
    """The launch for new tokens of these layouts."""
    B, T, H_kv, D = k.shape
    config = launch_config("append", D, dtype, target, False)
    arguments = {
        "k_strides": strides_of(k),
        "v_strides": strides_of(v),
        "T": T,
        "H_kv": H_kv,
        "max_len": max_len,
        "D": D,
        "ROWS": config.block_m,
        "LANES": triton.next_power_of_2(D),
        **config.options,
    }
    return Plan(_append_kernel, (B,), arguments)

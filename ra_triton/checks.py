"""Argument checks: every one runs before any launch and names the argument, the rule, the value."""

import math
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ra_triton import internals

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROWS = 2**31 - 2**16  # kernels count rows (batch x tokens x heads) in 32 bits


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """``value`` is one of ``choices``, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_float_tensor(
    name: str, t: object, *, dtypes: Collection[torch.dtype] | None = DTYPES
) -> None:
    """``t`` is a dense real tensor in one of ``dtypes`` (any float if None), else TypeError."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; sequences of different lengths lie "
            f"one after the other, with cu_seqlens"
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if dtypes is None and not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    if dtypes is not None and t.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {t.dtype}")


def check_dims(name: str, t: Tensor, shape: str) -> None:
    """``t`` has as many dims as ``shape`` names, e.g. ``"[B, T, C]"``, and unit last stride."""
    dims = shape.count(",") + 1
    if t.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
    check_unit_stride(name, t)


def check_unit_stride(name: str, t: Tensor) -> None:
    """The last dim of ``t`` is contiguous."""
    if t.shape[-1] > 1 and t.stride(-1) != 1 and t.numel():
        raise ValueError(
            f"{name} must have stride 1 in its last dim, got strides {t.stride()}; "
            f"call .contiguous() on it"
        )


def check_same(
    first_name: str, first: Tensor, dtype: torch.dtype | None = None, /, **others: Tensor
) -> None:
    """All tensors share the first one's dtype (TypeError) and device (ValueError).

    With ``dtype``, which autocast brings them to, any dtype will do.
    """
    for name, t in others.items():
        if dtype is None and t.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {first_name}, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {t.device}")


def check_shape(name: str, t: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """``t.shape == expected``, else a ValueError that says what the sizes mean."""
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} must be {meaning} = {expected}, got {tuple(t.shape)}")


def check_rows(name: str, shape: tuple[int, ...]) -> None:
    """The sizes in ``shape`` make at most ``MAX_ROWS`` rows."""
    rows = math.prod(shape)
    if rows > MAX_ROWS:
        raise ValueError(f"{name} must have at most {MAX_ROWS} rows, got {shape} = {rows}")


def check_no_overlap(name: str, t: Tensor) -> None:
    """Each element of a tensor that will be written has an address of its own."""
    if t.numel() and any(
        stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)
    ):
        raise ValueError(f"{name} is written, so it must not be expanded, got strides {t.stride()}")


def check_apart(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors that will be written, of as many dims and one dtype, share no element.

    Noticed where they begin at one address, or have the same strides.
    """
    distance = other.data_ptr() - t.data_ptr()
    layouts = t.shape, t.stride(), other.shape, other.stride()
    if t.numel() and other.numel() and _meet(distance, t.element_size(), *layouts):
        raise ValueError(f"{name} must share no memory with {other_name}: both are written")


@lru_cache(maxsize=256)
def _meet(
    distance: int,  # in bytes
    element_size: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    other_shape: tuple[int, ...],
    other_strides: tuple[int, ...],
) -> bool:
    """Whether an index i in ``shape`` and a j in ``other_shape`` have one address."""
    sizes = zip(strides, other_strides, shape, other_shape, strict=True)
    dims = [dim for dim in sizes if max(dim[2:]) > 1]
    if distance == 0 or distance % element_size or any(s != other for s, other, *_ in dims):
        return distance == 0
    # Of i - j along each dim the stride, the least and the most; longest strides first.
    steps = sorted(((s, 1 - n_j, n_i - 1) for s, _, n_i, n_j in dims), reverse=True)

    def reaches(distance: int, dim: int) -> bool:
        if dim == len(steps):
            return distance == 0
        stride, least, most = steps[dim]
        low, high = (sum(s * bounds[i] for s, *bounds in steps[dim + 1 :]) for i in (0, 1))
        first = max(least, -((high - distance) // stride))
        last = min(most, (distance - low) // stride)
        return any(reaches(distance - n * stride, dim + 1) for n in range(first, last + 1))

    return reaches(distance // element_size, 0)


def check_project_inputs(
    x: Tensor,
    W_fused: Tensor,
    bias: Tensor | None,
    columns_name: str = "N",
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """``x [B, T, C]``, ``W_fused [C, N]``, ``bias [N]``: types, dtypes, devices, shapes.

    ``dtype``: what autocast brings them to.
    """
    dtypes = DTYPES if dtype is None else None
    for name, t in (("x", x), ("W_fused", W_fused)):
        check_float_tensor(name, t, dtypes=dtypes)
    check_dims("x", x, "[B, T, C]")
    check_rows("x", x.shape[:2])
    check_same("x", x, dtype, W_fused=W_fused)
    if W_fused.dim() != 2 or W_fused.shape[0] != x.shape[-1]:
        raise ValueError(
            f"W_fused must be [C, {columns_name}] with C = {x.shape[-1]} like x, "
            f"got {tuple(W_fused.shape)}"
        )
    if bias is not None:
        check_float_tensor("bias", bias, dtypes=dtypes)
        check_same("x", x, dtype, bias=bias)
        check_shape("bias", bias, (W_fused.shape[1],), "one value per column of W_fused")


def check_attention_inputs(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, dtype: torch.dtype | None = None
) -> None:
    """``q [B, Tq, H, D]``, ``k`` and ``v [B, Tk, H_kv, D]``: types, dtypes, devices, shapes.

    ``dtype``: what autocast brings them to.
    """
    tensors = {"q_pack": q_pack, "k_pack": k_pack, "v": v}
    for name, t in tensors.items():
        check_float_tensor(name, t, dtypes=DTYPES if dtype is None else None)
    for name, t in tensors.items():
        check_dims(name, t, "[B, T, H, D]")
        check_rows(name, t.shape[:3])
    check_same("q_pack", q_pack, dtype, k_pack=k_pack, v=v)
    B, _, H, D = q_pack.shape
    if H < 1 or D < 1:
        raise ValueError(f"q_pack must have at least one head and lane, got {tuple(q_pack.shape)}")
    T_k, H_kv = k_pack.shape[1:3]
    if H_kv < 1 or H % H_kv:
        raise ValueError(
            f"k_pack must have a number of heads that divides q_pack's {H}, got {H_kv}"
        )
    check_shape("k_pack", k_pack, (B, T_k, H_kv, D), "[B, T_k, H_kv, D] like q_pack")
    check_shape("v", v, (B, T_k, H_kv, D), "[B, T_k, H_kv, D] like k_pack")


def check_decode_inputs(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, lengths: Tensor, max_length: int | None
) -> None:
    """Those of attention, ``lengths`` int32 ``[B]``, and ``max_length`` within the cache."""
    check_attention_inputs(q_pack, k_pack, v)
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.layout != torch.strided:
        raise TypeError(f"lengths must be a dense tensor, got layout {lengths.layout}")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be torch.int32, got {lengths.dtype}")
    check_shape("lengths", lengths, (q_pack.shape[0],), "one per sequence, [B]")
    if lengths.device != q_pack.device:
        raise ValueError(f"lengths must be on {q_pack.device} like q_pack, got {lengths.device}")
    if max_length is None:
        return
    if type(max_length) is not int:
        raise TypeError(f"max_length must be an int or None, got {max_length!r}")
    if not 0 <= max_length <= k_pack.shape[1]:
        raise ValueError(
            f"max_length must be between 0 and the cache's {k_pack.shape[1]}, got {max_length}"
        )


def check_pack_inputs(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """``q, k [B, T, H|H_kv, D]`` and ``q_low, k_low [B, T, H_kv|H, R]``."""
    tensors = {"q": q, "k": k, "q_low": q_low, "k_low": k_low}
    for name, t in tensors.items():
        check_float_tensor(name, t)
    for name, t in tensors.items():
        check_dims(name, t, "[B, T, H, D]" if name in ("q", "k") else "[B, T, H, R]")
        check_rows(name, t.shape[:3])
    check_same("q", q, k=k, q_low=q_low, k_low=k_low)
    B, T, H, D = q.shape
    H_kv, R = k.shape[2], q_low.shape[-1]
    check_shape("k", k, (B, T, H_kv, D), "[B, T, H_kv, D] like q")
    if R > D:
        raise ValueError(f"q_low must have at most D = {D} lanes, got R = {R}")
    check_shape("q_low", q_low, (B, T, H_kv, R), "[B, T, H_kv, R]: one row per key head")
    check_shape("k_low", k_low, (B, T, H, R), "[B, T, H, R]: one row per query head")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The autocast dtype on ``device``; None where autocast is off or does not exist."""
    if not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@internals.constant  # before torch 2.12 the compiler cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)  # not on "meta"


def in_dtype(dtype: torch.dtype | None, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in ``dtype``; None: as they are."""
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def observed(*tensors: Tensor | None) -> bool:
    """Whether something besides autograd has to trace the operators of a call on these tensors.

    Compilers and exporters, ``torch.jit.trace``, ``torch.func``, dispatch modes, tensor subclasses,
    batched gradients: they see operators, but no launch. And a launch reads memory alone: a lazily
    negated tensor does not hold its values.
    """
    if torch.compiler.is_compiling() or internals.modes_active():
        return True
    for t in tensors:
        if t is not None and (
            (type(t) is not Tensor and type(t) is not Parameter)
            or t.is_neg()
            or internals.is_batch_of_gradients(t)
        ):
            return True
    return False


def have_addresses(*tensors: Tensor) -> bool:
    """Whether these tensors have data pointers: none is traced or wrapped."""
    if torch.compiler.is_compiling() or internals.transforms_active():
        return False
    return all(type(t) is Tensor or type(t) is Parameter for t in tensors)


def transformed() -> bool:
    """Whether a ``torch.func`` transform is active outside of a compiler."""
    return not torch.compiler.is_compiling() and internals.transforms_active()


def distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor, which holds one shard here."""
    return any(type(t).__name__ == "DTensor" for t in tensors)


def too_old(needs: str, device: torch.device) -> str | None:
    """Why a GPU cannot run what is written for Ampere, or None; begins with ``needs``."""
    found = torch.cuda.get_device_capability(device)
    if found >= (8, 0):
        return None
    return f"{needs} compute capability 8.0 (Ampere) or newer, got {found[0]}.{found[1]}"


def context_parallel() -> bool:
    """Whether ``torch.distributed``'s ``context_parallel`` has sharded the sequences.

    The tensors do not show it: each process holds its shard as a plain tensor, and PyTorch's
    attention is replaced.
    """
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    return module.startswith("torch.distributed.tensor")


def refuse_context_parallel() -> None:
    """NotImplementedError where attention would see only the local shard of a sequence."""
    if context_parallel():
        raise NotImplementedError(
            "context_parallel: ra_triton would attend to the local piece of each sequence alone; "
            "call it outside of context_parallel, on whole sequences"
        )


def allows_tf32() -> bool:
    """Whether PyTorch's float32 products on a GPU may round their operands to TF32.

    This one setting follows all others, those of ``torch.set_float32_matmul_precision`` too, whose
    own getter raises after ``torch.backends`` was used for any device.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def may_keep(device: torch.device) -> bool:
    """Whether a tensor that is made on ``device`` now may be cached for later calls.

    Not while a compiler, an exporter or a CUDA graph records, nor inside a ``torch.func`` transform
    or a dispatch mode (fake tensors, tracing): a tensor made there is not valid outside.
    """
    return not (
        torch.compiler.is_compiling()
        or internals.modes_active()
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )

"""2:4 sparse weights for inference: all columns of a fused projection, or the reciprocal ones.

Of four neighbours along the input dimension C the two of larger magnitude stay and the others are
zero, so that sparse tensor cores multiply half as much. On a GPU the product is PyTorch's
(``torch.sparse.to_sparse_semi_structured``: cuSPARSELt or CUTLASS), on a CPU it is that of the
pruned dense weight. W_recip alone cannot be sparse: its R columns are fewer than a sparse operand
has rows, and ``W_q W_recip`` is dense again (measured in ``bench/results/sparsity-cpu.md``).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ra_triton.checks import check_choice, check_float_tensor, too_old
from ra_triton.weights.layout import WEIGHT_LAYOUTS, RALayout
from ra_triton.weights.reduced import WHICH, ReducedWeight, layout_of_columns, take_columns

GROUP, KEPT = 4, 2  # along C
SPARSE_DTYPES = (torch.float16, torch.bfloat16)
# What the rows (columns of W_fused) and the columns (C) of a sparse operand are multiples of.
LIMITS = {"cusparselt": (16, 16), "cutlass": (32, 64)}
CUSPARSELT_OF_HOPPER = 602  # version 0.6.2; CUTLASS's kernels are for compute capability 8 alone


@dataclass(frozen=True, eq=False)
class SparseWeight(ReducedWeight):
    """A fused projection with 2:4 sparse columns, made by :func:`sparsify_weight`; never written.

    Both matrices hold a column of W_fused per row, as ``nn.Linear`` does.

    Attributes:
        data: ``[N_s, C]``: all N columns in packed order, or ``[K_low | Q_low]``. On a GPU
            compressed, a ``torch.sparse.SparseSemiStructuredTensor``.
        others: ``[N - N_s, C]``: the columns ``[Q_std | K_std | V]``; None where all are sparse.
        layout: heads, head dim and R.
    """

    data: Tensor
    others: Tensor | None
    layout: RALayout
    kind: ClassVar = ("sparse", "a sparse")
    has_forward_mode: ClassVar = True  # PyTorch's product

    @property
    def dtype(self) -> torch.dtype:
        """Of all its elements; x must have the same."""
        return self.data.dtype

    def check_dtype(self, dtype: torch.dtype) -> None:
        """TypeError if it cannot be multiplied with an x in this dtype."""
        if self.dtype != dtype:
            raise TypeError(
                f"W_fused must be {dtype} like x, got {self.dtype}; make it sparse in that dtype"
            )

    def dense(self) -> Tensor:
        """``W_fused [C, N]`` in packed order with its zeros, to be saved.

        :func:`sparsify_weight` of it, in the same dtype and with ``weight_layout="packed"``, is
        this weight again.
        """
        columns = self.data.to_dense().mT  # data itself where it is not compressed
        return columns if self.others is None else self.layout.put_low(columns, self.others.mT)

    def __repr__(self) -> str:
        """Sizes, not values."""
        return (
            f"SparseWeight({self.which!r}, shape={self.shape}, {self.layout}, "
            f"dtype={self.dtype}, device={self.device})"
        )


@torch.no_grad()
def sparsify_weight(
    W_fused: Tensor,
    R: int,
    *,
    which: str = "reciprocal",
    n_head: int | None = None,
    n_kv_head: int | None = None,
    weight_layout: str = "split",
) -> SparseWeight:
    """Prune the columns of a fused projection to 2 of 4 by magnitude; for inference.

    Of equal magnitudes the first ones stay. Nothing is trained after it; ``bench/sparsity.py``
    measures what that costs.

    Args:
        W_fused: ``[C, N]``, ``N = (n_head + 2 * n_kv_head) * D``, C a multiple of 4. On a GPU
            float16 or bfloat16, with sizes that its sparse kernels take; on a CPU float32 too.
        R: reciprocal rank, ``0 <= R <= D``.
        which: ``"reciprocal"`` for the columns Q_low and K_low, ``(n_head + n_kv_head) * R`` of
            them, or ``"all"``.
        n_head: query heads; ``None`` means heads of 64.
        n_kv_head: key/value heads (GQA); ``None`` means ``n_head``.
        weight_layout: column order of ``W_fused``, ``"split"`` or ``"packed"``.

    Returns:
        What :func:`ra_attention` and :func:`project` take for ``W_fused``, on the same device.

    Raises:
        TypeError: not a tensor, a dtype that is not supported, counts that are no ints.
        ValueError: shapes that do not fit, or that the GPU's sparse kernels do not take; unknown
            choices; ``which="reciprocal"`` without reciprocal columns; a weight that is not finite.
        NotImplementedError: a device without sparse kernels.

    Source: 2:4 sparsity, arXiv:2104.08378.
    """
    check_choice("which", which, WHICH)
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    check_float_tensor("W_fused", W_fused)
    if W_fused.dim() != 2 or W_fused.shape[0] < GROUP or W_fused.shape[0] % GROUP:
        raise ValueError(
            f"W_fused must be [C, N] with C a multiple of {GROUP}, got {tuple(W_fused.shape)}"
        )
    layout = layout_of_columns(W_fused, R, which, n_head, n_kv_head)
    sparse_rows = layout.columns if which == "all" else (layout.n_head + layout.n_kv_head) * R
    kernels = None
    if W_fused.device.type != "cpu":
        kernels = kernels_on(W_fused.device)
        check_limits(kernels, which, sparse_rows, W_fused.shape[0], W_fused.dtype)
    rows, others = take_columns(W_fused, layout, which, weight_layout)
    data = prune(rows)
    if kernels == "cusparselt":
        data = torch.sparse.to_sparse_semi_structured(data)
    elif kernels == "cutlass":
        data = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(data)
    return SparseWeight(data, others, layout)


def prune(rows: Tensor) -> Tensor:
    """The two of larger magnitude of each four along the last dim; the first ones of equal ones."""
    groups = rows.unflatten(-1, (-1, GROUP))
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., KEPT:], True)
    return groups.masked_fill(dropped, 0.0).flatten(-2)


def project(x: Tensor, W: SparseWeight, bias: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W + bias`` ``[B, T, N]`` in packed order."""
    with torch.autocast(x.device.type, enabled=False):
        if W.others is None:
            # Sparse kernels may give a transposed result, and attention reads whole lanes.
            return F.linear(x, W.data, bias).contiguous()
        y = W.layout.put_low(F.linear(x, W.data), F.linear(x, W.others))
        return y if bias is None else y + bias


# What a GPU's sparse kernels take


def kernels_on(device: torch.device) -> str:
    """``"cusparselt"`` or ``"cutlass"``: what multiplies on a CUDA device, else an error."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise NotImplementedError(
            f"2:4 sparse products need an NVIDIA GPU, or a CPU to try them, got {device}"
        )
    reason = too_old("2:4 sparse products need", device)
    if reason is not None:
        raise NotImplementedError(f"{reason}; use the dense weight")
    capability = torch.cuda.get_device_capability(device)
    library = torch.backends.cusparselt
    version = (library.version() or 0) if library.is_available() else 0
    if version >= (CUSPARSELT_OF_HOPPER if capability >= (9, 0) else 1):
        return "cusparselt"
    if capability >= (9, 0):
        raise NotImplementedError(
            f"2:4 sparse products on compute capability {capability[0]}.{capability[1]} need "
            f"cuSPARSELt 0.6.2 or newer, got {version or 'none'}; use the dense weight"
        )
    return "cutlass"


def check_limits(kernels: str, which: str, rows: int, channels: int, dtype: torch.dtype) -> None:
    """TypeError or ValueError if a sparse operand ``[rows, C]`` is none that the kernels take."""
    if dtype not in SPARSE_DTYPES:
        raise TypeError(
            f"W_fused must be float16 or bfloat16 for 2:4 sparse products on a GPU, got {dtype}"
        )
    row_step, channel_step = LIMITS[kernels]
    if channels % channel_step:
        raise ValueError(
            f"W_fused must have a multiple of {channel_step} channels for {kernels}, got {channels}"
        )
    if rows % row_step or rows < row_step:
        columns = "columns" if which == "all" else "reciprocal columns, (n_head + n_kv_head) * R,"
        remedy = "" if which == "all" else "; which='all' may fit"
        raise ValueError(
            f"W_fused must have a multiple of {row_step} {columns} for {kernels}, "
            f"got {rows}{remedy}"
        )

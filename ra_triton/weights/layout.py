"""Column layout of the fused projection: the only place that knows which column is which lane.

One GEMM ``x @ W_fused`` yields every lane that attention reads. Its columns come in two orders:

``split``   five sections, head-major inside each::

    [ Q_std | K_std | V | Q_low | K_low ]

``packed``  three sections of whole heads; the GEMM's output *is* the attention operands::

    [ q_pack | k_pack | V ]    q_pack = [Q_std|K_low] per head,  k_pack = [K_std|Q_low] per head

With grouped heads (GQA), Q_std and K_low have ``n_head`` heads; K_std, V and Q_low ``n_kv_head``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_LAYOUTS = ("split", "packed")
GPT2_HEAD_DIM = 64  # n_head=None means heads of this size


class Columns(NamedTuple):
    """Where the columns of a partial product belong among the packed columns.

    Column j goes to ``start + j + min(j // lanes, heads) * gap``.
    """

    start: int = 0
    lanes: int = 1
    heads: int = 0
    gap: int = 0


@dataclass(frozen=True)
class RALayout:
    """Sizes of a fused projection: heads, key/value heads, packed head dim ``D`` and rank ``R``."""

    n_head: int
    n_kv_head: int
    head_dim: int
    R: int

    @classmethod
    def from_columns(
        cls, columns: int, R: int, n_head: int | None = None, n_kv_head: int | None = None
    ) -> "RALayout":
        """Solve ``columns = (n_head + 2 * n_kv_head) * D`` for what is not given.

        Args:
            columns: width of ``W_fused``.
            R: reciprocal rank, ``0 <= R <= D``.
            n_head: query heads; ``None`` means heads of 64.
            n_kv_head: key/value heads; ``None`` means ``n_head``.

        Raises:
            TypeError: a count that is not an int.
            ValueError: columns that do not divide, heads that do not group, R out of range.
        """
        for name, count in (("n_head", n_head), ("n_kv_head", n_kv_head)):
            if count is not None and type(count) is not int:
                raise TypeError(f"{name} must be an int or None, got {count!r}")
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if type(R) is not int:
            raise TypeError(f"R must be an int, got {R!r}")
        if n_head is None:
            per_head = (1 if n_kv_head else 3) * GPT2_HEAD_DIM
            rest = columns - 2 * (n_kv_head or 0) * GPT2_HEAD_DIM
            if rest <= 0 or rest % per_head:
                raise ValueError(
                    f"W_fused has {columns} columns, which do not make heads of {GPT2_HEAD_DIM} "
                    f"with n_kv_head={n_kv_head}; pass n_head"
                )
            n_head = rest // per_head
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head % n_kv_head:
            raise ValueError(f"n_head={n_head} must be a multiple of n_kv_head={n_kv_head}")
        if columns <= 0 or columns % (n_head + 2 * n_kv_head):
            raise ValueError(
                f"W_fused has {columns} columns; with n_head={n_head} and n_kv_head={n_kv_head} "
                f"expected a positive multiple of n_head + 2 * n_kv_head = {n_head + 2 * n_kv_head}"
            )
        head_dim = columns // (n_head + 2 * n_kv_head)
        if not 0 <= R <= head_dim:
            raise ValueError(f"R must be between 0 and the head dim {head_dim}, got {R}")
        return cls(n_head, n_kv_head, head_dim, R)

    @property
    def d_std(self) -> int:
        """Standard lanes per head, ``D - R``."""
        return self.head_dim - self.R

    @property
    def packed_heads(self) -> int:
        """Heads in the packed buffer ``[B, T, packed_heads, D]``: q, then k, then v."""
        return self.n_head + 2 * self.n_kv_head

    @property
    def columns(self) -> int:
        """Width of ``W_fused``."""
        return self.packed_heads * self.head_dim

    @property
    def split_sections(self) -> dict[str, tuple[int, int]]:
        """``{section: (heads, lanes per head)}`` in split order."""
        H, H_kv = self.n_head, self.n_kv_head
        return {
            "q_std": (H, self.d_std),
            "k_std": (H_kv, self.d_std),
            "v": (H_kv, self.head_dim),
            "q_low": (H_kv, self.R),
            "k_low": (H, self.R),
        }

    def split_columns(self, w: Tensor) -> dict[str, Tensor]:
        """Views of the five sections of ``w [..., columns]``, each ``[..., heads, lanes]``."""
        sections = self.split_sections
        parts = w.split([heads * lanes for heads, lanes in sections.values()], dim=-1)
        return {
            name: part.unflatten(-1, shape)
            for (name, shape), part in zip(sections.items(), parts, strict=True)
        }

    def join_columns(self, sections: dict[str, Tensor]) -> Tensor:
        """Inverse of :meth:`split_columns`: sections to ``[..., columns]``."""
        return torch.cat([sections[name].flatten(-2) for name in self.split_sections], dim=-1)

    def pack(self, w: Tensor) -> Tensor:
        """Reorder ``w [..., columns]`` from split to packed order; differentiable."""
        s = self.split_columns(w)
        q_pack = torch.cat((s["q_std"], s["k_low"]), dim=-1)  # [..., H, D]
        k_pack = torch.cat((s["k_std"], s["q_low"]), dim=-1)  # [..., H_kv, D]
        return torch.cat((q_pack, k_pack, s["v"]), dim=-2).flatten(-2)

    def unpack(self, w: Tensor) -> Tensor:
        """Reorder ``w [..., columns]`` from packed to split order: the inverse of :meth:`pack`."""
        q_pack, k_pack, v = self.views(w)
        q_std, k_low = q_pack.split([self.d_std, self.R], dim=-1)
        k_std, q_low = k_pack.split([self.d_std, self.R], dim=-1)
        return self.join_columns(
            {"q_std": q_std, "k_std": k_std, "v": v, "q_low": q_low, "k_low": k_low}
        )

    @property
    def low_columns(self) -> Columns:
        """Of the reciprocal lanes alone: ``[K_low | Q_low]``, head-major."""
        heads = self.n_head + self.n_kv_head
        return Columns(self.d_std, max(1, self.R), heads, self.d_std)

    @property
    def other_columns(self) -> Columns:
        """Of all lanes but the reciprocal ones: ``[Q_std | K_std | V]``, head-major."""
        heads = self.n_head + self.n_kv_head
        if self.d_std == 0:
            return Columns(start=heads * self.R)
        return Columns(0, self.d_std, heads, self.R)

    def take_low(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``(low, others)`` of packed ``w [..., columns]``: those columns, next to each other."""
        q_pack, k_pack, v = self.views(w)
        std, low = torch.cat((q_pack, k_pack), dim=-2).split([self.d_std, self.R], dim=-1)
        return low.flatten(-2), torch.cat((std.flatten(-2), v.flatten(-2)), dim=-1)

    def put_low(self, low: Tensor, others: Tensor) -> Tensor:
        """Inverse of :meth:`take_low`."""
        heads = self.n_head + self.n_kv_head
        std, v = others.split([heads * self.d_std, self.n_kv_head * self.head_dim], dim=-1)
        lanes = [t.unflatten(-1, (heads, n)) for t, n in ((std, self.d_std), (low, self.R))]
        return torch.cat((torch.cat(lanes, dim=-1).flatten(-2), v), dim=-1)

    def views(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views ``(q_pack, k_pack, v)`` of a packed buffer ``[..., columns]``, heads split out."""
        heads = packed.unflatten(-1, (self.packed_heads, self.head_dim))
        sizes = [self.n_head, self.n_kv_head, self.n_kv_head]
        q_pack, k_pack, v = heads.split_with_sizes(sizes, dim=-2)
        return q_pack, k_pack, v

"""Reciprocal attention as one flash attention over packed operands, in Triton."""

import importlib as _importlib
import typing as _typing

from ra_triton.api import (
    decode_attention,
    pack_qk,
    pack_qk_,
    packed_attention,
    project,
    ra_attention,
    which_backend,
)
from ra_triton.varlen import packed_attention_varlen
from ra_triton.weights.fused import compose_weights, pack_weight, unpack_weight
from ra_triton.weights.quantization import QuantizedWeight, quantize_weight
from ra_triton.weights.sparsity import SparseWeight, sparsify_weight

if _typing.TYPE_CHECKING:
    from ra_triton import nn

__version__ = "0.1.0"

__all__ = [
    "QuantizedWeight",
    "SparseWeight",
    "compose_weights",
    "decode_attention",
    "nn",
    "pack_qk",
    "pack_qk_",
    "pack_weight",
    "packed_attention",
    "packed_attention_varlen",
    "project",
    "quantize_weight",
    "ra_attention",
    "sparsify_weight",
    "unpack_weight",
    "which_backend",
]


# To a type checker, such a function would make every name an attribute.
if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """``ra_triton.nn`` without an import of its own, imported when it is first used."""
        if name == "nn":
            return _importlib.import_module("ra_triton.nn")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With ``nn``, whether it was used or not."""
    return sorted({*globals(), "nn"})

"""Reciprocal attention as one flash attention over packed operands, in Triton."""

from ra_triton.api import (
    decode_attention,
    pack_qk,
    pack_qk_,
    packed_attention,
    project,
    ra_attention,
    which_backend,
)
from ra_triton.quantization import QuantizedWeight, quantize_weight
from ra_triton.sparsity import SparseWeight, sparsify_weight
from ra_triton.varlen import packed_attention_varlen
from ra_triton.weights import compose_weights, pack_weight, unpack_weight

__version__ = "0.1.0"

__all__ = [
    "QuantizedWeight",
    "SparseWeight",
    "compose_weights",
    "decode_attention",
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

"""Modules: a drop-in attention layer, its exchange with stock GPT-2, and inference buffers."""

from ra_triton.nn.attention import RACausalSelfAttention
from ra_triton.nn.cache import KVCache
from ra_triton.nn.composed import ComposedLinear
from ra_triton.nn.gpt2 import from_gpt2, to_gpt2
from ra_triton.nn.llama import from_llama, to_llama
from ra_triton.nn.quantized import QuantizedLinear
from ra_triton.workspace import Workspace

__all__ = [
    "ComposedLinear",
    "KVCache",
    "QuantizedLinear",
    "RACausalSelfAttention",
    "Workspace",
    "from_gpt2",
    "from_llama",
    "to_gpt2",
    "to_llama",
]

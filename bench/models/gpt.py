"""A small GPT-2 after nanoGPT, with its names, and with the attention layer as an argument.

Activations are GPT-2's own (tanh GELU), so weights exchange with stock GPT-2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from bench.models.sampling import generate, sampler
from ra_triton.nn import KVCache, RACausalSelfAttention


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model; the names are nanoGPT's.

    Attributes:
        block_size: longest sequence.
        vocab_size: tokens; 256 for bytes.
        n_layer: blocks.
        n_head: heads per block.
        n_embd: channels, a multiple of ``n_head``.
        dropout: probability, in training.
        bias: whether linear layers and layer norms have one.
    """

    block_size: int = 128
    vocab_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True


class CausalSelfAttention(nn.Module):
    """nanoGPT's attention: ``x [B, T, C]`` to ``[B, T, C]``."""

    def __init__(self, config: GPTConfig) -> None:
        """Projections of the config's sizes."""
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the token itself and all before it."""
        return self.resid_dropout(self.c_proj(self.heads(x).flatten(2)))

    def heads(self, x: Tensor) -> Tensor:
        """What the heads say before they are mixed: ``[B, T, H, D]``."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # [B, T, 3, H, D]
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        return y.transpose(1, 2)


AttentionMaker = Callable[[GPTConfig], nn.Module]


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: GPTConfig) -> None:
        """Projections of the config's sizes."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and beside a residual."""

    def __init__(self, config: GPTConfig, attention: AttentionMaker) -> None:
        """``attention(config)`` makes the attention layer."""
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        h = self.ln_1(x)
        x = x + (self.attn(h) if cache is None else self.attn(h, cache))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A language model: tokens ``[B, T]`` to logits ``[B, T, vocab_size]``."""

    def __init__(self, config: GPTConfig, attention: AttentionMaker = CausalSelfAttention) -> None:
        """GPT-2's initialisation; ``attention(config)`` makes each attention layer.

        ``attention`` is called like nanoGPT's class, so ``RACausalSelfAttention.from_config`` fits.
        """
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, attention) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight  # tied
        self.apply(_initialise)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, tokens: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Logits of the next token at each position.

        Args:
            tokens: ``[B, T]``; with caches, those that follow the ones already in there.
            caches: from :meth:`caches`, one a layer.

        Raises:
            ValueError: more tokens than ``block_size``, or than the caches have room for.
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        if caches is None:
            if length > self.config.block_size:
                raise ValueError(f"at most {self.config.block_size} tokens, got {length}")
        else:
            caches[0].check_room(length)  # before a position without an embedding is looked up
            positions = caches[0].lengths[:, None] + positions  # [B, T]
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](positions)
        x = parts["drop"](x)
        blocks: Any = parts["h"]  # a ModuleList
        each: Sequence[KVCache | None] = [None] * len(blocks) if caches is None else caches
        for block, cache in zip(blocks, each, strict=True):
            x = block(x, cache)
        return self.lm_head(parts["ln_f"](x))

    @property
    def takes_caches(self) -> bool:
        """Whether every layer is reciprocal attention, which has a cache."""
        blocks: Any = self.transformer["h"]
        return all(isinstance(block.attn, RACausalSelfAttention) for block in blocks)

    def caches(self, batch: int, max_len: int | None = None) -> list[KVCache]:
        """Empty caches, one a layer, in the dtype that attention runs in.

        Args:
            batch: sequences.
            max_len: tokens that each may reach; ``None`` means ``block_size``.

        Raises:
            NotImplementedError: an attention layer that takes no cache.
            ValueError: a ``max_len`` beyond ``block_size``, whose positions have no embedding.
        """
        config = self.config
        max_len = config.block_size if max_len is None else max_len
        if not self.takes_caches:
            raise NotImplementedError("only RACausalSelfAttention takes a cache")
        if max_len > config.block_size:
            raise ValueError(f"caches of at most {config.block_size} tokens, got {max_len}")
        weight = self.lm_head.weight
        kind = weight.device.type
        on_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if on_autocast else weight.dtype
        blocks: Any = self.transformer["h"]
        layouts = [block.attn.layout for block in blocks]
        return [
            KVCache(batch, max_len, layout.n_kv_head, layout.head_dim, dtype, weight.device)
            for layout in layouts
        ]

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token of ``[B, T]`` after those before it."""
        return next_token_loss(self(tokens[:, :-1]), tokens)

    def adamw(self, lr: float, *, weight_decay: float = 0.1, fused: bool = False) -> AdamW:
        """AdamW as in nanoGPT: matrices decay; biases, norms and gates do not."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        use_cache: bool | None = None,
        cuda_graph: bool = False,
    ) -> Tensor:
        """``tokens [B, T]`` and ``count`` drawn ones after them; call ``eval()`` first.

        A text longer than ``block_size`` goes on with its last ``block_size`` tokens, and from
        there on without a cache: see bench/models/sampling.py.

        Args:
            tokens: ``[B, T]``, at least one each.
            count: how many to draw.
            generator: where chance comes from; ``None`` means PyTorch's own.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw among so many likeliest tokens; ``None`` means all.
            seed: of a new generator, instead of ``generator``.
            use_cache: whether layers keep keys and values; ``None`` means where they can.
            cuda_graph: replay decoding steps as one CUDA graph.

        Raises:
            TypeError: no numbers.
            ValueError: values out of range, no tokens, a generator and a seed, a graph without
                a cache or without a GPU.
            NotImplementedError: a cache for layers that take none.
        """
        draw = sampler(temperature, top_k, _generator(tokens.device, generator, seed))
        if type(count) is not int:
            raise TypeError(f"count must be an int, got {count!r}")
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B, T] with T > 0, got {tuple(tokens.shape)}")
        use_cache = self.takes_caches and not self.training if use_cache is None else use_cache
        if cuda_graph and not (use_cache and tokens.is_cuda):
            raise ValueError("cuda_graph needs a cache and tokens on a GPU")
        return generate(self, tokens, count, draw, use_cache=use_cache, cuda_graph=cuda_graph)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits ``[B, T, V]`` of all but the last of ``[B, T + 1]``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _generator(
    device: torch.device, generator: torch.Generator | None, seed: int | None
) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("generator and seed exclude each other")
    return torch.Generator(device).manual_seed(seed)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

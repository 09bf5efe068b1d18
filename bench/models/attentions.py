"""The attention layers that training is timed with, by name, all starting from one set of weights.

``plain`` is what a user of nanoGPT has, ``free`` and ``composed`` what the README puts in its
place. Plain and free train the same parameters, so they learn the same; composed trains factors,
whose gradients and AdamW steps are others: :class:`Unfused` trains the same factors in plain
PyTorch, without anything of this package's arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.gpt import CausalSelfAttention, GPTConfig
from ra_triton.nn import RACausalSelfAttention, from_gpt2

PLAIN = "plain"
Model = TypeVar("Model", bound=nn.Module)


class PlainAttention(CausalSelfAttention):
    """Causal attention as users of nanoGPT have it: split, view, SDPA, contiguous, project."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Unfused(RACausalSelfAttention):
    """``composed`` by its definition: W_recip on activations, lanes joined by ``cat``, SDPA.

    Its parameters are those of the composed layer; what it computes is eager PyTorch alone.
    """

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        factors: Any = self.c_attn
        n_std = self.layout.head_dim - self.R
        weights = factors.W_q, factors.W_k, factors.W_v
        q, k, v = ((x @ W).unflatten(-1, (self.n_head, -1)) for W in weights)  # [B, T, H, D]
        q_std, k_std = q[..., :n_std], k[..., :n_std]
        q_low, k_low = ((t @ factors.W_recip if self.R else t[..., :0]) for t in (q, k))
        gated = factors.w_std[:, None] * q_std, factors.w_rec[:, None] * k_low
        q_pack = torch.cat([t.to(v.dtype) for t in gated], -1).transpose(1, 2)
        k_pack = torch.cat((k_std, q_low), -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q_pack, k_pack, v.transpose(1, 2), is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


Maker = Callable[[GPTConfig, int], nn.Module]


def _plain(config: GPTConfig, R: int) -> nn.Module:
    return PlainAttention(config)


def _free(config: GPTConfig, R: int) -> nn.Module:
    return RACausalSelfAttention.from_config(config, R=R)


def _composed(config: GPTConfig, R: int) -> nn.Module:
    return RACausalSelfAttention.from_config(config, R=R, parametrisation="composed")


def _unfused(config: GPTConfig, R: int) -> nn.Module:
    return Unfused.from_config(config, R=R, parametrisation="composed")


ATTENTIONS: dict[str, Maker] = {PLAIN: _plain, "free": _free, "composed": _composed}
# By what is timed: the layer in eager PyTorch that trains the same parameters.
REFERENCES: dict[str, Maker] = {PLAIN: _plain, "free": _plain, "composed": _unfused}


class Stack(nn.Module):
    """Attention layers one after the other, each beside a residual: a GPT without its MLPs."""

    def __init__(self, make: Maker, config: GPTConfig, R: int) -> None:
        """``n_layer`` of them."""
        super().__init__()
        self.h = nn.ModuleList(make(config, R) for _ in range(config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        for layer in self.h:
            x = x + layer(x)
        return x


def start_from(model: Model, state: Mapping[str, Tensor]) -> Model:
    """Load the weights of a plain model; composed layers take the factors of each c_attn.

    ``from_gpt2`` finds factors whose product is the same weight, bit by bit.
    """
    if any(isinstance(m, RACausalSelfAttention) for m in model.modules()):
        return from_gpt2(model, state)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def let_attention_matter(model: Model) -> Model:
    """Weights under which the loss depends on attention: scores of unit variance, values too.

    GPT-2's own start has scores near 0 and a tenth of the values; a loss would hardly show a mask
    that is missing.
    """
    for module in model.modules():
        if isinstance(module, PlainAttention):
            for linear in (module.c_attn, module.c_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return model

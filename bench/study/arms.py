"""The arms of the study: attention layers, and the values that each starts from.

``D = C / H`` lanes a head, ``R`` of them reciprocal. Every arm starts from the same numbers where
it has a parameter of the same name and shape as the baseline, which is built from the same seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.gpt import GPT, CausalSelfAttention, GPTConfig
from bench.study.probe import reciprocal_share
from ra_triton import compose_weights, pack_qk, packed_attention
from ra_triton.nn import RACausalSelfAttention, from_gpt2
from ra_triton.weights.layout import RALayout


class OutputGateAttention(CausalSelfAttention):
    """Plain attention with a sigmoid gate per head on its output, before the heads are mixed.

    ``y[b, t, h] = sigmoid(x[b, t] · w_h) * attention(x)[b, t, h]``: the head-wise gate of
    arXiv:2505.06708, ``H`` more rows of weights and no other cost.
    """

    def __init__(self, config: GPTConfig) -> None:
        """The baseline's layers, and the gate's."""
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, config.n_head, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        y = self.heads(x) * self.gate(x)[..., None]
        return self.resid_dropout(self.c_proj(y.flatten(2)))

    def gate(self, x: Tensor) -> Tensor:
        """``[B, T, H]`` in (0, 1)."""
        return torch.sigmoid(self.c_gate(x))


class LatentAttention(nn.Module):
    """Multi-head latent attention, with ``R`` reciprocal lanes a head; ``R = 0`` is MLA.

        c = RMSNorm(x W_down)                    [B, T, L], all that a decoder has to keep
        Q_std = x W_q,  K_std = c W_k            D - R lanes a head
        V = c W_v                                D lanes a head
        Q_low = c W_q_low,  K_low = c W_k_low    R lanes a head
        S = (Q_std K_stdᵀ + K_low Q_lowᵀ) / sqrt(D),  causal;  out = softmax(S) V

    Both reciprocal operands come from the latent, so the key side ``[K_std | Q_low]`` is a function
    of ``c`` alone, and what a decoder keeps is as small as MLA's. MLA is arXiv:2405.04434 without
    its rotary part, as positions here are learned and added to ``x``. What the reciprocal lanes
    change is that R query lanes a head read the latent instead of ``x``.
    """

    def __init__(self, config: GPTConfig, R: int, backend: str) -> None:
        """Layers of the config's sizes; the latent is as wide as :func:`latent_size` says."""
        super().__init__()
        C, H, L = config.n_embd, config.n_head, latent_size(config, R)
        self.layout = RALayout.from_columns(3 * C, R, H)
        self.R, self.dropout, self.backend = R, config.dropout, backend
        linear = partial(nn.Linear, bias=config.bias)
        self.c_q, self.c_down = linear(C, H * self.layout.d_std), linear(C, L)
        self.norm = nn.RMSNorm(L)
        self.c_k, self.c_v = linear(L, H * self.layout.d_std), linear(L, C)
        self.c_low = linear(L, 2 * H * R) if R else None
        self.c_proj = linear(C, C)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        y = packed_attention(
            *self.packed(x),
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        assert isinstance(y, Tensor)  # no logsumexp was asked for
        return self.resid_dropout(self.c_proj(y.flatten(2)))

    def packed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``q_pack, k_pack, v``: ``[B, T, H, D]`` each."""
        H, R = self.layout.n_head, self.R
        c = self.norm(self.c_down(x).float())  # autocast leaves norms of its own dtype to us
        q, k, v = (t.unflatten(-1, (H, -1)) for t in (self.c_q(x), self.c_k(c), self.c_v(c)))
        if self.c_low is None:
            return q, k, v
        q_low, k_low = self.c_low(c).unflatten(-1, (2, H, R)).unbind(2)
        # Room for the lanes that pack_qk writes.
        q, k = (F.pad(t, (0, R)) for t in (q, k))
        return (*pack_qk(q, k, q_low, k_low, backend=self.backend), v)

    @torch.no_grad()
    def reciprocal_share(self, x: Tensor) -> Tensor:
        """As :meth:`ra_triton.nn.RACausalSelfAttention.reciprocal_share`: ``[H]`` in [0, 1]."""
        q_pack, k_pack, _ = self.packed(x)
        return reciprocal_share(q_pack, k_pack, self.R)


def latent_size(config: GPTConfig, R: int) -> int:
    """``L`` of :class:`LatentAttention` for as many parameters as plain attention has.

    A multiple of 8, as matrix units like it, and at least 8.
    """
    C, low = config.n_embd, config.n_head * R
    exact = (2 * C * C + C * low) / (3 * C + low + 1)
    return max(8, 8 * round(exact / 8))


@dataclass(frozen=True)
class Arm:
    """A kind of attention layer.

    Attributes:
        about: one line for ``--list``.
        make: the layer, from the model's config, R and the backend.
        start: gives a model of this arm (first) its initial values, from a baseline's (second).
        has_rank: whether R means something.
    """

    about: str
    make: Callable[[GPTConfig, int, str], nn.Module]
    start: Callable[[GPT, GPT], None]
    has_rank: bool = False


@torch.no_grad()
def _start_from_agreeing(model: GPT, baseline: GPT) -> None:
    """The baseline's numbers wherever name and shape agree."""
    given = dict(baseline.named_parameters())
    for name, p in model.named_parameters():
        if name in given and given[name].shape == p.shape:
            p.copy_(given[name])


def _start_folded(model: GPT, baseline: GPT) -> None:
    """Factors that compose to the baseline's weights: the same function at step 0."""
    from_gpt2(model, baseline.state_dict())


@torch.no_grad()
def _start_tied(model: GPT, baseline: GPT) -> None:
    """W_fused composed of the baseline's W_q, W_k, W_v and a random W_recip, then free.

    ``Q_low = Q W_recip`` and ``K_low = K W_recip`` with W_recip normal of variance ``1 / D``: low
    lanes have the scale of the others, and repeat what those say.
    """
    _start_from_agreeing(model, baseline)
    for layer in model.modules():
        if isinstance(layer, RACausalSelfAttention):
            assert isinstance(layer.c_attn, nn.Linear)
            W_q, W_k, W_v = layer.c_attn.weight.mT.chunk(3, dim=1)  # the baseline's order
            D = layer.n_embd // layer.n_head
            W_recip = torch.randn(D, layer.R) / D**0.5
            W_fused = compose_weights(
                W_q, W_k, W_v, W_recip, n_head=layer.n_head, weight_layout="packed"
            )
            layer.c_attn.weight.copy_(W_fused.mT)


@torch.no_grad()
def _start_latent(model: GPT, baseline: GPT) -> None:
    """What agrees, and the baseline's W_q as far as its lanes are there."""
    _start_from_agreeing(model, baseline)
    plain = dict(baseline.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, LatentAttention):
            attention = plain[name]
            assert isinstance(attention, CausalSelfAttention)
            W_q = attention.c_attn.weight.chunk(3)[0].unflatten(0, (attention.n_head, -1))
            layer.c_q.weight.copy_(W_q[:, : layer.layout.d_std].flatten(0, 1))  # [H, D, C] cut


def _reciprocal(parametrisation: str, config: GPTConfig, R: int, backend: str) -> nn.Module:
    return RACausalSelfAttention.from_config(
        config, R=R, parametrisation=parametrisation, backend=backend
    )


ARMS = {
    "baseline": Arm(
        "plain attention, one c_attn, PyTorch's SDPA",
        lambda config, R, backend: CausalSelfAttention(config),
        _start_from_agreeing,
    ),
    "ra": Arm(
        "free W_fused from the baseline's numbers: the same function and gradients, an A/A control",
        partial(_reciprocal, "free"),
        _start_from_agreeing,
        has_rank=True,
    ),
    "ra-tied-init": Arm(
        "free W_fused that starts composed with a random W_recip: RA as an initialisation",
        partial(_reciprocal, "free"),
        _start_tied,
        has_rank=True,
    ),
    "ra-composed": Arm(
        "W_q, W_k, W_v, tied W_recip and gates, all trained: RA as a parametrisation",
        partial(_reciprocal, "composed"),
        _start_folded,
        has_rank=True,
    ),
    "mla": Arm(
        "latent attention: K and V up-projected from one latent, parameters matched",
        lambda config, R, backend: LatentAttention(config, 0, backend),
        _start_latent,
    ),
    "ra+mla": Arm(
        "latent attention with reciprocal lanes from the latent, parameters matched",
        LatentAttention,
        _start_latent,
        has_rank=True,
    ),
    "output-gate": Arm(
        "plain attention with a sigmoid gate per head on its output",
        lambda config, R, backend: OutputGateAttention(config),
        _start_from_agreeing,
    ),
}
RECIPROCAL = ("ra-tied-init", "ra-composed", "ra+mla")  # where R makes another model


def build_model(arm: str, R: int, config: GPTConfig, *, seed: int, backend: str = "auto") -> GPT:
    """A model of an arm, on the CPU in float32, with its initial values.

    Args:
        arm: a name of :data:`ARMS`.
        R: reciprocal rank; without a meaning where the arm has no reciprocal lanes.
        config: sizes.
        seed: of all initial values; shared ones are the same numbers in every arm.
        backend: of ra_triton; the baseline and the output gate always use SDPA.

    Raises:
        ValueError: R beyond the head dim.
    """
    torch.manual_seed(seed)
    baseline = GPT(config)
    model = _make(arm, R, config, backend)
    ARMS[arm].start(model, baseline)
    return model


def count_parameters(arm: str, R: int, config: GPTConfig) -> int:
    """How many numbers an arm trains; takes no memory and no random numbers."""
    with torch.device("meta"):
        return parameter_count(_make(arm, R, config, "auto"))


def _make(arm: str, R: int, config: GPTConfig, backend: str) -> GPT:
    return GPT(config, lambda config: ARMS[arm].make(config, R, backend))


def parameter_count(model: nn.Module) -> int:
    """Trained numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters())

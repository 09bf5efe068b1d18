"""Models in training from equal weights on equal batches, and the gate that holds them.

The gate is the loss curve of the first steps and the gradient of the first. The answer is float32,
from plain PyTorch that trains the same parameters. The scale is how far bf16 autocast takes plain
PyTorch from it, by the kernel of SDPA with the largest error. Losses may be twice as far away, and
gradients four times.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.gate import RMS_FACTOR, ROW_FACTOR, why_it_broke
from bench.harness.report import ERROR
from bench.models.attentions import (
    ATTENTIONS,
    PLAIN,
    REFERENCES,
    Maker,
    let_attention_matter,
    start_from,
)
from bench.models.data import Text, batch_of
from bench.models.gpt import GPT, GPTConfig

GATE_STEPS = 10  # of the loss curves
BATCHES = 16  # on the device before the first step
REFERENCE_TOKENS = 2**14  # of one micro-batch: float32 activations of 64 sequences do not fit
LEARNING_RATE = 6e-4
KERNELS = {
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
MODES: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "compile": torch.compile,
    "reduce-overhead": partial(torch.compile, mode="reduce-overhead"),
}
Batch = tuple[Tensor, Tensor]  # tokens and targets, [B, T]
Look = Callable[[dict[str, Tensor]], None]  # takes gradients by parameter


@dataclass(frozen=True)
class Size:
    """A GPT and its batch: ``B`` sequences of ``T`` tokens, ``H`` heads of ``D``."""

    name: str
    B: int
    T: int
    layers: int = 12
    H: int = 12
    C: int = 768
    vocab: int = 50304

    @property
    def D(self) -> int:
        """Lanes of a head."""
        return self.C // self.H

    @property
    def config(self) -> GPTConfig:
        """Of the model: nanoGPT's for training from scratch."""
        return GPTConfig(self.T, self.vocab, self.layers, self.H, self.C, 0.0, bias=False)


class Loss(nn.Module):
    """A model that returns its mean loss, as nanoGPT's does when it gets targets."""

    def __init__(self, gpt: GPT) -> None:
        """Around the model."""
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of tokens ``[B, T]`` and the ones that follow, ``[B, T]``."""
        logits = self.gpt(tokens)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class Trainee:
    """A model in training."""

    def __init__(self, gpt: GPT, mode: str = "eager", autocast: bool = True) -> None:
        """``mode`` is one of :data:`MODES`."""
        self.gpt, self.mode, self.autocast = gpt, mode, autocast
        self.device_type = gpt.lm_head.weight.device.type
        self.optimizer = gpt.adamw(LEARNING_RATE, fused=True)
        self.model = MODES[mode](Loss(gpt))

    def step(self, *pieces: Batch, look: Look | None = None) -> list[Tensor]:
        """One step; the losses of the batch's pieces, which the next step may overwrite.

        ``look`` is called with the gradients before they are clipped.
        """
        whole = sum(len(tokens) for tokens, _ in pieces)
        losses = []
        for tokens, targets in pieces:
            if self.mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(tokens, targets)
            if len(pieces) > 1:
                loss = loss * (len(tokens) / whole)
            loss.backward()
            losses.append(loss.detach())
        if look is not None:
            look({n: p.grad for n, p in self.gpt.named_parameters() if p.grad is not None})
        nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def losses(
        self, batches: Sequence[Batch], look: Look, tokens: int | None = None
    ) -> Iterator[float]:
        """The loss of each step; ``look`` gets the first gradient.

        With ``tokens`` a batch goes in pieces of at most so many, whose gradients add up.
        """
        for i, batch in enumerate(batches):
            rows = len(batch[0]) if tokens is None else max(1, tokens // batch[0].shape[1])
            pieces = list(zip(*(t.split(rows) for t in batch), strict=True))
            yield sum(loss.item() for loss in self.step(*pieces, look=None if i else look))


@dataclass
class Answer:
    """The first steps in eager PyTorch.

    Attributes:
        losses: of each step in float32.
        rounded: the same under bf16 autocast, by each of SDPA's kernels that runs.
        gradients: of the first step in float32, by parameter.
        errors: the largest RMS error of a gradient among ``rounded``, by :func:`_pool`.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    rounded: list[list[float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def add_rounded(self, losses: list[float], errors: dict[str, float]) -> None:
        """One more run under autocast; no error counts as smaller than bf16's own rounding."""
        self.rounded.append(losses)
        for pool, size in _pooled_rms(self.gradients.items()).items():
            rounding = torch.finfo(torch.bfloat16).eps / 4 * size
            self.errors[pool] = max(self.errors.get(pool, 0.0), errors[pool], rounding)

    def look(self, errors: dict[str, float]) -> Look:
        """What fills ``errors`` with those of the gradients that it is called with."""
        return lambda found: errors.update(gradient_errors(found, self.gradients))

    @property
    def allowed(self) -> float:
        """How far in RMS a loss curve may be from the exact one."""
        return RMS_FACTOR * max(distance(losses, self.losses) for losses in self.rounded)

    def gradient_share(self, errors: Mapping[str, float]) -> tuple[float, str]:
        """The worst gradient's error over what passes, and its pool; few elements need a margin."""
        shares = {pool: errors[pool] / (ROW_FACTOR * scale) for pool, scale in self.errors.items()}
        worst = max(shares, key=lambda pool: math.inf if math.isnan(shares[pool]) else shares[pool])
        return shares[worst], worst

    def failure(self, losses: Sequence[float], errors: Mapping[str, float]) -> str | None:
        """What is wrong with a model's losses or its first gradient, or None."""
        error = distance(losses, self.losses)
        if not error <= self.allowed:  # a NaN fails
            return f"loss curve: RMS error {error:.1e}, at most {self.allowed:.1e} passes"
        share, pool = self.gradient_share(errors)
        if not share <= 1:
            return f"gradient of {pool}: RMS error is {share:.1f} times what passes"
        return None


def gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """RMS error of gradients, those of one parameter in all layers taken together."""
    return _pooled_rms((name, found[name] - t) for name, t in exact.items())


def _pooled_rms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, t in tensors:
        pool = _pool(name)
        squares[pool] = squares.get(pool, 0.0) + t.square().sum().item()
        counts[pool] = counts.get(pool, 0) + t.numel()
    return {pool: math.sqrt(squares[pool] / counts[pool]) for pool in squares}


def _pool(name: str) -> str:
    """``transformer.h.3.attn.c_attn.weight`` → ``attn.c_attn.weight``."""
    return re.sub(r"^transformer\.(h\.\d+\.)?", "", name)


@dataclass
class Setting:
    """What the cases of one size share.

    Attributes:
        size: of model and batch.
        R: reciprocal rank.
        device: of the models.
        batches: of which the first :data:`GATE_STEPS` make the loss curves.
        state: the plain model's weights, from which all start.
        answers: by the maker of the reference.
    """

    size: Size
    R: int
    device: torch.device
    batches: list[Batch]
    state: dict[str, Tensor]
    answers: dict[Maker, Answer] = field(default_factory=dict)

    @classmethod
    def of(cls, size: Size, R: int, device: torch.device, text: Text) -> "Setting":
        """Batches and weights, the same on each run."""
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(BATCHES):
            piece = batch_of(text.train, size.B, size.T + 1, generator)
            batches.append((piece[:, :-1].to(device), piece[:, 1:].to(device)))
        batches = [(x.contiguous(), y.contiguous()) for x, y in batches]
        with device:
            gpt = GPT(size.config, partial(_make, ATTENTIONS[PLAIN], R))
        state = let_attention_matter(gpt).state_dict()
        return cls(size, R, device, batches, state)

    def model(self, make: Maker) -> GPT:
        """A new model with these layers and the weights of :attr:`state`."""
        with self.device:
            gpt = GPT(self.size.config, partial(_make, make, self.R))
        return start_from(gpt, self.state)

    def answer(self, attention: str) -> Answer:
        """What an attention is held against; computed once."""
        make = REFERENCES[attention]
        if make not in self.answers:
            gradients: dict[str, Tensor] = {}

            def keep(found: dict[str, Tensor]) -> None:
                gradients.update((name, t.clone()) for name, t in found.items())

            answer = Answer(self._losses(make, keep, autocast=False), gradients)
            for kernel in KERNELS[self.device.type]:
                self._add_rounded(answer, make, kernel)
            self.answers[make] = answer
        return self.answers[make]

    def _add_rounded(self, answer: Answer, make: Maker, kernel: Any) -> None:
        """The steps under autocast by one kernel of SDPA, where it runs."""
        errors: dict[str, float] = {}
        try:
            with sdpa_kernel(kernel):
                losses = self._losses(make, answer.look(errors), autocast=True)
        except RuntimeError as error:
            if why_it_broke(error)[0] == ERROR:
                raise
        else:
            answer.add_rounded(losses, errors)

    def _losses(self, make: Maker, look: Look, autocast: bool) -> list[float]:
        trainee = Trainee(self.model(make), autocast=autocast)
        return list(trainee.losses(self.batches[:GATE_STEPS], look, REFERENCE_TOKENS))


def _make(make: Maker, R: int, config: GPTConfig) -> nn.Module:
    return make(config, R)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """RMS difference."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))

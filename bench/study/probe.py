"""Watching a model: reciprocal shares, gates, and anything that is not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

GATES = ("w_std", "w_rec", "c_gate.weight", "c_gate.bias")  # parameters that are watched each step
NAMED = 3  # tensors that a message names


class NonFiniteError(ArithmeticError):
    """Training met a NaN or an infinity; the message has the step and the tensors' names."""


def reciprocal_share(q_pack: Tensor, k_pack: Tensor, R: int) -> Tensor:
    """Share of the last R lanes in the scores' variance over the keys of a query: ``[H]``.

    ``V_rec / (V_std + V_rec)``, averaged over queries, causal; 0 where nothing varies.

    Args:
        q_pack: ``[B, T, H, D]``.
        k_pack: ``[B, T, H, D]``.
        R: reciprocal lanes.
    """
    T, D = q_pack.shape[1], q_pack.shape[-1]
    later = torch.ones(T, T, dtype=torch.bool, device=q_pack.device).triu(1)
    variances = []
    for q, k in zip(*(t.float().split((D - R, R), -1) for t in (q_pack, k_pack)), strict=True):
        S = torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(later, math.nan)
        V = (S - S.nanmean(-1, keepdim=True)).square().nanmean(-1)
        variances.append(V.sum((0, 2)))
    total = variances[0] + variances[1]
    return torch.where(total > 0, variances[1] / total, 0.0)


@torch.no_grad()
def observe(model: nn.Module, tokens: Tensor) -> dict[str, dict[str, list[float]]]:
    """Reciprocal shares and gates of each attention layer, per head.

    Args:
        model: a GPT; in ``eval()`` afterwards.
        tokens: ``[B, T]``, what the layers see while they are watched.

    Returns:
        ``{"share": {layer: [H numbers]}, "gate": {"layer.w_rec": [H numbers]}}``. A sigmoid gate
        is averaged over tokens; layers without gates or reciprocal lanes are left out.
    """
    seen: dict[str, dict[str, list[float]]] = {"share": {}, "gate": {}}

    def look(name: str, layer: nn.Module, x: Tensor) -> None:
        if getattr(layer, "R", 0):
            seen["share"][name] = layer.reciprocal_share(x).tolist()  # type: ignore[operator]
        if hasattr(layer, "gates"):
            for gate, values in layer.gates().items():  # type: ignore[operator]
                seen["gate"][f"{name}.{gate}"] = values.tolist()
        if hasattr(layer, "gate"):
            mean = layer.gate(x).float().mean((0, 1))  # type: ignore[operator]
            seen["gate"][f"{name}.gate"] = mean.tolist()

    handles = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: look(name, layer, inputs[0])
        )
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] == "attn"
    ]
    try:
        model.eval()(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def gate_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Gates among the parameters, by name."""
    return {
        name: p
        for name, p in model.named_parameters()
        if any(name.endswith(f".{gate}") for gate in GATES)
    }


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor has a NaN or an infinity; synchronizes once."""
    largest = [t.detach().abs().max().float() for t in tensors]  # max carries NaN along
    return not largest or bool(torch.stack(largest).isfinite().all())


def name_non_finite(model: nn.Module, loss: float) -> str:
    """What is not finite: gates first, then the loss, then gradients, the likely cause first."""
    found = [f"gate {n} {_what(p)}" for n, p in gate_parameters(model).items() if _bad(p)]
    if not math.isfinite(loss):
        found.append(f"loss ({loss})")
    gradients = [
        f"gradient of {n} {_what(p.grad)}"
        for n, p in model.named_parameters()
        if p.grad is not None and _bad(p.grad)
    ]
    found += gradients[:NAMED]
    if len(gradients) > NAMED:
        found.append(f"{len(gradients) - NAMED} more gradients")
    return "; ".join(found)


def _bad(t: Tensor) -> bool:
    return not bool(t.isfinite().all())


def _what(t: Tensor) -> str:
    """``(2 of 96 values: nan)``."""
    bad = t.detach()[~t.isfinite()]
    return f"({bad.numel()} of {t.numel()} values: {bad[0].item()})"

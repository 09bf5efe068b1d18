"""Generation: from logits to the next token, token after token, with a cache and a CUDA graph.

``GPT.generate`` is the way in. Positions are learned, ``block_size`` of them. A longer text goes on
with the last ``block_size`` tokens, as in nanoGPT; every one of them then stands elsewhere after
each token, so nothing that a cache holds is of use, and those steps do without.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.models.gpt import GPT

Draw = Callable[[Tensor], Tensor]


def sampler(temperature: float, top_k: int | None, generator: torch.Generator | None) -> Draw:
    """Logits ``[B, V]`` to tokens ``[B, 1]``.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among so many likeliest tokens; ``None`` means all.
        generator: where chance comes from; ``None`` means PyTorch's own.

    Raises:
        TypeError: no numbers.
        ValueError: a negative temperature, a ``top_k`` below 1.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and type(top_k) is not int:
        raise TypeError(f"top_k must be an int or None, got {top_k!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")

    def draw(logits: Tensor) -> Tensor:
        logits = logits.float()
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -float("inf"))
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

    return draw


def generate(
    model: "GPT", tokens: Tensor, count: int, draw: Draw, *, use_cache: bool, cuda_graph: bool
) -> Tensor:
    """``tokens [B, T]`` and ``count`` drawn ones after them."""
    limit = model.config.block_size
    cached = min(count, limit - tokens.shape[1] + 1) if use_cache else 0
    if cached > 0:
        tokens = _with_cache(model, tokens, cached, draw, cuda_graph)
        count -= cached
    for _ in range(count):
        tokens = torch.cat((tokens, draw(model(tokens[:, -limit:])[:, -1])), dim=1)
    return tokens


def _with_cache(model: "GPT", tokens: Tensor, count: int, draw: Draw, cuda_graph: bool) -> Tensor:
    """``count`` tokens more, within the block; each but the first costs one token's work."""
    caches = model.caches(tokens.shape[0], tokens.shape[1] + count - 1)

    def eager(token: Tensor) -> Tensor:
        return model(token, caches)[:, -1]

    step: Draw = eager
    drawn = [draw(step(tokens))]
    while len(drawn) < count:
        drawn.append(draw(step(drawn[-1])))
        if cuda_graph and len(drawn) == 2:  # a step has compiled the kernels
            step = _captured(eager, drawn[-1])
    return torch.cat((tokens, *drawn), dim=1)


def _captured(step: Draw, like: Tensor) -> Draw:
    """A decoding step as one CUDA graph: the lengths of the caches grow on the device."""
    token, graph = torch.empty_like(like), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(following: Tensor) -> Tensor:
        token.copy_(following)
        graph.replay()
        return logits

    return replay

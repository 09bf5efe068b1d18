"""What type checkers see: ``make types`` reads this file too."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import ra_triton
from ra_triton.call.options import AttentionKeywords


def test_return_lse_decides_what_comes_back() -> None:
    """At run time ``assert_type`` asserts nothing; mypy compares it with the overloads."""
    q = torch.randn(1, 3, 2, 16)
    packed = ra_triton.packed_attention
    assert assert_type(packed(q, q, q), Tensor).shape == q.shape
    assert assert_type(packed(q, q, q, causal=False, return_lse=False), Tensor).shape == q.shape
    out, lse = assert_type(packed(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert (out.shape, lse.shape) == (q.shape, (1, 2, 3))
    either = bool(len(out))
    assert len(assert_type(packed(q, q, q, return_lse=either), Tensor | tuple[Tensor, Tensor])) == 2


def test_return_lse_decides_what_comes_back_of_sequences() -> None:
    q, ends = torch.randn(3, 2, 16), torch.tensor([0, 1, 3], dtype=torch.int32)
    packed = ra_triton.packed_attention_varlen
    assert assert_type(packed(q, q, q, ends, ends, 2, 2), Tensor).shape == q.shape
    assert assert_type(packed(q, q, q, ends, ends, 2, 2, check=False), Tensor).shape == q.shape
    both = assert_type(packed(q, q, q, ends, ends, 2, 2, return_lse=True), tuple[Tensor, Tensor])
    assert [t.shape for t in both] == [q.shape, (2, 3)]


def test_nn_has_its_type_without_an_import_of_its_own() -> None:
    assert_type(ra_triton.nn.Workspace(), ra_triton.nn.Workspace)


@pytest.mark.parametrize(
    ("function", "own"),
    [
        (ra_triton.packed_attention, {"return_lse"}),
        (ra_triton.packed_attention_varlen, {"return_lse", "check"}),
    ],
)
def test_the_overloads_name_the_keywords_that_there_are(
    function: Callable[..., Any], own: set[str]
) -> None:
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {*AttentionKeywords.__annotations__, *own}

"""decode_attention against FP64, sequence by sequence, and what must not change its bits."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from budget import assert_agree, assert_attention_close, assert_bitwise, attention_sigma
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    HEADS,
    NAN,
    VALUES,
    WRITABLE_LAYOUTS,
    backend_dtypes,
    backends,
    dtypes_for,
    few_examples,
    fewest_examples,
    lay_out,
    normal,
    small_head_dims,
)

import ra_triton

SPLIT = 32  # keys of a split in the interpreter


@dataclass(frozen=True)
class DecodeCase:
    """A recipe for queries, caches and lengths; what lies beyond a length is NaN."""

    lengths: tuple[int, ...] = (5,)
    spare: int = 0  # places that no sequence uses
    T_q: int = 1
    H_kv: int = 1
    group: int = 1
    D: int = 16
    dtype: torch.dtype = torch.float32
    left: int = -1
    scale: float | None = None
    softcap: float = 0.0
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    values: str = "normal"
    seed: int = 0

    @property
    def options(self) -> dict:
        numbers = {"softmax_scale": self.scale, "softcap": self.softcap}
        return numbers | {"window_size": (self.left, -1)}

    def tensors(self):
        """``q [B, T_q, H, D]``, caches ``[B, max_len, H_kv, D]``, lengths int32 ``[B]``."""
        B, max_len = len(self.lengths), max(1, *self.lengths) + self.spare
        shapes = (B, self.T_q, self.H_kv * self.group, self.D), (B, max_len, self.H_kv, self.D)
        scale = VALUES[self.values]
        q, k, v = (
            normal(*shape, dtype=self.dtype, seed=3 * self.seed + i, scale=scale if i < 2 else 1.0)
            for i, shape in enumerate((shapes[0], shapes[1], shapes[1]))
        )
        for b, length in enumerate(self.lengths):
            k[b, length:], v[b, length:] = NAN, NAN
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return *(lay_out(t, name) for t, name in zip((q, k, v), self.layouts, strict=True)), lengths


def decode(backend, *tensors, **options):
    return ra_triton.decode_attention(*tensors, backend=backend, **options)


def check(case: DecodeCase, backend: str) -> None:
    q, k, v, lengths = case.tensors()
    out = decode(backend, q, k, v, lengths, **case.options)
    assert out.shape == q.shape
    for b, n in enumerate(case.lengths):
        operands = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        assert_attention_close(out[b : b + 1], *operands, **case.options)


@st.composite
def decode_cases(draw, dtypes=(torch.float32,)) -> DecodeCase:
    length = st.one_of(
        st.sampled_from([1, SPLIT, SPLIT + 1, 2 * SPLIT - 1, 0]), st.integers(0, 3 * SPLIT)
    )
    H_kv, group = draw(HEADS)
    return DecodeCase(
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=3))),
        spare=draw(st.sampled_from([0, 0, 1, 17, 60])),
        T_q=draw(st.sampled_from([1, 1, 2, 5, 16])),
        H_kv=H_kv,
        group=group,
        D=draw(small_head_dims),
        dtype=draw(st.sampled_from(list(dtypes))),
        left=draw(st.sampled_from([-1, -1, 0, 3, 40])),
        scale=draw(st.sampled_from([None, 0.5])),
        layouts=tuple(draw(st.sampled_from(WRITABLE_LAYOUTS)) for _ in range(3)),
        values=draw(st.sampled_from(list(VALUES))),
        seed=draw(st.integers(0, 3)),
    )


@backends
@few_examples
@given(data=st.data())
def test_every_sequence_is_attention_over_its_own_keys(backend, data):
    check(data.draw(decode_cases(dtypes_for(backend))), backend)


@few_examples
@given(case=decode_cases())
def test_sdpa_with_lengths_that_only_the_device_knows(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ra_triton.backend.sdpa, "_readable", lambda lengths: False)
        check(case, "sdpa")


@backend_dtypes
@pytest.mark.parametrize("D", [16, 20, 64, 80, 128])
def test_head_dims_and_dtypes(backend, dtype, D):
    layouts = ("fused", "sliced", "head_major")
    check(DecodeCase((40, 7), T_q=3, group=2, D=D, dtype=dtype, layouts=layouts), backend)


@backends
@pytest.mark.parametrize(
    ("T_q", "H_kv", "group"), [(1, 1, 1), (1, 2, 3), (1, 1, 40), (16, 1, 1), (16, 1, 4), (5, 3, 1)]
)
def test_grouped_heads_fill_tiles_of_every_size(backend, T_q, H_kv, group):
    check(DecodeCase((50, 33), T_q=T_q, H_kv=H_kv, group=group), backend)


@backends
@pytest.mark.parametrize("length", [*range(SPLIT - 2, SPLIT + 3), 2 * SPLIT, 2 * SPLIT + 1])
@pytest.mark.parametrize("left", [-1, 0, SPLIT - 1, SPLIT])
def test_lengths_and_windows_around_the_ends_of_splits(backend, length, left):
    check(DecodeCase((length,), spare=SPLIT, T_q=2, left=left), backend)


@backend_dtypes
@pytest.mark.parametrize("values", ["zeros", "large", "huge"])
def test_logits_of_every_size(backend, dtype, values):
    check(DecodeCase((90, 1), group=2, dtype=dtype, values=values), backend)


@backend_dtypes
@pytest.mark.parametrize(("softcap", "left"), [(0.5, -1), (5.0, 40), (50.0, 2**31)])
def test_softcaps(backend, dtype, softcap, left):
    for values in ("small", "normal", "huge"):
        case = DecodeCase((90, 31), T_q=2, group=2, dtype=dtype, softcap=softcap, left=left)
        check(replace(case, values=values), backend)


@backends
def test_the_largest_score_may_be_in_any_split(backend):
    for key in range(0, 100, 9):
        q, k, v, lengths = DecodeCase((100,)).tensors()
        k[:, key] = 50 * q[:, 0]  # a logit of about 200
        out = decode(backend, q, k, v, lengths)
        assert_attention_close(out, q, k, v)


@backends
@pytest.mark.parametrize("T_q", [1, 4])
def test_queries_without_keys_give_zero(backend, T_q):
    q, k, v, lengths = DecodeCase((0, 2, 50), T_q=T_q).tensors()
    out = decode(backend, q, k, v, lengths)
    assert_bitwise(out[0], torch.zeros_like(out[0]))
    blind = max(0, T_q - 2)
    assert_bitwise(out[1, :blind], torch.zeros_like(out[1, :blind]))
    assert (out[1, blind:] != 0).all()


@backends
@pytest.mark.parametrize(("B", "T_q"), [(0, 1), (2, 0)])
def test_nothing_in_nothing_out(backend, B, T_q):
    q, k, v = normal(B, T_q, 2, 16), normal(B, 9, 1, 16), normal(B, 9, 1, 16)
    lengths = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    assert decode(backend, q, k, v, lengths).shape == q.shape


@backends
def test_lengths_outside_of_the_cache_read_nothing_outside(backend):
    q, k, v, _ = DecodeCase((40, 40, 40)).tensors()
    out = decode(backend, q, k, v, torch.tensor([10**6, -5, 40], dtype=torch.int32, device=DEVICE))
    assert_attention_close(out[2:], q[2:], k[2:], v[2:])
    assert_bitwise(out[1], torch.zeros_like(out[1]))
    assert out[0].isfinite().all()


# Bits


@fewest_examples
@given(case=decode_cases())
def test_bits_of_a_sequence_do_not_depend_on_its_neighbours(case):
    q, k, v, lengths = case.tensors()
    out = decode("triton", q, k, v, lengths, **case.options)
    for b in range(len(case.lengths)):
        alone = [t[b : b + 1] for t in (q, k, v, lengths)]
        assert_bitwise(decode("triton", *alone, **case.options), out[b : b + 1])
    twice = [torch.cat((t, t)) for t in (q, k, v, lengths)]
    again = decode("triton", *twice, **case.options)
    assert_bitwise(again, torch.cat((out, out)))


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_bad_neighbour_changes_nothing(value):
    q, k, v, lengths = DecodeCase((70, 40, 70), group=2).tensors()
    out = decode("triton", q, k, v, lengths)
    for t in (q, k, v):
        t[1] = value
    bad = decode("triton", q, k, v, lengths)
    assert_bitwise(bad[::2], out[::2])
    assert not bad[1].isfinite().all()


@backends
def test_a_bound_on_the_lengths_saves_work_and_changes_no_result(backend):
    q, k, v, lengths = DecodeCase((70, 3), spare=100, group=2).tensors()
    expected = decode(backend, q, k, v, lengths)
    for bound in (70, 71, 128, 169, 170):
        out = decode(backend, q, k, v, lengths, max_length=bound)
        if backend == "triton":
            assert_bitwise(out, expected)
        else:
            for b, n in enumerate((70, 3)):
                sigma = attention_sigma(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])
                assert_agree(out[b : b + 1], expected[b : b + 1], sigma, sigma)


def test_the_capacity_alone_decides_which_keys_make_a_split():
    """More than MAX_SPLITS times the least: splits are longer, also for a short sequence."""
    q, k, v, lengths = DecodeCase((100,), spare=5000).tensors()
    out = decode("triton", q, k, v, lengths)
    assert_bitwise(decode("triton", q, k, v, lengths, max_length=100), out)
    assert_attention_close(out, q, k[:, :100], v[:, :100])


@backends
def test_what_lies_beyond_a_length_is_never_used(backend):
    q, k, v, lengths = DecodeCase((40, 33), spare=40).tensors()
    expected = decode(backend, q, k, v, lengths)
    for value in (0.0, math.inf, 1e30):
        for b, n in enumerate((40, 33)):
            k[b, n:], v[b, n:] = value, value
        assert_bitwise(decode(backend, q, k, v, lengths), expected)


@backends
def test_inputs_are_never_written_and_the_output_is_new(backend):
    tensors = DecodeCase((40, 33), spare=3, T_q=2).tensors()
    before = [(t._version, t.clone()) for t in tensors]
    out = decode(backend, *tensors)
    for t, (version, copy) in zip(tensors, before, strict=True):
        assert t._version == version
        assert_bitwise(t, copy)
        assert out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a row of the table has other splits")
def test_splits_are_those_of_the_capacity_alone():
    from ra_triton.kernels.attention.decode import MAX_SPLITS, keys_per_split

    for max_len in (1, 31, 32, 4096, 4097, 65536, 10**6):
        keys = keys_per_split(max_len, SPLIT)
        assert keys >= SPLIT
        assert keys & (keys - 1) == 0
        assert keys * MAX_SPLITS >= max_len


@backends
def test_decoding_inside_a_compiled_function(backend):
    q, k, v, lengths = DecodeCase((40, 40), spare=3, T_q=2).tensors()

    def run(*tensors):
        return decode(backend, *tensors) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(q, k, v, lengths) / 2
    if backend == "triton":
        assert_bitwise(out, decode("triton", q, k, v, lengths))
    assert_attention_close(out, q, k[:, :40], v[:, :40])


# Errors, before any launch

GOOD = DecodeCase((9, 4), group=2)


@pytest.fixture
def nothing_launched(monkeypatch):
    from ra_triton.kernels.attention import decode
    from ra_triton.kernels.lanes import append

    monkeypatch.setattr(decode, "decode", None)
    monkeypatch.setattr(append, "append_", None)


BAD = [
    ({"lengths": [3, 4]}, TypeError, "lengths must be a tensor"),
    ({"lengths": torch.tensor([3, 4])}, TypeError, "lengths must be torch.int32, got torch.int64"),
    (
        {"lengths": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        "lengths must be one per sequence",
    ),
    ({"max_length": 10}, ValueError, "max_length must be between 0 and the cache's 9, got 10"),
    ({"max_length": 2.0}, TypeError, "max_length must be an int"),
    ({"window_size": (1, 2, 3)}, TypeError, "window_size must be"),
    ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be"),
    ({"softcap": -5.0}, ValueError, "softcap must be"),
    ({"backend": "flex"}, NotImplementedError, "block masks .* use backend='(triton|sdpa)'"),
    ({"q_pack": normal(3, 1, 2, 16)}, ValueError, "k_pack must be"),
    ({"q_pack": normal(2, 1, 2, 16).half()}, TypeError, "k_pack must be torch.float16"),
    ({"k_pack": normal(2, 9, 3, 16)}, ValueError, "number of heads that divides"),
    ({"v": normal(2, 8, 1, 16)}, ValueError, "v must be"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_told_before_a_launch(nothing_launched, change, error, message):
    names = ("q_pack", "k_pack", "v", "lengths")
    arguments = dict(zip(names, GOOD.tensors(), strict=True)) | {"backend": "triton"}
    moved = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    with pytest.raises(error, match=message):
        ra_triton.decode_attention(**arguments | moved)


@backends
def test_a_gradient_is_refused(nothing_launched, backend):
    q, k, v, lengths = GOOD.tensors()
    with pytest.raises(ValueError, match=r"no gradient; use torch.no_grad\(\)"):
        decode(backend, q.requires_grad_(), k, v, lengths)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="head dim 8 is outside"):
        decode("triton", q[..., :8], k[..., :8], v[..., :8], lengths)


def test_many_queries_are_for_sdpa(nothing_launched):
    case = DecodeCase((40, 30), T_q=17)
    with pytest.raises(NotImplementedError, match="at most 16 queries, got 17; use backend='sdpa'"):
        decode("triton", *case.tensors())
    check(case, "sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 20, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate_on_a_gpu(dtype, D):
    for T_q, H_kv, group in ((1, 3, 1), (1, 2, 8), (5, 1, 7), (16, 2, 4)):
        for layout in ("contiguous", "offset"):
            layouts = (layout,) * 3
            case = DecodeCase(
                (5000, 1, 129, 4096), 100, T_q, H_kv, group, D, dtype, layouts=layouts
            )
            check(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [100, 5000])
def test_bits_do_not_depend_on_the_batch_on_a_gpu(length):
    case = DecodeCase((length, 3, 4000), 1000, 1, 4, 2, 64, torch.bfloat16)
    q, k, v, lengths = case.tensors()
    out = decode("triton", q, k, v, lengths)
    for b in range(3):
        alone = [t[b : b + 1] for t in (q, k, v, lengths)]
        assert_bitwise(decode("triton", *alone, max_length=case.lengths[b]), out[b : b + 1])
    wide = [torch.cat([t[:1]] * 200) for t in (q, k, v, lengths)]
    assert_bitwise(decode("triton", *wide)[100:101], out[:1])


def test_flex_refuses_a_cache_and_names_who_takes_one():
    q, k = normal(2, 1, 2, 16), normal(2, 8, 2, 16)
    lengths = torch.tensor([3, 8], dtype=torch.int32, device=q.device)
    with pytest.raises(NotImplementedError, match=r"backend='(triton|sdpa)'"):
        ra_triton.decode_attention(q, k, k, lengths, backend="flex")

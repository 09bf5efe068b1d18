"""The cache and the module with a cache: token by token, in chunks, ragged, cropped, reordered."""

import copy
import gc
import pickle

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from hypothesis import given
from hypothesis import strategies as st
from layers import C, D, H, assert_rounded, layer, parametrisations
from strategies import DEVICE, NAN, backends, few_examples, fewest_examples, lay_out, normal, quick
from torch._dynamo.testing import CompileCounterWithBackend

import ra_triton
from ra_triton.nn import KVCache

SIZES = 2, 40, 3, 16  # batch, max_len, n_kv_head, head_dim


def new_cache(batch=2, max_len=40, **options):
    return KVCache(batch, max_len, 3, 16, device=DEVICE, **options)


def keys(T, batch=2, seed=0, **options):
    return normal(batch, T, 3, 16, seed=seed, **options)


def filled(lengths, max_len=40, backend="sdpa"):
    """A cache whose sequences have these lengths, and what they hold: ``[(keys, values), ...]``."""
    cache = new_cache(len(lengths), max_len)
    k, v = (keys(max(lengths), len(lengths), seed=seed) for seed in (1, 2))
    cache.append(k, v, backend=backend)
    cache.crop(lengths)
    return cache, [(k[b, :n], v[b, :n]) for b, n in enumerate(lengths)]


def assert_holds(cache, expected):
    lengths = [len(k) for k, _ in expected]
    assert cache.lengths.tolist() == cache.known_lengths() == lengths
    assert cache.longest == max(lengths)
    for b, (k, v) in enumerate(expected):
        assert_bitwise(cache.k_pack[b, : len(k)], k, "keys")
        assert_bitwise(cache.v[b, : len(v)], v, "values")


# The cache


def test_it_holds_as_many_bytes_as_plain_attentions_and_starts_empty():
    for dtype in (torch.float16, torch.float32):
        cache = new_cache(dtype=dtype)
        assert cache.nbytes == 2 * 2 * 40 * 3 * 16 * dtype.itemsize
        assert cache.k_pack.shape == cache.v.shape == SIZES
        assert (cache.batch, cache.max_len, cache.longest) == (2, 40, 0)
        assert cache.lengths.dtype == torch.int32
    assert "max_len=40" in repr(cache)
    assert new_cache().k_pack.dtype == torch.get_default_dtype()


@backends
@few_examples
@given(data=st.data())
def test_it_does_what_a_list_for_each_sequence_does(backend, data):
    """Appends, crops and reorderings, against Python's own lists."""
    cache, held = new_cache(), [(keys(0)[0], keys(0)[0]) for _ in range(2)]
    memory = cache.k_pack.data_ptr(), cache.v.data_ptr(), cache.lengths.data_ptr()
    for step in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["append", "append", "crop", "reorder", "reset"]))
        if action == "append":
            room = 40 - max(len(k) for k, _ in held)
            T = data.draw(st.sampled_from([T for T in (1, 2, 16, 17, 0) if room >= T]))
            layout = data.draw(st.sampled_from(["contiguous", "fused", "head_major", "offset"]))
            k, v = (lay_out(keys(T, seed=2 * step + i), layout) for i in (0, 1))
            cache.append(k, v, backend=backend)
            held = [
                (torch.cat((old_k, k[b])), torch.cat((old_v, v[b])))
                for b, (old_k, old_v) in enumerate(held)
            ]
        elif action == "crop":
            lengths = data.draw(st.one_of(st.integers(0, 40), st.tuples(*[st.integers(0, 40)] * 2)))
            cache.crop(lengths)
            each = (lengths,) * 2 if isinstance(lengths, int) else lengths
            held = [(k[:n], v[:n]) for (k, v), n in zip(held, each, strict=True)]
        elif action == "reorder":
            order = data.draw(st.tuples(*[st.integers(0, 1)] * 2))
            cache.reorder(data.draw(st.sampled_from([order, torch.tensor(order)])))
            held = [held[i] for i in order]
        else:
            cache.reset()
            held = [(k[:0], v[:0]) for k, v in held]
        assert_holds(cache, held)
    assert memory == (cache.k_pack.data_ptr(), cache.v.data_ptr(), cache.lengths.data_ptr())


@backends
@pytest.mark.parametrize("T", [1, 5, 16, 17])
def test_append_writes_its_rows_alone(backend, T):
    cache, held = filled((7, 20), backend=backend)
    cache.k_pack[0, 7:], cache.k_pack[1, 20:], cache.v[0, 7:], cache.v[1, 20:] = [1.0] * 4
    cache.append(keys(T, seed=5), keys(T, seed=6), backend=backend)
    for b, n in enumerate((7, 20)):
        for t in (cache.k_pack, cache.v):
            assert_bitwise(t[b, n + T :], torch.ones_like(t[b, n + T :]))
    new_k, new_v = keys(T, seed=5), keys(T, seed=6)
    both = zip(held, new_k, new_v, strict=True)
    assert_holds(cache, [(torch.cat((k, a)), torch.cat((v, c))) for (k, v), a, c in both])


@backends
@pytest.mark.parametrize("T", [3, 17])
def test_what_a_replayed_graph_appends_beyond_the_end_stays_inside(backend, T):
    """A replay cannot raise: the device's own lengths are all that it knows."""
    cache, held = filled((39, 40, 10), backend=backend)
    module = ra_triton.backend.BACKENDS[backend]
    k, v = keys(T, 3, seed=5), keys(T, 3, seed=6)
    module.append_(cache.k_pack, cache.v, cache.lengths, k, v)
    assert cache.lengths.tolist() == [40, 40, 10 + T]
    assert_bitwise(cache.k_pack[2, 10 : 10 + T], k[2])
    for b in (0, 1):
        assert_bitwise(cache.k_pack[b, :39], held[b][0][:39])


@pytest.mark.parametrize("length", [0, 6, 9, 40, (9, 0, 31), (2, 2, 2)])
def test_a_crop_keeps_the_first_tokens(length):
    cache, held = filled((5, 9, 30))
    cache.crop(length)
    each = (length,) * 3 if isinstance(length, int) else length
    assert_holds(cache, [(k[:n], v[:n]) for (k, v), n in zip(held, each, strict=True)])
    cache.reset()
    assert_holds(cache, [(k[:0], v[:0]) for k, v in held])


def test_a_reordering_may_repeat_sequences_and_takes_any_ints():
    for indices in ([2, 2, 0], torch.tensor([2, 2, 0]), torch.tensor([2, 2, 0], dtype=torch.int32)):
        cache, held = filled((5, 9, 30))
        cache.reorder(indices)
        assert_holds(cache, [held[2], held[2], held[0]])


def test_inference_mode_leaves_a_cache_that_other_calls_can_use():
    with torch.inference_mode():
        cache = new_cache()
        cache.append(keys(3), keys(3))
    cache.append(keys(2), keys(2))
    assert cache.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_has_memory_of_its_own(copied):
    cache, held = filled((5, 9))
    other = copied(cache)
    cache.append(keys(3), keys(3))
    assert_holds(other, held)


def replayed(cache):
    """As after a captured append, which the host did not see run."""
    cache._captured = True
    module = ra_triton.backend.BACKENDS["sdpa"]
    module.append_(cache.k_pack, cache.v, cache.lengths, keys(4, seed=8), keys(4, seed=9))
    return cache


def test_after_a_capture_lengths_are_read_from_the_device():
    cache = replayed(filled((5, 9))[0])
    assert cache.longest == 40
    assert cache.known_lengths() == [9, 13]
    cache.append(keys(27), keys(27))
    with pytest.raises(ValueError, match="its longest has 40, and 1 more do not fit"):
        cache.append(keys(1), keys(1))
    cache.crop((20, 30))
    cache.reorder([1, 0])
    assert cache.known_lengths() == cache.lengths.tolist() == [30, 20]


# Errors, before any launch


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"max_len": 2.0}, TypeError, "max_len must be an int, got 2.0"),
        ({"n_kv_head": True}, TypeError, "n_kv_head must be an int"),
        ({"head_dim": -1}, ValueError, "head_dim must be at least 1"),
        ({"max_len": 2**31}, ValueError, "the cache must have at most"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of torch.float16"),
    ],
)
def test_bad_sizes(change, error, message):
    sizes = dict(zip(("batch", "max_len", "n_kv_head", "head_dim"), SIZES, strict=True))
    with pytest.raises(error, match=message):
        KVCache(**sizes | change)


BAD_KEYS = [
    ((3.0, None), TypeError, "k_pack must be a tensor"),
    ((keys(2)[0], None), ValueError, "k_pack must be .batch, T, n_kv_head, head_dim."),
    ((keys(2), keys(3)), ValueError, "v must be of the shape of k_pack"),
    ((keys(2), keys(2).half()), TypeError, "v must be torch.float32 like k_pack"),
    ((keys(2).half(),) * 2, TypeError, "cache takes torch.float32 keys, got torch.float16"),
    ((keys(2, batch=3),) * 2, ValueError, r"= \[2, T, 3, 16\], got \(3, 2, 3, 16\)"),
    ((keys(2)[:, :, :2],) * 2, ValueError, r"got \(2, 2, 2, 16\)"),
    ((keys(2).to("meta"),) * 2, ValueError, "cache takes keys on .*, got meta"),
    ((keys(32),) * 2, ValueError, "max_len = 40 .* its longest has 9, and 32 more do not fit"),
    ((keys(2).requires_grad_(), keys(2)), ValueError, "a gradient is needed; use no_grad"),
    ((keys(2, dtype=torch.float32).transpose(2, 3).contiguous().transpose(2, 3),) * 2, ValueError,
     "k_pack must have stride 1"),
]  # fmt: skip


@pytest.mark.parametrize(("new", "error", "message"), BAD_KEYS)
def test_bad_keys_change_nothing(new, error, message):
    cache, held = filled((5, 9))
    with pytest.raises(error, match=message):
        cache.append(*new)
    assert_holds(cache, held)


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("crop", 2.0, TypeError, "length must be an int"),
        ("crop", -1, ValueError, r"length must be within 0..40, one or 2 of them, got -1"),
        ("crop", 41, ValueError, "got 41"),
        ("crop", [1, 2, 3], ValueError, "one or 2 of them"),
        ("crop", [1, True], TypeError, "length must be an int"),
        ("reorder", [0, 2], ValueError, r"indices must be within 0..1, got \[0, 2\]"),
        ("reorder", [0], ValueError, r"indices must be \[2\]"),
        ("reorder", [0, -1], ValueError, "indices must be within"),
        ("reorder", [0.0, 1.0], TypeError, "indices must be ints"),
        ("reorder", torch.tensor([0.0, 1.0]), TypeError, "indices must be int32 or int64"),
        ("reorder", 1, TypeError, "indices must be ints, one for each sequence, got 1"),
        ("reorder", None, TypeError, "indices must be ints, one for each sequence, got None"),
        ("reorder", [2**70, 0], ValueError, "indices must be within 0..1"),
    ],
)
def test_bad_lengths_and_indices_change_nothing(method, argument, error, message):
    cache, held = filled((5, 9))
    with pytest.raises(error, match=message):
        getattr(cache, method)(argument)
    assert_holds(cache, held)


# The module


def in_pieces(module, x, sizes, cache):
    with torch.no_grad():
        return torch.cat([module(piece, cache) for piece in x.split(sizes, dim=1)], dim=1)


def assert_like_full_forward(module, x, out):
    """In float32 both are c_proj of attention outputs within the gate."""
    with torch.no_grad():
        exact = copy.deepcopy(module).double()
        exact.backend = "sdpa"
        assert_rounded(out, sdpa_in_double(exact, x), "with a cache")
        assert_rounded(module(x), sdpa_in_double(exact, x), "without")


def sdpa_in_double(module, x):
    """The layer in float64, by the reference."""
    from ref import reciprocal_attention as ref

    W, bias = module.fused_weight()
    packed = (x.double() @ W + bias).unflatten(-1, (3, H, D)).unbind(2)
    return module.c_proj(ref.packed_attention(*packed)[0].flatten(2))


@backends
@fewest_examples
@given(data=st.data())
def test_any_pieces_give_the_full_forward(backend, data):
    T = data.draw(st.integers(1, 35))
    sizes = []
    while sum(sizes) < T:
        sizes.append(min(T - sum(sizes), data.draw(st.sampled_from([2, 1, 7, 16, 17, 30]))))
    module, x = layer(backend=backend).eval(), normal(2, T, C)
    out = in_pieces(module, x, sizes, KVCache(2, T, H, D, device=DEVICE))
    assert_like_full_forward(module, x, out)


@backends
def test_a_second_long_chunk_sees_the_first(backend):
    module, x = layer(backend=backend).eval(), normal(1, 35, C)
    out = in_pieces(module, x, [17, 18], KVCache(1, 35, H, D, device=DEVICE))
    assert_like_full_forward(module, x, out)


@pytest.mark.parametrize(("backend", "T"), [("sdpa", 36), ("triton", 7)])
@parametrisations
def test_token_by_token_is_the_full_forward(backend, T, parametrisation):
    module, x = layer(parametrisation, backend=backend).eval(), normal(2, T, C)
    cache = KVCache(2, 40, H, D, device=DEVICE)
    assert_like_full_forward(module, x, in_pieces(module, x, 1, cache))
    assert cache.lengths.tolist() == [T, T]


@backends
def test_attention_over_the_cache_is_within_the_gate_at_every_token(backend):
    module, x = layer().eval(), normal(1, 35, C)
    with torch.no_grad():
        q, k, v = module.operands(x)
        cache = KVCache(1, 35, H, D, device=DEVICE)
        for t in range(35):
            now = slice(t, t + 1)
            cache.append(k[:, now], v[:, now], backend=backend)
            out = ra_triton.decode_attention(
                q[:, now], cache.k_pack, cache.v, cache.lengths, backend=backend
            )
            assert_attention_close(out, q[:, now], k[:, : t + 1], v[:, : t + 1])


@backends
def test_ragged_sequences_are_each_as_if_alone(backend):
    module, lengths = layer(backend=backend).eval(), (3, 20, 11)
    prompt, more = normal(3, 20, C), normal(3, 20, C, seed=1)
    cache = KVCache(3, 40, H, D, device=DEVICE)
    with torch.no_grad():
        module(prompt, cache)  # the shorter ones with padding
        cache.crop(lengths)
        out = module(more, cache)  # 16 tokens and 4
    for b, n in enumerate(lengths):
        x = torch.cat((prompt[b : b + 1, :n], more[b : b + 1]), dim=1)
        with torch.no_grad():
            exact = sdpa_in_double(copy.deepcopy(module).double(), x)
        assert_rounded(out[b : b + 1], exact[:, n:], f"sequence {b}")


def test_rejected_tokens_leave_no_trace():
    module, x = layer(backend="triton").eval(), normal(1, 12, C)
    outs = []
    for drafted in (0, 5):
        cache = KVCache(1, 40, H, D, device=DEVICE)
        in_pieces(module, x[:, :8], 8, cache)
        if drafted:
            in_pieces(module, torch.full((1, drafted, C), NAN, device=DEVICE), drafted, cache)
            cache.crop(8)
        outs.append(in_pieces(module, x[:, 8:], 2, cache))
    assert_bitwise(*outs)


def test_beams_go_on_from_the_sequence_that_they_continue():
    module, x = layer(backend="triton").eval(), normal(3, 9, C)
    module.c_proj = torch.nn.Identity()  # a BLAS may sum another row of a batch in another order
    cache = KVCache(3, 20, H, D, device=DEVICE)
    in_pieces(module, x[:, :8], 8, cache)
    cache.reorder([2, 0, 2])
    out = in_pieces(module, x[:, 8:], 1, cache)
    other = KVCache(3, 20, H, D, device=DEVICE)
    in_pieces(module, x[[2, 0, 2], :8], 8, other)
    assert_bitwise(in_pieces(module, x[:, 8:], 1, other), out)


@pytest.mark.parametrize(("backend", "sizes"), [("sdpa", [1] * 20), ("triton", [17, 2, 1])])
@pytest.mark.parametrize("options", quick([{"rope": True}, {"n_kv_head": 1}, {"qk_norm": True}]))
def test_grouped_rotated_and_normed_heads_go_through_the_cache(backend, sizes, options):
    module, x = layer(backend=backend, **options).eval(), normal(2, 20, C)
    cache = KVCache(2, 30, options.get("n_kv_head", H), D, device=DEVICE)
    with torch.no_grad():
        full = layer(**options).eval()(x)
    out = in_pieces(module, x, sizes, cache)
    assert_rounded(out, full.double(), "with a cache", full.double())


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_ragged_sequences_are_rotated_by_their_own_positions(backend):
    module = layer(rope=True, backend=backend).eval()
    x, lengths = normal(2, 12, C), (8, 3)
    cache = KVCache(2, 30, H, D, device=DEVICE)
    with torch.no_grad():
        module(x[:, :8], cache)
        cache.crop(lengths)
        out = module(x[:, 8:], cache)
        for b, n in enumerate(lengths):
            alone = torch.cat((x[b : b + 1, :n], x[b : b + 1, 8:]), dim=1)
            full = layer(rope=True).eval()(alone)[:, n:].double()
            assert_rounded(out[b : b + 1], full, f"sequence {b}")


def test_a_quantized_layer_takes_a_cache():
    module, x = layer().eval().quantize_("all"), normal(2, 20, C)
    with torch.no_grad():
        full = module(x)
    out = in_pieces(module, x, [17, 1, 2], KVCache(2, 20, H, D, device=DEVICE))
    assert_rounded(out, full.double(), "with a cache", full.double())


def test_a_cache_in_autocasts_dtype():
    module, x = layer().eval(), normal(2, 9, C)
    cache = KVCache(2, 9, H, D, torch.bfloat16, DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = in_pieces(module, x, 3, cache)
    assert out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"cache takes torch.bfloat16 keys, got torch.float32"):
        in_pieces(module, x, 3, cache)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": "none"}, TypeError, "cache must be a KVCache or None, got 'none'"),
        ({"x": normal(2, C)}, ValueError, r"x must be \[B, T, C\]"),
        ({"x": normal(3, 2, C)}, ValueError, r"got \(3, 2, 3, 16\)"),
        ({"x": normal(2, 12, C)}, ValueError, "max_len = 9 .* and 12 more do not fit"),
        ({"x": normal(2, 2, C).half()}, TypeError, "cache takes torch.float32 keys"),
        ({"x": normal(2, 2, C + 1)}, ValueError, r"x must be .B, T, n_embd. with n_embd = 48, got"),
        ({"grad": True}, ValueError, "a gradient is needed; use no_grad"),
        ({"dropout": 0.5}, ValueError, "cache cannot be used with dropout=0.5; call eval"),
        ({"backend": "flex"}, NotImplementedError, "block masks of a cache"),
    ],
)
def test_the_module_tells_before_anything_runs(monkeypatch, change, error, message):
    module = layer(dropout=change.get("dropout", 0.0), backend=change.get("backend", "sdpa"))
    cache = change.get("cache", KVCache(2, 9, H, D, device=DEVICE))
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    with torch.set_grad_enabled("grad" in change), pytest.raises(error, match=message):
        module(change.get("x", normal(2, 2, C)), cache)
    if isinstance(cache, KVCache):
        assert cache.lengths.tolist() == [0, 0]


# Under a compiler


def compiled_step(module, cache, **options):
    """``module`` with ``cache`` as one graph, and how often it was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x: module(x, cache), backend=counter, fullgraph=True, **options)
    return step, counter


@backends
@pytest.mark.parametrize("options", quick([{"rope": True, "qk_norm": True}, {}]))
def test_a_compiled_decoding_step_is_compiled_once_for_all_tokens(backend, options):
    module, x = layer(backend=backend, **options).eval(), normal(2, 12, C)
    cache = new_cache(max_len=16)
    step, counter = compiled_step(module, cache)
    with torch.no_grad():
        full = module(x)
        out = [step(token) for token in x.split(1, dim=1)]
    assert counter.frame_count == 1
    assert_rounded(torch.cat(out, dim=1), full.double(), "compiled")
    assert cache.lengths.tolist() == cache.known_lengths() == [12, 12]
    assert cache.longest == 12


def test_compiled_and_eager_steps_share_a_cache():
    """Prompts, crops, reorderings; the host reads the lengths when it needs them."""
    module, x = layer(rope=True).eval(), normal(2, 34, C)
    cache, other = new_cache(), new_cache()
    step, counter = compiled_step(module, cache)
    with torch.no_grad():
        for chunk in (x[:, :17], x[:, 17:18], x[:, 18:20]):
            assert_rounded(step(chunk), module(chunk, other).double(), "compiled")
        assert cache._known is None  # what it does not know it does not guess
        assert_rounded(module(x[:, 20:22], cache), module(x[:, 20:22], other).double(), "eager")
        assert cache.known_lengths() == [22, 22]
        for kept in (cache, other):
            kept.crop((20, 21))
        for _ in range(3):
            assert_rounded(step(x[:, 22:23]), module(x[:, 22:23], other).double(), "after a crop")
        for kept in (cache, other):
            kept.reorder([1, 0])
        assert cache.known_lengths() == other.known_lengths() == [24, 23]
        assert_rounded(step(x[:, 23:24]), module(x[:, 23:24], other).double(), "after a reordering")
        cache.reset()
        assert cache._known == [0, 0]
        other.reset()
        assert_rounded(step(x[:, :17]), module(x[:, :17], other).double(), "after a reset")
    assert counter.frame_count <= 4


def test_what_changes_a_cache_compiles_with_it():
    module, x = layer().eval(), normal(2, 6, C)
    cache, other = new_cache(), new_cache()
    order = torch.tensor([1, 0], device=DEVICE)

    def step(x, cache):
        y = module(x, cache)
        cache.crop(5)
        cache.reorder(order)
        return y

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        for token in x.split(1, dim=1):
            assert_rounded(compiled(token, cache), step(token, other).double(), "compiled")
    assert cache.known_lengths() == other.known_lengths() == [5, 5]
    assert counter.frame_count <= 2


def test_a_compiled_step_beyond_the_end_loses_what_does_not_fit_and_eager_ones_say_so():
    module, x = layer().eval(), normal(2, 3, C)
    cache = new_cache(max_len=2)
    step, _ = compiled_step(module, cache)
    with torch.no_grad():
        for token in x.split(1, dim=1):
            step(token)
        assert cache.lengths.tolist() == [2, 2]
        with pytest.raises(ValueError, match="its longest has 2, and 1 more do not fit"):
            module(x[:, :1], cache)


# Whose it is


def test_a_cache_in_two_layers_raises_and_after_a_reset_it_may_change_hands():
    first, second, x = layer().eval(), layer(seed=1).eval(), normal(2, 3, C)
    cache = new_cache()
    with torch.no_grad():
        first(x, cache)
        with pytest.raises(ValueError, match=r"cache belongs to another layer.* after reset\(\)"):
            second(x, cache)
        assert cache.lengths.tolist() == [3, 3]
        first(x, cache)
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        for other in copies:
            assert other.known_lengths() == [6, 6]
        cache.reset()
        assert_bitwise(second(x, cache), second(x, new_cache()))
        del second  # no cache keeps a layer alive
        gc.collect()
        first(x, cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_a_cuda_cache_without_cuda_is_named():
    for device in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(ValueError, match=r"device='cuda.*', but no CUDA device is available"):
            new_cache_on(device)


def new_cache_on(device):
    return KVCache(2, 4, 3, 16, device=device)


@pytest.mark.gpu
def test_a_steady_state_neither_waits_nor_allocates_the_cache_anew():
    module = layer(backend="triton").eval()
    cache, x = KVCache(2, 200, H, D, device="cuda"), normal(2, 1, C)
    order = torch.tensor([1, 0], device="cuda")
    with torch.no_grad():
        for _ in range(3):
            module(x, cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                module(x, cache)
                cache.crop((150, 160))
                cache.reorder(order)
                cache.reorder([1, 0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths.tolist() == cache.known_lengths() == [103, 103]

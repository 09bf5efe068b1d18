"""The faults: one edit each, and the tests that ought to notice it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fault:
    """One edit of one file.

    Attributes:
        name: what is wrong.
        file: path from the repository's root.
        old: text that occurs exactly once in the file.
        new: what replaces it.
        tests: pytest arguments, node ids alone.
        hangs: whether running past the limit counts as killed.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    hangs: bool = False


TILES = "ra_triton/kernels/tiles.py"
FORWARD = "ra_triton/kernels/attention_forward.py"
HOPPER = "ra_triton/kernels/attention_forward_hopper.py"
BACKWARD = "ra_triton/kernels/attention_backward.py"
PROJECTION = "ra_triton/kernels/projection.py"
WEIGHT = "ra_triton/kernels/projection_backward.py"
HOPPER_PROJECTION = "ra_triton/kernels/projection_hopper.py"
PACKING = "ra_triton/kernels/packing.py"
LAUNCHER, PREPARED = "ra_triton/kernels/launcher.py", "ra_triton/prepared.py"
PLANS, CONFIGS = "ra_triton/kernels/plans.py", "ra_triton/kernels/configs.py"
CHECKS = "ra_triton/checks.py"
INTERNALS, GLUON = "ra_triton/internals.py", "ra_triton/kernels/gluon.py"
LAUNCHES, OPS, API = "ra_triton/launches.py", "ra_triton/ops.py", "ra_triton/api.py"
OFFSETS, FLOPS = "ra_triton/offsets.py", "ra_triton/flops.py"
LIBRARY, WORKSPACE = "ra_triton/library.py", "ra_triton/workspace.py"
LAYOUT, WEIGHTS = "ra_triton/layout.py", "ra_triton/weights.py"
SDPA, TRITON = "ra_triton/backend/sdpa.py", "ra_triton/backend/triton.py"
COMPOSED_LINEAR = "ra_triton/nn/composed.py"
INT8, QUANTIZATION = "ra_triton/kernels/projection_int8.py", "ra_triton/quantization.py"

_A, _I, _P = (f"tests/test_{name}.py::test_" for name in ("attention", "invariance", "projection"))
LENGTHS = f"{_A}lengths_around_tile_boundaries"
T_Q_T_K = f"{_A}queries_and_keys_of_different_length"
NO_KEYS = f"{_A}rows_without_keys_give_zero_and_minus_infinity"
HEAD_DIMS = f"{_A}head_dims_also_those_that_are_no_power_of_two"
GROUPS = f"{_A}grouped_heads"
SCALES = f"{_A}softmax_scale {_A}logits_of_every_size"
PROMISE = f"{_A}error_is_within_the_promise_of_eager_pytorch"
WINDOWS = f"{_A}sdpa_windows_include_both_ends"
LAYOUTS = f"{_I}one_operand_in_another_layout_than_the_others"
X_LAYOUTS = f"{_I}x_and_weight_in_any_two_layouts"
REDZONES = f"{_I}memory_around_the_operands_does_not_matter"
X_REDZONES = f"{_I}memory_around_x_and_the_weight_does_not_matter"
SIZES = f"{_P}sizes_around_tile_boundaries"
VIEWS = f"{_P}the_inputs_may_be_any_views"
OUT = f"{_P}out_receives_the_result[shape0-True-triton]"
LANES = f"{_P}lanes_land_where_the_definition_says"
PACK = "tests/test_packing.py::test_pack_qk_joins_lanes_and_leaves_its_inputs"
PACK_IN_PLACE = "tests/test_packing.py::test_pack_qk_in_place_writes_the_low_lanes_alone"
COMPOSED = "tests/test_weights.py::test_composed_scores_are_those_of_the_definition"
_M = "tests/test_mutant_gaps.py::test_"
_OB, _LO = "tests/test_observed.py::test_", "tests/test_local_tensors.py::test_"
_TA = "tests/test_tail.py::test_"
OVERWRITTEN = "tests/test_written.py::test_a_saved_tensor_that_is_overwritten_makes_backward_raise"
MASKED_LOADS = f"{_M}every_masked_load_says_what_masked_elements_hold"
ALIGNED = f"{_M}what_bulk_copies_and_wide_loads_may_read"
FENCES = f"{_M}attention_writes_its_outputs_and_nothing_around_them"
OUT_FENCE = f"{_M}project_writes_out_and_nothing_around_it"
BULK_COPIES = f"{_M}attention_reads_the_same_through_bulk_copies"
PROJECTION_BULK_COPIES = f"{_M}projection_reads_the_same_through_bulk_copies"
HUGE_OUTPUTS = f"{_M}outputs_of_more_than_two_to_the_thirty_one_elements"
SHARED_OUT = f"{_M}splits_share_out_all_rows"
_T = "tests/test_plans.py::test_"
SECTIONS = f"{_T}sections_of_heads_change_no_bit"
CUT_HEADS = f"{_T}heads_are_cut_into_equal_sections_that_fit"
ANOTHER_PLAN = f"{_T}what_a_launch_depends_on_makes_another_plan"
BULK_FITS = f"{_T}descriptors_are_for_what_one_stride_leads_through"
LATER_CALLS = f"{_T}later_calls_pass_their_own_tensors_and_the_rest_in_the_kernels_order"
DEPENDENT = f"{_T}kernels_launched_early_wait_before_they_touch_memory"
MORE_KEY_HEADS = f"{_M}packing_more_key_heads_than_query_heads"
_G = "tests/test_gradients.py::test_"
GRADIENTS = f"{_G}lengths_around_tile_boundaries"
GRADIENT_T_Q_T_K = f"{_G}queries_and_keys_of_different_length"
GRADIENT_GROUPS = f"{_G}grouped_heads"
GRADIENT_LSE = f"{_G}gradients_reach_lse"
GRADIENT_LAYOUTS = f"{_M}gradients_with_one_operand_in_another_layout"
DO_LAYOUTS = (
    "tests/test_gradient_identities.py::test_a_gradient_in_any_layout_gives_the_bits_of_its_copy"
)
NO_GRADIENTS = f"{_G}nothing_in_gives_gradients_of_zero"
LAYER = f"{_G}gradients_of_ra_attention_are_those_of_its_stages"
WEIGHT_GRADIENTS = f"{_M}gradients_of_a_projection_with_x_in_another_layout"
BIAS_GRADIENTS = f"{_G}gradients_of_a_projection_with_bias"
SPLITS = f"{_G}gradients_of_weight_and_bias_summed_in_several_splits"
NO_TOKENS = f"{_G}a_projection_of_nothing_has_a_weight_gradient_of_zero"
_S = "tests/test_gradient_state.py::test_"
GRADIENT_SUBSETS = f"{_S}attention_computes_the_gradients_that_are_needed"
PROJECTION_SUBSETS = f"{_S}a_projection_computes_the_gradients_that_are_needed"
_D = "tests/test_dropout.py::test_"
DROPOUT = f"{_D}lengths_and_grouped_heads"
_C = "tests/test_compile.py::test_"
OPCHECK = f"{_C}opcheck_of_attention"
# The end of a gradient, without its name.
SCALES_OF_GRADIENTS = " *= scale_log2 * cap_scale * LN2 if SOFTCAP else scale_log2 * LN2"


def far(case: str) -> str:
    """One case of the offsets beyond 2³¹."""
    return f"'tests/test_offsets.py::test_offsets_beyond_two_to_the_thirty_first[{case}]'"


def further(case: str) -> str:
    """One case more."""
    return f"'{_M}further_offsets_beyond_two_to_the_thirty_first[{case}]'"


TILE_FAULTS = [
    Fault(
        "causal: one key too many",
        TILES,
        "tl.minimum(offs_m + 1 + (T_k - T_q), T_k)",
        "tl.minimum(offs_m + 2 + (T_k - T_q), T_k)",
        LENGTHS,
    ),
    Fault(
        "causal: aligned top-left",
        TILES,
        "key_limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)",
        "key_limit = tl.minimum(offs_m + 1, T_k)",
        T_Q_T_K,
    ),
    Fault(
        "causal: one tile too far without a mask",
        TILES,
        "tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // BLOCK_N * BLOCK_N",
        "tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // BLOCK_N * BLOCK_N + BLOCK_N",
        LENGTHS,
    ),
    Fault(
        "causal: keys end a tile early",
        TILES,
        "end = tl.maximum(tl.minimum(m + BLOCK_M, T_q) + (T_k - T_q), 0)",
        "end = tl.maximum(tl.minimum(m + BLOCK_M, T_q) + (T_k - T_q) - BLOCK_N, 0)",
        LENGTHS,
    ),
    Fault(
        "causal: limits of rows not clamped to T_k",
        TILES,
        "key_limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)",
        "key_limit = offs_m + 1 + (T_k - T_q)",
        f"{LENGTHS} {T_Q_T_K} {REDZONES}",
    ),
    Fault(
        "full attention: tail mask dropped",
        TILES,
        "unmasked = T_k // BLOCK_N * BLOCK_N",
        "unmasked = tl.cdiv(T_k, BLOCK_N) * BLOCK_N",
        f"{T_Q_T_K} {REDZONES}",
    ),
    Fault(
        "full attention: last key tile skipped", TILES, "end = T_k\n", "end = unmasked\n", T_Q_T_K
    ),
    Fault(
        "load: rows past the end not masked",
        TILES,
        "mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < D)\n            tile",
        "mask = (offs_t[:, None] >= 0) & (offs_d[None, :] < D)\n            tile",
        REDZONES,
    ),
    Fault(
        "load: lanes past D not masked in cut tiles",
        TILES,
        "& (offs_d[None, :] < D)\n            tile = tl.load(pointers, mask=mask, other=0.0)",
        "& (offs_d[None, :] >= 0)\n            tile = tl.load(pointers, mask=mask, other=0.0)",
        REDZONES,
    ),
    Fault(
        "load: lanes past D not masked in full tiles",
        TILES,
        "tile = tl.load(pointers, mask=offs_d[None, :] < D, other=0.0)",
        "tile = tl.load(pointers)",
        HEAD_DIMS,
    ),
    Fault(
        "load: masked elements are not zero",
        TILES,
        "tile = tl.load(pointers, mask=mask, other=0.0)",
        "tile = tl.load(pointers, mask=mask, other=1.0)",
        HEAD_DIMS,
    ),
    Fault(
        "load: what masked elements hold is left open",
        TILES,
        "tile = tl.load(pointers, mask=mask, other=0.0)",
        "tile = tl.load(pointers, mask=mask)",
        MASKED_LOADS,
    ),
    Fault(
        "load: row * stride in 32 bits",
        TILES,
        "row_ptr = source + tl.cast(row, tl.int64) * stride_t * ALIGNMENT",
        "row_ptr = source + row * stride_t * ALIGNMENT",
        far("attention over tiles far apart"),
    ),
    Fault(
        "load: offsets inside a tile always in 32 bits",
        TILES,
        "in_tile = offs_t.to(tl.int64) if WIDE else offs_t",
        "in_tile = offs_t",
        far("attention with a long token stride"),
    ),
    Fault(
        "no tile is wide",
        TILES,
        "return elements >= 2**31",
        "return False",
        far("attention with a long token stride"),
    ),
    Fault(
        "head_offset: batch in 32 bits",
        TILES,
        "tl.cast(b, tl.int64) * stride_b",
        "b * stride_b",
        further("attention with a long odd batch stride"),
    ),
    Fault(
        "head_offset: head in 32 bits",
        TILES,
        "tl.cast(h, tl.int64) * stride_h",
        "h * stride_h",
        further("attention with a long odd head stride"),
    ),
    Fault(
        "head_offset: batch and head strides swapped",
        TILES,
        "(tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h)",
        "(tl.cast(b, tl.int64) * stride_h + tl.cast(h, tl.int64) * stride_b)",
        GROUPS,
    ),
    Fault(
        "store: rows past the end are written",
        TILES,
        "mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < D)\n    pointers",
        "mask = (offs_t[:, None] >= 0) & (offs_d[None, :] < D)\n    pointers",
        FENCES,
    ),
    Fault(
        "store: lanes past D are written",
        TILES,
        "& (offs_d[None, :] < D)\n    pointers",
        "& (offs_d[None, :] >= 0)\n    pointers",
        FENCES,
    ),
    Fault(
        "store: row * stride in 32 bits",
        TILES,
        "row_ptr = pointer + tl.cast(row, tl.int64) * stride_t\n",
        "row_ptr = pointer + row * stride_t\n",
        further("backward with tiles of the gradients far apart"),
    ),
    Fault(
        "bulk copies: heads and tokens not swapped",
        TILES,
        "source.load([b, h, row, 0])",
        "source.load([b, row, h, 0])",
        BULK_COPIES,
    ),
    Fault(
        "bulk copies: descriptors with the strides of heads and tokens swapped",
        TILES,
        "(b, h, t_, d), (1, 1, rows",
        "(b, t_, h, d), (1, 1, rows",
        BULK_COPIES,
    ),
    Fault(
        "bulk copies: descriptors with the sizes of heads and tokens swapped",
        TILES,
        "Bulk((B, H, T, D)",
        "Bulk((B, T, H, D)",
        BULK_COPIES,
    ),
    Fault(
        "strides: of aligned operands in elements, not in units",
        TILES,
        "t.strides[i] // unit",
        "t.strides[i]",
        LENGTHS,
    ),
    Fault(
        "sections: the last one is as large as the others",
        TILES,
        "size = tl.minimum(n_heads - first, section)",
        "size = section",
        SECTIONS,
    ),
    Fault(
        "sections: programs not counted from their section",
        TILES,
        "pid -= first * n_tiles",
        "pid -= first",
        SECTIONS,
    ),
    Fault(
        "sections: all of them take the first heads",
        TILES,
        "return first + pid % size",
        "return pid % size",
        SECTIONS,
    ),
    Fault(
        "sections: a rest of heads makes none",
        TILES,
        "return triton.cdiv(n_heads, sections)",
        "return n_heads // sections",
        CUT_HEADS,
    ),
    Fault(
        "sections: may be larger than what fits",
        TILES,
        "triton.cdiv(n_heads * bytes_per_head, SECTION_BYTES)",
        "n_heads * bytes_per_head // SECTION_BYTES",
        CUT_HEADS,
    ),
    Fault(
        "bulk copies: weight of nn.Linear read as [C, N]",
        PROJECTION,
        "w_source.load([n, k]).T if W_TRANSPOSED else w_source.load([k, n])",
        "w_source.load([k, n]).T if W_TRANSPOSED else w_source.load([k, n])",
        PROJECTION_BULK_COPIES,
    ),
    Fault(
        "bulk copies: splits of dW overlap",
        WEIGHT,
        "triton.cdiv(triton.cdiv(rows, splits), multiple) * multiple",
        "triton.cdiv(rows, splits)",
        PROJECTION_BULK_COPIES,
    ),
    Fault(
        "float32 products always in TF32",
        TILES,
        'if dtype == torch.float32 and allows_tf32() else "ieee"',
        'if dtype == torch.float32 else "ieee"',
        f"{_M}float32_products_are_ieee_unless_pytorch_allows_tf32",
    ),
    Fault(
        "is_aligned: storage offset ignored",
        TILES,
        "t.on_16_bytes\n        and ",
        "",
        ALIGNED,
    ),
    Fault(
        "is_aligned: no element is no obstacle",
        TILES,
        "and 0 not in t.shape\n        ",
        "",
        ALIGNED,
    ),
    Fault("is_aligned: stride 0 accepted", TILES, "stride > 0 and stride", "stride", ALIGNED),
    Fault(
        "is_aligned: strides ignored",
        TILES,
        "stride > 0 and stride * size % 16 == 0",
        "stride > 0",
        ALIGNED,
    ),
]

FORWARD_FAULTS = [
    Fault(
        "forward: key mask includes its limit",
        FORWARD,
        "offs_n[None, :] < key_limit[:, None], s",
        "offs_n[None, :] <= key_limit[:, None], s",
        LENGTHS,
    ),
    Fault(
        "forward: the first cut key tile of the one loop goes unmasked",
        FORWARD,
        "n >= unmasked",
        "n > unmasked",
        BULK_COPIES,
    ),
    Fault(
        "forward: the one loop masks nothing",
        FORWARD,
        "MASKED and (not USE_TMA or n >= unmasked or (WINDOW and n < whole))",
        "MASKED and not USE_TMA",
        BULK_COPIES,
    ),
    Fault(
        "forward: full key tiles in both loops",
        FORWARD,
        "        begin = unmasked\n",
        "        begin = 0\n",
        LENGTHS,
    ),
    Fault(
        "forward: no guard against -inf - -inf",
        FORWARD,
        'm_known = tl.where(m_new == float("-inf"), 0.0, m_new)',
        "m_known = m_new",
        NO_KEYS,
    ),
    Fault(
        "forward: no guard against a sum of 0",
        FORWARD,
        "l_i = tl.where(l_i == 0.0, 1.0, l_i)",
        "l_i = l_i * 1.0",
        NO_KEYS,
    ),
    Fault(
        "forward: acc not rescaled",
        FORWARD,
        "acc = acc * alpha[:, None]",
        "acc = acc * 1.0",
        LENGTHS,
    ),
    Fault(
        "forward: l_i not rescaled",
        FORWARD,
        "l_i * alpha + tl.sum(p, 1)",
        "l_i + tl.sum(p, 1)",
        LENGTHS,
    ),
    Fault(
        "forward: maximum of this tile alone",
        FORWARD,
        "m_new = tl.maximum(m_i, tl.max(s, 1))",
        "m_new = tl.max(s, 1)",
        f"{T_Q_T_K} {SCALES}",
    ),
    Fault("forward: lse in base 2", FORWARD, "tl.log2(l_i)) * LN2", "tl.log2(l_i))", LENGTHS),
    Fault(
        "forward: lse without the maximum",
        FORWARD,
        "(m_i * scale_log2 + tl.log2(l_i))",
        "tl.log2(l_i)",
        LENGTHS,
    ),
    Fault(
        "forward: lse past the end is written",
        FORWARD,
        "+ offs_m, lse, mask=offs_m < T_q)",
        "+ offs_m, lse)",
        FENCES,
    ),
    Fault(
        "forward: heads of a group interleaved",
        FORWARD,
        "h_kv = h // group",
        "h_kv = h % (H // group)",
        GROUPS,
    ),
    Fault(
        "forward: v of the head through k's strides",
        FORWARD,
        "v_source += head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)",
        "v_source += head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)",
        LAYOUTS,
    ),
    Fault(
        "forward: rows of v at k's stride",
        FORWARD,
        "v_source, b, h_kv, n, stride_vt, T_k,",
        "v_source, b, h_kv, n, stride_kt, T_k,",
        LAYOUTS,
    ),
    Fault(
        "forward: launched with k's strides for v",
        FORWARD,
        "strides_by_name(alignment, q=q, k=k, v=v)",
        "strides_by_name(alignment, q=q, k=k, v=k)",
        LAYOUTS,
    ),
    Fault(
        "scale of the padded head dim",
        TILES,
        "scale = 1 / math.sqrt(D) if",
        "scale = 1 / math.sqrt(block_d_of(D)) if",
        HEAD_DIMS,
    ),
    Fault(
        "forward: scores rounded to the operands' dtype",
        FORWARD,
        "s = dot(q, k.T, None, PRECISION)",
        "s = dot(q, k.T, None, PRECISION).to(q.dtype).to(tl.float32)",
        f"{SCALES} {PROMISE}",
    ),
    Fault(
        "forward: base of o in 32 bits",
        FORWARD,
        "row = tl.cast(b, tl.int64) * T_q  # of o",
        "row = b * T_q  # of o",
        HUGE_OUTPUTS,
    ),
    Fault(
        "dropout: kept weights not scaled up",
        FORWARD,
        "acc / (l_i * (1 - dropout_p))[:, None] if DROPOUT else acc / l_i[:, None]",
        "acc / l_i[:, None]",
        DROPOUT,
    ),
    Fault(
        "dropout: rows counted from the tile",
        FORWARD,
        "offs_m = m + tl.arange(0, BLOCK_M)\n            p = tl.where",
        "offs_m = tl.arange(0, BLOCK_M)\n            p = tl.where",
        DROPOUT,
    ),
    Fault(
        "dropout: before the sum of the softmax",
        FORWARD,
        """        l_i = l_i * alpha + tl.sum(p, 1)
        if DROPOUT:
            offs_m = m + tl.arange(0, BLOCK_M)
            p = tl.where(kept(seed, head, offs_m[:, None], offs_n[None, :], dropout_p), p, 0.0)
""",
        """        if DROPOUT:
            offs_m = m + tl.arange(0, BLOCK_M)
            p = tl.where(kept(seed, head, offs_m[:, None], offs_n[None, :], dropout_p), p, 0.0)
        l_i = l_i * alpha + tl.sum(p, 1)
""",
        DROPOUT,
    ),
    Fault(
        "dropout: the same for every head",
        TILES,
        "columns, rows, head, 0)",
        "columns, rows, 0, 0)",
        f"{_D}masks_of_heads_batches_rows_columns_and_seeds_are_independent",
    ),
    Fault(
        "dropout: the same for every seed",
        TILES,
        "philox(seed, ",
        "philox(0, ",
        f"{_D}all_64_bits_of_the_key_count",
    ),
    Fault(
        "dropout: keeps what it should drop",
        TILES,
        ") >= dropout_p",
        ") < dropout_p",
        f"{_D}every_row_column_and_head_keeps_its_share",
    ),
    Fault(
        "dropout: the same seed on every call",
        LAUNCHES,
        "torch.randint(2**63 - 1, (1,), dtype",
        "torch.zeros((1,), dtype",
        f"{_D}the_seed_decides",
    ),
]

BACKWARD_FAULTS = [
    Fault(
        "dq: delta forgotten", BACKWARD, "ds = p * (dp - delta[:, None])", "ds = p * dp", GRADIENTS
    ),
    Fault(
        "dk: delta forgotten",
        BACKWARD,
        "dsT = pT * (dpT - delta[None, :])",
        "dsT = pT * dpT",
        GRADIENTS,
    ),
    Fault("delta: dlse forgotten", BACKWARD, "delta -= tl.load(", "0.0 * tl.load(", GRADIENT_LSE),
    Fault("delta: dlse added", BACKWARD, "delta -= tl.load(", "delta += tl.load(", GRADIENT_LSE),
    Fault(
        "delta: heads and tokens swapped",
        BACKWARD,
        "out = (b * H + h) * T + t",
        "out = (b * T + t) * H + h",
        GRADIENT_GROUPS,
    ),
    Fault(
        "delta: dO at o's strides",
        BACKWARD,
        "**strides_by_name(g=do),",
        "**strides_by_name(g=Layout(do.shape, (T * H * D, H * D, D, 1), True)),",
        GRADIENT_LAYOUTS,
    ),
    Fault(
        "delta: left out for dk alone",
        BACKWARD,
        "if dq is not None or dk is not None:",
        "if dq is not None:",
        GRADIENT_SUBSETS,
    ),
    Fault(
        "dlse taken for contiguous",
        BACKWARD,
        "else dlse.contiguous()",
        "else dlse",
        GRADIENT_LSE,
    ),
    Fault(
        "dO of last stride 0 taken as it is",
        BACKWARD,
        "if do.stride(-1) != 1:",
        "if False:",
        DO_LAYOUTS,
    ),
    Fault(
        "dO at q's strides",
        BACKWARD,
        'zip("qkvg", placed, strict=True)',
        'zip("qkvg", (*placed[:3], placed[0]), strict=True)',
        GRADIENT_LAYOUTS,
    ),
    Fault(
        "dO not asked whether it is aligned",
        BACKWARD,
        "aligned = all(is_aligned(t, dtype) for t in operands)",
        "aligned = all(is_aligned(t, dtype) for t in operands[:3])",
        GRADIENT_LAYOUTS,
    ),
    Fault(
        "dO not asked whether its tiles are wide",
        BACKWARD,
        "max(t.strides[1] for t in operands)",
        "max(t.strides[1] for t in operands[:3])",
        further("backward with rows of dO far apart"),
    ),
    Fault("dq: scale forgotten", BACKWARD, f"dq{SCALES_OF_GRADIENTS}", "dq *= 1", GRADIENTS),
    Fault("dk: scale forgotten", BACKWARD, f"dk{SCALES_OF_GRADIENTS}", "dk *= 1", GRADIENTS),
    Fault(
        "dk: scale in base 2",
        BACKWARD,
        f"dk{SCALES_OF_GRADIENTS}",
        "dk *= scale_log2 * cap_scale",
        GRADIENTS,
    ),
    Fault("dk, dv: lse in base 2", BACKWARD, "(lse * LOG2E)[None, :]", "lse[None, :]", GRADIENTS),
    Fault(
        "dk, dv: the diagonal is masked",
        BACKWARD,
        "offs_m[None, :] >= first_query[:, None]",
        "offs_m[None, :] > first_query[:, None]",
        GRADIENTS,
    ),
    Fault(
        "dk, dv: the last cut query tile of the one loop goes unmasked",
        BACKWARD,
        "m < whole",
        "m < whole - BLOCK_M",
        BULK_COPIES,
    ),
    Fault(
        "dk, dv: the one loop masks nothing",
        BACKWARD,
        "D, PRECISION, (CAUSAL or WINDOW) and USE_TMA,",
        "D, PRECISION, False,",
        BULK_COPIES,
    ),
    Fault(
        "dk, dv: cut query tiles in both loops",
        BACKWARD,
        "            first = whole\n",
        "            first = begin\n",
        GRADIENTS,
    ),
    Fault(
        "dq: the first cut key tile of the one loop goes unmasked",
        BACKWARD,
        "n >= unmasked",
        "n > unmasked",
        BULK_COPIES,
    ),
    Fault(
        "dq: full key tiles in both loops",
        BACKWARD,
        "        begin = unmasked\n",
        "        begin = 0\n",
        GRADIENTS,
    ),
    Fault(
        "dk, dv: sections of query heads",
        BACKWARD,
        "B * H_kv, n_n, section",
        "B * H_kv * group, n_n, section",
        SECTIONS,
    ),
    Fault(
        "dq: key mask includes its limit",
        BACKWARD,
        "offs_n[None, :] < key_limit[:, None], p",
        "offs_n[None, :] <= key_limit[:, None], p",
        GRADIENT_T_Q_T_K,
    ),
    Fault(
        "dk, dv: causal mask aligned top-left",
        TILES,
        "first_query = n + tl.arange(0, BLOCK_N) - (T_k - T_q)",
        "first_query = n + tl.arange(0, BLOCK_N)",
        GRADIENT_T_Q_T_K,
    ),
    Fault(
        "dk, dv: first query tile skipped",
        TILES,
        "begin = tl.maximum(n - (T_k - T_q), 0) // BLOCK_M * BLOCK_M",
        "begin = tl.cdiv(tl.maximum(n - (T_k - T_q), 0), BLOCK_M) * BLOCK_M",
        GRADIENT_T_Q_T_K,
    ),
    Fault(
        "dk, dv: a cut query tile goes unmasked",
        TILES,
        "tl.minimum(tl.cdiv(last, BLOCK_M) * BLOCK_M, T_q)",
        "tl.minimum(last // BLOCK_M * BLOCK_M, T_q)",
        GRADIENT_T_Q_T_K,
    ),
    Fault(
        "dk, dv: rows past the end have lse 0",
        BACKWARD,
        'lse_ptr + offs_m, mask=offs_m < T_q, other=float("inf"))',
        "lse_ptr + offs_m, mask=offs_m < T_q, other=0.0)",
        GRADIENTS,
    ),
    Fault(
        "dk, dv: rows past the end have lse -inf",
        BACKWARD,
        'lse_ptr + offs_m, mask=offs_m < T_q, other=float("inf"))',
        'lse_ptr + offs_m, mask=offs_m < T_q, other=float("-inf"))',
        GRADIENTS,
    ),
    Fault(
        "dk, dv: one head of the group left out",
        BACKWARD,
        "tl.range(h_kv * group, (h_kv + 1) * group)",
        "tl.range(h_kv * group, (h_kv + 1) * group - 1)",
        GRADIENT_GROUPS,
    ),
    Fault(
        "dq: heads of a group interleaved",
        BACKWARD,
        "h_kv = h // group",
        "h_kv = h % (H // group)",
        GRADIENT_GROUPS,
    ),
    Fault(
        "dk, dv: rows of v at k's stride",
        BACKWARD,
        "v_source, b, h_kv, n, stride_vt, T_k,\n        D, True",
        "v_source, b, h_kv, n, stride_kt, T_k,\n        D, True",
        GRADIENT_LAYOUTS,
    ),
    Fault(
        "dq: rows of v at k's stride",
        BACKWARD,
        "v_source, b, h_kv, n, stride_vt, T_k,\n            D, MASKED",
        "v_source, b, h_kv, n, stride_kt, T_k,\n            D, MASKED",
        GRADIENT_LAYOUTS,
    ),
    Fault(
        "dk, dv: launched as if dv were needed",
        BACKWARD,
        '"NEED_DV": dv is not None',
        '"NEED_DV": True',
        GRADIENT_SUBSETS,
    ),
    Fault(
        "no queries or keys: gradients left as they are",
        BACKWARD,
        "                t.zero_()",
        "                pass",
        NO_GRADIENTS,
    ),
    Fault(
        "dropout: backward forgets the batch",
        BACKWARD,
        "keep = kept(seed, head, offs_m[None, :], offs_n[:, None], dropout_p)",
        "keep = kept(seed, h, offs_m[None, :], offs_n[:, None], dropout_p)",
        DROPOUT,
    ),
    Fault(
        "dropout: backward swaps rows and columns",
        BACKWARD,
        "keep = kept(seed, head, offs_m[:, None], offs_n[None, :], dropout_p)",
        "keep = kept(seed, head, offs_n[None, :], offs_m[:, None], dropout_p)",
        DROPOUT,
    ),
    Fault(
        "dropout: backward counts columns from the tile",
        BACKWARD,
        "offs_n = n + tl.arange(0, BLOCK_N)\n            keep",
        "offs_n = tl.arange(0, BLOCK_N)\n            keep",
        DROPOUT,
    ),
    Fault("dropout: dv from all weights", BACKWARD, "dot((pT * zT)", "dot(pT", DROPOUT),
    Fault(
        "dropout: dk from all weights",
        BACKWARD,
        "dpT = dot(v, do.T, None, PRECISION) * zT",
        "dpT = dot(v, do.T, None, PRECISION)",
        DROPOUT,
    ),
    Fault(
        "dropout: dq not scaled up",
        BACKWARD,
        "tl.where(keep, dp / (1 - dropout_p), 0.0)",
        "tl.where(keep, dp, 0.0)",
        DROPOUT,
    ),
    Fault(
        "dropout: backward draws another seed",
        OPS,
        "do, dlse, seed, ctx.options, offsets, needed)",
        "do, dlse, launches.new_seed(v, ctx.options), ctx.options, offsets, needed)",
        DROPOUT,
    ),
    Fault(
        "attention: dq and dk returned in the wrong order",
        LAUNCHES,
        "return dq, dk, dv\n",
        "return dk, dq, dv\n",
        GRADIENTS,
    ),
    Fault(
        "attention: no dO means garbage",
        LAUNCHES,
        "torch.zeros_like(out) if do is None",
        "torch.empty_like(out) if do is None",
        GRADIENT_LSE,
    ),
    Fault(
        "layer: gradients overwrite the saved operands",
        LAUNCHES,
        "dpacked = _gradient_of(offsets)(packed)",
        "dpacked = packed",
        LAYER,
    ),
]

PROJECTION_FAULTS = [
    Fault(
        "C taken for a multiple of the tile",
        PROJECTION,
        '"EVEN_C": C % config.block_k == 0',
        '"EVEN_C": True',
        SIZES,
    ),
    Fault(
        "tail of C: x not masked",
        PROJECTION,
        "x = tl.load(x_pointers, mask=offs_k[None, :] < C - k, other=0.0)",
        "x = tl.load(x_pointers)",
        X_REDZONES,
    ),
    Fault(
        "tail of C: weight not masked",
        PROJECTION,
        "mask_w = (offs_k[:, None] < C - k) & (offs_n[None, :] < N)",
        "mask_w = offs_n[None, :] < N",
        X_REDZONES,
    ),
    Fault(
        "tail of N: weight not masked",
        PROJECTION,
        "w = tl.load(w_pointers, mask=offs_n[None, :] < N, other=0.0)",
        "w = tl.load(w_pointers)",
        f"{SIZES} {X_REDZONES}",
    ),
    Fault(
        "bias added twice",
        PROJECTION,
        "acc += tl.load(bias_ptr",
        "acc += 2 * tl.load(bias_ptr",
        SIZES,
    ),
    Fault(
        "bias not added in the last column tile",
        PROJECTION,
        "bias_ptr + offs_n, mask=offs_n < N,",
        "bias_ptr + offs_n, mask=offs_n < N - BLOCK_N,",
        SIZES,
    ),
    Fault(
        "bias taken for contiguous",
        PROJECTION,
        "else bias.contiguous()",
        "else bias",
        f"{_P}a_bias_with_any_stride",
    ),
    Fault(
        "x always taken for one long batch element",
        TILES,
        "if B == 1 or stride_b == T * stride_t:",
        "if True:",
        X_LAYOUTS,
    ),
    Fault(
        "one long batch element as short as one of several",
        TILES,
        "Layout((1, B * T, C)",
        "Layout((1, T, C)",
        X_LAYOUTS,
    ),
    Fault(
        "weight taken for row-major",
        PROJECTION,
        '"stride_wn": w.strides[1]',
        '"stride_wn": 1',
        VIEWS,
    ),
    Fault(
        "x: batch in 32 bits",
        PROJECTION,
        "tl.cast(row // T, tl.int64)",
        "(row // T)",
        far("projection with a long batch stride"),
    ),
    Fault(
        "x: token in 32 bits",
        PROJECTION,
        "tl.cast(row % T, tl.int64)",
        "(row % T)",
        far("projection with a long token stride"),
    ),
    Fault(
        "weight: k * stride in 32 bits",
        PROJECTION,
        "tl.cast(k, tl.int64) * stride_wc",
        "k * stride_wc",
        far("projection with weight tiles far apart"),
    ),
    Fault(
        "weight: offsets inside a tile always in 32 bits",
        PROJECTION,
        "in_k = offs_k.to(tl.int64) if WIDE else offs_k",
        "in_k = offs_k",
        far("projection with long weight rows"),
    ),
    Fault(
        "y: row * N in 32 bits",
        PROJECTION,
        "tl.cast(offs_m, tl.int64)[:, None] * N",
        "offs_m[:, None] * N",
        HUGE_OUTPUTS,
    ),
    Fault(
        "tile order: the last group is full",
        PROJECTION,
        "size = tl.minimum(n_m - first, GROUP_M)",
        "size = GROUP_M",
        SIZES,
    ),
    Fault(
        "out ignored",
        PROJECTION,
        "    if out is None:\n        out = torch.empty((B, T, w.shape[1])",
        "    if True:\n        out = torch.empty((B, T, w.shape[1])",
        OUT,
    ),
    Fault(
        "y: rows past the end are written",
        PROJECTION,
        "mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)",
        "mask = (offs_m[:, None] >= 0) & (offs_n[None, :] < N)",
        OUT_FENCE,
    ),
    Fault(
        "dW: tokens past the end of a split are added",
        WEIGHT,
        "inside = (row < end)[:, None]",
        "inside = (row >= 0)[:, None]",
        WEIGHT_GRADIENTS,
    ),
    Fault(
        "dW: a split ends where the next one ends",
        WEIGHT,
        "end = tl.minimum((split + 1) * split_rows, M)\n    offs_c",
        "end = tl.minimum((split + 2) * split_rows, M)\n    offs_c",
        SPLITS,
    ),
    Fault(
        "dW: every split writes the same place",
        WEIGHT,
        "(tl.cast(split, tl.int64) * C + offs_c)",
        "offs_c",
        SPLITS,
    ),
    Fault(
        "dW: x always taken for one long batch element",
        TILES,
        "if B == 1 or stride_b == T * stride_t:",
        "if True:",
        WEIGHT_GRADIENTS,
    ),
    Fault(
        "dW: always launched for one long batch element",
        WEIGHT,
        '"FLAT": B == 1',
        '"FLAT": True',
        WEIGHT_GRADIENTS,
    ),
    Fault(
        "dW: row * stride in 32 bits",
        WEIGHT,
        "x_source + tl.cast(row, tl.int64) * stride_xt",
        "x_source + row * stride_xt",
        further("weight gradient of one batch element with a long token stride"),
    ),
    Fault(
        "dW: token in 32 bits",
        WEIGHT,
        "tl.cast(row % T, tl.int64)",
        "(row % T)",
        further("weight gradient with a long token stride"),
    ),
    Fault(
        "dW: batch in 32 bits",
        WEIGHT,
        "tl.cast(row // T, tl.int64)",
        "(row // T)",
        further("weight gradient with a long batch stride"),
    ),
    Fault("dW: not zeroed without tokens", WEIGHT, "return dw.zero_()", "return dw", NO_TOKENS),
    Fault(
        "dbias: not zeroed without tokens",
        WEIGHT,
        "return dbias.zero_()",
        "return dbias",
        NO_TOKENS,
    ),
    Fault(
        "dbias: rows past the end are added",
        WEIGHT,
        "mask = (row < end)[:, None] & (offs_n < N)[None, :]",
        "mask = (row >= 0)[:, None] & (offs_n < N)[None, :]",
        BIAS_GRADIENTS,
    ),
    Fault(
        "the last split is left out",
        WEIGHT,
        "tl.range(0, splits)",
        "tl.range(0, splits - 1)",
        BIAS_GRADIENTS,
    ),
    Fault(
        "the rows of the last split are left out",
        WEIGHT,
        "return triton.cdiv(rows, split_rows), split_rows",
        "return max(1, rows // split_rows), split_rows",
        f"{SPLITS} {SHARED_OUT}",
    ),
    Fault(
        "splits: many tiles are cut into none",
        WEIGHT,
        "splits = max(1, min(most, PROGRAMS // tiles))",
        "splits = min(most, PROGRAMS // tiles)",
        SHARED_OUT,
    ),
    Fault(
        "splits: as many for many tiles as for few",
        WEIGHT,
        "min(most, PROGRAMS // tiles)",
        "most",
        SHARED_OUT,
    ),
    Fault(
        "bulk copies: x of the projection in several batch elements",
        PROJECTION,
        "bulk_fits = B == 1 and ",
        "bulk_fits = ",
        BULK_FITS,
    ),
    Fault(
        "bulk copies: weight without a stride of 1",
        PROJECTION,
        "bulk_fits = B == 1 and w_rows.strides[1] == 1",
        "bulk_fits = B == 1",
        BULK_FITS,
    ),
    Fault(
        "bulk copies: x of dW in several batch elements",
        WEIGHT,
        "aligned = B == 1 and ",
        "aligned = ",
        BULK_FITS,
    ),
    Fault(
        "dx: weight read in its own order instead of transposed",
        LAUNCHES,
        "projection(dy, W_packed.mT, None, ",
        "projection(dy, W_packed.reshape(W_packed.mT.shape), None, ",
        WEIGHT_GRADIENTS,
    ),
    Fault(
        "dy taken for contiguous",
        LAUNCHES,
        "    dy = dy.contiguous()\n",
        "",
        f"{_M}a_gradient_of_the_projection_in_another_layout",
    ),
    Fault(
        "dbias only where dW is needed",
        LAUNCHES,
        "bias_gradient(dy) if needed[2]",
        "bias_gradient(dy) if needed[1]",
        PROJECTION_SUBSETS,
    ),
]

LANE_FAULTS = [
    Fault(
        "pack: queries carry Q_low",
        PACKING,
        "q_ptr, k_low_ptr, q_pack_ptr",
        "q_ptr, q_low_ptr, q_pack_ptr",
        PACK,
    ),
    Fault(
        "pack: K_low at Q_low's strides",
        PACKING,
        "stride_qb, stride_qt, stride_qh, stride_klb, stride_klt, stride_klh",
        "stride_qb, stride_qt, stride_qh, stride_qlb, stride_qlt, stride_qlh",
        PACK,
    ),
    Fault("pack: low lanes begin one late", PACKING, "lane >= D - R\n", "lane > D - R\n", PACK),
    Fault(
        "pack: lanes past D are written",
        PACKING,
        "(row < n_rows)[:, None] & (lane < D)",
        "(row < n_rows)[:, None]",
        PACK_IN_PLACE,
    ),
    Fault(
        "pack: rows past the end are written",
        PACKING,
        "(row < n_rows)[:, None] & (lane < D)",
        "(row >= 0)[:, None] & (lane < D)",
        PACK_IN_PLACE,
    ),
    Fault(
        "pack: head in 32 bits",
        PACKING,
        "h = tl.cast(row % H, tl.int64)[:, None]",
        "h = (row % H)[:, None]",
        far("packing with a long head stride"),
    ),
    Fault(
        "pack: grid for the queries alone",
        PACKING,
        "grid = (triton.cdiv(B * T * max(H, H_kv), config.block_m), 2)",
        "grid = (triton.cdiv(B * T * H, config.block_m), 2)",
        MORE_KEY_HEADS,
    ),
    Fault(
        "pack in place: sources not copied first",
        API,
        "return source.clone() if shared else source",
        "return source",
        "tests/test_packing.py::test_packing_a_buffer_whose_low_lanes_are_views_of_itself",
    ),
    Fault(
        "pack_qk_: operands that share memory are written",
        API,
        'check_apart("k", k, "q", q)',
        "pass",
        "tests/test_packing.py::test_q_and_k_that_share_memory_are_refused_and_nothing_is_written",
    ),
    Fault(
        "pack_qk_: only one address for both is noticed",
        CHECKS,
        "return reaches(distance // element_size, 0)",
        "return False",
        "tests/test_packing.py::test_operands_that_share_an_element_are_told_from_woven_ones",
    ),
    Fault(
        "pack_qk_: woven operands are refused",
        CHECKS,
        "return reaches(distance // element_size, 0)",
        "return True",
        "tests/test_packing.py::test_operands_that_share_an_element_are_told_from_woven_ones",
    ),
    Fault(
        "layout: low lanes first",
        LAYOUT,
        'q_pack = torch.cat((s["q_std"], s["k_low"])',
        'q_pack = torch.cat((s["k_low"], s["q_std"])',
        LANES,
    ),
    Fault(
        "layout: queries carry Q_low",
        LAYOUT,
        'torch.cat((s["q_std"], s["k_low"]), dim=-1)  # [..., H, D]\n'
        '        k_pack = torch.cat((s["k_std"], s["q_low"])',
        'torch.cat((s["q_std"], s["q_low"]), dim=-1)  # [..., H, D]\n'
        '        k_pack = torch.cat((s["k_std"], s["k_low"])',
        LANES,
    ),
    Fault(
        "layout: Q_low and K_low sections swapped",
        LAYOUT,
        '"q_low": (H_kv, self.R),\n            "k_low": (H, self.R),',
        '"k_low": (H, self.R),\n            "q_low": (H_kv, self.R),',
        "tests/test_layout.py",
    ),
    Fault(
        "bias left in split order",
        API,
        "None if bias is None else layout.pack(bias)",
        "bias",
        f"{_P}projection_matches_the_definition",
    ),
    Fault(
        "gate w_rec on both sides",
        WEIGHTS,
        '"q_low": q_low,',
        '"q_low": _gated(w_rec, q_low),',
        COMPOSED,
    ),
    Fault(
        "gate w_std on both sides",
        WEIGHTS,
        '"k_std": k[..., : layout.d_std]',
        '"k_std": _gated(w_std, k[..., : layout.d_std])',
        COMPOSED,
    ),
    Fault(
        "W_recip of the first head for all",
        WEIGHTS,
        "recip = W_recip.expand(",
        "recip = (W_recip if W_recip.dim() == 2 else W_recip[0]).expand(",
        COMPOSED,
    ),
    Fault(
        "standard lanes from the end",
        WEIGHTS,
        '"k_std": k[..., : layout.d_std]',
        '"k_std": k[..., layout.R :]',
        COMPOSED,
    ),
]

_SD = "tests/test_sdpa.py::test_"
SDPA_FAULTS = [
    Fault(
        "sdpa: rows without keys as they come",
        SDPA,
        "return out if blind is None else out.masked_fill(blind, 0.0)",
        "return out",
        f"{NO_KEYS} {WINDOWS} {GRADIENT_T_Q_T_K}",
    ),
    Fault(
        "sdpa: no keys gives 0 * q",
        SDPA,
        "q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0)",
        "q * 0",
        f"{_A}no_keys_gives_zero_whatever_the_query",
    ),
    Fault(
        "sdpa: left end left out", SDPA, "mask &= ahead >= -left", "mask &= ahead > -left", WINDOWS
    ),
    Fault(
        "sdpa: right end left out", SDPA, "mask &= ahead <= right", "mask &= ahead < right", WINDOWS
    ),
    Fault("sdpa: aligned top-left", SDPA, "[:, None] + (T_k - T_q)", "[:, None]", T_Q_T_K),
    Fault(
        "sdpa: is_causal for every length",
        SDPA,
        "options.causal and T_q == T_k and options.reach",
        "options.causal and options.reach",
        T_Q_T_K,
    ),
    Fault(
        "sdpa: lse of interleaved heads",
        SDPA,
        "k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)",
        "k = k.float().repeat(1, q.shape[1] // k.shape[1], 1, 1)",
        GROUPS,
    ),
    Fault(
        "sdpa: packing without rank writes all lanes",
        SDPA,
        "    if R:\n",
        "    if True:\n",
        f"{PACK_IN_PLACE} tests/test_packing.py::test_empty_tensors",
    ),
    Fault(
        "sdpa: rows without keys of plain torch as they come",
        SDPA,
        "out = out.masked_fill(_without_a_key(mask), 0.0)",
        "out = out + 0",
        f"{_SD}softcap_of_every_dtype",
    ),
    Fault(
        "sdpa: gradients of steps add up in half precision",
        SDPA,
        "others = tuple(t.float() for t in others)",
        "others = tuple(others)",
        f"{_SD}softcap_of_every_dtype",
    ),
    Fault(
        "sdpa: another dropout when scores are computed again",
        SDPA,
        "preserve_rng_state=random",
        "preserve_rng_state=False",
        f"{_SD}dropout_under_a_cap_drops_the_same_again_backward",
    ),
    Fault(
        "sdpa: all scores are kept",
        SDPA,
        "compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=random)",
        "pass",
        f"{_SD}no_scores_are_kept_for_the_backward_pass",
    ),
    Fault(
        "sdpa: autocast rounds scores",
        SDPA,
        "on = autocast_dtype(device) is not None",
        "on = False",
        f"{_SD}autocast_does_not_round_the_scores",
    ),
    Fault(
        "sdpa: no second derivative",
        SDPA,
        "if ctx.options.dropout_p or not torch.is_grad_enabled():",
        "if True:",
        f"{_SD}second_derivatives_are_as_exact_as_eager_pytorchs",
    ),
    Fault(
        "sdpa: addresses are not checked",
        SDPA,
        "offsets = [_address(t), *",
        "offsets = [*",
        f"{_SD}rows_of_whole_loads_are_aligned",
    ),
    Fault(
        "sdpa: strides are not checked",
        SDPA,
        "for step, n in rows if n > 1)",
        "for step, n in rows if n < 1)",
        f"{_SD}rows_of_whole_loads_are_aligned",
    ),
    Fault(
        "sdpa: the gradient of the output as it comes",
        SDPA,
        "_aligned(d_out) if _on_cuda(d_out) else d_out",
        "d_out",
        f"{_SD}the_gradient_of_the_output_is_aligned_too",
    ),
    Fault(
        "sdpa: cuDNN with a mask",
        SDPA,
        "with nullcontext() if mask is None else _no_cudnn():",
        "with nullcontext():",
        f"{_SD}a_mask_takes_every_kernel_that_the_user_allows_but_cudnns",
    ),
    Fault(
        "sdpa: kernels that the user forbids",
        SDPA,
        "for name, allowed in others.items() if allowed)",
        "for name, allowed in others.items())",
        f"{_SD}a_mask_takes_every_kernel_that_the_user_allows_but_cudnns",
    ),
    Fault(
        "sdpa: grouped heads in float32",
        SDPA,
        "return dtype == torch.float32 or mask is not None",
        "return mask is not None",
        f"{_SD}grouped_heads_become_equal_where_no_fused_kernel_knows_groups",
    ),
    Fault(
        "sdpa: heads beyond a grid",
        SDPA,
        "heads = max(1, most // H), max(1, most // group)",
        "heads = max(1, most // H), H_kv",
        f"{_SD}pieces_cover_each_head_of_each_sequence_once",
    ),
    Fault(
        "sdpa: the first sequences' mask for all",
        SDPA,
        "else mask[sequences]",
        "else mask[: sequences.stop - sequences.start]",
        f"{_SD}pieces_of_a_large_batch_are_the_whole",
    ),
    Fault(
        "options: a window as wide as an integer gets",
        "ra_triton/options.py",
        "-1 if side >= NO_LIMIT else side",
        "side",
        f"{_SD}options_have_one_name_for_no_window",
    ),
    Fault(
        "compose: gates are not checked first",
        WEIGHTS,
        "_check_gate(name, gate, n_head, W_q.device)",
        "pass",
        "tests/test_api_errors.py::test_a_bad_argument_is_named",
    ),
    Fault(
        "which_backend: an unknown option is the dataclass's",
        API,
        "if name not in known:",
        "if False:",
        "tests/test_api_errors.py::test_unknown_options_are_refused_everywhere",
    ),
]

PLAN_FAULTS = [
    Fault(
        "plans: whether addresses are aligned is no part of a layout",
        PLANS,
        "t.stride(), t.data_ptr() % 16 == 0)",
        "t.stride(), True)",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: strides of one layout serve another",
        PLANS,
        "    on_16_bytes: bool  # the address\n",
        """    on_16_bytes: bool  # the address

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Layout) and (self[0], self[2]) == (other[0], other[2])

    def __hash__(self) -> int:
        return hash((self[0], self[2]))
""",
        f"{ANOTHER_PLAN} {LAYOUTS}",
    ),
    *(
        Fault(
            f"plans: one plan serves every {what}",
            PLANS,
            "    cached = lru_cache(PLANS)(derive)\n",
            f"""    kept: dict[Any, Any] = {{}}

    def cached(*args: Any) -> Any:
        key = tuple(arg for arg in args if not {left_out})
        if key not in kept:
            kept[key] = derive(*args)
        return kept[key]

    cached.cache_clear = kept.clear
""",
            ANOTHER_PLAN,
        )
        for what, left_out in (
            ("mask, and packing in place or not", "isinstance(arg, bool)"),
            ("scale and dropout", "isinstance(arg, float)"),
            ("dtype", "isinstance(arg, torch.dtype)"),
            ("precision and stage", "isinstance(arg, str)"),
            ("config", "hasattr(arg, 'num_warps')"),
        )
    ),
    Fault(
        "plans: forward does not ask where lse is",
        FORWARD,
        "on_16_bytes(seed, *flat(offsets)[:2], o, lse)",
        "on_16_bytes(seed, *flat(offsets)[:2], o)",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: delta does not ask where dlse is",
        BACKWARD,
        "others = on_16_bytes(o, dlse, delta)",
        "others = (True, None if dlse is None else True)",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: backward does not ask where the seed is",
        BACKWARD,
        "others = on_16_bytes(*inputs[4:])",
        "others = on_16_bytes(*inputs[4:6], *inputs[7:])",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: projection does not ask where y is",
        PROJECTION,
        "on_16_bytes(bias, out)",
        "on_16_bytes(bias)",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: dW does not ask where dy is",
        WEIGHT,
        "on_16_bytes(g, dw)",
        "on_16_bytes(dw, dw)",
        ANOTHER_PLAN,
    ),
    Fault(
        "plans: dbias does not ask where dy is",
        WEIGHT,
        "M, N, on_16_bytes(g), target",
        "M, N, (), target",
        ANOTHER_PLAN,
    ),
    Fault(
        "int8 plans: the result's dtype not in the key",
        INT8,
        "        out.dtype,\n        out.shape[-1],",
        "        None,\n        out.shape[-1],",
        f"{_T}integer_products_into_another_dtype_are_another_plan",
    ),
    Fault(
        "later calls: the rest in the order of the plan",
        PLANS,
        "rest = [self.arguments[name] for name in self.kernel.arg_names[len(tensors) :]]",
        "rest = [v for k, v in self.arguments.items() if k in self.kernel.arg_names]",
        LATER_CALLS,
    ),
    Fault(
        "later calls: read what the first one read",
        LAUNCHER,
        "descriptor.__dict__.update(self.fields, base=t)",
        "descriptor.__dict__.update(self.fields)",
        "tests/test_launcher.py::test_the_c_launcher_gets_what_triton_would_pass",
    ),
    Fault(
        "later calls: descriptors left out",
        LAUNCHER,
        "            first[position] = described.of(tensors[position])\n",
        "            pass\n",
        "tests/test_launcher.py::test_the_c_launcher_gets_what_triton_would_pass",
    ),
    Fault(
        "later calls: the first tensors are kept alive",
        LAUNCHER,
        '{**fields, "base": None}',
        "dict(fields)",
        "tests/test_launcher.py::test_descriptors_are_few_and_keep_no_tensor_alive",
    ),
    Fault(
        "dependent launch: nobody waits",
        TILES,
        "        tl.extra.cuda.gdc_wait()\n",
        "",
        DEPENDENT,
    ),
    Fault(
        "dependent launch: dq does not wait",
        BACKWARD,
        "    h_kv = h // group\n    follow(PDL)\n",
        "    h_kv = h // group\n",
        DEPENDENT,
    ),
    Fault(
        "dependent launch: the forward writes before it waits",
        FORWARD,
        "    follow(PDL)\n    row = ",
        "    tl.store(lse_ptr, 0.0)\n    follow(PDL)\n    row = ",
        DEPENDENT,
    ),
    Fault(
        "dependent launch: of kernels that do not wait",
        CONFIGS,
        'options | {"launch_pdl": True} if self.pdl else options',
        'options | {"launch_pdl": True}',
        "tests/test_configs.py::test_dependent_launches_are_for_hopper_alone",
    ),
]

CONTRACT_FAULTS = [
    Fault(
        "direct functions: inputs saved past autograd's watch",
        OPS,
        "_save(ctx, offsets, x, W_packed, packed, out, lse, seed)",
        "_save(ctx, offsets, x.data, W_packed.data, packed, out, lse, seed)",
        f"{_OB}a_layer_whose_operand_changes_is_noticed",
    ),
    Fault(
        "operators: taken as they are inside torch.func",
        LIBRARY,
        "return _functions[operator].apply(*args)",
        "pass",
        f"{_S}torch_func_gives_the_same_gradients",
    ),
    Fault(
        "forward mode: tangents dropped",
        OPS,
        "torch.compiler.is_compiling() or not internals.forward_mode()",
        "True",
        f"{_S}forward_mode_is_refused_not_dropped",
    ),
    Fault(
        "layer: no dO means garbage",
        OPS,
        "torch.zeros_like(out) if do is None",
        "torch.empty_like(out) if do is None",
        f"{_S}an_output_without_a_gradient_gives_its_inputs_zeros",
    ),
    Fault(
        "operator: no dO of the layer means garbage",
        LIBRARY,
        "do = torch.zeros_like(out) if do is None else do\n    saved, needed = (x, W_packed",
        "do = torch.empty_like(out) if do is None else do\n    saved, needed = (x, W_packed",
        f"{_S}the_operator_too_gives_zeros_without_a_gradient",
    ),
    Fault(
        "projection: all gradients whatever is needed",
        OPS,
        "args = (x, W_packed, dy, ctx.needs_input_grad)",
        "args = (x, W_packed, dy, (True, True, True))",
        PROJECTION_SUBSETS,
    ),
    Fault(
        "operator: fake output at q's strides",
        LIBRARY,
        "return q_pack.new_empty(q_pack.shape), q_pack.new_empty((B, H, T)",
        "return torch.empty_like(q_pack), q_pack.new_empty((B, H, T)",
        OPCHECK,
    ),
    Fault(
        "operator: backward forgets the seed",
        LIBRARY,
        "saved, needed = (q_pack, k_pack, v, out, lse, do, dlse, seed)",
        "saved, needed = (q_pack, k_pack, v, out, lse, do, dlse, None)",
        OPCHECK,
    ),
    Fault(
        "operator: gradients in the wrong order",
        LIBRARY,
        "return _present(grads, v)",
        "return _present((grads[1], grads[0], grads[2]), v)",
        f"{_C}torch_func_grad_of_attention_and_projection",
    ),
    Fault(
        "operator: dlse ignored",
        LIBRARY,
        "dlse = torch.zeros_like(lse) if dlse is None else dlse",
        "dlse = torch.zeros_like(lse)",
        f"{_C}torch_func_grad_of_attention_and_projection",
    ),
    Fault(
        "compilers look into the launches",
        CHECKS,
        "if torch.compiler.is_compiling() or internals.modes_active():",
        "if internals.modes_active():",
        f"{_C}project_compiles",
    ),
    Fault(
        "observed: not by dispatch modes",
        INTERNALS,
        "            or torch._C._len_torch_dispatch_stack()\n",
        "",
        f"{_OB}dispatch_modes_see_what_is_written",
    ),
    Fault(
        "observed: not by function modes",
        INTERNALS,
        "            or (torch._C._len_torch_function_stack() and _has_function_mode())\n",
        "",
        f"{_OB}function_modes_see_operators_and_a_default_device_is_none",
    ),
    Fault(
        "observed: by a default device too",
        INTERNALS,
        'return any(name != "DeviceContext" for name in modes)',
        "return any(True for name in modes)",
        f"{_OB}function_modes_see_operators_and_a_default_device_is_none",
    ),
    Fault(
        "observed: not by jit.trace",
        INTERNALS,
        "            or torch._C._is_tracing()\n",
        "",
        f"{_OB}jit_trace_computes_on_new_data",
    ),
    Fault(
        "observed: a lazily negated tensor read as it lies",
        CHECKS,
        "            or t.is_neg()\n",
        "",
        f"{_OB}a_lazily_negated_gradient",
    ),
    Fault(
        "observed: a batch of gradients read as one",
        CHECKS,
        "            or internals.is_batch_of_gradients(t)\n",
        "",
        f"{_OB}batches_of_gradients_are_those_of_a_loop",
    ),
    Fault(
        "backward: launches unseen by a mode that began later",
        OPS,
        "if torch.is_grad_enabled() or observed(*incoming):",
        "if torch.is_grad_enabled():",
        f"{_OB}dispatch_modes_see_forward_and_backward_and_change_no_bit",
    ),
    Fault(
        "prepared: known calls unseen by modes",
        PREPARED,
        "if observed(*tensors) or context_parallel():",
        "if context_parallel():",
        f"{_OB}known_calls_are_not_taken_where_something_observes",
    ),
    Fault(
        "prepared: known calls inside context_parallel",
        PREPARED,
        "if observed(*tensors) or context_parallel():",
        "if observed(*tensors):",
        f"{_LO}attention_inside_context_parallel_is_refused",
    ),
    Fault(
        "vmap: the first slice for all",
        LIBRARY,
        "arg.select(dim, i) if isinstance(dim, int)",
        "arg.select(dim, 0) if isinstance(dim, int)",
        f"{_OB}vmap_and_its_gradients_are_those_of_a_loop",
    ),
    Fault(
        "torch.func: a second level gets no gradient",
        LIBRARY,
        'if sum(name != "Vmap" for name in transforms) > 1:',
        "if False:",
        f"{_OB}a_second_level_is_refused_under_vmap_too",
    ),
    Fault(
        "flops: a backward counts what nobody needs",
        FLOPS,
        "return sum(needed[:2]) * _gemm(x, W_packed.shape[1])\n\n\ndef _attention(",
        "return 2 * _gemm(x, W_packed.shape[1])\n\n\ndef _attention(",
        f"{_OB}flops_count_what_is_needed_and_inference",
    ),
    Fault(
        "flops: padding between sequences counted",
        FLOPS,
        "if offsets and offsets[0] is not None:",
        "if False:",
        f"{_OB}flops_are_counted_as_pytorch_counts_attention",
    ),
    Fault(
        "in place: packing unseen by autograd",
        OPS,
        "    increment_version((q, k))\n",
        "",
        OVERWRITTEN,
    ),
    Fault(
        "in place: norm and rotation unseen by autograd",
        OPS,
        "    increment_version((call.q, call.k))\n",
        "",
        OVERWRITTEN,
    ),
    Fault(
        "in place: out of a projection unseen by autograd",
        OPS,
        "        increment_version(out)\n",
        "        pass\n",
        OVERWRITTEN,
    ),
    Fault(
        "in place: appending unseen by autograd",
        OPS,
        "increment_version((k_cache, v_cache, lengths))",
        "increment_version((k_cache, v_cache))",
        "tests/test_written.py::test_a_cache_that_is_appended_to",
    ),
    Fault(
        "varlen: outputs behind the last sequence are what memory held",
        LAUNCHES,
        "out.zero_(), lse.fill_(-math.inf)",
        "pass",
        f"{_TA}tokens_behind_the_last_sequence_give_zeros_and_no_gradient",
    ),
    Fault(
        "varlen: gradients behind the last sequence are what memory held",
        LAUNCHES,
        "return torch.empty_like if complete else torch.zeros_like",
        "return torch.empty_like",
        f"{_TA}tokens_behind_the_last_sequence_give_zeros_and_no_gradient",
    ),
    Fault(
        "varlen: a compiler has to know the longest sequence",
        OFFSETS,
        "        return  # it may be an unbacked SymInt",
        "        pass  # it may be an unbacked SymInt",
        f"{_TA}a_compiled_call_measures_its_longest_sequence",
    ),
    Fault(
        "varlen: a longest sequence of nothing runs",
        OFFSETS,
        """        check_longest("max_seqlen_q", self.max_seqlen_q, queries)\n""",
        "",
        f"{_TA}a_number_that_no_compiler_knew_is_looked_at_when_the_call_runs",
    ),
    Fault(
        "context_parallel: local attention",
        CHECKS,
        "    if context_parallel():\n",
        "    if False:\n",
        f"{_LO}attention_inside_context_parallel_is_refused",
    ),
    Fault(
        "context_parallel: any other replacement is taken for it",
        CHECKS,
        """return module.startswith("torch.distributed.tensor")""",
        "return bool(module)",
        f"{_LO}another_replacement_of_pytorchs_attention_is_none_of_ours",
    ),
    Fault(
        "DTensors reach the kernels",
        TRITON,
        "    if distributed(*tensors):\n",
        "    if False:\n",
        f"{_LO}the_kernels_refuse_dtensors_and_name_local_tensors",
    ),
    Fault(
        "nested tensors pass for dense ones",
        CHECKS,
        "    if t.is_nested:\n",
        "    if False:\n",
        f"{_OB}nested_tensors_are_refused_by_name",
    ),
    Fault(
        "float32 products: a setting for CPUs lowers those on a GPU",
        CHECKS,
        "return torch.backends.cuda.matmul.fp32_precision ==",
        "return torch.backends.mkldnn.matmul.fp32_precision ==",
        f"{_C}tf32_is_what_pytorchs_products_on_a_gpu_may_use",
    ),
    Fault(
        "operators: differentiating twice gives no gradient",
        LIBRARY,
        "raise RuntimeError(\"the Triton kernels cannot differentiate twice; use backend='sdpa'\")",
        "return (None,) * len(ctx.needs_input_grad)",
        f"{_S}differentiating_twice_is_refused",
    ),
    Fault(
        "attention: operands saved past autograd's watch",
        OPS,
        "_save(ctx, offsets, q_pack, k_pack, v, *output, seed)",
        "_save(ctx, offsets, q_pack.data, k_pack.data, v.data, *output, seed)",
        f"{_S}an_operand_changed_before_the_backward_is_noticed",
    ),
    Fault(
        "workspace: the output lies over its operands",
        LAUNCHES,
        'zip(("packed", "out"), shapes, strict=True)',
        'zip(("packed", "packed"), shapes, strict=True)',
        f"{_C}workspace_changes_no_bit",
    ),
    Fault(
        "workspace: gradients not refused",
        API,
        "workspace.refuse_gradients(x, *_tensors(W_fused), bias)",
        "workspace.refuse_gradients()",
        f"{_C}workspace_refuses_gradients",
    ),
    Fault(
        "workspace: dtypes share memory",
        WORKSPACE,
        "key = (name, device, dtype, stream_id(device))",
        "key = (name, device, torch.float32, stream_id(device))",
        "tests/test_workspace.py::test_names_and_dtypes_do_not_share_memory",
    ),
    Fault(
        "pack_qk: kernels run where a gradient is needed",
        TRITON,
        "if needs_grad(*tensors) or observed(*tensors):",
        "if observed(*tensors):",
        f"{_M}pack_qk_is_differentiable_on_triton_too",
    ),
    Fault(
        "ROCm: auto takes the kernels that never ran there",
        "ra_triton/backend/__init__.py",
        "no_triton = triton.untried() or triton.unsupported(tensors, options, head_dim)",
        "no_triton = triton.unsupported(tensors, options, head_dim)",
        "tests/test_rocm.py::test_who_asks_gets_the_kernels_and_auto_does_not",
    ),
    Fault(
        "ROCm: its GPU taken for an NVIDIA GPU of the same capability",
        TILES,
        'return "rocm"',
        "pass",
        "tests/test_rocm.py::test_its_row_is_its_own_and_products_are_ieee",
    ),
    Fault(
        "ROCm: launches go through NVIDIA's C launcher",
        LAUNCHER,
        "None if torch.version.hip else _direct(",
        "_direct(",
        "tests/test_rocm.py::test_launches_go_through_tritons_own_launcher",
    ),
    Fault(
        "newer assemblers: tiles whose registers they spill",
        CONFIGS,
        "triton >= (3, 9)",
        "False",
        "tests/test_hopper.py::test_newer_assemblers_get_tiles_of_two_groups_for_long_rows_of_64",
    ),
]

_L = "tests/test_launcher.py::test_"
_R = "tests/test_prepared.py::test_"
IN_THE_KEY = f"{_R}whatever_decides_how_a_call_runs_is_in_its_key"
STILL_CHECKED = f"{_R}what_equals_a_known_option_is_still_checked"
LOOKED_AT = f"{_R}calls_that_something_looks_at_are_not_prepared"
PLACES = f"{_R}a_prepared_layer_launches_on_the_places_of_the_views"
HOST_FAULTS = [
    Fault(
        "launcher: every address gets the first descriptor",
        LAUNCHER,
        "return self._encoded.get(t.data_ptr())",
        "return next(iter(self._encoded.values()), None)",
        f"{_L}the_c_launcher_gets_what_triton_would_pass",
    ),
    Fault(
        "launcher: a descriptor holds its tensor",
        LAUNCHER,
        "self._encoded[t.data_ptr()] = encoded",
        "self._encoded[t.data_ptr()] = encoded; self.kept = t",
        f"{_L}descriptors_are_few_and_keep_no_tensor_alive",
    ),
    Fault(
        "launcher: descriptors without end",
        LAUNCHER,
        "            self._encoded.clear()\n",
        "            pass\n",
        f"{_L}descriptors_are_few_and_keep_no_tensor_alive",
    ),
    Fault(
        "launcher: the example's tensor stays",
        LAUNCHER,
        "    for index, _ in places:\n        template[index] = None\n",
        "",
        f"{_L}descriptors_are_few_and_keep_no_tensor_alive",
    ),
    Fault(
        "launcher: scratch memory not noticed",
        LAUNCHER,
        "any(getattr(run, name, False) for name in anew)",
        "False",
        f"{_L}what_each_launch_needs_anew_takes_tritons_path_without_a_word",
    ),
    Fault(
        "launcher: hooks passed by",
        LAUNCHER,
        "if _present(knobs.launch_enter_hook) or _present(knobs.launch_exit_hook):",
        "if False:",
        f"{_L}a_profilers_hook_takes_tritons_path",
    ),
    Fault(
        "prepared: strides not in the key",
        PREPARED,
        "(t.shape, t.stride(), t",
        "(t.shape, t",
        IN_THE_KEY,
    ),
    Fault(
        "prepared: alignment not in the key",
        PREPARED,
        "t.data_ptr() % 16, ",
        "",
        IN_THE_KEY,
    ),
    Fault(
        "prepared: options not in the key",
        PREPARED,
        "options, *map",
        "*map",
        IN_THE_KEY,
    ),
    Fault(
        "prepared: types of options not in the key",
        PREPARED,
        "options, *map(type, options))",
        "options)",
        STILL_CHECKED,
    ),
    Fault(
        "prepared: the window's types not in the key",
        API,
        "repr(window_size), backend",
        "window_size, backend",
        STILL_CHECKED,
    ),
    Fault(
        "prepared: precision not in the key",
        PREPARED,
        "if first.dtype is torch.float32:",
        "if False:",
        f"{_R}the_precision_of_products_is_in_the_key",
    ),
    Fault(
        "prepared: gradients not in the key",
        PREPARED,
        "needs_grad(*tensors), options",
        "False, options",
        LOOKED_AT,
    ),
    Fault(
        "prepared: recorded calls looked at again",
        API,
        "prepared.keep(key, call or again)",
        "call and prepared.keep(key, call)",
        f"{_R}a_recorded_call_is_checked_once",
    ),
    Fault(
        "prepared: recorded calls without their gradients",
        API,
        "if not out.requires_grad:",
        "if True:",
        f"{_R}a_recorded_call_is_checked_once",
    ),
    Fault(
        "prepared: under autocast",
        PREPARED,
        "or torch.is_autocast_enabled(DEVICE)",
        "or False",
        LOOKED_AT,
    ),
    Fault(
        "prepared: tangents dropped",
        PREPARED,
        "or internals.forward_mode()",
        "or False",
        LOOKED_AT,
    ),
    Fault(
        "prepared: calls without end",
        PREPARED,
        "        _known.clear()\n    _known[key]",
        "        pass\n    _known[key]",
        f"{_R}no_more_calls_are_known_than_fit",
    ),
    Fault(
        "prepared: values where the keys are",
        LAUNCHES,
        "for to in (self.key, self.value, self.lse)",
        "for to in (self.key, self.key, self.lse)",
        PLACES,
    ),
    Fault(
        "prepared: the logsumexp over the last values",
        LAUNCHES,
        "self.lse = -(-packed.nbytes // 16) * 16",
        "self.lse = packed.nbytes // 16 * 16",
        PLACES,
    ),
    Fault(
        "prepared: the logsumexp past the end",
        LAUNCHES,
        "(self.lse + lse.nbytes) // item",
        "(self.lse + lse.nbytes) // item - 1",
        PLACES,
    ),
]

_J, _Q = (f"tests/test_{name}.py::test_" for name in ("projection_int8", "quantization"))
INT8_SIZES = f"{_J}sizes_around_tile_boundaries"
INT8_SUMS = f"{_J}sums_in_int32_are_exact"
INT8_COLUMNS = f"{_J}columns_land_where_dense_ones_do"
INT8_TOKENS = f"{_J}tokens_are_rounded_as_the_definition_says"
INT8_LOAD = "            x = tl.load(x_rows[:, None] + (k + offs_k)[None, :], mask=inside, other=0)"
HALF_A_SCALE = f"{_Q}no_element_is_further_off_than_half_a_scale"

INT8_FAULTS = [
    Fault(
        "int8 weight: truncated, not rounded",
        QUANTIZATION,
        "rows / scale[..., None], 0.0).round()",
        "rows / scale[..., None], 0.0).trunc()",
        HALF_A_SCALE,
    ),
    Fault(
        "int8 weight: 128 steps, one more than int8 has",
        QUANTIZATION,
        "LARGEST = 127",
        "LARGEST = 128",
        HALF_A_SCALE,
    ),
    Fault(
        "int8 weight: a zero column has a scale of 0",
        QUANTIZATION,
        "LARGEST)).clamp_min(SMALLEST_SCALE)",
        "LARGEST))",
        HALF_A_SCALE,
    ),
    Fault(
        "int8 weight: ranks that differ from the weight's pass",
        QUANTIZATION,
        "type(value) is not int or value != expected",
        "type(value) is not int",
        f"{_Q}wrong_calls_raise_before_any_launch",
    ),
    Fault(
        "int8 weight: a gradient is dropped",
        QUANTIZATION,
        "if needs_grad(t) or _has_tangent(t):",
        "if _has_tangent(t):",
        f"{_Q}a_gradient_is_refused_and_no_grad_is_the_remedy",
    ),
    Fault(
        "int8 weight: a tangent is dropped",
        QUANTIZATION,
        "if needs_grad(t) or _has_tangent(t):",
        "if needs_grad(t):",
        f"{_Q}forward_mode_is_refused",
    ),
    Fault(
        "int8 on sdpa: autocast rounds the products",
        QUANTIZATION,
        "with torch.autocast(x.device.type, enabled=False):",
        "with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type)):",
        f"{_J}under_autocast_x_and_the_other_columns_are_cast",
    ),
    Fault(
        "int8: other columns keep their dtype under autocast",
        API,
        "if isinstance(t, QuantizedWeight) or (isinstance",
        "if (isinstance",
        f"{_J}under_autocast_x_and_the_other_columns_are_cast",
    ),
    Fault(
        "int8: bias in the wrong order beside a quantized weight",
        API,
        "bias = None if bias is None else layout.pack(bias)\n    return W_fused if",
        "return W_fused if",
        f"{_J}every_rank_of_grouped_heads",
    ),
    Fault(
        "low columns: from the first lane of each head",
        LAYOUT,
        "return Columns(self.d_std, max(1, self.R), heads, self.d_std)",
        "return Columns(0, max(1, self.R), heads, self.d_std)",
        INT8_COLUMNS,
    ),
    Fault(
        "other columns: no gap before V",
        LAYOUT,
        "return Columns(0, self.d_std, heads, self.R)",
        "return Columns(0, self.d_std, heads - 1, self.R)",
        INT8_COLUMNS,
    ),
    Fault(
        "int8 projection: gaps go on past the last head",
        INT8,
        "tl.minimum(offs_n // LANES, heads) * GAP",
        "offs_n // LANES * GAP",
        INT8_COLUMNS,
    ),
    Fault(
        "int8 projection: bias of the column before the gaps",
        INT8,
        "tl.load(bias_ptr + column,",
        "tl.load(bias_ptr + offs_n,",
        INT8_SIZES,
    ),
    Fault(
        "int8 projection: one channel too many",
        INT8,
        f"inside = offs_k[None, :] < C - k\n{INT8_LOAD}",
        f"inside = offs_k[None, :] <= C - k\n{INT8_LOAD}",
        INT8_SUMS,
    ),
    Fault(
        "int8 projection: products rounded on their way into the sum",
        INT8,
        "            acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)",
        "            acc += tl.dot(w, x.T, out_dtype=tl.int32).to(tl.float16).to(tl.int32)",
        INT8_SUMS,
    ),
    Fault(
        "int8 projection: every token has the scale of its tile's first",
        INT8,
        "tl.load(x_scale_ptr + offs_m,",
        "tl.load(x_scale_ptr + m + 0 * offs_m,",
        INT8_SIZES,
    ),
    Fault(
        "int8 projection: weights not scaled",
        INT8,
        "y *= tl.load(w_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]",
        "y *= 1.0",
        INT8_SIZES,
    ),
    Fault(
        "int8 tokens: the largest, not the largest magnitude",
        INT8,
        "bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)",
        "bits = x.to(tl.float32).to(tl.int32, bitcast=True)",
        INT8_TOKENS,
    ),
    Fault(
        "int8 tokens: truncated, not rounded",
        INT8,
        " + ROUNDING - ROUNDING",
        "",
        INT8_TOKENS,
    ),
    Fault(
        "int8 tokens: infinities look like zeros",
        INT8,
        'tl.where(finite, scale, float("nan"))',
        "scale",
        f"{_J}tokens_that_are_not_finite_have_no_integers_and_a_scale_of_nan",
    ),
    Fault(
        "int8 operator: rank lost",
        LIBRARY,
        "sizes = (layout.n_head, layout.n_kv_head, layout.head_dim, layout.R)",
        "sizes = (layout.n_head, layout.n_kv_head, layout.head_dim, 0)",
        f"{_J}compiled_without_a_graph_break",
    ),
    Fault(
        "int8 module: scales cast with the rest",
        "ra_triton/nn/quantized.py",
        "if self.scale.dtype != torch.float32:",
        "if False:",
        f"{_Q}a_cast_of_the_module_keeps_its_scales",
    ),
]

_W = "tests/test_projection_hopper.py::test_"
SOONEST = f"{_W}the_groups_are_those_that_end_soonest {_W}no_other_number_of_groups_ends_sooner"
DESCRIBED = f"{_W}the_launch_describes_x_w_and_y"
SEVERAL_TILES = f"{_W}a_program_takes_several_tiles_only_when_all_sms_have_one"
PLAIN = f"{_W}everything_else_goes_to_the_plain_kernel"

# What a GPU alone can show of this kernel is in the same file, marked gpu.
HOPPER_FAULTS = [
    Fault(
        "groups: three always",
        PROJECTION,
        "hopper = in_fewest_rounds(config, B * T, N, processors)",
        "hopper = config",
        f"{_W}the_sizes_decide_how_many_groups_there_are",
    ),
    Fault(
        "groups: two when both end at once",
        CONFIGS,
        "rows(2) < rows(3)",
        "rows(2) <= rows(3)",
        SOONEST,
    ),
    Fault(
        "groups: fewest tiles, not fewest rounds",
        CONFIGS,
        "return -(-tiles // processors) * groups",
        "return tiles * groups",
        SOONEST,
    ),
    Fault(
        "groups: rounds of equal length",
        CONFIGS,
        "return -(-tiles // processors) * groups",
        "return -(-tiles // processors)",
        SOONEST,
    ),
    Fault(
        "groups: two without the stage that they leave room for",
        CONFIGS,
        "replace(config, groups=2, num_stages=config.num_stages + 1)",
        "replace(config, groups=2)",
        SOONEST,
    ),
    Fault(
        "groups: on Hopper whatever the alignment",
        CONFIGS,
        "        if aligned:\n            # On an H100",
        "        if True:\n            # On an H100",
        PLAIN,
    ),
    Fault(
        "Hopper: y that bulk copies cannot reach",
        PROJECTION,
        "for t in (rows, w_rows, y))",
        "for t in (rows, w_rows))",
        PLAIN,
    ),
    Fault(
        "Hopper: address of y not looked at",
        PROJECTION,
        "y = Layout((B * T, N), (N, 1), bool(others[1]))",
        "y = Layout((B * T, N), (N, 1), True)",
        PLAIN,
    ),
    Fault(
        "Hopper: a program for every tile",
        HOPPER_PROJECTION,
        "(min(tiles, processors),)",
        "(tiles,)",
        SEVERAL_TILES,
    ),
    Fault(
        "Hopper: tiles of one group",
        HOPPER_PROJECTION,
        "triton.cdiv(M, config.groups * config.block_m)",
        "triton.cdiv(M, config.block_m)",
        SEVERAL_TILES,
    ),
    Fault(
        "Hopper: tiles of a transposed weight lie across",
        HOPPER_PROJECTION,
        ", w_block[::-1]\n",
        ", w_block\n",
        DESCRIBED,
    ),
    Fault(
        "Hopper: rows of x contiguous",
        HOPPER_PROJECTION,
        "0: _bulk(x.shape, x.strides, ",
        "0: _bulk(x.shape, (C, 1), ",
        DESCRIBED,
    ),
    Fault(
        "Hopper: y stored in tiles of 64 rows and 256 columns",
        HOPPER_PROJECTION,
        "(config.block_m, STORED.value)",
        "(config.block_m, config.block_n)",
        DESCRIBED,
    ),
    Fault(
        "plans: a descriptor without its layout",
        PLANS,
        "if self.layout is None:",
        "if True:",
        f"{_W}a_layout_in_shared_memory_makes_a_descriptor_for_gluon",
    ),
]

_H = "tests/test_hopper.py::test_"
LONG_ROWS = f"{_H}long_rows_of_16_bits_on_hopper_take_it"
SUITS = f"{_H}what_suits_it_is_launched_with_it_and_nothing_else_is"
FULL_ROUNDS = f"{_H}sections_fill_their_rounds_and_have_no_more_heads_than_there_are"
OVERLAP = f"{_H}exponentials_run_while_a_product_does"

# What the arithmetic of the kernel may do wrong only a GPU can tell.
LONG_ROW_FAULTS = [
    Fault(
        "hopper: exponentials ahead of the product they hide",
        HOPPER,
        "s = warpgroup_mma_wait(1, deps=[s])",
        "s, acc, p = warpgroup_mma_wait(0, deps=[s, acc, p])",
        OVERLAP,
    ),
    Fault(
        "hopper: no basic block ends ahead of the wait",
        HOPPER,
        "mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=n < last)\n"
        "                acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n",
        "acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n                "
        "mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=n < last)\n",
        OVERLAP,
    ),
    Fault(
        "hopper: copies ahead of the kernel before",
        HOPPER,
        "    follow(PDL)\n",
        "",
        f"{_H}it_waits_for_the_kernel_before_ahead_of_the_first_copy",
    ),
    Fault(
        "hopper: with dropout too",
        FORWARD,
        'special = dropout_p > 0 or mask["WINDOW"]',
        'special = mask["WINDOW"]',
        SUITS,
    ),
    Fault(
        "hopper: with a window too",
        FORWARD,
        'dropout_p > 0 or mask["WINDOW"] or softcap > 0 or varlen',
        "dropout_p > 0 or softcap > 0 or varlen",
        SUITS,
    ),
    Fault(
        "hopper: with a softcap too",
        FORWARD,
        'mask["WINDOW"] or softcap > 0 or varlen',
        'mask["WINDOW"] or varlen',
        SUITS,
    ),
    Fault(
        "hopper: variable lengths too",
        FORWARD,
        "or softcap > 0 or varlen\n",
        "or softcap > 0\n",
        SUITS,
    ),
    Fault(
        "hopper: whatever the address of o",
        FORWARD,
        "if aligned and others[3] and not special:",
        "if aligned and not special:",
        SUITS,
    ),
    Fault(
        "hopper: unaligned operands too",
        FORWARD,
        "if aligned and others[3] and not special:",
        "if others[3] and not special:",
        SUITS,
    ),
    Fault(
        "hopper: float32 too",
        CONFIGS,
        'target != "sm_90" or dtype == torch.float32 or length < 256',
        'target != "sm_90" or length < 256',
        LONG_ROWS,
    ),
    Fault(
        "hopper: on every GPU",
        CONFIGS,
        'target != "sm_90" or dtype == torch.float32 or length < 256',
        "dtype == torch.float32 or length < 256",
        LONG_ROWS,
    ),
    Fault(
        "hopper: short rows too",
        CONFIGS,
        "or dtype == torch.float32 or length < 256",
        "or dtype == torch.float32",
        LONG_ROWS,
    ),
    Fault(
        "hopper: one query tile short",
        HOPPER,
        "triton.cdiv(T_q, config.groups * config.block_m)",
        "T_q // (config.groups * config.block_m)",
        f"{_H}programs_of_a_plan_cover_the_queries",
    ),
    Fault(
        "hopper: o as strided as q",
        HOPPER,
        "6: (o, config.block_m)",
        "6: (q, config.block_m)",
        f"{_H}programs_of_a_plan_cover_the_queries",
    ),
    Fault(
        "hopper: no rounds for the last section of fewer heads",
        HOPPER,
        "sections * per_section + triton.cdiv(rest * n_m, programs)",
        "sections * per_section",
        f"{_H}a_last_section_of_fewer_heads_has_rounds_too",
    ),
    Fault(
        "hopper: a section has a tile of each program",
        HOPPER,
        "per_section = triton.cdiv(section * n_m, programs)",
        "per_section = 1",
        f"{_H}programs_of_a_plan_cover_the_queries",
    ),
    Fault(
        "hopper: keys of a section beyond L2",
        HOPPER,
        "if full * bytes_per_head <= SECTION_BYTES:",
        "if True:",
        f"{_H}sections_stay_in_the_second_level_cache",
    ),
    Fault(
        "hopper: sections of equal size, whatever fills their rounds",
        HOPPER,
        "max(heads, triton.cdiv(n_heads, sections))",
        "triton.cdiv(n_heads, sections)",
        FULL_ROUNDS,
    ),
    Fault(
        "hopper: more heads in a section than there are",
        HOPPER,
        "return min(n_heads, max(heads, triton.cdiv(n_heads, sections)))",
        "return max(heads, triton.cdiv(n_heads, sections))",
        FULL_ROUNDS,
    ),
    Fault(
        "hopper: a head at a time",
        HOPPER,
        "heads = max(heads, full)",
        "heads = 1",
        f"{_H}causal_work_is_even",
    ),
]

NORM_ROPE, NORM_ROPE_BACKWARD = (
    f"ra_triton/kernels/norm_rope{name}.py" for name in ("", "_backward")
)
NORM_ROPE_TILES, ROPE_ARGUMENTS = "ra_triton/kernels/norm_rope_tiles.py", "ra_triton/norm_rope.py"
MODULE, TABLES, LLAMA = (f"ra_triton/nn/{name}.py" for name in ("attention", "rope", "llama"))
CHECKPOINTS = "bench/huggingface.py"
_RP, _QG, _N = (f"tests/test_{name}.py::test_" for name in ("rope", "gqa", "nn_rope"))
ROPE = f"{_RP}new_operands_are_the_definition_and_the_inputs_stay"
ROPE_IN_PLACE = f"{_RP}in_place_has_the_same_bits_and_writes_nothing_else"
ROPE_GRADIENTS = f"{_RP}gradients_are_those_of_the_definition"
BEYOND = f"{_RP}tokens_beyond_the_tables_turn_to_nan_and_others_do_not"
GROUPED = f"{_QG}composed_weights_are_the_definition"
STOCK = "tests/test_llama_exchange.py::test_a_stock_layer_computes_the_same_from_folded_weights"

MODERN_FAULTS = [
    Fault(
        "rope: turned the other way",
        NORM_ROPE,
        "first * cos - second * sin",
        "first * cos + second * sin",
        ROPE,
    ),
    Fault(
        "rope: second half takes its own sine",
        NORM_ROPE,
        "second * cos + first * sin",
        "second * cos + second * sin",
        ROPE,
    ),
    Fault(
        "norm: lanes that do not turn are not counted",
        NORM_ROPE,
        "squares += tl.sum(rest * rest, 1)",
        "squares += 0.0",
        ROPE,
    ),
    Fault(
        "norm: eps after the root",
        NORM_ROPE,
        "r = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]",
        "r = (tl.rsqrt(squares * (1.0 / D)) + eps)[:, None]",
        ROPE,
    ),
    Fault(
        "norm: keys take the weight of queries",
        NORM_ROPE,
        "k_ptr, q_low_ptr, k_out_ptr, k_weight_ptr,",
        "k_ptr, q_low_ptr, k_out_ptr, q_weight_ptr,",
        ROPE,
    ),
    Fault(
        "norm: lanes between turned and low ones stay, in place",
        NORM_ROPE,
        "call.R if in_place and call.eps is None else 0",
        "call.R if in_place else 0",
        ROPE_IN_PLACE,
    ),
    Fault(
        "rope: lanes beside the turned ones stay unwritten, out of place",
        NORM_ROPE,
        "call.R if in_place and call.eps is None else 0",
        "call.R if call.eps is None else 0",
        ROPE,
    ),
    Fault(
        "rope: a start without the token's place after it",
        NORM_ROPE_TILES,
        "            at += t\n",
        "            at += 0\n",
        ROPE,
    ),
    Fault(
        "rope: one row beyond the tables is read",
        NORM_ROPE_TILES,
        "(at >= 0) & (at < T_max)",
        "(at >= 0) & (at <= T_max)",
        BEYOND,
    ),
    Fault(
        "rope: beyond the tables lanes become 0",
        NORM_ROPE_TILES,
        'cos = tl.where(rows & ~known, float("nan"), cos)',
        "cos = tl.where(rows & ~known, 0.0, cos)",
        BEYOND,
    ),
    Fault(
        "rope: low lanes from the start of the row",
        NORM_ROPE_TILES,
        "value = tl.load(low_rows + (lane - (D - R)), mask=mask & is_low, other=0.0)",
        "value = tl.load(low_rows + lane % R, mask=mask & is_low, other=0.0)",
        ROPE,
    ),
    Fault(
        "rope gradient: not turned back",
        NORM_ROPE_BACKWARD,
        "d_second = dy_second * cos - dy_first * sin",
        "d_second = dy_second * cos + dy_first * sin",
        ROPE_GRADIENTS,
    ),
    Fault(
        "norm gradient: lanes that do not turn leave the mean",
        NORM_ROPE_BACKWARD,
        "along += tl.sum(d_rest * rest, 1)",
        "along += 0.0",
        ROPE_GRADIENTS,
    ),
    Fault(
        "norm gradient: weight after the sum along the row",
        NORM_ROPE_BACKWARD,
        "d_first *= weight_lanes(weight_ptr, 0, PAIRS, HALF)",
        "d_first *= 1.0",
        ROPE_GRADIENTS,
    ),
    Fault(
        "rope gradient: lanes that were dropped have one",
        NORM_ROPE_BACKWARD,
        "tl.where(is_low, 0.0, value)",
        "value",
        ROPE_GRADIENTS,
    ),
    Fault(
        "norm gradient: weights of q and k share their sums",
        NORM_ROPE_BACKWARD,
        "tl.int64) * 2 + tl.program_id(1)) * D",
        "tl.int64) * 2) * D",
        ROPE_GRADIENTS,
    ),
    Fault(
        "rope gradient: lanes of dO taken for neighbours",
        NORM_ROPE_BACKWARD,
        "t if t.stride(-1) == 1 else t.contiguous()",
        "t",
        ROPE_GRADIENTS,
    ),
    Fault(
        "rope: an int position is forgotten",
        ROPE_ARGUMENTS,
        "return cos[position : position + T], sin[position : position + T], None, dims",
        "return cos[:T], sin[:T], None, dims",
        ROPE,
    ),
    Fault(
        "rope: the last token may lie beyond the tables",
        ROPE_ARGUMENTS,
        "position + T > cos.shape[0]",
        "position > cos.shape[0]",
        f"{_RP}a_wrong_argument_is_named",
    ),
    Fault(
        "pack_qk_: weights and tables read while they are overwritten",
        API,
        "_apart_from(t, (q, k)) for t in call[2:9])",
        "(_apart_from(t, (q, k)) if i < 2 else t) for i, t in enumerate(call[2:9]))",
        f"{_RP}sources_and_tables_may_be_views_of_what_is_overwritten",
    ),
    Fault(
        "rope operator: k has the shape of q",
        LIBRARY,
        "return q.new_empty(q.shape), k.new_empty(k.shape)",
        "return q.new_empty(q.shape), k.new_empty(q.shape)",
        f"{_RP}opcheck_of_the_operator",
    ),
    Fault(
        "sdpa: norm and rotation in half precision",
        SDPA,
        "    y = x.float()\n",
        "    y = x\n",
        ROPE,
    ),
    Fault(
        "grouped heads: the sum of the group, not its mean",
        WEIGHTS,
        "q_low.unflatten(1, (H_kv, group)).mean(2)",
        "q_low.unflatten(1, (H_kv, group)).sum(2)",
        GROUPED,
    ),
    Fault(
        "grouped heads: key heads in turn",
        WEIGHTS,
        "k.repeat_interleave(group, dim=1)",
        "k.repeat(1, group, 1)",
        GROUPED,
    ),
    Fault(
        "grouped heads: reciprocal scores start smaller",
        COMPOSED_LINEAR,
        "self.w_rec.fill_((self.n_head // self.n_kv_head) ** 0.5)",
        "self.w_rec.fill_(1.0)",
        f"{_QG}reciprocal_scores_start_as_large_as_those_of_plain_attention",
    ),
    Fault(
        "tables: born in inference mode",
        TABLES,
        "with torch.inference_mode(False), torch.no_grad():",
        "with torch.no_grad():",
        f"{_N}tables_made_in_inference_mode_serve_a_graph_later",
    ),
    Fault(
        "tables: all tokens at the position of the first",
        TABLES,
        "position = position[:, None] + torch.arange(T, device=q.device)",
        "position = position[:, None].expand(B, T)",
        f"{_N}positions_continue_a_sequence",
    ),
    Fault(
        "fold: a rotation of some lanes passes for a Llama's",
        LLAMA,
        "if turned != D and not partial_rotary:",
        "if turned > D and not partial_rotary:",
        "tests/test_llama_exchange.py::test_what_no_llama_computes_raises_with_the_reason",
    ),
    Fault(
        "fold: norms are left behind",
        LLAMA,
        "*((name, name) for name in NORMS)",
        "",
        STOCK,
    ),
    Fault(
        "checkpoint: an untied head is dropped",
        CHECKPOINTS,
        "if not torch.equal(head, state[EMBEDDING]):",
        "if head.shape != state[EMBEDDING].shape:",
        "tests/test_huggingface.py::test_an_untied_head_is_named",
    ),
    Fault(
        "checkpoint: another activation passes",
        CHECKPOINTS,
        '"activation_function": ("gelu_new", "gelu_pytorch_tanh"),',
        '"activation_function": ("gelu_new", "relu"),',
        "tests/test_huggingface.py::test_another_model_is_named",
    ),
]

FLEX, SPARSITY = "ra_triton/backend/flex.py", "ra_triton/sparsity.py"
_F, _Z = (f"tests/test_{name}.py::test_" for name in ("flex", "sparsity"))
BLOCKS = f"{_F}blocks_hold_what_the_mask_allows"
FLEX_WINDOWS = f"{_F}windows_include_both_ends"
FLEX_CAPS = f"{_F}softcap_is_the_references"
FLEX_BLIND = f"{_F}rows_without_keys_in_a_window_give_zero_and_minus_infinity"
CONFIGURATIONS = f"{_F}each_configuration_has_compiled_code_of_its_own"
FLEX_DEVICES = f"{_F}devices_and_head_dims_are_checked_first"
PRUNED = f"{_Z}exactly_two_of_four_stay_by_magnitude_and_the_first_of_equal_ones"
SPARSE_RESULTS = f"{_Z}results_are_those_of_the_pruned_dense_weight"
SPARSE_CALLS = f"{_Z}wrong_calls_are_refused"
SPARSE_LIMITS = f"{_Z}what_the_kernels_do_not_take_is_refused_with_the_reason"
SPARSE_KERNELS = f"{_Z}kernels_are_chosen_by_device_and_library"

FLEX_FAULTS = [
    Fault(
        "flex: queries and keys aligned at the top",
        FLEX,
        "offset = index(T_k - T_q)",
        "offset = index(0)",
        FLEX_WINDOWS,
    ),
    Fault(
        "flex: a window without its left end", FLEX, "offset - left,", "offset - left + 1,", BLOCKS
    ),
    Fault(
        "flex: blocks that are cut off count as whole",
        FLEX,
        "whole = (q_last < T_q)[:, None] & (k_last < T_k)",
        "whole = some.clone()",
        BLOCKS,
    ),
    Fault(
        "flex: a block at the diagonal left out",
        FLEX,
        "some & (least <= highest)",
        "some & (least < highest)",
        BLOCKS,
    ),
    Fault(
        "flex: whole blocks masked too little",
        FLEX,
        "(most <= highest)",
        "(least <= highest)",
        BLOCKS,
    ),
    Fault("flex: cap without its scale", FLEX, "cap * torch.tanh", "torch.tanh", FLEX_CAPS),
    Fault(
        "flex: logsumexp of scores that are not capped",
        SDPA,
        "    if options.softcap:\n        scores",
        "    if False:\n        scores",
        FLEX_CAPS,
    ),
    Fault(
        "flex: one row too many without keys",
        FLEX,
        "max(0, T_q - T_k - right)",
        "max(0, T_q - T_k - right + 1)",
        FLEX_BLIND,
    ),
    Fault(
        "flex: rows without keys have a logsumexp of 0",
        FLEX,
        "F.pad(lse, (blind, 0), value=-math.inf)",
        "F.pad(lse, (blind, 0))",
        FLEX_BLIND,
    ),
    Fault(
        "flex: masks made in inference mode are kept",
        FLEX,
        "torch.inference_mode(False)",
        "torch.no_grad()",
        f"{_F}what_is_kept_serves_inference_and_training",
    ),
    Fault(
        "flex: configurations share their count of compilations",
        FLEX,
        "    attend.__code__ = attend.__code__.replace()\n",
        "",
        CONFIGURATIONS,
    ),
    Fault(
        "flex: scales share one compiled code",
        FLEX,
        "            options.softmax_scale,\n            (left",
        "            None,\n            (left",
        CONFIGURATIONS,
    ),
    Fault(
        "flex: numbers of a mask in its code",
        FLEX,
        "    return torch.full((), value, dtype=dtype, device=device)",
        "    return value",
        f"{_F}one_compilation_serves_all_lengths_caps_and_windows "
        f"{_F}what_is_kept_serves_inference_and_training",
    ),
    Fault(
        "flex: rows that see keys keep the gaps of those that see none",
        FLEX,
        "q_pack[:, blind:].contiguous()",
        "q_pack[:, blind:]",
        f"{_F}one_compilation_serves_all_lengths_caps_and_windows",
    ),
    Fault(
        "flex: training on a CPU is not refused",
        FLEX,
        "if needs_grad(*tensors) else None",
        "if False else None",
        f"{_F}training_on_a_cpu_is_refused_with_a_backend_that_has_it",
    ),
    Fault(
        "flex: head dims of any size on a GPU",
        FLEX,
        "head_dim < MIN_HEAD_DIM",
        "False",
        FLEX_DEVICES,
    ),
    Fault(
        "flex: leaves keep asking for a gradient",
        FLEX,
        "if not torch.is_grad_enabled():",
        "if False:",
        f"{_F}leaves_that_ask_for_a_gradient_run_without_one",
    ),
]

SPARSITY_FAULTS = [
    Fault("sparse: the smaller two stay", SPARSITY, "descending=True", "descending=False", PRUNED),
    Fault("sparse: signs count", SPARSITY, "groups.abs().argsort", "groups.argsort", PRUNED),
    Fault(
        "sparse: any of equal ones stay",
        SPARSITY,
        "groups.abs().argsort(",
        "groups.flip(-1).abs().argsort(",
        PRUNED,
    ),
    Fault(
        "sparse: three of four stay", SPARSITY, "GROUP, KEPT = 4, 2", "GROUP, KEPT = 4, 3", PRUNED
    ),
    Fault(
        "sparse: pruned along the columns",
        SPARSITY,
        "data = prune(rows.contiguous())",
        "data = prune(rows.mT.contiguous()).mT.contiguous()",
        PRUNED,
    ),
    Fault(
        "sparse: the other lanes of the heads are pruned",
        SPARSITY,
        "W_packed, others = layout.take_low(W_packed)",
        "others, W_packed = layout.take_low(W_packed)",
        PRUNED,
    ),
    Fault(
        "sparse: columns where they were not",
        LAYOUT,
        "((std, self.d_std), (low, self.R))",
        "((low, self.R), (std, self.d_std))",
        PRUNED,
    ),
    Fault(
        "sparse: a bias in split order as it comes",
        SPARSITY,
        'if bias is not None and weight_layout == "split":',
        "if False:",
        SPARSE_RESULTS,
    ),
    Fault(
        "sparse: no bias beside two products",
        SPARSITY,
        "return y if bias is None else y + bias",
        "return y",
        SPARSE_RESULTS,
    ),
    Fault(
        "sparse: gradients vanish in silence",
        SPARSITY,
        "if needs_grad(t):",
        "if False:",
        SPARSE_CALLS,
    ),
    Fault("sparse: another R is taken", SPARSITY, "or value != expected", "or False", SPARSE_CALLS),
    Fault(
        "sparse: channels that do not fit",
        SPARSITY,
        "if channels % channel_step:",
        "if False:",
        SPARSE_LIMITS,
    ),
    Fault(
        "sparse: columns that do not fit", SPARSITY, "if rows % row_step or", "if", SPARSE_LIMITS
    ),
    Fault(
        "sparse: CUTLASS's kernels on Hopper",
        SPARSITY,
        "    if capability >= (9, 0):\n        raise",
        "    if False:\n        raise",
        SPARSE_KERNELS,
    ),
    Fault(
        "sparse: a weight that is not finite",
        SPARSITY,
        "if not W_fused.isfinite().all():",
        "if False:",
        f"{_Z}weights_that_cannot_be_pruned_are_refused",
    ),
]

DECODE, APPEND = "ra_triton/kernels/decode.py", "ra_triton/kernels/append.py"
CACHE, ATTENTION_MODULE = "ra_triton/cache.py", "ra_triton/nn/attention.py"
GPT, SAMPLING = "bench/gpt.py", "bench/sampling.py"
_DE, _CA, _GE = (f"tests/test_{name}.py::test_" for name in ("decode", "kv_cache", "generate"))
SPLIT_ENDS = f"{_DE}lengths_and_windows_around_the_ends_of_splits"
CACHE_LISTS = f"{_CA}it_does_what_a_list_for_each_sequence_does"
REPLAYED = f"{_CA}what_a_replayed_graph_appends_beyond_the_end_stays_inside"

DECODE_FAULTS = [
    Fault(
        "decode: lengths beyond the cache",
        DECODE,
        "return tl.minimum(tl.load(lengths_ptr + b), max_len)",
        "return tl.load(lengths_ptr + b)",
        f"{_DE}lengths_outside_of_the_cache_read_nothing_outside",
        hangs=True,
    ),
    Fault(
        "decode: a query sees a key more",
        DECODE,
        "last = length - T_q + t  #",
        "last = length - T_q + t + 1  #",
        f"{_DE}lengths_and_windows_around_the_ends_of_splits",
    ),
    Fault(
        "decode: the window is a key short",
        DECODE,
        "first = tl.where(left < 0, 0, last - left)",
        "first = tl.where(left < 0, 0, last - left + 1)",
        SPLIT_ENDS,
    ),
    Fault(
        "decode: the window's first tile skipped",
        DECODE,
        "_first_key(length, T_q, left) // BLOCK_N * BLOCK_N)",
        "tl.cdiv(_first_key(length, T_q, left), BLOCK_N) * BLOCK_N)",
        SPLIT_ENDS,
    ),
    Fault(
        "decode: values beyond the length loaded",
        DECODE,
        "v_ptr, b, h_kv, n, stride_vt, length,",
        "v_ptr, b, h_kv, n, stride_vt, max_len,",
        f"{_DE}head_dims_and_dtypes",
    ),
    Fault(
        "decode: heads of a group by T_q",
        DECODE,
        "(h_kv * group + r % group).to(tl.int64)",
        "(h_kv * group + r // T_q).to(tl.int64)",
        f"{_DE}head_dims_and_dtypes",
    ),
    Fault(
        "decode: no softcap",
        DECODE,
        "s = capped(s, cap_scale)",
        "s = s",
        f"{_DE}softcaps",
    ),
    Fault(
        "decode: the softcap is lost on its way",
        DECODE,
        "        float(softcap),\n        dot_precision",
        "        0.0,\n        dot_precision",
        f"{_DE}softcaps",
    ),
    Fault(
        "decode: splits share a key",
        DECODE,
        "end = tl.minimum((split + 1) * SPLIT, length)",
        "end = tl.minimum((split + 1) * SPLIT + 1, length)",
        SPLIT_ENDS,
    ),
    Fault(
        "decode: splits depend on the bound",
        DECODE,
        "split = keys_per_split(max_len, config.block_k)",
        "split = keys_per_split(longest, config.block_k)",
        f"{_DE}the_capacity_alone_decides_which_keys_make_a_split",
    ),
    Fault(
        "decode: no grid for the last splits",
        DECODE,
        "n_splits = triton.cdiv(longest, split)",
        "n_splits = longest // split",
        f"{_DE}head_dims_and_dtypes",
    ),
    Fault(
        "combine: weights without the scale",
        DECODE,
        "w = tl.exp2((m - m_all) * scale_log2)",
        "w = tl.exp2(m - m_all)",
        f"{_DE}head_dims_and_dtypes {_DE}logits_of_every_size",
    ),
    Fault(
        "combine: sums of splits not weighted",
        DECODE,
        "l_all += tl.sum(w * l_s, 0)",
        "l_all += tl.sum(l_s, 0)",
        f"{_DE}head_dims_and_dtypes",
    ),
    Fault(
        "combine: splits before the window read",
        DECODE,
        "begin = _first_key(length, T_q, left) // SPLIT  #",
        "begin = 0  #",
        SPLIT_ENDS,
    ),
    Fault(
        "combine: splits beyond the length read",
        DECODE,
        "end = tl.cdiv(length, SPLIT)",
        "end = n_splits",
        SPLIT_ENDS,
    ),
    Fault(
        "combine: a row without keys divides by 0",
        DECODE,
        "o = o / tl.where(l_all == 0.0, 1.0, l_all)",
        "o = o / l_all",
        f"{_DE}queries_without_keys_give_zero",
    ),
    Fault(
        "append: beyond the end into the next sequence",
        APPEND,
        " & (place < max_len)",
        "",
        REPLAYED,
    ),
    Fault(
        "append: lengths beyond the cache",
        APPEND,
        "tl.minimum(length + T, max_len)",
        "length + T",
        REPLAYED,
    ),
    Fault(
        "append: keys as values",
        APPEND,
        "tl.store(v_cache_ptr + offset, v, mask=mask)",
        "tl.store(v_cache_ptr + offset, k, mask=mask)",
        CACHE_LISTS,
    ),
    Fault(
        "sdpa decode: values beyond the length not cleared",
        SDPA,
        "v.masked_fill(unused, 0.0))",
        "v)",
        f"{_DE}sdpa_with_lengths_that_only_the_device_knows",
    ),
    Fault(
        "cache: crop forgets the device",
        CACHE,
        "self.lengths.clamp_(max=lengths[0])",
        "pass",
        f"{_CA}a_crop_keeps_the_first_tokens",
    ),
    Fault(
        "cache: a reordering forgets the values",
        CACHE,
        "for t in (self.k_pack, self.v):",
        "for t in (self.k_pack,):",
        f"{_CA}a_reordering_may_repeat_sequences_and_takes_any_ints",
    ),
    Fault(
        "cache: room for one token too many",
        CACHE,
        "if fullest + tokens > self.max_len:",
        "if fullest + tokens > self.max_len + 1:",
        f"{_CA}after_a_capture_lengths_are_read_from_the_device",
    ),
    Fault(
        "cache: the host's lengths trusted after a capture",
        CACHE,
        "if self._captured or self._known is None:",
        "if self._known is None:",
        f"{_CA}after_a_capture_lengths_are_read_from_the_device",
    ),
    Fault(
        "module: what cannot decode is told after the projection",
        ATTENTION_MODULE,
        "        choose(self.backend, (x,), DecodeOptions",
        "        _ = (self.backend, (x,), DecodeOptions",
        f"{_CA}the_module_tells_before_anything_runs",
    ),
    Fault(
        "module: a cache's tokens are rotated from 0",
        ATTENTION_MODULE,
        "self.operands(x, cache.lengths if before is None else before)",
        "self.operands(x, 0)",
        f"{_CA}grouped_rotated_and_normed_heads_go_through_the_cache[options1-sdpa-sizes0]",
    ),
    Fault(
        "module: a second chunk sees itself alone",
        ATTENTION_MODULE,
        "        if before:\n",
        "        if False:\n",
        f"{_CA}a_second_long_chunk_sees_the_first",
    ),
    Fault(
        "GPT: every token at the position of the first",
        GPT,
        "positions = caches[0].lengths[:, None] + positions",
        "positions = caches[0].lengths[:, None] + 0 * positions",
        f"{_GE}logits_with_caches_are_those_without",
    ),
    Fault(
        "generate: top_k keeps one fewer",
        SAMPLING,
        "logits < least",
        "logits <= least",
        f"{_GE}temperature_and_top_k",
    ),
]

CHILDREN, CONFIGS_OF, QUANTIZED = (
    f"ra_triton/nn/{name}.py" for name in ("children", "configs", "quantized")
)
GPT2_EXCHANGE = "ra_triton/nn/gpt2.py"
_CH, _FU, _KE, _DI, _CO = (
    f"tests/test_nn_{name}.py::test_"
    for name in ("children", "fuse", "keeping", "distributed", "configs")
)
CHILD_CHANGES = f"{_CH}attention_reads_what_the_changed_child_returns"
CHILD_HOOKS = f"{_CH}hooks_run_and_change_no_more_than_the_last_bits"
NORMS = f"{_CH}any_norm_is_called_on_packed_heads_before_rotation"
TRACED = f"{_KE}nothing_of_a_tracer_is_kept"
LOST = f"{_FU}what_would_lose_the_factors_or_be_lost_itself_raises"
ONE_COMPILATION = f"{_CA}a_compiled_decoding_step_is_compiled_once_for_all_tokens"
MIXED = f"{_CA}compiled_and_eager_steps_share_a_cache"

CHILD_FAULTS = [
    Fault(
        "children: subclasses are read",
        CHILDREN,
        "type(child) in kinds",
        "isinstance(child, tuple(kinds))",
        f"{CHILD_CHANGES}[subclass-free-sdpa]",
    ),
    Fault(
        "children: hooks before the forward are ignored",
        CHILDREN,
        "        and not child._forward_pre_hooks  # type: ignore[union-attr]\n",
        "",
        f"{CHILD_CHANGES}[changing_pre_hook-free-sdpa]",
    ),
    Fault(
        "children: hooks after the forward are ignored",
        CHILDREN,
        "        and not child._forward_hooks  # type: ignore[union-attr]\n",
        "",
        f"{CHILD_CHANGES}[changing_hook-composed-sdpa]",
    ),
    Fault(
        "children: another forward is ignored",
        CHILDREN,
        '        and "forward" not in child.__dict__\n',
        "",
        f"{CHILD_CHANGES}[patched_forward-free-sdpa]",
    ),
    Fault(
        "children: hooks of gradients are ignored",
        CHILDREN,
        "        child._backward_hooks  # type: ignore[union-attr]\n        or ",
        "        ",
        CHILD_HOOKS,
    ),
    Fault(
        "children: hooks before a backward are ignored",
        CHILDREN,
        "        or child._backward_pre_hooks  # type: ignore[union-attr]\n",
        "",
        CHILD_HOOKS,
    ),
    Fault(
        "children: a compiled call is ignored",
        CHILDREN,
        "        or child._compiled_call_impl is not None  # type: ignore[union-attr]\n",
        "",
        f"{_CH}a_compiled_child_is_called",
    ),
    Fault(
        "children: hooks of all modules are ignored",
        CHILDREN,
        "        or internals.hooks_of_all_modules()\n",
        "",
        f"{_CH}hooks_of_all_modules_see_the_children",
    ),
    Fault(
        "children: bytes of a coded weight are read",
        CHILDREN,
        'weight is not None and not hasattr(type(weight), "__tensor_flatten__")',
        "weight is not None",
        f"{_CH}a_weight_of_another_tensor_type_is_left_to_its_own_product",
    ),
    Fault(
        "children: nothing is read any more",
        CHILDREN,
        "return is_readable(child, kinds) and not (",
        "return False and not (",
        f"{_CH}a_plain_child_is_read",
    ),
    Fault(
        "children: norms of two eps are one",
        ATTENTION_MODULE,
        "q_norm.eps == k_norm.eps",
        "k_norm.eps is not None",
        NORMS,
    ),
    Fault(
        "children: what a projection's hook has kept is rotated",
        ATTENTION_MODULE,
        "own = weights is not None  #",
        "own = True  #",
        f"{_CH}what_a_hook_has_kept_is_not_overwritten",
    ),
    Fault(
        "children: another dtype of a projection passes",
        ATTENTION_MODULE,
        "        if y.dtype != dtype:\n",
        "        if False:\n",
        f"{_CH}what_a_child_returns_is_checked",
    ),
    Fault(
        "module: a wrong width is the weight's",
        ATTENTION_MODULE,
        "or x.shape[-1] != self.n_embd:",
        "or False:",
        "tests/test_nn.py::test_bad_inputs_raise",
    ),
    Fault(
        "fuse_: the layer still trains",
        ATTENTION_MODULE,
        'self._refuse_fused("train()")',
        "pass",
        LOST,
    ),
    Fault(
        "fuse_: twice",
        ATTENTION_MODULE,
        'self._refuse_fused("fuse_()")',
        "pass",
        LOST,
    ),
    Fault(
        "fuse_: other weights are loaded over it",
        ATTENTION_MODULE,
        'self._refuse_fused("load_state_dict()")',
        "pass",
        LOST,
    ),
    Fault(
        "fuse_: factors stay where they were",
        ATTENTION_MODULE,
        "            factors._apply(fn, *args, **kwargs)\n",
        "            pass\n",
        f"{_FU}the_factors_follow_moves_casts_and_copies",
    ),
    Fault(
        "fuse_: the weight is born in inference mode",
        ATTENTION_MODULE,
        "        with torch.inference_mode(False):\n            W_fused, bias",
        "        with torch.no_grad():\n            W_fused, bias",
        f"{_FU}fused_in_inference_mode_it_serves_a_graph_later",
    ),
    Fault(
        "rank 0: states with an empty W_recip are refused",
        COMPOSED_LINEAR,
        "            del state_dict[name]\n",
        "            pass\n",
        "tests/test_nn.py::test_rank_0_has_no_parameter_without_elements_and_takes_older_states",
    ),
    Fault(
        "rank 0: a parameter without elements",
        COMPOSED_LINEAR,
        "parameter(*recip) if R else None",
        "parameter(*recip)",
        "tests/test_nn.py::test_rank_0_has_no_parameter_without_elements_and_takes_older_states",
    ),
    Fault(
        "int8 module: columns for other activations",
        QUANTIZED,
        "if saved != self.activations:",
        "if False:",
        f"{_Q}int8_columns_for_other_activations_are_refused",
    ),
    Fault(
        "kept: tensors of a mode or a transform",
        CHECKS,
        "        or internals.modes_active()\n",
        "",
        TRACED,
    ),
    Fault(
        "kept: tensors of a captured graph",
        CHECKS,
        'device.type == "cuda" and torch.cuda.is_current_stream_capturing()',
        "False",
        f"{_KE}ordinary_calls_may_keep",
    ),
    Fault(
        "kept: masks and caps of FlexAttention, always",
        FLEX,
        "return make if may_keep(device) else make.__wrapped__",
        "return make",
        TRACED,
    ),
    Fault(
        "share: in the default dtype",
        ATTENTION_MODULE,
        "torch.zeros(2, self.n_head, dtype=torch.float32, device=x.device)",
        "torch.zeros(2, self.n_head, device=x.device)",
        f"{_KE}the_default_dtype_changes_nothing_of_a_layer_that_there_is",
    ),
    Fault(
        "cache: a compiler looks at lengths",
        CACHE,
        "return None if tokens <= FEW_TOKENS else self._known",
        "return self._known",
        ONE_COMPILATION,
    ),
    Fault(
        "cache: the host believes what it knew before a compiled step",
        CACHE,
        "if lengths is not None or torch.compiler.is_compiling():",
        "if lengths is not None:",
        MIXED,
    ),
    Fault(
        "cache: two layers in one",
        CACHE,
        "elif owner is not layer:",
        "elif False:",
        f"{_CA}a_cache_in_two_layers_raises_and_after_a_reset_it_may_change_hands",
    ),
    Fault(
        "cache: it stays its layer's after a reset",
        CACHE,
        "self._known, self._layer = [0] * self.batch, None",
        "self._known = [0] * self.batch",
        f"{_CA}a_cache_in_two_layers_raises_and_after_a_reset_it_may_change_hands",
    ),
    Fault(
        "exchange: names of a compiled model",
        GPT2_EXCHANGE,
        'WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")',
        'WRAPPED = ("_checkpoint_wrapped_module",)',
        f"{_DI}a_wrapped_model_has_the_names_of_its_own",
    ),
    Fault(
        "exchange: every child called module is a wrapper's",
        GPT2_EXCHANGE,
        '(part == "module" and isinstance(owner, REPLICATING))',
        '(part == "module")',
        f"{_DI}a_child_that_is_called_module_keeps_its_name",
    ),
    Fault(
        "from_config: scaled rotation passes for plain",
        CONFIGS_OF,
        'if scaled != "default":',
        "if False:",
        f"{_CO}what_a_config_lacks_or_a_layer_is_not_has_its_name_in_the_error",
    ),
    Fault(
        "from_config: a window passes",
        CONFIGS_OF,
        'if getattr(config, "sliding_window", None) and',
        "if False and",
        f"{_CO}what_a_config_lacks_or_a_layer_is_not_has_its_name_in_the_error",
    ),
    Fault(
        "rope: tables of neighbouring lanes pass",
        ROPE_ARGUMENTS,
        "    if cos.shape[1] == dims:\n",
        "    if False:\n",
        f"{_RP}tables_of_neighbouring_lanes_are_named_on_a_cpu",
    ),
]

_WS = "tests/test_window_and_softcap.py::test_"
WINDOW_EDGES = f"{_WS}windows_around_tile_boundaries"
SKIPPED = f"{_WS}tiles_outside_the_window_are_not_visited"
CAPS = f"{_WS}scores_far_below_and_far_above_the_cap"
WINDOW_BULK_COPIES = f"{_WS}windows_through_bulk_copies"
_V = "tests/test_varlen.py::test_"
VARLEN = f"{_V}lengths"
NEIGHBOURS = f"{_V}nothing_passes_from_one_sequence_to_the_next"
BAD_OFFSETS = f"{_V}bad_offsets_are_named_before_any_launch"

WINDOW_FAULTS = [
    Fault(
        "window: one key too many on the left",
        TILES,
        "first_key = offs_m + (T_k - T_q) - left",
        "first_key = offs_m + (T_k - T_q) - left - 1",
        WINDOW_EDGES,
    ),
    Fault(
        "window: the tile that the left edge cuts goes unmasked",
        TILES,
        "whole = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N",
        "whole = tl.maximum(last - left, 0) // BLOCK_N * BLOCK_N",
        WINDOW_EDGES,
    ),
    Fault(
        "window: first key tile skipped",
        TILES,
        "begin = tl.maximum(m + (T_k - T_q) - left, 0) // BLOCK_N * BLOCK_N",
        "begin = tl.cdiv(tl.maximum(m + (T_k - T_q) - left, 0), BLOCK_N) * BLOCK_N",
        WINDOW_EDGES,
    ),
    Fault(
        "window: keys on the left masked, not skipped",
        TILES,
        "begin = tl.maximum(m + (T_k - T_q) - left, 0) // BLOCK_N * BLOCK_N",
        "begin = 0",
        SKIPPED,
    ),
    Fault(
        "window: keys on the right masked, not skipped",
        TILES,
        "end = tl.minimum(tl.maximum(last + 1 + right, 0), T_k)",
        "end = T_k",
        SKIPPED,
    ),
    Fault(
        "window: queries on the right masked, not skipped",
        TILES,
        "end = tl.minimum(tl.maximum(last + left + 1, 0), T_q)",
        "end = T_q",
        SKIPPED,
    ),
    Fault(
        "window: one query too many",
        TILES,
        "query_limit = first_query + left + 1",
        "query_limit = first_query + left + 2",
        WINDOW_EDGES,
    ),
    Fault(
        "window: the tile that the last query cuts goes unmasked",
        TILES,
        "unmasked = tl.maximum(n - (T_k - T_q) + left + 1, 0) // BLOCK_M * BLOCK_M",
        "unmasked = tl.cdiv(tl.maximum(n - (T_k - T_q) + left + 1, 0), BLOCK_M) * BLOCK_M",
        WINDOW_EDGES,
    ),
    Fault(
        "window: causal forgotten beside it",
        TILES,
        "right = 0 if causal else right",
        "right = 0 if causal and left < 0 else right",
        f"{_WS}a_new_window_never_recompiles",
    ),
    Fault(
        "window: full key tiles in two loops",
        FORWARD,
        "begin, tl.minimum(whole, end), whole, unmasked",
        "begin, end, whole, unmasked",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dq: full key tiles in two loops",
        BACKWARD,
        "begin, tl.minimum(whole, end), whole, unmasked",
        "begin, end, whole, unmasked",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: query tiles that the last query cuts in two loops",
        BACKWARD,
        "last = tl.minimum(unmasked, end)",
        "last = end",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: query tiles that the last query cuts in none",
        BACKWARD,
        "head, h, n, unmasked, end,\n",
        "head, h, n, end, end,\n",
        WINDOW_EDGES,
    ),
    Fault(
        "window: cut tiles of the forward's one loop on the left go unmasked",
        FORWARD,
        "n >= unmasked or (WINDOW and n < whole)",
        "n >= unmasked",
        WINDOW_BULK_COPIES,
    ),
    Fault(
        "window: cut tiles of the one loop over queries go unmasked",
        BACKWARD,
        "m < whole or (WINDOW and m >= unmasked)",
        "m < whole",
        WINDOW_BULK_COPIES,
    ),
    Fault(
        "window: cut tiles of dq's one loop on the left go unmasked",
        BACKWARD,
        "n >= unmasked or (WINDOW and n < whole)",
        "n >= unmasked",
        WINDOW_BULK_COPIES,
    ),
    Fault(
        "window: key tiles of a window that fills none in two loops",
        TILES,
        "T_k) // BLOCK_N * BLOCK_N\n        unmasked = tl.maximum(unmasked, whole)\n",
        "T_k) // BLOCK_N * BLOCK_N\n",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: query tiles of a window that fills none in two loops",
        TILES,
        "left + 1, 0) // BLOCK_M * BLOCK_M\n        unmasked = tl.maximum(unmasked, whole)\n",
        "left + 1, 0) // BLOCK_M * BLOCK_M\n",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: the first query that sees a key left out",
        TILES,
        "first_query -= right\n",
        "first_query -= right - 1\n",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: first query tile skipped",
        TILES,
        "begin = tl.maximum(n - (T_k - T_q) - right, 0) // BLOCK_M * BLOCK_M",
        "begin = tl.cdiv(tl.maximum(n - (T_k - T_q) - right, 0), BLOCK_M) * BLOCK_M",
        WINDOW_EDGES,
    ),
    Fault(
        "window, dk, dv: queries on the left masked, not skipped",
        TILES,
        "begin = tl.maximum(n - (T_k - T_q) - right, 0) // BLOCK_M * BLOCK_M",
        "begin = 0",
        SKIPPED,
    ),
    Fault(
        "window, dk, dv: the tile that the first query cuts goes unmasked",
        TILES,
        "whole = tl.cdiv(tl.maximum(last - right, 0), BLOCK_M) * BLOCK_M",
        "whole = tl.maximum(last - right, 0) // BLOCK_M * BLOCK_M",
        WINDOW_EDGES,
    ),
    Fault(
        "softcap: slope missing in dk",
        BACKWARD,
        "dsT *= 1 - sT * sT",
        "dsT *= 1",
        CAPS,
    ),
    Fault("softcap: slope missing in dq", BACKWARD, "ds *= 1 - s * s", "ds *= 1", CAPS),
    Fault(
        "softcap: gradients without the scale under the cap",
        BACKWARD,
        f"dk{SCALES_OF_GRADIENTS}",
        "dk *= scale_log2 * LN2",
        CAPS,
    ),
    Fault(
        "softcap: cancels near 0",
        TILES,
        "tl.where(x2 < 0.5625 * 0.5625, near,",
        "tl.where(x2 < 0.0, near,",
        CAPS,
    ),
    Fault(
        "softcap: third coefficient off in its fourth digit",
        TILES,
        "near = near * x2 + 0.1331908",
        "near = near * x2 + 0.1332908",
        f"{_WS}every_score_is_capped_to_its_last_places",
    ),
    Fault(
        "softcap: no sign far from 0",
        TILES,
        "tl.where(x < 0, -far, far)",
        "far",
        CAPS,
    ),
    Fault(
        "operators: window not among the numbers",
        LIBRARY,
        "return (*scores, *options.window_size, options.softcap)",
        "return (*scores, -1, -1, options.softcap)",
        f"{_WS}torch_func_grad_with_a_window_and_a_softcap",
    ),
]

VARLEN_FAULTS = [
    Fault(
        "varlen: keys where the queries begin",
        FORWARD,
        "k_source += tl.cast(first_k, tl.int64) * stride_kt * ALIGNMENT",
        "k_source += tl.cast(first_q, tl.int64) * stride_kt * ALIGNMENT",
        VARLEN,
    ),
    Fault(
        "varlen: lse of the first sequence for all",
        FORWARD,
        "lse_row = tl.cast(h, tl.int64) * total_q + first_q",
        "lse_row = tl.cast(h, tl.int64) * total_q",
        VARLEN,
    ),
    Fault(
        "varlen: dq where the keys begin",
        BACKWARD,
        "dq_ptr += tl.cast(first_q, tl.int64) * stride_dqt",
        "dq_ptr += tl.cast(first_k, tl.int64) * stride_dqt",
        VARLEN,
    ),
    Fault(
        "varlen: dv of the first sequence for all",
        BACKWARD,
        "dv_ptr += tl.cast(first_k, tl.int64) * stride_dvt",
        "dv_ptr += 0",
        VARLEN,
    ),
    Fault(
        "varlen: a sequence goes on into the next",
        TILES,
        "    return begin, end - begin",
        "    return begin, tl.minimum(end + 1, total) - begin",
        NEIGHBOURS,
    ),
    Fault(
        "varlen: offsets not kept inside the tokens",
        TILES,
        "begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + b), 0), total)",
        "begin = tl.load(offsets_ptr + b)",
        f"{_V}unchecked_offsets_lead_to_no_address_outside",
    ),
    Fault(
        "varlen: sequences drop the same scores",
        FORWARD,
        "seed = tl.load(seed_ptr) if DROPOUT else 0",
        "seed = tl.load(seed_ptr) if DROPOUT else 0\n    head = h if VARLEN else head",
        f"{_V}each_sequence_and_head_drops_its_own_scores_and_the_backward_drops_them_too",
    ),
    Fault(
        "varlen: batch stride of the tokens used",
        TILES,
        "strides=(0, *t.strides[1:])",
        "strides=t.strides",
        VARLEN,
    ),
    Fault("offsets: may decrease", OFFSETS, "if length < 0:", "if False:", BAD_OFFSETS),
    Fault("offsets: may end early", OFFSETS, "if offsets[-1] != total:", "if False:", BAD_OFFSETS),
    Fault(
        "offsets: the longest is not compared",
        OFFSETS,
        "if most < found:",
        "if False:",
        f"{_V}a_bad_longest_length_is_named",
    ),
    Fault(
        "offsets: looked at whether asked for or not",
        OFFSETS,
        "if check and not torch.compiler.is_compiling():",
        "if not torch.compiler.is_compiling():",
        f"{_V}values_are_looked_at_only_when_asked_for",
    ),
    Fault(
        "sdpa: a sequence sees the keys at its queries' places",
        SDPA,
        "k_pack[:, keys], v[:, keys], options)",
        "k_pack[:, queries], v[:, queries], options)",
        VARLEN,
    ),
]

NEWCOMER_FAULTS = [
    Fault(
        "README: the packed weight takes the split one's name",
        "README.md",
        "W_packed = ra_triton.compose_weights(",
        "W_fused = W_packed = ra_triton.compose_weights(",
        "tests/test_readme.py",
    ),
    Fault(
        "nn: not an attribute of the package",
        "ra_triton/__init__.py",
        'if name == "nn":',
        'if name == "NN":',
        "tests/test_imports.py::test_nn_is_an_attribute_that_is_imported_when_it_is_used",
    ),
    Fault(
        "overloads: a keyword that they lack",
        "ra_triton/options.py",
        "    dropout_p: float\n    backend: str\n",
        "    backend: str\n",
        "tests/test_types.py",
    ),
    Fault(
        "scripts: the root is not on the path",
        "bench/bench.py",
        "sys.path[0] = str(Path(__file__).parents[1])",
        "sys.path[0] = str(Path(__file__).parents[0])",
        "tests/test_scripts.py",
    ),
    Fault(
        "a provider that cannot run here is not refused",
        "bench/options.py",
        "        if reason is not None:\n            parser.error(f",
        "        if reason is None:\n            parser.error(f",
        "tests/test_bench.py::test_bad_options_say_what_is_available "
        "tests/test_host.py::test_a_provider_without_a_gpu_is_an_error_at_once",
    ),
    Fault(
        "--plot: any suffix goes",
        "bench/options.py",
        "if path.suffix[1:].lower() not in formats:",
        "if not formats:",
        "tests/test_bench.py::test_bad_options_say_what_is_available",
    ),
    Fault(
        "train_tiny: a backend that cannot train is met after another has trained",
        "bench/train_tiny.py",
        "            small.loss(torch.zeros(1, 2, dtype=torch.int64))\n",
        "",
        "tests/test_train.py::test_a_backend_that_cannot_train_here_says_so_before_another_trains",
    ),
    Fault(
        "huggingface: writes over its source",
        "bench/huggingface.py",
        "args.target.resolve() == args.source.resolve()",
        "False",
        "tests/test_huggingface.py",
    ),
    Fault(
        "huggingface: dtypes of the source are lost",
        "bench/huggingface.py",
        "dtypes.get(name, t.dtype)",
        "t.dtype",
        "tests/test_huggingface.py",
    ),
]

_G, _T = "tests/test_gluon.py::test_", "tests/test_tracing.py::test_"
VERSION_FAULTS = [
    Fault(
        "launcher: a new thread encodes without a context",
        LAUNCHER,
        "torch.cuda.set_device(torch.cuda.current_device())",
        "pass",
        f"{_L}a_new_thread_encodes_descriptors_too",
    ),
    Fault(
        "plans: the first call of a new thread encodes without a context",
        PLANS,
        "            make_context_current()\n",
        "            pass\n",
        "tests/test_plans.py::test_later_calls_pass_their_own_tensors_and_the_rest_in_the_kernels_order",
    ),
    Fault(
        "launcher: what differs from launch to launch is repeated",
        LAUNCHER,
        "if (*call[:2], len(call[2]), call[3]) != (*again[:2], len(again[2]), again[3]):",
        "if False:",
        f"{_L}an_unknown_launcher_is_called_as_triton_calls_it",
    ),
    Fault(
        "launcher: any tensor is taken for the next one",
        LAUNCHER,
        "if not left or value is not example[left[0]]:",
        "if not left:",
        f"{_L}what_is_passed_is_understood_or_refused",
    ),
    Fault(
        "launcher: any argument is taken for a descriptor",
        LAUNCHER,
        "if not left or left[0] not in descriptors:",
        "if not left:",
        f"{_L}what_is_passed_is_understood_or_refused",
    ),
    Fault(
        "launcher: a tensor that is not passed goes unnoticed",
        LAUNCHER,
        "    if left:\n",
        "    if False:\n",
        f"{_L}what_is_passed_is_understood_or_refused",
    ),
    Fault(
        "launcher: an unknown one raises",
        LAUNCHER,
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        f"{_L}an_unknown_launcher_is_called_as_triton_calls_it",
    ),
    Fault(
        "gluon: a missing name raises",
        GLUON,
        "if MISSING is not None and kernel not in _broken:",
        "if False:",
        f"{_G}without_a_name_the_plain_kernel_runs_and_a_warning_says_so_once",
    ),
    Fault(
        "gluon: a kernel that was given up is tried again",
        GLUON,
        "    _broken.add(kernel)\n",
        "",
        f"{_G}where_no_plan_can_be_made_the_plain_kernel_runs",
    ),
    Fault(
        "plans: a kernel in Gluon that does not compile raises",
        PLANS,
        "    plan.instead = plain\n",
        "",
        f"{_G}a_kernel_that_does_not_compile_gives_way_for_good",
    ),
    Fault(
        "plans: a plan of a kernel in Gluon that cannot be made raises",
        PLANS,
        "return plain(error)",
        "raise",
        f"{_G}where_no_plan_can_be_made_the_plain_kernel_runs",
    ),
    Fault(
        "configs: fusion of products and sums as Triton has it",
        CONFIGS,
        'options["enable_fp_fusion"] = True',
        'options["enable_fp_fusion"] = False',
        f"{_G}a_name_that_is_gone_is_found_by_the_compiler",
    ),
    Fault(
        "autocast: asked of devices that have none",
        CHECKS,
        "if not _has_autocast(device.type) or not torch",
        "if not torch",
        f"{_T}autocast_of_a_device_is_known_eagerly_and_traced",
    ),
    Fault(
        "compiler: an exchange of lanes is traced into its launch",
        TRITON,
        "if needs_grad(*tensors) or observed(*tensors):",
        "if needs_grad(*tensors):",
        f"{_T}functions_are_one_graph",
    ),
    Fault(
        "compiler: the check of the device is traced",
        INTERNALS,
        "    function._dynamo_marked_constant = True  # type: ignore[attr-defined]\n",
        "",
        f"{_T}on_a_gpu_functions_are_one_graph_of_operators",
    ),
    Fault(
        "internals: a missing name raises",
        INTERNALS,
        "        return torch._C._are_functorch_transforms_active()\n    except AttributeError:",
        "        return torch._C._are_functorch_transforms_active()\n    except KeyError:",
        "tests/test_internals.py::test_without_a_name_calls_are_right_and_one_warning_says_so",
    ),
]

FAULTS = [
    *INT8_FAULTS,
    *TILE_FAULTS,
    *FORWARD_FAULTS,
    *BACKWARD_FAULTS,
    *PROJECTION_FAULTS,
    *LANE_FAULTS,
    *SDPA_FAULTS,
    *PLAN_FAULTS,
    *CONTRACT_FAULTS,
    *HOST_FAULTS,
    *HOPPER_FAULTS,
    *LONG_ROW_FAULTS,
    *MODERN_FAULTS,
    *DECODE_FAULTS,
    *CHILD_FAULTS,
    *FLEX_FAULTS,
    *SPARSITY_FAULTS,
    *WINDOW_FAULTS,
    *VARLEN_FAULTS,
    *NEWCOMER_FAULTS,
    *VERSION_FAULTS,
]

# Faults that no test can see here, and why; killing one is an error too.
EXPECTED_SURVIVORS = {
    "causal: limits of rows not clamped to T_k": (
        "equivalent: only rows past T_q have a limit past T_k, and they are not stored"
    ),
    "dk, dv: rows past the end have lse 0": (
        "equivalent: dO is loaded as 0 there, and with it dv, dP, delta and dS are 0"
    ),
    "tail of N: weight not masked": (
        "reads past the weight, but into columns that are not stored; memcheck on a GPU sees it"
    ),
}
if not torch.cuda.is_available():
    EXPECTED_SURVIVORS |= {
        "forward: base of o in 32 bits": "2³¹ outputs are too many for the interpreter",
        "y: row * N in 32 bits": "2³¹ outputs are too many for the interpreter",
    }

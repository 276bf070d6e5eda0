"""The magnitude masks against their definition, value by value."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.masks.magnitude import magnitude_mask, nm_mask
from nmjax.pattern import NMPattern

pytestmark = pytest.mark.usefixtures("strict_promotion")

FLOATS = [
    *(jnp.float32, jnp.float16, jnp.bfloat16),
    *(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float4_e2m1fn),
]
INTEGERS = [jnp.int32, jnp.int16, jnp.int8, jnp.uint32, jnp.uint8, jnp.int4, jnp.uint4]


def reference_mask(scores, pattern, axis=-2, ragged=None, magnitude=False):
    """The definition: in each group, sort by score, and keep the first n."""
    pattern = NMPattern(pattern)
    scores = np.moveaxis(np.asarray(scores), axis, -1)
    number = int if scores.dtype.kind in "biu" else float

    def order(score):  # NaN lowest; Python compares -0.0 with 0.0 as equal
        value = number(score)
        return (value == value, abs(value) if magnitude else value)

    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        for start in range(0, scores.shape[-1], pattern.m):
            group = scores[row][start : start + pattern.m]
            # Stable also when reversed, so ties stay in the order of their index. NaN
            # equals NaN only where its value is replaced.
            keys = [(real, value if real else 0) for real, value in map(order, group)]
            best = sorted(range(len(group)), key=keys.__getitem__, reverse=True)
            if len(group) < pattern.m and ragged == "dense-tail":
                kept = best
            else:
                kept = best[: pattern.n]
            mask[row][[start + i for i in kept]] = True
    return np.moveaxis(mask, -1, axis)


def assert_is_the_definition(scores, pattern, **options):
    for function, magnitude in ((nm_mask, False), (magnitude_mask, True)):
        mask = function(scores, pattern, **options)
        assert mask.dtype == jnp.bool_ and mask.shape == scores.shape
        expected = reference_mask(scores, pattern, magnitude=magnitude, **options)
        np.testing.assert_array_equal(mask, expected, err_msg=function.__name__)


def test_known_answer():
    w = jnp.array([1.0, -3.0, 2.0, -0.5])
    assert magnitude_mask(w, "2:4", axis=-1).tolist() == [False, True, True, False]
    assert nm_mask(w, "2:4", axis=-1).tolist() == [True, False, True, False]


def test_default_axis_is_the_contraction_axis_of_a_kernel():
    w = jnp.arange(24.0).reshape(8, 3)
    expected = np.tile([[False], [False], [True], [True]], (2, 3))
    np.testing.assert_array_equal(magnitude_mask(w, "2:4"), expected)
    conv = jnp.broadcast_to(w, (3, 3, 8, 3))
    np.testing.assert_array_equal(
        magnitude_mask(conv, "2:4"), np.broadcast_to(expected, (3, 3, 8, 3))
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:5", "9:40"])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_mask_is_the_definition_where_most_groups_hold_ties(pattern, axis, rng):
    shape = [3, 2, 5]
    shape[axis] = 2 * NMPattern(pattern).m
    assert_is_the_definition(
        jnp.asarray(rng.integers(-2, 3, shape), jnp.float32), pattern, axis=axis
    )


@pytest.mark.parametrize("m", [8, 9, 16, 33])
def test_groups_of_one_pass_and_of_several_passes_follow_the_same_rule(m, rng):
    scores = jnp.asarray(rng.integers(0, 4, (3 * m, 7)), jnp.int32)
    for n in (1, m // 2):
        assert_is_the_definition(scores, NMPattern(n, m))


def test_axis_counts_from_either_end(rng):
    w = jnp.asarray(rng.normal(size=(4, 8, 12)), jnp.float32)
    for axis in range(3):
        np.testing.assert_array_equal(
            magnitude_mask(w, "2:4", axis=axis), magnitude_mask(w, "2:4", axis=axis - 3)
        )


SPECIAL = [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1.0, -1.0, 2.0, -2.0]


@st.composite
def cases(draw):
    pattern = draw(st.sampled_from(["1:2", "2:4", "1:4", "3:4", "2:6", "4:8", "5:12"]))
    ragged = draw(st.sampled_from([None, "dense-tail", "pad"]))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    m = NMPattern(pattern).m
    shape[axis] = draw(st.integers(0, 2)) * m
    if ragged:
        shape[axis] += draw(st.integers(0, m - 1))
    dtype = jnp.dtype(draw(st.sampled_from([*FLOATS, *INTEGERS, jnp.bool_])))
    size = int(np.prod(shape))
    seed = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):  # any bits at all: every class of value that the dtype has
        bits = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize)
        scores = bits.astype(np.uint8)
        scores = scores % 2 == 1 if dtype == jnp.bool_ else scores.view(dtype)
    elif jnp.issubdtype(dtype, jnp.floating):
        scores = np.random.default_rng(seed).choice(SPECIAL, size).astype(dtype)
    else:
        scores = np.random.default_rng(seed).integers(0, 2, size).astype(dtype)
    return scores.reshape(shape), pattern, axis, ragged


@hypothesis.settings(max_examples=25)
@hypothesis.given(cases())
def test_mask_is_the_definition_on_every_dtype_shape_and_axis(case):
    scores, pattern, axis, ragged = case
    assert_is_the_definition(jnp.asarray(scores), pattern, axis=axis, ragged=ragged)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.int64, jnp.uint64])
def test_64_bit_scores_keep_all_their_bits(dtype, rng):
    with jax.enable_x64(True):
        low = jnp.asarray(rng.integers(0, 3, (8, 5)), dtype)
        scores = 2**52 + low  # differences that float32 and int32 do not hold
        assert scores.dtype == dtype
        assert_is_the_definition(scores, "2:4")


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_order_of_special_values(dtype):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    ascending = [np.nan, -np.inf, -1.0, -2 * tiny, -tiny, 0.0, tiny, 2 * tiny, np.inf]
    for lower, higher in zip(ascending, ascending[1:], strict=False):
        pair = jnp.asarray(np.array([lower, higher]).astype(dtype))
        assert nm_mask(pair, "1:2", axis=0).tolist() == [False, True]
        assert nm_mask(pair[::-1], "1:2", axis=0).tolist() == [True, False]


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("tie", [(0.0, -0.0), (np.nan, -np.nan), (np.inf, np.inf)])
def test_ties_go_to_the_lower_index(tie, dtype):
    for pair in (tie, tie[::-1]):
        pair = jnp.asarray(np.array(pair).astype(dtype))
        assert nm_mask(pair, "1:2", axis=0).tolist() == [True, False]
        assert magnitude_mask(pair, "1:2", axis=0).tolist() == [True, False]


def test_nans_of_different_payload_tie():
    bits = np.array([0x7FC00000, 0x7F800001, 0xFFC00001, 0x7FFFFFFF], np.uint32)
    for scores in (bits, bits[::-1]):
        mask = magnitude_mask(jnp.asarray(scores.view(np.float32)), "2:4", axis=0)
        assert mask.tolist() == [True, True, False, False]


def test_magnitude_of_the_most_negative_integer_is_the_largest():
    for dtype in (jnp.int8, jnp.int16, jnp.int32):
        limits = jnp.iinfo(dtype)
        w = jnp.asarray([limits.max, limits.min, 0, -1], dtype)
        assert magnitude_mask(w, "1:4", axis=0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("constant", [0.0, 1.0, -7.5, np.nan, -np.inf])
@pytest.mark.parametrize("pattern", ["2:4", "5:20"])
def test_a_constant_keeps_the_first_n(constant, pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    mask = magnitude_mask(jnp.full((2 * m, 3), constant, jnp.float32), pattern)
    np.testing.assert_array_equal(mask, np.tile(np.arange(2 * m) % m < n, (3, 1)).T)


def test_n_equal_to_m_keeps_everything(rng):
    for scores in (rng.normal(size=(8, 3)), np.full((8, 3), np.nan)):
        assert magnitude_mask(jnp.asarray(scores, jnp.float32), "4:4").all()


def test_dense_tail_keeps_what_lies_beyond_the_last_group():
    mask = nm_mask(jnp.arange(10), "1:4", axis=0, ragged="dense-tail")
    assert mask.tolist() == [*[False] * 3, True, *[False] * 3, True, True, True]


def test_pad_loses_to_every_score_of_the_tail():
    lowest = jnp.full(7, jnp.nan), jnp.full(7, -128, jnp.int8), jnp.zeros(7, jnp.uint8)
    for scores in lowest:
        mask = nm_mask(scores, "2:4", axis=0, ragged="pad")
        assert mask.tolist() == [True, True, False, False, True, True, False]
    assert nm_mask(jnp.zeros(1), "2:4", axis=0, ragged="pad").tolist() == [True]


def test_ragged_changes_nothing_where_m_divides_the_axis(rng):
    w = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    for ragged in ("dense-tail", "pad"):
        np.testing.assert_array_equal(
            magnitude_mask(w, "2:4", ragged=ragged), magnitude_mask(w, "2:4")
        )


@pytest.mark.parametrize("pattern", ["2:4", "5:20"])
@pytest.mark.parametrize("ragged", [None, "pad"])
def test_transformations_change_no_bit(pattern, ragged, rng):
    size = 40 if ragged is None else 43
    stack = jnp.asarray(rng.integers(-2, 3, (4, size, 6)), jnp.float32)
    expected = np.stack([reference_mask(w, pattern, -2, ragged, True) for w in stack])

    def mask(w):
        return magnitude_mask(w, pattern, ragged=ragged)

    np.testing.assert_array_equal(mask(stack), expected)
    np.testing.assert_array_equal(jax.jit(mask)(stack), expected)
    np.testing.assert_array_equal(jax.vmap(mask)(stack), expected)
    np.testing.assert_array_equal(
        jax.vmap(mask, in_axes=2, out_axes=2)(jnp.moveaxis(stack, 0, 2)),
        np.moveaxis(expected, 0, 2),
    )
    scanned = jax.lax.scan(lambda carry, w: (carry, mask(w)), None, stack)[1]
    np.testing.assert_array_equal(scanned, expected)


@pytest.mark.parametrize("pattern", ["2:4", "8:256"])
def test_memory_does_not_grow_with_m_and_nothing_is_sorted(pattern):
    scores = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    compiled = jax.jit(lambda w: magnitude_mask(w, pattern)).lower(scores).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * 4 * scores.size
    assert "sort(" not in compiled.as_text() and "TopK" not in compiled.as_text()


def test_the_mask_is_a_constant_to_the_gradient(rng):
    w = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    mask = magnitude_mask(w, "2:4").astype(jnp.float32)
    for function in (
        lambda w: (w * magnitude_mask(w, "2:4").astype(w.dtype)).sum(),
        lambda w: jnp.where(nm_mask(jnp.abs(w), "2:4"), w, 0).sum(),
    ):
        np.testing.assert_array_equal(jax.grad(function)(w), mask)
        np.testing.assert_array_equal(jax.jit(jax.grad(function))(w), mask)
        tangent = jax.jvp(function, (w,), (jnp.ones_like(w),))[1]
        np.testing.assert_allclose(tangent, mask.sum())


@pytest.mark.parametrize("pattern", ["2:4", "5:20"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("d", None), P(None, "d")], ids=str)
def test_whole_groups_on_every_device_need_no_communication(
    spec, axis_type, pattern, rng
):
    w = rng.integers(-2, 3, (80, 8)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    sharded = jax.device_put(w, NamedSharding(mesh, spec))

    def mask(w):
        return magnitude_mask(w, pattern)

    with jax.set_mesh(mesh):
        compiled = jax.jit(mask).lower(sharded).compile()
        for actual in (mask(sharded), compiled(sharded)):
            np.testing.assert_array_equal(
                actual, reference_mask(w, pattern, magnitude=True)
            )
            assert actual.sharding.is_equivalent_to(sharded.sharding, 2)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


@pytest.mark.parametrize("pattern", ["2:4", "5:20"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_over_whole_groups(axis_type, pattern, rng):
    w = rng.integers(-2, 3, (80, 8)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    for spec in (P("d", None), P(None, "d")):
        mapped = jax.shard_map(
            lambda w: magnitude_mask(w, pattern),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        actual = jax.jit(mapped)(jax.device_put(w, NamedSharding(mesh, spec)))
        np.testing.assert_array_equal(
            actual, reference_mask(w, pattern, magnitude=True)
        )


def test_an_explicit_sharding_that_cuts_groups_is_refused():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(jnp.ones((24, 8)), NamedSharding(mesh, P("d")))
    with pytest.raises(ValueError, match=r"axis -2 .*parts of 6, .* m = 4 .*2:4"):
        magnitude_mask(w, "2:4")
    with pytest.raises(ValueError, match="straddle devices"):
        jax.jit(lambda w: magnitude_mask(w, "2:5", ragged="pad"))(w)


@pytest.mark.parametrize("function", [nm_mask, magnitude_mask])
@pytest.mark.parametrize(
    ("shape", "dtype", "pattern", "options", "message"),
    [
        ((6, 4), "float32", "2:4", {}, r"axis -2 of shape \(6, 4\) has size 6.* m = 4"),
        ((6, 4), "float32", "2:4", {}, 'say ragged="dense-tail" or ragged="pad"'),
        ((4, 6), "float32", "2:4", {"axis": 1}, "axis 1 .*size 6"),
        ((8,), "float32", "2:4", {}, r"axis -2 is out of range .*\(8,\)"),
        ((), "float32", "2:4", {"axis": -1}, r"axis -1 is out of range .*\(\)"),
        ((8, 8), "float32", "2:4", {"axis": 2}, "axis 2 is out of range"),
        ((8, 8), "complex64", "2:4", {}, "dtype complex64 .*magnitudes"),
        ((8, 8), "float32", "2;4", {}, "not an N:M pattern: '2;4'"),
        ((8, 8), "float32", "2:4", {"ragged": "wrap"}, "ragged='wrap'.*dense-tail"),
    ],
)
def test_bad_input_is_named(function, shape, dtype, pattern, options, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.ones(shape, dtype), pattern, **options)


def test_random_keys_have_no_order():
    with pytest.raises(ValueError, match="have no order"):
        nm_mask(jax.random.split(jax.random.key(0), 4), "2:4", axis=0)

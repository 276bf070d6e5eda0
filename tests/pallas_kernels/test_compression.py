"""Mask + compress against its definition, on every implementation."""

import dataclasses
import functools
import logging

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from pallas_kernels import (
    compress,
    compression_mosaic,
    decompress,
    implementations,
    nm_matmul,
    ptx,
    reference,
)
from pallas_kernels.compression import compress_magnitude, compress_transposable
from pallas_kernels.devices import Device
from pallas_kernels.tile_selection import transposable_2to4
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.ahead_of_time import A100, B200, H200
from tests.pallas_kernels.element_wise import (
    SPECIAL,
    assert_same,
    every_group,
    widths,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

AXES = [-1, -2]
interpreted = pytest.mark.skipif(
    ptx.JAX_VERSION < (0, 11),
    reason="Pallas' interpreter has no plgpu.load with a layout before jax 0.11",
)
compiled = pytest.mark.skipif(
    ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
)


def expected_of(w, axis, dtype):
    mask = nmjax.magnitude_mask(w, "2:4", axis=axis)
    return compress(w, mask, axis=axis, dtype=dtype)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_group_is_masked_as_nmjax_masks_it(axis, dtype):
    w = jnp.asarray(every_group(axis, dtype))
    compressed = compress_magnitude(w, axis=axis)
    compressed.validate()
    assert_same(compressed, expected_of(w, axis, jnp.bfloat16))


@pytest.mark.slow
@hypothesis.given(data=st.data(), shape=st.sampled_from([(1, 4), (3, 8), (17, 68)]))
@hypothesis.settings(max_examples=30)
def test_any_entries_in_any_size(data, shape):
    count = shape[0] * shape[1]
    chosen = data.draw(
        st.lists(st.integers(0, len(SPECIAL)), min_size=count, max_size=count)
    )
    w = np.array([*SPECIAL, 2.0], np.float32)[chosen].reshape(shape)
    for axis, matrix in ((-1, w), (-2, w.T)):
        compressed = compress_magnitude(jnp.asarray(matrix), axis=axis)
        assert_same(compressed, expected_of(matrix, axis, jnp.bfloat16))


def test_the_mask_is_chosen_from_the_master(rng):
    w = jnp.asarray(1 + rng.random((64, 32)) / 512, jnp.float32)  # bfloat16: ties
    compressed = compress_magnitude(w)
    mask = nmjax.magnitude_mask(w, "2:4")
    np.testing.assert_array_equal(decompress(compressed) != 0, mask)
    assert (nmjax.magnitude_mask(w.astype(jnp.bfloat16), "2:4") != mask).any()


@pytest.mark.parametrize("at_most", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_forms_have_one_mask_that_serves_both_axes(rng, at_most):
    w = jnp.asarray(rng.standard_normal((24, 40)), jnp.float32)
    compressed, transposed = compress_transposable(
        w, at_most=at_most, dtype=jnp.float16
    )
    for form in (compressed, transposed):
        form.validate()
        assert form.axis == -2 and form.dtype == jnp.float16
    dense = np.asarray(decompress(compressed))
    np.testing.assert_array_equal(decompress(transposed), dense.T)
    tiles = w.reshape(6, 4, 10, 4)
    scores = [[jnp.abs(tiles[:, i, :, j]) for j in range(4)] for i in range(4)]
    bits = np.asarray(transposable_2to4(scores, at_most=at_most))
    mask = (bits[:, None, :, None] >> np.arange(16).reshape(4, 1, 4)) & 1
    expected = np.where(mask.reshape(24, 40), w, 0).astype(np.float16)
    np.testing.assert_array_equal(dense, expected)
    counts = mask.sum((1, 3))
    assert set(counts.flat) <= ({7, 8} if at_most else {8})


@pytest.mark.parametrize(
    "kind", ["magnitude", pytest.param("transposable", marks=pytest.mark.slow)]
)
def test_the_gradient_of_values_reaches_kept_entries(rng, kind):
    w = jnp.asarray(rng.standard_normal((8, 12)), jnp.float32)

    def forms(w):
        if kind == "magnitude":
            return [compress_magnitude(w)]
        return compress_transposable(w)

    def energy(w):
        squares = [jnp.square(c.values.astype(jnp.float32)).sum() for c in forms(w)]
        return functools.reduce(jnp.add, squares) / 2

    expected = len(forms(w)) * np.asarray(decompress(forms(w)[0]), np.float32)
    gradient = jax.grad(energy)(w)
    assert gradient.dtype == w.dtype
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(jax.jit(jax.grad(energy))(w), expected)


def unstacked(compressed):
    values, metadata = compressed.values, compressed.metadata
    for v, m in zip(values, metadata, strict=True):
        yield dataclasses.replace(compressed, values=v, metadata=m)


def test_vmap_compresses_each_matrix(rng):
    w = jnp.asarray(rng.standard_normal((3, 8, 12)), jnp.bfloat16)
    stacked = jax.vmap(compress_magnitude)(w)
    for actual, matrix in zip(unstacked(stacked), w, strict=True):
        assert_same(actual, compress_magnitude(matrix))


def test_a_kernel_is_mapped_over_one_matrix_after_another(rng, monkeypatch):
    def kernel(w, *, axis, dtype):
        assert w.ndim == 2
        return reference.compress_2to4(w, dtype)

    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(compression_mosaic, "compress_magnitude", kernel)
    w = jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32)
    run = functools.partial(compress_magnitude, axis=-1, implementation="mosaic")
    stacked = jax.vmap(run)(w)
    for actual, matrix in zip(unstacked(stacked), w, strict=True):
        assert_same(actual, expected_of(matrix, -1, jnp.bfloat16))


@dataclasses.dataclass
class Kernels:
    """The reference in place of Mosaic's; notes the shape of each part."""

    parts: list = dataclasses.field(default_factory=list)

    def compress_magnitude(self, w, *, axis, dtype):
        self.parts.append(w.shape)
        form = reference.compress_2to4(w if axis == -1 else w.T, dtype)
        return dataclasses.replace(form, axis=axis)

    def compress_transposable(self, w, *, dtype, at_most):
        self.parts.append(w.shape)
        return reference.compress_transposable(w, dtype, at_most=at_most)


@pytest.fixture
def kernels(monkeypatch):
    kernels = Kernels()
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    for name in ("compress_magnitude", "compress_transposable"):
        monkeypatch.setattr(compression_mosaic, name, getattr(kernels, name))
    jax.clear_caches()  # of what other kernels in their place were traced for
    return kernels


def on_four_devices(x, *spec, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    return jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*spec)))


def magnitude(w):
    return [compress_magnitude(w, implementation="mosaic")]


def transposable(w):
    return compress_transposable(w, implementation="mosaic")


def energy(forms):
    return sum(jnp.square(c.values.astype(jnp.float32)).sum() for c in forms)


@pytest.mark.parametrize(
    "compress", [magnitude, pytest.param(transposable, marks=pytest.mark.slow)]
)
def test_each_device_compresses_its_part(compress, kernels, rng):
    """Of one matrix, of each of a stack, and with the gradient."""
    w = rng.standard_normal((3, 128, 256)).astype(np.float32)
    stacked = jax.jit(jax.vmap(compress))(on_four_devices(w, None, "a", "b"))
    assert kernels.parts[-1] == (64, 128)
    for i, matrix in enumerate(w):
        forms = compress(on_four_devices(matrix, "a", "b"))
        for form, same, one in zip(forms, compress(matrix), stacked, strict=True):
            assert_same(form, same)
            assert_same(list(unstacked(one))[i], same)

    def gradient(w):
        return jax.grad(lambda w: energy(compress(w)))(w)

    kernels.parts.clear()
    sharded = jax.jit(gradient)(on_four_devices(w[0], "b", "a"))
    assert kernels.parts[-1] == (64, 128)
    np.testing.assert_array_equal(sharded, gradient(w[0]))


def test_without_shardy_xla_gathers(kernels, rng):
    w = rng.standard_normal((128, 64)).astype(np.float32)
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        (form,) = jax.jit(magnitude)(on_four_devices(w, "a", "b"))
        assert kernels.parts == [(128, 64)]
        assert_same(form, magnitude(w)[0])
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def test_a_product_takes_what_each_device_compressed(kernels, rng):
    x = rng.integers(-3, 4, (8, 128)).astype(jnp.bfloat16)
    w = rng.integers(-3, 4, (128, 64)).astype(jnp.bfloat16)

    @jax.jit
    def layer(x, w):
        return nm_matmul(x, compress_magnitude(w, implementation="mosaic"))

    out = layer(on_four_devices(x, "a", None), on_four_devices(w, "a", "b"))
    assert kernels.parts[-1] == (64, 32)
    np.testing.assert_array_equal(out, layer(jnp.asarray(x), jnp.asarray(w)))


@pytest.mark.parametrize("compress", [magnitude, transposable])
def test_inside_shard_map_a_kernel_gets_the_part(compress, kernels, rng):
    w = on_four_devices(rng.standard_normal((128, 192)).astype(np.float32), "a")
    forms = jax.eval_shape(compress, w)
    specs = [
        jax.tree.map(lambda _, spec=spec: spec, form)
        for form, spec in zip(forms, (P(None, "a"), P("a")), strict=False)
    ]
    manual = jax.shard_map(
        lambda w: list(compress(w)),
        mesh=w.sharding.mesh,
        in_specs=P("a"),
        out_specs=specs,
    )
    assert "custom_partitioning" not in str(jax.make_jaxpr(manual)(w))
    for form, same in zip(jax.jit(manual)(w), compress(np.asarray(w)), strict=True):
        assert_same(form, same)
    assert (64, 192) in kernels.parts


def test_with_explicit_axes_a_kernel_gets_the_matrix(kernels, rng):
    w = rng.standard_normal((128, 64)).astype(np.float32)
    explicit = on_four_devices(w, "a", axis_type=AxisType.Explicit)
    (form,) = jax.jit(magnitude)(explicit)
    assert set(kernels.parts) == {(128, 64)}
    assert_same(form, magnitude(w)[0])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_no_kernel_is_asked_for_nothing(shape, monkeypatch):
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    for function in (compress_magnitude, compress_transposable):
        empty = function(jnp.zeros(shape), implementation="mosaic")
        first, *_ = [empty] if function is compress_magnitude else empty
        first.validate()
        assert first.shape == shape


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((8, 6), {"axis": -1}, "axis -1 of shape .* has size 6, not a multiple of 4"),
        ((6, 8), {}, "axis -2 of shape .* has size 6, not a multiple of 4"),
        ((2, 8, 8), {}, "expected one matrix"),
        ((8, 8), {"axis": 0}, "axis must be -1 or -2, got 0"),
        ((8, 8), {"dtype": jnp.float32}, "dtype='float32': values are written as"),
        ((8, 8), {"implementation": "cuda"}, "implementation='cuda': expected None"),
    ],
)
def test_what_is_not_supported_raises(shape, options, message):
    with pytest.raises(ValueError, match=message):
        compress_magnitude(jnp.zeros(shape), **options)


def test_a_transposable_mask_needs_whole_tiles():
    with pytest.raises(ValueError, match="axis -1 of shape .* has size 6"):
        compress_transposable(jnp.zeros((8, 6)))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="w is int32, expected one of"):
        compress_magnitude(jnp.zeros((8, 8), jnp.int32))


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_a_kernel_that_cannot_run_here_says_why(name):
    if jax.default_backend() == "gpu":
        pytest.skip("here it can")
    with pytest.raises(NotImplementedError, match=f"implementation='{name}': needs"):
        compress_magnitude(jnp.zeros((8, 8)), implementation=name)


def test_without_a_kernel_it_says_so_once(caplog):
    implementations._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            compress_magnitude(jnp.zeros((8, 8)))
    said = [r.getMessage() for r in caplog.records if "compression" in r.getMessage()]
    if jax.default_backend() == "cpu":
        assert said == ["compression: no kernel for this device: plain jnp"]


def test_none_takes_a_kernel_only_where_it_is_proven(monkeypatch):
    device = Device("Some GPU", (9, 0))
    monkeypatch.setattr(implementations, "this_device", lambda: device)
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    assert implementations.choose(None, "compression") == "reference"
    monkeypatch.setattr(implementations, "PROVEN_ON", frozenset({"Some GPU"}))
    assert implementations.choose(None, "compression") == "mosaic"
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: "is too old")
    triton = implementations.module("triton", "compression")
    monkeypatch.setattr(triton, "unavailable", lambda: "is not installed")
    assert implementations.choose(None, "compression") == "reference"


def interpret(function, w, **options):
    run = functools.partial(function, interpret=ptx.interpreter(), **options)
    return jax.jit(run)(w)


@interpreted
@pytest.mark.parametrize("axis", AXES)
def test_interpreted_kernel_masks_every_group(axis):
    w = jnp.asarray(every_group(axis, jnp.float32))
    actual = interpret(
        compression_mosaic.compress_magnitude, w, axis=axis, dtype=jnp.bfloat16
    )
    assert_same(actual, expected_of(w, axis, jnp.bfloat16))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, dtype, rows, k",
    [
        (-1, "float16", 1, 4),
        (-2, "bfloat16", 1, 4),
        (-1, "bfloat16", 20, 72),
        (-2, "float16", 128, 128),
    ],
)
def test_interpreted_kernel_in_other_sizes_and_types(axis, dtype, rows, k, rng):
    w = rng.integers(-3, 4, (rows, k))
    w = jnp.asarray(w if axis == -1 else w.T, dtype)
    actual = interpret(
        compression_mosaic.compress_magnitude, w, axis=axis, dtype=jnp.float16
    )
    assert_same(actual, expected_of(w, axis, jnp.float16))


def check_transposable(w, at_most, run):
    actual = run(w, dtype=jnp.bfloat16, at_most=at_most)
    expected = reference.compress_transposable(w, jnp.bfloat16, at_most=at_most)
    for form, same in zip(actual, expected, strict=True):
        assert_same(form, same)


@interpreted
@pytest.mark.slow
def test_interpreted_kernel_of_both_forms(rng):
    w = jnp.asarray(rng.integers(-4, 5, (64, 128)), jnp.bfloat16)
    kernel = compression_mosaic.compress_transposable
    check_transposable(w, False, functools.partial(interpret, kernel))


@interpreted
@pytest.mark.slow
def test_interpreted_kernel_of_both_forms_of_special_entries(rng):
    w = jnp.asarray(rng.choice(SPECIAL, (36, 20)), jnp.float32)
    kernel = compression_mosaic.compress_transposable
    check_transposable(w, True, functools.partial(interpret, kernel))


def test_four_warps_lie_so_that_padding_is_least():
    tile = compression_mosaic._tile
    assert tile(1024, 4096, 64) == (1, 1024, 4096)
    assert tile(256, 64, 64) == (4, 256, 64)
    assert tile(192, 192, 64) == (1, 192, 256)  # as little as (2, 256, 192)
    assert tile(1000, 2048, 64) == (1, 1024, 2048)


MAGNITUDE = compression_mosaic.compress_magnitude
TRANSPOSABLE = compression_mosaic.compress_transposable
# By name and dtype: the kernel; how many loads and stores of how many bytes a thread
# has; the most registers, of which 128 let four blocks share a multiprocessor.
KERNELS = {
    ("rows", "bfloat16"): (MAGNITUDE, {"axis": -1}, {16: 4}, {16: 2, 4: 1}, 64),
    ("rows", "float32"): (MAGNITUDE, {"axis": -1}, {16: 8}, {16: 2, 4: 1}, 64),
    ("columns", "bfloat16"): (MAGNITUDE, {"axis": -2}, {8: 32}, {16: 8, 4: 4}, 128),
    ("columns", "float32"): (MAGNITUDE, {"axis": -2}, {16: 32}, {16: 8, 4: 4}, 128),
    ("tiles", "bfloat16"): (
        *(TRANSPOSABLE, {"at_most": False}, {8: 16}, {16: 4, 4: 28}, 128),
    ),
    ("tiles, at most", "bfloat16"): (
        *(TRANSPOSABLE, {"at_most": True}, {8: 16}, {16: 4, 4: 28}, 168),
    ),
}
TWO = [("columns", "bfloat16"), ("tiles, at most", "bfloat16")]
COMPILED = [
    pytest.param(target, *kernel, id=f"{target.arch}, {', '.join(kernel)}", marks=marks)
    for target, kernels in ((H200, KERNELS), (A100, KERNELS), (B200, TWO))
    for kernel in kernels
    # One architecture for all kernels, one kernel for all architectures.
    for marks in [[] if target is H200 or kernel == TWO[0] else pytest.mark.slow]
]


@compiled
@pytest.mark.parametrize("target, name, dtype", COMPILED)
def test_kernel_compiles_with_wide_loads_and_no_spills(target, name, dtype):
    kernel, options, loads, stores, registers = KERNELS[name, dtype]
    w = jax.ShapeDtypeStruct((1024, 768), dtype)
    function = functools.partial(kernel, dtype=jnp.bfloat16, **options)
    result = ahead_of_time.compile_kernel(function, w, target=target)
    assert widths(result.ptx, "ld") == loads
    assert widths(result.ptx, "st") == stores
    assert "%ctaid.y" not in result.ptx  # the axis ends at 65,535
    assert result.spilled_bytes() == 0
    assert result.registers() <= registers


@compiled
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_instructions_take_less_time_than_is_aimed_at_for_both_forms(dtype):
    """1.3 times a copy, on an H200 by its data sheet: 4.8 TB/s; 132 multiprocessors of
    128 lanes at 1.755 GHz. The code for infinities and NaN, skipped by a branch, counts
    as if it always ran."""
    w = jax.ShapeDtypeStruct((512, 768), dtype)  # not compiled before
    function = functools.partial(TRANSPOSABLE, dtype=jnp.bfloat16, at_most=False)
    result = ahead_of_time.compile_kernel(function, w, target=H200)
    if result.sass is None:
        pytest.skip("needs nvdisasm")
    an_entry = result.instructions() / 64  # a thread has four tiles
    copied_bytes = 2 * w.dtype.itemsize
    assert an_entry <= 1.3 * copied_bytes / 4.8e12 * 132 * 128 * 1.755e9


def test_what_kernels_need_is_said(monkeypatch):
    def reason(capability, version):
        monkeypatch.setattr(ptx, "capability", lambda: capability)
        monkeypatch.setattr(ptx, "JAX_VERSION", version)
        return compression_mosaic.unavailable()

    assert reason((9, 0), (0, 11, 2)) is None
    assert reason((8, 0), (0, 11, 2)) is None
    assert reason((7, 5), (0, 11, 2)).startswith("needs compute capability 8.0")
    assert reason((8, 0), (0, 10, 2)).startswith("compiles for Ampere and Ada from")
    assert reason((9, 0), (0, 10, 2)).startswith("needs jax 0.11")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic", "triton"])
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def where_it_runs(self, name):
        reason = implementations.module(name, "compression").unavailable()
        if reason:
            pytest.skip(f"{name} {reason}")

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_every_group(self, name, axis, dtype):
        w = jnp.asarray(every_group(axis, dtype))
        for out in (jnp.bfloat16, jnp.float16):
            actual = compress_magnitude(w, axis=axis, dtype=out, implementation=name)
            assert_same(actual, expected_of(w, axis, out))

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("rows, k", [(1, 4), (20, 72), (1000, 2048), (4096, 1024)])
    def test_sizes(self, name, axis, rows, k, rng):
        w = rng.standard_normal((rows, k) if axis == -1 else (k, rows))
        w = jnp.asarray(w, jnp.float32)
        actual = compress_magnitude(w, axis=axis, implementation=name)
        assert_same(actual, expected_of(w, axis, jnp.bfloat16))

    @pytest.mark.parametrize("at_most", [False, True])
    @pytest.mark.parametrize("k, n", [(4, 4), (36, 20), (1024, 4096)])
    def test_both_forms(self, name, at_most, k, n, rng):
        run = functools.partial(compress_transposable, implementation=name)
        w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
        check_transposable(w, at_most, run)
        special = jnp.asarray(rng.choice(SPECIAL, (k, n)), jnp.float32)
        check_transposable(special, at_most, run)
        ties = jnp.asarray(rng.integers(-2, 3, (k, n)), jnp.bfloat16)
        check_transposable(ties, at_most, run)

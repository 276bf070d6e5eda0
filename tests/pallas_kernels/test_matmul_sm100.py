"""The Blackwell GEMM: the order of its metadata, its body with A decompressed, PTX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import nmjax
from pallas_kernels import NMCompressed, compress, format, matmul_sm100, nm_matmul, ptx
from pallas_kernels.config import SM100Config, heuristic_sm100
from pallas_kernels.reference import Form
from tests.pallas_kernels import ahead_of_time, gemm_suite
from tests.pallas_kernels.ahead_of_time import B200

pytestmark = pytest.mark.usefixtures("strict_promotion")

needs_jax = pytest.mark.skipif(
    ptx.JAX_VERSION < matmul_sm100.SINCE,
    reason="Pallas' interpreter has tcgen05 from jax 0.11 on",
)
needs_compiler = pytest.mark.skipif(
    ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
)

FORMS = gemm_suite.FORMS
SMALLEST = SM100Config(block_m=128, block_n=64, block_k=128, stages=2)


def compressed(w, pattern="2:4") -> NMCompressed:
    w = jnp.asarray(w)
    mask = nmjax.magnitude_mask(w, pattern, axis=-1)
    return compress(w, mask, pattern, axis=-1)


def test_the_order_of_the_metadata_is_its_definition(rng):
    """Lane by lane, from where the nonzeros of the dense matrix stand."""
    w = rng.standard_normal((256, 384)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(jnp.asarray(w), "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    # Where in its group each kept value stands, (rows, values).
    place = (np.nonzero(mask)[1] % 4).reshape(256, 192)
    expected = np.empty((2, 3, 128, 64), int)
    for row, column in np.ndindex(2, 3):
        square = place[128 * row :][:128, 64 * column :][:, :64]
        for lane in range(128):
            a_index, e, g = lane // 16, lane // 8 % 2, lane % 8
            for word in range(4):
                # 16 columns of A hold 8 values; a word has two bits for each of 2 × 8.
                values = slice(16 * word + 8 * e, 16 * word + 8 * e + 8)
                halves = square[16 * a_index + g], square[16 * a_index + g + 8]
                entries = np.concatenate([half[values] for half in halves])
                expected[row, column, lane, 16 * word : 16 * word + 16] = entries
    actual = matmul_sm100.metadata_squares(a.metadata).astype(jnp.int32)
    np.testing.assert_array_equal(actual, expected)


def test_the_order_of_the_metadata_is_that_of_jax(rng):
    a = compressed(rng.standard_normal((128, 256)).astype(np.float32))
    positions = format.positions(a).astype(jnp.uint2)
    expected = plgpu.format_tcgen05_sparse_metadata(positions, jnp.bfloat16)
    actual = matmul_sm100.metadata_squares(a.metadata)
    np.testing.assert_array_equal(actual.astype(jnp.int32), expected.astype(jnp.int32))


def interpreted(config: SM100Config = SMALLEST):
    return functools.partial(
        matmul_sm100.gemm, config=config, interpret=ptx.interpreter(detect_races=True)
    )


FEW, MANY = {(4, 1, 1), (2, 3, 2)}, gemm_suite.TILE_COUNTS


@needs_jax
@pytest.mark.parametrize(
    "tiles",
    [
        pytest.param(tiles, marks=[] if tiles in FEW else pytest.mark.slow)
        for tiles in MANY
    ],
    ids=str,
)
def test_any_number_of_tiles_with_a_decompressed(rng, tiles):
    m, n, k = (
        count * block for count, block in zip(tiles, (128, 64, 128), strict=True)
    )
    gemm_suite.check(interpreted(), rng, m, n, k)


@needs_jax
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layout_with_bias_and_activation_with_a_decompressed(rng, form):
    """And sizes that fill no tile."""
    form = dataclasses.replace(form, activation="squared_relu")
    gemm_suite.check(interpreted(), rng, 72, 40, 100, form, with_bias=True)


@needs_jax
@pytest.mark.parametrize(
    "config",
    [
        SM100Config(128, 128, 128, stages=1),
        # One tile of D in tensor memory at a time.
        pytest.param(SM100Config(128, 256, 128, stages=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_config_with_a_decompressed(rng, config):
    form = Form(activation="relu", out_dtype=jnp.float32)
    sizes = (256, 2 * config.block_n, 256)
    gemm_suite.check(interpreted(config), rng, *sizes, form, with_bias=True)


def run(values, metadata, b, bias, *, form: Form, config: SM100Config):
    a = NMCompressed(values, metadata, axis=-1)
    return matmul_sm100.gemm(a, b, bias, form, config=config)


def compiled(form: Form, config: SM100Config, dtype=jnp.bfloat16):
    m, n, k = 1024, 1024, 1024
    shapes = [((m, k // 2), dtype), ((m // 2, k // 16), jnp.int32)]
    shapes.append(((k, n) if form.b_is_kn else (n, k), dtype))
    shapes.append(((m if form.bias_along_m else n,), dtype))
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    function = functools.partial(run, form=form, config=config)
    return ahead_of_time.compile_kernel(function, *operands, target=B200)


def assert_good(kernel: ahead_of_time.Compiled):
    assert "tcgen05.mma.sp.cta_group::1.kind::f16" in kernel.ptx
    assert "tcgen05.cp.cta_group::1.128x128b" in kernel.ptx  # metadata
    assert kernel.sass is None or "UTCHMMA" in kernel.sass
    assert kernel.spilled_bytes() == 0
    assert kernel.registers() <= 255


@needs_jax
@needs_compiler
def test_compiles_with_no_gpu():
    config = heuristic_sm100(8192, 8192, 8192)
    assert_good(compiled(FORMS["fprop W24, dgrad W24ᵀ"], config))


@needs_jax
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layout_compiles(form, out_dtype):
    form = dataclasses.replace(form, activation="gelu", out_dtype=out_dtype)
    assert_good(compiled(form, heuristic_sm100(8192, 8192, 8192)))


@needs_jax
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [heuristic_sm100(512, 512, 4096), SM100Config(128, 192, 128, 2), SMALLEST],
    ids=str,
)
def test_other_tiles_compile(config):
    assert_good(compiled(FORMS["fprop x24, wgrad"], config, jnp.float16))


def test_unavailable_says_why(monkeypatch):
    w = jnp.arange(16.0 * 64).reshape(16, 64)

    def reason(dtype=jnp.bfloat16, pattern="2:4", out_dtype=jnp.bfloat16):
        a = compressed(w.astype(dtype), pattern)
        form = Form(out_dtype=out_dtype)
        return matmul_sm100.unavailable(a, jnp.ones((4, 64), dtype), form)

    monkeypatch.setattr(ptx, "JAX_VERSION", (0, 10, 2))
    assert "needs jax 0.11 or later" in reason()
    monkeypatch.setattr(ptx, "JAX_VERSION", (0, 11, 2))
    monkeypatch.setattr(ptx, "capability", lambda: None)
    assert "needs an NVIDIA GPU" in reason()
    for capability in [(8, 0), (9, 0), (12, 0)]:
        monkeypatch.setattr(ptx, "capability", lambda value=capability: value)
        assert "needs compute capability 10.x, this device has" in reason()
    for capability in [(10, 0), (10, 3)]:
        monkeypatch.setattr(ptx, "capability", lambda value=capability: value)
        assert reason() is None
    assert "2:4 alone, the operand is 2:8" in reason(pattern="2:8")
    assert "float16 twice, the operands are float32" in reason(jnp.float32)
    assert "not int32" in reason(out_dtype=jnp.int32)


@pytest.mark.parametrize(
    "a, b", [("float32", "float32"), ("bfloat16", "float16")], ids=str
)
def test_dtypes_that_it_does_not_take_raise(a, b):
    w24 = compressed(jnp.ones((16, 64), a))
    message = f"matmul_sm100: takes bfloat16 or float16 twice, the operands are {a}"
    with pytest.raises(NotImplementedError, match=message):
        matmul_sm100.gemm(w24, jnp.ones((4, 64), b), None, Form())


def test_a_b_that_does_not_fit_raises():
    w24 = compressed(jnp.ones((16, 64), jnp.bfloat16))
    b = jnp.ones((4, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"A \(16, 64\) contracts 64, B .* has 4"):
        matmul_sm100.gemm(w24, b, None, Form(b_is_kn=True))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it may run")
def test_nm_matmul_by_name_raises_where_it_cannot_run():
    w24 = compressed(jnp.ones((16, 64), jnp.bfloat16)).T
    with pytest.raises(NotImplementedError, match="implementation='sm100': needs"):
        nm_matmul(jnp.ones((4, 64), jnp.bfloat16), w24, implementation="sm100")


def skip_without_tcgen05():
    capability = ptx.capability()
    if capability is None or capability[0] != 10:
        pytest.skip(f"needs compute capability 10.x, this device has {capability}")


@pytest.mark.gpu
@needs_jax
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", [(128, 64, 128), (512, 384, 1024), (200, 333, 500)])
def test_on_a_gpu_integers_are_exact(rng, sizes, form):
    skip_without_tcgen05()
    form = dataclasses.replace(form, activation="relu")
    gemm_suite.check(matmul_sm100.gemm, rng, *sizes, form, with_bias=True)


@pytest.mark.gpu
@needs_jax
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_on_a_gpu_normal_numbers(rng, gemm_atol, dtype, activation):
    skip_without_tcgen05()
    form = Form(activation=activation, out_dtype=dtype)
    atol = gemm_atol(dtype, 2048)
    gemm_suite.check(
        matmul_sm100.gemm,
        rng,
        384,
        512,
        2048,
        form,
        dtype=dtype,
        with_bias=True,
        atol=atol,
    )


@pytest.mark.gpu
@needs_jax
def test_on_a_gpu_every_run_gives_the_same(rng):
    skip_without_tcgen05()
    gemm = matmul_sm100.gemm
    gemm_suite.check_again_and_again(gemm, rng, 1024, 4096, 4096, times=500)


@pytest.mark.gpu
@needs_jax
@pytest.mark.parametrize("tiles", MANY, ids=str)
def test_on_a_gpu_any_number_of_tiles(rng, tiles):
    skip_without_tcgen05()
    gemm = functools.partial(matmul_sm100.gemm, config=SMALLEST)
    sizes = (count * block for count, block in zip(tiles, (128, 64, 128), strict=True))
    gemm_suite.check(gemm, rng, *sizes)

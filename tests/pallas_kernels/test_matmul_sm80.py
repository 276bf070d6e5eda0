"""The Ampere GEMM: interpreted with race detection, emulated, compiled with no GPU."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

import nmjax
from pallas_kernels import NMCompressed, compress, matmul_sm80, nm_matmul, ptx
from pallas_kernels.config import (
    SM80Config,
    heuristic_sm80,
    shared_memory_limit,
)
from pallas_kernels.ptx import mma
from pallas_kernels.reference import Form
from tests.pallas_kernels import ahead_of_time, emulator, gemm_suite
from tests.pallas_kernels.ahead_of_time import A100, H200, RTX3090, RTX5090, Target
from tests.pallas_kernels.test_layouts import registers, to_mosaic

pytestmark = pytest.mark.usefixtures("strict_promotion")

needs_ampere = pytest.mark.skipif(
    ptx.JAX_VERSION < ptx.AMPERE_SINCE,
    reason="the pipeline and the layouts of mma.sp come with jax 0.11.1",
)
needs_compiler = pytest.mark.skipif(
    ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
)

FORMS = gemm_suite.FORMS
SMALLEST = SM80Config(block_m=64, block_n=64, block_k=64, stages=2)


def interpreted(config: SM80Config = SMALLEST):
    return functools.partial(
        matmul_sm80.gemm, config=config, interpret=ptx.interpreter(detect_races=True)
    )


@needs_ampere
@pytest.mark.parametrize("tiles", gemm_suite.TILE_COUNTS, ids=str)
def test_any_number_of_tiles(rng, tiles):
    m, n, k = (64 * count for count in tiles)
    gemm_suite.check(interpreted(), rng, m, n, k)


@needs_ampere
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layout_with_bias_and_activation(rng, form):
    """And sizes that fill no tile."""
    form = dataclasses.replace(form, activation="squared_relu")
    gemm_suite.check(interpreted(), rng, 72, 40, 100, form, with_bias=True)


@needs_ampere
@pytest.mark.parametrize("out_is_nm", [False, True])
def test_float32_out(rng, out_is_nm):
    form = Form(out_is_nm=out_is_nm, activation="relu", out_dtype=jnp.float32)
    gemm_suite.check(interpreted(), rng, 40, 72, 36, form, with_bias=True)


@needs_ampere
@pytest.mark.parametrize(
    "config",
    [
        SM80Config(64, 128, 64, stages=1, m_warps=1),
        SM80Config(128, 64, 64, stages=3, m_warps=4),
        SM80Config(64, 64, 128, stages=2, m_warps=2),
    ],
    ids=str,
)
def test_any_config(rng, config):
    form = FORMS["wgrad xᵀ dy24"]
    gemm_suite.check(interpreted(config), rng, 64, 128, 256, form)


@needs_ampere
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_float16_of_normal_numbers(rng, activation, gemm_atol):
    form = Form(activation=activation, out_dtype=jnp.float16, bias_along_m=False)
    atol = gemm_atol("float16", 64)
    gemm_suite.check(
        interpreted(),
        rng,
        64,
        64,
        64,
        form,
        dtype="float16",
        with_bias=True,
        atol=atol,
    )


@needs_ampere
def test_a_stage_that_is_overwritten_while_it_is_read_is_found(rng, monkeypatch):
    monkeypatch.setattr(ptx, "release_smem", lambda: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="has a race|RACE DETECTED"):
        gemm_suite.check(interpreted(), rng, 64, 64, 320)


@needs_ampere
def test_nm_matmul_runs_it_under_jit(rng, monkeypatch):
    """Leading axes, and the gradient of the dense side."""
    monkeypatch.setattr(matmul_sm80, "unavailable", lambda *_: None)
    monkeypatch.setattr(matmul_sm80, "gemm", interpreted())
    w = jnp.asarray(rng.integers(-4, 5, (64, 16)), jnp.bfloat16)
    w24 = compress(w, nmjax.magnitude_mask(w, "2:4", axis=-2))
    x = jnp.asarray(rng.integers(-4, 5, (2, 3, 64)), jnp.bfloat16)

    # The interpreter's effects are ordered, which nothing that XLA may cut can have:
    # what a device has of its own is not cut.
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, implementation):
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
        )
        def run(x):
            matmul = functools.partial(nm_matmul, implementation=implementation)
            y, vjp = jax.vjp(lambda x: matmul(x, w24), x)
            return y, vjp(y)

        return run(x)

    for actual, expected in zip(
        jax.tree.leaves(run(x, "sm80")),
        jax.tree.leaves(run(x, "reference")),
        strict=True,
    ):
        np.testing.assert_array_equal(
            actual.astype(jnp.float32), expected.astype(jnp.float32)
        )


def test_nothing_to_multiply():
    w = jnp.zeros((16, 0), jnp.bfloat16)
    a = compress(w, jnp.ones(w.shape, bool), axis=-1)
    out = matmul_sm80.gemm(a, jnp.ones((3, 0), jnp.bfloat16), None, Form())
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.zeros((3, 16)))


class Fragments:
    """Mosaic's FragmentedArray with numbers in its registers: 128 threads of them."""

    def __init__(self, _registers, _layout, _is_signed=None):
        self.registers, self.layout = _registers, _layout
        self.shape = _layout.shape_from_registers_shape(_registers.shape)
        self.mlir_dtype: Any = "bf16"

    @classmethod
    def of(cls, x: np.ndarray, layout) -> "Fragments":
        shape = layout.registers_shape(x.shape)
        contents = registers(layout, x).reshape(128, -1, layout.vector_length)
        out = np.empty(contents.shape[1], object)
        out[:] = list(contents.swapaxes(0, 1))
        return cls(out.reshape(shape), layout)

    @classmethod
    def splat(cls, value, shape, layout) -> "Fragments":
        return cls.of(np.full(shape, value), layout)

    def _slices(self, index):
        tile = self.layout.base_tile_shape
        return tuple(
            slice((s.start or 0) // t, -(-(s.stop or size) // t))
            for s, t, size in zip(index, tile, self.shape, strict=True)
        )

    def __getitem__(self, index):
        return Fragments(self.registers[self._slices(index)], self.layout)

    def __setitem__(self, index, value):
        self.registers[self._slices(index)] = value.registers

    def copy(self):
        return Fragments(self.registers.copy(), self.layout)

    def contents(self) -> np.ndarray:
        """As `registers` of test_layouts gives them."""
        return np.concatenate(list(self.registers.flat), axis=1)


@pytest.fixture
def numbers_in_registers(monkeypatch):
    """`ptx` with NumPy in place of MLIR: what it does to registers can be computed."""

    def instruction(acc, a, b, word, *, selector, dtype):
        del dtype
        out = np.empty((128, 4))
        for warp in range(4):
            lanes = slice(32 * warp, 32 * warp + 32)
            acc_lanes, a_lanes, b_lanes = (
                np.concatenate([x[lanes] for x in operand], axis=1)
                for operand in (acc, a, b)
            )
            words = word[lanes, 0].view(np.uint32)
            out[lanes] = emulator.mma_sp(a_lanes, b_lanes, acc_lanes, words, selector)
        return list(out[:, :, None].swapaxes(0, 1))

    def movmatrix(register):
        """Lane 4g + t holds (g, 2t) and (g, 2t + 1) of each warp's 8×8 matrix."""
        matrices = register.reshape(4, 8, 8)
        return matrices.swapaxes(1, 2).reshape(128, 2)

    doubles = {
        "_mma_sp_instruction": instruction,
        "_movmatrix": movmatrix,
        "words": list,
        "scalars": lambda registers: [
            register[:, i : i + 1]
            for register in registers
            for i in range(register.shape[1])
        ],
        "joined": lambda scalars: np.concatenate(scalars, axis=1),
        "as_array": _as_array,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(mma if name.startswith("_") else ptx, name, double)
    monkeypatch.setattr(mma.fa, "FragmentedArray", Fragments)
    utils = types.SimpleNamespace(
        c=lambda value, _: value, bitwidth={"bf16": 16, "f32": 32}.get
    )
    monkeypatch.setattr(mma, "utils", utils)
    return monkeypatch


def _as_array(registers, shape):
    out = np.empty(len(registers), object)
    out[:] = list(registers)
    return out.reshape(shape)


def multiplied(rng, m_warps: int) -> tuple[np.ndarray, np.ndarray]:
    """Two tiles a warp in each direction by `_mma_sp`, and the product."""
    layouts = mgpu.MMALayouts(jnp.bfloat16, m_warps=m_warps)
    m, n, k = 32 * m_warps, 16 * (4 // m_warps), 128
    w = rng.integers(-8, 9, (m, k)).astype(np.float32)
    b = rng.integers(-8, 9, (k, n)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    out = mma._mma_sp(
        Fragments.of(np.ones((m, n)), layouts.acc),
        Fragments.of(np.asarray(a.values), layouts.lhs),
        Fragments.of(b, layouts.rhs),
        Fragments.of(np.asarray(a.metadata), to_mosaic(ptx.metadata_layout(m_warps))),
        m_warps=m_warps,
    )
    expected = 1 + np.where(mask, w, 0).astype(float) @ b
    return out.contents(), registers(layouts.acc, expected)


@needs_ampere
@pytest.mark.parametrize("m_warps", [1, 2, 4])
def test_the_registers_and_selectors_that_the_kernel_gives_to_the_instruction(
    rng, m_warps, numbers_in_registers
):
    actual, expected = multiplied(rng, m_warps)
    np.testing.assert_array_equal(actual, expected)


@needs_ampere
@pytest.mark.parametrize("fault", ["selector", "halves of B", "halves of a word"])
def test_a_wrong_register_gives_another_product(rng, fault, numbers_in_registers):
    correct = mma._mma_sp_instruction

    def faulty(acc, a, b, word, *, selector, dtype):
        if fault == "selector":
            selector = 1 - selector
        if fault == "halves of B":
            b = b[2:] + b[:2]
        if fault == "halves of a word":
            word = np.stack([word.view(np.int16)[:, ::-1]]).view(np.int32)[0]
        return correct(acc, a, b, word, selector=selector, dtype=dtype)

    numbers_in_registers.setattr(mma, "_mma_sp_instruction", faulty)
    actual, expected = multiplied(rng, m_warps=2)
    assert np.mean(actual != expected) > 0.5


@needs_ampere
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("m_warps", [1, 2, 4])
def test_the_transpose_of_a_tile_in_registers(m_warps, dtype, numbers_in_registers):
    layout = mgpu.MMALayouts(jnp.bfloat16, m_warps=m_warps).acc
    m, n = 32 * m_warps, 16 * (4 // m_warps)
    x = np.arange(m * n).reshape(m, n)
    tile = Fragments.of(x, layout)
    tile.mlir_dtype = dtype
    out = mma._transpose_acc(tile, m_warps=m_warps)
    assert out.shape == (n, m)
    expected = registers(out.layout, np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(out.contents(), expected)


def run(values, metadata, b, bias, *, form: Form, config: SM80Config):
    a = NMCompressed(values, metadata, axis=-1)
    return matmul_sm80.gemm(a, b, bias, form, config=config)


def compiled(target: Target, form: Form, config: SM80Config, dtype=jnp.bfloat16):
    """Eight tiles in each direction and 64 steps along K, with a bias."""
    m, n, k = 8 * config.block_m, 8 * config.block_n, 64 * config.block_k
    shapes = [((m, k // 2), dtype), ((m // 2, k // 16), jnp.int32)]
    shapes.append(((k, n) if form.b_is_kn else (n, k), dtype))
    shapes.append(((m if form.bias_along_m else n,), dtype))
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    function = functools.partial(run, form=form, config=config)
    return ahead_of_time.compile_kernel(function, *operands, target=target)


def assert_good(kernel: ahead_of_time.Compiled):
    """Two blocks a multiprocessor: 65,536 registers for 256 threads."""
    assert "mma.sp::ordered_metadata.sync.aligned.m16n8k32" in kernel.ptx
    assert kernel.sass is None or "HMMA.SP.16832.F32" in kernel.sass
    assert kernel.spilled_bytes() == 0
    assert kernel.registers() <= 255


def largest(target: Target) -> SM80Config:
    """The Config of a large product, which is the one that takes most registers."""
    return heuristic_sm80(8192, 8192, 8192, shared_memory_limit(target.capability))


@needs_ampere
@needs_compiler
@pytest.mark.parametrize(
    "target",
    [
        A100,
        H200,
        pytest.param(RTX3090, marks=pytest.mark.slow),
        pytest.param(RTX5090, marks=pytest.mark.slow),
    ],
    ids=lambda target: target.arch,
)
def test_compiles_with_no_gpu(target):
    kernel = compiled(target, FORMS["fprop W24, dgrad W24ᵀ"], largest(target))
    assert_good(kernel)
    assert "ldmatrix.sync.aligned.m8n8.x4.shared" in kernel.ptx
    assert "movmatrix.sync.aligned.m8n8.trans" in kernel.ptx
    by_tma = target.capability >= (9, 0)
    assert ("cp.async.bulk.tensor" in kernel.ptx) == by_tma
    assert ("cp.async.cg.shared.global" in kernel.ptx) != by_tma


@needs_ampere
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layout_compiles(form, out_dtype):
    form = dataclasses.replace(form, activation="gelu", out_dtype=out_dtype)
    kernel = compiled(A100, form, largest(A100))
    assert_good(kernel)
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in kernel.ptx) == form.b_is_kn


@needs_ampere
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [heuristic_sm80(512, 512, 4096), SM80Config(64, 64, 128, 2, m_warps=1)],
    ids=str,
)
def test_other_tiles_compile(config):
    assert_good(compiled(A100, FORMS["fprop x24, wgrad"], config, jnp.float16))


def small(dtype=jnp.bfloat16, pattern="2:4") -> NMCompressed:
    w = jnp.ones((16, 64), dtype)
    mask = nmjax.magnitude_mask(w, pattern, axis=-1)
    return compress(w, mask, pattern, axis=-1)


def test_unavailable_says_why(monkeypatch):
    def reason(a=None, form=None):
        a = a or small()
        return matmul_sm80.unavailable(a, jnp.ones((4, 64), a.dtype), form or Form())

    monkeypatch.setattr(ptx, "JAX_VERSION", (0, 10, 2))
    assert "needs jax 0.11.1 or later" in reason()
    monkeypatch.setattr(ptx, "JAX_VERSION", (0, 11, 2))
    assert "needs an NVIDIA GPU, jax runs on cpu" in reason()
    monkeypatch.setattr(ptx, "capability", lambda: (7, 5))
    assert "needs compute capability 8.0 or later" in reason()
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]:
        monkeypatch.setattr(ptx, "capability", lambda value=capability: value)
        assert reason() is None
    assert "2:4 alone, the operand is 1:4" in reason(small(pattern="1:4"))
    assert "float16 twice, the operands are float32" in reason(small(jnp.float32))
    assert "not int32" in reason(form=Form(out_dtype=jnp.int32))


@pytest.mark.parametrize(
    "a, b", [("float32", "float32"), ("bfloat16", "float16")], ids=str
)
def test_dtypes_that_it_does_not_take_raise(a, b):
    message = f"matmul_sm80: takes bfloat16 or float16 twice, the operands are {a}, {b}"
    with pytest.raises(NotImplementedError, match=message):
        matmul_sm80.gemm(small(a), jnp.ones((4, 64), b), None, Form())


def test_a_b_that_does_not_fit_raises():
    b = jnp.ones((64, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"A \(16, 64\) contracts 64, B .* has 4"):
        matmul_sm80.gemm(small(), b, None, Form(b_is_kn=False))


def test_a_config_that_the_device_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(ptx, "capability", lambda: (8, 6))
    config = SM80Config(128, 128, 64, stages=6)
    with pytest.raises(ValueError, match="shared memory, a block of this device has"):
        b = jnp.ones((4, 64), jnp.bfloat16)
        matmul_sm80.gemm(small(), b, None, Form(), config=config)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_nm_matmul_by_name_raises_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="implementation='sm80': needs"):
        nm_matmul(jnp.ones((4, 64), jnp.bfloat16), small().T, implementation="sm80")


@pytest.mark.gpu
@needs_ampere
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", [(64, 64, 64), (512, 384, 1024), (200, 333, 500)])
def test_on_a_gpu_integers_are_exact(rng, sizes, form):
    """On Hopper and Blackwell too: `mma.sp` is legal there."""
    form = dataclasses.replace(form, activation="relu")
    gemm_suite.check(matmul_sm80.gemm, rng, *sizes, form, with_bias=True)


@pytest.mark.gpu
@needs_ampere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_on_a_gpu_normal_numbers(rng, gemm_atol, dtype, activation):
    form = Form(activation=activation, out_dtype=dtype)
    gemm_suite.check(
        matmul_sm80.gemm,
        rng,
        384,
        512,
        2048,
        form,
        dtype=dtype,
        with_bias=True,
        atol=gemm_atol(dtype, 2048),
    )


@pytest.mark.gpu
@needs_ampere
def test_on_a_gpu_every_run_gives_the_same(rng):
    gemm_suite.check_again_and_again(matmul_sm80.gemm, rng, 1024, 2048, 2048, times=500)


@pytest.mark.gpu
@needs_ampere
@pytest.mark.parametrize("tiles", gemm_suite.TILE_COUNTS, ids=str)
def test_on_a_gpu_any_number_of_tiles(rng, tiles):
    gemm = functools.partial(matmul_sm80.gemm, config=SMALLEST)
    gemm_suite.check(gemm, rng, *(64 * count for count in tiles))

"""The Hopper GEMM: interpreted with race detection, emulated, compiled with no GPU."""

import collections
import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import nmjax
from pallas_kernels import (
    NMCompressed,
    compress,
    matmul_sm90,
    nm_matmul,
    ptx,
)
from pallas_kernels.config import SM90Config, heuristic_sm90
from pallas_kernels.ptx import wgmma
from pallas_kernels.reference import Form
from tests.pallas_kernels import ahead_of_time, emulator, gemm_suite
from tests.pallas_kernels.ptx_memory import canonical_addresses, swizzle

pytestmark = pytest.mark.usefixtures("strict_promotion")

needs_interpreter = pytest.mark.skipif(
    ptx.JAX_VERSION < (0, 11),
    reason="the interpreter of jax 0.10 fails under jit, and knows no edges",
)
needs_compiler = pytest.mark.skipif(
    ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
)

FORMS = gemm_suite.FORMS
SHARED = SM90Config(block_m=128, block_n=64, block_k=64, stages=2)
REGISTERS = dataclasses.replace(SHARED, a_from="registers")
MODES = pytest.mark.parametrize(
    "config", [SHARED, REGISTERS], ids=["shared", "registers"]
)


def interpreted(config: SM90Config):
    return functools.partial(
        matmul_sm90.gemm, config=config, interpret=ptx.interpreter(detect_races=True)
    )


def check_tiles(rng, config: SM90Config, tiles, **kwargs):
    """A product of whole tiles; along M, of whole clusters."""
    blocks = (config.block_m * config.cluster_m, config.block_n, config.block_k)
    sizes = (count * block for count, block in zip(tiles, blocks, strict=True))
    gemm_suite.check(interpreted(config), rng, *sizes, **kwargs)


@needs_interpreter
@MODES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layout_with_bias_and_activation(rng, form, config):
    form = dataclasses.replace(form, activation="squared_relu")
    check_tiles(rng, config, (2, 3, 3), form=form, with_bias=True)


@needs_interpreter
@pytest.mark.slow
@MODES
@pytest.mark.parametrize("cluster_m", [1, 2])
@pytest.mark.parametrize("tiles", gemm_suite.TILE_COUNTS, ids=str)
def test_any_number_of_tiles(rng, config, cluster_m, tiles):
    check_tiles(rng, dataclasses.replace(config, cluster_m=cluster_m), tiles)


@needs_interpreter
@MODES
def test_clusters(rng, config):
    check_tiles(rng, dataclasses.replace(config, cluster_m=2), (2, 1, 3))


@needs_interpreter
@MODES
@pytest.mark.parametrize(
    "form",
    [FORMS["fprop W24, dgrad W24ᵀ"], FORMS["fprop x24, wgrad"]],
    ids=["(N, K)", "(K, N)"],
)
def test_sizes_that_fill_no_tile(rng, form, config):
    """Nor a cluster: its second block has no row at all."""
    config = dataclasses.replace(config, cluster_m=2)
    gemm_suite.check(interpreted(config), rng, 100, 75, 140, form, with_bias=True)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("out_is_nm", [False, True])
def test_float32_out(rng, out_is_nm):
    form = Form(out_is_nm=out_is_nm, activation="relu", out_dtype=jnp.float32)
    gemm_suite.check(interpreted(SHARED), rng, 40, 72, 36, form, with_bias=True)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        # An odd count of slices of D: the slots of the next tile start anew.
        SM90Config(128, 192, 128, stages=2, epilogue_n=64, grid_width=1),
        SM90Config(256, 128, 64, stages=1, epilogue_n=128, a_from="registers"),
        # Of larger tiles the stand-ins want XLA's threads, which four blocks have all.
        SM90Config(128, 64, 128, 2, cluster_m=4, epilogue_n=16, a_from="registers"),
    ],
    ids=str,
)
def test_any_config(rng, config):
    check_tiles(rng, config, (1, 3, 2), form=FORMS["wgrad xᵀ dy24"])


@needs_interpreter
@MODES
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_float16_of_normal_numbers(rng, activation, config, gemm_atol):
    form = Form(activation=activation, out_dtype=jnp.float16, bias_along_m=False)
    atol = gemm_atol("float16", 128)
    tiles = (1, 1, 2)
    kwargs: dict[str, Any] = {"dtype": "float16", "with_bias": True, "atol": atol}
    check_tiles(rng, config, tiles, form=form, **kwargs)


def test_nothing_to_multiply():
    w = jnp.zeros((16, 0), jnp.bfloat16)
    a = compress(w, jnp.ones(w.shape, bool), axis=-1)
    b = jnp.ones((3, 0), jnp.bfloat16)
    out = matmul_sm90.gemm(a, b, None, Form(), interpret=ptx.interpreter())
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.zeros((3, 16)))


@pytest.mark.parametrize("multiprocessors", [132, 114, 78, 18, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_clusters_that_run_at_once(multiprocessors, size):
    """As few as the worst floor plan of eight GPCs, of up to nine pairs each, takes."""
    fewest = {0: 0}  # clusters that fit, by the multiprocessors of the GPCs so far
    for _ in range(8):
        grown = collections.defaultdict(list)
        for (count, fit), gpc in itertools.product(fewest.items(), range(0, 19, 2)):
            grown[count + gpc].append(fit + gpc // size)
        fewest = {count: min(fits) for count, fits in grown.items()}
    expected = max(1, fewest[multiprocessors])
    assert matmul_sm90.clusters_at_once(multiprocessors, size) == expected


@pytest.fixture
def without_caches():
    """A kernel that a test breaks must neither come from a cache nor stay in one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@needs_interpreter
@MODES
@pytest.mark.parametrize("fault", ["a missing fence", "a stage let go too early"])
def test_a_race_in_the_pipeline_is_found(
    rng, fault, config, monkeypatch, without_caches
):
    if fault == "a missing fence":
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    else:
        waits = []  # done only when the stage has been let go
        wait, arrive = wgmma.wgmma_wait, plgpu.barrier_arrive

        def postpone(acc, *rest):
            waits.append((acc, *rest))
            return acc

        def arrive_before_waiting(barrier):
            arrive(barrier)
            wait(*waits.pop())

        monkeypatch.setattr(wgmma, "wgmma_wait", postpone)
        monkeypatch.setattr(plgpu, "barrier_arrive", arrive_before_waiting)
    with pytest.raises(jax.errors.JaxRuntimeError, match="has a race|RACE DETECTED"):
        check_tiles(rng, config, (1, 1, 5))


@needs_interpreter
def test_swapped_halves_of_a_word_give_another_product(
    rng, monkeypatch, without_caches
):
    correct = wgmma.fragments

    def swapped(a):
        values, metadata = correct(a)
        halves = jax.lax.bitcast_convert_type(metadata, jnp.int16)
        return values, jax.lax.bitcast_convert_type(halves[..., ::-1], jnp.int32)

    monkeypatch.setattr(wgmma, "fragments", swapped)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check_tiles(rng, REGISTERS, (1, 1, 1))


@pytest.mark.parametrize("fault", [None, "selector", "steps"])
def test_a_from_registers_by_the_emulator(rng, fault):
    """`fragments` gives the threads what the PTX ISA says that they hold."""
    m, n, k = 128, 16, 128
    w = rng.integers(-8, 9, (m, k)).astype(np.float32)
    b = rng.integers(-8, 9, (k, n)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    values, words = (np.asarray(x) for x in wgmma.fragments(a))
    for i in range(m // 64):
        acc = np.zeros((128, n // 2))
        for step in range(k // 32):
            acc = emulator.wgmma_sp(
                values[i, step ^ (fault == "steps")].reshape(128, 8),
                b[32 * step : 32 * step + 32],
                acc,
                words[i, step // 2].view(np.uint32),
                step % 2 ^ (fault == "selector"),
            )
        rows, columns = emulator.c_positions()
        out = np.zeros((4, 16, n))
        for j in range(n // 8):
            tile = acc[:, 4 * j : 4 * j + 4].reshape(4, 32, 4)
            out[:, rows, 8 * j + columns] = tile
        expected = np.where(mask, w, 0)[64 * i : 64 * i + 64] @ b
        assert np.array_equal(out.reshape(64, n), expected) == (fault is None)


@dataclasses.dataclass
class Issued:
    """What a lowered `wgmma_sp` gives to its instructions."""

    matrices: list[dict]  # a descriptor's leading and stride offset and swizzle
    offsets: list[int]  # bytes from the matrix's start, of A and B in turn
    selectors: list[int]
    flags: list[str]


def issue(monkeypatch, m: int, n: int, k: int, b_is_nk: bool) -> Issued:
    """Lowers one `wgmma_sp` with A in shared memory; needs no GPU's compiler."""
    issued = Issued([], [], [], [])
    encode, descriptor = wgmma.mma_utils.encode_descriptor, wgmma._descriptor
    instruction = wgmma._wgmma_sp_instruction

    def record_encode(ref, **fields):
        issued.matrices.append(fields)
        return encode(ref, **fields)

    def record_descriptor(start, offset):
        issued.offsets.append(offset)
        return descriptor(start, offset)

    def record_instruction(*operands, **static):
        issued.selectors.append(static["selector"])
        issued.flags.append(static["flags"])
        return instruction(*operands, **static)

    monkeypatch.setattr(wgmma.mma_utils, "encode_descriptor", record_encode)
    monkeypatch.setattr(wgmma, "_descriptor", record_descriptor)
    monkeypatch.setattr(wgmma, "_wgmma_sp_instruction", record_instruction)

    def body(words_gmem, out_gmem, a_smem, b_smem):
        acc = plgpu.layout_cast(jnp.zeros((m, n), jnp.float32), wgmma.WGMMA_ACC)
        words = ptx.load(words_gmem, ptx.metadata_layout())
        acc = wgmma.wgmma_sp(acc, a_smem, words, b_smem, b_is_nk=b_is_nk)
        acc = wgmma.wgmma_wait(acc, (a_smem, b_smem))
        out_gmem[...] = plgpu.layout_cast(acc, wgmma.WGMMA)

    def smem(*shape):
        transforms = ptx.swizzled(shape[-1], jnp.bfloat16)
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    kernel = ptx.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        scratch_types=[smem(m, k // 2), smem(*((n, k) if b_is_nk else (k, n)))],
    )
    words = jax.ShapeDtypeStruct((m // 2, k // 16), jnp.int32)
    jax.jit(kernel).trace(words).lower(lowering_platforms=("cuda",))
    return issued


def in_shared_memory(x: np.ndarray, width: int) -> np.ndarray:
    """A 16-bit matrix as TMA stores it: tiles of 8 rows of `width` bytes, swizzled."""
    rows, columns = x.shape
    tiles = x.reshape(rows // 8, 8, 2 * columns // width, width // 2)
    linear = tiles.transpose(0, 2, 1, 3).ravel()
    memory = np.empty_like(linear)
    memory[swizzle(2 * np.arange(linear.size), width) // 2] = linear
    return memory


def read(memory, rows: int, columns: int, start: int, matrix: dict, k_major: bool):
    """`rows` × `columns` 16-bit elements (columns along k) by a descriptor."""
    width = int(matrix["swizzle"])
    addresses = canonical_addresses(
        rows,
        columns,
        matrix["leading_byte_offset"],
        matrix["stride_byte_offset"],
        width,
        k_major=k_major,
    )
    return memory[swizzle(start + addresses, width) // 2]


@pytest.mark.parametrize("b_is_nk", [True, False], ids=["(N, K)", "(K, N)"])
@pytest.mark.parametrize("m, n, k", [(64, 64, 64), (128, 128, 128), (64, 256, 64)])
def test_the_descriptors_name_what_the_instruction_multiplies(
    monkeypatch, m, n, k, b_is_nk
):
    """64 bytes of B a step along k, twice those of a dense instruction."""
    issued = issue(monkeypatch, m, n, k, b_is_nk)
    by_operand = {"A": issued.offsets[::2], "B": issued.offsets[1::2]}
    a_matrix, b_matrix = issued.matrices
    values = np.arange(m * k // 2, dtype=np.uint16).reshape(m, k // 2)
    b = np.arange(n * k, dtype=np.uint16).reshape(n, k)
    a_memory = in_shared_memory(values, min(128, k))
    b_memory = in_shared_memory(b if b_is_nk else np.ascontiguousarray(b.T), 128)
    steps = list(itertools.product(range(0, m, 64), range(0, k, 32)))
    assert issued.selectors == [kk // 32 % 2 for _, kk in steps]
    assert set(issued.flags) == {f"0, {int(not b_is_nk)}"}
    for (i, kk), a_start, b_start in zip(
        steps, by_operand["A"], by_operand["B"], strict=True
    ):
        np.testing.assert_array_equal(
            read(a_memory, 64, 16, a_start, a_matrix, k_major=True),
            values[i : i + 64, kk // 2 : kk // 2 + 16],
        )
        np.testing.assert_array_equal(
            read(b_memory, n, 32, b_start, b_matrix, k_major=b_is_nk),
            b[:, kk : kk + 32],
        )


def run(values, metadata, b, bias, *, form: Form, config: SM90Config):
    a = NMCompressed(values, metadata, axis=-1)
    return matmul_sm90.gemm(a, b, bias, form, config=config)


def compiled(form: Form, config: SM90Config, sizes=None, dtype=jnp.bfloat16):
    m, n, k = sizes or (16 * config.block_m, 16 * config.block_n, 1024)
    words = (8 * -(-m // 16), 4 * -(-k // 64))
    shapes = [((m, k // 2), dtype), (words, jnp.int32)]
    shapes.append(((k, n) if form.b_is_kn else (n, k), dtype))
    shapes.append(((m if form.bias_along_m else n,), dtype))
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    function = functools.partial(run, form=form, config=config)
    kernel = ahead_of_time.compile_kernel(
        function, *operands, target=ahead_of_time.H200
    )
    assert_good(kernel, config)
    return kernel


def assert_good(kernel: ahead_of_time.Compiled, config: SM90Config):
    n = config.block_n
    assert f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32." in kernel.ptx
    assert ("multicast::cluster" in kernel.ptx) == (config.cluster_m > 1)
    assert kernel.spilled_bytes() == 0
    # 65,536 registers for 384 threads, of which those that multiply then get more.
    assert kernel.registers() <= 168
    assert "setmaxnreg.inc.sync.aligned.u32 232" in re.sub(r"\s+", " ", kernel.ptx)
    # ptxas says so where it has to run the instructions one after another.
    assert "C7510" not in kernel.report and "serializ" not in kernel.report
    if kernel.sass is None:
        return
    operands = {"shared": "gdesc[", "registers": "R"}[config.a_from]
    lines = [line.split("*/")[-1].strip() for line in kernel.sass.splitlines()]
    products = [line.split(", ")[1] for line in lines if "HGMMA.SP" in line]
    assert products and all(operand.startswith(operands) for operand in products)
    assert not overwritten_operands(lines)


def overwritten_operands(lines: list[str]) -> list[str]:
    """Instructions that may write metadata or A of a product which has not ended.

    ptxas takes a register for free once the product is issued; CUTLASS never has two
    sparse groups in flight. A branch back before the end counts, whatever it leads to.
    """
    offending, in_use, passed = [], set(), set()
    for line in lines:
        if label := re.fullmatch(r"(\.L_\w+):", line):
            passed.add(label[1])
        if metadata := re.search(r"HGMMA\.SP.*, R(\d+), 0x[01]\b", line):
            in_use.add(int(metadata[1]))
            if a := re.search(r"HGMMA\.SP\S* R\d+, R(\d+)", line):
                in_use |= {*range(int(a[1]), int(a[1]) + 4)}
        elif line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"):
            in_use = set()
        elif in_use and (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)):
            offending += [line] if jump[1] in passed else []
        elif written := re.match(r"(?:@!?U?P\w+ )?(\S+) (?:P\w+, )?R(\d+),", line):
            name, first = written[1], int(written[2])
            wide = re.search(r"\.(?:M88\.)?(2|4|64|128)\b", name)
            count = {"2": 2, "4": 4, "64": 2, "128": 4}[wide[1]] if wide else 1
            if in_use & {*range(first, first + count)}:
                offending.append(line)
    return offending


def test_overwritten_operands_are_found():
    product = "HGMMA.SP.64x256x32.F32.BF16 R24, gdesc[UR16], R24, R153, 0x1, gsb0 ;"
    load, end = "LDSM.16.M88.2 R152, [R7] ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    back = "@P2 BRA `(.L_x_10) ;"
    assert not overwritten_operands([".L_x_10:", load, product, end, back])
    assert overwritten_operands([product, load, end]) == [load]
    one = end.replace("0x0", "0x1")
    assert overwritten_operands([".L_x_10:", load, product, one, back]) == [back]
    product = product.replace("gdesc[UR16]", "R12, gdesc[UR16]")
    move = "MOV R15, R40 ;"
    assert overwritten_operands([move, product, move, end, move]) == [move]


@needs_compiler
@pytest.mark.parametrize(
    "config",
    [
        SM90Config(128, 256, 64, stages=4, cluster_m=2),
        SM90Config(256, 128, 64, stages=6, cluster_m=2, a_from="registers"),
    ],
    ids=["shared", "registers"],
)
def test_compiles_with_no_gpu(config):
    compiled(FORMS["fprop W24, dgrad W24ᵀ"], config)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, out_dtype",
    [
        *itertools.product(FORMS, [jnp.bfloat16, jnp.float32]),
        ("fprop W24, dgrad W24ᵀ", jnp.float16),
    ],
)
def test_every_layout_compiles(name, out_dtype):
    form = dataclasses.replace(FORMS[name], activation="gelu", out_dtype=out_dtype)
    dtype = jnp.float16 if out_dtype == jnp.float16 else jnp.bfloat16
    b = jnp.ones((4, 64), dtype)
    if reason := matmul_sm90._unsupported(small(dtype), b, form):
        pytest.skip(reason)
    kernel = compiled(form, SM90Config(128, 128, 64, stages=4), dtype=dtype)
    assert f".f32.{'f16.f16' if dtype == jnp.float16 else 'bf16.bf16'}" in kernel.ptx
    # 16 bits take stmatrix and the hardware's tanh.
    assert ("stmatrix" in kernel.ptx) == (jnp.dtype(out_dtype).itemsize == 2) or (
        ptx.JAX_VERSION < (0, 11)
    )
    assert ("tanh.approx.f32" in kernel.ptx) == (out_dtype != jnp.float32)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, name",
    [((1000, 44_161, 340), "fprop W24, dgrad W24ᵀ"), ((64, 8, 64), "fprop x24, wgrad")],
    ids=str,
)
@MODES
def test_sizes_that_fill_no_tile_compile(sizes, name, config):
    compiled(FORMS[name], config, sizes)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        SM90Config(256, 128, 128, 3, cluster_m=4, epilogue_n=128, a_from="registers"),
        SM90Config(128, 192, 128, 2, epilogue_n=32),
        SM90Config(256, 128, 64, 4),
        heuristic_sm90(1024, 44_160, 4096),
        heuristic_sm90(512, 512, 4096),
    ],
    ids=str,
)
def test_other_tiles_compile(config):
    compiled(FORMS["wgrad xᵀ dy24"], config)


def small(dtype=jnp.bfloat16, pattern="2:4") -> NMCompressed:
    w = jnp.ones((16, 64), dtype)
    mask = nmjax.magnitude_mask(w, pattern, axis=-1)
    return compress(w, mask, pattern, axis=-1)


def test_unavailable_says_why(monkeypatch):
    def reason(a=None, form=None):
        a = a or small()
        b = jnp.ones((4, 64), a.dtype)
        return matmul_sm90.unavailable(a, b, form or Form())

    monkeypatch.setattr(ptx, "capability", lambda: None)
    assert "needs a Hopper GPU, jax runs on" in reason()
    for capability in [(8, 0), (10, 0), (12, 0)]:
        monkeypatch.setattr(ptx, "capability", lambda value=capability: value)
        assert f"this device has {capability[0]}.0" in reason()
    monkeypatch.setattr(ptx, "capability", lambda: (9, 0))
    assert reason() is None
    assert "2:4 alone, the operand is 1:4" in reason(small(pattern="1:4"))
    said = reason(small(jnp.float32))
    assert "takes bfloat16 or float16 twice, the operands are float32, float32" in said
    assert "not int32" in reason(form=Form(out_dtype=jnp.int32))
    monkeypatch.setattr(ptx, "JAX_VERSION", (0, 10, 2))
    assert reason() is None
    assert "as (N, M) needs jax 0.11" in reason(form=Form(out_dtype=jnp.float32))


def test_operands_that_it_does_not_take_raise():
    with pytest.raises(NotImplementedError, match="matmul_sm90: takes bfloat16"):
        matmul_sm90.gemm(
            small(jnp.float32),
            jnp.ones((4, 64)),
            None,
            Form(),
            interpret=ptx.interpreter(),
        )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it may run")
def test_nm_matmul_by_name_raises_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="implementation='sm90': needs a"):
        nm_matmul(jnp.ones((4, 64), jnp.bfloat16), small().T, implementation="sm90")


needs_hopper = pytest.mark.skipif(
    jax.default_backend() == "gpu" and ptx.capability() != (9, 0),
    reason="needs compute capability 9.0",
)
GPU_CONFIGS = pytest.mark.parametrize(
    "config",
    [
        None,
        SHARED,
        REGISTERS,
        SM90Config(128, 256, 64, stages=4, cluster_m=2),
        SM90Config(256, 128, 64, stages=6, cluster_m=2, a_from="registers"),
        SM90Config(256, 128, 128, 3, cluster_m=4, epilogue_n=128, a_from="registers"),
    ],
    ids=str,
)


@pytest.mark.gpu
@needs_hopper
@GPU_CONFIGS
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "sizes", [(64, 64, 64), (1024, 4416, 4096), (200, 333, 500)], ids=str
)
def test_on_a_gpu_integers_are_exact(rng, sizes, form, config):
    form = dataclasses.replace(form, activation="relu")
    gemm = functools.partial(matmul_sm90.gemm, config=config)
    gemm_suite.check(gemm, rng, *sizes, form, with_bias=True)


@pytest.mark.gpu
@needs_hopper
@GPU_CONFIGS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_on_a_gpu_normal_numbers(rng, gemm_atol, dtype, activation, config):
    form = Form(activation=activation, out_dtype=dtype)
    kwargs: dict[str, Any] = {"with_bias": True, "atol": gemm_atol(dtype, 2048)}
    gemm = functools.partial(matmul_sm90.gemm, config=config)
    gemm_suite.check(gemm, rng, 1024, 4416, 2048, form, dtype=dtype, **kwargs)


@pytest.mark.gpu
@needs_hopper
@GPU_CONFIGS
def test_on_a_gpu_every_run_gives_the_same(rng, config):
    gemm = functools.partial(matmul_sm90.gemm, config=config)
    gemm_suite.check_again_and_again(gemm, rng, 1024, 4416, 4096, times=500)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_on_a_gpu_float32_out(rng, form):
    form = dataclasses.replace(form, activation="gelu", out_dtype=jnp.float32)
    gemm_suite.check(matmul_sm90.gemm, rng, 512, 1024, 2048, form, atol=0.2)

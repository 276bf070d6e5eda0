"""Inline PTX, register layouts and private jax names: the only file that knows them.

Two instructions multiply a 2:4 compressed A by a dense B, float16 or bfloat16, with a
float32 accumulator (PTX ISA, "Multiply-and-accumulate with a sparse matrix A"):

    mma.sp::ordered_metadata.m16n8k32    a warp; operands in registers; sm_80 and later
    wgmma.mma_async.sp.m64nNk32          four warps; B in shared memory; sm_90a only

Both take the metadata words of `format.py`: the word at (8b + g, 4s + t) belongs to
lane 4g + t of the warp that owns rows 16b to 16b + 15. Of the four lanes of a row,
selector 0 reads t = 0 and 1 (columns 0 to 31 of 64), selector 1 reads t = 2 and 3: one
register serves two instructions along k.

Where jax differs between versions, the difference is here: 0.10.2 has no interpreter
parameters in public and no Ampere; 0.11 has both.
"""

import contextvars
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params
from jax.experimental import io_callback
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm, vector

from pallas_kernels.format import NMCompressed, decompress

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])

# Mosaic lowers for Ampere (cp.async, no elect.sync) from this version on.
AMPERE_SINCE = (0, 11, 1)

# Mosaic stores 32 bits transposed, one element at a time, from this version on.
TRANSPOSED_FLOAT32_SINCE = (0, 11)

# An accumulator that instructions in flight may write: reading it takes `wgmma_wait`.
WGMMA_ACC = plgpu.Layout._WGMMA_ACC_32BIT
WGMMA = plgpu.Layout.WGMMA


def _device() -> Any:
    """The device that jax runs on by default."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return chosen or jax.devices()[0]


def capability() -> tuple[int, int] | None:
    """Compute capability of the device that jax runs on by default; None if no GPU."""
    device = _device()
    if not isinstance(device, jax.Device) or device.platform not in ("gpu", "cuda"):
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def multiprocessors() -> int:
    """Multiprocessors of the device that jax runs on by default."""
    return _device().core_count


# Whether the kernel that is being traced will be interpreted.
_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


def kernel(
    body: Callable, *, name: str | None = None, interpret: Any = None, **kwargs
) -> Callable:
    """`plgpu.kernel` with lane semantics, under which inline PTX may be used.

    Args:
      body: As for `plgpu.kernel`.
      name: What profiles call the kernel.
      interpret: What `interpreter` made, to run on the CPU; None to compile.
      **kwargs: As for `plgpu.kernel`; `compiler_params` as a dictionary.
    """
    params = plgpu.CompilerParams(
        lowering_semantics=mgpu.LoweringSemantics.Lane,
        **kwargs.pop("compiler_params", {}),
    )
    if interpret is not None:
        kwargs["interpret"] = interpret

    def traced(*refs, **scratch):
        token = _INTERPRETED.set(interpret is not None)
        try:
            body(*refs, **scratch)
        finally:
            _INTERPRETED.reset(token)

    run = plgpu.kernel(traced, kernel_name=name, compiler_params=params, **kwargs)
    return run if interpret is None else lambda *operands: _judged(run(*operands))


def _judged(out: Any) -> Any:
    """What an interpreted kernel returned; a race, else only printed, raises."""

    def judge(*leaves):
        if interpret_pallas_call.get_races().races_found:
            raise RuntimeError("the interpreted kernel has a race, printed above")
        return leaves

    leaves, tree = jax.tree.flatten(out)
    # Ordered, hence after the interpreter has cleaned up.
    leaves = io_callback(judge, leaves, *leaves, ordered=True)
    return jax.tree.unflatten(tree, leaves)


def interpreter(detect_races: bool = True) -> Any:
    """Parameters of Pallas' GPU interpreter, in which a race raises."""
    return interpret_params.InterpretGPUParams(detect_races=detect_races)


def load(ref: Any, layout: Any) -> jax.Array:
    """A register array in `layout` from shared or global memory."""
    if _INTERPRETED.get():
        return ref[...]
    index = (None,) if JAX_VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store_transposed(ref: Any, x: jax.Array) -> None:
    """Stores the transpose of an array in `WGMMA`, by stmatrix where it has 16 bits.

    Args:
      ref: (N, M) in shared memory, `swizzled`.
      x: (M, N), 16 or 32 bits.
    """
    if not _INTERPRETED.get():
        if x.dtype.itemsize == 4:  # the layout of single elements
            x = plgpu.layout_cast(x, WGMMA_ACC)
        elif JAX_VERSION < (0, 11):
            x = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    ref.T[...] = x


def release_smem() -> None:
    """Ends the reads of shared memory that an asynchronous copy may then overwrite.

    TMA, from capability 9.0 on and in the interpreter, has to be told; for cp.async the
    barrier that Mosaic puts before each copy is enough.
    """
    if (capability() or (9, 0)) >= (9, 0):
        plgpu.commit_smem()


def _instruction(name: str, meaning: Callable, lower: Callable) -> Primitive:
    """An operation on register arrays with two lowerings, so that a kernel is one body.

    Args:
      name: Of the primitive.
      meaning: What the instruction computes, in jnp: what Pallas' interpreter runs.
      lower: The same of Mosaic's `FragmentedArray`s, emitting PTX.
    """
    primitive = Primitive(name)

    @primitive.def_abstract_eval
    def abstract(*operands, **params):
        out = jax.eval_shape(functools.partial(meaning, **params), *operands)
        return operands[0].update(shape=out.shape, dtype=out.dtype)

    stand_in = mlir.lower_fun(meaning, multiple_results=False)
    mlir.register_lowering(primitive, stand_in, platform="cpu")

    @lowering.register_lowering_rule(primitive, mgpu.LoweringSemantics.Lane)
    def rule(ctx, *operands, **params):
        del ctx
        return lower(*operands, **params)

    return primitive


def metadata_layout(m_warps: int = 4) -> Any:
    """Metadata words `(M/2, K/16)`, lane 4g + t holding the word (8b + g, 4s + t).

    Args:
      m_warps: Of the four warps, how many lie along M; the others repeat the words.
    """
    warps = (-5, fa.Replicated(4 // m_warps)) if m_warps < 4 else (-5,)
    return plgpu.Layout.TILED(
        fa.Tiling(((m_warps * 8, 4), (8, 4), (1,))),
        warp_dims=warps,
        lane_dims=(-3, -2),
        vector_dim=-1,
        _check_canonical=False,
    )


def mma_layouts(dtype: Any, m_warps: int) -> tuple[Any, Any, Any]:
    """Layouts of the values, of B and of the accumulator of `mma_sp`."""
    layout: Any = plgpu.Layout  # which has these from jax 0.11 on
    return (
        layout.MMA_LHS(dtype, m_warps=m_warps),
        layout.MMA_RHS(dtype, m_warps=m_warps),
        layout.MMA_ACC(dtype, m_warps=m_warps),
    )


def thread_layout(warps: Sequence[int], lanes: Sequence[int], vector: int = 1) -> Any:
    """A thread holds a row: vectors along the last axis of one tile of threads.

    Args:
      warps: How many warps lie along each axis but the last: 4 together.
      lanes: How many lanes of a warp lie along them: 32 together.
      vector: Entries of a vector, which is what one instruction loads or stores.
    """
    rank = len(lanes) + 1
    tile = (*(w * n for w, n in zip(warps, lanes, strict=True)), vector)
    return plgpu.Layout.TILED(
        fa.Tiling((tile, (*lanes, vector))),
        warp_dims=tuple(-2 * rank + axis for axis, w in enumerate(warps) if w > 1),
        lane_dims=tuple(-rank + axis for axis in range(rank - 1)),
        vector_dim=-1,
        _check_canonical=False,
    )


def regroup(*arrays: jax.Array, layout: Any) -> jax.Array:
    """The arrays joined along the last axis, cut into vectors of another length.

    Nothing leaves its thread: all layouts are `thread_layout`s of the same threads, of
    which each axis but the last has one tile.
    """
    return _REGROUP.bind(*arrays, layout=layout)


def _regroup(*arrays, layout):
    layout = layout.to_mgpu()
    scalars = [s for array in arrays for s in _scalars(array.registers.flat)]
    shape = (*arrays[0].shape[:-1], sum(array.shape[-1] for array in arrays))
    length = layout.vector_length
    vectors = [_vector(scalars[i : i + length]) for i in range(0, len(scalars), length)]
    return fa.FragmentedArray(
        _registers=_as_array(vectors, layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=arrays[0].is_signed,
    )


_REGROUP = _instruction(
    "regroup", lambda *arrays, layout: jnp.concatenate(arrays, axis=-1), _regroup
)


def mma_sp(
    acc: jax.Array, a: jax.Array, b: jax.Array, metadata: jax.Array, *, m_warps: int
) -> jax.Array:
    """`acc + A24 · B` by `mma.sp::ordered_metadata.m16n8k32`, all in registers.

    Args:
      acc: float32 (M, N), M a multiple of 16 m_warps, N of 8 (4 / m_warps); here and
        below in `mma_layouts`.
      a: Values (M, K/2), float16 or bfloat16; K a multiple of 64.
      b: (K, N), the dtype of `a`.
      metadata: int32 (M/2, K/16) in `metadata_layout(m_warps)`.
      m_warps: Of the four warps, how many lie along M; the others lie along N.

    Returns:
      The new accumulator.
    """
    return _MMA_SP.bind(acc, a, b, metadata, m_warps=m_warps)


def _mma_sp_meaning(acc, a, b, metadata, *, m_warps: int):
    del m_warps
    dense = decompress(NMCompressed(a, metadata, axis=-1))
    return acc + jnp.dot(dense, b, preferred_element_type=jnp.float32)


def _mma_sp(acc, a, b, metadata, *, m_warps: int):
    m, n = acc.shape
    k = b.shape[0]
    tile_m, tile_n = 16 * m_warps, 8 * (4 // m_warps)
    acc = acc.copy()
    # Instructions that follow each other write different accumulators.
    for kk, i in itertools.product(range(0, k, 32), range(0, m, tile_m)):
        values = _words(a[i : i + tile_m, kk // 2 : kk // 2 + 16].registers.flat)
        words = metadata[i // 2 : (i + tile_m) // 2, kk // 64 * 4 : kk // 64 * 4 + 4]
        (word,) = _scalars(words.registers.flat)
        for j in range(0, n, tile_n):
            tile = acc[i : i + tile_m, j : j + tile_n]
            halves = (b[kk + h : kk + h + 16, j : j + tile_n] for h in (0, 16))
            registers = _mma_sp_instruction(
                _scalars(tile.registers.flat),
                values,
                [pair for half in halves for pair in _words(half.registers.flat)],
                word,
                selector=kk // 32 % 2,
                dtype=str(a.mlir_dtype),
            )
            pairs = [_vector(registers[:2]), _vector(registers[2:])]
            acc[i : i + tile_m, j : j + tile_n] = fa.FragmentedArray(
                _registers=_as_array(pairs, tile.registers.shape),
                _layout=acc.layout,
                _is_signed=None,
            )
    return acc


def _mma_sp_instruction(acc, a, b, word, *, selector: int, dtype: str):
    """One warp's 16×8 tile: four f32, four and four 32-bit pairs, one word."""
    f32 = ir.F32Type.get()
    text = (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}"
        ".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, "
        f"$16, {selector};"
    )
    out: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *acc, word],
        text,
        "=f,=f,=f,=f," + "r," * 8 + "f,f,f,f,r",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]


_MMA_SP = _instruction("mma_sp", _mma_sp_meaning, _mma_sp)


def transpose_acc(x: jax.Array, *, m_warps: int) -> jax.Array:
    """The transpose of a tile of D, in registers: by movmatrix where it has 16 bits.

    Args:
      x: (M, N) in the layout of an accumulator of `mma_sp`, 16 or 32 bits.
      m_warps: As of `mma_sp`.

    Returns:
      (N, M); of 16 bits, a thread holds pairs along M, of 32 bits, single elements.
    """
    return _TRANSPOSE_ACC.bind(x, m_warps=m_warps)


def _transpose_acc(x, *, m_warps: int):
    m, n = x.shape
    tile_m, tile_n = 16 * m_warps, 8 * (4 // m_warps)
    element, is_wide = x.mlir_dtype, utils.bitwidth(x.mlir_dtype) == 32
    # As MMA_ACC with rows and columns exchanged; 32 bits stay in their thread.
    layout = fa.TiledLayout(
        fa.Tiling(
            ((tile_n, tile_m), (8, 16), (8, 8), (2, 1) if is_wide else (1, 2)),
        ),
        warp_dims=(-7, -8),
        lane_dims=(-3, -4) if is_wide else (-4, -3),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    out = fa.FragmentedArray.splat(utils.c(0.0, element), (n, m), layout)
    for i, j in itertools.product(range(0, m, tile_m), range(0, n, tile_n)):
        registers = x[i : i + tile_m, j : j + tile_n].registers.flat
        if is_wide:
            registers = [_vector([scalar]) for scalar in _scalars(registers)]
        else:
            registers = [_movmatrix(register) for register in registers]
        out[j : j + tile_n, i : i + tile_m] = fa.FragmentedArray(
            _registers=_as_array(registers, layout.registers_shape((tile_n, tile_m))),
            _layout=layout,
            _is_signed=None,
        )
    return out


def _movmatrix(register):
    """The transpose of an 8×8 matrix of 16 bits, of which a lane holds a pair."""
    i32 = ir.IntegerType.get_signless(32)
    (word,) = _words([register])
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    out: Any = llvm.inline_asm(i32, [word], text, "=r,r")
    return utils.bitcast(out, register.type)


_TRANSPOSE_ACC = _instruction("transpose_acc", lambda x, m_warps: x.T, _transpose_acc)


# The order in which the registers of `wgmma_sp` take A from global memory: each thread
# 16 bytes of values for an instruction, and a word for two.
FRAGMENT = plgpu.Layout.WG_STRIDED((1024,), vec_size=8)
FRAGMENT_METADATA = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def fragments(a: NMCompressed) -> tuple[jax.Array, jax.Array]:
    """A in the order of the registers of `wgmma_sp`: one pass over values and metadata.

    Of 64 rows and the 16 values of 32 columns, thread 32w + 4g + t takes rows 16w + g
    and 16w + g + 8, values 2t, 2t + 1, 2t + 8 and 2t + 9: the fragment of A of mma
    m16n8k16.

    Args:
      a: 2:4 with `axis=-1`, the rows a multiple of 64 and K of 64.

    Returns:
      Values (M/64, K/32, 1024) and metadata (M/64, K/64, 128).
    """
    m, half = a.values.shape
    tiles = a.values.reshape(m // 64, 4, 2, 8, half // 16, 2, 4, 2)
    values = tiles.transpose(0, 4, 1, 3, 6, 5, 2, 7).reshape(m // 64, half // 16, 1024)
    words = a.metadata.reshape(m // 64, 32, half // 32, 4)
    return values, words.transpose(0, 2, 1, 3).reshape(m // 64, half // 32, 128)


def _from_fragments(values: jax.Array, metadata: jax.Array) -> NMCompressed:
    """The inverse of `fragments`."""
    rows, steps, _ = values.shape
    tiles = values.reshape(rows, steps, 4, 8, 4, 2, 2, 2)
    tiles = tiles.transpose(0, 2, 6, 3, 1, 5, 4, 7).reshape(64 * rows, 16 * steps)
    words = metadata.reshape(rows, steps // 2, 32, 4)
    words = words.transpose(0, 2, 1, 3).reshape(32 * rows, 2 * steps)
    return NMCompressed(tiles, words, axis=-1)


def swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """How TMA and `wgmma_sp` want a matrix in shared memory: as transforms of its ref.

    Tiles of 8 rows by as many bytes as the widest swizzle that divides a row.
    """
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    tile = (8, 8 * swizzle // bits)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)


def wgmma_sp(
    acc: jax.Array, a: Any, metadata: Any, b: Any, *, b_is_nk: bool = True
) -> jax.Array:
    """Starts `acc += A24 · B` by `wgmma.mma_async.sp.m64nNk32`.

    The instructions are one committed group. Until `wgmma_wait` has waited for it, the
    accumulator, `a`, `b` and metadata in registers must stay as they are. The stand-in
    of the interpreter computes at once.

    Args:
      acc: float32 (M, N) in `WGMMA_ACC`, M a multiple of 64.
      a: Values (M, K/2) in shared memory, `swizzled`; or the list of M/64 · K/32 arrays
        in `FRAGMENT`, k innermost.
      metadata: int32 (M/2, K/16) in `metadata_layout()`; or the list of M/64 · K/64
        arrays in `FRAGMENT_METADATA`, k innermost.
      b: `(N, K)` in shared memory where `b_is_nk`, else `(K, N)`; `swizzled`, by 128
        bytes.
      b_is_nk: The order of the axes of `b`.

    Returns:
      The accumulator, still being written.
    """
    in_registers = isinstance(a, list)
    if _INTERPRETED.get():
        if in_registers:
            rows = acc.shape[0] // 64
            stacks = (jnp.stack(x).reshape(rows, -1, x[0].size) for x in (a, metadata))
            matrix = _from_fragments(*stacks)
        else:
            matrix = NMCompressed(a[...], metadata, axis=-1)
        contract = ((1,), (1 if b_is_nk else 0,))
        return acc + lax.dot_general(
            decompress(matrix),
            b[...],
            (contract, ((), ())),
            preferred_element_type=jnp.float32,
        )

    def run(ctx, acc, a, metadata, b):
        del ctx
        b = mgpu.memref_transpose(b, (1, 0, 3, 2)) if b_is_nk else b
        operand = _a_in_registers if in_registers else _a_in_shared_memory
        return _wgmma_sp(acc, *operand(a, metadata, b), b)

    b_type = plgpu.RefType(swizzled(b.shape[-1], b.dtype))
    if in_registers:
        a_type, words_type = [FRAGMENT] * len(a), [FRAGMENT_METADATA] * len(metadata)
    else:
        a_type = plgpu.RefType(swizzled(a.shape[-1], a.dtype))
        words_type = metadata_layout()
    arguments = (WGMMA_ACC, a_type, words_type, b_type)
    return _inline(run, acc, a, metadata, b, arguments=arguments)


def wgmma_wait(acc: jax.Array, pending: int, finished: Sequence[Any]) -> jax.Array:
    """Waits until at most `pending` committed groups of `wgmma_sp` are running.

    Args:
      acc: The accumulator.
      pending: How many groups may still run.
      finished: The shared memory that the groups waited for have read. They may read
        it until now, so now is when the interpreter reads it once more: a write in
        between is a race that it finds. The fence makes these reads, which the
        instruction would do through the asynchronous proxy, precede those of TMA.
    """
    if _INTERPRETED.get():
        for ref in finished:
            ref[...]
        plgpu.commit_smem()
        return acc

    def run(ctx, acc):
        del ctx
        nvvm.wgmma_wait_group_sync_aligned(pending)
        return fa.optimization_barrier(acc)

    return _inline(run, acc, arguments=(WGMMA_ACC,))


def _inline(run: Callable, acc: jax.Array, *rest, arguments: tuple) -> jax.Array:
    """Runs `run(ctx, acc, *rest)`, which returns an accumulator."""
    out = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA_ACC)
    return plgpu.inline_mgpu(arg_types=arguments, return_type=out)(run)(acc, *rest)


def _a_in_shared_memory(a, metadata, b) -> tuple[Callable, Callable]:
    """The operands of the instruction at row i and dense column kk, by descriptor."""
    del b
    _, dtype = mma_utils.tiled_memref_shape(a)
    columns = ir.MemRefType(a.type).shape[-1]  # values in a tile's row
    (start, strides), (m_stride, k_stride), major = mma_utils.create_descriptor(
        a,
        swizzle=columns * utils.bytewidth(dtype),
        group_size=(64, columns),
        logical_k_major=False,
    )
    step = strides[1][0]
    transposed = int(major != mma_utils.Dim.K)
    metadata = fa.optimization_barrier(metadata)

    def values(i, kk):
        tile, rest = divmod(kk // 2, columns)
        offset = i // 64 * m_stride + tile * k_stride + rest // 16 * step
        return [_descriptor(start, offset)], "l", f"{transposed}, "

    def word(i, kk):
        words = metadata[i // 2 : i // 2 + 32, kk // 64 * 4 : kk // 64 * 4 + 4]
        return _scalars(words.registers.flat)[0]

    return values, word


def _a_in_registers(a, metadata, b) -> tuple[Callable, Callable]:
    """The operands of the instruction at row i and dense column kk, from fragments."""
    (k, _), _ = mma_utils.tiled_memref_shape(b)
    both = fa.optimization_barrier(*a, *metadata)
    a, metadata = both[: len(a)], both[len(a) :]

    def values(i, kk):
        (register,) = a[(i // 64 * k + kk) // 32].registers.flat
        words = vector.bitcast(
            ir.VectorType.get((4,), ir.IntegerType.get_signless(32)), register
        )
        return _scalars([words]), "r", ""

    def word(i, kk):
        return _scalars(metadata[(i // 64 * k + kk) // 64].registers.flat)[0]

    return values, word


def _wgmma_sp(acc, values: Callable, word: Callable, b):
    """Fences, issues every instruction of the product, and commits the group."""
    (k, n), dtype = mma_utils.tiled_memref_shape(b)
    columns = 128 // utils.bytewidth(dtype)
    # An instruction takes 32 of k, 64 bytes: twice a dense one.
    (start, strides), (_, k_stride), major = mma_utils.create_descriptor(
        b,
        swizzle=128,
        group_size=(columns, n),
        logical_k_major=True,
        mma_bytewidth_k=64,
    )
    step = strides[1][0]
    transposed = int(major != mma_utils.Dim.K)
    acc = fa.optimization_barrier(acc)
    nvvm.wgmma_fence_aligned()
    registers = acc.registers.copy()
    for i in range(0, acc.shape[0], 64):
        tile = list(registers[i // 64 : i // 64 + 1].flat)
        for kk in range(0, k, 32):
            a, a_constraint, a_flag = values(i, kk)
            part, rest = divmod(kk, columns)
            tile = _wgmma_sp_instruction(
                tile,
                a,
                _descriptor(start, part * k_stride + rest // 32 * step),
                word(i, kk),
                a_constraint=a_constraint,
                flags=f"{a_flag}{transposed}",
                selector=kk // 32 % 2,
                n=n,
                dtype=str(dtype),
            )
        shape = registers[i // 64 : i // 64 + 1].shape
        registers[i // 64 : i // 64 + 1] = _as_array(tile, shape)
    nvvm.wgmma_commit_group_sync_aligned()
    return fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)


def _wgmma_sp_instruction(
    acc, a, b, word, *, a_constraint, flags, selector: int, n: int, dtype: str
):
    """One warpgroup's 64×n tile: n/2 registers of float32 a thread."""
    count = itertools.count()
    element = ir.VectorType.get((1,), ir.F32Type.get())

    def names(values):
        return ",".join(f"${next(count)}" for _ in values)

    d = names(acc)
    names(acc)  # the inputs tied to them
    a_names = names(a)
    a_names = "{" + a_names + "}" if len(a) > 1 else a_names
    rest = names([b, word]).replace(",", ", ")
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sp.sync.aligned."
        f"m64n{n}k32.f32.{dtype}.{dtype} {{{d}}}, {a_names}, {rest}, {selector}, "
        f"p, 1, 1, {flags}; }}"
    )
    constraints = ["=f"] * len(acc) + [str(i) for i in range(len(acc))]
    constraints += [a_constraint] * len(a) + ["l", "r"]
    out: Any = llvm.inline_asm(
        llvm.StructType.get_literal([element] * len(acc)),
        [*acc, *a, b, word],
        text,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(element, out, [i]) for i in range(len(acc))]


def _descriptor(start, offset: int):
    """A shared memory descriptor `offset` bytes after `start`."""
    i64 = ir.IntegerType.get_signless(64)
    encoded = utils.c(mma_utils.encode_addr(offset), i64)
    return llvm.add(start, encoded, overflow_flags=llvm.IntegerOverflowFlags.none)


def _scalars(registers) -> list:
    """The elements of vector registers, in order."""
    return [
        vector.extract(
            register,
            dynamic_position=[],
            static_position=ir.DenseI64ArrayAttr.get([i]),
        )
        for register in registers
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def _words(registers) -> list:
    """Registers of two 16-bit elements as 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)
    return [utils.bitcast(register, i32) for register in registers]


def _vector(scalars: Sequence):
    """One vector register of scalars of one type."""
    i32 = ir.IntegerType.get_signless(32)
    register = llvm.mlir_undef(ir.VectorType.get((len(scalars),), scalars[0].type))
    for i, scalar in enumerate(scalars):
        register = llvm.insertelement(register, scalar, position=utils.c(i, i32))
    return register


def _as_array(registers: Sequence, shape) -> np.ndarray:
    return np.asarray(registers, dtype=object).reshape(shape)

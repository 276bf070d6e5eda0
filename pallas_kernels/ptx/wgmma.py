"""`wgmma.sp`: four warps' sparse product, B in shared memory. For sm_90a alone.

    wgmma.mma_async.sp.sync.aligned.m64nNk32    acc (64, N) += A24 (64, 32) · B (32, N)

PTX ISA, "Asynchronous warpgroup level matrix instructions: wgmma.mma_async.sp". A comes
from shared memory, by a descriptor as B does, or from registers. Not yet run on a GPU.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm, vector

from pallas_kernels import ptx
from pallas_kernels.format import NMCompressed, decompress

# An accumulator that instructions in flight may write: reading it takes `wgmma_wait`.
WGMMA_ACC = plgpu.Layout._WGMMA_ACC_32BIT
WGMMA = plgpu.Layout.WGMMA

# Mosaic stores 32 bits transposed, one element at a time, from this version on.
TRANSPOSED_FLOAT32_SINCE = (0, 11)

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
    if ptx.is_interpreted():
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

    b_type = plgpu.RefType(ptx.swizzled(b.shape[-1], b.dtype))
    if in_registers:
        a_type, words_type = [FRAGMENT] * len(a), [FRAGMENT_METADATA] * len(metadata)
    else:
        a_type = plgpu.RefType(ptx.swizzled(a.shape[-1], a.dtype))
        words_type = ptx.metadata_layout()
    arguments = (WGMMA_ACC, a_type, words_type, b_type)
    return _inline(run, acc, a, metadata, b, arguments=arguments)


def wgmma_wait(acc: jax.Array, finished: Sequence[Any]) -> jax.Array:
    """Waits until no group of `wgmma_sp` is running.

    It leaves none, because the next would need its metadata in other registers: PTX has
    no word for that, and ptxas gives them the same in a loop.

    Args:
      acc: The accumulator.
      finished: The shared memory that the groups have read. They may read it until now,
        so now is when the interpreter reads it once more: a write in between is a race
        that it finds. The fence makes these reads, which the instruction would do
        through the asynchronous proxy, precede those of TMA.
    """
    if ptx.is_interpreted():
        for ref in finished:
            ref[...]
        plgpu.commit_smem()
        return acc

    def run(ctx, acc):
        del ctx
        nvvm.wgmma_wait_group_sync_aligned(0)
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
        return ptx.scalars(words.registers.flat)[0]

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
        return ptx.scalars([words]), "r", ""

    def word(i, kk):
        return ptx.scalars(metadata[(i // 64 * k + kk) // 64].registers.flat)[0]

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
        registers[i // 64 : i // 64 + 1] = ptx.as_array(tile, shape)
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


def store_transposed(ref: Any, x: jax.Array) -> None:
    """Stores the transpose of an array in `WGMMA`, by stmatrix where it has 16 bits.

    Args:
      ref: (N, M) in shared memory, `swizzled`.
      x: (M, N), 16 or 32 bits.
    """
    if not ptx.is_interpreted():
        if x.dtype.itemsize == 4:  # the layout of single elements
            x = plgpu.layout_cast(x, WGMMA_ACC)
        elif ptx.JAX_VERSION < (0, 11):
            x = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    ref.T[...] = x

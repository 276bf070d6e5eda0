"""What Mosaic's instructions share: versions, launching, register layouts, registers.

The sparse instructions themselves are PTX in `mma.py` and `wgmma.py`. This folder is
the only place that knows PTX, register layouts and private jax names.

Both instructions take the metadata words of `format.py`: the word at (8b + g, 4s + t)
belongs to lane 4g + t of the warp that owns rows 16b to 16b + 15. Of the four lanes of
a row, selector 0 reads t = 0 and 1 (columns 0 to 31 of 64), selector 1 reads t = 2 and
3: one register serves two instructions along k.

Where jax differs between versions, the difference is here: 0.10.2 has no interpreter
parameters in public and no Ampere; 0.11 has both; 0.12 asks of a store in global memory
whether it is meant to be wide.
"""

import contextvars
import functools
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
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.devices import default_device, this_device
from pallas_kernels.format import pad_to

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])

# Mosaic lowers for Ampere (cp.async, no elect.sync) from this version on.
AMPERE_SINCE = (0, 11, 1)


def capability() -> tuple[int, int] | None:
    """Compute capability of the device that jax runs on by default; None if no GPU."""
    device = this_device()
    return device.capability if device else None


def multiprocessors() -> int:
    """Multiprocessors of the device that jax runs on by default."""
    return default_device().core_count


# Whether the kernel that is being traced will be interpreted.
_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


def is_interpreted() -> bool:
    """Whether the kernel being traced is for Pallas' interpreter."""
    return _INTERPRETED.get()


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
    """What an interpreted kernel returned; a race, printed before jax 0.12, raises."""

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
    if is_interpreted():
        return ref[...]
    index = (None,) if JAX_VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, x: jax.Array) -> None:
    """Writes a register array to global memory, each thread what it holds."""
    if is_interpreted() or JAX_VERSION < (0, 12):
        ref[...] = x
    else:  # unless told, jax refuses what does not write whole lines of cache at once
        gpu: Any = plgpu
        gpu.store(ref, x, optimized=False)


def release_smem() -> None:
    """Ends the reads of shared memory that an asynchronous copy may then overwrite.

    TMA, from capability 9.0 on and in the interpreter, has to be told; for cp.async the
    barrier that Mosaic puts before each copy is enough.
    """
    if (capability() or (9, 0)) >= (9, 0):
        plgpu.commit_smem()


def instruction(name: str, meaning: Callable, lower: Callable) -> Primitive:
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


def not_unrolled(count: int) -> jax.Array:
    """The trips of a loop, int32, as a value that LLVM does not know."""
    return _NOT_UNROLLED.bind(jnp.int32(count))


def _not_unrolled(count):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(
        i32,
        [utils.c(int(count), i32)],
        "mov.b32 $0, $1;",
        "=r,r",
        has_side_effects=False,
    )


_NOT_UNROLLED = instruction("not_unrolled", lambda count: count, _not_unrolled)


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
    entries = [s for array in arrays for s in scalars(array.registers.flat)]
    shape = (*arrays[0].shape[:-1], sum(array.shape[-1] for array in arrays))
    length = layout.vector_length
    vectors = [joined(entries[i : i + length]) for i in range(0, len(entries), length)]
    return fa.FragmentedArray(
        _registers=as_array(vectors, layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=arrays[0].is_signed,
    )


_REGROUP = instruction(
    "regroup", lambda *arrays, layout: jnp.concatenate(arrays, axis=-1), _regroup
)


def where_any(condition: jax.Array, function: Callable, operand: Any) -> Any:
    """`function(operand)` in threads for an entry of which the condition holds.

    Elsewhere the operand as it is: a branch around what changes nothing there. The
    interpreter has one thread.
    """
    return lax.cond(_ANY.bind(condition), function, lambda x: x, operand)


def _any(condition):
    return functools.reduce(arith.ori, scalars(condition.registers.flat))


_ANY = instruction("any_of_thread", jnp.any, _any)


def lookup(index: jax.Array, table: Sequence[int]) -> jax.Array:
    """Four bytes of a table of eight, chosen by the low three bits of four nibbles.

    Args:
      index: int32, one entry a register; nibbles 0 to 3 choose bytes 0 to 3.
      table: Eight bytes.
    """
    return _LOOKUP.bind(index, table=tuple(table))


def _lookup_meaning(index, table):
    return functools.reduce(
        jnp.bitwise_or,
        [
            jnp.asarray(table, jnp.int32)[(index >> (4 * byte)) & 7] << (8 * byte)
            for byte in range(4)
        ],
    )


def _lookup(index, table):
    i32 = ir.IntegerType.get_signless(32)
    low, high = (
        utils.c(int.from_bytes(bytes(table[i : i + 4]), "little"), i32) for i in (0, 4)
    )
    low_bits = utils.c(0x7777, i32)  # prmt takes the fourth for a sign
    found = [
        joined([_prmt(low, high, arith.andi(nibbles, low_bits))])
        for nibbles in scalars(index.registers.flat)
    ]
    return fa.FragmentedArray(
        _registers=as_array(found, index.registers.shape),
        _layout=index.layout,
        _is_signed=index.is_signed,
    )


_LOOKUP = instruction("lookup", _lookup_meaning, _lookup)


def pick_pair(
    entries: jax.Array, first: jax.Array, second: jax.Array, *, byte: int, layout: Any
) -> jax.Array:
    """Two entries of every four.

    Args:
      entries: 16-bit, vectors of four.
      first: int32, one entry a register, of the same threads. Byte `byte` is
        `0x10 + 0x22 * i` where the entry wanted first is i: the places of its bytes,
        a nibble each.
      second: As `first`, for the entry wanted second.
      byte: 0 to 3.
      layout: Of the result, `thread_layout` of vectors of two.
    """
    return _PICK_PAIR.bind(entries, first, second, byte=byte, layout=layout)


def _pick_pair_meaning(entries, first, second, byte, layout):
    del layout
    places = jnp.concatenate([first, second], axis=-1) >> (8 * byte)
    return jnp.take_along_axis(entries, (places >> 1) & 3, axis=-1)


def _pick_pair(entries, first, second, byte, layout):
    layout = layout.to_mgpu()
    i32 = ir.IntegerType.get_signless(32)
    both = utils.c(byte | (4 + byte) << 4, i32)  # a byte of each
    pairs = []
    for four, one, other in zip(
        entries.registers.flat,
        scalars(first.registers.flat),
        scalars(second.registers.flat),
        strict=True,
    ):
        low, high = scalars([vector.bitcast(ir.VectorType.get((2,), i32), four)])
        pair = _prmt(low, high, _prmt(one, other, both))
        pairs.append(utils.bitcast(pair, ir.VectorType.get((2,), entries.mlir_dtype)))
    shape = (*entries.shape[:-1], 2)
    return fa.FragmentedArray(
        _registers=as_array(pairs, layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=entries.is_signed,
    )


_PICK_PAIR = instruction("pick_pair", _pick_pair_meaning, _pick_pair)


def _prmt(low, high, places):
    """Four of the eight bytes of two words (PTX ISA, prmt)."""
    i32 = ir.IntegerType.get_signless(32)
    text = "prmt.b32 $0, $1, $2, $3;"
    out: Any = llvm.inline_asm(
        i32, [low, high, places], text, "=r,r,r,r", has_side_effects=False
    )
    return out


def swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """How TMA and `wgmma_sp` want a matrix in shared memory: as transforms of its ref.

    Tiles of 8 rows by as many bytes as the widest swizzle that divides a row.
    """
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    tile = (8, 8 * swizzle // bits)
    # To pyright both are abstract in jax 0.11: what jax's own compiler needs is there.
    tiling = plgpu.TilingTransform(tile)  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzling


def whole_tiles(x: jax.Array, smem: Any) -> jax.Array:
    """Pads a matrix to whole tiles of its copy in shared memory: 8 rows of 128 bytes.

    TMA reads zeros beyond them, and writes nothing.
    """
    tiling, _ = smem.transforms
    return pad_to(x, tiling.tiling)


def scalars(registers: Any) -> list:
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


def words(registers: Any) -> list:
    """Registers of two 16-bit elements as 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)
    return [utils.bitcast(register, i32) for register in registers]


def joined(scalars: Sequence):
    """One vector register of scalars of one type."""
    i32 = ir.IntegerType.get_signless(32)
    register = llvm.mlir_undef(ir.VectorType.get((len(scalars),), scalars[0].type))
    for i, scalar in enumerate(scalars):
        register = llvm.insertelement(register, scalar, position=utils.c(i, i32))
    return register


def as_array(registers: Sequence, shape: Any) -> np.ndarray:
    """Registers in the array that `FragmentedArray` keeps them in."""
    return np.asarray(registers, dtype=object).reshape(shape)

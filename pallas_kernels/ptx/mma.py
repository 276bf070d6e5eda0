"""`mma.sp`: one warp's sparse product, all in registers. For sm_80 and later.

    mma.sp::ordered_metadata.m16n8k32    acc (16, 8) += A24 (16, 32) · B (32, 8)

PTX ISA, "Warp-level matrix instructions: mma.sp". Four warps share a tile of the
product, `m_warps` of them along M. Not yet run on a GPU.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import ptx
from pallas_kernels.format import NMCompressed, decompress


def mma_layouts(dtype: Any, m_warps: int) -> tuple[Any, Any, Any]:
    """Layouts of the values, of B and of the accumulator of `mma_sp`."""
    layout: Any = plgpu.Layout  # which has these from jax 0.11 on
    return (
        layout.MMA_LHS(dtype, m_warps=m_warps),
        layout.MMA_RHS(dtype, m_warps=m_warps),
        layout.MMA_ACC(dtype, m_warps=m_warps),
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
        values = ptx.words(a[i : i + tile_m, kk // 2 : kk // 2 + 16].registers.flat)
        words = metadata[i // 2 : (i + tile_m) // 2, kk // 64 * 4 : kk // 64 * 4 + 4]
        (word,) = ptx.scalars(words.registers.flat)
        for j in range(0, n, tile_n):
            tile = acc[i : i + tile_m, j : j + tile_n]
            halves = (b[kk + h : kk + h + 16, j : j + tile_n] for h in (0, 16))
            registers = _mma_sp_instruction(
                ptx.scalars(tile.registers.flat),
                values,
                [pair for half in halves for pair in ptx.words(half.registers.flat)],
                word,
                selector=kk // 32 % 2,
                dtype=str(a.mlir_dtype),
            )
            pairs = [ptx.joined(registers[:2]), ptx.joined(registers[2:])]
            acc[i : i + tile_m, j : j + tile_n] = fa.FragmentedArray(
                _registers=ptx.as_array(pairs, tile.registers.shape),
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


_MMA_SP = ptx.instruction("mma_sp", _mma_sp_meaning, _mma_sp)


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
            registers = [ptx.joined([scalar]) for scalar in ptx.scalars(registers)]
        else:
            registers = [_movmatrix(register) for register in registers]
        out[j : j + tile_n, i : i + tile_m] = fa.FragmentedArray(
            _registers=ptx.as_array(
                registers, layout.registers_shape((tile_n, tile_m))
            ),
            _layout=layout,
            _is_signed=None,
        )
    return out


def _movmatrix(register):
    """The transpose of an 8×8 matrix of 16 bits, of which a lane holds a pair."""
    i32 = ir.IntegerType.get_signless(32)
    (word,) = ptx.words([register])
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    out: Any = llvm.inline_asm(i32, [word], text, "=r,r")
    return utils.bitcast(out, register.type)


_TRANSPOSE_ACC = ptx.instruction(
    "transpose_acc", lambda x, m_warps: x.T, _transpose_acc
)

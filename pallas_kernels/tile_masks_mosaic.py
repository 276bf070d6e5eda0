"""The 4x4 transposable mask in Pallas Mosaic GPU, for Ampere and later.

A thread has one tile: four loads of four neighbours, the selection of
`tile_selection.py` in registers, one store of its bits. A warp reads lines of 32
tiles, 256 bytes of bfloat16, and writes 128 bytes; of narrower matrices more lines of
fewer tiles. Bits rather than booleans leave the kernel: an eighth or a quarter of the
bytes that it reads, and XLA unpacks them where they are used.

Compiled for sm_80, 89, 90a, 100a and 120a, and the PTX run on a CPU
(`tests/pallas_kernels/ptx_machine.py`); interpreted with race detection. Not yet run on
a GPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.compression_mosaic import (
    NO_BARRIERS,
    entries_of,
    parts_of,
    unavailable,
)
from pallas_kernels.reference import mask_of_bits
from pallas_kernels.tile_selection import transposable_2to4

__all__ = ["tile_mask", "unavailable"]

_WARPS = (4, 1)


def tile_mask(scores: jax.Array, *, at_most: bool, interpret: Any = None) -> jax.Array:
    """As `tile_masks.tile_mask`."""
    rows, columns = scores.shape
    lanes, padded_rows, padded_columns = _tile(rows, columns)
    scores = jnp.pad(scores, ((0, padded_rows - rows), (0, padded_columns - columns)))
    r, c = padded_rows // 4, padded_columns // 4
    grid = r // (_WARPS[0] * lanes[0]), c // lanes[1]
    kernel = ptx.kernel(
        functools.partial(_kernel, grid=grid, lanes=lanes, at_most=at_most),
        out_type=jax.ShapeDtypeStruct((r, c, 1), jnp.int32),
        grid=(math.prod(grid),),
        grid_names=("block",),
        compiler_params=NO_BARRIERS,
        name="nm_tile_mask",
        interpret=interpret,
    )
    bits = kernel(scores.reshape(r, 4, c, 4))
    return mask_of_bits(bits.reshape(r, c))[:rows, :columns]


def _kernel(scores_gmem, bits_gmem, *, grid, lanes, at_most):
    rows, columns = parts_of(grid, (_WARPS[0] * lanes[0], lanes[1]))
    layout = functools.partial(ptx.thread_layout, _WARPS, lanes)
    tile = []  # 4x4 of (rows, columns, 1)
    for i in range(4):
        row = ptx.load(scores_gmem.at[rows, i, columns], layout(4))
        tile.append(entries_of(row.astype(jnp.float32), layout))
    bits = transposable_2to4(tile, at_most=at_most, where_any=ptx.where_any)
    ptx.store(bits_gmem.at[rows, columns, :], bits)


def _tile(rows: int, columns: int) -> tuple[tuple[int, int], int, int]:
    """How the tiles of a warp lie, and the padded sizes: the least padding, then wide.

    A line of fewer than 8 tiles would be less than a sector of what it writes.
    """

    def padded(lanes):
        tile_rows, tile_columns = 4 * _WARPS[0] * lanes[0], 4 * lanes[1]
        return (
            -(-rows // tile_rows) * tile_rows,
            -(-columns // tile_columns) * tile_columns,
        )

    candidates = [(1, 32), (2, 16), (4, 8)]
    lanes = min(candidates, key=lambda lanes: padded(lanes)[0] * padded(lanes)[1])
    return lanes, *padded(lanes)

"""Mask + compress kernels in Pallas Mosaic GPU, for Ampere and later.

    nm_compress_rows      w (rows, k), groups along the contiguous axis
    nm_compress_columns   w (k, rows), groups along the other: a Flax kernel
    nm_compress_tiles     w (k, n) and its transpose under one 4x4 transposable mask

A thread owns whole metadata words, 16 entries along k of rows g and g + 8 of a block of
16, so the choice, the values and the words stay in its registers; no shared memory. It
loads vectors along the contiguous axis and cuts them into single entries with
`ptx.regroup`, applies the functions of `reference.py` to arrays of them, and joins the
8 values of 16 entries, 16 bytes, into one store. One thread, one warp, by kernel:

    rows     2 rows x 16, vectors of 16 along k            warp 16 x 64
    columns  16 along k x 8 rows, vectors of 4 along rows  warp 64 along k x 64 rows
    tiles    16 along k x 4, vectors of 4 along n          warp 64 along k x 32 along n

so a warp reads and writes values of `columns` in lines of 128 and 64 bytes (bfloat16):
the transposition is in registers. A thread of `tiles` has 4 of the 16 columns that a
word of Wᵀ spans, and one of the two rows that a word of W does: the parts are added
across lanes. Of its mask it looks up where the bytes of each pair stand, and picks them
with one instruction; what infinities and NaN need is behind a branch. That leaves 19
instructions an entry where scores are finite, 9 of them for the units of 64 lanes a
cycle; with `at_most` 37 and 19 (sm_90a, bfloat16, counted in the machine code).

Each of four warps takes such a part of a tile, along either axis. Matrices that no
arrangement of the four divides are padded with zeros, one more pass over them.

Compiled for sm_80, 89, 90a, 100a and 120a, and the PTX run on a CPU
(`tests/pallas_kernels/ptx_machine.py`); interpreted with race detection. Not yet run on
a GPU.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx
from pallas_kernels.format import NMCompressed, pack, positions
from pallas_kernels.reference import magnitude_2to4
from pallas_kernels.tile_selection import PAIRS, transposable_2to4

# Every element is read and written once: there is nothing for barriers to order.
NO_BARRIERS = {"unsafe_no_auto_barriers": True}


def unavailable() -> str | None:
    """Why the kernels cannot run on this device; None if they can."""
    capability = ptx.capability()
    if capability is None:
        return "needs an NVIDIA GPU"
    if capability < (8, 0):
        major, minor = capability
        return f"needs compute capability 8.0, this device has {major}.{minor}"
    if capability < (9, 0) and ptx.JAX_VERSION < ptx.AMPERE_SINCE:
        since = ".".join(map(str, ptx.AMPERE_SINCE))
        return (
            f"compiles for Ampere and Ada from jax {since}, this is {jax.__version__}"
        )
    # Before, Mosaic refuses parts of some shapes: those that are contiguous in memory.
    if ptx.JAX_VERSION < (0, 11):
        return f"needs jax 0.11, this is {jax.__version__}"
    return None


def compress_magnitude(
    w: jax.Array, *, axis: int, dtype: Any, interpret: Any = None
) -> NMCompressed:
    """As `compression.compress_magnitude`."""
    rows, k = w.shape if axis == -1 else w.shape[::-1]
    lanes = (1, 8, 4) if axis == -1 else (4, 2, 4)
    row_warps, padded_rows, padded_k = _tile(rows, k, 16 * lanes[0])
    pad = (0, padded_rows - rows), (0, padded_k - k)
    w = jnp.pad(w, pad if axis == -1 else pad[::-1])
    b, c = padded_rows // 16, padded_k // 16
    if axis == -1:
        body, name = _rows_kernel, "nm_compress_rows"
        w = w.reshape(b, 2, 8, c, 16)
        values, words = (b, 2, 8, c, 8), (b, 8, c, 1)
    else:
        body, name = _columns_kernel, "nm_compress_columns"
        w = w.reshape(c, 16, b, 2, 2, 4)
        values, words = (b, 2, 2, 4, c, 8), (b, 2, 4, c, 1)
    warps = (row_warps, 1, 4 // row_warps)
    grid = b // (warps[0] * lanes[0]), c // (warps[2] * lanes[2])
    kernel = ptx.kernel(
        functools.partial(body, grid=grid, warps=warps, lanes=lanes),
        out_type=(
            jax.ShapeDtypeStruct(values, dtype),
            jax.ShapeDtypeStruct(words, jnp.int32),
        ),
        grid=(math.prod(grid),),
        grid_names=("block",),
        compiler_params=NO_BARRIERS,
        name=name,
        interpret=interpret,
    )
    stored, metadata = kernel(w)
    return _compressed(stored, metadata, rows, k, axis)


def compress_transposable(
    w: jax.Array, *, dtype: Any, at_most: bool, interpret: Any = None
) -> tuple[NMCompressed, NMCompressed]:
    """As `compression.compress_transposable`."""
    k, n = w.shape
    lanes = (4, 2, 2, 2)
    n_warps, padded_n, padded_k = _tile(n, k, 32)
    warps = (4 // n_warps, n_warps, 1, 1)
    w = jnp.pad(w, ((0, padded_k - k), (0, padded_n - n)))
    c, b = padded_k // 16, padded_n // 16
    grid = c // (warps[0] * lanes[0]), b // (warps[1] * lanes[1])
    kernel = ptx.kernel(
        functools.partial(
            _tiles_kernel, grid=grid, warps=warps, lanes=lanes, at_most=at_most
        ),
        out_type=(
            jax.ShapeDtypeStruct((b, 2, 2, 4, c, 8), dtype),
            jax.ShapeDtypeStruct((b, 2, 4, c, 1), jnp.int32),
            jax.ShapeDtypeStruct((c, 4, 4, b, 2, 2, 2), dtype),
            jax.ShapeDtypeStruct((c, 8, b, 1), jnp.int32),
        ),
        grid=(math.prod(grid),),
        grid_names=("block",),
        compiler_params=NO_BARRIERS,
        name="nm_compress_tiles",
        interpret=interpret,
    )
    values, words, values_t, words_t = kernel(w.reshape(c, 4, 4, b, 2, 2, 4))
    return (
        _compressed(values, words, n, k, -2),
        _compressed(values_t, words_t, k, n, -2),
    )


def _rows_kernel(w_gmem, values_gmem, words_gmem, *, grid, warps, lanes):
    blocks, columns = parts_of(grid, (warps[0] * lanes[0], warps[2] * lanes[2]))
    layout = functools.partial(ptx.thread_layout, warps, lanes)
    halves = []
    for h in range(2):
        row = ptx.load(w_gmem.at[blocks, h, :, columns, :], layout(16))
        values, half = _compress_16(
            entries_of(row, layout), values_gmem.dtype, shift=16 * h
        )
        joined = ptx.regroup(*values, layout=layout(8))
        ptx.store(values_gmem.at[blocks, h, :, columns, :], joined)
        halves.append(half)
    ptx.store(words_gmem.at[blocks, :, columns, :], halves[0] | halves[1])


def _columns_kernel(w_gmem, values_gmem, words_gmem, *, grid, warps, lanes):
    blocks, columns = parts_of(grid, (warps[0] * lanes[0], warps[2] * lanes[2]))
    layout = functools.partial(ptx.thread_layout, warps, lanes)
    halves = []
    for h in range(2):
        along_k = []  # 16 of (blocks, 2, columns, 4)
        for i in range(16):
            tile = w_gmem.at[columns, i, blocks, h].transpose((1, 2, 0, 3))
            along_k.append(entries_of(ptx.load(tile, layout(4)), layout))
        for g in range(4):
            entries = [row[g] for row in along_k]
            values, half = _compress_16(entries, values_gmem.dtype, shift=16 * h)
            joined = ptx.regroup(*values, layout=layout(8))
            ptx.store(values_gmem.at[blocks, h, :, g, columns, :], joined)
            halves.append(half)
    for g in range(4):
        word = halves[g] | halves[4 + g]
        ptx.store(words_gmem.at[blocks, :, g, columns, :], word)


def _compress_16(entries, dtype, *, shift: int) -> tuple[list[jax.Array], jax.Array]:
    """The 8 values of 16 entries along k, and their half of a word, shifted."""
    values, half = [], jnp.int32(0)
    for group in range(4):
        v0, v1, nibble = magnitude_2to4(entries[4 * group : 4 * group + 4])
        values += [_cast(v0, dtype), _cast(v1, dtype)]
        half |= nibble << (shift + 4 * group)
    return values, half


def _tiles_kernel(
    w_gmem,
    values_gmem,
    words_gmem,
    values_t_gmem,
    words_t_gmem,
    *,
    grid,
    warps,
    lanes,
    at_most,
):
    columns, blocks = parts_of(grid, (warps[0] * lanes[0], warps[1] * lanes[1]))
    layout = functools.partial(ptx.thread_layout, warps, lanes)
    dtype = values_gmem.dtype
    values = [[] for _ in range(4)]  # of W, for each of the thread's columns
    halves = [jnp.int32(0)] * 4
    quarters = [jnp.int32(0)] * 8  # of the words of Wᵀ, rows g and g + 8 of 16
    for j in range(4):
        loaded = [
            ptx.load(w_gmem.at[columns, j, i, blocks], layout(4)) for i in range(4)
        ]
        scores = [
            [jnp.abs(x.astype(jnp.float32)) for x in entries_of(row, layout)]
            for row in loaded
        ]
        bits = transposable_2to4(scores, at_most=at_most, where_any=ptx.where_any)
        fill = fill_t = None
        if at_most:
            fill = _fill(bits)
            bits, fill_t = bits | fill, fill >> 16
        rows = [_cast(row, dtype) for row in loaded]
        for i, (pair, nibble) in enumerate(_pairs(rows, bits, fill, layout)):
            ptx.store(values_t_gmem.at[columns, j, i, blocks], pair)
            quarters[4 * j % 8 + i] |= nibble << 16 * (j // 2)
        tile = [entries_of(row, layout) for row in rows]
        along_k = [
            ptx.regroup(*column, layout=layout(4)) for column in zip(*tile, strict=True)
        ]
        columns_t = enumerate(_pairs(along_k, bits >> 16, fill_t, layout))
        for q, (pair, nibble) in columns_t:
            values[q].append(pair)
            halves[q] |= nibble << 4 * j

    def lane(axis):  # 0 or 1: which of the two lanes along the axis this is
        return plgpu.broadcasted_iota(
            jnp.int32, halves[0].shape, axis, layout=layout(1)
        )

    for q in range(4):
        joined = ptx.regroup(*values[q], layout=layout(8))
        tile = values_gmem.at[blocks, :, :, q, columns, :]
        ptx.store(tile.transpose((3, 0, 1, 2, 4)), joined)
        word = jnp.sum(halves[q] << 16 * lane(2), axis=2, dtype=jnp.int32)
        tile = words_gmem.at[blocks, :, q, columns, :]
        ptx.store(tile.transpose((2, 0, 1, 3)), word)
    quarter = 8 * lane(2) + 4 * lane(3)
    for g in range(8):
        word = jnp.sum(quarters[g] << quarter, axis=3, dtype=jnp.int32)
        word = jnp.sum(word, axis=2, dtype=jnp.int32)
        ptx.store(words_t_gmem.at[columns, g, blocks, :], word)


# Where the bytes of entry i of four are, as `ptx.pick_pair` has them.
_PLACES = [0x10 + 0x22 * i for i in range(4)]

# By the low three bits of a line's mask, which tell pairs apart: the places of the
# first entry kept and of the second, and the nibble of metadata.
_FIRST, _SECOND, _NIBBLE = [0] * 8, [0] * 8, [0] * 8
for _i, _j in PAIRS:
    _index = (1 << _i | 1 << _j) & 7
    _FIRST[_index], _SECOND[_index] = _PLACES[_i], _PLACES[_j]
    _NIBBLE[_index] = _i | _j << 2

# By what fills a line up, entry 0 (1), entry 1 (2) or nothing (0): the places of its
# two values among a pair and zeros behind it.
_FIRST_OR_ZERO = [_PLACES[i] for i in (0, 2, 0)] + [0] * 5
_SECOND_OR_ZERO = [_PLACES[i] for i in (1, 1, 2)] + [0] * 5


def _pairs(lines, bits, fill, layout) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Values and nibble of each row, or column, of tiles.

    Args:
      lines: The four rows: vectors of four, in the dtype of the values.
      bits: Bit 4r + c is set where entry c of row r is stored: two in every row.
      fill: The same of those that are zeros; None = there are none.
      layout: Makes the layouts, by the length of vectors.
    """
    first, second, nibbles = (
        ptx.lookup(bits, table) for table in (_FIRST, _SECOND, _NIBBLE)
    )
    if fill is not None:
        first_or_zero = ptx.lookup(fill, _FIRST_OR_ZERO)
        second_or_zero = ptx.lookup(fill, _SECOND_OR_ZERO)
    for r, line in enumerate(lines):
        pair = ptx.pick_pair(line, first, second, byte=r, layout=layout(2))
        if fill is not None:
            zeros = plgpu.layout_cast(jnp.zeros_like(pair), layout(2))
            four = ptx.regroup(pair, zeros, layout=layout(4))
            pair = ptx.pick_pair(
                four, first_or_zero, second_or_zero, byte=r, layout=layout(2)
            )
        yield pair, (nibbles >> 8 * r) & 15


def _fill(bits: jax.Array) -> jax.Array:
    """The bits that fill up lines of one entry, of tiles and of their transposes.

    It is the lowest other place: the second of four if the first is kept, else the
    first.
    """
    ones = 0x11111111  # the first place of each line
    more = bits & (bits - ones)  # without the lowest of each line
    single = ~(more >> 1 | more >> 2 | more >> 3) & ones
    return single + (single & bits)


def entries_of(vectors: jax.Array, layout) -> list[jax.Array]:
    """The entries of vectors, one array each."""
    single = ptx.regroup(vectors, layout=layout(1))
    return [single[..., i : i + 1] for i in range(vectors.shape[-1])]


def parts_of(grid: tuple[int, int], sizes: tuple[int, int]) -> list[Any]:
    """This block's part of both axes of a grid that is launched as one axis.

    CUDA's first axis has room for 2³¹ blocks, the others for 65,535.
    """
    block, columns = lax.axis_index("block"), jnp.int32(grid[1])
    places = lax.div(block, columns), lax.rem(block, columns)
    return [
        pl.ds(place * size, size) for place, size in zip(places, sizes, strict=True)
    ]


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Between the 16-bit types by way of float32, which holds both."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _tile(rows: int, k: int, warp_rows: int) -> tuple[int, int, int]:
    """How the four warps lie so that the padded matrix is smallest.

    Args:
      rows: Of the values.
      k: The group axis.
      warp_rows: Rows of a warp's part, which spans 64 of k.

    Returns:
      Of the four warps, how many lie along the rows; the padded rows and k.
    """

    def padded(row_warps):
        tile_rows, tile_k = row_warps * warp_rows, 4 // row_warps * 64
        return -(-rows // tile_rows) * tile_rows, -(-k // tile_k) * tile_k

    # In a tie the widest along k, which a store of values is contiguous along.
    row_warps = min((1, 2, 4), key=lambda n: padded(n)[0] * padded(n)[1])
    return row_warps, *padded(row_warps)


def _compressed(values, words, rows: int, k: int, axis: int) -> NMCompressed:
    """The matrix without what pads it to tiles."""
    b = words.shape[0]
    values = values.reshape(16 * b, -1)
    words = words.reshape(8 * b, -1)
    padded = values.shape != (rows, k // 2)
    values = values[:rows, : k // 2]
    compressed = NMCompressed(values, words, axis=axis)
    if not padded:
        return compressed
    # A tile of padding has positions of its own; those of the format are 0 and 1.
    return NMCompressed(values, pack(positions(compressed), (2, 4)), axis=axis)

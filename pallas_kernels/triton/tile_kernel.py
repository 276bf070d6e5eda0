"""The 4x4 transposable choice in Triton, and mask + compress of W and Wᵀ under it.

`transposable_2to4` does what that of `tile_selection.py` does, in the same order, with
the same sums: its tables are made from the choices listed there. A thread has whole
tiles: Triton splits a block, reshaped to tiles, into its 16 entries.

Compiled for sm_80 and sm_90 and interpreted. Not yet run on a GPU.
"""

import itertools

# Triton reads Python of its own, whose types are not those of Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from pallas_kernels import tile_selection
from pallas_kernels.triton.magnitude_kernel import split_4, store, stored_2to4

# The columns that a row may keep, and from here on the place of each in this list.
_ROW_CHOICES = [*tile_selection._PAIRS, *((c,) for c in range(4))]


def _table(choices, row: int):
    """The choices of two rows, by what they leave to the columns for the other two.

    An entry is a number, which Triton takes as a constant: the place of the upper row's
    choice, that of the lower row's times 16, the bits of both times 256.
    """
    table = {}
    for upper, lower in choices:
        bits = sum(1 << (4 * row + c) for c in upper)
        bits += sum(1 << (4 * (row + 1) + c) for c in lower)
        places = _ROW_CHOICES.index(upper) | _ROW_CHOICES.index(lower) << 4
        # A single entry has its row and its column for itself.
        single = {c for kept in (upper, lower) if len(kept) == 1 for c in kept}
        rest = tuple(
            0 if c in single else 2 - (c in upper) - (c in lower) for c in range(4)
        )
        table.setdefault(rest, []).append(places | bits << 8)
    return table


_TOP, _BOTTOM = (_table(tile_selection._PAIR_PAIR, row) for row in (0, 2))
_MIXED = tile_selection._SINGLE_PAIR + tile_selection._PAIR_SINGLE
_MIXED_TOP, _MIXED_BOTTOM = _table(_MIXED, 0), _table(_MIXED, 2)


def _entries(table):
    return tl.constexpr(tuple(entry for entries in table.values() for entry in entries))


def _starts(table):
    sizes = [len(entries) for entries in table.values()]
    return tl.constexpr((0, *itertools.accumulate(sizes)))


def _partners(table, other):
    """For each rest of a table the place in the other of the one that completes it."""
    places = [*other]
    return tl.constexpr(
        tuple(places.index(tuple(2 - k for k in rest)) for rest in table)
    )


TOP, BOTTOM = _entries(_TOP), _entries(_BOTTOM)
PAIR_STARTS = _starts(_TOP)
MIXED_TOP, MIXED_BOTTOM = _entries(_MIXED_TOP), _entries(_MIXED_BOTTOM)
MIXED_STARTS = _starts(_MIXED_TOP)
PAIR_RESTS, MIXED_RESTS = tl.constexpr(len(_TOP)), tl.constexpr(len(_MIXED_TOP))
BOTTOM_OF_TOP = _partners(_TOP, _BOTTOM)
BOTTOM_OF_MIXED = _partners(_MIXED_TOP, _BOTTOM)
TOP_OF_MIXED = _partners(_MIXED_BOTTOM, _TOP)


@triton.jit
def better(total, bits, other_total, other_bits):
    """The one of larger sum; in a tie the first."""
    larger = other_total > total
    return tl.where(larger, other_total, total), tl.where(larger, other_bits, bits)


@triton.jit
def best(upper, lower, TABLE: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr):
    """The best of the choices from START on, given the sums of both rows."""
    total = upper[TABLE[START] & 15] + lower[TABLE[START] >> 4 & 15]
    bits = tl.full(total.shape, TABLE[START] >> 8, tl.int32)
    for i in tl.static_range(START + 1, STOP):
        other = upper[TABLE[i] & 15] + lower[TABLE[i] >> 4 & 15]
        total, bits = better(total, bits, other, TABLE[i] >> 8)
    return total, bits


@triton.jit
def half(upper, lower, TABLE: tl.constexpr, STARTS: tl.constexpr, RESTS: tl.constexpr):
    """The best choice of two rows for each rest: a tuple of sums, a tuple of bits."""
    totals = ()
    codes = ()
    for i in tl.static_range(RESTS):
        total, bits = best(upper, lower, TABLE, STARTS[i], STARTS[i + 1])
        totals = totals + (total,)
        codes = codes + (bits,)
    return totals, codes


@triton.jit
def row_sums(a0, a1, a2, a3):
    """The sums of the choices of a row, in the order of `_ROW_CHOICES`."""
    return a0 + a1, a0 + a2, a0 + a3, a1 + a2, a1 + a3, a2 + a3, a0, a1, a2, a3


@triton.jit
def joined(total, bits, table, other, PARTNERS: tl.constexpr, RESTS: tl.constexpr):
    """The best of two halves together, if that is better than `total`, `bits`."""
    for i in tl.static_range(RESTS):
        both = table[0][i] + other[0][PARTNERS[i]]
        total, bits = better(total, bits, both, table[1][i] | other[1][PARTNERS[i]])
    return total, bits


@triton.jit
def number(x, largest):
    """As in `tile_selection._finite`."""
    infinite = 16 * largest
    below = tl.where(x < 0, -infinite, -2 * infinite)
    beyond = tl.where(x > 0, infinite, below)
    clipped = tl.minimum(tl.maximum(x, -largest), largest)
    return tl.where(tl.abs(x) < float("inf"), clipped, beyond)


@triton.jit
def transposable_2to4(tile, AT_MOST: tl.constexpr):
    """As `tile_selection.transposable_2to4`; `tile` has 16 float32 arrays."""
    largest = tl.full(tile[0].shape, 2.0**-126, tl.float32)
    scores = ()
    for i in tl.static_range(16):
        x = tile[i]
        if AT_MOST:
            x = tl.where(x > 0, x, 0.0)
        scores = scores + (x,)
        magnitude = tl.abs(x)
        finite = magnitude < float("inf")
        largest = tl.where(finite, tl.maximum(largest, magnitude), largest)
    largest = tl.minimum(largest, 2.0**119)
    a = ()
    for i in tl.static_range(16):
        a = a + (number(scores[i], largest),)
    row0 = row_sums(a[0], a[1], a[2], a[3])
    row1 = row_sums(a[4], a[5], a[6], a[7])
    row2 = row_sums(a[8], a[9], a[10], a[11])
    row3 = row_sums(a[12], a[13], a[14], a[15])
    top = half(row0, row1, TOP, PAIR_STARTS, PAIR_RESTS)
    bottom = half(row2, row3, BOTTOM, PAIR_STARTS, PAIR_RESTS)
    total = top[0][0] + bottom[0][BOTTOM_OF_TOP[0]]
    bits = top[1][0] | bottom[1][BOTTOM_OF_TOP[0]]
    total, bits = joined(total, bits, top, bottom, BOTTOM_OF_TOP, PAIR_RESTS)
    if AT_MOST:
        mixed = half(row0, row1, MIXED_TOP, MIXED_STARTS, MIXED_RESTS)
        total, bits = joined(total, bits, mixed, bottom, BOTTOM_OF_MIXED, MIXED_RESTS)
        mixed = half(row2, row3, MIXED_BOTTOM, MIXED_STARTS, MIXED_RESTS)
        total, bits = joined(total, bits, mixed, top, TOP_OF_MIXED, MIXED_RESTS)
    return bits


@triton.jit
def split_16(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The 16 entries of the tiles of a block, each (ROWS / 4, COLUMNS / 4)."""
    x = tl.reshape(x, (ROWS // 4, 4, COLUMNS // 4, 4))
    x = tl.permute(x, (0, 2, 3, 1))  # of a tile the column, then the row
    x = tl.reshape(x, (ROWS // 4, COLUMNS // 4, 2, 2, 2, 2))
    r0, r1, r2, r3 = split_4(x)  # each (ROWS / 4, COLUMNS / 4, 2, 2)
    return split_4(r0) + split_4(r1) + split_4(r2) + split_4(r3)


@triton.jit
def nm_tile_mask(
    scores_ptr,
    bits_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_MOST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Writes the bits of every tile, (ROWS / 4, COLUMNS / 4)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS
    rows = row + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    scores = tl.load(scores_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = transposable_2to4(split_16(scores, BLOCK_ROWS, BLOCK_COLUMNS), AT_MOST)
    rows = row // 4 + tl.arange(0, BLOCK_ROWS // 4)
    columns = column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    inside = (rows[:, None] < ROWS // 4) & (columns[None, :] < COLUMNS // 4)
    tl.store(bits_ptr + rows[:, None] * (COLUMNS // 4) + columns[None, :], bits, inside)


@triton.jit
def nm_compress_tiles(
    w_ptr,
    values_ptr,
    words_ptr,
    values_t_ptr,
    words_t_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    AT_MOST: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 64
    BLOCK_N: tl.constexpr,  # a multiple of 64
):
    """Writes w (K, N) and its transpose compressed, as `nm_compress` writes them."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_K
    n = tl.program_id(1).to(tl.int64) * BLOCK_N
    ks = k + tl.arange(0, BLOCK_K)
    ns = n + tl.arange(0, BLOCK_N)
    inside = (ks[:, None] < K) & (ns[None, :] < N)
    w = tl.load(w_ptr + ks[:, None] * N + ns[None, :], mask=inside, other=0.0)
    tile = split_16(w, BLOCK_K, BLOCK_N)
    scores = ()
    for i in tl.static_range(16):
        scores = scores + (tl.abs(tile[i].to(tl.float32)),)
    bits = transposable_2to4(scores, AT_MOST)

    p0, nibble0 = pair(tile, bits, 0, 4)  # of W, whose groups run down the columns
    p1, nibble1 = pair(tile, bits, 1, 4)
    p2, nibble2 = pair(tile, bits, 2, 4)
    p3, nibble3 = pair(tile, bits, 3, 4)
    values = join_4(p0, p1, p2, p3)  # (K / 4, N / 4, 2 values, 4 columns)
    values = tl.reshape(tl.permute(values, (1, 3, 0, 2)), (BLOCK_N, BLOCK_K // 2))
    nibble = join_4(nibble0, nibble1, nibble2, nibble3)  # (K / 4, N / 4, 4)
    nibble = tl.reshape(tl.permute(nibble, (1, 2, 0)), (BLOCK_N, BLOCK_K // 4))
    store(values_ptr, words_ptr, values, nibble, n, k, N, K, BLOCK_N, BLOCK_K)

    p0, nibble0 = pair(tile, bits, 0, 1)  # of Wᵀ, whose groups run along the rows
    p1, nibble1 = pair(tile, bits, 4, 1)
    p2, nibble2 = pair(tile, bits, 8, 1)
    p3, nibble3 = pair(tile, bits, 12, 1)
    values = join_4(p0, p1, p2, p3)  # (K / 4, N / 4, 2 values, 4 rows)
    values = tl.reshape(tl.permute(values, (0, 3, 1, 2)), (BLOCK_K, BLOCK_N // 2))
    nibble = join_4(nibble0, nibble1, nibble2, nibble3)
    nibble = tl.reshape(tl.permute(nibble, (0, 2, 1)), (BLOCK_K, BLOCK_N // 4))
    store(values_t_ptr, words_t_ptr, values, nibble, k, n, K, N, BLOCK_K, BLOCK_N)


@triton.jit
def pair(tile, bits, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The two values and the nibble of a row or column of every tile."""
    kept = ()
    for i in tl.static_range(4):
        kept = kept + ((bits >> (FIRST + i * STEP)) & 1 == 1,)
    v0, v1, nibble = stored_2to4(
        tile[FIRST],
        tile[FIRST + STEP],
        tile[FIRST + 2 * STEP],
        tile[FIRST + 3 * STEP],
        kept[0],
        kept[1],
        kept[2],
        kept[3],
    )
    return tl.join(v0, v1), nibble


@triton.jit
def join_4(x0, x1, x2, x3):
    """The four along a new last axis: undoes `split_4`."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(joined, x0.shape + [4])

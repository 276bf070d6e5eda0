"""The 4x4 transposable choice in Triton, and mask + compress of W and Wᵀ under it.

`transposable_2to4` does what that of `tile_selection.py` does, in the same order, with
the same sums. A thread has whole tiles: Triton splits a block, reshaped to tiles, into
its 16 entries. A choice is a sum and bits here as well, of which functions take and
return tuples: the pairs of columns are in the order of `tile_selection.PAIRS`, in which
pair 5 - p has the columns that pair p has not.

Compiled for sm_80 and sm_90, interpreted, and the PTX run on a CPU
(`tests/pallas_kernels/ptx_machine.py`). Not yet run on a GPU.
"""

# Triton reads Python of its own, whose types are not those of Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
import triton
import triton.language as tl

from pallas_kernels.tile_selection import PAIRS, entry_bits
from pallas_kernels.triton.magnitude_kernel import split_4, store, stored_2to4

PAIR_FIRST = tl.constexpr(tuple(i for i, _ in PAIRS))
PAIR_SECOND = tl.constexpr(tuple(j for _, j in PAIRS))
BITS = tl.constexpr(tuple(entry_bits(r, c) for r in range(4) for c in range(4)))


@triton.jit
def row_of(a, ROW: tl.constexpr):
    """The choices of the entries of a row: four sums, four bits."""
    sums = ()
    bits = ()
    for i in tl.static_range(4 * ROW, 4 * ROW + 4):
        sums = sums + (a[i],)
        bits = bits + (tl.full(a[i].shape, BITS[i], tl.int32),)
    return sums, bits


@triton.jit
def both_of(x, y):
    """The choices of both entries of each column."""
    sums = ()
    bits = ()
    for c in tl.static_range(4):
        sums = sums + (x[0][c] + y[0][c],)
        bits = bits + (x[1][c] | y[1][c],)
    return sums, bits


@triton.jit
def better(total, bits, other_total, other_bits):
    """The one of larger sum; in a tie the first."""
    larger = other_total > total
    return tl.where(larger, other_total, total), tl.where(larger, other_bits, bits)


@triton.jit
def cross(x, y):
    """For every two columns the better of one from x and the other from y."""
    sums = ()
    bits = ()
    for p in tl.static_range(6):
        total, code = better(
            x[0][PAIR_FIRST[p]] + y[0][PAIR_SECOND[p]],
            x[1][PAIR_FIRST[p]] | y[1][PAIR_SECOND[p]],
            x[0][PAIR_SECOND[p]] + y[0][PAIR_FIRST[p]],
            x[1][PAIR_SECOND[p]] | y[1][PAIR_FIRST[p]],
        )
        sums = sums + (total,)
        bits = bits + (code,)
    return sums, bits


@triton.jit
def matched(crossed):
    """The best of two columns from x and the other two from y, of `cross(x, y)`."""
    sums, bits = crossed
    return better(
        sums[1] + sums[4], bits[1] | bits[4], sums[0] + sums[5], bits[0] | bits[5]
    )


@triton.jit
def alone(p: tl.constexpr, row, one):
    """Two entries of a row, and of `one` the best in the other two columns."""
    two = row[0][PAIR_FIRST[p]] + row[0][PAIR_SECOND[p]]
    code = row[1][PAIR_FIRST[p]] | row[1][PAIR_SECOND[p]] | one[1][5 - p]
    return two + one[0][5 - p], code


@triton.jit
def with_7(total, bits, x, y, both, crossed):
    """The best mask of which row x or y keeps one entry, if that is better."""
    alone_x, alone_y = cross(x, both), cross(y, both)
    for p in tl.static_range(6):
        x_total, x_bits = alone(p, y, alone_x)
        y_total, y_bits = alone(p, x, alone_y)
        one_total, one_bits = better(x_total, x_bits, y_total, y_bits)
        total, bits = better(
            total, bits, crossed[0][p] + one_total, crossed[1][p] | one_bits
        )
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
    row0, row1, row2, row3 = row_of(a, 0), row_of(a, 1), row_of(a, 2), row_of(a, 3)
    top, bottom = both_of(row0, row1), both_of(row2, row3)
    upper, lower, both = cross(row0, row1), cross(row2, row3), cross(top, bottom)
    total, bits = matched(both)
    for p in tl.static_range(6):
        other = (upper[0][p] + lower[0][p]) + both[0][5 - p]
        code = upper[1][p] | lower[1][p] | both[1][5 - p]
        total, bits = better(total, bits, other, code)
    of_upper, of_lower = matched(upper), matched(lower)
    total, bits = better(
        total, bits, of_upper[0] + of_lower[0], of_upper[1] | of_lower[1]
    )
    if AT_MOST:
        total, bits = with_7(total, bits, row0, row1, bottom, lower)
        total, bits = with_7(total, bits, row2, row3, top, upper)
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

"""Which 8 (or 7) entries of a 4x4 tile to keep: the exact transposable 2:4 selection.

There are 90 masks of 4x4 with two entries in every row and column, and 96 more that
keep 7 and are maximal among those with at most two. The best is found without listing
them. Two rows contribute one of 19 counts k = (k0, k1, k2, k3) to the columns, and the
other two rows must contribute the rest,

    best = max over k of  top(k) + bottom(2 - k),
    top(k) = max over the pairs of row patterns that add up to k,

so 36 sums of two rows in each half and 19 sums of two halves take the place of 90 sums
of 8 scores. Only additions, comparisons and selects of whole arrays: the same function
runs inside a kernel and in XLA.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Tile = Sequence[Sequence[jax.Array]]
Columns = tuple[int, ...]

# The columns that a row keeps: two, and with at_most also one.
_PAIRS = list(itertools.combinations(range(4), 2))
_PAIR_PAIR = list(itertools.product(_PAIRS, _PAIRS))
_SINGLE_PAIR = [((c,), pair) for c in range(4) for pair in _PAIRS if c not in pair]
_PAIR_SINGLE = [(pair, single) for single, pair in _SINGLE_PAIR]

# Larger magnitudes count as this one: 8 scores of 32 times as much have a finite sum.
_LARGEST = 2.0**119
_SMALLEST = 2.0**-126


def transposable_2to4(tile: Tile, *, at_most: bool = False) -> jax.Array:
    """Selects the transposable 2:4 mask of largest sum of a 4x4 tile, or of many.

    Maximises the float32 sum of the scores kept over the 90 masks with two entries in
    every row and column, or with `at_most` over all 186 maximal masks with at most two,
    which the hardware takes as well. Scores are ranked as they are: pass the magnitudes
    of weights. An infinite score outweighs all finite ones of its tile together, a NaN
    counts as two of -inf. With `at_most`, negative scores and NaN count as zero.

    Ties are decided by one fixed order, in which a later mask has to be strictly better
    and those of 7 entries come last. A constant tile keeps columns 0 and 1 in rows 0
    and 1, columns 2 and 3 in rows 2 and 3.

    Args:
      tile: `tile[row][column]`, 4x4 real arrays of one shape: entry i of all of them
        forms tile i.
      at_most: Allow fewer than two entries in one row and one column.

    Returns:
      int32 array of that shape. Bit `4 * row + column` is set where the entry is kept.
    """
    a = [[entry.astype(jnp.float32) for entry in row] for row in tile]
    if at_most:  # NaN > 0 is false
        a = [[jnp.where(x > 0, x, jnp.zeros_like(x)) for x in row] for row in a]
    a = _finite(a)
    top = _half(a[:2], _PAIR_PAIR, row=0)
    bottom = _half(a[2:], _PAIR_PAIR, row=2)
    candidates = _joined(top, bottom)
    if at_most:
        mixed = _SINGLE_PAIR + _PAIR_SINGLE
        candidates += _joined(_half(a[:2], mixed, row=0), bottom)
        candidates += _joined(_half(a[2:], mixed, row=2), top)
    return functools.reduce(_better, candidates)[1]


def unpack_tile(bits: jax.Array) -> list[list[jax.Array]]:
    """The boolean `mask[row][column]` of the bits of `transposable_2to4`."""
    return [[(bits >> (4 * r + c)) & 1 == 1 for c in range(4)] for r in range(4)]


def _finite(a: Tile) -> Tile:
    """The tile with infinities and NaN replaced by numbers that keep their order.

    Exchanging kept entries along one cycle of the tile moves at most 4 in and 4 out, so
    16 times the largest finite magnitude decides before all finite scores do.
    """
    largest = jnp.full_like(a[0][0], _SMALLEST)
    for x in (x for row in a for x in row):
        magnitude = jnp.abs(x)  # of NaN is not below infinity
        largest = jnp.where(
            magnitude < jnp.inf, jnp.maximum(largest, magnitude), largest
        )
    largest = jnp.minimum(largest, _LARGEST)
    infinite = 16 * largest

    def number(x):
        below = jnp.where(x < 0, -infinite, -2 * infinite)
        beyond = jnp.where(x > 0, infinite, below)
        clipped = jnp.minimum(jnp.maximum(x, -largest), largest)
        return jnp.where(jnp.abs(x) < jnp.inf, clipped, beyond)

    return [[number(x) for x in row] for row in a]


# A sum and the bits that give it.
Choice = tuple[jax.Array, jax.Array]
# The best choice in two rows, by what it leaves to the columns for the other two rows.
Half = dict[Columns, Choice]


def _half(a: Tile, choices: Sequence[tuple[Columns, Columns]], *, row: int) -> Half:
    """The best choice of columns of two rows, the first of which is row `row`."""
    sums = {}
    for upper_row, lower_row in choices:
        for r, kept in ((0, upper_row), (1, lower_row)):
            if (r, kept) not in sums:
                sums[r, kept] = functools.reduce(jnp.add, [a[r][c] for c in kept])
    half: Half = {}
    for upper_row, lower_row in choices:
        total = sums[0, upper_row] + sums[1, lower_row]
        code = sum(1 << (4 * row + c) for c in upper_row)
        code += sum(1 << (4 * (row + 1) + c) for c in lower_row)
        choice = total, jnp.full_like(total, code, jnp.int32)
        # A single entry has its row and its column for itself.
        single = {c for kept in (upper_row, lower_row) if len(kept) == 1 for c in kept}
        rest = tuple(
            0 if c in single else 2 - (c in upper_row) - (c in lower_row)
            for c in range(4)
        )
        half[rest] = _better(half[rest], choice) if rest in half else choice
    return half


def _joined(half: Half, other: Half) -> list[Choice]:
    """The sum and bits of both halves, for everything the first leaves to the other."""
    joined = []
    for rest, (total, bits) in half.items():
        other_total, other_bits = other[tuple(2 - k for k in rest)]
        joined.append((total + other_total, bits | other_bits))
    return joined


def _better(best: Choice, other: Choice) -> Choice:
    """The one of larger sum; in a tie the first."""
    larger = other[0] > best[0]
    return jnp.where(larger, other[0], best[0]), jnp.where(larger, other[1], best[1])

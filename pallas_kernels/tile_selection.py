"""Which 8 (or 7) entries of a 4x4 tile to keep: the exact transposable 2:4 selection.

There are 90 masks of 4x4 with two entries in every row and column, and 96 more that
keep 7 and are maximal among those with at most two. The best is found without listing
them. Where two lines x and y share columns i and j, one each, the choice of who takes
which does not depend on the rest of the tile:

    cross(x, y)_ij = max(x_i + y_j, x_j + y_i)

With the rows a0 to a3, top = a0 + a1 and bottom = a2 + a3, let

    u = cross(a0, a1)        the upper rows keep one of column i and one of j
    l = cross(a2, a3)        the lower rows do
    b = cross(top, bottom)   one column is kept in both upper rows, the other below

The upper rows keep 0, 1 or 2 entries of a column and the lower rows the rest, hence a
mask is of one of three kinds:

    u_ij + l_ij + b_kl       one above and one below in two columns      48 masks
    matched(u) + matched(l)  in all four                                 36 masks
    matched(b)               in none                                      6 masks

where matched(x) = max(x_02 + x_13, x_01 + x_23) shares all four columns in any way.
These are 28 comparisons and 63 additions; to list 90 sums would take 89 and 630. Only
additions, comparisons and selects of whole arrays: the same function runs inside a
kernel and in XLA.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Tile = Sequence[Sequence[jax.Array]]
# A sum of scores and the bits of the entries that give it.
Choice = tuple[jax.Array, jax.Array]

PAIRS = tuple(itertools.combinations(range(4), 2))

# Larger magnitudes count as this one: 8 scores of 32 times as much have a finite sum.
_LARGEST = 2.0**119
_SMALLEST = 2.0**-126


def transposable_2to4(
    tile: Tile, *, at_most: bool = False, where_any: Callable | None = None
) -> jax.Array:
    """Selects the transposable 2:4 mask of largest sum of a 4x4 tile, or of many.

    Maximises the float32 sum of the scores kept over the 90 masks with two entries in
    every row and column, or with `at_most` over all 186 maximal masks with at most two,
    which the hardware takes as well. Scores are ranked as they are: pass the magnitudes
    of weights. An infinite score outweighs all finite ones of its tile together, a NaN
    counts as two of -inf. With `at_most`, negative scores and NaN count as zero. Where
    a tile has magnitudes beyond 2¹¹⁹ (6.6e35) these count as 2¹¹⁹, and sums below 2⁻¹²⁶
    are zero where the device flushes subnormal numbers, as XLA does on CPU.

    Ties are decided by one fixed order, in which a later mask has to be strictly better
    and those of 7 entries come last. A constant tile keeps columns 0 and 1 in rows 0
    and 1, columns 2 and 3 in rows 2 and 3.

    Args:
      tile: `tile[row][column]`, 4x4 real arrays of one shape: entry i of all of them
        forms tile i.
      at_most: Allow fewer than two entries in one row and one column.
      where_any: `where_any(condition, function, operand)`, which may skip a function
        that changes nothing where the condition is false: a branch, in a kernel. None
        = the function is always applied.

    Returns:
      int32 array of that shape. Bit `4 * row + column`, and bit `16 + 4 * column + row`
      too, are set where the entry is kept: the mask and its transpose.
    """
    scores = [[entry.astype(jnp.float32) for entry in row] for row in tile]
    if at_most:  # NaN > 0 is false
        scores = [[jnp.where(x > 0, x, jnp.zeros_like(x)) for x in r] for r in scores]
    if where_any is None:
        scores = _finite(scores)
    else:
        scores = where_any(_beyond(scores), _finite, scores)
    a = [
        [(x, jnp.full_like(x, entry_bits(r, c), jnp.int32)) for c, x in enumerate(row)]
        for r, row in enumerate(scores)
    ]
    top, bottom = _sums(a[0], a[1]), _sums(a[2], a[3])
    upper, lower, both = _cross(a[0], a[1]), _cross(a[2], a[3]), _cross(top, bottom)
    candidates = [_matched(both)]
    candidates += [
        _sum(_sum(upper[pair], lower[pair]), both[_others(pair)]) for pair in PAIRS
    ]
    candidates += [_sum(_matched(upper), _matched(lower))]
    if at_most:
        candidates += _with_7(a[0], a[1], bottom, lower)
        candidates += _with_7(a[2], a[3], top, upper)
    return functools.reduce(_better, candidates)[1]


def unpack_tile(bits: jax.Array) -> list[list[jax.Array]]:
    """The boolean `mask[row][column]` of the bits of `transposable_2to4`."""
    return [[(bits >> (4 * r + c)) & 1 == 1 for c in range(4)] for r in range(4)]


def entry_bits(row: int, column: int) -> int:
    """The bits of an entry of the tile, as a signed number of 32 bits."""
    bits = 1 << (4 * row + column) | 1 << (16 + 4 * column + row)
    return bits - (bits >> 31 << 32)


def _sum(x: Choice, y: Choice) -> Choice:
    """What two choices keep together."""
    return x[0] + y[0], x[1] | y[1]


def _sums(x: Sequence[Choice], y: Sequence[Choice]) -> list[Choice]:
    """The choices of both entries of each column."""
    return [_sum(*column) for column in zip(x, y, strict=True)]


def _better(best: Choice, other: Choice) -> Choice:
    """The one of larger sum; in a tie the first."""
    larger = other[0] > best[0]
    return jnp.where(larger, other[0], best[0]), jnp.where(larger, other[1], best[1])


def _cross(x: Sequence[Choice], y: Sequence[Choice]) -> dict[tuple[int, ...], Choice]:
    """For every two columns the better of one from x and the other from y."""
    return {(i, j): _better(_sum(x[i], y[j]), _sum(x[j], y[i])) for i, j in PAIRS}


def _matched(crossed: dict[tuple[int, ...], Choice]) -> Choice:
    """The best of two columns from x and the other two from y, of `_cross(x, y)`."""
    return _better(
        _sum(crossed[0, 2], crossed[1, 3]), _sum(crossed[0, 1], crossed[2, 3])
    )


def _others(pair: tuple[int, ...]) -> tuple[int, ...]:
    """The two columns that are not in the pair."""
    return tuple(c for c in range(4) if c not in pair)


def _with_7(x, y, both, crossed) -> list[Choice]:
    """The best masks of which row x, or row y, keeps a single entry.

    It has its row and its column for itself. Of the other columns, two are kept in the
    other row of the half and once each in the other half, `crossed`, and the last twice
    in the other half, `both`.
    """
    alone_x, alone_y = _cross(x, both), _cross(y, both)
    return [
        _sum(
            crossed[i, j],
            _better(
                _sum(_sum(y[i], y[j]), alone_x[_others((i, j))]),
                _sum(_sum(x[i], x[j]), alone_y[_others((i, j))]),
            ),
        )
        for i, j in PAIRS
    ]


def _beyond(a: Tile) -> jax.Array:
    """Whether `_finite` might change an entry of the tile."""
    total = functools.reduce(jnp.add, [jnp.abs(x) for row in a for x in row])
    return ~(total < _LARGEST)  # nor is a NaN


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

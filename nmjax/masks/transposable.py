"""Transposable N:M masks: `n` of every `m` kept along both of the last two axes.

A sparse tensor core multiplies by `W` along its rows and by its transpose along its
columns, so one mask serves the forward pass and the gradient of the input if each m x m
tile has n entries in every row and every column (arXiv:2102.08124). The best such mask
is a small optimisation problem per tile, solved here exactly.
"""

import functools
from typing import Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from nmjax.masks.cycle_cancelling import (
    MAX_M,
    BestTiles,
    best_tiles,
    integer_scores,
)
from nmjax.masks.entropic import entropic_tiles
from nmjax.masks.greedy import greedy_tiles
from nmjax.masks.magnitude import _keys, _real
from nmjax.masks.tile_layout import (
    check_tiles,
    from_entries,
    from_tiles,
    tile_entries,
    to_tiles,
)
from nmjax.pattern import NMPattern
from pallas_kernels.tile_selection import transposable_2to4, unpack_tile

Method = Literal["exact", "greedy", "entropic"]


class CertifiedMask(NamedTuple):
    """A transposable mask and how far from the optimum it can be.

    Attributes:
      mask: bool, the shape of the scores.
      gap: float32 `(..., R/m, C/m)`, one number per tile, in units of the scores: no
        other mask of the tile has a sum larger by more than this.
      rounds: int32 scalar, rounds of cycle cancelling that the slowest tile took.
    """

    mask: jax.Array
    gap: jax.Array
    rounds: jax.Array


@overload
def transposable_mask(
    scores: ArrayLike,
    pattern: str | NMPattern,
    *,
    at_most: bool = False,
    method: Method = "exact",
    certificate: Literal[False] = False,
) -> jax.Array: ...
@overload
def transposable_mask(
    scores: ArrayLike,
    pattern: str | NMPattern,
    *,
    at_most: bool = False,
    method: Method = "exact",
    certificate: Literal[True],
) -> CertifiedMask: ...
def transposable_mask(
    scores: ArrayLike,
    pattern: str | NMPattern,
    *,
    at_most: bool = False,
    method: Method = "exact",
    certificate: bool = False,
) -> jax.Array | CertifiedMask:
    """Keeps `n` of every `m` along both of the last two axes, with the largest sum.

    The last two axes, the `(in, out)` matrix of a Dense kernel or of each position of
    an HWIO conv kernel, are cut into m x m tiles. The mask E of a tile S solves

        max_E  sum_ij E_ij S_ij    with  sum_i E_ij = sum_j E_ij = n,  E_ij in {0, 1}

    ("greedy" and "entropic" come close to it). Scores are ranked as they are: for
    weights pass magnitudes. 2:4 compares float32 sums, other patterns exact sums of
    scores that were rounded to 2^-24 of the largest of their tile. Either way no mask
    has a sum larger by more than m^2 2^-22 times the largest magnitude in the tile.

    +inf is kept before, and -inf after, all finite scores of the tile together; NaN
    counts as two of -inf. (Other than for 2:4, finite scores beside them are rounded to
    2^-16 of the largest.) Ties are decided by a fixed rule, the same on every device:
    2:4 keeps columns 0 and 1 of rows 0 and 1 of a constant tile, and columns 2 and 3 of
    the other two; other patterns start from columns i to i + n - 1 (mod m) of row i,
    and leave that only for a strictly larger sum. Nothing is differentiated: the mask
    is a constant to `jax.grad`.

    Args:
      scores: Real array `(..., R, C)` of any real dtype; m divides R and C.
      pattern: The N:M pattern, with m up to 32.
      at_most: Allow fewer than n in a row or column, which the hardware takes as well:
        of 2:4 there are 96 such masks besides the 90 with two everywhere. The sum is
        never smaller (0.05 % larger for normal weights), and no entry could be added.
        Negative scores and NaN count as zero.
      method: "exact"; "greedy", from the largest score down, which may end with fewer
        than n in a row and a column, with or without `at_most`; or "entropic", optimal
        transport with entropy, rounded (arXiv:2505.23949), with n everywhere. The last
        two are there to compare with.
      certificate: Also return how far from the optimum the mask can be.

    Returns:
      Boolean array of the shape of `scores`, `True` = kept; with `certificate` a
      `CertifiedMask`.

    Raises:
      ValueError: If the pattern, the dtype or the method is not one of the above, or m
        does not divide one of the axes, or its shards if its sharding is explicit.
    """
    pattern = NMPattern(pattern)
    scores = check_tiles(_real(jnp.asarray(scores)), pattern)
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: expected one of {list(get_args(Method))}")
    if pattern.m > MAX_M and pattern.n < pattern.m:
        raise ValueError(
            f"pattern {pattern}: transposable masks need m <= {MAX_M}, since sets of "
            "rows are 32-bit words; choose a smaller m"
        )
    scores = lax.stop_gradient(scores)
    return _transposable_mask(scores, pattern, at_most, method, certificate)


def kept_and_best(
    scores: ArrayLike,
    mask: ArrayLike,
    pattern: str | NMPattern,
    *,
    at_most: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the scores that a mask keeps, and the sum that the best one would.

    `1 - kept / best` is the gap of a transposable mask to its optimum. Sums of several
    arrays may be added first.

    Args:
      scores: Finite real array `(..., R, C)`; for weights, magnitudes.
      mask: Boolean array of the same shape, `True` = kept.
      pattern: The N:M pattern, with m up to 32.
      at_most: Compare with the best mask of at most n in every row and column.

    Returns:
      Two float32 scalars.

    Raises:
      ValueError: As `transposable_mask`, and if the shapes differ.
    """
    scores, mask = jnp.asarray(scores), jnp.asarray(mask)
    if mask.shape != scores.shape:
        raise ValueError(
            f"a mask of shape {mask.shape} does not fit scores of shape {scores.shape}"
        )
    best = transposable_mask(scores, pattern, at_most=at_most)
    scores = scores.astype(jnp.float32)

    def total(mask):
        return jnp.sum(jnp.where(mask, scores, 0))

    return total(mask), total(best)


@functools.partial(
    jax.jit, static_argnames=("pattern", "at_most", "method", "certificate")
)
def _transposable_mask(
    scores: jax.Array,
    pattern: NMPattern,
    at_most: bool,
    method: Method,
    certificate: bool,
) -> jax.Array | CertifiedMask:
    n, m = pattern.n, pattern.m
    if method == "exact" and (n, m) == (2, 4) and not certificate:
        return _exact_2to4(scores, at_most)
    tiles, best = to_tiles(scores, m), None
    if n == m:
        mask = jnp.ones_like(tiles, jnp.bool_)
    elif method == "greedy":
        mask = greedy_tiles(_keys(tiles.astype(jnp.float32), magnitude=False), n)
    elif method == "entropic":
        mask = entropic_tiles(integer_scores(tiles)[0], n)
    elif (n, m) == (2, 4):
        mask = to_tiles(_exact_2to4(scores, at_most), m)
    else:
        best = best_tiles(integer_scores(tiles, at_most=at_most)[0], n, at_most=at_most)
        mask = best.mask
    if not certificate:
        return from_tiles(mask)
    if n == m:
        gap = jnp.zeros_like(tiles[0, 0], jnp.float32)
        return CertifiedMask(from_tiles(mask), gap, jnp.int32(0))
    integers, unit = integer_scores(tiles, at_most=at_most)
    best = best or best_tiles(integers, n, at_most=at_most)
    gap = _gap(tiles, mask, n, integers, unit, best, at_most)
    return CertifiedMask(from_tiles(mask), gap, best.rounds)


def _exact_2to4(scores: jax.Array, at_most: bool) -> jax.Array:
    bits = transposable_2to4(tile_entries(scores, 4), at_most=at_most)
    return from_entries(unpack_tile(bits))


def _gap(
    tiles: jax.Array,
    mask: jax.Array,
    n: int,
    integers: jax.Array,
    unit: jax.Array,
    best: BestTiles,
    at_most: bool,
) -> jax.Array:
    """How much more than `mask` any mask could keep, by the prices a and b of `best`.

    As E_ij <= 1 and every mask takes n from each row and column (at most n, if the
    prices are not negative), no sum exceeds n sum_i a_i + n sum_j b_j + sum_ij
    max(0, S_ij - a_i - b_j). The gap is that less the sum of the mask.
    """
    scores = tiles.astype(jnp.float32)
    if at_most:
        scores = jnp.where(scores > 0, scores, 0)
    rounding = jnp.where(
        jnp.isfinite(scores), scores - unit * integers.astype(jnp.float32), 0
    )
    over = integers - best.row_price[:, None] - best.column_price[None]
    reduced = unit * over.astype(jnp.float32) + rounding
    gap = jnp.maximum(jnp.where(mask, -reduced, reduced), 0).sum((0, 1))
    # Adding a constant to all a and taking it from all b changes nothing.
    shift = best.row_price.max(0)
    for price, kept in (
        (best.row_price - shift, mask.sum(1)),
        (best.column_price + shift, mask.sum(0)),
    ):
        room = (n - kept).astype(jnp.float32)
        gap += (unit * price.astype(jnp.float32) * room).sum(0)
    return gap

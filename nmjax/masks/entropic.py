"""Transposable N:M masks by optimal transport with entropy (TSENOR, arXiv:2505.23949).

With the constraint E in {0, 1} relaxed to 0 <= P <= 1 and an entropy added, a tile is

    max_P  sum_ij P_ij S_ij + tau H(P)    with  sum_i P_ij = sum_j P_ij = n,  P <= 1,

which alternating projections solve (Dykstra): onto the rows, the columns and P <= 1,
all in the logarithm of P. The plan is then rounded: its entries are taken from the
largest down, and rows and columns that end short are filled by the best exchange.

It is here to compare with: it comes within 0.1 % of the optimum on normal weights, and
takes many times as long as the exact solver on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.cycle_cancelling import best_tiles
from nmjax.masks.greedy import greedy_tiles

# tau is relative to the largest score of the tile.
_TEMPERATURE = 0.005
_ITERATIONS = 300
_EXCHANGES = 10


def entropic_tiles(scores: jax.Array, n: int) -> jax.Array:
    """Masks with n entries in every row and column, and nearly the largest sum.

    Args:
      scores: int32 `(m, m, ...)` of `integer_scores`: row, column, tiles.
      n: Entries kept of each row and of each column.

    Returns:
      bool `(m, m, ...)`.
    """
    plan = _transport(scores.astype(jnp.float32) * 2.0**-24, n)
    mask = greedy_tiles(lax.bitcast_convert_type(plan, jnp.int32), n)
    mask = lax.fori_loop(
        0, _EXCHANGES, lambda _, mask: _exchange(scores, mask, n), mask
    )
    # What is still short is filled along any way that there is.
    one = jnp.ones_like(scores)
    return best_tiles(one, n, at_most=True, start=mask).mask


def _transport(scores: jax.Array, n: int) -> jax.Array:
    """The plan P of the relaxed problem, `(m, m, ...)`; n in every row and column."""

    def project(_, carry):
        log_plan, excess = carry
        for axis in (1, 0):
            log_sum = jax.nn.logsumexp(log_plan, axis=axis, keepdims=True)
            log_plan += jnp.log(float(n)) - log_sum
        # Only the set P <= 1 needs Dykstra's correction: the other two are affine.
        log_plan += excess
        excess = jnp.maximum(log_plan, 0)
        return log_plan - excess, excess

    carry = scores / _TEMPERATURE, jnp.zeros_like(scores)
    return jnp.exp(lax.fori_loop(0, _ITERATIONS, project, carry)[0])


def _exchange(scores: jax.Array, mask: jax.Array, n: int) -> jax.Array:
    """Gives one short row i and one short column j of each tile an entry each.

    Of all kept (k, l) with (i, l) and (k, j) free, the one whose removal in favour of
    these two gains most is exchanged.
    """
    short_row, short_column = mask.sum(1) < n, mask.sum(0) < n
    row, column = _first(short_row), _first(short_column)  # one-hot
    row_scores = jnp.where(row[:, None], scores, 0).sum(0)  # of row i
    row_kept = (mask & row[:, None]).any(0)
    column_scores = jnp.where(column[None], scores, 0).sum(1)  # of column j
    column_kept = (mask & column[None]).any(1)
    gain = row_scores[None] + column_scores[:, None] - scores
    free = mask & ~row_kept[None] & ~column_kept[:, None]
    free &= short_row.any(0) & short_column.any(0)
    best = jnp.where(free, gain, jnp.iinfo(jnp.int32).min).max((0, 1))
    candidates = free & (gain == best)
    removed_row = _first(candidates.any(1))
    removed_column = _first((candidates & removed_row[:, None]).any(0))
    removed = removed_row[:, None] & removed_column[None]
    added = (row[:, None] & removed_column[None]) | (
        removed_row[:, None] & column[None]
    )
    return (mask | added) & ~removed


def _first(flags: jax.Array) -> jax.Array:
    """Only the first True along the first axis; none where there is none."""
    return flags & (jnp.cumsum(flags, axis=0) == 1)

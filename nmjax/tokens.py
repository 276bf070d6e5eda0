"""What recipes make of the (tokens, columns) matrices of x and dy.

Each function takes `(…, tokens, columns)` and acts along the tokens, the axis that
wgrad contracts. Where m does not divide their number, zeros fill the last group; where
explicit mesh axes cut the tokens, each device must hold whole groups of them.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from nmjax import masks
from nmjax.masks.magnitude import check_shards
from nmjax.pattern import NMPattern
from nmjax.sampling import mvue


def sparse_tiles(algorithm: str, x: jax.Array) -> jax.Array:
    """x `(…, tokens, features)` masked by 4×4 tiles."""
    tokens = x.shape[-2]
    padded = _fill_rows(x, NMPattern(2, 4))
    mask = lax.slice_in_dim(masks.tile_mask(padded, algorithm), 0, tokens, axis=-2)
    return jnp.where(mask, x, jnp.zeros_like(x))


def sampled(pattern: NMPattern, key: jax.Array, dy: jax.Array) -> jax.Array:
    """dy `(…, tokens, out)` with n of every m tokens kept, unbiased."""
    values, _ = mvue(_fill_rows(dy, pattern), key, pattern, axis=-2)
    return lax.slice_in_dim(values, 0, dy.shape[-2], axis=-2)


def _kept_places(pattern: NMPattern) -> list[int]:
    """The places kept of every m tokens, spread evenly from the first: 0, 2 of 4."""
    return [i * pattern.m // pattern.n for i in range(pattern.n)]


def kept_rows(pattern: NMPattern, x: jax.Array) -> jax.Array:
    """x `(…, tokens, features)` at the kept places: `(…, tokens · n / m, features)`."""
    groups = _grouped(pattern, x)
    kept = groups[..., jnp.asarray(_kept_places(pattern)), :]
    return kept.reshape(*x.shape[:-2], -1, x.shape[-1])


def joined_rows(pattern: NMPattern, dy: jax.Array) -> jax.Array:
    """dy `(…, tokens, out)` summed over each kept place and those left out after it."""
    sums = _joined(pattern, dy)
    return jnp.stack(sums, -2).reshape(*dy.shape[:-2], -1, dy.shape[-1])


def spread_rows(pattern: NMPattern, dy: jax.Array) -> jax.Array:
    """As `joined_rows`, with zeros at the places left out: the shape of `dy`."""
    sums = _joined(pattern, dy)
    at, zeros = _kept_places(pattern), jnp.zeros_like(sums[0])
    places = [sums[at.index(i)] if i in at else zeros for i in range(pattern.m)]
    spread = jnp.stack(places, -2).reshape(*dy.shape[:-2], -1, dy.shape[-1])
    return lax.slice_in_dim(spread, 0, dy.shape[-2], axis=-2)


def _joined(pattern: NMPattern, dy: jax.Array) -> list[jax.Array]:
    """The sums of `joined_rows`, `(…, groups, out)` for each kept place of a group."""
    groups = _grouped(pattern, dy)
    borders = itertools.pairwise([*_kept_places(pattern), pattern.m])
    return [jnp.sum(groups[..., a:b, :], -2) for a, b in borders]


def _grouped(pattern: NMPattern, rows: jax.Array) -> jax.Array:
    """`(…, tokens, columns)` -> `(…, groups, m, columns)`."""
    rows = _fill_rows(rows, pattern)
    return rows.reshape(*rows.shape[:-2], -1, pattern.m, rows.shape[-1])


def _fill_rows(rows: jax.Array, pattern: NMPattern) -> jax.Array:
    """`(…, tokens, columns)` with zeros up to a multiple of m tokens.

    Raises:
      ValueError: An explicit sharding of the tokens cuts a group.
    """
    check_shards(rows, -2, pattern)
    missing = -rows.shape[-2] % pattern.m
    if not missing:
        return rows
    widths = [(0, 0)] * (rows.ndim - 2) + [(0, missing), (0, 0)]
    return jnp.pad(rows, widths)

"""The 4x4 tile algorithms of torchao's sparse training, by their names there, and one.

torchao's and PyTorch's kernels walk one 4x4 tile of a row-major matrix at a time:

    largest_values_greedy      heaviest to lightest of the 16, at most two per row and
                               column; ranks signed values, and is torchao's default
    largest_abs_values_greedy  the same by magnitude
    causal1122                 row by row, at most 1, 1, 2 and 2 of them and two per
                               column, by signed value; never looks at a later row
    largest_notranspose        the two largest signed values of each row, 2:4
    largest_abs_notranspose    the two largest magnitudes of each row, 2:4

The first three leave both the matrix and its transpose at most 2 of every 4. So does

    largest_abs_values_exact   the largest sum of magnitudes with two in every row and
                               column: `transposable_mask` of the magnitudes

which takes a third of the operations of the greedy ones, and which alone a kernel finds
and compresses in one pass. On normal weights signed ranking keeps 54 % of the
magnitude, greedy 69 %, exact 70 %.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nmjax.masks.greedy import greedy_entries
from nmjax.masks.magnitude import _keys, _real, magnitude_mask, nm_mask
from nmjax.masks.tile_layout import check_tiles, from_entries, tile_entries
from nmjax.masks.transposable import transposable_mask
from nmjax.pattern import NMPattern

TileAlgorithm = Literal[
    "largest_values_greedy",
    "largest_abs_values_greedy",
    "causal1122",
    "largest_notranspose",
    "largest_abs_notranspose",
    "largest_abs_values_exact",
]
EXACT = "largest_abs_values_exact"
_2TO4 = NMPattern(2, 4)


def tile_mask(x: ArrayLike, algorithm: TileAlgorithm | str) -> jax.Array:
    """Chooses a 2:4 mask of every 4x4 tile, as torchao does or exactly.

    Values are ordered NaN < -inf < ... < +inf; ties go to the lower row, then to the
    lower column (torchao leaves them to its sorting network), and are the exact
    algorithm's as in `transposable_mask`.

    Args:
      x: Real array `(..., rows, columns)`, row-major as torchao sees it: activations
        are `(tokens, features)`, and a Flax kernel `(in, out)` is the transpose of
        torchao's weight. Signed values, not magnitudes.
      algorithm: One of the names above.

    Returns:
      Boolean array of the shape of `x`, `True` = kept: at most 2 of every 4 along both
      axes (8 of 16 by the exact one, 7 or 8 by the greedy ones, 6 by `causal1122`), or
      exactly 2 of every 4 along the last axis by those of one dimension.

    Raises:
      ValueError: If the name is another, the dtype has no order, or 4 does not divide
        an axis that the algorithm groups along.
    """
    if algorithm not in get_args(TileAlgorithm):
        raise ValueError(
            f"algorithm={algorithm!r}: expected one of {list(get_args(TileAlgorithm))}"
        )
    if algorithm == "largest_notranspose":
        return nm_mask(x, _2TO4, axis=-1)
    if algorithm == "largest_abs_notranspose":
        return magnitude_mask(x, _2TO4, axis=-1)
    if algorithm == EXACT:
        return transposable_mask(jnp.abs(_real(x).astype(jnp.float32)), _2TO4)
    x = check_tiles(_real(x), _2TO4)
    return _tile_mask(x, algorithm)


def sparsify_like(x: ArrayLike, mask: ArrayLike) -> jax.Array:
    """The entries of `x` that a mask of another array keeps, and zeros elsewhere.

    Args:
      x: Array of any dtype.
      mask: Boolean array of the shape of `x`, `True` = kept.

    Returns:
      Array like `x`. NaN and infinities that are not kept are zeros too.

    Raises:
      ValueError: If the shapes differ or the mask is not boolean.
    """
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    if mask.shape != x.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"a mask of shape {mask.shape} and dtype {mask.dtype} does not fit an "
            f"array of shape {x.shape}: pass a boolean mask of the same shape"
        )
    return jnp.where(mask, x, jnp.zeros_like(x))


@functools.partial(jax.jit, static_argnames="algorithm")
def _tile_mask(x: jax.Array, algorithm: str) -> jax.Array:
    magnitude = algorithm == "largest_abs_values_greedy"
    keys = tile_entries(_keys(x.astype(jnp.float32), magnitude), 4)
    if algorithm == "causal1122":
        return from_entries(_causal(keys))
    return from_entries(greedy_entries(keys, 2))


def _causal(keys: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Row after row keeps its largest entries in the columns that have room."""
    column_room = [jnp.full_like(key, 2) for key in keys[0]]
    rows = []
    for row, largest in zip(keys, (1, 1, 2, 2), strict=True):
        fits = [room > 0 for room in column_room]
        kept = []
        for c in range(4):
            rank = jnp.zeros_like(row[c])
            for j in range(4):
                precedes = row[j] >= row[c] if j < c else row[j] > row[c]
                rank += (fits[j] & precedes).astype(jnp.int32)
            kept.append(fits[c] & (rank < largest))
        column_room = [
            room - k.astype(jnp.int32)
            for room, k in zip(column_room, kept, strict=True)
        ]
        rows.append(kept)
    return rows

"""N:M masks: the `n` largest of every `m` consecutive scores along an axis.

The rank of a score is the number of scores of its group that precede it; the `n`
lowest ranks are kept. Counting costs m - 1 comparisons a score, all of them
element-wise, where a sort of many short groups is 10 to 80 times slower on XLA.
"""

import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from nmjax.pattern import NMPattern

Ragged = Literal["dense-tail", "pad"]

# Up to this group size the comparisons are unrolled into one fused loop over the
# scores. Beyond it, code and compile time would grow with m: a loop over m takes over.
_MAX_UNROLLED_M = 16


def nm_mask(
    scores: ArrayLike,
    pattern: str | NMPattern,
    *,
    axis: int = -2,
    ragged: Ragged | None = None,
) -> jax.Array:
    """Keeps the `n` largest of every `m` consecutive scores along `axis`.

    Scores are ordered NaN < -inf < ... < +inf. Ties go to the lower index, and -0.0
    ties with 0.0, so exactly `n` of each group are kept whatever the scores are.
    Nothing is differentiated: the mask is a constant to `jax.grad`.

    Args:
      scores: Real array of any rank >= 1 and any real dtype, ranked as it is (see
        `magnitude_mask` for weights).
      pattern: The N:M pattern, such as `"2:4"`.
      axis: The axis that groups run along. The default, -2, is the contraction axis
        of a Dense kernel `(in, out)` and of a Conv kernel `(h, w, in, out)`.
      ragged: What to do when `m` does not divide the axis. `None` raises.
        `"dense-tail"` keeps everything beyond the last full group. `"pad"` treats
        the tail as a group filled up with scores lower than all others, so
        `min(n, tail)` of it are kept.

    Returns:
      Boolean array of the shape of `scores`, `True` = kept.

    Raises:
      ValueError: If the pattern, the axis, the dtype or `ragged` is not one of the
        above, or if `m` does not divide the axis and `ragged` is `None`.
    """
    pattern = NMPattern(pattern)
    scores = _real(scores)
    axis = _check_axis(scores.shape, pattern, axis, ragged)
    return _nm_mask(scores, pattern, axis, ragged)


def magnitude_mask(
    w: ArrayLike,
    pattern: str | NMPattern,
    *,
    axis: int = -2,
    ragged: Ragged | None = None,
) -> jax.Array:
    """Keeps the `n` weights of largest magnitude of every `m` along `axis`.

    This is `nm_mask(|w|, ...)`, with the magnitude of the most negative integer
    represented exactly.

    Args:
      w: Real array of any rank >= 1 and any real dtype.
      pattern: The N:M pattern, such as `"2:4"`.
      axis: The axis that groups run along; see `nm_mask`.
      ragged: What to do when `m` does not divide the axis; see `nm_mask`.

    Returns:
      Boolean array of the shape of `w`, `True` = kept.

    Raises:
      ValueError: As `nm_mask`.
    """
    pattern = NMPattern(pattern)
    w = _real(w)
    axis = _check_axis(w.shape, pattern, axis, ragged)
    return _nm_mask(w, pattern, axis, ragged, magnitude=True)


def _real(x: ArrayLike) -> jax.Array:
    """Raises unless `x` has an order; returns it in a dtype of whole bytes."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.integer):
        narrow = jnp.iinfo(x.dtype).bits < 8
        return x.astype(jnp.int8) if narrow else x
    if jnp.issubdtype(x.dtype, jnp.floating):
        narrow = jnp.finfo(x.dtype).bits < 8
        return x.astype(jnp.bfloat16) if narrow else x
    raise ValueError(
        f"scores of dtype {x.dtype} have no order: pass real numbers, "
        "for complex weights their magnitudes"
    )


def _check_axis(
    shape: tuple[int, ...], pattern: NMPattern, axis: int, ragged: str | None
) -> int:
    """Raises unless groups of `pattern` fit; returns the axis counted from the end."""
    axis, rank = operator.index(axis), len(shape)
    if not -rank <= axis < rank:
        raise ValueError(
            f"axis {axis} is out of range for scores of shape {shape}: "
            "groups need an axis to run along"
        )
    if ragged not in (None, "dense-tail", "pad"):
        raise ValueError(f'ragged={ragged!r}: expected None, "dense-tail" or "pad"')
    if shape[axis] % pattern.m and ragged is None:
        raise ValueError(
            f"axis {axis} of shape {shape} has size {shape[axis]}, not a multiple of "
            f"m = {pattern.m} (pattern {pattern}): choose another axis or pattern, "
            'leave this array dense, or say ragged="dense-tail" or ragged="pad"'
        )
    return axis % rank - rank


@functools.partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="magnitude")
def _nm_mask(
    scores: jax.Array,
    pattern: NMPattern,
    axis: int,
    ragged: str | None,
    *,
    magnitude: bool = False,
) -> jax.Array:
    if pattern.n == pattern.m:
        return jnp.ones_like(scores, jnp.bool_)
    keys = _keys(scores, magnitude)
    size = keys.shape[axis]
    tail = size % pattern.m
    if tail and ragged == "dense-tail":
        full = lax.slice_in_dim(keys, 0, size - tail, axis=axis)
        rest = jnp.ones_like(lax.slice_in_dim(keys, size - tail, size, axis=axis), bool)
        return jnp.concatenate([_keep_groups(full, pattern, axis), rest], axis)
    if tail:
        # The lowest key is enough: ties go to the lower index and padding comes last.
        padding = [(0, 0)] * keys.ndim
        padding[axis] = (0, pattern.m - tail)
        keys = jnp.pad(keys, padding, constant_values=jnp.iinfo(keys.dtype).min)
        return lax.slice_in_dim(_keep_groups(keys, pattern, axis), 0, size, axis=axis)
    return _keep_groups(keys, pattern, axis)


def _keys(x: jax.Array, magnitude: bool) -> jax.Array:
    """Integers in the order of `x`, or of |x|: NaN lowest, -0.0 equal to 0.0.

    Integer comparisons have no unordered case, and tell subnormal floats apart, which
    float comparisons on XLA may flush to zero.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if magnitude and jnp.issubdtype(x.dtype, jnp.signedinteger):
            # The magnitude of the most negative integer fits the unsigned type.
            return jnp.abs(x).astype(f"u{x.dtype}")
        return x
    bits = lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    info = jnp.iinfo(bits.dtype)
    size = bits & info.max
    keys = size if magnitude else jnp.where(bits < 0, -size, size)
    return jnp.where(jnp.isnan(x), info.min, keys)


def _keep_groups(keys: jax.Array, pattern: NMPattern, axis: int) -> jax.Array:
    """The mask of `keys` whose `axis` holds whole groups."""
    n, m = pattern.n, pattern.m
    axis %= keys.ndim
    before, size, after = keys.shape[:axis], keys.shape[axis], keys.shape[axis + 1 :]
    groups = keys.reshape(*before, size // m, m, *after)
    at = len(before) + 1
    position = lax.broadcasted_iota(jnp.int32, groups.shape, at)

    def count(j, rank):
        rival = lax.dynamic_slice_in_dim(groups, j, 1, axis=at)
        precedes = (rival > groups) | ((rival == groups) & (j < position))
        return rank + precedes.astype(rank.dtype)

    rank = jnp.zeros_like(groups, jnp.int32)
    rank = lax.fori_loop(0, m, count, rank, unroll=m if m <= _MAX_UNROLLED_M else 1)
    return (rank < n).reshape(keys.shape)

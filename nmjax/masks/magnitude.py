"""N:M masks: the `n` largest of every `m` consecutive scores along an axis.

The rank of a score is the number of scores of its group that precede it; the `n`
lowest ranks are kept. Counting costs m comparisons a score, all of them
element-wise, where a sort of many short groups is 10 to 80 times slower on XLA.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from nmjax.pattern import NMPattern

Ragged = Literal["dense-tail", "pad"]

# Comparisons that one pass over the scores makes. Groups of up to 8 take a single fused
# loop that writes only the mask; larger ones take m / 8 passes that add to the rank, so
# memory is a few times the scores whatever m is.
_RIVALS_PER_PASS = 8


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
        above, if `m` does not divide the axis and `ragged` is `None`, or if an
        explicit sharding of the axis cuts a group.
    """
    pattern, scores = NMPattern(pattern), _real(scores)
    axis = _check_axis(scores, pattern, axis, ragged)
    return _nm_mask(scores, pattern, axis, ragged, magnitude=False)


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
    pattern, w = NMPattern(pattern), _real(w)
    axis = _check_axis(w, pattern, axis, ragged)
    return _nm_mask(w, pattern, axis, ragged, magnitude=True)


def _real(x: ArrayLike) -> jax.Array:
    """Raises unless `x` has an order; returns it in a dtype that has integer keys."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.int8) if jnp.iinfo(x.dtype).bits < 8 else x
    if jnp.issubdtype(x.dtype, jnp.floating):
        # The formats of 8 bits and fewer differ in their sign, infinity and NaN bits.
        return x.astype(jnp.bfloat16) if jnp.finfo(x.dtype).bits <= 8 else x
    raise ValueError(
        f"scores of dtype {x.dtype} have no order: pass real numbers, "
        "for complex weights their magnitudes"
    )


def shard_size(x: jax.Array, axis: int) -> int:
    """How much of `axis` one device holds, as far as the type of `x` tells.

    Explicit mesh axes only: of the others it does not know.
    """
    sharding = jax.typeof(x).sharding
    names = dict(enumerate(sharding.spec)).get(axis % x.ndim) or ()
    names = (names,) if isinstance(names, str) else names
    return x.shape[axis] // math.prod(sharding.mesh.shape[name] for name in names)


def check_shards(
    x: jax.Array, axis: int, pattern: NMPattern, kind: str = "groups"
) -> None:
    """Raises if an explicit sharding of `axis` cuts a group of m, or a tile."""
    shard = shard_size(x, axis)
    if shard < x.shape[axis] and shard % pattern.m:
        raise ValueError(
            f"axis {axis} of shape {x.shape} is sharded into parts of {shard}, not a "
            f"multiple of m = {pattern.m} (pattern {pattern}), and {kind} never "
            "straddle devices: shard another axis, or jax.reshard this array first"
        )


def explicit_sharding(x: jax.Array, spec: Sequence | None = None):
    """The sharding of `x`, or `spec` on its mesh; None without explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding if spec is None else sharding.update(spec=PartitionSpec(*spec))


def sharded_as(
    x: jax.Array, like: jax.Array, spec: Sequence | None = None
) -> jax.Array:
    """`x` in the `explicit_sharding` of another array, if it has one."""
    sharding = explicit_sharding(like, spec)
    return x if sharding is None else jax.reshard(x, sharding)


def _check_axis(
    scores: jax.Array, pattern: NMPattern, axis: int, ragged: str | None
) -> int:
    """Raises unless groups of `pattern` fit; returns the axis counted from 0."""
    shape, axis = scores.shape, operator.index(axis)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis {axis} is out of range for scores of shape {shape}: "
            "groups need an axis to run along"
        )
    if ragged not in (None, "dense-tail", "pad"):
        raise ValueError(f'ragged={ragged!r}: expected None, "dense-tail" or "pad"')
    size = shape[axis]
    if size % pattern.m and ragged is None:
        raise ValueError(
            f"axis {axis} of shape {shape} has size {size}, not a multiple of "
            f"m = {pattern.m} (pattern {pattern}): choose another axis or pattern, "
            'leave this array dense, or say ragged="dense-tail" or ragged="pad"'
        )
    check_shards(scores, axis, pattern)
    return axis % len(shape)


@functools.partial(jax.jit, static_argnames=("pattern", "axis", "ragged", "magnitude"))
def _nm_mask(
    scores: jax.Array,
    pattern: NMPattern,
    axis: int,
    ragged: str | None,
    magnitude: bool,
) -> jax.Array:
    if pattern.n == pattern.m:
        return jnp.ones_like(scores, jnp.bool_)
    keys = _keys(scores, magnitude)
    size = keys.shape[axis]
    tail = size % pattern.m
    if not tail:
        return _keep_groups(keys, pattern, axis)
    # The lowest key is low enough: ties go to the lower index, and padding comes last.
    padding = [(0, 0)] * keys.ndim
    padding[axis] = (0, pattern.m - tail)
    keys = jnp.pad(keys, padding, constant_values=jnp.iinfo(keys.dtype).min)
    mask = lax.slice_in_dim(_keep_groups(keys, pattern, axis), 0, size, axis=axis)
    if ragged == "dense-tail":
        mask |= lax.broadcasted_iota(jnp.int32, mask.shape, axis) >= size - tail
    return mask


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
    absolute = bits & info.max
    keys = absolute if magnitude else jnp.where(bits < 0, -absolute, absolute)
    return jnp.where(jnp.isnan(x), info.min, keys)


def _keep_groups(keys: jax.Array, pattern: NMPattern, axis: int) -> jax.Array:
    """The mask of `keys` whose `axis` holds whole groups."""
    n, m = pattern.n, pattern.m
    before, size, after = keys.shape[:axis], keys.shape[axis], keys.shape[axis + 1 :]
    groups = keys.reshape(*before, size // m, m, *after)
    axis += 1  # of the positions in a group
    position = lax.broadcasted_iota(
        jnp.int32, (1,) * axis + (m,) + (1,) * len(after), axis
    )

    def count(j, rank):
        rival = lax.dynamic_slice_in_dim(groups, j, 1, axis)
        # A tie goes to the lower index: to the rival only if it comes first.
        precedes = jnp.where(j < position, rival >= groups, rival > groups)
        return rank + precedes.astype(jnp.int32)

    rank = jnp.zeros_like(groups, jnp.int32)
    rank = lax.fori_loop(0, m, count, rank, unroll=min(m, _RIVALS_PER_PASS))
    return (rank < n).reshape(keys.shape)

"""Minimum-variance unbiased N:M sampling: sparse values whose mean is the dense ones.

Of every m consecutive values, `mvue` keeps n at random and enlarges what it keeps, so
that the mean over the draws is the input. With a = |x| of one group, value i is kept
with probability p_i and, if kept, becomes

    sign(x_i) a_i / p_i

The variance Σ a_i² (1 / p_i − 1) is smallest, subject to Σ p_i = n and p_i <= 1, for
p_i = min(1, t a_i) with the t that makes the sum n. For 2:4 (arXiv:2203.10991), with
s = Σ a_i and a_k the largest,

    p_i = 2 a_i / s                            where a_k <= s / 2
    p_k = 1,  p_i = a_i / (s − a_k)            elsewhere

Systematic sampling draws them with a single uniform number u in [0, 1): lay intervals
of lengths p_1, …, p_m end to end from 0 to n, and keep those that contain one of
u, u + 1, …, u + n − 1. No interval is longer than 1, so exactly n are kept.
"""

import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.magnitude import check_shards, sharded_as
from nmjax.pattern import NMPattern


def mvue(
    x: jax.Array,
    random: jax.Array,
    pattern: str | NMPattern = "2:4",
    *,
    axis: int = -2,
) -> tuple[jax.Array, jax.Array]:
    """Samples `x` to N:M, unbiased and with the least variance (arXiv:2203.10991).

    A group with at most n nonzero values keeps them as they are, and zeros fill its
    mask up to n. A group that holds a NaN or an infinity keeps something that is not
    finite, so that a loss scaler sees it. Subnormal float32 numbers may count as zeros.

    Args:
      x: Values of any rank >= 1 and any floating dtype. The arithmetic is in float32
        (float64 for float64); the result is rounded to the dtype of `x`.
      random: A jax PRNG key, or the uniform numbers themselves: floating, in [0, 1),
        one for each group: the shape of `x` with `axis` m times shorter.
      pattern: n kept of every m.
      axis: The axis that groups run along: the one that the GEMM contracts. For an
        output gradient `(tokens, out)` in wgrad, -2.

    Returns:
      The sampled values, shape and dtype of `x`, zero where dropped; and the mask,
      bool, exactly n True in every group.

    Raises:
      ValueError: `x` is not floating point, m does not divide the axis, or its shards
        if its sharding is explicit, or `random` is neither a key nor uniform numbers of
        the right shape.
    """
    pattern, axis = NMPattern(pattern), operator.index(axis)
    shape = tuple(x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point values to sample, got {x.dtype}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is out of range for values of shape {shape}")
    axis %= len(shape)
    size = shape[axis]
    if size % pattern.m:
        raise ValueError(
            f"axis {axis} of shape {shape} has size {size}, not a multiple of "
            f"m = {pattern.m} (pattern {pattern}): pad with zeros, or choose "
            "another axis or pattern"
        )
    check_shards(x, axis, pattern)
    groups = (*shape[:axis], size // pattern.m, *shape[axis + 1 :])
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    uniforms = sharded_as(_uniforms(random, groups, dtype), x)
    return _mvue(x, uniforms, pattern, axis)


def _uniforms(random: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Uniform numbers from a key; those that the caller gave, checked."""
    is_key = jnp.issubdtype(random.dtype, jax.dtypes.prng_key)
    if is_key or random.dtype == jnp.uint32:
        return jax.random.uniform(random, shape, dtype)
    if not jnp.issubdtype(random.dtype, jnp.floating) or random.shape != shape:
        raise ValueError(
            f"random has dtype {random.dtype} and shape {random.shape}: expected a "
            f"PRNG key, or floating-point uniform numbers of shape {shape}, one for "
            "each group"
        )
    return random.astype(dtype)


@functools.partial(jax.jit, static_argnames=("pattern", "axis"))
def _mvue(
    x: jax.Array, u: jax.Array, pattern: NMPattern, axis: int
) -> tuple[jax.Array, jax.Array]:
    n, m = pattern.n, pattern.m
    if n == m:
        return x, jnp.ones_like(x, jnp.bool_)
    groups = x.reshape(*x.shape[:axis], -1, m, *x.shape[axis + 1 :]).astype(u.dtype)
    axis += 1  # of the positions in a group
    # An array for each position, so that XLA fuses all that follows into one loop.
    values = [lax.index_in_dim(groups, i, axis, keepdims=False) for i in range(m)]
    a = [jnp.abs(value) for value in values]
    zero, one = jnp.zeros((), u.dtype), jnp.ones((), u.dtype)

    # p = min(1, t a): at most n - 1 values reach 1 before the others share the rest.
    certain = [jnp.zeros_like(u, jnp.bool_)] * m
    for _ in range(n - 1):
        rest, left = _rest(a, certain, n)
        certain = [
            sure | ((left * a_i >= rest) & (a_i > zero))
            for sure, a_i in zip(certain, a, strict=True)
        ]
    rest, left = _rest(a, certain, n)
    shared = rest / jnp.maximum(left, one)  # a_i / p_i of the others

    kept, sampled = [], []
    p = [
        jnp.where(sure, one, left * a_i / jnp.where(rest == zero, one, rest))
        for sure, a_i in zip(certain, a, strict=True)
    ]
    p = [jnp.where(p_i > zero, p_i, zero) for p_i in p]  # where NaN ends
    for i, keep in enumerate(_systematic(p, u, n)):
        enlarged = jnp.where(certain[i], a[i], shared)
        # A zero that fills the mask stays zero.
        some = keep & ((p[i] > zero) | ~jnp.isfinite(enlarged))
        signed = jnp.where(values[i] < zero, -enlarged, enlarged)
        sampled.append(jnp.where(some, signed, zero))
        kept.append(keep)
    result = jnp.stack(sampled, axis).astype(x.dtype)
    return result.reshape(x.shape), jnp.stack(kept, axis).reshape(x.shape)


def _rest(a, certain, n):
    """The sum of the values that are not certain, and how many of them to keep."""
    pairs = list(zip(a, certain, strict=True))
    rest = sum(jnp.where(sure, jnp.zeros_like(a_i), a_i) for a_i, sure in pairs)
    count = sum(sure.astype(jnp.int32) for _, sure in pairs)
    return rest, (n - count).astype(a[0].dtype)


def _systematic(p: list[jax.Array], u: jax.Array, n: int) -> Iterator[jax.Array]:
    """Which of the intervals of lengths `p` contain one of u, u + 1, …, u + n − 1.

    The end of an interval is whole + part, with part in [0, 1), and whole + (u < part)
    of the numbers lie before it. That count starts at 0, ends at n whatever the
    rounding, and grows by at most 1: `u` is a multiple of the spacing of floats in
    [1, 2), to which part + p rounds.
    """
    eps = float(jnp.finfo(u.dtype).eps)
    u = jnp.clip(jnp.floor(u / eps) * eps, 0, 1 - eps)
    whole, part = jnp.zeros_like(u, jnp.int32), jnp.zeros_like(u)
    count = whole
    for i, p_i in enumerate(p):
        part += p_i
        over = part >= 1
        whole += over.astype(jnp.int32)
        part = jnp.where(over, part - 1, part)
        # The positions left can hold one number each, and none lies beyond n.
        least = n - (len(p) - 1 - i)
        outside = (whole < least) | (whole >= n)
        whole = jnp.clip(whole, least, n)
        part = jnp.where(outside, jnp.zeros_like(part), part)
        now = whole + (u < part).astype(jnp.int32)
        yield now > count
        count = now

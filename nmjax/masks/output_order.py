"""The order of outputs in which dgrad's second mask drops little (Bi-Mask).

fprop's mask E keeps n of every m weights along the inputs. dgrad contracts the outputs
and needs at most n of every m along them, in any order P of the outputs: a row of E
with c kept weights in a group of m outputs keeps min(n, c) of them, so that

    kept(P) = Σ_rows Σ_groups min(n, Σ_{j in group} E[row, P_j])

of E's weights remain. Bi-Mask (arXiv:2302.06058) takes the best of random orders. All
functions here are of one weight, whose outputs are the last axis, and jittable.

A group may hold any outputs: where explicit mesh axes cut them, each device gathers all
outputs of the inputs that it has. A mask comes back cut as the weight is.
"""

import jax
import jax.numpy as jnp

from nmjax.masks.magnitude import magnitude_mask, sharded_as
from nmjax.pattern import NMPattern

CANDIDATES = 100  # random orders that a search tries, as in the paper


def search_output_order(
    mask: jax.Array,
    pattern: str | NMPattern,
    order: jax.Array,
    key: jax.Array,
    *,
    candidates: int = CANDIDATES,
) -> jax.Array:
    """The order in which the most weights of `mask` remain, of `order` and random ones.

    Args:
      mask: fprop's mask, bool, (*inputs, outputs).
      pattern: n kept of every m outputs.
      order: The order in force, int32, (outputs,); it stays where none is better.
      key: PRNG key of the random orders.
      candidates: How many of them.

    Returns:
      The order, int32, (outputs,): output `order[i]` comes to place i.

    Raises:
      ValueError: m does not divide the number of outputs.
    """
    pattern = NMPattern(pattern)
    *inputs, outputs = mask.shape
    if outputs % pattern.m:
        raise ValueError(
            f"{outputs} outputs are not a multiple of m = {pattern.m} (pattern "
            f"{pattern}): they have no groups to order"
        )
    by_output = jnp.moveaxis(_whole_outputs(jnp.asarray(mask)), -1, 0)
    by_output = by_output.astype(jnp.int32)

    def kept(order: jax.Array) -> jax.Array:
        groups = by_output[order].reshape(-1, pattern.m, *inputs).sum(1)
        return jnp.minimum(groups, pattern.n).sum()

    def better(best, key):
        order, most = best
        drawn = jax.random.permutation(key, order)
        found = kept(drawn)
        order = jnp.where(found > most, drawn, order)
        return (order, jnp.maximum(found, most)), None

    keys = jax.random.split(key, candidates)
    (order, _), _ = jax.lax.scan(better, (order, kept(order)), keys)
    return order


def mask_in_order(
    w: jax.Array, mask: jax.Array, pattern: str | NMPattern, order: jax.Array
) -> jax.Array:
    """The mask of dgrad: E' ⊙ E, where E' keeps the largest of E ⊙ W in `order`.

    Args:
      w: Weight, (*inputs, outputs).
      mask: fprop's mask E of it, bool.
      pattern: n kept of every m outputs, taken in `order`.
      order: int32, (outputs,), from `search_output_order`.

    Returns:
      bool, (*inputs, outputs): at most n of every m.
    """
    place = (
        jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    )
    masked = _whole_outputs(jnp.where(mask, w, 0))[..., order]
    own = magnitude_mask(masked, pattern, axis=-1)[..., place]
    return mask & sharded_as(own, mask)


def _whole_outputs(x: jax.Array) -> jax.Array:
    """`x` with its last axis whole on every device."""
    return sharded_as(x, x, (*jax.typeof(x).sharding.spec[:-1], None))

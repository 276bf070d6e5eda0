"""The transposable 2:4 mask: two kept in every row and column of every 4x4 tile.

    mask = tile_mask(jnp.abs(w))     # bool; W and Wᵀ are both 2:4 under it

Found exactly in each tile, by `tile_selection.transposable_2to4` (arXiv:2102.08124
proposes approximations for larger tiles). An element costs 2 bytes read, of bfloat16,
and a quarter of a byte written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from pallas_kernels.implementations import Implementation, choose, module


def tile_mask(
    scores: jax.Array,
    *,
    at_most: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The mask of largest sum of scores; a constant to `jax.grad`.

    Args:
      scores: `(rows, columns)`, both multiples of 4; any real dtype, ranked as it is in
        float32: pass the magnitudes of weights. Infinities count as larger than all
        finite scores, NaN as the smallest; ties have one fixed order. The ends of the
        range are as in `tile_selection.transposable_2to4`.
      at_most: Allow tiles of 7 entries, where one row and one column keep one: 186
        masks in place of 90, for a sum that is never less. Negative scores then count
        as zero.
      implementation: As for `compression.compress_magnitude`.

    Returns:
      bool, of the shape of `scores`, True = kept.

    Raises:
      ValueError: `scores` is no such matrix, or there is no such implementation.
      NotImplementedError: `implementation` cannot run here; the message says why.
    """
    scores = jnp.asarray(scores)
    if jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(
            f"scores of dtype {scores.dtype} have no order: pass real ones"
        )
    if scores.ndim != 2 or scores.shape[0] % 4 or scores.shape[1] % 4:
        raise ValueError(
            f"scores have shape {scores.shape}: expected one matrix whose rows and "
            "columns are multiples of 4; map over leading axes with jax.vmap"
        )
    return _tile_mask(scores, choose(implementation, "tile_masks"), at_most)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _tile_mask(scores, name, at_most):
    scores = lax.stop_gradient(scores)
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        scores = scores.astype(jnp.float32)
    if name == "reference" or not scores.size:
        return reference.tile_mask(scores, at_most=at_most)
    kernel = functools.partial(module(name, "tile_masks").tile_mask, at_most=at_most)
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def rule(size, batched, scores):
        del size, batched
        return lax.map(mapped, scores), True

    return mapped(scores)

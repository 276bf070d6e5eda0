"""The 4x4 transposable mask through jax-triton: what `tile_masks.py` calls."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference import mask_of_bits
from pallas_kernels.triton import call
from pallas_kernels.triton import unavailable as unavailable

# One tile a thread of four warps, in lines of 128 bytes of bfloat16.
BLOCK = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64}


def tile_mask(scores: jax.Array, *, at_most: bool) -> jax.Array:
    """As `tile_masks.tile_mask`."""
    from pallas_kernels.triton.tile_kernel import nm_tile_mask

    rows, columns = scores.shape
    bits = call(
        nm_tile_mask,
        scores,
        out=jax.ShapeDtypeStruct((rows // 4, columns // 4), jnp.int32),
        grid=(-(-rows // BLOCK["BLOCK_ROWS"]), -(-columns // BLOCK["BLOCK_COLUMNS"])),
        num_warps=4,
        ROWS=rows,
        COLUMNS=columns,
        AT_MOST=at_most,
        **BLOCK,
    )
    return mask_of_bits(bits)

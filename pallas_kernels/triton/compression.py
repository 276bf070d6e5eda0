"""Mask + compress through jax-triton: what `compression.py` calls."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.format import NMCompressed
from pallas_kernels.triton import call
from pallas_kernels.triton import unavailable as unavailable

# 32 entries a thread of four warps, in lines of 128 bytes and more.
ROWS_BLOCK = {"BLOCK_ROWS": 32, "BLOCK_K": 128}
COLUMNS_BLOCK = {"BLOCK_ROWS": 64, "BLOCK_K": 64}
TILES_BLOCK = {"BLOCK_K": 64, "BLOCK_N": 64}


def compress_magnitude(w: jax.Array, *, axis: int, dtype: Any) -> NMCompressed:
    """As `compression.compress_magnitude`."""
    from pallas_kernels.triton.magnitude_kernel import nm_compress

    rows, k = w.shape if axis == -1 else w.shape[::-1]
    block = ROWS_BLOCK if axis == -1 else COLUMNS_BLOCK
    values, words = call(
        nm_compress,
        w,
        out=_form(rows, k, dtype),
        grid=(-(-rows // block["BLOCK_ROWS"]), -(-k // block["BLOCK_K"])),
        num_warps=4,
        ROWS=rows,
        K=k,
        TRANSPOSED=axis == -2,
        **block,
    )
    return NMCompressed(values, words, axis=axis)


def compress_transposable(
    w: jax.Array, *, dtype: Any, at_most: bool
) -> tuple[NMCompressed, NMCompressed]:
    """As `compression.compress_transposable`."""
    from pallas_kernels.triton.tile_kernel import nm_compress_tiles

    k, n = w.shape
    values, words, values_t, words_t = call(
        nm_compress_tiles,
        w,
        out=(*_form(n, k, dtype), *_form(k, n, dtype)),
        grid=(-(-k // TILES_BLOCK["BLOCK_K"]), -(-n // TILES_BLOCK["BLOCK_N"])),
        num_warps=4,
        K=k,
        N=n,
        AT_MOST=at_most,
        **TILES_BLOCK,
    )
    return NMCompressed(values, words), NMCompressed(values_t, words_t)


def _form(rows: int, k: int, dtype: Any) -> tuple[Any, Any]:
    """The types of values and metadata."""
    return (
        jax.ShapeDtypeStruct((rows, k // 2), dtype),
        jax.ShapeDtypeStruct((-(-rows // 16) * 8, -(-k // 64) * 4), jnp.int32),
    )

"""Mosaic's register layouts put the PTX ISA's fragments into the registers."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa

import nmjax
from pallas_kernels import compress, ptx
from tests.pallas_kernels import emulator

needs_ampere = pytest.mark.skipif(
    ptx.JAX_VERSION < ptx.AMPERE_SINCE,
    reason="Mosaic lays out mma over several warps from jax 0.11.1 on",
)


def registers(layout, x: np.ndarray) -> np.ndarray:
    """What each of 128 threads holds of `x`: (128, registers), by the layout's dims."""
    strides = tuple(s // x.itemsize for s in x.strides)
    tile_strides = layout.tiling.tile_strides(strides)
    suffix = tile_strides[-layout.tiled_tiling_rank :]
    shape = layout.tiled_tiling_shape

    def offset(index: int, dims) -> int:
        sizes = [d.times if isinstance(d, fa.Replicated) else shape[d] for d in dims]
        places = np.unravel_index(index, sizes)
        return sum(
            int(place) * suffix[d]
            for place, d in zip(places, dims, strict=True)
            if not isinstance(d, fa.Replicated)
        )

    flat, register_shape = x.ravel(), layout.registers_shape(x.shape)
    step = suffix[layout.vector_dim]
    out = np.empty((128, *register_shape, layout.vector_length), x.dtype)
    for thread in range(128):
        base = offset(thread // 32, layout.warp_dims)
        base += offset(thread % 32, layout.lane_dims)
        for place in np.ndindex(register_shape):
            start = base + sum(i * s for i, s in zip(place, tile_strides, strict=False))
            out[(thread, *place)] = flat[start + step * np.arange(layout.vector_length)]
    return out.reshape(128, -1)


def to_mosaic(layout):
    """The fragmented-array layout behind a Pallas layout."""
    if hasattr(layout, "layout_cls"):
        return layout.layout_cls.to_mgpu(*layout.args, **layout.kwargs)
    return layout.to_mgpu()


@needs_ampere
@pytest.mark.parametrize("m_warps", [4, 2, 1])
def test_the_registers_of_mma_sp(rng, m_warps):
    """A GEMM of one tile a warp, with every register taken from Mosaic's layouts."""
    layouts = mgpu.MMALayouts(jnp.bfloat16, m_warps=m_warps)
    n_warps = 4 // m_warps
    m, n, k = 16 * m_warps, 8 * n_warps, 64
    w = rng.integers(-8, 9, (m, k)).astype(np.float32)
    b = rng.integers(-8, 9, (k, n)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    values, words = np.asarray(a.values), np.asarray(a.metadata)
    word = registers(to_mosaic(ptx.metadata_layout(m_warps)), words).ravel()
    acc = registers(layouts.acc, np.zeros((m, n)))
    for step in range(2):
        part = np.ascontiguousarray(values[:, 16 * step : 16 * step + 16])
        a_registers = registers(layouts.lhs, part)
        halves = [b[32 * step + h : 32 * step + h + 16] for h in (0, 16)]
        b_registers = np.concatenate([registers(layouts.rhs, h) for h in halves], 1)
        for warp in range(4):
            lanes = slice(32 * warp, 32 * warp + 32)
            acc[lanes] = emulator.mma_sp(
                a_registers[lanes],
                b_registers[lanes],
                acc[lanes],
                word[lanes].view(np.uint32),
                step,
            )
    expected = registers(layouts.acc, np.where(mask, w, 0).astype(float) @ b)
    np.testing.assert_array_equal(acc, expected)


def test_the_accumulator_and_the_metadata_of_wgmma_sp():
    """Warp w holds rows 16w to 16w + 15 in the fragments of mma, and their words."""
    c = np.arange(64 * 16).reshape(64, 16)
    rows, columns = emulator.c_positions()
    tiles = [
        np.concatenate([c[16 * warp :][rows, columns + 8 * j] for j in (0, 1)], axis=1)
        for warp in range(4)
    ]
    actual = registers(fa.WGMMA_LAYOUT, c)
    np.testing.assert_array_equal(actual, np.concatenate(tiles))
    words = np.arange(32 * 4, dtype=np.int32).reshape(32, 4)
    actual = registers(to_mosaic(ptx.metadata_layout()), words)
    np.testing.assert_array_equal(actual.ravel(), words.ravel())

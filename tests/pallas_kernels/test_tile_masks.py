"""The transposable mask of a matrix, on every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations, ptx, reference, tile_masks_mosaic
from pallas_kernels.tile_masks import tile_mask
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.ahead_of_time import A100, B200, H200
from tests.pallas_kernels.element_wise import hard_scores, widths

pytestmark = pytest.mark.usefixtures("strict_promotion")

interpreted = pytest.mark.skipif(
    ptx.JAX_VERSION < (0, 11),
    reason="Pallas' interpreter has no plgpu.load with a layout before jax 0.11",
)
compiled = pytest.mark.skipif(
    ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
)


def masks_of_a_tile():
    bits = np.arange(2**16)[:, None] >> np.arange(16) & 1
    masks = bits.reshape(-1, 4, 4).astype(bool)
    return masks[(masks.sum(1) <= 2).all(1) & (masks.sum(2) <= 2).all(1)]


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_each_tile_keeps_the_largest_sum(at_most, dtype, rng):
    scores = jnp.asarray(rng.integers(0, 9, (24, 16)), dtype)
    mask = np.asarray(tile_mask(scores, at_most=at_most))
    assert mask.dtype == bool and mask.shape == (24, 16)
    allowed = masks_of_a_tile()
    if not at_most:
        allowed = allowed[allowed.sum((1, 2)) == 8]
    tiles = np.asarray(scores, np.int64).reshape(6, 4, 4, 4).swapaxes(1, 2)
    kept = mask.reshape(6, 4, 4, 4).swapaxes(1, 2)
    sums = np.einsum("rcij,mij->rcm", tiles, allowed.astype(np.int64))
    np.testing.assert_array_equal((tiles * kept).sum((-1, -2)), sums.max(-1))
    assert (kept.sum(-1) <= 2).all() and (kept.sum(-2) <= 2).all()


def test_a_tile_by_hand():
    scores = jnp.asarray(
        [[9, 8, 0, 0], [7, 9, 0, 0], [0, 0, 1, 1], [5, 0, 1, 1]], jnp.float32
    )
    # Keeping the 5 would cost a 7, an 8 or both: the blocks stay together.
    expected = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    np.testing.assert_array_equal(tile_mask(scores), expected)


def test_jit_vmap_and_grad(rng):
    scores = jnp.asarray(rng.random((3, 8, 8)), jnp.float32)
    expected = np.stack([tile_mask(one) for one in scores])
    np.testing.assert_array_equal(jax.jit(jax.vmap(tile_mask))(scores), expected)
    one = scores[0]
    kept = jax.grad(lambda x: jnp.where(tile_mask(x), x, jnp.zeros_like(x)).sum())(one)
    np.testing.assert_array_equal(kept, expected[0].astype(np.float32))


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (4,), (2, 4, 4)])
def test_a_shape_without_whole_tiles_raises(shape):
    with pytest.raises(ValueError, match="expected one matrix whose rows and columns"):
        tile_mask(jnp.zeros(shape))


def test_complex_scores_have_no_order():
    with pytest.raises(ValueError, match="complex64 have no order"):
        tile_mask(jnp.zeros((4, 4), jnp.complex64))


@interpreted
@pytest.mark.parametrize("at_most", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape", [(32, 128), pytest.param((20, 36), marks=pytest.mark.slow)]
)
def test_interpreted_kernel_is_the_reference(at_most, shape):
    kernel = functools.partial(
        tile_masks_mosaic.tile_mask, at_most=at_most, interpret=ptx.interpreter()
    )
    kernel = jax.jit(kernel)
    hard = jnp.asarray(hard_scores(shape))
    for scores in (hard, jnp.nan_to_num(hard, posinf=9.0, neginf=-9.0)):
        expected = reference.tile_mask(scores, at_most=at_most)
        np.testing.assert_array_equal(kernel(scores), expected)


@compiled
@pytest.mark.parametrize(
    "target, at_most, registers",
    [
        (H200, False, 64),
        pytest.param(H200, True, 128, marks=pytest.mark.slow),
        pytest.param(A100, False, 64, marks=pytest.mark.slow),
        pytest.param(B200, False, 64, marks=pytest.mark.slow),
    ],
)
def test_kernel_compiles_with_wide_loads_and_no_spills(target, at_most, registers):
    result = ahead_of_time.compile_kernel(
        functools.partial(tile_masks_mosaic.tile_mask, at_most=at_most),
        jax.ShapeDtypeStruct((1024, 768), jnp.bfloat16),
        target=target,
    )
    assert widths(result.ptx, "ld") == {8: 4}
    assert "%ctaid.y" not in result.ptx  # the axis ends at 65,535
    assert result.spilled_bytes() == 0
    assert result.registers() <= registers


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic", "triton"])
@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 4), (20, 36), (1024, 4096)])
def test_on_gpu(name, at_most, dtype, shape):
    reason = implementations.module(name, "tile_masks").unavailable()
    if reason:
        pytest.skip(f"{name} {reason}")
    scores = jnp.asarray(hard_scores(shape), dtype)
    actual = tile_mask(scores, at_most=at_most, implementation=name)
    expected = tile_mask(scores, at_most=at_most, implementation="reference")
    np.testing.assert_array_equal(actual, expected)

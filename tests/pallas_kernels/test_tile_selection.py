"""The 2:4 selection of a 4x4 tile against all 65,536 masks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tile_selection import transposable_2to4, unpack_tile

pytestmark = pytest.mark.usefixtures("strict_promotion")

ALL = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
ALL = ALL.reshape(-1, 4, 4).astype(bool)
FEASIBLE = (ALL.sum(1) <= 2).all(1) & (ALL.sum(2) <= 2).all(1)
AT_MOST = ALL[FEASIBLE]
EXACT = AT_MOST[AT_MOST.sum((1, 2)) == 8]


@pytest.fixture(scope="module")
def select():
    """(tiles of shape (t, 4, 4), at_most) -> masks of that shape, jitted once each."""

    def masks(tiles, at_most):
        bits = transposable_2to4(jnp.moveaxis(tiles, 0, -1), at_most=at_most)
        mask = jnp.stack([jnp.stack(row, -1) for row in unpack_tile(bits)], -2)
        return bits, mask

    jitted = jax.jit(masks, static_argnums=1)

    def run(tiles, at_most=False):
        bits, mask = jitted(jnp.asarray(tiles), at_most)
        assert bits.dtype == jnp.int32 and bits.shape == (len(tiles),)
        return np.asarray(mask)

    return run


def kept(tiles, masks):
    return np.where(masks, tiles, 0).sum((-2, -1), dtype=np.float64)


def best_sum(tiles, candidates):
    scores = np.asarray(tiles, np.float64).reshape(-1, 16)
    return (scores @ candidates.reshape(-1, 16).T.astype(np.float64)).max(1)


def test_there_are_90_masks_and_96_more_maximal_ones_with_7_entries():
    maximal = [
        mask
        for mask in AT_MOST
        if not any(
            mask[i].sum() < 2 and mask[:, j].sum() < 2 and not mask[i, j]
            for i, j in itertools.product(range(4), range(4))
        )
    ]
    assert len(EXACT) == 90
    assert sorted(mask.sum() for mask in maximal) == [7] * 96 + [8] * 90


TILES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "magnitudes": lambda rng, size: np.abs(rng.normal(size=size)),
    "tied": lambda rng, size: rng.integers(0, 3, size),
    "signed and tied": lambda rng, size: rng.integers(-2, 3, size),
    "bfloat16": lambda rng, size: np.asarray(
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
    ),
    "zero": lambda rng, size: np.zeros(size),
    "one outlier": lambda rng, size: rng.random(size) + 1e4 * (rng.random(size) < 0.05),
    "heavy-tailed": lambda rng, size: np.exp(20 * rng.normal(size=size)),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("at_most", [False, True])
def test_the_sum_is_the_largest_of_all_masks(name, at_most, rng, select):
    tiles = TILES[name](rng, (64, 4, 4)).astype(np.float32)
    masks = select(tiles, at_most)
    assert (masks.sum(1) <= 2).all() and (masks.sum(2) <= 2).all()
    if at_most:
        assert set(masks.sum((1, 2))) <= {7, 8}
        tiles = np.maximum(tiles, 0)
    else:
        assert (masks.sum((1, 2)) == 8).all()
    best = best_sum(tiles, AT_MOST if at_most else EXACT)
    # The sums are rounded to float32: relative to the largest score of the tile.
    tolerance = 8 * 2.0**-23 * np.abs(tiles).max((1, 2)).astype(np.float64)
    assert (kept(tiles, masks) >= best - tolerance).all()


@pytest.mark.parametrize("at_most, count", [(False, 90), (True, 186)])
def test_each_mask_is_found_where_it_alone_is_best(at_most, count, select):
    seven = [m for m in AT_MOST if m.sum() == 7 and not (m <= EXACT).all((1, 2)).any()]
    masks = np.concatenate([EXACT, seven]) if at_most else EXACT
    assert len(masks) == count
    np.testing.assert_array_equal(select(masks.astype(np.float32), at_most), masks)


@pytest.mark.parametrize("at_most", [False, True])
def test_the_high_bits_are_the_transpose(at_most, rng):
    tiles = jnp.asarray(rng.integers(-2, 9, (4, 4, 300)))
    bits = np.asarray(transposable_2to4(tiles, at_most=at_most))
    low, high = (
        (bits[:, None] >> np.arange(start, start + 16) & 1).reshape(-1, 4, 4)
        for start in (0, 16)
    )
    np.testing.assert_array_equal(high, low.swapaxes(1, 2))


def test_a_branch_around_what_changes_nothing(rng):
    """`where_any` may leave out the treatment of tiles that need none."""
    tiles = jnp.asarray(rng.standard_normal((4, 4, 100)), jnp.float32)
    asked = []

    def where_any(condition, function, operand):
        asked.append(np.asarray(condition))
        return function(operand) if condition.any() else operand

    bits = transposable_2to4(tiles, where_any=where_any)
    np.testing.assert_array_equal(bits, transposable_2to4(tiles))
    assert not asked[0].any()
    for value in (np.nan, np.inf, -np.inf, 2.0**119):
        bits = transposable_2to4(tiles.at[1, 2, 7].set(value), where_any=where_any)
        expected = transposable_2to4(tiles.at[1, 2, 7].set(value))
        np.testing.assert_array_equal(bits, expected)
        np.testing.assert_array_equal(np.nonzero(asked[-1])[0], [7])


def test_a_constant_tile_keeps_the_lower_columns_first(select):
    expected = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    for at_most in (False, True):
        np.testing.assert_array_equal(select(np.ones((1, 4, 4)), at_most)[0], expected)


def test_every_mask_of_an_additive_tile_has_the_same_sum(select):
    tile = np.arange(1.0, 17.0, dtype=np.float32).reshape(1, 4, 4)
    assert (kept(tile, EXACT) == 68).all()
    assert kept(tile, select(tile)) == 68


def test_infinite_scores_come_first_and_nan_last(rng, select):
    tiles = rng.normal(size=(200, 4, 4)).astype(np.float32)
    for value, share in ((np.inf, 0.2), (-np.inf, 0.2), (np.nan, 0.1)):
        tiles[rng.random(tiles.shape) < share] = value
    masks = select(tiles)
    weight = np.select(
        [np.isnan(tiles), np.isinf(tiles)], [-2e6, np.sign(tiles) * 1e6], tiles
    )
    np.testing.assert_allclose(kept(weight, masks), best_sum(weight, EXACT), atol=1e-4)


def test_scores_at_the_ends_of_float32_do_not_overflow(rng, select):
    tiles = rng.random((64, 4, 4)).astype(np.float32)
    tiles[:32] *= 3e38
    tiles[32:] *= 2e-38
    assert (select(tiles).sum((1, 2)) == 8).all()
    for value in (np.inf, -np.inf, np.nan, 3e38, -3e38):
        mask = select(np.full((64, 4, 4), value))
        assert (mask.sum(1) == 2).all() and (mask.sum(2) == 2).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_other_dtypes_are_compared_in_float32(dtype, rng, select):
    tiles = jnp.asarray(rng.integers(-100, 100, (32, 4, 4)), dtype)
    np.testing.assert_array_equal(select(tiles), select(tiles.astype(jnp.float32)))

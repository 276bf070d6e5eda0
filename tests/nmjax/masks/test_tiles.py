"""torchao's tile algorithms against their definitions, tile by tile."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.tiles import sparsify_like, tile_mask

pytestmark = pytest.mark.usefixtures("strict_promotion")


def greedy(tile):
    mask = np.zeros((4, 4), bool)
    for place in np.argsort(-tile, axis=None, kind="stable"):
        i, j = divmod(int(place), 4)
        mask[i, j] = mask[i].sum() < 2 and mask[:, j].sum() < 2
    return mask


def causal(tile):
    mask = np.zeros((4, 4), bool)
    for i, largest in enumerate((1, 1, 2, 2)):
        for j in np.argsort(-tile[i], kind="stable"):
            mask[i, j] = mask[i].sum() < largest and mask[:, j].sum() < 2
    return mask


def rows(tile):
    order = np.argsort(-tile, axis=1, kind="stable")
    return np.argsort(order, axis=1, kind="stable") < 2


DEFINITIONS = {
    "largest_values_greedy": greedy,
    "largest_abs_values_greedy": lambda tile: greedy(abs(tile)),
    "causal1122": causal,
    "largest_notranspose": rows,
    "largest_abs_notranspose": lambda tile: rows(abs(tile)),
}


def tiles_of(x):
    *lead, r, c = x.shape
    return np.moveaxis(np.asarray(x).reshape(*lead, r // 4, 4, c // 4, 4), -3, -2)


@pytest.mark.parametrize("algorithm", DEFINITIONS)
def test_mask_is_the_definition(algorithm, rng):
    x = np.stack([rng.normal(size=(8, 24)), rng.integers(-2, 3, (8, 24))])
    mask = tile_mask(jnp.asarray(x, jnp.float32), algorithm)
    assert mask.dtype == jnp.bool_ and mask.shape == x.shape
    tiles, masks = tiles_of(x), tiles_of(mask)
    for k in np.ndindex(tiles.shape[:-2]):
        np.testing.assert_array_equal(masks[k], DEFINITIONS[algorithm](tiles[k]))


def test_the_exact_algorithm_is_the_best_of_the_90(rng):
    pairs = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    fours = np.array(list(itertools.product(pairs, repeat=4)))
    ninety = fours[(fours.sum(1) == 2).all(1)]
    assert len(ninety) == 90
    x = np.stack([rng.normal(size=(8, 24)), rng.integers(-2, 3, (8, 24))])
    mask = tile_mask(jnp.asarray(x, jnp.float32), "largest_abs_values_exact")
    tiles, masks = (tiles_of(a).reshape(-1, 4, 4) for a in (abs(x), mask))
    assert (masks.sum(1) == 2).all() and (masks.sum(2) == 2).all()
    best = np.einsum("kij,tij->tk", ninety, tiles).max(1)
    np.testing.assert_allclose((tiles * masks).sum((1, 2)), best, rtol=1e-6)
    of_integers = tile_mask(jnp.asarray(x[1], jnp.int8), "largest_abs_values_exact")
    np.testing.assert_array_equal(of_integers, mask[1])


def test_known_answer_of_one_to_sixteen():
    x = jnp.arange(1.0, 17.0).reshape(4, 4)
    halves = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    for algorithm in ("largest_values_greedy", "largest_abs_values_greedy"):
        mask = tile_mask(x, algorithm)
        np.testing.assert_array_equal(mask, halves)
        assert jnp.where(mask, x, 0).sum() == 68
    mask = tile_mask(x, "causal1122").tolist()
    assert [[j for j in range(4) if row[j]] for row in mask] == [
        [3],
        [3],
        [1, 2],
        [1, 2],
    ]


def test_signed_ranking_is_not_by_magnitude():
    x = -jnp.arange(1.0, 17.0).reshape(4, 4)
    signed = tile_mask(x, "largest_values_greedy")
    magnitude = tile_mask(x, "largest_abs_values_greedy")
    assert jnp.where(signed, x, 0).sum() == jnp.where(magnitude, x, 0).sum() == -68
    assert tile_mask(x, "largest_notranspose")[0].tolist() == [True, True, False, False]
    row = tile_mask(x, "largest_abs_notranspose")[0]
    assert row.tolist() == [False, False, True, True]


@pytest.mark.slow
def test_shares_kept_are_those_of_torchao(rng):
    w = jnp.asarray(rng.normal(size=(512, 512)), jnp.float32)
    magnitude = jnp.abs(w)

    def share(algorithm):
        mask = tile_mask(w, algorithm)
        return float(jnp.where(mask, magnitude, 0).sum() / magnitude.sum()), mask

    kept, mask = share("largest_abs_values_greedy")
    assert abs(kept - 0.694) < 0.003
    sizes = tiles_of(mask).sum((-1, -2))
    assert set(sizes.ravel()) == {7, 8} and abs((sizes == 8).mean() - 0.843) < 0.02
    assert abs(share("largest_values_greedy")[0] - 0.540) < 0.003
    assert abs(share("largest_abs_notranspose")[0] - 0.747) < 0.003


def test_a_row_of_causal_masks_depends_on_earlier_rows_alone(rng):
    x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    changed = x.at[2:].set(-x[2:])
    masks = [tile_mask(v, "causal1122") for v in (x, changed)]
    np.testing.assert_array_equal(masks[0][:2], masks[1][:2])
    assert (masks[0][2:] != masks[1][2:]).any()


def test_nan_is_kept_last():
    x = jnp.arange(16.0).reshape(4, 4).at[3, 3].set(jnp.nan)
    for algorithm in ("largest_values_greedy", "causal1122", "largest_notranspose"):
        mask = tile_mask(x, algorithm)
        assert not mask[3, 3] and mask.sum() in (6, 7, 8)


def test_under_vmap_the_mask_is_the_same(rng):
    x = jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.bfloat16)
    mask = jax.vmap(lambda x: tile_mask(x, "causal1122"))(x)
    np.testing.assert_array_equal(mask, tile_mask(x, "causal1122"))


def test_errors_name_the_value_and_the_limit():
    x = jnp.ones((8, 6))
    with pytest.raises(ValueError, match="axis -1 of shape .* has size 6, .* m = 4"):
        tile_mask(x, "causal1122")
    with pytest.raises(ValueError, match="axis -2 of shape .* has size 6, .* m = 4"):
        tile_mask(x.T, "largest_values_greedy")
    tile_mask(x.T, "largest_notranspose")
    with pytest.raises(
        ValueError, match="algorithm='greedy': expected one of .*causal"
    ):
        tile_mask(x, "greedy")
    with pytest.raises(ValueError, match="dtype complex64 have no order"):
        tile_mask(jnp.ones((4, 4), jnp.complex64), "causal1122")


@pytest.mark.slow
def test_sparsify_like_takes_the_mask_of_another_array(rng):
    w = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16).at[0].set(jnp.nan)
    mask = tile_mask(w, "largest_abs_values_greedy").at[0].set(False)
    sparse = sparsify_like(x, mask)
    assert sparse.dtype == x.dtype
    np.testing.assert_array_equal(sparse[0], 0)
    np.testing.assert_array_equal(sparse[1:] != 0, mask[1:])
    for other in (mask[:4], mask.astype(jnp.float32)):
        with pytest.raises(ValueError, match="does not fit an array of shape"):
            sparsify_like(x, other)

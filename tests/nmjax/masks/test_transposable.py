"""Transposable masks: feasible and optimal, where tiles lie, ties, errors.

`test_tile_selection` and `test_cycle_cancelling` hold the two solvers to the optimum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.masks.transposable import kept_and_best, transposable_mask
from nmjax.pattern import NMPattern

pytestmark = pytest.mark.usefixtures("strict_promotion")

METHODS = ["exact", "greedy", "entropic"]


def tiles_of(x, m):
    *lead, r, c = x.shape
    return np.moveaxis(np.asarray(x).reshape(*lead, r // m, m, c // m, m), -3, -2)


def assert_transposable(mask, pattern, at_most=False):
    pattern = NMPattern(pattern)
    tiles = tiles_of(mask, pattern.m)
    for axis in (-1, -2):
        counts = tiles.sum(axis)
        assert (counts <= pattern.n).all()
        assert at_most or (counts == pattern.n).all()


def best_sum(tile, n, at_most):
    m = len(tile)
    rows = np.kron(np.eye(m), np.ones(m))
    counts = np.concatenate([rows, np.kron(np.ones(m), np.eye(m))])
    equal, bound = ("A_ub", "b_ub") if at_most else ("A_eq", "b_eq")
    constraints = {equal: counts, bound: np.full(2 * m, n)}
    scale = max(abs(tile).max(), 1e-300)
    result = scipy.optimize.linprog(-tile.ravel() / scale, bounds=(0, 1), **constraints)
    return -result.fun * scale


FAMILIES = {
    "normal": lambda rng, size: abs(rng.normal(size=size)),
    "tied": lambda rng, size: rng.integers(0, 3, size),
    "constant": lambda rng, size: np.full(size, 0.3),
    "zero": lambda rng, size: np.zeros(size),
    "bfloat16": lambda rng, size: np.asarray(
        jnp.asarray(abs(rng.normal(size=size)), jnp.bfloat16), np.float64
    ),
    "heavy-tailed": lambda rng, size: abs(rng.standard_t(1, size)),
    "1e30 beside 1e-30": lambda rng, size: rng.choice([1e30, 1.0, 1e-30], size),
    "outlier block": lambda rng, size: (
        abs(rng.normal(size=size)) + 1e4 * (np.indices(size).max(0) < size[0] // 3)
    ),
}


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize(
    "pattern", [pytest.param("2:4", marks=pytest.mark.slow), "4:8"]
)
def test_the_mask_is_optimal_and_certified(pattern, at_most, rng):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    size = 2 * m, 2 * m
    scores = np.stack([make(rng, size) for make in FAMILIES.values()])
    scores = scores.astype(np.float32)
    certified = transposable_mask(
        jnp.asarray(scores), pattern, at_most=at_most, certificate=True
    )
    assert_transposable(certified.mask, pattern, at_most)
    assert certified.rounds > 0
    tiles, masks = tiles_of(scores, m).astype(np.float64), tiles_of(certified.mask, m)
    largest = tiles.max((-1, -2))
    assert (np.asarray(certified.gap) <= m**2 * 2.0**-22 * largest).all()
    for k in np.ndindex(largest.shape):
        kept = (tiles[k] * masks[k]).sum()
        best = best_sum(tiles[k], n, at_most)
        assert abs(best - kept) <= m**2 * 2.0**-22 * largest[k]
        assert best - kept <= certified.gap[k] + 1e-6 * best


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "entropic"])
def test_the_gap_of_other_masks_is_measured(method, rng):
    scores = jnp.asarray(abs(rng.normal(size=(64, 64))), jnp.float32)
    mask, gap, _ = transposable_mask(scores, "4:8", method=method, certificate=True)
    assert_transposable(mask, "4:8", at_most=method == "greedy")
    kept, best = kept_and_best(scores, mask, "4:8")
    assert 0 < kept < best
    np.testing.assert_allclose(gap.sum(), best - kept, rtol=1e-3)
    low, high = {"greedy": (0.97, 0.995), "entropic": (0.998, 1)}[method]
    assert low < kept / best < high


@pytest.mark.slow
def test_at_most_finds_the_masks_of_seven_entries():
    # The entry at (0, 0) is best alone in its row and column: 90 masks cannot do it.
    tile = np.ones((4, 4))
    tile[0, 1:] = tile[1:, 0] = 0
    tile[[1, 2, 3], [1, 2, 3]] = 0
    tile = jnp.asarray(tile)
    mask = transposable_mask(tile, "2:4", at_most=True)
    np.testing.assert_array_equal(mask, tile == 1)
    assert transposable_mask(tile, "2:4").sum() == 8
    np.testing.assert_array_equal(
        transposable_mask(jnp.kron(jnp.eye(2), tile), "2:4", at_most=True)[:4, :4], mask
    )


@pytest.mark.parametrize("pattern", ["2:4", "2:5"])
def test_at_most_leaves_no_entry_that_could_be_added(pattern, rng):
    m = NMPattern(pattern).m
    scores = jnp.asarray(rng.integers(-2, 2, (8 * m, 8 * m)), jnp.float32)
    mask = transposable_mask(scores.at[0].set(jnp.nan), pattern, at_most=True)
    assert_transposable(mask, pattern, at_most=True)
    tiles = tiles_of(mask, m)
    room = (tiles.sum(-1) < 2)[..., :, None] & (tiles.sum(-2) < 2)[..., None, :]
    assert not (room & ~tiles).any()


def test_known_answer_of_one_to_sixteen():
    # Every mask of an additive tile keeps 68.
    tile = jnp.arange(1.0, 17.0).reshape(4, 4)
    for method in METHODS:
        mask = transposable_mask(tile, "2:4", method=method)
        assert jnp.where(mask, tile, 0).sum() == 68


def test_ties_go_to_a_fixed_mask():
    halves = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    for score in (0.0, -0.0, 1.0, jnp.inf, -jnp.inf, jnp.nan):
        constant = jnp.full((4, 4), score)
        np.testing.assert_array_equal(transposable_mask(constant, "2:4"), halves)
        circulant = (np.arange(6) - np.arange(6)[:, None]) % 6 < 2
        constant = jnp.full((6, 6), score)
        np.testing.assert_array_equal(transposable_mask(constant, "2:6"), circulant)


@pytest.mark.parametrize(
    "pattern", ["2:4", pytest.param("1:3", marks=pytest.mark.slow)]
)
def test_tiles_are_those_of_the_last_two_axes(pattern, rng):
    m = NMPattern(pattern).m
    scores = jnp.asarray(rng.normal(size=(3, 2, 2 * m, 3 * m)), jnp.float32)
    mask = transposable_mask(scores, pattern)
    assert mask.dtype == jnp.bool_ and mask.shape == scores.shape
    assert_transposable(mask, pattern)
    part = transposable_mask(scores[1, 0, m:, :m], pattern)
    np.testing.assert_array_equal(part, mask[1, 0, m:, :m])
    mapped = jax.jit(jax.vmap(lambda s: transposable_mask(s, pattern)))
    np.testing.assert_array_equal(mapped(scores), mask)


@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_infinities_come_first_and_nan_last(pattern, rng):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    scores = rng.normal(size=(10 * m, 10 * m)).astype(np.float32)
    for value in (np.inf, -np.inf, np.nan):
        scores[rng.random(scores.shape) < 0.1] = value
    numbers = np.where(np.isnan(scores), -200, np.clip(scores, -100, 100))
    mask = tiles_of(transposable_mask(jnp.asarray(scores), pattern), m)
    tiles = tiles_of(numbers.astype(np.float64), m)
    for k in np.ndindex(tiles.shape[:2]):
        best = best_sum(tiles[k], n, at_most=False)
        assert (tiles[k] * mask[k]).sum() >= best - 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_other_dtypes_are_ranked_as_in_float32(dtype, rng):
    scores = jnp.asarray(rng.integers(0, 100, (24, 24)), dtype)
    for pattern in ("2:4", "1:3"):
        mask = transposable_mask(scores, pattern)
        expected = transposable_mask(scores.astype(jnp.float32), pattern)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_the_mask_is_a_constant_to_grad(pattern, rng):
    w = jnp.asarray(rng.normal(size=(12, 12)), jnp.float32)

    def kept(w):
        return jnp.where(transposable_mask(jnp.abs(w), pattern), w, 0).sum()

    expected = transposable_mask(jnp.abs(w), pattern).astype(jnp.float32)
    np.testing.assert_array_equal(jax.grad(kept)(w), expected)


def test_n_equal_to_m_is_dense():
    for m in (4, 48):
        certified = transposable_mask(
            jnp.zeros((m, 2 * m)), NMPattern(m, m), certificate=True
        )
        assert certified.mask.all() and (certified.gap == 0).all()
        assert certified.gap.shape == (1, 2)


@pytest.mark.slow
def test_shards_hold_whole_tiles(rng):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    scores = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    for pattern, spec in (("2:4", P(None, "x")), ("1:2", P("x", None))):
        sharded = jax.device_put(scores, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            mask = transposable_mask(sharded, pattern)
        assert jax.typeof(mask).sharding.spec == spec
        np.testing.assert_array_equal(mask, transposable_mask(scores, pattern))
    sharded = jax.device_put(scores, NamedSharding(mesh, P("x")))
    with pytest.raises(
        ValueError, match="axis -2 .* parts of 6, not a multiple of m = 4"
    ):
        transposable_mask(sharded, "2:4")


def test_errors_name_the_value_and_the_limit():
    for shape, axis, size in (((6, 8), -2, 6), ((8, 10), -1, 10)):
        message = f"axis {axis} of shape .* has size {size}, not a multiple of m = 4"
        with pytest.raises(ValueError, match=message):
            transposable_mask(jnp.ones(shape), "2:4")
    with pytest.raises(ValueError, match=r"shape \(8,\): tiles of 4x4 need two axes"):
        transposable_mask(jnp.ones(8), "2:4")
    with pytest.raises(ValueError, match="method='best': expected one of .*'greedy'"):
        transposable_mask(jnp.ones((4, 4)), "2:4", method="best")
    with pytest.raises(ValueError, match="2:64: transposable masks need m <= 32"):
        transposable_mask(jnp.ones((64, 64)), "2:64")
    with pytest.raises(ValueError, match="dtype complex64 have no order"):
        transposable_mask(jnp.ones((4, 4), jnp.complex64), "2:4")
    with pytest.raises(ValueError, match="not an N:M pattern"):
        transposable_mask(jnp.ones((4, 4)), "4:2")
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) does not fit"):
        kept_and_best(jnp.ones((4, 4)), jnp.ones(4, bool), "2:4")

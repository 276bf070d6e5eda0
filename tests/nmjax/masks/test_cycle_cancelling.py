"""The exact solver of m x m tiles against all masks, and against linear programming."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from nmjax.masks.cycle_cancelling import best_tiles, integer_scores

pytestmark = pytest.mark.usefixtures("strict_promotion")

LARGEST = 2**24
FAMILIES = {
    "uniform": lambda rng, size: rng.integers(0, LARGEST, size),
    "signed": lambda rng, size: rng.integers(-LARGEST, LARGEST, size),
    "tied": lambda rng, size: rng.integers(0, 4, size),
    "signs": lambda rng, size: rng.integers(-1, 2, size),
    "zero": lambda rng, size: np.zeros(size, int),
    "constant": lambda rng, size: np.full(size, 7),
    "heavy-tailed": lambda rng, size: (2 ** rng.uniform(0, 24, size)).astype(int),
    "outliers": lambda rng, size: np.where(
        rng.random(size) < 0.05, LARGEST, rng.integers(0, 9, size)
    ),
    "outlier block": lambda rng, size: (
        rng.integers(0, 99, size)
        + LARGEST // 2 * np.kron([[1, 0], [0, 0]], np.ones((size[1] // 2,) * 2, int))
    ),
}


def solve(tiles, n, **options):
    """`best_tiles` of scores `(t, m, m)`, as arrays with tiles first."""
    scores = jnp.moveaxis(jnp.asarray(tiles, jnp.int32), 0, -1)
    best = jax.jit(lambda s: best_tiles(s, n, **options))(scores)
    return (*(np.moveaxis(np.asarray(x), -1, 0) for x in best[:3]), int(best.rounds))


def best_sum(tile, n, at_most):
    """The optimum by linear programming, whose corners are masks."""
    m = len(tile)
    rows = np.kron(np.eye(m), np.ones(m))
    counts = np.concatenate([rows, np.kron(np.ones(m), np.eye(m))])
    equal, bound = ("A_ub", "b_ub") if at_most else ("A_eq", "b_eq")
    constraints = {equal: counts, bound: np.full(2 * m, n)}
    result = scipy.optimize.linprog(-tile.ravel(), bounds=(0, 1), **constraints)
    corner = result.x.round()
    np.testing.assert_allclose(result.x, corner, atol=1e-6)
    return int((corner.astype(int) * tile.ravel()).sum())


def assert_proved(tiles, mask, row_price, column_price, n, at_most):
    """Feasible, and optimal by the prices alone: no mask has a larger sum."""
    rows, columns = mask.sum(2), mask.sum(1)
    if at_most:
        assert (rows <= n).all() and (columns <= n).all()
        assert (row_price >= 0).all() and (column_price >= 0).all()
        assert (row_price[rows < n] == 0).all()
        assert (column_price[columns < n] == 0).all()
    else:
        assert (rows == n).all() and (columns == n).all()
    reduced = tiles - row_price[:, :, None].astype(int) - column_price[:, None]
    assert (reduced[mask] >= 0).all() and (reduced[~mask] <= 0).all()


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("n, m", [(1, 2), (1, 3), (2, 3)])
def test_the_sum_is_the_largest_of_all_masks(n, m, at_most, rng):
    every = np.array(list(itertools.product([False, True], repeat=m * m)))
    every = every.reshape(-1, m, m)
    most = np.maximum(every.sum(1).max(1), every.sum(2).max(1))
    every = every[(most <= n) & (at_most | (every.sum((1, 2)) == n * m))]
    tiles = [rng.integers(low, high, (100, m, m)) for low, high in ((0, 3), (-9, 9))]
    tiles = np.concatenate([*tiles, rng.integers(-LARGEST, LARGEST, (100, m, m))])
    mask, *prices, _ = solve(tiles, n, at_most=at_most)
    assert_proved(tiles, mask, *prices, n, at_most)
    best = np.einsum("tij,kij->tk", tiles, every).max(1)
    np.testing.assert_array_equal((tiles * mask).sum((1, 2)), best)


@pytest.mark.parametrize(
    "n, m, at_most, each",
    [
        (4, 8, False, 8),
        (4, 8, True, 8),
        (2, 8, False, 8),
        (8, 16, False, 3),
        pytest.param(8, 16, True, 3, marks=pytest.mark.slow),
        pytest.param(16, 32, False, 2, marks=pytest.mark.slow),
        pytest.param(16, 32, True, 2, marks=pytest.mark.slow),
    ],
)
def test_the_sum_is_that_of_linear_programming(n, m, at_most, each, rng):
    tiles = np.concatenate([make(rng, (each, m, m)) for make in FAMILIES.values()])
    mask, *prices, _ = solve(tiles, n, at_most=at_most)
    assert_proved(tiles, mask, *prices, n, at_most)
    for tile, kept in zip(tiles, mask, strict=True):
        assert (tile * kept).sum() == best_sum(tile, n, at_most)


def test_a_mask_is_left_only_for_a_larger_sum(rng):
    tiles = np.zeros((1, 8, 8), int)
    mask, *_, rounds = solve(tiles, 3)
    circulant = (np.arange(8) - np.arange(8)[:, None]) % 8 < 3
    np.testing.assert_array_equal(mask[0], circulant)
    assert rounds == 1
    start = circulant[rng.permutation(8)][:, rng.permutation(8)]
    tiles = start[None] * 5
    mask, *_ = solve(tiles, 3, start=jnp.asarray(start[..., None]))
    np.testing.assert_array_equal(mask[0], start)


def test_a_start_with_too_few_entries_is_filled_along_any_way():
    # Row 2 and column 2 are empty and cross in a place that is free only by exchange.
    start = np.array([[[1, 1, 0], [1, 1, 0], [0, 0, 1]]], bool)
    mask, *_ = solve(
        np.ones((1, 3, 3), int),
        2,
        at_most=True,
        start=jnp.asarray(np.moveaxis(start, 0, -1)),
    )
    assert (mask.sum(1) == 2).all() and (mask.sum(2) == 2).all()


def test_tiles_beyond_32_are_refused():
    with pytest.raises(ValueError, match="tiles of 33x33: the solver takes m up to 32"):
        best_tiles(jnp.zeros((33, 33, 1), jnp.int32), 2)


@pytest.mark.parametrize("exponent", [-120, 0, 120])
def test_integer_scores_are_exact_where_24_bits_suffice(exponent, rng):
    tiles = rng.integers(1, 101, (4, 4, 5)) * 2.0**exponent
    integers, unit = integer_scores(jnp.asarray(tiles, jnp.float32))
    largest = np.asarray(integers).max((0, 1))
    assert (LARGEST // 2 <= largest).all() and (largest <= LARGEST).all()
    ratio = tiles / np.asarray(integers, np.float64)
    assert (np.ptp(ratio, (0, 1)) == 0).all()
    if exponent >= 0:  # else the unit is too small for float32
        np.testing.assert_array_equal(unit, ratio[0, 0])


def test_integer_scores_let_infinities_decide_first():
    tile = np.array([[np.inf, 3e38, 1], [-np.inf, -3e38, 0], [np.nan, 1e-45, -1]])
    integers = np.asarray(integer_scores(jnp.asarray(tile[..., None], jnp.float32))[0])
    integers = integers[..., 0]
    finite = np.abs(integers[:, 1:]).max()
    assert integers[0, 0] == 2**23 and integers[1, 0] == -(2**23)
    assert integers[2, 0] == -(2**24) and 2**16 <= finite
    assert 2 * 3 * finite < 2**23
    nonnegative = integer_scores(
        jnp.asarray(tile[..., None], jnp.float32), at_most=True
    )
    assert (np.asarray(nonnegative[0])[[1, 1, 2, 2], [0, 1, 0, 2]] == 1).all()

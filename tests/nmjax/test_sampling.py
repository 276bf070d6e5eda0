"""MVUE against its definition: the mean over u is integrated, not sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.pattern import NMPattern
from nmjax.sampling import mvue

pytestmark = pytest.mark.usefixtures("strict_promotion")

PATTERNS = ["2:4", "1:2", "1:4", "3:4"]
PATTERNS += [
    pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("2:8", "4:8")
]


def inclusion_probabilities(a, n):
    """p = min(1, t a) with sum n, by bisection on t: the least-variance condition."""
    a = np.asarray(a, np.float64)
    if (a > 0).sum() <= n:
        return (a > 0).astype(np.float64)
    low, high = 0.0, n / a[a > 0].min()
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.minimum(1, t * a).sum() < n else (low, t)
    return np.minimum(1, low * a)


def moments(group, pattern):
    """Mean, E[v²] and P(kept) of each value of one group, integrated over u.

    The draw changes only where u passes the end of an interval modulo 1; in between,
    any u stands for all.
    """
    pattern = NMPattern(pattern)
    p = inclusion_probabilities(np.abs(group), pattern.n)
    ends = np.unique(np.concatenate([[0, 1], np.cumsum(p) % 1]))
    width, u = np.diff(ends), (ends[1:] + ends[:-1]) / 2
    x = np.broadcast_to(np.asarray(group, np.float32), (len(u), pattern.m))
    values, mask = mvue(
        jnp.asarray(x), jnp.asarray(u[:, None], jnp.float32), pattern, axis=-1
    )
    assert (np.asarray(mask).sum(-1) == pattern.n).all()
    values = np.asarray(values, np.float64)
    return width @ values, width @ values**2, width @ np.asarray(mask)


def some_groups(rng, m):
    """Even, heavy-tailed, tied, and with one value that outweighs the others."""
    groups = [rng.normal(size=m) for _ in range(6)]
    groups += [rng.standard_t(2, size=m) for _ in range(6)]
    groups += [rng.integers(-2, 3, size=m) + 0.0 for _ in range(6)]
    outlier = rng.normal(size=m)
    outlier[m // 2] = -1e4
    return [*groups, outlier, np.ones(m)]


def test_known_answer():
    mean, _, kept = moments([0.3, 1, -0.7, 1.4], "2:4")
    np.testing.assert_allclose(kept, [0.1765, 0.5882, 0.4118, 0.8235], atol=5e-5)
    np.testing.assert_allclose(mean, [0.3, 1, -0.7, 1.4], rtol=1e-6)


def test_values_where_none_outweighs_the_others_and_where_one_does():
    x = jnp.array([[0.3, -1, 0.7, 1.4], [1, -8, 2, 1]])
    # p = 3/17, 10/17, 7/17, 14/17: u = 0.5 and 1.5 lie in intervals 1 and 3.
    # p = 1/4, 1, 1/2, 1/4: u = 0.5 and 1.5 lie in intervals 1 and 2.
    values, mask = mvue(x, jnp.full((2, 1), 0.5), axis=-1)
    assert mask.tolist() == [[False, True, False, True], [False, True, True, False]]
    np.testing.assert_allclose(values, [[0, -1.7, 0, 1.7], [0, -8, 4, 0]], rtol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unbiased_with_the_least_variance(rng, pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    for group in some_groups(rng, m):
        a = np.abs(group)
        mean, square, kept = moments(group, pattern)
        p = inclusion_probabilities(a, n)
        scale = a.sum()
        np.testing.assert_allclose(mean, group, atol=2e-6 * scale)
        least = np.sum(np.divide(a**2, p, out=np.zeros(m), where=p > 0))
        np.testing.assert_allclose(square.sum(), least, rtol=1e-5)
        if (a > 0).sum() >= n:
            np.testing.assert_allclose(kept, p, atol=1e-5)


def test_variance_of_2_4_in_closed_form():
    def variance(group):
        mean, square, _ = moments(group, "2:4")
        return (square - mean**2).sum()

    even = np.array([1.0, 2, 3, 4])  # s²/2 − Σ a²
    np.testing.assert_allclose(variance(even), 10**2 / 2 - 30, rtol=1e-5)
    outlier = np.array([1.0, 2, 3, 9])  # (s − a_k)² − Σ a_i² over the others
    np.testing.assert_allclose(variance(outlier), 6**2 - 14, rtol=1e-5)


@pytest.mark.parametrize(
    "pattern", ["1:2", "2:4", "4:8", pytest.param("8:16", marks=pytest.mark.slow)]
)
def test_exactly_n_are_kept_for_any_uniform_number(rng, pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    x = rng.normal(size=(4096, m)) * 10 ** rng.uniform(-6, 6, (4096, m))
    u = rng.uniform(size=(4096, 1))
    u[:1024] = 1 - 2**-24  # between two multiples of 2^-23
    u[1024:2048] = 0
    x[::2] = rng.integers(0, 3, (2048, m))
    values, mask = mvue(
        jnp.asarray(x, jnp.float32), jnp.asarray(u, jnp.float32), pattern, axis=-1
    )
    assert (np.asarray(mask).sum(-1) == n).all()
    assert not np.asarray(values)[~np.asarray(mask)].any()


def test_few_nonzero_values_stay_as_they_are():
    x = jnp.array([[0.0, 0, 0, 0], [0, -3, 0, 0], [2, 0, 0, -5], [0, 0, 0, 1]])
    for u in (0.0, 0.3, 0.999):
        values, mask = mvue(x, jnp.full((4, 1), u), axis=-1)
        np.testing.assert_array_equal(values, x)
        assert mask.sum(-1).tolist() == [2, 2, 2, 2]


def test_values_that_are_not_finite_stay_visible():
    bad = [[np.nan, 1, 2, 3], [1, np.inf, 2, 3], [0, 0, -np.inf, 0], [np.inf] * 4]
    for n, pattern in ((1, "1:4"), (2, "2:4"), (3, "3:4")):
        x = jnp.array(bad, jnp.float32)
        values, mask = mvue(x, jax.random.key(0), pattern, axis=-1)
        assert mask.sum(-1).tolist() == [n] * 4
        assert (~np.isfinite(values)).any(-1).all()


def test_two_large_values_do_not_overflow():
    x = jnp.array([3e38, -3e38, 0, 0], jnp.float32)
    values, _ = mvue(x, jax.random.key(0), axis=-1)
    np.testing.assert_array_equal(values, x)


def test_subnormal_values_give_no_nan():
    x = jnp.array([1e-40, -2e-40, 1e-45, 0.0], jnp.float32)
    values, mask = mvue(x, jax.random.key(0), axis=-1)
    assert mask.sum() == 2 and (np.abs(values) <= 4e-40).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_and_leading_axes(rng, axis):
    x = rng.normal(size=(8, 4, 12)).astype(np.float32)
    shape = list(x.shape)
    shape[axis] //= 4
    u = rng.uniform(size=shape).astype(np.float32)
    values, mask = mvue(jnp.asarray(x), jnp.asarray(u), axis=axis)
    last, u_last = np.moveaxis(x, axis, -1), np.moveaxis(u, axis, -1)
    expected, expected_mask = mvue(jnp.asarray(last), jnp.asarray(u_last), axis=-1)
    np.testing.assert_array_equal(values, np.moveaxis(expected, -1, axis))
    np.testing.assert_array_equal(mask, np.moveaxis(expected_mask, -1, axis))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_values_are_those_of_float32_rounded(rng, dtype):
    x = jnp.asarray(rng.normal(size=(64, 8)), dtype)
    key = jax.random.key(3)
    values, mask = mvue(x, key)
    exact, exact_mask = mvue(x.astype(jnp.float32), key)
    assert values.dtype == dtype
    np.testing.assert_array_equal(mask, exact_mask)
    np.testing.assert_array_equal(values, exact.astype(dtype))


@pytest.mark.slow
def test_keys_of_both_kinds_jit_and_vmap(rng):
    x = jnp.asarray(rng.normal(size=(3, 16, 8)), jnp.float32)
    key = jax.random.key(1)
    values, mask = mvue(x, key)
    raw, _ = mvue(x, jax.random.key_data(key))
    np.testing.assert_array_equal(values, raw)
    jitted, _ = jax.jit(mvue)(x, key)
    np.testing.assert_array_equal(values, jitted)
    keys = jax.random.split(key, 3)
    mapped, mapped_mask = jax.vmap(mvue)(x, keys)
    for i in range(3):
        one, one_mask = mvue(x[i], keys[i])
        np.testing.assert_array_equal(mapped[i], one)
        np.testing.assert_array_equal(mapped_mask[i], one_mask)
    assert mask.dtype == jnp.bool_


def test_the_dense_pattern_keeps_everything():
    x = jnp.arange(8.0)
    values, mask = mvue(x, jax.random.key(0), "4:4", axis=-1)
    np.testing.assert_array_equal(values, x)
    assert mask.all()


@pytest.mark.parametrize(
    "x, random, axis, message",
    [
        (jnp.ones((4, 6)), jax.random.key(0), -1, "size 6, not a multiple of m = 4"),
        (jnp.ones(4, jnp.int32), jax.random.key(0), -1, "floating-point.*int32"),
        (jnp.ones(4), jax.random.key(0), -2, "axis -2 is out of range"),
        (jnp.ones((4, 8)), jnp.ones((4, 3)), -1, r"shape \(4, 2\), one for each group"),
        (jnp.ones(4), jnp.ones(1, jnp.int32), -1, "expected a PRNG key"),
    ],
)
def test_bad_arguments(x, random, axis, message):
    with pytest.raises(ValueError, match=message):
        mvue(x, random, axis=axis)

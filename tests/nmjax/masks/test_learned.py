"""Learned masks against the definition: patterns, draws, gradients, evaluation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.learned import (
    Temperature,
    best_mask,
    entropy,
    init_logits,
    patterns,
    sample_mask,
)
from nmjax.pattern import NMPattern

pytestmark = pytest.mark.usefixtures("strict_promotion")


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_sample(logits, noise, table, tau):
    """The soft and the hard mask, group by group, with groups along axis -2."""
    groups, _, columns = logits.shape
    m = table.shape[1]
    soft, hard = np.zeros((groups * m, columns)), np.zeros((groups * m, columns))
    for g, c in itertools.product(range(groups), range(columns)):
        scores = np.asarray(logits[g, :, c] + noise[g, :, c], np.float64)
        soft[g * m : (g + 1) * m, c] = softmax(scores / tau) @ table
        hard[g * m : (g + 1) * m, c] = table[np.argmax(scores)]
    return soft, hard


def some_logits(rng, shape, pattern="2:4", axis=-2):
    logits = init_logits(shape, pattern, axis=axis)
    return jnp.asarray(rng.normal(size=logits.shape), jnp.float32)


def test_the_six_patterns_of_2_4():
    rows = ["".join(map(str, row)) for row in patterns("2:4").astype(int)]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:8", "4:8", "3:6", "4:4"])
def test_patterns_are_all_and_distinct(pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    expected = {c for c in itertools.product((0, 1), repeat=m) if sum(c) == n}
    table = patterns(pattern)
    assert {tuple(row) for row in table.astype(int)} == expected
    assert len(table) == len(expected)


def test_logits_start_uniform():
    logits = init_logits((3, 8, 5), "2:4")
    assert logits.shape == (3, 2, 6, 5)
    np.testing.assert_array_equal(logits, 1)
    np.testing.assert_allclose(entropy(logits), np.log(6), rtol=1e-6)
    assert entropy(logits).shape == (3, 2, 5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_soft_and_hard_masks_are_the_definition(rng, tau):
    logits, key = some_logits(rng, (8, 5)), jax.random.key(7)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    soft, hard = reference_sample(
        np.asarray(logits), np.asarray(noise), patterns("2:4"), tau
    )
    actual = sample_mask(logits, key, "2:4", temperature=tau, hard=False)
    np.testing.assert_allclose(actual, soft, atol=2e-6)
    actual = sample_mask(logits, key, "2:4", temperature=tau)
    np.testing.assert_array_equal(actual, hard)  # exactly 0 and 1


def test_draws_follow_the_logits():
    logits = jnp.broadcast_to(
        jnp.log(jnp.array([0.4, 0.1, 0.2, 0.15, 0.1, 0.05]))[:, None], (1, 6, 20_000)
    )
    mask = sample_mask(logits, jax.random.key(0), "2:4")  # (4, 20000)
    drawn = np.asarray(mask).T
    shares = [(drawn == row).all(-1).mean() for row in patterns("2:4")]
    np.testing.assert_allclose(shares, [0.4, 0.1, 0.2, 0.15, 0.1, 0.05], atol=0.015)


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_is_that_of_the_soft_mask(rng, hard):
    logits, key = some_logits(rng, (4, 3)), jax.random.key(2)
    cotangent = rng.normal(size=(4, 3)).astype(np.float32)
    noise = np.asarray(jax.random.gumbel(key, logits.shape, jnp.float32))

    def loss(logits):
        mask = sample_mask(logits, key, "2:4", temperature=0.7, hard=hard)
        return jnp.sum(mask * cotangent)

    def reference_loss(logits):
        soft, _ = reference_sample(logits, noise, patterns("2:4"), 0.7)
        return (soft * cotangent).sum()

    gradient = jax.grad(loss)(logits)
    for index in np.ndindex(logits.shape):
        step = np.zeros(logits.shape)
        step[index] = 1e-5
        up = reference_loss(np.asarray(logits, np.float64) + step)
        down = reference_loss(np.asarray(logits, np.float64) - step)
        np.testing.assert_allclose(gradient[index], (up - down) / 2e-5, atol=1e-5)


def test_the_mask_of_a_weight_leaves_the_weight_and_the_table_alone(rng):
    w = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    logits, key = some_logits(rng, (8, 5)), jax.random.key(3)
    before = patterns("2:4")

    def loss(logits, w):
        kept = sample_mask(logits, key, "2:4") * jax.lax.stop_gradient(w)
        return jnp.sum(kept**2)

    d_logits, d_w = jax.grad(loss, argnums=(0, 1))(logits, w)
    assert np.abs(d_logits).max() > 0
    np.testing.assert_array_equal(d_w, 0)
    np.testing.assert_array_equal(patterns("2:4"), before)


@pytest.mark.parametrize("shape, axis", [((8,), -1), ((8, 5), -1), ((3, 8, 2, 5), -3)])
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_any_axis(rng, shape, axis, pattern):
    shape = tuple(8 if i == len(shape) + axis else s for i, s in enumerate(shape))
    logits = some_logits(rng, shape, pattern, axis)
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    mask = best_mask(logits, pattern, axis=axis)
    assert mask.shape == shape and mask.dtype == jnp.bool_
    rows = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
    assert (rows.sum(-1) == n).all()
    flat = np.moveaxis(np.asarray(logits), (axis - 1, axis), (-2, -1))
    best = patterns(pattern)[flat.argmax(-1)].reshape(-1, m)
    np.testing.assert_array_equal(rows, best)
    soft = sample_mask(logits, jax.random.key(0), pattern, axis=axis, hard=False)
    rows = np.moveaxis(np.asarray(soft), axis, -1).reshape(-1, m)
    np.testing.assert_allclose(rows.sum(-1), n, rtol=1e-5)


def test_ties_keep_the_lower_indices():
    mask = best_mask(init_logits((8, 2), "2:4"), "2:4")
    np.testing.assert_array_equal(mask[:, 0], [1, 1, 0, 0, 1, 1, 0, 0])


def test_entropy_falls_to_zero_without_nan():
    logits = jnp.array(
        [[0.0, 0, 0, 0, 0, 0], [1e4, 0, 0, 0, 0, 0], [0, *[-jnp.inf] * 5]]
    )
    values = entropy(logits, axis=-1)
    np.testing.assert_allclose(values, [np.log(6), 0, 0], atol=1e-6)
    p = softmax(np.array([0.3, -1, 2.0]))
    actual = entropy(jnp.array([0.3, -1, 2.0]), axis=-1)
    np.testing.assert_allclose(actual, -(p * np.log(p)).sum(), rtol=1e-6)


@pytest.mark.slow
def test_jit_and_vmap(rng):
    logits, key = some_logits(rng, (2, 8, 4)), jax.random.key(5)
    draw = lambda logits, key: sample_mask(logits, key, "2:4", temperature=0.5)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(draw)(logits, key), draw(logits, key))
    keys = jax.random.split(key)
    mapped = jax.vmap(draw)(logits, keys)
    for i in range(2):
        np.testing.assert_array_equal(mapped[i], draw(logits[i], keys[i]))


def test_a_hard_mask_is_exact_in_bfloat16(rng):
    logits = some_logits(rng, (8, 4)).astype(jnp.bfloat16)
    half = sample_mask(logits, jax.random.key(5), "2:4", temperature=0.5)
    assert half.dtype == jnp.bfloat16
    assert set(np.unique(half.astype(jnp.float32))) <= {0.0, 1.0}


def test_draws_follow_logits_of_16_bits():
    """Noise of 16 bits has ties: the first of equal patterns would lead."""
    logits = init_logits((8, 40_000), "4:8", dtype=jnp.bfloat16)
    mask = np.asarray(sample_mask(logits, jax.random.key(0), "4:8"), bool)
    _, counts = np.unique(np.packbits(mask, axis=0), return_counts=True)
    assert len(counts) == 70
    expected = 40_000 / 70
    assert ((counts - expected) ** 2 / expected).sum() < 69 + 5 * np.sqrt(2 * 69)


def test_temperature_by_hand():
    assert float(Temperature(0.8)(123)) == pytest.approx(0.8)
    linear = Temperature(4, 1, 30, "linear")
    values = [float(linear(step)) for step in (0, 10, 30, 99)]
    np.testing.assert_allclose(values, [4, 3, 1, 1], rtol=1e-6)
    exponential = Temperature(4, 0.25, 4, "exponential")
    values = [float(jax.jit(exponential)(step)) for step in range(6)]
    np.testing.assert_allclose(values, [4, 2, 1, 0.5, 0.25, 0.25], rtol=1e-6)
    assert Temperature(**dataclasses.asdict(linear)) == linear


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"start": 0.0}, "above 0, got 0.0"),
        ({"end": 0.1}, "contradict each other"),
        ({"shape": "linear", "steps": 5}, "contradict each other"),
        ({"shape": "linear", "end": 0.1}, "at least 1, got 0"),
        ({"steps": 5}, "must be 0 for a constant"),
        ({"shape": "cosine", "end": 0.1, "steps": 5}, "got 'cosine'"),
        ({"shape": "linear", "end": -1.0, "steps": 5}, "above 0, got -1.0"),
    ],
)
def test_temperatures_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        Temperature(**fields)


def test_bad_arguments():
    with pytest.raises(ValueError, match="8:16 has 12870 masks.*at most 1000"):
        patterns("8:16")
    with pytest.raises(ValueError, match="size 6, not a multiple of m = 4"):
        init_logits((6, 4), "2:4")
    with pytest.raises(ValueError, match="axis -3 is out of range"):
        init_logits((8, 4), "2:4", axis=-3)
    logits, key = init_logits((8, 4), "2:4"), jax.random.key(0)
    with pytest.raises(ValueError, match="axis -2, counted from the end, must hold 4"):
        best_mask(logits, "1:4")
    with pytest.raises(ValueError, match="are not of 2:4 along axis -1"):
        sample_mask(logits, key, "2:4", axis=-1)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        sample_mask(logits, key, "2:4", temperature=0)

"""Density, flip rate, SAD and retained magnitude, with values by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax import Rule, init_state, metrics, plan_params, prepare, recipes

OLD = {
    "a": {"kernel": {"mask": jnp.asarray([[True], [True], [False], [False]])}},
    "b": {"c": {"kernel": {"mask": jnp.asarray([[True, True], [False, False]])}}},
}
NEW = {
    "a": {"kernel": {"mask": jnp.asarray([[True], [False], [True], [False]])}},
    "b": {"c": {"kernel": {"mask": jnp.asarray([[True, False], [False, True]])}}},
}


def as_numbers(result):
    assert all(x.dtype == jnp.float32 and x.shape == () for x in result.values())
    return {path: float(x) for path, x in result.items()}


def test_density():
    state = {"a": OLD["a"], "wide": {"mask": jnp.ones((3, 4), bool)}}
    result = as_numbers(metrics.density(state))
    assert result == {"a/kernel": 0.5, "wide": 1.0, "total": 0.875}


def test_sad_counts_changed_bits():
    result = as_numbers(metrics.sad(OLD, NEW))
    assert result == {"a/kernel": 2.0, "b/c/kernel": 2.0, "total": 4.0}
    assert as_numbers(metrics.sad(NEW, OLD)) == result
    assert set(as_numbers(metrics.sad(OLD, OLD)).values()) == {0.0}


def test_flip_rate_is_the_share_of_changed_bits():
    other = {"a": NEW["a"], "b": OLD["b"]}
    result = as_numbers(metrics.flip_rate(OLD, other))
    assert result == {"a/kernel": 0.5, "b/c/kernel": 0.0, "total": 0.25}
    assert set(as_numbers(metrics.flip_rate(OLD, OLD)).values()) == {0.0}


def test_total_weighs_by_size():
    old = {
        "big": {"mask": jnp.zeros((9, 1), bool)},
        "small": {"mask": jnp.ones(1, bool)},
    }
    new = jax.tree.map(jnp.ones_like, old)
    result = as_numbers(metrics.flip_rate(old, new))
    assert result["total"] == pytest.approx(0.9)
    assert as_numbers(metrics.density(old))["total"] == pytest.approx(0.1)


def test_retained_magnitude():
    params = {
        "a": jnp.asarray([[1.0], [-3.0], [2.0], [-0.5]]),
        "b": jnp.asarray([[1.0], [1.0], [1.0], [1.0]], jnp.bfloat16),
        "dense": jnp.ones((4, 1)),
    }
    plan = plan_params(params, [Rule("dense", None), Rule(".*", "2:4")])
    result = as_numbers(metrics.retained_magnitude(params, plan))
    assert result["a"] == pytest.approx(5 / 6.5)
    assert result["b"] == pytest.approx(0.5)
    assert result["total"] == pytest.approx(7 / 10.5)
    assert "dense" not in result


def test_retained_magnitude_of_a_kept_mask():
    params = {"a": jnp.asarray([[1.0], [-3.0], [2.0], [-0.5]])}
    plan = plan_params(params, [Rule("a", recipes.frozen("2:4"))])
    state = init_state(params, plan)
    moved = {"a": params["a"][::-1]}
    assert metrics.retained_magnitude(moved, plan, state)["a"] == pytest.approx(5 / 6.5)
    state = {"a": {"mask": ~state["a"]["mask"]}}
    assert metrics.retained_magnitude(moved, plan, state)["a"] == pytest.approx(
        1.5 / 6.5
    )


def best_sum(scores):
    """The most that a 4×4 tile keeps with two in every row and every column."""
    rows = [np.isin(range(4), pair) for pair in itertools.combinations(range(4), 2)]
    masks = (np.array(mask) for mask in itertools.product(rows, repeat=4))
    return max(scores[mask].sum() for mask in masks if (mask.sum(0) == 2).all())


def test_transposable_gap_of_an_old_mask(rng):
    """Chosen for other weights: a mask of eight weights, less than the best."""
    params = {
        "a": rng.normal(size=(4, 4)).astype(np.float32),
        "b": rng.normal(size=(8, 4)).astype(np.float32),
        "c": rng.normal(size=(4, 4)).astype(np.float32),
    }
    recipe = recipes.transposable("2:4")
    rules = [Rule("c", "2:4"), Rule(".*", recipe)]
    plan = plan_params(params, rules)
    state = init_state(params, plan)
    fresh = as_numbers(metrics.transposable_gap(params, plan, state))
    assert fresh == pytest.approx({"a": 0, "b": 0, "total": 0}, abs=1e-6)

    moved = {path: w[::-1] for path, w in params.items()}
    found = as_numbers(metrics.transposable_gap(moved, plan, state))
    assert set(found) == {"a", "b", "total"}  # c has a mask along one axis
    kept, best = {}, {}
    for path in ("a", "b"):
        scores = np.abs(moved[path])
        mask = np.asarray(state[path]["mask"])
        kept[path] = scores[mask].sum()
        best[path] = sum(best_sum(tile) for tile in scores.reshape(-1, 4, 4))
        assert found[path] == pytest.approx(1 - kept[path] / best[path], rel=1e-5)
        assert found[path] > 0
    total = 1 - sum(kept.values()) / sum(best.values())
    assert found["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_transposable_gap_of_tiles_and_of_conv_kernels(rng):
    """The axes are those of the layer, and greedy tiles are near the best."""
    w = rng.normal(size=(4, 8, 3, 12)).astype(np.float32)  # contracts the first
    plan = plan_params({"w": w}, [Rule("w", recipes.semi_sparse_weight(), axis=-4)])
    gap = as_numbers(metrics.transposable_gap({"w": w}, plan))["w"]
    turned = np.moveaxis(w, 0, -2)
    plan = plan_params(
        {"w": turned}, [Rule("w", recipes.semi_sparse_weight(), axis=-2)]
    )
    same = as_numbers(metrics.transposable_gap({"w": turned}, plan))["w"]
    assert gap == pytest.approx(same, abs=1e-6)
    assert 0 < gap < 0.1


def test_of_masks_says_what_there_is(rng):
    params = {"a": rng.normal(size=(8, 4)).astype(np.float32)}
    for recipe, names in (
        ("2:4", {"density", "retained_magnitude"}),
        (
            recipes.transposable("2:4"),
            {"density", "retained_magnitude", "transposable_gap"},
        ),
    ):
        plan = plan_params(params, [Rule("a", recipe)])
        state = prepare(params, plan, init_state(params, plan))
        found = jax.jit(lambda p, s, plan=plan: metrics.of_masks(p, plan, s))(
            params, state
        )
        assert set(found) == names
        assert all(set(values) == {"a", "total"} for values in found.values())


def test_nothing_sparse_is_zero_not_a_division():
    for result in (metrics.density({}), metrics.sad({}, {}), metrics.flip_rate({}, {})):
        assert as_numbers(result) == {"total": 0.0}
    params = {"a": jnp.zeros((4, 1))}
    plan = plan_params(params, "2:4")
    assert metrics.retained_magnitude(params, plan)["a"] == 0


def test_other_entries_of_a_state_are_not_masks():
    params = {"a": jnp.ones((4, 1))}
    plan = plan_params(params, [Rule("a", recipes.ste("2:4", refresh=2))])
    state = init_state(params, plan)
    assert "flip_rate" in state["a"]
    assert set(metrics.flip_rate(state, prepare(params, plan, state))) == {"a", "total"}


def test_jittable():
    jitted = jax.jit(
        lambda old, new: (metrics.flip_rate(old, new), metrics.density(new))
    )
    eager = metrics.flip_rate(OLD, NEW), metrics.density(NEW)
    jax.tree.map(np.testing.assert_array_equal, jitted(OLD, NEW), eager)


@pytest.mark.parametrize("metric", [metrics.sad, metrics.flip_rate])
def test_states_of_different_models_are_refused(metric):
    with pytest.raises(ValueError, match=r"different paths.*'b/c/kernel'.*same plan"):
        metric(OLD, {"a": NEW["a"]})
    with pytest.raises(ValueError, match="different paths"):
        metric({}, NEW)

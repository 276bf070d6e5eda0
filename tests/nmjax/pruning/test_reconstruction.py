"""AdaPrune: fixed N:M masks, and errors that only fall."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nmjax
from nmjax.pruning.reconstruction import ada_prune
from tests import oracle
from tests.foreign import MODELS


def dense_layer(rng, bias=True):
    """A Dense layer and inputs whose features are correlated and have a mean."""
    mix = rng.normal(size=(16, 16)) / 4 + np.eye(16)
    x = (rng.normal(size=(256, 16)) @ mix + rng.normal(size=16)).astype(np.float32)
    params = {"kernel": rng.normal(size=(16, 5)).astype(np.float32)}
    if bias:
        params["bias"] = rng.normal(size=5).astype(np.float32)
    return nn.Dense(5, use_bias=bias), x, params


def relative_error(y, expected):
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    return ((y - expected) ** 2).sum() / (expected**2).sum()


def least_error(x, params, mask):
    """The best that the kept weights and the bias can do, by least squares."""
    y = x.astype(np.float64) @ params["kernel"] + params["bias"]
    total = 0.0
    for column in range(y.shape[1]):
        kept = np.column_stack([x[:, mask[:, column]], np.ones(len(x))])
        best = np.linalg.lstsq(kept, y[:, column], rcond=None)[0]
        total += ((kept @ best - y[:, column]) ** 2).sum()
    return total / (y**2).sum()


def test_one_layer_comes_close_to_least_squares(rng):
    model, x, params = dense_layer(rng)
    result = ada_prune(
        model,
        "2:4",
        [x[:100], x[100:]],
        variables={"params": params},
        steps=1500,
        learning_rate=5e-3,
        batch_size=256,
    )
    mask = oracle.magnitude_mask(params["kernel"], 2, 4)
    kernel, bias = result.params["kernel"], result.params["bias"]
    np.testing.assert_array_equal(np.asarray(kernel) != 0, mask)
    y = x @ params["kernel"] + params["bias"]
    (report,) = result.layers
    assert report.path == "kernel" and report.samples == 256
    magnitude = x @ oracle.masked(params["kernel"], mask) + params["bias"]
    before, after = relative_error(magnitude, y), relative_error(x @ kernel + bias, y)
    np.testing.assert_allclose(report.magnitude_error, before, rtol=1e-4)
    np.testing.assert_allclose(report.error, after, rtol=1e-4)
    least = least_error(x, params, mask)
    assert least <= after < least + 0.1 * (before - least)


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(nmjax.recipes.transposable("2:4"), marks=pytest.mark.slow),
        [nmjax.Rule(".*", nmjax.recipes.one_shot("2:3"), ragged="dense-tail")],
    ],
    ids=["transposable", "ragged"],
)
def test_masks_are_the_recipes(rng, rules):
    model, x = nn.Dense(8, use_bias=False), rng.normal(size=(64, 8)) + 1
    x, w = x.astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    result = ada_prune(model, rules, [x], variables={"params": {"kernel": w}}, steps=50)
    state = nmjax.prepare(
        {"kernel": w}, result.plan, nmjax.init_state({"kernel": w}, result.plan)
    )
    mask = np.asarray(state["kernel"]["mask"])
    np.testing.assert_array_equal(np.asarray(result.params["kernel"]) != 0, mask)
    assert result.layers[0].error < result.layers[0].magnitude_error


def test_a_step_that_worsens_a_layer_is_not_taken(rng):
    model, x, params = dense_layer(rng)
    result = ada_prune(
        model, "2:4", [x], variables={"params": params}, steps=1, learning_rate=1e3
    )
    mask = oracle.magnitude_mask(params["kernel"], 2, 4)
    np.testing.assert_array_equal(
        result.params["kernel"], oracle.masked(params["kernel"], mask)
    )
    np.testing.assert_array_equal(result.params["bias"], params["bias"])
    assert result.layers[0].error == result.layers[0].magnitude_error


def test_kept_weights_share_what_their_group_lost():
    """2:4 of the first column drops 1 and 2: 1.5 for each of the other two."""
    w = np.array([[4, -3, 1, 2, 5, 1, -6, -3], [1, 1, 0, 3, 0, 0, 2, 2]], np.float32).T
    x = np.full((4, 8), 0.5, np.float32)  # equal inputs: this alone is exact
    layer, options = nn.Dense(2, use_bias=False), {"steps": 1, "learning_rate": 0.0}
    variables = {"params": {"kernel": w}}
    result = ada_prune(layer, "2:4", [x], variables=variables, **options)
    expected = [[5.5, -1.5, 0, 0, 4, 0, -7, 0], [1.5, 0, 0, 3.5, 0, 0, 2, 2]]
    np.testing.assert_array_equal(result.params["kernel"].T, expected)
    (report,) = result.layers
    assert report.error == 0 < report.magnitude_error


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(rng):
    model, x, params = dense_layer(rng, bias=False)
    run = lambda seed: ada_prune(  # noqa: E731
        model, "2:4", [x], variables={"params": params}, steps=20, seed=seed
    ).params["kernel"]
    first = run(1)
    np.testing.assert_array_equal(run(1), first)
    assert (run(2) != first).any()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("linen_einsum", marks=pytest.mark.slow),
        pytest.param("linen_mobilenet", marks=pytest.mark.slow),
        pytest.param("nnx_conv_net", marks=pytest.mark.slow),
    ],
)
def test_foreign_models(name):
    foreign, seen = MODELS[name], []
    model = foreign.build()
    linen = foreign.api == "linen"
    variables = foreign.variables() if linen else None
    params = variables["params"] if variables else nmjax.nnx.params(model)
    result = ada_prune(
        model,
        "2:4",
        [foreign.inputs()],
        variables=variables,
        steps=30,
        on_layer=seen.append,
    )
    nmjax.check(result.params, result.plan)
    plain = nmjax.bake(params, result.plan)
    sparse = {entry.path for entry in result.plan.sparse}

    def compare(path, new, masked):
        path = "/".join(str(key.key) for key in path)
        if path in sparse:
            np.testing.assert_array_equal(new != 0, masked != 0)
        elif path.removesuffix("bias") + "kernel" not in sparse:
            np.testing.assert_array_equal(new, masked)

    jax.tree_util.tree_map_with_path(compare, result.params, plain)
    assert tuple(seen) == result.layers
    assert {report.path for report in seen} == sparse
    assert all(report.error < report.magnitude_error for report in seen)


def test_batches_of_different_shapes_are_refused():
    model = nn.Dense(3)
    variables = {"params": {"kernel": np.ones((8, 3), np.float32)}}
    variables["params"]["bias"] = np.zeros(3, np.float32)
    batches = [np.ones((2, 4, 8), np.float32), np.ones((2, 5, 8), np.float32)]
    with pytest.raises(ValueError, match=r"kernel: .*\(2, 4, 8\), \(2, 5, 8\)"):
        ada_prune(model, "2:4", batches, variables=variables)
    with pytest.raises(ValueError, match="kernel: .*no batches of one shape"):
        ada_prune(model, "2:4", [np.ones(8, np.float32)], variables=variables)
    bad = np.full((2, 8), np.inf, np.float32)
    with pytest.raises(ValueError, match="kernel: its calibration inputs are not fin"):
        ada_prune(model, "2:4", [bad], variables=variables)


@pytest.mark.parametrize("option", ["steps", "batch_size"])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        ada_prune(nn.Dense(3), "2:4", [jnp.ones((2, 8))], **{option: 0})


def test_without_optax_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"pip install 'nmjax\[train\]'"):
        ada_prune(nn.Dense(3), "2:4", [jnp.ones((2, 8))])

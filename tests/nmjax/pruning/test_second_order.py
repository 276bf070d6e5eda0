"""SparseGPT against the optimal brain surgeon's definition, one weight at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nmjax
from nmjax.pattern import NMPattern
from nmjax.pruning import second_order
from nmjax.pruning.second_order import obs_prune, sparse_gpt
from tests import oracle
from tests.foreign import MODELS


def obs_reference(w, hessian, n, m, damping=0.01, ragged=None):
    """Drops row after row; the inverse Hessian of the rows left is inverted anew."""
    w, k = np.array(w, np.float64), len(w)
    h = np.array(hessian, np.float64)
    h += damping * np.mean(np.diag(h)) * np.eye(k)
    inverse = [np.linalg.inv(h[j:, j:]) for j in range(k)]  # of the rows from j on
    for start in range(0, k, m):
        group = range(start, min(start + m, k))
        cost = np.full((m, *w.shape[1:]), -np.inf)
        cost[: len(group)] = [w[j] ** 2 / inverse[j][0, 0] for j in group]
        mask = oracle.nm_mask(cost, n, m)
        if len(group) < m and ragged == "dense-tail":
            mask[:] = True
        for j, kept in zip(group, mask, strict=False):
            error = np.where(kept, 0, w[j]) / inverse[j][0, 0]
            w[j:] -= np.outer(inverse[j][0], error)
            w[j] = np.where(kept, w[j], 0)
    return w


def correlated(rng, samples, k):
    """Inputs with correlated features of different sizes."""
    mix = rng.normal(size=(k, k)) / np.sqrt(k) + np.eye(k)
    return (rng.normal(size=(samples, k)) * rng.uniform(0.3, 3, k)) @ mix


def cost(x, new, w):
    x, new, w = (np.asarray(a, np.float64) for a in (x, new, w))
    return ((x @ new - x @ w) ** 2).sum() / ((x @ w) ** 2).sum()


@pytest.mark.parametrize("pattern, k", [("2:4", 24), ("1:4", 24), ("4:8", 24)])
def test_is_the_definition(rng, pattern, k):
    assert_is_the_definition(rng, pattern, k)


@pytest.mark.parametrize(
    "pattern, k", [("2:4", 28), pytest.param("2:3", 27, marks=pytest.mark.slow)]
)
def test_is_the_definition_across_blocks(rng, pattern, k, monkeypatch):
    # Blocks of 8 and of 6 rows: four and five of them, the last one mostly padding.
    monkeypatch.setattr(second_order, "_ROWS_PER_BLOCK", 8)
    assert_is_the_definition(rng, pattern, k)


def assert_is_the_definition(rng, pattern, k):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    x = correlated(rng, 3 * k, k)
    w = rng.normal(size=(k, 6))
    hessian = 2 * x.T @ x
    expected = obs_reference(w, hessian, n, m)
    actual = obs_prune(
        jnp.asarray(w, jnp.float32), jnp.asarray(hessian, jnp.float32), pattern
    )
    np.testing.assert_array_equal(np.asarray(actual) != 0, expected != 0)
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    magnitude = oracle.masked(w, oracle.magnitude_mask(w, n, m))
    assert cost(x, actual, w) < 0.9 * cost(x, magnitude, w)


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "4:8"])
def test_unrelated_inputs_of_one_size_give_the_magnitude_mask(rng, pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    w = rng.normal(size=(32, 7)).astype(np.float32)
    actual = obs_prune(jnp.asarray(w), 3 * jnp.eye(32), pattern)
    expected = oracle.masked(w, oracle.magnitude_mask(w, n, m))
    np.testing.assert_array_equal(actual, expected)


def test_inputs_of_different_sizes_decide():
    # By magnitude 3 and 4 would stay; the first two inputs are ten times as large.
    w = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    actual = obs_prune(w, jnp.diag(jnp.array([100.0, 100, 1, 1])), "2:4")
    np.testing.assert_allclose(actual[:, 0], [1, 2, 0, 0])


def test_inputs_that_are_always_zero_go_first():
    w = jnp.array([[9.0], [1.0], [8.0], [2.0], [1.0], [5.0], [7.0], [6.0]])
    hessian = jnp.diag(jnp.array([0.0, 1, 0, 1, 0, 0, 0, 1]))
    actual = obs_prune(w, hessian, "2:4")
    np.testing.assert_array_equal(actual[:, 0], [0, 1, 0, 2, 0, 0, 7, 6])
    actual = obs_prune(w, jnp.zeros((8, 8)), "2:4")  # nothing is known: by magnitude
    np.testing.assert_array_equal(actual[:, 0], [9, 0, 8, 0, 0, 0, 7, 6])


@pytest.mark.parametrize(
    "w, hessian", [((6, 2), (6, 6)), ((8, 2), (4, 4)), ((8,), (8, 8))]
)
def test_shapes_that_do_not_fit(w, hessian):
    with pytest.raises(ValueError, match="with k a multiple of 4"):
        obs_prune(jnp.ones(w), jnp.ones(hessian), "2:4")


def assert_pruned(result, params):
    """N:M where the plan says so, zeros in the parameters, the rest untouched."""
    nmjax.check(result.params, result.plan)
    baked = nmjax.bake(result.params, result.plan)
    sparse = {entry.path for entry in result.plan.sparse}

    def compare(path, new, masked, old):
        path = "/".join(str(key.key) for key in path)
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, masked)
        if path not in sparse and path.removesuffix("bias") + "kernel" not in sparse:
            np.testing.assert_array_equal(new, old)

    jax.tree_util.tree_map_with_path(compare, result.params, baked, params)
    assert {report.path for report in result.layers} == sparse
    for report in result.layers:
        assert 0 < report.error <= report.magnitude_error < 1


def test_one_layer_beats_magnitude_and_reports_its_errors(rng):
    model, x = nn.Dense(6), correlated(rng, 64, 16).astype(np.float32)
    w = rng.normal(size=(16, 6)).astype(np.float32)
    params = {"kernel": w, "bias": np.ones(6, np.float32)}
    result = sparse_gpt(model, "2:4", [x[:40], x[40:]], variables={"params": params})
    assert_pruned(result, params)
    np.testing.assert_array_equal(result.params["bias"], 1)
    # Fine-tuning with frozen masks starts from what was kept.
    tuned = nmjax.plan(model, nmjax.recipes.one_shot("2:4"), x)
    mask = nmjax.init_state(result.params, tuned)["kernel"]["mask"]
    np.testing.assert_array_equal(mask, result.params["kernel"] != 0)
    (report,) = result.layers
    magnitude = oracle.masked(w, oracle.magnitude_mask(w, 2, 4))
    assert report.path == "kernel" and report.samples == 64
    np.testing.assert_allclose(report.magnitude_error, cost(x, magnitude, w), rtol=1e-4)
    kernel = result.params["kernel"]
    np.testing.assert_allclose(report.error, cost(x, kernel, w), rtol=1e-4)
    assert report.error < 0.9 * report.magnitude_error
    expected = obs_reference(w, x.T @ x, 2, 4)
    np.testing.assert_allclose(kernel, expected, atol=1e-3)


@pytest.mark.slow
def test_orthogonal_inputs_give_magnitude_pruning_exactly(rng):
    w = rng.normal(size=(8, 5)).astype(np.float32)
    result = sparse_gpt(
        nn.Dense(5, use_bias=False),
        "2:4",
        [4 * np.eye(8, dtype=np.float32)],
        variables={"params": {"kernel": w}},
    )
    expected = oracle.masked(w, oracle.magnitude_mask(w, 2, 4))
    np.testing.assert_array_equal(result.params["kernel"], expected)
    assert result.layers[0].error == result.layers[0].magnitude_error


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="z_first")(x))
        return nn.Dense(8, name="a_second")(x)


def mlp(rng):
    x = correlated(rng, 64, 8).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(Mlp().init, jax.random.key(0), x)["params"],
    )
    return x, params


@pytest.mark.slow
def test_later_layers_see_the_pruned_network(rng):
    x, params = mlp(rng)
    seen = []
    run = lambda **options: sparse_gpt(  # noqa: E731
        Mlp(), "2:4", [x], variables={"params": params}, **options
    )
    one, other = run(on_layer=seen.append), run(sequential=False)
    # In the order of the calls, not of the parameter tree.
    assert [r.path for r in seen] == ["z_first/kernel", "a_second/kernel"]
    assert tuple(seen) == one.layers
    first, second = one.params["z_first"], one.params["a_second"]
    np.testing.assert_array_equal(first["kernel"], other.params["z_first"]["kernel"])
    w = params["a_second"]["kernel"]
    for result, kernel in (
        (one, first["kernel"]),
        (other, params["z_first"]["kernel"]),
    ):
        hidden = np.maximum(x @ kernel + params["z_first"]["bias"], 0)
        expected = obs_reference(w, hidden.T.astype(np.float64) @ hidden, 2, 4)
        kernel = result.params["a_second"]["kernel"]
        np.testing.assert_allclose(kernel, expected, atol=5e-3)
    assert (second["kernel"] != other.params["a_second"]["kernel"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["linen_einsum", "linen_image_decoder", "linen_mobilenet", "linen_transformer"],
)
def test_foreign_linen_models(name):
    foreign = MODELS[name]
    variables = foreign.variables()
    result = sparse_gpt(
        foreign.build(),
        "2:4",
        [foreign.inputs()],
        variables=variables,
        kwargs=foreign.kwargs,
        sequential=False,
    )
    assert {e.path.removesuffix("/kernel") for e in result.plan.sparse} == set(
        foreign.layers
    )
    assert_pruned(result, variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "nnx_autoencoder",
        "nnx_mixer",
        pytest.param("nnx_conv_net", marks=pytest.mark.slow),
        pytest.param("nnx_transformer", marks=pytest.mark.slow),
    ],
)
def test_foreign_nnx_models(name):
    model = MODELS[name].build()
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    arrays = lambda: [  # noqa: E731
        jax.random.key_data(x) if is_key(x) else x
        for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    ]
    before = arrays()
    result = sparse_gpt(model, "2:4", [MODELS[name].inputs()])
    assert_pruned(result, nmjax.nnx.params(model))
    for now, then in zip(arrays(), before, strict=True):  # batch norm and dropout too
        np.testing.assert_array_equal(now, then)
    nnx.update(model, result.params)  # and the model takes them


@pytest.mark.parametrize("ragged", ["pad", "dense-tail"])
def test_a_ragged_axis(ragged, rng):
    x = correlated(rng, 64, 11).astype(np.float32)
    w = rng.normal(size=(11, 6)).astype(np.float32)
    result = sparse_gpt(
        nn.Dense(6, use_bias=False),
        [nmjax.Rule(".*", "2:4", ragged=ragged)],
        [x],
        variables={"params": {"kernel": w}},
    )
    assert_pruned(result, {"kernel": w})
    expected = obs_reference(w, x.T.astype(np.float64) @ x, 2, 4, ragged=ragged)
    kernel = np.asarray(result.params["kernel"])
    np.testing.assert_array_equal(kernel != 0, expected != 0)
    np.testing.assert_allclose(kernel, expected, atol=2e-3)
    assert (kernel[8:] != 0).sum(0).tolist() == [3 if ragged == "dense-tail" else 2] * 6
    (report,) = result.layers
    np.testing.assert_allclose(report.error, cost(x, kernel, w), rtol=1e-4)


@pytest.mark.slow
def test_a_ragged_window(rng):
    """Each position of a convolution's window has a group that is not whole."""
    model, x = nn.Conv(5, (2, 2)), rng.normal(size=(4, 5, 5, 6)).astype(np.float32)
    rules = [nmjax.Rule(".*", "2:4", ragged="dense-tail")]
    variables = model.init(jax.random.key(0), x)
    result = sparse_gpt(model, rules, [x], variables=variables)
    assert_pruned(result, variables["params"])
    kernel = result.params["kernel"]
    assert ((kernel[:, :, :4] != 0).sum(2) == 2).all() and (kernel[:, :, 4:] != 0).all()


@pytest.mark.slow
def test_an_einsum_of_experts_is_pruned_expert_by_expert(rng):
    x = rng.normal(size=(7, 3, 8)).astype(np.float32)
    w = rng.normal(size=(3, 8, 5)).astype(np.float32)
    model = nn.Einsum((3, 8, 5), "bed,edf->bef", use_bias=False)
    result = sparse_gpt(model, "2:4", [x], variables={"params": {"kernel": w}})
    assert_pruned(result, {"kernel": w})
    for expert in range(3):
        one = sparse_gpt(
            nn.Dense(5, use_bias=False),
            "2:4",
            [x[:, expert]],
            variables={"params": {"kernel": w[expert]}},
        )
        np.testing.assert_allclose(
            result.params["kernel"][expert], one.params["kernel"], atol=1e-4
        )


def test_a_layer_without_features_is_refused():
    model, x = nn.DenseGeneral(4, axis=-1, batch_dims=0), np.ones((3, 2, 8), np.float32)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="kernel: sparse_gpt cannot prune.*batch dim"):
        sparse_gpt(model, "2:4", [x], variables=variables)


def test_inputs_that_are_not_finite_and_bad_damping(rng):
    variables = {"params": {"kernel": np.ones((8, 2), np.float32)}}
    model, bad = nn.Dense(2, use_bias=False), np.full((3, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match="kernel: .*inputs are not finite"):
        sparse_gpt(model, "2:4", [bad], variables=variables)
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        sparse_gpt(model, "2:4", [bad], variables=variables, damping=0)

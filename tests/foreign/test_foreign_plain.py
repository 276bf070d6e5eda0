"""The foreign models work by themselves, and the registry tells the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

from tests.foreign import MODELS, draw, nnx_models

# Compiling is nearly all of the time here, and speed of the result is none of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# The same blocks as in others, lifted in other ways or more of them: with sparse layers
# (`test_swap.py` and its like in nnx) they run often enough.
LIKE_OTHERS = {
    "linen_ensemble",
    "linen_resnet",
    "linen_rnn",
    "nnx_transformer_scan",
    "linen_resnet50",
    "linen_transformer_scan",
    "linen_transformer_remat",
    "linen_transformer_jit",
    "linen_transformer_scan_remat",
    "linen_transformer_scan_axis_1",
}


def names(api):
    return [
        name
        for name, entry in MODELS.items()
        if entry.api == api and name not in LIKE_OTHERS
    ]


def loss_of(outputs):
    return sum(jnp.mean(jnp.square(y)) for y in jax.tree.leaves(outputs))


def flat_params(entry):
    """Flat `path -> array` of the parameters."""
    if entry.api == "linen":
        params = nn.meta.unbox(entry.variables()["params"])
        return traverse_util.flatten_dict(params, sep="/")
    flat = nnx.to_flat_state(nnx.state(entry.build(), nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", names("linen"))
def test_a_linen_model_evaluates_and_trains(name):
    entry = MODELS[name]
    model, variables, inputs = entry.build(), entry.variables(), entry.inputs()
    others = {k: v for k, v in variables.items() if k != "params"}

    @jit
    def evaluate(variables):
        return model.apply(variables, *inputs, **entry.kwargs)

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(params):
        outputs, updated = model.apply(
            {"params": params, **others},
            *inputs,
            **entry.train_kwargs,
            rngs=entry.rngs(),
            mutable=list(entry.mutable),
        )
        return loss_of(outputs), updated

    assert_finite(evaluate(variables))
    (loss, updated), grads = train(variables["params"])
    assert_finite((loss, updated, grads))
    assert updated.keys() == set(entry.mutable)
    flat = traverse_util.flatten_dict(nn.meta.unbox(grads), sep="/")
    for path in entry.layers:
        assert np.any(flat[f"{path}/kernel"]), path


@pytest.mark.parametrize("name", names("nnx"))
def test_an_nnx_model_evaluates_and_trains(name):
    entry = MODELS[name]
    model, inputs = entry.build(), entry.inputs()

    @jit
    def evaluate(state):
        model = nnx.merge(graph, state)
        model.eval()
        return model(*inputs)

    @jit
    def train(state):
        model = nnx.merge(graph, state)
        grads = nnx.grad(lambda model: loss_of(model(*inputs)))(model)
        return nnx.state(grads), nnx.state(model, nnx.BatchStat)

    graph, state = nnx.split(model)
    assert_finite(evaluate(state))
    grads, updated = train(state)
    assert_finite((grads, updated))
    flat = {"/".join(map(str, p)): g[...] for p, g in nnx.to_flat_state(grads)}
    for path in entry.layers:
        assert np.any(flat[f"{path}/kernel"]), path


@pytest.mark.parametrize(
    "name, method",
    [(name, method) for name, entry in MODELS.items() for method in entry.methods],
)
def test_further_entry_points(name, method):
    entry = MODELS[name]
    args = entry.methods[method]()
    if entry.api == "linen":
        outputs = entry.build().apply(entry.variables(), *args, method=method)
    else:
        outputs = getattr(entry.build(), method)(*args)
    assert_finite(outputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_names_every_weight(name):
    entry = MODELS[name]
    params = flat_params(entry)
    weights = {
        path
        for path, leaf in params.items()
        if leaf.ndim >= 2 and path.rsplit("/", 1)[-1] not in ("bias", "scale")
    }
    kernels = {f"{path}/kernel" for path in entry.layers}
    assert kernels.isdisjoint(entry.dense)
    assert kernels.union(entry.dense) == weights
    for path, axes in entry.layers.items():
        shape = params[f"{path}/kernel"].shape
        assert shape[axes[-1]] % 4 == 0, (path, shape)
        assert all(-len(shape) <= axis < 0 for axis in axes), path


@pytest.mark.parametrize("name", ["linen_vae", "nnx_conv_net"])
def test_drawn_values_repeat(name):
    entry = MODELS[name]
    first, second = flat_params(entry), flat_params(entry)
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])
        assert leaf.size == 1 or np.std(leaf) > 0, path


@pytest.mark.slow
def test_the_liftings_of_the_transformer_compute_the_same():
    def logits(name, params):
        entry = MODELS[name]
        apply = functools.partial(entry.build().apply, **entry.kwargs)
        return jit(apply)({"params": params}, *entry.inputs())

    params = MODELS["linen_transformer"].variables()["params"]
    expected = logits("linen_transformer", params)

    def stack(axis):
        outer = {k: v for k, v in params.items() if not k.startswith("block_")}
        blocks = (params["block_0"], params["block_1"])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *blocks)
        return {**outer, "blocks": stacked}

    for name, own_params in {
        "linen_transformer_remat": params,
        "linen_transformer_jit": params,
        "linen_transformer_scan": stack(0),
        "linen_transformer_scan_remat": stack(0),
        "linen_transformer_scan_axis_1": stack(1),
    }.items():
        shapes = jax.tree.map(jnp.shape, MODELS[name].variables()["params"])
        assert jax.tree.map(jnp.shape, own_params) == shapes, name
        np.testing.assert_allclose(
            logits(name, own_params), expected, rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_the_tied_nnx_model_holds_one_kernel():
    model = MODELS["nnx_tied"].build()
    assert model.first is model.second
    assert model.first.kernel is model.third.kernel


def test_draw_gives_keys_integers_and_positive_variances():
    conv_net = nnx.eval_shape(lambda: nnx_models.ConvNet(rngs=nnx.Rngs(0)))
    shapes = nnx.state(conv_net)
    values = draw(shapes, seed=0)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, values
    )
    assert all(jax.tree.leaves(same))
    assert np.all(values["bn1"]["var"][...] > 0)
    assert np.all(
        MODELS["linen_resnet"].variables()["batch_stats"]["bn_init"]["var"] > 0
    )

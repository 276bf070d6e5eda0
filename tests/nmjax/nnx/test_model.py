"""Whole nnx models made sparse: values, gradients, identity, transformations."""

import copy
import logging
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.paths import named_leaves
from tests.nmjax.nnx.common import (
    FROZEN,
    NNX,
    SR_STE,
    assert_close,
    assert_follows,
    baked,
    build,
    drawn,
    forward,
    run,
    values,
    whatever_can_be,
)

each_recipe = pytest.mark.parametrize(
    "recipe", [SR_STE, FROZEN], ids=lambda recipe: recipe.name
)
each_model = pytest.mark.parametrize("name", NNX)
SLOW = {
    "nnx_transformer",
    "nnx_transformer_scan",
    "nnx_autoencoder",
    "nnx_conv_net",
    "nnx_mixer",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NNX]
)
@each_recipe
def test_a_sparse_model_equals_the_dense_one_with_masked_weights(name, recipe):
    model, x = build(name)
    rules = whatever_can_be(recipe)
    plan, sparse = nmjax.plan(model, rules), nmjax.sparsify(model, rules)
    state = nmjax.nnx.state(sparse)
    assert bool(state) == recipe.needs_state
    nmjax.check(nmjax.nnx.params(model), plan, state)
    if recipe.needs_state:  # masks stay where they are when the weights move
        params = nmjax.nnx.params(sparse)
        nnx.update(sparse, jax.tree.map(lambda w: np.flip(w, 0), params))
    assert_follows(sparse, plan, x, state)


@pytest.mark.slow
def test_training_mode_uses_the_same_random_bits_and_statistics():
    model, x = build("nnx_conv_net")
    sparse = nmjax.sparsify(model, "2:4")
    dense = baked(model, nmjax.plan(model, "2:4"))
    sparse.train(), dense.train()
    for now, then in zip(run(sparse, x)[::2], run(dense, x)[::2], strict=True):
        assert_close({"": now}, {"": then})


@each_model
def test_the_state_tree_is_the_dense_one(name):
    model, _ = build(name)
    before = nnx.to_flat_state(nnx.state(model))
    after = nnx.to_flat_state(nnx.state(nmjax.sparsify(model, "2:4")))
    assert [path for path, _ in before] == [path for path, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


@each_model
@each_recipe
def test_densify_gives_back_the_model(name, recipe):
    model, _ = build(name)
    dense = nmjax.densify(nmjax.sparsify(model, whatever_can_be(recipe)))
    assert nnx.graphdef(dense) == nnx.graphdef(model)
    after = dict(nnx.to_flat_state(nnx.state(dense)))
    before = nnx.to_flat_state(nnx.state(model))
    assert all(after[path] is variable for path, variable in before)


def test_the_original_stays_dense_and_learns_along():
    model, x = build("nnx_mixer")
    before = model(x)
    sparse = nmjax.sparsify(model, "2:4")
    np.testing.assert_array_equal(model(x), before)
    sparse.q.kernel[...] += 1
    np.testing.assert_array_equal(model.q.kernel[...], sparse.q.kernel[...])
    assert type(model.q) is nnx.LinearGeneral


def test_a_model_may_be_abstract():
    """What Orbax restores into."""

    def make():
        layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        return nmjax.sparsify(layer, [nmjax.Rule(".*", FROZEN)])

    abstract = nmjax.nnx.state(nnx.eval_shape(make))
    assert abstract == jax.eval_shape(lambda: nmjax.nnx.state(make()))
    assert abstract["kernel"]["mask"].shape == (8, 8)


def test_no_trace_is_left_over():
    model, x = build("nnx_mixer")
    dense = forward(model, x)
    sparse = nmjax.sparsify(model, "2:4")
    assert (forward(sparse, x) != dense).any()
    np.testing.assert_array_equal(forward(nmjax.densify(sparse), x), dense)


def test_shared_layers_stay_shared():
    model, _ = build("nnx_tied")
    sparse = nmjax.sparsify(model, whatever_can_be(FROZEN))
    assert sparse.second is sparse.first
    assert sparse.third.kernel is sparse.first.kernel
    assert sparse.third.nm_mask is sparse.first.nm_mask


def test_a_second_sparsify_replaces_the_first():
    model, x = build("nnx_mixer")
    rules = [nmjax.Rule("out", "1:4"), nmjax.Rule(".*", None)]
    second = nmjax.sparsify(nmjax.sparsify(model, "2:4"), rules)
    assert nnx.graphdef(second) == nnx.graphdef(nmjax.sparsify(model, rules))
    assert_follows(second, nmjax.plan(second, rules), x)


def test_what_stays_dense_is_logged(caplog):
    model = nnx.Dict(odd=nnx.Linear(7, 8, kernel_init=drawn, rngs=nnx.Rngs(0)))
    with caplog.at_level(logging.WARNING, "nmjax"):
        nmjax.sparsify(model, "2:4")
    assert "odd/kernel stays dense: axis -2 has size 7" in caplog.text


# Identity


@each_recipe
def test_equal_models_share_a_trace(recipe):
    traces = []

    @nnx.jit
    def counted(model, x):
        traces.append(model)
        return model(x)

    for seed in range(2):
        model, x = build("nnx_mixer", seed)
        sparse = nmjax.sparsify(model, whatever_can_be(recipe))
        counted(sparse, x)
        sparse.q.kernel[...] *= -1
        counted(nnx.clone(sparse), x)
    assert len(traces) == 1
    other = nmjax.sparsify(build("nnx_mixer")[0], whatever_can_be(recipe))
    assert nnx.graphdef(other) == nnx.graphdef(sparse)
    assert hash(nnx.graphdef(other)) == hash(nnx.graphdef(sparse))


@each_recipe
def test_equal_layers_of_one_model_are_equal(recipe):
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(8, 8, kernel_init=drawn, rngs=rngs) for _ in range(3)]
    sparse = nmjax.sparsify(nnx.List(layers), whatever_can_be(recipe))
    assert len({nnx.graphdef(layer) for layer in sparse}) == 1
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *sparse)  # as trees too


@each_recipe
@pytest.mark.parametrize(
    "duplicate",
    [
        nnx.clone,
        copy.deepcopy,
        lambda model: nnx.merge(*nnx.split(model)),
        lambda model: nnx.merge(*nnx.split(model, nnx.Param, ...)),
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
    ids=["clone", "deepcopy", "merge", "merge by type", "pickle"],
)
def test_copies(recipe, duplicate):
    model, x = build("nnx_mixer")
    sparse = nmjax.sparsify(model, whatever_can_be(recipe))
    other = duplicate(sparse)
    assert nnx.graphdef(other) == nnx.graphdef(sparse)
    np.testing.assert_array_equal(other(x), sparse(x))


class Scaled(nnx.Linear):
    """A user's layer that calls Flax's."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Plain(nnx.Linear, pytree=False):
    """A user's layer that is not a pytree."""


@pytest.mark.parametrize(("cls", "factor"), [(Scaled, 2), (Plain, 1)])
def test_users_subclass_keeps_its_call_its_name_and_its_pickle(cls, factor):
    layers = [cls(8, 4, kernel_init=drawn, rngs=nnx.Rngs(i)) for i in range(2)]
    sparse, twin = (nmjax.sparsify(layer, "2:4") for layer in layers)
    x = values(3, 8)
    assert isinstance(sparse, cls) and type(sparse).__name__ == cls.__name__
    assert type(sparse) is type(twin)
    expected = factor * (x @ nmjax.ste(layers[0].kernel[...], "2:4"))
    np.testing.assert_allclose(sparse(x), expected, 1e-5, 1e-6)
    again = pickle.loads(pickle.dumps(sparse))
    assert type(again) is type(sparse)
    np.testing.assert_array_equal(again(x), sparse(x))


# Transformations


@each_recipe
def test_vmap_over_the_batch(recipe):
    model, x = build("nnx_mixer")
    sparse = nmjax.sparsify(model, whatever_can_be(recipe))
    each = nnx.vmap(lambda model, x: model(x[None])[0], in_axes=(None, 0))
    np.testing.assert_allclose(each(sparse, x), sparse(x), 1e-5, 1e-6)


@each_recipe
def test_an_ensemble_built_and_run_by_vmap(recipe):
    @nnx.vmap
    def make(rngs):
        return nmjax.nnx.Linear(8, 4, recipe=recipe, rngs=rngs)

    x = values(3, 8)
    ensemble = make(nnx.Rngs(0).split(2))
    out = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(ensemble, x)
    assert (ensemble.kernel[0] != ensemble.kernel[1]).any()
    for i in range(2):
        w = nmjax.ste(ensemble.kernel[i], "2:4")
        np.testing.assert_allclose(out[i], x @ w, 1e-5, 1e-6)


@each_recipe
def test_scan_with_axes_by_type(recipe):
    layer = nnx.Linear(8, 8, kernel_init=drawn, rngs=nnx.Rngs(0))
    stacked = jax.tree.map(lambda w: jnp.stack([w, -w[::-1]]), nmjax.nnx.params(layer))
    nnx.update(layer, stacked)
    sparse = nmjax.sparsify(layer, whatever_can_be(recipe))
    x = values(2, 8)

    def scanned(axes):
        scan = nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        return scan(lambda x, layer: layer(x))(x, sparse)

    masks = {nmjax.nnx.NMMask: 0} if recipe.needs_state else {}
    out = scanned(nnx.StateAxes({nnx.Param: 0, **masks, ...: None}))
    kernels = [nmjax.ste(sparse.kernel[i], "2:4") for i in range(2)]
    np.testing.assert_allclose(out, x @ kernels[0] @ kernels[1], 1e-5, 1e-6)
    if recipe.needs_state:
        with pytest.raises(ValueError, match="nmjax.nnx.NMMask: 0"):
            scanned(nnx.StateAxes({nnx.Param: 0, ...: None}))


@each_recipe
def test_shard_map_over_the_batch(recipe):
    sparse = nmjax.sparsify(build("nnx_mixer")[0], whatever_can_be(recipe))
    graphdef, params, rest = nnx.split(sparse, nnx.Param, ...)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = values(8, 6, 32)

    @jax.jit
    def sharded(params, x):
        def loss(params):
            y = jax.shard_map(
                lambda params, x: nnx.merge(graphdef, params, rest)(x),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P("data"),
            )(params, x)
            return jnp.mean(jnp.square(y)), y

        return jax.grad(loss, has_aux=True)(params)

    gradients, y = sharded(params, x)
    expected = run(sparse, x)
    assert_close({"y": y}, {"y": expected[0]})
    assert_close(nnx.to_pure_dict(gradients), expected[1])


def test_bake_gives_the_dense_model_its_zeros():
    model, x = build("nnx_mixer")
    plan, sparse = nmjax.plan(model, "2:4"), nmjax.sparsify(model, "2:4")
    dense = nmjax.densify(sparse)
    expected = sparse(x)
    nnx.update(dense, nmjax.bake(nmjax.nnx.params(dense), plan))
    np.testing.assert_array_equal(dense(x), expected)
    zeros = named_leaves(nmjax.nnx.params(model))["q/kernel"] == 0
    assert zeros.mean() == 0.5

"""The drop-in linen layers: Flax's own, with a recipe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nmjax
from nmjax import recipes

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)

LAYERS = {
    "Dense": (lambda lib, **kw: lib.Dense(16, **kw), (-2,)),
    "DenseGeneral": (
        lambda lib, **kw: lib.DenseGeneral((4, 8), axis=(-2, -1), **kw),
        (-4, -3),
    ),
    "Conv": (lambda lib, **kw: lib.Conv(16, (3, 3), strides=2, **kw), (-2,)),
    "ConvTranspose": (lambda lib, **kw: lib.ConvTranspose(4, (3, 3), **kw), (-2,)),
    "Einsum": (
        lambda lib, **kw: lib.Einsum((8, 4, 3), "bhwc,cde->bhwde", **kw),
        (-3,),
    ),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


@each_layer
def test_without_a_recipe_a_layer_is_flax_own(kind):
    make, _ = LAYERS[kind]
    ours, theirs = make(nmjax.linen), make(nn)
    variables = theirs.init(jax.random.key(0), X)
    jax.tree.map(
        np.testing.assert_array_equal, ours.init(jax.random.key(0), X), variables
    )
    np.testing.assert_array_equal(ours.apply(variables, X), theirs.apply(variables, X))


@each_layer
def test_values_and_gradients_are_those_of_masked_weights(kind):
    make, axes = LAYERS[kind]
    ours, theirs = make(nmjax.linen, recipe=recipes.ste("2:4")), make(nn)
    variables = theirs.init(jax.random.key(0), X)
    plan = nmjax.plan(ours, [], X)
    (entry,) = plan.sparse
    assert (entry.layer, entry.axes) == (kind, axes)
    baked = {"params": nmjax.bake(variables["params"], plan)}

    def run(layer, variables):
        return jnp.sum(jnp.sin(layer.apply(variables, X)))

    value, gradient = jax.value_and_grad(lambda v: run(ours, v))(variables)
    expected = jax.value_and_grad(lambda v: run(theirs, v))(baked)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradient,
        expected[1],
    )


class Net(nn.Module):
    """Drop-in layers of three kinds, inside another's module."""

    recipe: recipes.Recipe = recipes.frozen("2:4")

    @nn.compact
    def __call__(self, x):
        x = nmjax.linen.Conv(16, (3, 3), recipe=self.recipe, name="conv")(x)
        x = nmjax.linen.Dense(16, recipe="1:4", name="dense")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def test_a_kept_mask_comes_from_the_collection():
    params = Net(recipes.ste("2:4")).init(jax.random.key(0), X)["params"]
    plan = nmjax.plan(Net(recipes.ste("2:4")), [], X)
    kept = nmjax.Plan(
        tuple(
            e
            if e.path != "conv/kernel"
            else dataclasses.replace(e, recipe=recipes.frozen("2:4"))
            for e in plan
        )
    )
    other = jax.tree.map(lambda w: jnp.roll(w, 1), params)
    state = nmjax.init_state(other, kept)
    assert set(state) == {"conv"}
    outputs = Net().apply({"params": params, "nm": state}, X)
    baked = nmjax.bake(params, kept, state)
    np.testing.assert_allclose(outputs, _plain(baked), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="conv/kernel.*init_state"):
        Net().apply({"params": params}, X)


def _plain(params):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3), name="conv")(x)
            x = nn.Dense(16, name="dense")(x)
            return nn.Dense(4, name="head")(x.mean((1, 2)))

    return Plain().apply({"params": params}, X)


def test_a_layers_own_recipe_wins_over_rules():
    net = Net(recipes.ste("2:4"))
    params = net.init(jax.random.key(0), X)["params"]
    rules = [nmjax.Rule(".*", "2:8", ineligible="dense")]
    plan = nmjax.plan(net, rules, X)
    patterns = {e.path: str(e.recipe.pattern) for e in plan.sparse}
    assert patterns == {
        "conv/kernel": "2:4",
        "dense/kernel": "1:4",
        "head/kernel": "2:8",
    }
    outputs = nmjax.sparsify(net, rules).apply({"params": params}, X)
    np.testing.assert_allclose(
        outputs, _plain(nmjax.bake(params, plan)), rtol=1e-5, atol=1e-5
    )


def test_the_mask_is_the_master_weights_in_bfloat16():
    layer = nmjax.linen.Dense(4, recipe="2:4", use_bias=False, dtype=jnp.bfloat16)
    kernel = (1 + jnp.arange(8)[:, None] * 1e-4) * jnp.ones((8, 4))
    outputs = layer.apply({"params": {"kernel": kernel}}, jnp.eye(8))
    kept = nmjax.magnitude_mask(kernel, "2:4")
    np.testing.assert_array_equal(outputs != 0, kept)
    assert outputs.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: nmjax.linen.Dense(4, recipe="3:5"),
            "kernel.*size 8, not a multiple of 5",
        ),
        (
            lambda: nmjax.linen.Conv(8, (3, 3), feature_group_count=8, recipe="2:4"),
            "depthwise",
        ),
        (
            lambda: nmjax.linen.Dense(4, recipe="2:4", dot_general=jax.lax.dot_general),
            "own dot_general",
        ),
        (lambda: nmjax.linen.Dense(4, recipe="4:2"), "4:2"),
        (lambda: nmjax.linen.Dense(4, recipe=0.5), "recipe"),
    ],
)
def test_bad_input_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        layer().init(jax.random.key(0), X)


def test_under_scan_and_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nmjax.linen.Dense(8, recipe="2:4", name="d")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scanned(name="blocks")(x, None)[0]

    params = Stack().init(jax.random.key(0), X)["params"]
    kernel, bias = (params["blocks"]["d"][name] for name in ("kernel", "bias"))
    expected = X
    for i in range(2):
        w = jnp.where(nmjax.magnitude_mask(kernel[i], "2:4"), kernel[i], 0)
        expected = jnp.tanh(expected @ w + bias[i])
    np.testing.assert_allclose(
        Stack().apply({"params": params}, X), expected, rtol=1e-5, atol=1e-6
    )
    assert nmjax.plan(Stack(), [], X)["blocks/d/kernel"].axes == (-2,)


def test_under_scan_a_mask_is_refreshed():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            recipe = recipes.ste("2:4", refresh=2)
            return nmjax.linen.Dense(8, recipe=recipe, name="d")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "nm": 0}
            rngs = {"params": True}
            scanned = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=2)
            return scanned(name="blocks")(x, None)[0]

    params = Stack().init(jax.random.key(0), X)["params"]
    plan = nmjax.plan(Stack(), [], X)
    state = nmjax.init_state(params, plan)
    kernel = params["blocks"]["d"]["kernel"]
    moved = {"blocks": {"d": {**params["blocks"]["d"], "kernel": kernel[::-1]}}}
    state = nmjax.refresh(state, moved, plan, 2)
    entry, expected = state["blocks"]["d"]["kernel"], X
    before, after = (nmjax.magnitude_mask(k, "2:4") for k in (kernel, kernel[::-1]))
    rates = np.mean(before != after, axis=(1, 2), dtype=np.float32, keepdims=True)
    np.testing.assert_allclose(entry["flip_rate"], rates, rtol=1e-6)
    for w, mask in zip(kernel[::-1], after, strict=True):
        expected = expected @ jnp.where(mask, w, 0)
    np.testing.assert_allclose(
        Stack().apply({"params": moved, "nm": state}, X), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("Dense", recipes.transposable("2:4")),
        ("Dense", recipes.s_ste("2:4")),
        pytest.param("Dense", recipes.learned("2:4"), marks=pytest.mark.slow),
        ("Dense", recipes.two_by_four()),
        pytest.param("square Einsum", recipes.fst(), marks=pytest.mark.slow),
        pytest.param(
            "square Einsum", recipes.semi_sparse_activation(), marks=pytest.mark.slow
        ),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_layer_of_its_own_recipe_is_a_sparsified_one(kind, recipe):
    make = {
        "Dense": lambda lib, **kw: lib.Dense(16, **kw),
        "square Einsum": lambda lib, **kw: lib.Einsum(
            (8, 2, 4), "bhwc,cde->bhwde", **kw
        ),
    }[kind]
    ours, theirs = make(nmjax.linen, recipe=recipe), make(nn)
    variables = theirs.init(jax.random.key(0), X)
    jax.tree.map(
        np.testing.assert_array_equal, ours.init(jax.random.key(0), X), variables
    )
    plan = nmjax.plan(ours, [], X)
    params = variables["params"]
    more = {
        "nm": nmjax.init_state(params, plan),
        "nm_logits": nmjax.init_logits(params, plan),
    }
    key = {"nm": jax.random.key(1)}
    sparse = nmjax.sparsify(theirs, [nmjax.Rule(".*", recipe)])

    def value_and_gradient(layer, rngs):
        def loss(params):
            y = layer.apply({"params": params, **more}, X, rngs=rngs)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (_, y), (_, expected) = (value_and_gradient(m, key) for m in (ours, sparse))
    if not recipe.draws:  # each draws in its own way
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    still = [m.apply({"params": params, **more}, X) for m in (ours, sparse)]
    np.testing.assert_allclose(*still, rtol=1e-5, atol=1e-5)


def test_a_second_mask_is_of_the_master_weights_too():
    x, dy = jnp.eye(8), jnp.eye(8)
    kernel = (1 + jnp.arange(8)[None, :] * 1e-4) * jnp.ones((8, 8))
    layer = nn.Dense(8, use_bias=False, dtype=jnp.bfloat16)
    layer = nmjax.sparsify(layer, [nmjax.Rule(".*", recipes.fst())])
    _, vjp = jax.vjp(lambda x: layer.apply({"params": {"kernel": kernel}}, x), x)
    (dx,) = vjp(dy.astype(jnp.bfloat16))
    kept = nmjax.magnitude_mask(kernel, "2:4", axis=-1)
    np.testing.assert_array_equal(dx.T != 0, kept)


def test_a_mask_that_is_not_bool_is_refused(rng):
    """As an average of two states: what is not zero would count as kept."""
    layer = nmjax.linen.Dense(8, recipe=nmjax.recipes.transposable("2:4"))
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    mask = nmjax.transposable_mask(jnp.abs(params["kernel"]), "2:4")
    layer.apply({"params": params, "nm": {"kernel": {"mask": mask}}}, x)
    averaged = {"kernel": {"mask": mask.astype(jnp.float32)}}
    with pytest.raises(ValueError, match="a mask of shape .* of float32 where bool"):
        layer.apply({"params": params, "nm": averaged}, x)

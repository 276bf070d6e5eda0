"""The drop-in nnx layers, against Flax's own and against the linen ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
from nmjax import recipes
from nmjax.paths import named_leaves
from tests import oracle
from tests.nmjax.nnx.common import (
    FROZEN,
    SR_STE,
    assert_follows,
    drawn,
    run,
    values,
)

# Per layer: arguments, keywords, input shape; the linen twin and its fields.
LAYERS = {
    "Linear": ((8, 4), {}, (3, 8), nmjax.linen.Dense, {"features": 4}),
    "LinearGeneral": (
        ((2, 8), (3, 4)),
        {"axis": (-2, -1)},
        (5, 2, 8),
        nmjax.linen.DenseGeneral,
        {"features": (3, 4)},
    ),
    "Conv": (
        (8, 4, (3, 3)),
        {"strides": 2, "padding": "CIRCULAR"},
        (2, 6, 6, 8),
        nmjax.linen.Conv,
        {"features": 4, "kernel_size": (3, 3)},
    ),
    "ConvTranspose": (
        (8, 8, (3, 3)),
        {"transpose_kernel": True},
        (2, 5, 5, 8),
        nmjax.linen.ConvTranspose,
        {"features": 8, "kernel_size": (3, 3)},
    ),
    "Einsum": (
        ("btd,dhk->bthk", (8, 2, 4), (2, 4)),
        {},
        (2, 3, 8),
        nmjax.linen.Einsum,
        {"einsum_str": "btd,dhk->bthk", "shape": (8, 2, 4)},
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, recipe, **kwargs):
    args, own, shape, _, _ = LAYERS[name]
    own = {**own, **kwargs, "kernel_init": drawn, "bias_init": drawn}
    layer = getattr(nmjax.nnx, name)(*args, recipe=recipe, rngs=nnx.Rngs(0), **own)
    return layer, values(*shape)


@each_layer
def test_without_a_recipe_it_is_the_flax_layer(name):
    layer, x = make(name, None)
    plain = nmjax.densify(layer)
    assert type(plain) is getattr(nnx, name)
    np.testing.assert_array_equal(layer(x), plain(x))
    assert nmjax.nnx.params(layer).keys() == {"kernel", "bias"}
    assert nmjax.plan(layer, "2:4").sparse  # a rule may still make it sparse


@each_layer
@pytest.mark.parametrize("recipe", ["2:4", FROZEN], ids=["sr_ste", "frozen"])
def test_no_rule_overrides_its_recipe(name, recipe):
    layer, x = make(name, recipe)
    model = nnx.Dict(layer=layer)
    for rules in ([], [nmjax.Rule(".*", None)], [nmjax.Rule("layer", "1:4")]):
        plan = nmjax.plan(model, rules)
        assert plan["layer/kernel"].recipe == recipes.as_recipe(recipe)
        assert nnx.graphdef(nmjax.sparsify(model, rules)) == nnx.graphdef(model)
    assert_follows(layer, nmjax.plan(layer, []), x, nmjax.nnx.state(layer))
    assert type(nmjax.densify(model).layer) is getattr(nnx, name)


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (partial(nmjax.nnx.Linear, 10, 4), "axis -2 has size 10, not a multiple of 4"),
        (
            partial(nmjax.nnx.LinearGeneral, (8, 6), 4, axis=(-2, -1)),
            r"LinearGeneral with a kernel of shape \(8, 6, 4\).*size 6",
        ),
        (partial(nmjax.nnx.Conv, 8, 8, 3, feature_group_count=8), "depthwise"),
        (partial(nmjax.nnx.Conv, 8, 8, 3, feature_group_count=4), "axis -2 has size 2"),
        (partial(nmjax.nnx.ConvTranspose, 6, 8, 3), "axis -2 has size 6"),
        (partial(nmjax.nnx.Einsum, "bi,bi->bi", (8, 8)), "contracts no axis"),
        (partial(nmjax.nnx.Linear, 8, 8, param_dtype=jnp.complex64), "floating point"),
    ],
)
def test_what_cannot_be_sparse_is_refused_at_construction(make_layer, message):
    make_layer = partial(make_layer, kernel_init=drawn, rngs=nnx.Rngs(0))
    with pytest.raises(nmjax.PlanError, match=message):
        make_layer(recipe="2:4")
    make_layer(recipe=None)


def test_a_malformed_recipe_is_refused():
    for recipe in ("4:2", 2):
        with pytest.raises(ValueError, match=str(recipe)):
            nmjax.nnx.Linear(8, 8, recipe=recipe, rngs=nnx.Rngs(0))


class Mine(nmjax.nnx.Linear):
    """A user's subclass of a drop-in layer."""

    def __call__(self, x):
        return -super().__call__(x)


def test_users_subclass_of_a_drop_in():
    layer, x = Mine(8, 4, recipe="2:4", rngs=nnx.Rngs(0)), values(2, 8)
    w = layer.kernel[...]
    np.testing.assert_allclose(layer(x), -(x @ nmjax.ste(w, "2:4")), 1e-5, 1e-6)
    dense = nmjax.densify(layer)
    assert type(dense) is Mine
    np.testing.assert_allclose(dense(x), -(x @ w), 1e-5, 1e-6)
    np.testing.assert_array_equal(nmjax.sparsify(dense, "2:4")(x), layer(x))


@each_layer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linen_and_nnx_agree(name, dtype):
    layer, x = make(name, SR_STE, dtype=dtype)
    _, own, _, twin, fields = LAYERS[name]
    twin = twin(**fields, **own, recipe=SR_STE, dtype=dtype)

    @jax.jit
    def run_twin(params, x):
        def loss(params):
            y = twin.apply({"params": params}, x)
            return jnp.mean(jnp.square(y)), y

        return jax.grad(loss, has_aux=True)(params)

    gradients, y = run_twin(nmjax.nnx.params(layer), x)
    our_y, our_gradients, _ = run(layer, x)
    assert our_y.dtype == dtype
    np.testing.assert_array_equal(our_y, y)
    for path, gradient in named_leaves(gradients).items():
        np.testing.assert_array_equal(named_leaves(our_gradients)[path], gradient)


@pytest.mark.parametrize("name", ["Linear", "Einsum"])
def test_masks_are_read_from_the_master_weight(name):
    layer, _ = make(name, "2:4", dtype=jnp.bfloat16)
    shape = layer.kernel.shape
    w = 1 + jnp.arange(layer.kernel.size).reshape(shape) / 2**14
    assert (w.astype(jnp.bfloat16) == 1).all()  # in the copy all are equal
    layer.kernel.set_value(w)
    layer.bias.set_value(jnp.zeros_like(layer.bias[...]))
    (out,) = layer(jnp.eye(8, dtype=jnp.bfloat16)[None])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out != 0, oracle.magnitude_mask(w, 2, 4, axis=0))

"""Methods beyond masks of one weight, in nnx models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
from nmjax import recipes
from tests.nmjax.nnx.common import assert_close, baked, drawn, values


@pytest.mark.slow
def test_stacked_layers_have_a_scale_and_a_key_each():
    """nnx.vmap stacks layers of every kind of state; nnx.scan runs them one by one."""
    axes = nnx.StateAxes({nnx.Param: 0, nmjax.nnx.NMMask: 0, ...: None})

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return nnx.Linear(8, 8, use_bias=False, kernel_init=drawn, rngs=rngs)

    stacked = make(nnx.Rngs(0))
    stacked.kernel.set_value(values(2, 8, 8))

    def scanned(model, x):
        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def body(layer, x):
            return jnp.tanh(layer(x))

        return body(model, x)

    x = values(4, 8)
    for recipe in (recipes.s_ste("2:4"), recipes.bi_mask("2:4", refresh=5)):
        model = nmjax.sparsify(stacked, recipe)
        plan = nmjax.plan(stacked, recipe)
        state, expected = nmjax.nnx.state(model), x
        for i in range(2):
            one = {"kernel": stacked.kernel[...][i]}
            alone = nmjax.plan_params(one, weight_alone(recipe))
            baked = nmjax.bake(one, alone, nmjax.init_state(one, alone))
            expected = jnp.tanh(expected @ baked["kernel"])
        assert_close({"y": scanned(model, x)}, {"y": expected})
        nmjax.check(
            nmjax.nnx.params(model),
            plan,
            nmjax.prepare(nmjax.nnx.params(model), plan, state),
        )
        nmjax.nnx.set_state(model, state)
    model = nmjax.sparsify(stacked, recipes.two_by_four())
    nmjax.nnx.set_key(model, jax.random.key(0))
    assert model.nm_key[...].shape == (2, 1, 1)
    grads = nnx.grad(lambda model: scanned(model, x).sum())(model)
    assert np.isfinite(grads["kernel"][...]).all()
    nmjax.nnx.set_key(model, None)
    with pytest.raises(ValueError, match="set_key"):
        nnx.grad(lambda model: scanned(model, x).sum())(model)


def weight_alone(recipe):
    return dataclasses.replace(recipe, dgrad=None, reorder=None)


def test_a_state_of_another_recipe_is_refused():
    layer = nnx.Dict(d=nnx.Linear(8, 8, kernel_init=drawn, rngs=nnx.Rngs(0)))
    soft = nmjax.sparsify(layer, recipes.s_ste("2:4"))
    frozen = nmjax.sparsify(layer, recipes.frozen("2:4"))
    with pytest.raises(ValueError, match="d/kernel.*scale"):
        nmjax.nnx.set_state(soft, nmjax.nnx.state(frozen))


@pytest.mark.slow
def test_attention_and_einsum_share_the_three_gemms():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.attn = nnx.MultiHeadAttention(
                2, 8, kernel_init=drawn, decode=False, rngs=rngs
            )
            self.mix = nnx.Einsum(
                "bsd,dhk->bshk", (8, 2, 4), (2, 4), kernel_init=drawn, rngs=rngs
            )

        def __call__(self, x):
            return self.mix(self.attn(x))

    model, x = Model(), values(2, 4, 8)
    for recipe in (recipes.fst(), recipes.semi_sparse_activation()):
        sparse, plan = nmjax.sparsify(model, recipe), nmjax.plan(model, recipe)
        assert len(plan.sparse) == 5
        baked_model = baked(sparse, plan)
        value, expected = sparse(x), baked_model(x)
        if recipe.fprop == "weight":
            assert_close({"y": value}, {"y": expected})
        loss = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        ours, theirs = nnx.grad(loss)(sparse), nnx.grad(loss)(baked_model)
        # Of the last layer wgrad alone differs: fewer tokens, or other activations.
        bias, kernel = (
            (ours["mix"][name][...], theirs["mix"][name][...])
            for name in ("bias", "kernel")
        )
        if recipe.fprop == "weight":
            np.testing.assert_allclose(*bias, rtol=1e-4, atol=1e-5)
        assert not np.allclose(*kernel)
    assert nmjax.nnx.state(sparse) == {}


@pytest.mark.parametrize("keeps", ["transposable", "s_ste", "learned"])
@pytest.mark.parametrize("pure", [True, False])
def test_what_another_recipe_kept_is_not_used(keeps, pure):
    """Of a model with another recipe all is taken over, its mask too."""
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    old = nmjax.sparsify(
        layer, [nmjax.Rule(".*", getattr(nmjax.recipes, keeps)("2:4"))]
    )
    new, x = nmjax.sparsify(layer, "2:4"), jnp.ones((4, 16))
    state = nnx.state(old)
    nnx.update(new, nnx.to_pure_dict(state) if pure else state)
    with pytest.raises(ValueError, match="of another recipe, perhaps since nnx.update"):
        new(x)
    fresh = nmjax.sparsify(layer, "2:4")
    nnx.update(fresh, nnx.state(old, nnx.Param))
    np.testing.assert_array_equal(fresh(x), nmjax.sparsify(layer, "2:4")(x))

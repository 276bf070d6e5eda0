"""Sparse linen models inside nnx ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nmjax
from nmjax import recipes
from tests.nmjax.nnx.common import SR_STE, values, whatever_can_be

TRANSPOSABLE = whatever_can_be(recipes.transposable("2:4"))


def inside_nnx(model):
    return nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(values(2, 8))


def test_a_recipe_that_keeps_nothing():
    rules = whatever_can_be(SR_STE)
    model = inside_nnx(nmjax.sparsify(nn.Dense(8, use_bias=False), rules))
    plan = nmjax.plan(nn.Dense(8, use_bias=False), rules, values(2, 8))
    baked = nmjax.bake(nmjax.nnx.params(model), plan)
    np.testing.assert_allclose(model(jnp.eye(8)), baked["kernel"])


def test_a_kept_mask_has_no_place():
    model = inside_nnx(nmjax.sparsify(nn.Dense(8), TRANSPOSABLE))
    with pytest.raises(ValueError, match="keeps its mask in the state"):
        model(values(2, 8))


def test_its_parameters_go_through_sparsify_params():
    model = inside_nnx(nn.Dense(8, use_bias=False))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(params)
    plan = nmjax.plan_params(pure, TRANSPOSABLE)
    state = nmjax.init_state(pure, plan)

    def loss(params, x):
        masked = nmjax.sparsify_params(nnx.to_pure_dict(params), plan, state)
        return nnx.merge(graphdef, nnx.State(masked), rest, copy=True)(x).sum()

    x = values(2, 8)
    gradient = jax.grad(loss)(params, x)["kernel"][...]
    baked = nmjax.bake(pure, plan, state)["kernel"]
    assert (baked == 0).mean() == 0.5
    np.testing.assert_allclose(loss(params, x), (x @ baked).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.T @ np.ones((2, 8)), rtol=1e-5)

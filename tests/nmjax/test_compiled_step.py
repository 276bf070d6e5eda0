"""A training step as XLA compiles it for two GPUs, with none there."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import nmjax
from nmjax import recipes, sparse_products
from nmjax.masks.tiles import EXACT
from pallas_kernels import dispatch, implementations, ptx
from pallas_kernels.dispatch import Choice
from pallas_kernels.partitioning import partitioned
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.ahead_of_time import H200, on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
    ),
    pytest.mark.skipif(
        ptx.JAX_VERSION < ptx.AMPERE_SINCE, reason="compression in Mosaic needs it"
    ),
]

BATCH, TOKENS, WIDTH = 4, 64, 256


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        return x + nn.Dense(WIDTH, dtype=jnp.bfloat16, name="mlp")(h), None


class Blocks(nn.Module):
    """Two blocks, scanned, each computed anew for the backward pass."""

    @nn.compact
    def __call__(self, x):
        rngs = {"params": True, "nm": True}
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs=rngs, length=2
        )
        return blocks(name="blocks")(x, None)[0]


def test_every_device_multiplies_its_own_tokens(monkeypatch):
    """All three GEMMs of a layer are sparse, and only gradients are exchanged."""
    devices = ahead_of_time.devices(H200, 2)
    for module in (sparse_products, dispatch):
        monkeypatch.setattr(module, "judge", lambda *_, **__: Choice("sm90"))
    monkeypatch.setattr(sparse_products, "is_measured", lambda: True)
    monkeypatch.setattr(implementations, "PROVEN_ON", {H200.name})
    rules = [nmjax.Rule(".*", recipes.two_by_four(refresh=1))]
    model = nmjax.sparsify(Blocks(), rules)

    def step(params, x, key):
        def loss(params):
            return model.apply({"params": params}, x, rngs={"nm": key}).sum()

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.bfloat16)
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(model.init, key, x)["params"]

    partitioned.cache_clear()
    arguments = on(mesh, params), on(mesh, x, "data"), on(mesh, key)
    hlo = ahead_of_time.program(mesh, step, *arguments)
    partitioned.cache_clear()

    calls = re.findall(r"= (\S+|\(.*?\)) custom-call\(.*mosaic_gpu", hlo)
    products = sorted(re.sub(r"\{.*", "", c) for c in calls if not c.startswith("("))
    own = BATCH // 2 * TOKENS
    fprop = dgrad = f"bf16[{own},{WIDTH}]"
    assert products == sorted([fprop, dgrad, f"bf16[{WIDTH},{WIDTH}]"])
    assert len(calls) == 2 * len(products), "each compresses its operand"
    assert "all-reduce" in hlo
    assert not re.search("all-gather|all-to-all|collective-permute", hlo)
    assert not re.search(r"= bf16\S+ transpose\(", hlo), "operands lie as needed"


@pytest.mark.parametrize(
    "recipe, sparse, passes",
    [
        (recipes.sr_ste("2:4"), 1, 1),
        (recipes.transposable("2:4"), 2, 2),
        (recipes.semi_sparse_weight(), 2, 2),
        (recipes.semi_sparse_activation(), 2, 2),
        (recipes.semi_sparse_activation(algorithm="largest_abs_values_exact"), 2, 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_sparse_gemm_of_a_recipe_is_in_the_program(
    monkeypatch, recipe, sparse, passes
):
    (device,) = ahead_of_time.devices(H200, 1)
    for module in (sparse_products, dispatch):
        monkeypatch.setattr(module, "judge", lambda *_, **__: Choice("sm90"))
    monkeypatch.setattr(sparse_products, "is_measured", lambda: True)
    monkeypatch.setattr(implementations, "PROVEN_ON", {H200.name})
    rules = [nmjax.Rule(".*", recipe)]
    layer = nn.Dense(WIDTH, dtype=jnp.bfloat16)
    model = nmjax.sparsify(layer, rules)

    def step(params, state, x):
        def loss(params, x):
            y = model.apply({"params": params, "nm": state}, x)
            return (y.astype(jnp.float32) ** 2).sum()  # y has to be there

        return jax.grad(loss, (0, 1))(params, x)

    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.eval_shape(jax.random.key, 0), x)["params"]
    plan = nmjax.plan(layer, rules, x)
    state = jax.eval_shape(lambda params: nmjax.init_state(params, plan), params)

    partitioned.cache_clear()
    arguments = on(mesh, params), on(mesh, state), on(mesh, x)
    hlo = ahead_of_time.program(mesh, step, *arguments)
    partitioned.cache_clear()

    calls = [line for line in hlo.splitlines() if "custom-call(" in line]
    assert sum("nm_matmul" in call for call in calls) == sparse
    assert sum("nm_compress" in call for call in calls) == passes
    if recipe.fprop == "activation":  # written with zeros, but where one pass does all
        masked = re.search(r"= bf16\S+ fusion\(%x", hlo)
        assert bool(masked) == (recipe.tile != EXACT)

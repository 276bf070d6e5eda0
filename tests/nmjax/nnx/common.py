"""What a sparse nnx model must do, told by the dense model with zeros in its kernels.

"Baked" is a dense copy of a model whose kernels hold zeros where the plan says. Outputs
are the baked model's; gradients too, plus the decay of what was dropped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nmjax
from nmjax import recipes
from nmjax.paths import map_named, named_leaves
from tests.foreign import MODELS

DECAY = 2.0**-6
SR_STE = recipes.sr_ste("2:4", decay=DECAY)
FROZEN = recipes.frozen("2:4", decay=DECAY)  # keeps its masks
USES = {"first/kernel": 3}  # of the tied layer in one call; every other has one

NNX = [name for name, case in MODELS.items() if case.api == "nnx"]


def whatever_can_be(recipe):
    return [nmjax.Rule(".*", recipe, ineligible="dense")]


def build(name, seed=0):
    """A model, in evaluating mode, and its input."""
    model = MODELS[name].build(seed)
    model.eval()
    (x,) = MODELS[name].inputs()
    return model, x


def values(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def drawn(key, shape, dtype):
    """For `kernel_init`: Flax's own takes seconds to compile, for each shape."""
    del key
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(0, 0.3, shape), dtype)


def baked(model, plan, state=None):
    dense = nnx.clone(nmjax.densify(model))
    params = nmjax.nnx.params(model)
    nnx.update(dense, jax.jit(lambda p, s: nmjax.bake(p, plan, s))(params, state))
    return dense


@nnx.jit
def forward(model, x):
    return model(x)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, rest, x):
    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x)
        return jnp.mean(jnp.square(y)), (y, nnx.state(model, nnx.BatchStat))

    grads, (y, batch_stats) = jax.grad(loss, has_aux=True)(params)
    return y, nnx.to_pure_dict(grads), nnx.to_pure_dict(batch_stats)


def run(model, x):
    """Outputs, gradients of their mean square, and batch statistics after."""
    return _run(*nnx.split(model, nnx.Param, ...), x)


def assert_close(actual, expected):
    actual, expected = named_leaves(actual), named_leaves(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, 2e-5, 1e-6, err_msg=path)


def expected_gradients(params, plan, state, gradients):
    """The gradients of a sparse model, from those of the baked one."""
    recipes = {entry.path: entry.recipe for entry in plan.sparse}
    dropped = jax.tree.map(jnp.subtract, params, nmjax.bake(params, plan, state))
    dropped = named_leaves(dropped)

    def add(path, gradient):
        if path not in recipes:
            return gradient
        return gradient + USES.get(path, 1) * recipes[path].decay * dropped[path]

    return map_named(add, gradients)


def assert_follows(sparse, plan, x, state=None):
    """Outputs, batch statistics and gradients are what the plan says."""
    params = nmjax.nnx.params(sparse)
    y, gradients, batch_stats = run(sparse, x)
    expected = run(baked(sparse, plan, state), x)
    assert_close({"y": y, **batch_stats}, {"y": expected[0], **expected[2]})
    assert_close(gradients, expected_gradients(params, plan, state, expected[1]))

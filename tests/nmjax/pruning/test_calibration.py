"""What layers receive while a model runs on calibration batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nmjax
from nmjax.pruning.calibration import Calibration, with_leaves
from tests.foreign import MODELS, draw


def calibrate(model, rules, batches, variables=None, kwargs=None):
    return Calibration(model, rules, batches, variables, kwargs, ("magnitude",))


class Mlp(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, scale=1.0, *, train):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = dense(8, name="b")(x) * scale
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3, name="a")(x))


def mlp(**fields):
    model, x = Mlp(**fields), np.random.default_rng(0).normal(size=(4, 8))
    x = x.astype(np.float32)
    shapes = jax.eval_shape(
        lambda key: model.init(key, x, train=False), jax.random.key(0)
    )
    return model, x, draw(shapes, 0)


def test_linen_inputs_and_the_order_of_calls():
    model, x, variables = mlp()
    batches = [x, (2 * x, 3.0)]  # an array, and positional arguments
    made = calibrate(model, "2:4", batches, variables, {"train": False})
    assert made.order() == ["b/kernel", "a/kernel"]
    params = variables["params"]
    calls = list(made.inputs(params, ["a/kernel"]))
    assert [layer.path for layer, _ in calls] == ["a/kernel"] * 2
    b = params["b"]
    for (_, actual), (y, scale) in zip(calls, [(x, 1), (2 * x, 3)], strict=True):
        expected = (y @ b["kernel"] + b["bias"]) * scale
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _, actual in made.inputs(zeros, ["a/kernel"]):  # of the parameters given here
        np.testing.assert_array_equal(actual, 0)


def test_nnx_inputs_and_a_layer_with_two_names():
    model = MODELS["nnx_tied"].build()
    params = nmjax.nnx.params(model)
    classes = {type(module) for _, module in nnx.iter_modules(model)}
    made = calibrate(model, "2:4", [MODELS["nnx_tied"].inputs()])
    calls = list(made.inputs(params, ["first/kernel"]))
    assert len(calls) > 1 and {layer.path for layer, _ in calls} == {"first/kernel"}
    assert not any(isinstance(x, jax.core.Tracer) for _, x in calls)
    assert {type(module) for _, module in nnx.iter_modules(model)} == classes
    assert type(calls[0][0].module) is nnx.Linear


class Equation(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((8, 3), name="mix")(x, "bi,io->bo")


def test_a_layer_keeps_the_equation_of_its_call():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    variables = draw(jax.eval_shape(Equation().init, jax.random.key(0), x), 0)
    made = calibrate(Equation(), "2:4", [x], variables)
    ((layer, actual),) = made.inputs(made.params, ["mix/kernel"])
    y = layer(variables["params"]["mix"], actual)
    np.testing.assert_allclose(y, Equation().apply(variables, x), atol=1e-5)


def test_a_sparse_model_is_calibrated_dense():
    model, x, variables = mlp()
    sparse = nmjax.sparsify(model, "2:4")
    plain = calibrate(model, "2:4", [x], variables, {"train": False})
    made = calibrate(sparse, "2:4", [x], variables, {"train": False})
    ((_, expected),) = plain.inputs(plain.params, ["a/kernel"])
    ((_, actual),) = made.inputs(made.params, ["a/kernel"])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen_transformer_scan", "nnx_transformer_scan"])
def test_layers_inside_a_scan_are_refused(name):
    foreign = MODELS[name]
    variables = foreign.variables() if foreign.api == "linen" else None
    made = calibrate(
        foreign.build(), "2:4", [foreign.inputs()], variables, foreign.kwargs
    )
    with pytest.raises(ValueError, match="blocks/attn/out/kernel.*(scan|transform)"):
        made.order()


def test_layers_of_another_model_that_this_one_applies_are_not_its_own():
    x = np.ones((4, 8), np.float32)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x) + Inner().apply(weights, 3 * x)

    weights = Inner().init(jax.random.key(0), x)
    variables = Outer().init(jax.random.key(1), x)
    made = calibrate(Outer(), "2:4", [x], variables)
    ((_, actual),) = made.inputs(variables["params"], ["Dense_0/kernel"])
    np.testing.assert_array_equal(actual, x)


def test_a_kernel_that_is_read_in_two_ways_is_refused():
    class Twice(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Conv(8, 8, (3,), padding="VALID", rngs=rngs)
            self.b = nnx.Conv(8, 8, (3,), kernel_dilation=2, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    made = calibrate(Twice(), "2:4", [np.ones((2, 9, 8), np.float32)])
    with pytest.raises(ValueError, match="a/kernel is read in two ways, .*'VALID'"):
        made.order()


def test_a_batch_without_samples_is_refused():
    model, x, variables = mlp()
    made = calibrate(model, "2:4", [x[:0]], variables, {"train": False})
    with pytest.raises(ValueError, match=r"input of shape \(0, 8\): leave out"):
        made.order()


def test_layers_inside_remat_are_refused():
    model, x, variables = mlp(remat=True)
    made = calibrate(model, "2:4", [x], variables, {"train": False})
    message = r"\['b/kernel'\] are called inside a scan.*nmjax.Rule\('b', None\)"
    with pytest.raises(ValueError, match=message):
        made.order()
    rules = [nmjax.Rule("b", None), nmjax.Rule(".*", "2:4")]
    made = calibrate(model, rules, [x], variables, {"train": False})
    assert made.order() == ["a/kernel"]


def test_a_layer_that_no_batch_reaches_is_refused():
    foreign = MODELS["linen_vae"]
    model, variables = foreign.build(), foreign.variables()
    plan = nmjax.plan(model, "2:4", *foreign.inputs())
    decoder = {"method": "decode"}
    made = calibrate(model, plan, foreign.methods["decode"](), variables, decoder)
    with pytest.raises(ValueError, match="no calibration batch reaches.*encoder/"):
        made.order()


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nmjax.linen.Dense(3, recipe="2:4")(x)


def test_a_layer_with_a_recipe_of_its_own_is_refused():
    x = np.ones((2, 8), np.float32)
    variables = draw(jax.eval_shape(Own().init, jax.random.key(0), x), 0)
    made = calibrate(Own(), "2:4", [x], variables)
    with pytest.raises(ValueError, match="Dense_0/kernel: .*brings its own recipe"):
        made.order()


def test_bad_arguments():
    model, x, variables = mlp()
    kwargs = {"train": False}
    with pytest.raises(ValueError, match="no calibration batches"):
        calibrate(model, "2:4", [], variables, kwargs)
    with pytest.raises(ValueError, match=r"one array of shape \(4, 8\).*a list"):
        calibrate(model, "2:4", x, variables, kwargs)
    with pytest.raises(ValueError, match="got a Mlp without"):
        calibrate(model, "2:4", [x], None, kwargs)
    with pytest.raises(ValueError, match="got a Transformer with"):
        calibrate(MODELS["nnx_transformer"].build(), "2:4", [x], variables)
    with pytest.raises(ValueError, match="makes nothing sparse.*dense by rule"):
        calibrate(model, [nmjax.Rule(".*", None)], [x], variables, kwargs)
    rules = nmjax.recipes.transposable("2:4")
    with pytest.raises(ValueError, match="mask='transposable', and this method"):
        calibrate(model, rules, [x], variables, kwargs)
    plan = nmjax.plan_params({"c": {"kernel": jnp.ones((8, 3))}}, "2:4")
    with pytest.raises(ValueError, match="the plan has c/kernel of shape"):
        calibrate(model, plan, [x], variables, kwargs)


def test_with_leaves_keeps_structure_boxes_and_dtypes():
    params = {
        "a": nn.Partitioned(jnp.zeros(2, jnp.bfloat16), ("model",)),
        "b": jnp.ones(3),
    }
    new = with_leaves(params, {"a": jnp.ones(2, jnp.float32)})
    assert isinstance(new["a"], nn.Partitioned) and new["a"].value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["a"].value, 1)
    assert new["b"] is params["b"]

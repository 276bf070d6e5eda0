"""What nnx models have: paths, contracted axes, and why a weight stays dense."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.paths import named_leaves
from tests import oracle
from tests.foreign import MODELS
from tests.nmjax.nnx.common import NNX, SR_STE, build, drawn, values, whatever_can_be


@pytest.mark.parametrize("name", NNX)
def test_the_plan_finds_every_layer_and_its_axes(name):
    case = MODELS[name]
    plan = nmjax.plan(case.build(), whatever_can_be(SR_STE))
    sparse = {e.path.removesuffix("/kernel"): e.axes for e in plan.sparse}
    assert sparse == dict(case.layers)
    reasons = {e.path: e.reason for e in plan if not e.sparse}
    assert set(reasons) == set(case.dense)
    words = {"3 input channels": "size 3", "own parameter": "no hook"}
    for path, why in case.dense.items():
        assert words.get(why, why) in reasons[path]


@pytest.mark.parametrize("name", NNX)
def test_paths_are_those_of_the_parameter_tree(name):
    model, _ = build(name)
    plan, params = nmjax.plan(model, "2:4"), nmjax.nnx.params(model)
    leaves = named_leaves(params)
    paths = [entry.path for entry in plan]
    assert paths == [path for path in leaves if path in set(paths)]
    for entry in plan:
        assert leaves[entry.path].shape == entry.shape
        assert str(leaves[entry.path].dtype) == entry.dtype
    assert nmjax.Plan.from_json(plan.to_json()) == plan
    nmjax.check(params, plan)
    assert nmjax.summary(params, plan).count("yes") == len(plan.sparse)


def test_attention_masks_never_run_across_heads():
    model, _ = build("nnx_transformer")
    plan = nmjax.plan(model, "2:4")
    masks = nmjax.prepare(nmjax.nnx.params(model), plan)["blocks"]["0"]["attn"]
    attention = model.blocks[0].attn
    for name, axis in {"query": -3, "key": -3, "value": -3, "out": -2}.items():
        kernel = getattr(attention, name).kernel[...]
        assert kernel.shape == ((8, 16, 128) if name == "out" else (128, 8, 16))
        expected = oracle.magnitude_mask(kernel, 2, 4, axis)
        np.testing.assert_array_equal(masks[name]["kernel"]["mask"], expected)


def make(layer, *args, **kwargs):
    return layer(*args, kernel_init=drawn, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize(
    ("layer", "axes"),
    [
        (make(nnx.ConvTranspose, 8, 4, 3), (-2,)),
        (make(nnx.ConvTranspose, 8, 4, 3, transpose_kernel=True), (-1,)),
        (make(nnx.LinearGeneral, (4, 8), 6, axis=(1, 2), batch_axis={0: 3}), (-3, -2)),
        (make(nnx.Einsum, "...i,oi->...o", (4, 8)), (-1,)),
        (make(nnx.Conv, 16, 8, 3, feature_group_count=4), (-2,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nnx.Module) else "",
)
def test_axes(layer, axes):
    entry = nmjax.plan(layer, "2:4")["kernel"]
    assert entry.axes == axes and entry.sparse


class Scaled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class ByHand(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


def moved():
    layer = make(nnx.Linear, 8, 8)
    layer.kernel = nnx.Param(jnp.ones((8, 3, 8)))  # stacked in the middle
    return layer


linear, conv = partial(make, nnx.Linear, 8, 8), partial(make, nnx.Conv, 8, 8, 3)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (make(nnx.Conv, 3, 8, 3), "axis -2 has size 3, not a multiple of 4"),
        (conv(feature_group_count=8), "depthwise: 1 input channel in each group"),
        (conv(mask=jnp.ones((3, 8, 8))), "the layer has its own mask"),
        (
            conv(conv_general_dilated=partial(jax.lax.conv_general_dilated)),
            "the layer has its own conv_general_dilated",
        ),
        (
            linear(dot_general=partial(jax.lax.dot_general)),
            "the layer has its own dot_general",
        ),
        (
            make(nnx.LinearGeneral, 8, 8, dot_general_cls=lambda: jax.lax.dot_general),
            "the layer has its own dot_general_cls",
        ),
        (
            make(nnx.Einsum, "bi,io->bo", (8, 8), einsum_op=partial(jnp.einsum)),
            "the layer has its own einsum_op",
        ),
        (
            make(nnx.Einsum, "bi,bi->bi", (8, 8)),
            "its equation contracts no axis of the kernel",
        ),
        (moved(), "its shape (8, 3, 8) does not end in the layer's own (8, 8)"),
        (make(ByHand, 8, 8), "no hook: ByHand.__call__ does not call Flax's"),
        (make(Scaled, 8, 8), ""),
        (linear(param_dtype=jnp.float16), ""),
    ],
    ids=lambda value: value or "sparse" if isinstance(value, str) else "",
)
def test_why_a_layer_stays_dense(layer, reason):
    model = nnx.Dict(layer=layer)
    entry = nmjax.plan(model, "2:4")["layer/kernel"]
    assert entry.reason == reason and entry.sparse == (not reason)
    assert entry.layer == type(layer).__name__
    if reason:
        with pytest.raises(nmjax.PlanError) as error:
            nmjax.sparsify(model, [nmjax.Rule(".*", "2:4")])
        assert reason in str(error.value) and "Rule('layer', None)" in str(error.value)


def test_parameters_without_a_layer():
    model = nnx.Dict(
        low=make(nnx.LoRALinear, 8, 8, lora_rank=4, a_initializer=drawn),
        embed=nnx.Embed(8, 4, embedding_init=drawn, rngs=nnx.Rngs(0)),
        loose=nnx.List([nnx.Param(jnp.ones((8, 8)))]),
        number=nnx.Param(1.0),
        tree=nnx.Param((jnp.ones((8, 8)),)),
    )
    plan = nmjax.plan(model, "2:4")
    assert plan["embed/embedding"].reason == "embedding: a table, not a GEMM"
    for path in ("low/lora/lora_a", "low/lora/lora_b", "loose/0"):
        assert "nmjax.sparsify_params" in plan[path].reason
    assert plan["low/kernel"].sparse and plan["low/kernel"].layer == "LoRALinear"


def test_layers_that_contract_one_weight_along_two_axes():
    model = nnx.Dict(a=linear(), b=make(nnx.Einsum, "bi,oi->bo", (8, 8)))
    model.b.kernel = model.a.kernel
    (entry,) = nmjax.plan(model, "2:4")
    assert not entry.sparse and "no single mask serves" in entry.reason


def test_a_kernel_that_is_also_read_by_hand():
    model = nnx.Dict(a=linear())
    model.b = nnx.Dict(w=model.a.kernel)
    (entry,) = nmjax.plan(model, "2:4")
    assert not entry.sparse and "reads this parameter itself" in entry.reason


def test_rules_that_match_nothing():
    model, _ = build("nnx_conv_net")
    with pytest.raises(nmjax.PlanError, match="'conv9' matches no layer"):
        nmjax.sparsify(model, [nmjax.Rule("conv9", "2:4")])


def test_shards_that_cut_groups():
    layer = linear()
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("model"))
    sparse = nmjax.sparsify(layer, "2:4")
    layer.kernel.set_value(jax.device_put(layer.kernel[...], sharding))
    with pytest.raises(nmjax.PlanError, match="cuts groups of 4"):
        nmjax.plan(layer, "2:4")
    with pytest.raises(nmjax.PlanError, match="cuts groups of 4"):
        sparse(jnp.ones((2, 8)))


def test_a_ragged_axis():
    layer, x = make(nnx.Linear, 10, 4), values(3, 10)
    sparse = nmjax.sparsify(layer, [nmjax.Rule(".*", "2:4", ragged="dense-tail")])
    w = layer.kernel[...]
    mask = oracle.magnitude_mask(w, 2, 4, ragged="dense-tail")
    np.testing.assert_allclose(sparse(x), x @ jnp.where(mask, w, 0), 1e-5, 1e-6)


def test_abstract_models():
    abstract = nnx.eval_shape(lambda: MODELS["nnx_mixer"].make(rngs=nnx.Rngs(0)))
    model, x = build("nnx_mixer")
    assert nmjax.plan(abstract, "2:4") == nmjax.plan(model, "2:4")
    sparse = nmjax.sparsify(abstract, "2:4")
    nnx.update(sparse, nnx.state(model))
    np.testing.assert_array_equal(sparse(x), nmjax.sparsify(model, "2:4")(x))


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_wrappers_that_rewrite_parameters_are_refused(norm):
    model = norm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(nmjax.PlanError, match=f"{norm.__name__} rewrites the weights"):
        nmjax.plan(model, [nmjax.Rule(".*", "2:4")])

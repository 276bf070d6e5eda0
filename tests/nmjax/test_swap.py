"""`sparsify` on linen models that know nothing of nmjax, and the promises it makes."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax.paths import map_named, named_leaves
from nmjax.state import state_leaves
from tests.foreign import MODELS

LINEN = [name for name, model in MODELS.items() if model.api == "linen"]
QUICK = {
    "linen_einsum",
    "linen_partitioned",
    "linen_tied",
    "linen_own_parameters",
}
each_model = pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LINEN],
)


# As users compile: without, XLA sums in another order where it fuses a mask.
OPTIMIZED = {"xla_backend_optimization_level": 3}


def whatever_can_be(recipe):
    return [nmjax.Rule(".*", recipe, ineligible="dense")]


def loss_of(outputs):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))


class Mlp(nn.Module):
    """Three layers, for what needs no particular model."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, dtype=self.dtype, name="first")(x))
        x = nn.relu(nn.Dense(16, dtype=self.dtype, name="second")(x))
        return nn.Dense(5, dtype=self.dtype, name="head")(x)


RULES = [nmjax.Rule("head", None), nmjax.Rule(".*", "2:4")]


@functools.cache
def mlp_case():
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    return Mlp().init(jax.random.key(0), x), jnp.asarray(x)


# The plan


@pytest.mark.parametrize("name", LINEN)
def test_the_plan_finds_every_layer_and_its_axes(name):
    case = MODELS[name]
    plan = nmjax.plan(
        case.make(), whatever_can_be("2:4"), *case.inputs(), **case.kwargs
    )
    sparse = {e.path.removesuffix("/kernel"): e.axes for e in plan.sparse}
    assert sparse == dict(case.layers)
    reasons = {e.path: e.reason for e in plan if not e.sparse}
    assert set(reasons) == set(case.dense)
    words = {"3 input channels": "size 3", "own parameter": "no hook"}
    for path, why in case.dense.items():
        assert words.get(why, why) in reasons[path]


def test_planning_accepts_abstract_examples_and_computes_nothing():
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    _, x = mlp_case()
    assert nmjax.plan(Mlp(), RULES, shape) == nmjax.plan(Mlp(), RULES, x)


def test_attention_groups_along_the_model_axis():
    case = MODELS["linen_transformer"]
    plan = nmjax.plan(case.make(), "2:4", *case.inputs())
    for name in ("query", "key", "value"):
        entry = plan[f"block_0/attn/{name}/kernel"]
        assert entry.shape == (128, 8, 16)
        assert entry.axis == -3
    assert plan["block_0/attn/out/kernel"].axis == -2


# Values and gradients


@each_model
def test_a_sparse_model_equals_the_dense_one_with_masked_weights(name):
    case = MODELS[name]
    dense, variables, inputs = case.make(), case.variables(), case.inputs()
    rules = whatever_can_be(nmjax.recipes.ste("2:4"))
    sparse = nmjax.sparsify(dense, rules)
    plan = nmjax.plan(dense, rules, *inputs, **case.kwargs)
    baked = nmjax.bake(variables["params"], plan)
    nmjax.check(variables["params"], plan)

    def step(model, params):
        call = {"rngs": case.rngs(), "mutable": list(case.mutable) or False}
        call |= case.train_kwargs
        outputs = model.apply({**variables, "params": params}, *inputs, **call)
        return loss_of(outputs), outputs

    # Called dense first: nothing of that trace may be left over in the sparse call.
    run = lambda model: jax.jit(  # noqa: E731
        jax.grad(functools.partial(step, model), has_aux=True),
        compiler_options=None if name in QUICK else OPTIMIZED,
    )
    dense_gradient, dense_outputs = run(dense)(baked)
    gradient, outputs = run(sparse)(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, outputs, dense_outputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradient,
        dense_gradient,
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])


@each_model
def test_a_kept_mask_reaches_its_layer(name):
    case = MODELS[name]
    dense, variables, inputs = case.make(), case.variables(), case.inputs()
    rules = whatever_can_be(nmjax.recipes.frozen("2:4"))
    plan = nmjax.plan(dense, rules, *inputs, **case.kwargs)
    params = variables["params"]
    other = map_named(lambda path, w: jnp.roll(w, 1, axis=-1) * 1.5, params)
    state = nmjax.init_state(other, plan)  # masks that these weights would not choose
    assert any(
        (mask != own).any()
        for mask, own in zip(
            state_leaves(state, "mask").values(),
            state_leaves(nmjax.init_state(params, plan), "mask").values(),
            strict=True,
        )
    )
    sparse = nmjax.sparsify(dense, rules)
    traces = []

    @jax.jit
    def run(params, state):
        traces.append(0)
        variables_ = {**variables, "params": params, "nm": state}
        return sparse.apply(variables_, *inputs, **case.kwargs, rngs=case.rngs())

    @jax.jit
    def run_dense(params):
        variables_ = {**variables, "params": params}
        return dense.apply(variables_, *inputs, **case.kwargs, rngs=case.rngs())

    for masks in (state, nmjax.init_state(params, plan)):
        expected = run_dense(nmjax.bake(params, plan, masks))
        jax.tree.map(np.testing.assert_array_equal, run(params, masks), expected)
    assert len(traces) == 1  # a changed mask is data


@pytest.mark.parametrize("name", ["linen_vae"])
def test_other_entry_points_are_sparse_too(name):
    case = MODELS[name]
    dense, variables = case.make(), case.variables()
    sparse = nmjax.sparsify(dense, "2:4")
    plan = nmjax.plan(dense, "2:4", *case.inputs(), **case.kwargs)
    baked = {**variables, "params": nmjax.bake(variables["params"], plan)}
    for method, inputs in case.methods.items():
        expected = dense.apply(baked, *inputs(), method=method)
        for spelling in (method, getattr(type(dense), method), getattr(sparse, method)):
            outputs = sparse.apply(variables, *inputs(), method=spelling)
            jax.tree.map(np.testing.assert_array_equal, outputs, expected)


# Promise 1: the same parameters


@pytest.mark.parametrize(
    "name", [pytest.param("linen_einsum", marks=pytest.mark.slow), "linen_partitioned"]
)
def test_init_is_the_dense_models_bit_for_bit(name):
    case = MODELS[name]
    sparse = nmjax.sparsify(case.make(), "2:4")
    key = jax.random.key(7)
    expected = jax.jit(case.make().init)(key, *case.inputs())
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(sparse.init)(key, *case.inputs()),
        expected,
    )


def test_init_with_output_gives_the_sparse_output():
    _, x = mlp_case()
    rules = [RULES[0], nmjax.Rule(".*", nmjax.recipes.frozen("2:4"))]
    sparse = nmjax.sparsify(Mlp(), rules)
    outputs, variables = sparse.init_with_output(jax.random.key(0), x)
    plan = nmjax.plan(Mlp(), rules, x)
    baked = nmjax.bake(
        variables["params"], plan, nmjax.init_state(variables["params"], plan)
    )
    np.testing.assert_array_equal(outputs, Mlp().apply({"params": baked}, x))


# Promise 2: never silence


def test_a_rule_that_matches_nothing_raises_at_every_call():
    variables, x = mlp_case()
    sparse = nmjax.sparsify(Mlp(), [nmjax.Rule("haed", None), *RULES])
    for call in (
        lambda: sparse.init(jax.random.key(0), x),
        lambda: sparse.apply(variables, x),
        lambda: jax.jit(sparse.apply)(variables, x),
        lambda: nmjax.plan(Mlp(), sparse.nm_rules, x),
    ):
        with pytest.raises(nmjax.PlanError, match="(?s)'haed' matches no.*first.*head"):
            call()


def test_ineligible_layers_are_listed_with_rules_to_paste():
    case = MODELS["linen_mobilenet"]
    rules = [nmjax.Rule(".*", "2:4")]
    with pytest.raises(nmjax.PlanError) as error:
        nmjax.plan(case.make(), rules, *case.inputs())
    text = str(error.value)
    for path in case.dense:
        assert path in text
    pasted = eval("[" + text[text.index("    nmjax.Rule(") :] + "]")
    plan = nmjax.plan(case.make(), pasted + rules, *case.inputs())
    assert {e.path.removesuffix("/kernel") for e in plan.sparse} == set(case.layers)


def test_what_stays_dense_is_logged_once(caplog):
    case = MODELS["linen_own_parameters"]
    sparse = nmjax.sparsify(case.make(), "2:4")
    for _ in range(2):
        sparse.apply(case.variables(), *case.inputs())
    lines = [r.getMessage() for r in caplog.records if r.name == "nmjax"]
    assert len(lines) == len(case.dense)
    assert all("stays dense: no hook" in line for line in lines)


def test_a_hook_of_the_users_own_is_an_error_with_the_path():
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="quantised", dot_general=jax.lax.dot_general)(x)

    with pytest.raises(nmjax.PlanError, match="quantised.*its own dot_general"):
        nmjax.plan(Custom(), [nmjax.Rule(".*", "2:4")], jnp.ones((2, 8)))


def test_wrappers_that_rewrite_parameters_are_refused_by_name():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(8), name="normed")(x)

    with pytest.raises(nmjax.PlanError, match="normed: WeightNorm.*sparsify_params"):
        nmjax.plan(Normed(), "2:4", jnp.ones((2, 8)))


def test_parameters_that_the_model_transforms_are_refused():
    def standardised(params):
        return jax.tree.map(lambda w: w - w.mean(0), params)

    class Standardised(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = self.is_initializing()
            layer = nn.map_variables(
                nn.Dense, "params", standardised, init=init, mutable=init
            )
            return layer(8, name="layer")(x)

    with pytest.raises(nmjax.PlanError, match="layer/kernel: the model transforms"):
        nmjax.plan(Standardised(), "2:4", jnp.ones((2, 8)))


class ByHand(nn.Dense):
    """Reads its kernel in a way of its own."""

    @nn.compact
    def __call__(self, inputs):
        shape = inputs.shape[-1], self.features
        return inputs @ self.param("kernel", self.kernel_init, shape)


class Centred(nn.Conv):
    """Weight standardisation as in Big Transfer."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - value.mean() if name == "kernel" else value


class Doubled(nn.Dense):
    """Ends up in Flax's own call."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


@pytest.mark.parametrize(
    "layer, shape, reason",
    [
        (ByHand(8), (2, 8), "no hook: ByHand.__call__ does not call Flax's"),
        (Centred(8, (3, 3)), (1, 4, 4, 8), "no hook: Centred has its own param"),
        (Doubled(8), (2, 8), ""),
    ],
    ids=["own call", "own param", "Flax's call"],
)
def test_a_subclass_is_sparse_where_it_calls_flax(layer, shape, reason):
    plan = nmjax.plan(layer, "2:4", jnp.ones(shape))
    assert plan["kernel"].reason == reason
    assert plan["kernel"].sparse == (not reason)


def test_a_missing_state_raises():
    variables, x = mlp_case()
    rules = [nmjax.Rule("head", None), nmjax.Rule(".*", nmjax.recipes.one_shot("2:4"))]
    with pytest.raises(ValueError, match="first/kernel.*one_shot.*init_state"):
        nmjax.sparsify(Mlp(), rules).apply(variables, x)


def test_a_state_of_another_plan_raises():
    variables, x = mlp_case()
    state = {"head": {"kernel": {"mask": jnp.ones((16, 5), bool)}}}
    with pytest.raises(ValueError, match="head/kernel"):
        nmjax.sparsify(Mlp(), RULES).apply({**variables, "nm": state}, x)


def test_a_sparse_model_inside_another_or_bound_raises():
    variables, x = mlp_case()

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x)

    sparse = nmjax.sparsify(Mlp(), RULES)
    with pytest.raises(ValueError, match="Sparsify the outer model"):
        Outer(sparse).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="bound"):
        sparse.bind(variables)


class Skips(nn.Module):
    """Runs the layers that its argument says, which jax does not see."""

    @nn.compact
    def __call__(self, x, runs):
        for i, run in enumerate(runs):
            x = nn.Dense(8, name=f"layer_{i}")(x) if run else x
        return x


@pytest.mark.parametrize("kind", [np.array, tuple])
def test_layers_that_an_earlier_call_skipped_are_sparse(kind):
    x = mlp_case()[1]
    both, first = kind([True, True]), kind([True, False])
    model = nmjax.sparsify(Skips(), "2:4")
    variables = model.init(jax.random.key(0), x, both)
    plan = nmjax.plan(Skips(), "2:4", x, both)
    assert len(plan.sparse) == 2
    baked = {"params": nmjax.bake(variables["params"], plan)}
    for runs in (first, both):
        out = model.apply(variables, x, runs)
        np.testing.assert_array_equal(out, Skips().apply(baked, x, runs))


def test_a_sparse_model_may_be_applied_by_another():
    """Its layer has the path of the outer model's, and another geometry."""
    x = mlp_case()[1]
    inner = nmjax.sparsify(nn.Sequential([nn.Einsum((8, 8), "bd,fd->bf")]), "2:4")
    weights = inner.init(jax.random.key(0), x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner.apply(weights, nn.Dense(8, name="layers_0")(x))

    model = Outer()
    variables = model.init(jax.random.key(1), x)
    (entry,) = nmjax.plan(model, "2:4", x).sparse
    assert (entry.path, entry.layer, entry.axes) == ("layers_0/kernel", "Dense", (-2,))
    baked = nmjax.bake(variables["params"], nmjax.plan(model, "2:4", x))
    out = nmjax.sparsify(model, "2:4").apply(variables, x)
    np.testing.assert_array_equal(out, model.apply({"params": baked}, x))


def test_no_tracer_is_left_over():
    variables, x = mlp_case()
    with jax.checking_leaks():
        assert len(nmjax.plan(Mlp(), RULES, x).sparse) == 2
        jax.jit(nmjax.sparsify(Mlp(), RULES).apply)(variables, x)


# Promise 3: one mask, also in bfloat16


@pytest.mark.slow
def test_bfloat16_layers_use_the_masks_of_the_float32_weights():
    variables, x = mlp_case()
    rng = np.random.default_rng(3)
    # Pairs that bfloat16 cannot tell apart: its masks would keep the lower index.
    pairs = 1 + np.tile([0.0, 1e-4, 2e-4, 3e-4], 2)[:, None] * rng.uniform(1, 2, 16)
    kernel = jnp.asarray(pairs, jnp.float32)
    params = variables["params"] | {
        "first": variables["params"]["first"] | {"kernel": kernel}
    }
    of_master = nmjax.magnitude_mask(kernel, "2:4")
    assert (of_master != nmjax.magnitude_mask(kernel.astype(jnp.bfloat16), "2:4")).any()
    plan = nmjax.plan(Mlp(), RULES, x)
    model = Mlp(dtype=jnp.bfloat16)
    outputs = nmjax.sparsify(model, RULES).apply({"params": params}, x)
    baked = nmjax.bake(params, plan)
    np.testing.assert_array_equal(baked["first"]["kernel"] != 0, of_master)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, model.apply({"params": baked}, x))
    grads = jax.grad(
        lambda p: nmjax.sparsify(model, RULES).apply({"params": p}, x).sum()
    )(params)
    assert grads["first"]["kernel"].dtype == jnp.float32


# Promise 4: None is the unwrapped model


def test_none_everywhere_is_the_dense_model_exactly():
    case = MODELS["linen_partitioned"]
    variables = case.variables()
    none = nmjax.sparsify(case.make(), [nmjax.Rule(".*", None)])
    np.testing.assert_array_equal(
        jax.jit(none.apply)(variables, *case.inputs()),
        jax.jit(case.make().apply)(variables, *case.inputs()),
    )


@pytest.mark.slow
def test_per_path_rules_survive_a_module_level_jit():
    case = MODELS["linen_transformer_jit"]
    dense, variables, inputs = case.make(), case.variables(), case.inputs()
    before = dense.apply(variables, *inputs)
    rules = [nmjax.Rule("block_0/.*", "2:4"), nmjax.Rule("block_1/.*", "1:4")]
    outputs = nmjax.sparsify(dense, rules).apply(variables, *inputs)
    plan = nmjax.plan(dense, rules, *inputs)
    baked = {"params": nmjax.bake(variables["params"], plan)}
    np.testing.assert_allclose(
        outputs, dense.apply(baked, *inputs), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(dense.apply(variables, *inputs), before)


@pytest.mark.slow
def test_vmap_over_parameters_and_examples():
    variables, x = mlp_case()
    sparse = nmjax.sparsify(Mlp(), RULES)
    stacked = jax.tree.map(lambda w: jnp.stack([w, -2 * w]), variables)
    outputs = jax.vmap(sparse.apply, in_axes=(0, None))(stacked, x)
    for i in range(2):
        one = sparse.apply(jax.tree.map(lambda w, i=i: w[i], stacked), x)
        np.testing.assert_allclose(outputs[i], one, rtol=1e-6, atol=1e-6)
    outputs = jax.vmap(sparse.apply, in_axes=(None, 0))(variables, x)
    np.testing.assert_allclose(outputs, sparse.apply(variables, x), rtol=1e-5)


def test_intermediates_and_mutable_collections_hold_plain_arrays():
    case = MODELS["linen_resnet"]
    variables = case.variables()
    sparse = nmjax.sparsify(case.make(), "2:4")
    run = functools.partial(sparse.apply, **case.train_kwargs)
    shapes = jax.eval_shape(
        functools.partial(run, mutable=True, capture_intermediates=True),
        variables,
        *case.inputs(),
    )
    _, mutated = shapes
    assert "nm" not in mutated
    assert jax.tree.structure(mutated["params"]) == jax.tree.structure(
        variables["params"]
    )
    assert "intermediates" in mutated


# Sharding


def loss(sparse, params, x):
    return jnp.mean(sparse.apply({"params": params}, x) ** 2)


@pytest.mark.parametrize("spec", [PartitionSpec("model"), PartitionSpec(None, "model")])
def test_sharded_weights_give_the_same_values_and_gradients(spec):
    variables, x = mlp_case()
    rules = [nmjax.Rule("head", None), nmjax.Rule(".*", "2:4")]
    sparse = nmjax.sparsify(Mlp(), rules)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    params = variables["params"]
    sharded = map_named(
        lambda path, w: jax.device_put(
            w, NamedSharding(mesh, spec if w.shape == (16, 16) else PartitionSpec())
        ),
        params,
    )
    run = jax.jit(jax.value_and_grad(functools.partial(loss, sparse)))
    value, gradient = run(params, x)
    sharded_value, sharded_gradient = run(
        sharded, jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    )
    np.testing.assert_allclose(value, sharded_value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradient,
        sharded_gradient,
    )


def test_explicit_mesh_axes_give_the_same_values_and_gradients():
    variables, x = mlp_case()
    run = jax.jit(
        jax.value_and_grad(functools.partial(loss, nmjax.sparsify(Mlp(), RULES)))
    )
    value, gradient = run(variables["params"], x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        replicated = jax.device_put(
            variables["params"], NamedSharding(mesh, PartitionSpec())
        )
        batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        sharded_value, sharded_gradient = run(replicated, batch)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        sharded_gradient,
        gradient,
    )


def test_a_sharding_that_cuts_groups_is_refused():
    variables, x = mlp_case()
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    params = map_named(
        lambda path, w: jax.device_put(w, sharding) if path == "first/kernel" else w,
        variables["params"],
    )
    message = "first/kernel: axis -2 of size 8 is sharded in parts of 2.*groups of 4"
    plan = nmjax.plan(Mlp(), RULES, x)
    with pytest.raises(nmjax.PlanError, match=message):
        nmjax.sparsify(Mlp(), RULES).apply({"params": params}, x)
    with pytest.raises(nmjax.PlanError, match=message):
        nmjax.prepare(params, plan)


@pytest.mark.parametrize(
    "recipe",
    [nmjax.recipes.ste, pytest.param(nmjax.recipes.frozen, marks=pytest.mark.slow)],
)
def test_data_parallel_shard_map_sums_wgrad_over_the_data_axis(recipe):
    variables, x = mlp_case()
    rules = [RULES[0], nmjax.Rule(".*", recipe("2:4"))]
    sparse, params = nmjax.sparsify(Mlp(), rules), variables["params"]
    other = jax.tree.map(lambda w: jnp.roll(w, 1), params)
    state = nmjax.init_state(other, nmjax.plan(Mlp(), rules, x))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def local_gradient(params, state, x):
        def loss(params):
            outputs = sparse.apply({"params": params, "nm": state}, x)
            return jnp.mean(outputs**2)

        return jax.grad(loss)(params)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    def gradient(params, state, x):
        local = local_gradient(params, state, x)
        return jax.tree.map(lambda g: g / 4, local)  # summed by the transpose

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradient(params, state, x),
        jax.jit(local_gradient)(params, state, x),
    )


# Decay: once for each use


@pytest.mark.slow
def test_a_layer_used_twice_decays_twice_in_the_op():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, use_bias=False, name="layer")
            return layer(jnp.tanh(layer(x)))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    params = Twice().init(jax.random.key(0), x)["params"]
    gradients = []
    for decay in (0.0, 0.1):
        sparse = nmjax.sparsify(Twice(), nmjax.recipes.sr_ste("2:4", decay=decay))
        gradients.append(
            jax.grad(lambda p, s=sparse: loss(s, p, x))(params)["layer"]["kernel"]
        )
    w = params["layer"]["kernel"]
    term = jnp.where(nmjax.magnitude_mask(w, "2:4"), 0, w)
    np.testing.assert_allclose(gradients[1] - gradients[0], 2 * 0.1 * term, atol=1e-6)


# Promise 6: traces


def test_equal_models_as_static_arguments_share_a_trace():
    variables, x = mlp_case()
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables, x):
        traces.append(0)
        return model.apply(variables, x)

    for _ in range(3):
        rules = [nmjax.Rule("head", None), nmjax.Rule(".*", "2:4")]
        run(nmjax.sparsify(Mlp(), rules), variables, x)
    assert len(traces) == 1


# The class


def test_densify_sparsify_pickle_and_equality():
    dense = MODELS["linen_image_decoder"].make()
    sparse = nmjax.sparsify(dense, RULES)
    assert isinstance(sparse, type(dense))
    assert repr(sparse) == repr(dense)
    assert nmjax.densify(sparse) == dense
    assert nmjax.densify(dense) is dense
    assert sparse == nmjax.sparsify(dense, list(RULES))
    assert sparse.clone() == sparse
    again = nmjax.sparsify(sparse, "1:4")
    assert again.nm_base is type(dense)
    assert again.nm_rules == (nmjax.Rule(".*", "1:4", ineligible="dense"),)
    assert pickle.loads(pickle.dumps(sparse)) == sparse


def test_metadata_boxes_of_the_users_own_stay():
    case = MODELS["linen_partitioned"]
    variables = case.make().init(jax.random.key(0), *case.inputs())
    params = variables["params"]
    boxes = [
        leaf
        for leaf in jax.tree.leaves(params, is_leaf=meta.is_axis_metadata)
        if meta.is_axis_metadata(leaf)
    ]
    assert boxes
    plan = nmjax.plan(case.make(), "2:4", *case.inputs())
    masked = nmjax.sparsify_params(params, plan)
    assert jax.tree.structure(masked) == jax.tree.structure(params)
    sparse = nmjax.sparsify(case.make(), "2:4")
    np.testing.assert_array_equal(
        sparse.apply(variables, *case.inputs()),
        case.make().apply({"params": masked}, *case.inputs()),
    )
    assert set(named_leaves(masked)) == set(named_leaves(params))


@pytest.mark.parametrize("model", [lambda x: x, {"w": 1}, 3])
def test_what_is_no_flax_module_is_refused(model):
    with pytest.raises(TypeError, match="plan_params"):
        nmjax.sparsify(model, "2:4")

"""The state and what is made of it: init_state, refresh, prepare, bake."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import Rule, plan_params, recipes
from tests import oracle


def weight(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def params(rng):
    return {
        "block1": {"conv1": {"kernel": weight(rng, 3, 3, 8, 4), "bias": jnp.ones(4)}},
        "frozen": {"kernel": weight(rng, 8, 4)},
        "head": {"kernel": weight(rng, 4, 3)},
        "slow": {"kernel": weight(rng, 12, 6)},
    }


RULES = [
    Rule("head", None),
    Rule("frozen", recipes.frozen("2:4")),
    Rule("slow", recipes.ste("1:4", refresh=3)),
    Rule(".*", "2:4"),
]
STATELESS = [Rule("head", None), Rule(".*", "2:4")]


def mask_of(w, n=2, m=4, axis=-2):
    return oracle.magnitude_mask(w, n, m, axis)


def scaled(params, factors):
    """Other weights, whose masks differ."""
    return jax.tree.map(
        lambda w: w * jnp.cos(jnp.arange(w.size) * factors).reshape(w.shape), params
    )


# init_state


def test_state_mirrors_the_parameters(params):
    state = nmjax.init_state(params, plan_params(params, RULES))
    assert set(state) == {"frozen", "slow"}
    assert set(state["frozen"]["kernel"]) == {"mask"}
    assert set(state["slow"]["kernel"]) == {"mask", "flip_rate"}
    mask = state["frozen"]["kernel"]["mask"]
    assert mask.dtype == jnp.bool_
    np.testing.assert_array_equal(mask, mask_of(params["frozen"]["kernel"]))
    mask = state["slow"]["kernel"]["mask"]
    np.testing.assert_array_equal(mask, mask_of(params["slow"]["kernel"], n=1))
    assert state["slow"]["kernel"]["flip_rate"] == 0


def test_state_is_empty_where_no_recipe_keeps_a_mask(params):
    assert nmjax.init_state(params, plan_params(params, STATELESS)) == {}
    assert nmjax.init_state(params, plan_params(params, [])) == {}


def test_axis_and_ragged_of_the_plan_are_followed(rng):
    params = {"a": weight(rng, 6, 4), "b": weight(rng, 4, 6)}
    rules = [
        Rule("a", recipes.frozen("2:4"), ragged="dense-tail"),
        Rule("b", recipes.frozen("2:4"), axis=-1, ragged="pad"),
    ]
    state = nmjax.init_state(params, plan_params(params, rules))
    expected = oracle.magnitude_mask(params["a"], 2, 4, -2, "dense-tail")
    np.testing.assert_array_equal(state["a"]["mask"], expected)
    expected = oracle.magnitude_mask(params["b"], 2, 4, -1, "pad")
    np.testing.assert_array_equal(state["b"]["mask"], expected)


# refresh


def test_refresh_follows_the_interval(params):
    plan = plan_params(params, RULES)
    old = nmjax.init_state(params, plan)
    params = scaled(params, 7.0)
    refresh = jax.jit(lambda state, step: nmjax.refresh(state, params, plan, step))
    new_mask = mask_of(params["slow"]["kernel"], n=1)
    old_mask = np.asarray(old["slow"]["kernel"]["mask"])
    changed = np.mean(new_mask != old_mask, dtype=np.float32)
    assert changed > 0
    for step in range(1, 8):
        state = refresh(old, step)
        assert jax.tree.structure(state) == jax.tree.structure(old)
        entry, due = state["slow"]["kernel"], step % 3 == 0
        np.testing.assert_array_equal(entry["mask"], new_mask if due else old_mask)
        assert entry["flip_rate"] == (changed if due else 0)
        np.testing.assert_array_equal(
            state["frozen"]["kernel"]["mask"], old["frozen"]["kernel"]["mask"]
        )


def test_flip_rate_stays_until_the_next_refresh(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    moved = scaled(params, 7.0)
    state = nmjax.refresh(state, moved, plan, 3)
    rate = state["slow"]["kernel"]["flip_rate"]
    assert rate > 0
    for step in (4, 5):
        state = nmjax.refresh(state, moved, plan, step)
        assert state["slow"]["kernel"]["flip_rate"] == rate
    state = nmjax.refresh(state, moved, plan, 6)
    assert state["slow"]["kernel"]["flip_rate"] == 0


def test_refresh_takes_a_traced_step_without_retracing(params):
    plan = plan_params(params, RULES)
    traces = []

    @jax.jit
    def refresh(state, params, step):
        traces.append(None)
        return nmjax.refresh(state, params, plan, step)

    state = nmjax.init_state(params, plan)
    for step in range(3):
        state = refresh(state, scaled(params, step + 1.0), jnp.int32(step))
    assert len(traces) == 1


def test_refresh_of_an_empty_state_is_empty(params):
    assert nmjax.refresh({}, params, plan_params(params, STATELESS), 1) == {}


# prepare, sparsify_params, bake


def test_prepare_has_the_mask_of_every_sparse_weight(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    moved = scaled(params, 7.0)
    nm = nmjax.prepare(moved, plan, state)
    assert set(nm) == {"block1", "frozen", "slow"}
    assert jax.tree.structure(nm["frozen"]) == jax.tree.structure(state["frozen"])
    for layer, expected in {
        ("block1", "conv1"): mask_of(moved["block1"]["conv1"]["kernel"]),
        ("frozen",): mask_of(params["frozen"]["kernel"]),
        ("slow",): mask_of(params["slow"]["kernel"], n=1),
    }.items():
        node = nm
        for key in layer:
            node = node[key]
        assert list(node["kernel"]) == ["mask"]
        np.testing.assert_array_equal(node["kernel"]["mask"], expected)


def test_bake_sets_dropped_weights_to_zero(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    baked = nmjax.bake(params, plan, state)
    assert jax.tree.structure(baked) == jax.tree.structure(params)
    np.testing.assert_array_equal(baked["head"]["kernel"], params["head"]["kernel"])
    conv = params["block1"]["conv1"]
    np.testing.assert_array_equal(baked["block1"]["conv1"]["bias"], conv["bias"])
    expected = oracle.masked(conv["kernel"], mask_of(conv["kernel"]))
    np.testing.assert_array_equal(baked["block1"]["conv1"]["kernel"], expected)
    slow = params["slow"]["kernel"]
    expected = oracle.masked(slow, mask_of(slow, n=1))
    np.testing.assert_array_equal(baked["slow"]["kernel"], expected)
    again = nmjax.bake(baked, plan, state)
    jax.tree.map(np.testing.assert_array_equal, again, baked)


def test_sparsify_params_gives_each_weight_the_gradient_of_its_recipe(rng):
    shape, decay = (8, 4), 2.0**-12
    params = {
        name: jnp.asarray(rng.integers(-64, 64, shape) / 16, jnp.float32)
        for name in ("op", "optimizer", "masked", "dense", "frozen")
    }
    plan = plan_params(
        params,
        [
            Rule("op", recipes.sr_ste("2:4", decay=decay)),
            Rule("optimizer", recipes.sr_ste("2:4", decay=1, decay_in="optimizer")),
            Rule("masked", recipes.one_shot("2:4")),
            Rule("frozen", recipes.frozen("2:4", decay=decay)),
        ],
    )
    state = nmjax.init_state(params, plan)
    state["frozen"]["mask"] = ~state["frozen"]["mask"]  # not what the weights say

    def loss(params):
        sparse = nmjax.sparsify_params(params, plan, state)
        return sum(jnp.sum(2 * w) for w in sparse.values())

    gradient = jax.jit(jax.grad(loss))(params)
    two = np.full(shape, 2, np.float32)
    masks = {name: mask_of(w) for name, w in params.items()}
    expected = {
        "op": oracle.sr_ste_gradient(two, params["op"], masks["op"], decay),
        "optimizer": two,
        "masked": oracle.masked(two, masks["masked"]),
        "dense": two,
        "frozen": oracle.sr_ste_gradient(
            two, params["frozen"], ~masks["frozen"], decay
        ),
    }
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)


def test_bake_passes_no_gradient(params):
    plan = plan_params(params, STATELESS)
    total = lambda tree: sum(map(jnp.sum, jax.tree.leaves(tree)))  # noqa: E731
    gradient = jax.grad(lambda params: total(nmjax.bake(params, plan)))(params)
    assert not gradient["frozen"]["kernel"].any()


def test_any_pytree_of_parameters(rng):
    params = [weight(rng, 8, 4), (weight(rng, 3, 5), np.ones((4, 4), np.float32))]
    plan = plan_params(params, [Rule("0", recipes.frozen("2:4")), Rule("1/1", "2:4")])
    state = nmjax.init_state(params, plan)
    sparse = nmjax.sparsify_params(params, plan, state)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    expected = oracle.masked(params[0], mask_of(params[0]))
    np.testing.assert_array_equal(sparse[0], expected)
    np.testing.assert_array_equal(sparse[1][0], params[1][0])
    np.testing.assert_array_equal(sparse[1][1].sum(0), [2, 2, 2, 2])


def test_metadata_boxes_stay_around_the_parameters(rng):
    w = weight(rng, 8, 4)
    params = {"layer": {"kernel": nn.Partitioned(w, names=(None, "model"))}}
    plan = plan_params(params, [Rule(".*", recipes.frozen("2:4"))])
    state = nmjax.init_state(params, plan)
    np.testing.assert_array_equal(state["layer"]["kernel"]["mask"], mask_of(w))
    sparse = nmjax.sparsify_params(params, plan, state)["layer"]["kernel"]
    assert isinstance(sparse, nn.Partitioned)
    assert sparse.names == (None, "model")
    np.testing.assert_array_equal(sparse.value, oracle.masked(w, mask_of(w)))
    assert nmjax.prepare(params, plan, state)["layer"]["kernel"]["mask"].dtype == bool
    assert nmjax.refresh(state, params, plan, 1)["layer"]["kernel"]["mask"].any()


def test_all_of_it_runs_under_jit_and_abstractly(params):
    plan = plan_params(params, RULES)

    def run(params):
        state = nmjax.init_state(params, plan)
        state = nmjax.refresh(state, params, plan, 3)
        return (
            state,
            nmjax.prepare(params, plan, state),
            nmjax.bake(params, plan, state),
        )

    compiled, eager = jax.jit(run)(params), run(params)
    jax.tree.map(np.testing.assert_array_equal, compiled, eager)
    abstract = jax.eval_shape(run, params)
    assert jax.tree.map(describe, abstract) == jax.tree.map(describe, eager)


def describe(array):
    return str((array.shape, array.dtype))


# Prepared masks are the recomputed ones


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        return nn.Dense(4, name="dense", dtype=jnp.bfloat16)(x.mean((1, 2)))


RECIPES = [
    recipes.sr_ste("2:4", decay=0.1),
    recipes.one_shot("2:4"),
    recipes.ste("2:4", refresh=2),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_prepared_masks_give_the_same_bits(rng, recipe):
    x = weight(rng, 2, 5, 5, 4)
    rules = [Rule(".*", recipe)]
    model = nmjax.sparsify(Net(), rules)
    params = model.init(jax.random.key(0), x)["params"]
    plan = nmjax.plan(model, rules, x)
    state = nmjax.init_state(params, plan)
    traces = []

    @jax.jit
    def run(params, nm):
        traces.append(None)

        def loss(params):
            y = model.apply({"params": params, "nm": nm}, x)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        return jax.grad(loss, has_aux=True)(params)

    moved = scaled(params, 3.0)
    recomputed, prepared = (
        run(moved, state),
        run(moved, nmjax.prepare(moved, plan, state)),
    )
    jax.tree.map(np.testing.assert_array_equal, recomputed, prepared)

    before = len(traces)  # other masks of the same form
    other = jax.tree.map(jnp.logical_not, nmjax.prepare(moved, plan, state))
    changed = run(moved, other)
    assert len(traces) == before
    assert (changed[1] != prepared[1]).any()


class Coder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        return self.decoder(nn.relu(self.encoder(x)))

    def encode(self, x):
        return self.encoder(x)


def test_a_method_that_uses_a_part_takes_the_whole_state(rng):
    x, rules = weight(rng, 2, 8), [Rule(".*", recipes.frozen("2:4"))]
    model = nmjax.sparsify(Coder(), rules)
    params = model.init(jax.random.key(0), x)["params"]
    state = nmjax.init_state(params, nmjax.plan(model, rules, x))
    y = model.apply({"params": params, "nm": state}, x, method="encode")
    kernel = params["encoder"]["kernel"]
    expected = np.asarray(x) @ oracle.masked(kernel, mask_of(kernel))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


# Errors


def test_parameters_that_are_not_those_of_the_plan(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    lacking = {name: tree for name, tree in params.items() if name != "slow"}
    other = {**params, "slow": {"kernel": jnp.ones((12, 7))}}
    for function in (
        lambda params: nmjax.init_state(params, plan),
        lambda params: nmjax.refresh(state, params, plan, 1),
        lambda params: nmjax.prepare(params, plan, state),
        lambda params: nmjax.sparsify_params(params, plan, state),
        lambda params: nmjax.bake(params, plan, state),
    ):
        with pytest.raises(ValueError, match="plan has slow/kernel, the parameters do"):
            function(lacking)
        with pytest.raises(ValueError, match=r"slow/kernel.*\(12, 6\).*\(12, 7\)"):
            function(other)
        with pytest.raises(ValueError, match="plan has"):
            function({"params": params})


def test_abstract_parameters_are_refused_outside_a_trace(params):
    abstract = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="is abstract, .* inside jax.eval_shape"):
        nmjax.init_state(abstract, plan_params(abstract, RULES))


def test_a_state_that_lacks_a_mask_is_refused(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    lacking = {"frozen": state["frozen"]}
    for function in (
        lambda state: nmjax.refresh(state, params, plan, 1),
        lambda state: nmjax.prepare(params, plan, state),
        lambda state: nmjax.sparsify_params(params, plan, state),
        lambda state: nmjax.bake(params, plan, state),
    ):
        with pytest.raises(ValueError, match="slow/kernel.*init_state"):
            function(lacking)
        with pytest.raises(ValueError, match="frozen/kernel.*init_state"):
            function({})


def with_mask(state, mask):
    return {**state, "frozen": {"kernel": {"mask": mask}}}


def test_a_state_of_another_model_is_refused(params):
    plan = plan_params(params, RULES)
    state = nmjax.init_state(params, plan)
    mask = state["frozen"]["kernel"]["mask"]
    for function in (
        lambda state: nmjax.refresh(state, params, plan, 1),
        lambda state: nmjax.prepare(params, plan, state),
        lambda state: nmjax.sparsify_params(params, plan, state),
    ):
        with pytest.raises(
            ValueError, match=r"\['head/kernel'\].*does not make sparse"
        ):
            function({**state, "head": {"kernel": {"mask": jnp.ones((4, 3), bool)}}})
        with pytest.raises(ValueError, match=r"entries for \['block1/conv1'\]"):
            function({**state, "block1": {"conv1": {"kernel": mask}}})
        with pytest.raises(ValueError, match=r"frozen/kernel.*\(4, 8\).*\(8, 4\)"):
            function(with_mask(state, mask.T))
        with pytest.raises(ValueError, match="frozen/kernel.*float32, not bool"):
            function(with_mask(state, mask.astype(jnp.float32)))


def test_a_state_of_another_phase_is_refused(params):
    """Where the paths agree: masks freeze, say, and the state is the earlier one."""

    def plan_of(recipe):
        return plan_params(params, [Rule("head", None), Rule(".*", recipe)])

    slow, soft = plan_of(recipes.ste("2:4", refresh=3)), plan_of(recipes.s_ste("2:4"))
    frozen = plan_of(recipes.frozen("2:4"))
    for plan, before in ((frozen, slow), (frozen, soft), (soft, slow)):
        state = nmjax.init_state(params, before)
        with pytest.raises(ValueError, match="block1.*of another recipe or phase"):
            nmjax.sparsify_params(params, plan, state)
        state = nmjax.next_state(params, plan, state, before)
        nmjax.sparsify_params(params, plan, state)


def test_prepared_masks_cannot_be_refreshed(params):
    plan = plan_params(params, RULES)
    nm = nmjax.prepare(params, plan, nmjax.init_state(params, plan))
    with pytest.raises(ValueError, match="slow/kernel.*not from prepare"):
        nmjax.refresh(nm, params, plan, 1)


def test_a_sharding_that_cuts_groups_is_refused():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((8, 4))}
    plan = plan_params(params, [Rule("w", "2:4")])
    sharding = NamedSharding(mesh, P("model"))
    params = {"w": jax.device_put(params["w"], sharding)}
    for function in (nmjax.prepare, nmjax.sparsify_params, nmjax.bake):
        with pytest.raises(nmjax.PlanError, match="w: .*cuts groups of 4"):
            function(params, plan)


def test_sharded_weights_have_sharded_masks(rng):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    w = weight(rng, 16, 8)
    plan = plan_params({"w": w}, [Rule("w", recipes.frozen("2:4"))])
    for spec in (P("model", None), P(None, "model")):
        with jax.set_mesh(mesh):
            params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
            state = jax.jit(lambda params: nmjax.init_state(params, plan))(params)
            baked = jax.jit(lambda p, s: nmjax.bake(p, plan, s))(params, state)
        assert state["w"]["mask"].sharding.spec == spec
        np.testing.assert_array_equal(state["w"]["mask"], mask_of(w))
        np.testing.assert_array_equal(baked["w"], oracle.masked(w, mask_of(w)))


@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_have_sharded_logits(rng, axis_type, spec):
    """Which would be larger than the weights, on every device."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,))
    w = weight(rng, 16, 8)
    plan = plan_params({"w": w}, [Rule("w", recipes.learned("2:4"))])
    state, key = nmjax.init_state({"w": w}, plan), jax.random.key(0)

    def loss(logits, w):
        options = {"logits": logits, "key": key}
        return (nmjax.sparsify_params({"w": w}, plan, state, **options)["w"] ** 2).sum()

    alone = nmjax.init_logits({"w": w}, plan)
    with jax.set_mesh(mesh):
        cut = jax.device_put(w, NamedSharding(mesh, spec))
        logits = nmjax.init_logits({"w": cut}, plan)
        assert logits["w"].sharding.spec == P(spec[0], None, spec[1])
        baked = nmjax.bake({"w": cut}, plan, state, logits=logits)
        gradient = jax.jit(jax.grad(loss))(logits, cut)
        if axis_type == AxisType.Explicit:
            init = jax.jit(lambda w: nmjax.init_logits({"w": w}, plan))
            assert init(cut)["w"].sharding.spec == P(spec[0], None, spec[1])
    expected = nmjax.bake({"w": w}, plan, state, logits=alone)
    np.testing.assert_array_equal(baked["w"], expected["w"])
    np.testing.assert_allclose(gradient["w"], jax.grad(loss)(alone, w)["w"], 1e-5, 1e-6)


def test_logits_that_are_made_under_jit_without_a_mesh(rng):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(weight(rng, 16, 8), NamedSharding(mesh, P("model")))
    plan = plan_params({"w": w}, [Rule("w", recipes.learned("2:4"))])
    logits = jax.jit(lambda w: nmjax.init_logits({"w": w}, plan))(w)
    assert logits["w"].shape == (4, 6, 8)


def test_what_nobody_differentiates_needs_no_random_bits(rng):
    """A pass without noise beside the one that trains: a teacher, a metric."""
    w = weight(rng, 16, 8)
    plan = plan_params({"w": w}, [Rule("w", recipes.learned("2:4"))])
    state, logits = (
        make({"w": w}, plan) for make in (nmjax.init_state, nmjax.init_logits)
    )

    def loss(logits, watch):
        masked = functools.partial(nmjax.sparsify_params, {"w": w}, plan, state)
        noisy = masked(logits=logits, key=jax.random.key(0))["w"]
        quiet = masked(logits=logits)["w"]
        watched = quiet if watch else jax.lax.stop_gradient(quiet)
        return (noisy**2).sum() + (watched**2).sum(), quiet.sum()

    for transform in (functools.partial, jax.checkpoint):
        quietly = transform(functools.partial(loss, watch=False))
        found, _ = jax.jit(jax.grad(quietly, has_aux=True))(logits)
        assert np.abs(found["w"]).max() > 0
    with pytest.raises(ValueError, match="training needs random bits"):
        jax.grad(functools.partial(loss, watch=True), has_aux=True)(logits)

"""λ(1 − E)W as a gradient transformation: once for each optimizer step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import Rule, plan_params, recipes
from tests import oracle

DECAY = 0.25


def dyadic(rng, *shape):
    return jnp.asarray(rng.integers(-64, 64, shape) / 16, jnp.float32)


def plan_of(params, decay=DECAY, decay_in="optimizer", **options):
    recipe = recipes.sr_ste("2:4", decay=decay, decay_in=decay_in, **options)
    return plan_params(params, [Rule(".*", recipe)])


def mask_of(w):
    return oracle.magnitude_mask(w, 2, 4)


# The term


def test_the_term_by_hand():
    params = {"w": jnp.asarray([[1.0], [-3.0], [2.0], [-0.5]]), "b": jnp.ones((1,))}
    tx = nmjax.add_decay(plan_of(params, decay=0.5))
    gradient = {"w": jnp.asarray([[10.0], [20.0], [30.0], [40.0]]), "b": jnp.ones((1,))}
    updates, state = tx.update(gradient, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], [[10.5], [20], [30], [39.75]])
    np.testing.assert_array_equal(updates["b"], [1])
    assert state.count == 1


def test_only_weights_whose_recipe_says_so(rng):
    params = {name: dyadic(rng, 8, 4) for name in ("op", "optimizer", "ste", "dense")}
    plan = plan_params(
        params,
        [
            Rule("op", recipes.sr_ste("2:4", decay=DECAY)),
            Rule("optimizer", recipes.sr_ste("2:4", decay=DECAY, decay_in="optimizer")),
            Rule("ste", recipes.ste("2:4")),
        ],
    )
    tx = nmjax.add_decay(plan)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    w = params["optimizer"]
    expected = oracle.sr_ste_gradient(zeros["optimizer"], w, mask_of(w), DECAY)
    np.testing.assert_array_equal(updates.pop("optimizer"), expected)
    assert not any(map(jnp.any, updates.values()))


def test_a_number_replaces_the_recipes_own(rng):
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params), decay=2.0)
    updates, _ = tx.update({"w": jnp.zeros((8, 4))}, tx.init(params), params)
    expected = 2 * oracle.masked(params["w"], ~mask_of(params["w"]))
    np.testing.assert_array_equal(updates["w"], expected)


def test_a_number_may_change_while_training(rng):
    params = {"w": dyadic(rng, 8, 4)}
    make = optax.inject_hyperparams(nmjax.add_decay, static_args=("plan",))
    tx = make(plan_of(params), decay=2.0)
    update, state = jax.jit(tx.update), tx.init(params)
    dropped = oracle.masked(params["w"], ~mask_of(params["w"]))
    for decay in (2.0, 0.5, 0.0):
        state.hyperparams["decay"] = jnp.asarray(decay)
        updates, state = update({"w": jnp.zeros((8, 4))}, state, params)
        np.testing.assert_array_equal(updates["w"], decay * dropped)


def test_a_schedule_sees_the_number_of_updates(rng):
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params), decay=lambda count: 2.0**count)
    dropped = oracle.masked(params["w"], ~mask_of(params["w"]))
    update, state = jax.jit(tx.update), tx.init(params)
    for count in range(4):
        updates, state = update({"w": jnp.zeros((8, 4))}, state, params)
        np.testing.assert_array_equal(updates["w"], 2.0**count * dropped)


@pytest.mark.parametrize(
    "decay, message",
    [
        (-1.0, "finite and at least 0, got -1.0"),
        (float("nan"), "finite and at least 0, got nan"),
        (nmjax.Schedule(), "a function of the count of updates, got Schedule"),
        ("2e-4", "a number, a scalar or a function"),
    ],
)
def test_what_is_no_decay_is_refused(decay, message):
    with pytest.raises(ValueError, match=message):
        nmjax.add_decay(nmjax.Plan(()), decay)


def test_without_decay_the_gradient_is_untouched():
    """Bit for bit, also where a dropped weight is infinite, and without `nm`."""
    params = {"w": jnp.asarray([[1.0], [2.0], [jnp.nan], [0.0]])}
    gradient = {"w": jnp.asarray([[-0.0], [1.0], [-0.0], [-0.0]])}
    for recipe in (
        recipes.sr_ste("2:4", decay=0, decay_in="optimizer"),
        recipes.frozen("2:4", decay_in="optimizer"),
    ):
        tx = nmjax.add_decay(plan_params(params, [Rule("w", recipe)]))
        updates, _ = tx.update(gradient, tx.init(params), params)
        np.testing.assert_array_equal(updates["w"], gradient["w"])
        assert np.signbit(updates["w"]).tolist() == np.signbit(gradient["w"]).tolist()


def test_dtype_of_the_gradient_is_kept(rng):
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params))
    gradient = {"w": jnp.zeros((8, 4), jnp.bfloat16)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_metadata_boxes_stay(rng):
    w = dyadic(rng, 8, 4)
    params = {"w": nn.Partitioned(w, names=(None, "model"))}
    tx = nmjax.add_decay(plan_of(params))
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    assert updates["w"].names == (None, "model")
    expected = DECAY * oracle.masked(w, ~mask_of(w))
    np.testing.assert_array_equal(updates["w"].value, expected)


# Equal to the decay of the op

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
}


def thirty_steps(params, loss_of, tx, data):
    """Final parameters; `loss_of(params, x)` differs in who adds the decay."""

    @jax.jit
    def step(params, state, x):
        gradient = jax.grad(loss_of)(params, x)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x in data:
        params, state = step(params, state, x)
    return params


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_thirty_steps_equal_those_of_the_op(rng, optimizer):
    params = {
        "a": jnp.asarray(rng.standard_normal((16, 16)) / 4, jnp.float32),
        "b": jnp.asarray(rng.standard_normal((16, 4)) / 4, jnp.float32),
    }
    data = jnp.asarray(rng.standard_normal((30, 8, 16)), jnp.float32)

    def run(decay, decay_in):
        plan = plan_of(params, decay, decay_in)

        def loss(params, x):
            w = nmjax.sparsify_params(params, plan)
            return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - x[:, :4]) ** 2)

        tx = optax.chain(nmjax.add_decay(plan), OPTIMIZERS[optimizer]())
        return thirty_steps(params, loss, tx, data)

    op, transformation = run(0.05, "op"), run(0.05, "optimizer")
    without = run(0.0, "op")
    for name in params:
        np.testing.assert_allclose(transformation[name], op[name], rtol=0, atol=1e-6)
        assert np.abs(without[name] - op[name]).max() > 1e-3


def test_the_same_on_four_devices_and_with_a_scaled_loss(rng):
    """What the op cannot promise: sums over devices and loss scales scale its term."""
    params = {"w": dyadic(rng, 8, 4)}
    x = jnp.asarray(rng.integers(-4, 5, (8, 8)), jnp.float32)
    plan = plan_of(params)
    tx = optax.chain(nmjax.add_decay(plan), optax.sgd(1.0))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def gradient(params, x, scale):
        def loss(params):
            return scale * jnp.sum(x @ nmjax.sparsify_params(params, plan)["w"]) / 8

        return jax.tree.map(lambda g: g / scale, jax.grad(loss)(params))

    summed = jax.shard_map(
        lambda params, x: gradient(params, x, 1024.0),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    results = [
        tx.update(gradients, tx.init(params), params)[0]["w"]
        for gradients in (
            gradient(params, x, 1.0),
            gradient(params, x, 1024.0),
            jax.jit(summed)(params, x),
            jax.tree.map(
                lambda *g: sum(g),
                *(gradient(params, x[i : i + 2], 1.0) for i in (0, 2, 4, 6)),
            ),
        )
    ]
    w, g = np.asarray(params["w"]), np.asarray(x).sum(0)[:, None] / 8
    expected = -oracle.sr_ste_gradient(np.broadcast_to(g, (8, 4)), w, mask_of(w), DECAY)
    for result in results:
        np.testing.assert_array_equal(result, expected)


# In a chain


def test_before_clipping_and_moments(rng):
    """The order of the chain is the order of the terms, by hand."""
    params = {"w": dyadic(rng, 8, 4)}
    gradient = {"w": dyadic(rng, 8, 4)}
    term = DECAY * oracle.masked(params["w"], ~mask_of(params["w"]))
    clip = optax.clip(1.0)
    before = optax.chain(nmjax.add_decay(plan_of(params)), clip, optax.sgd(0.5))
    updates, _ = before.update(gradient, before.init(params), params)
    expected = -0.5 * np.clip(np.asarray(gradient["w"]) + term, -1, 1)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    after = optax.chain(clip, nmjax.add_decay(plan_of(params)), optax.sgd(0.5))
    updates, _ = after.update(gradient, after.init(params), params)
    expected = -0.5 * (np.clip(np.asarray(gradient["w"]), -1, 1) + term)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_kept_mask_comes_in_as_nm(rng, prepared):
    params = {"w": dyadic(rng, 8, 4)}
    plan = plan_params(
        params, [Rule("w", recipes.frozen("2:4", decay=DECAY, decay_in="optimizer"))]
    )
    nm = nmjax.init_state(params, plan)
    moved = {"w": dyadic(rng, 8, 4)}
    if prepared:
        nm = nmjax.prepare(moved, plan, nm)
    tx = optax.chain(nmjax.add_decay(plan), optax.sgd(1.0))
    update = jax.jit(lambda g, s, p, nm: tx.update(g, s, p, nm=nm))
    updates, _ = update({"w": jnp.zeros((8, 4))}, tx.init(moved), moved, nm)
    expected = -DECAY * oracle.masked(moved["w"], ~mask_of(params["w"]))
    np.testing.assert_array_equal(updates["w"], expected)


def test_prepared_masks_are_used_as_given(rng):
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params))
    nm = {"w": {"mask": jnp.zeros((8, 4), bool)}}
    updates, _ = tx.update({"w": jnp.zeros((8, 4))}, tx.init(params), params, nm=nm)
    np.testing.assert_array_equal(updates["w"], DECAY * params["w"])


def test_part_of_the_parameters(rng):
    """As optax.multi_transform calls it: the other leaves are absent."""
    params = {"a": dyadic(rng, 8, 4), "b": dyadic(rng, 8, 4)}
    plan = plan_of(params)
    tx = optax.multi_transform(
        {"train": nmjax.add_decay(plan), "freeze": optax.set_to_zero()},
        {"a": "train", "b": "freeze"},
    )
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    expected = DECAY * oracle.masked(params["a"], ~mask_of(params["a"]))
    np.testing.assert_array_equal(updates["a"], expected)
    assert not updates["b"].any()


# Errors


def test_the_parameters_are_needed(rng):
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params))
    with pytest.raises(ValueError, match=r"tx.update\(g, s, params\)"):
        tx.update(params, tx.init(params))


def test_parameters_of_another_plan_are_refused(rng):
    """Such as the variables around them: nothing would be decayed."""
    params = {"w": dyadic(rng, 8, 4)}
    tx = nmjax.add_decay(plan_of(params))
    variables = {"params": params}
    with pytest.raises(ValueError, match=r"\['w'\], is among .*'params/w'"):
        tx.update(variables, tx.init(variables), variables)


def test_a_kept_mask_is_needed(rng):
    params = {"w": dyadic(rng, 8, 4)}
    plan = plan_of(params, refresh=2)
    tx = nmjax.add_decay(plan)
    in_optax, in_nnx = r"update\(g, s, params, nm=", r"update\(model, g, nm=nmjax.nnx"
    with pytest.raises(ValueError, match=f"w: .*{in_optax}.*init_state.*{in_nnx}"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="does not make sparse"):
        nm = {"v": {"mask": jnp.ones((8, 4), bool)}}
        tx.update(params, tx.init(params), params, nm=nm)


# The rule that picks λ


def test_the_least_decay_in_the_range_is_picked():
    rates = {1e-3: 0.005, 2e-4: 0.0093, 6e-5: 0.0097, 6e-4: 0.007}
    assert nmjax.choose_decay(0.01, rates) == 2e-4
    assert nmjax.choose_decay(0.01, rates, high=0.75) == 6e-4


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({1e-4: 0.02, 1e-5: 0.03}, "try some above 0.0001"),
        ({1e-2: 0.001}, "try some below 0.01"),
        ({1e-3: 0.02, 1e-2: 0.001}, "above 0.001 and below 0.01"),
        ({}, "expected finite flip rates"),
        ({1e-3: float("nan")}, "expected finite flip rates"),
    ],
)
def test_rates_that_decide_nothing_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        nmjax.choose_decay(0.01, rates)
    with pytest.raises(ValueError, match="dense flip rate must be above 0, got 0"):
        nmjax.choose_decay(0, {1e-3: 0.01})


def test_masked_decay_of_2by4_reads_the_stored_transposable_mask():
    rng = np.random.default_rng(0)
    params = {"kernel": dyadic(rng, 8, 8)}
    recipe = recipes.two_by_four(decay=DECAY)
    weight = dataclasses.replace(recipe, wgrad=None)  # a bare parameter has no GEMM
    plan = plan_params(params, [Rule(".*", weight)])
    state = nmjax.init_state(dyadic_tree(rng), plan)  # masks of other weights
    tx = nmjax.add_decay(plan)
    gradient = {"kernel": dyadic(rng, 8, 8)}
    update, _ = tx.update(gradient, tx.init(params), params, nm=state)
    mask, w = np.asarray(state["kernel"]["mask"]), np.asarray(params["kernel"])
    expected = np.asarray(gradient["kernel"]) + DECAY * np.where(mask, 0, w)
    np.testing.assert_array_equal(update["kernel"], expected)
    assert (mask.reshape(2, 4, 8).sum(1) == 2).all()
    assert (mask.reshape(8, 2, 4).sum(2) == 2).all()


def dyadic_tree(rng):
    return {"kernel": dyadic(rng, 8, 8)}


def test_an_nnx_optimizer_takes_the_state_of_its_model():
    layer = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    rules = [Rule(".*", recipes.two_by_four(decay=DECAY))]
    model, plan = nmjax.sparsify(layer, rules), nmjax.plan(layer, rules)
    tx = optax.chain(nmjax.add_decay(plan), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"nm=nmjax.nnx.state\(model\)"):
        optimizer.update(model, zeros)
    w, mask = np.asarray(model.kernel[...]), np.asarray(model.nm_mask[...])
    optimizer.update(model, zeros, nm=nmjax.nnx.state(model))
    expected = np.where(mask, w, w - np.float32(DECAY) * w)
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-6)

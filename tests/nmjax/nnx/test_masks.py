"""Masks that outlive a step, and one's own training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import recipes
from tests import oracle
from tests.nmjax.nnx.common import (
    DECAY,
    FROZEN,
    SR_STE,
    assert_close,
    baked,
    build,
    drawn,
    expected_gradients,
    values,
    whatever_can_be,
)


def pair():
    """Two layers."""
    rngs = nnx.Rngs(0)
    return nnx.Dict(
        a=nnx.Linear(8, 4, kernel_init=drawn, rngs=rngs),
        b=nnx.Linear(8, 4, kernel_init=drawn, rngs=rngs),
    )


def test_masks_stay_until_refreshed():
    model, _ = build("nnx_transformer_scan")
    rules = whatever_can_be(recipes.ste("2:4", refresh=3))
    plan, sparse = nmjax.plan(model, rules), nmjax.sparsify(model, rules)
    refresh = nnx.jit(lambda model, step: nmjax.nnx.refresh(model, plan, step))
    first = expected = nmjax.init_state(nmjax.nnx.params(model), plan)
    expect = jax.jit(lambda state, p, step: nmjax.refresh(state, p, plan, step))
    jax.tree.map(np.testing.assert_array_equal, nmjax.nnx.state(sparse), expected)
    for step in range(1, 5):
        params = jax.tree.map(lambda w: np.flip(w, 0), nmjax.nnx.params(sparse))
        nnx.update(sparse, params)
        refresh(sparse, jnp.asarray(step))
        expected = expect(expected, params, step)
        now = nmjax.nnx.state(sparse)
        jax.tree.map(np.testing.assert_array_equal, now, expected)
        flips = nmjax.metrics.flip_rate(first, now)
        assert (flips["total"] > 0) == (step >= 3)
    stored = now["blocks"]["up"]["kernel"]["flip_rate"]
    assert stored.shape == (2, 1, 1)  # one for each stacked layer
    np.testing.assert_allclose(stored.mean(), flips["blocks/up/kernel"], rtol=1e-6)
    assert (stored > 0).all()


def test_frozen_end_to_end():
    model, x = build("nnx_mixer")
    rules = whatever_can_be(recipes.frozen("2:4"))
    sparse, plan = nmjax.sparsify(model, rules), nmjax.plan(model, rules)
    masks = nmjax.nnx.state(sparse)
    optimizer = nnx.Optimizer(sparse, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss = lambda model: jnp.mean(jnp.square(model(x) - 1))  # noqa: E731
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [train_step(sparse, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, nmjax.nnx.state(sparse), masks)
    params = nmjax.nnx.params(sparse)
    nmjax.check(params, plan, masks)
    with pytest.raises(nmjax.CheckError):  # magnitudes have moved on
        nmjax.check(params, nmjax.plan(model, "2:4"), masks)
    dense = baked(sparse, plan, masks)
    np.testing.assert_array_equal(sparse(x), dense(x))


def test_a_layer_with_the_same_recipe_keeps_its_mask():
    model = nmjax.sparsify(pair(), [nmjax.Rule("a", FROZEN), nmjax.Rule("b", None)])
    before = model.a.nm_mask[...]
    for layer in (model.a, model.b):
        layer.kernel[...] = layer.kernel[...][::-1]
    sparse = nmjax.sparsify(model, [nmjax.Rule("a|b", FROZEN)])
    chosen = nmjax.magnitude_mask(model.b.kernel[...], "2:4")
    np.testing.assert_array_equal(sparse.a.nm_mask[...], before)
    np.testing.assert_array_equal(sparse.b.nm_mask[...], chosen)
    assert (before != chosen).any()


def test_another_recipe_chooses_another_mask():
    model = nmjax.sparsify(pair(), whatever_can_be(FROZEN))
    before = model.a.nm_mask[...]
    model.a.kernel[...] = model.a.kernel[...][::-1]
    other = nmjax.sparsify(model, whatever_can_be(recipes.one_shot("2:4")))
    chosen = nmjax.magnitude_mask(model.a.kernel[...], "2:4")
    np.testing.assert_array_equal(other.a.nm_mask[...], chosen)
    np.testing.assert_array_equal(model.a.nm_mask[...], before)  # its own


def test_a_lost_mask_is_an_error_with_a_way_out():
    model, x = build("nnx_mixer")
    rules = whatever_can_be(FROZEN)
    sparse, plan = nmjax.sparsify(model, rules), nmjax.plan(model, rules)
    expected = sparse(x)
    nnx.pop(sparse, nmjax.nnx.NMMask)
    message = "'frozen' keeps its mask in the state and none.*nmjax.nnx.set_state"
    for use in (lambda: sparse(x), lambda: nmjax.nnx.state(sparse)):
        with pytest.raises(ValueError, match=message):
            use()
    state = nmjax.init_state(nmjax.nnx.params(sparse), plan)
    nmjax.nnx.set_state(sparse, state)
    np.testing.assert_array_equal(sparse(x), expected)


def sparse_layer(recipe, seed):
    rules = whatever_can_be(recipe)
    layer = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(seed))
    return nmjax.sparsify(layer, rules), nmjax.plan(layer, rules)


def average(a, b):
    return 0.9 * a + 0.1 * b


@pytest.mark.parametrize(
    "recipe, change, message",
    [
        (FROZEN, average, "kernel: its mask is float32, not bool"),
        (FROZEN, lambda a, _: a.astype(jnp.bfloat16), "its mask is bfloat16"),
        (recipes.bi_mask("2:4"), average, "its output_order is float32, not an int"),
    ],
    ids=["average", "cast", "order"],
)
def test_a_state_averaged_as_a_whole_is_refused(recipe, change, message):
    """Linen refuses it too: an average of masks keeps more than n of m."""
    (ema, plan), (model, _) = sparse_layer(recipe, 0), sparse_layer(recipe, 1)
    before = nmjax.nnx.state(ema)
    changed = jax.tree.map(change, nnx.state(ema), nnx.state(model))
    nnx.update(ema, changed)
    for use in (
        lambda: ema(values(2, 8)),
        lambda: nnx.jit(lambda model: model(values(2, 8)))(ema),
        lambda: nmjax.nnx.state(ema),
        lambda: nmjax.nnx.refresh(ema, plan, 2),
    ):
        with pytest.raises(ValueError, match=f"{message}.*nnx.Param.*set_state"):
            use()
    with pytest.raises(ValueError, match=message):
        nmjax.nnx.set_state(model, jax.tree.map(change, before, before))
    nmjax.nnx.set_state(ema, before)  # the way out
    assert ema(values(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("name", ["mask", "mask_dgrad"])
def test_either_mask_must_be_bool(name):
    model, _ = sparse_layer(recipes.bi_mask("2:4", refresh=2), 0)
    variable = getattr(model, f"nm_{name}")
    variable.set_value(variable[...].astype(jnp.float32))
    with pytest.raises(ValueError, match=f"its {name} is float32, not bool"):
        model(values(2, 8))


@pytest.mark.parametrize(
    "recipe", [FROZEN, recipes.transposable("2:4"), SR_STE], ids=lambda r: r.name
)
def test_an_average_of_the_weights_with_the_masks_of_the_model(recipe):
    (ema, plan), (model, _) = sparse_layer(recipe, 0), sparse_layer(recipe, 1)
    weights = jax.tree.map(average, *(nnx.state(m, nnx.Param) for m in (ema, model)))
    nnx.update(ema, weights)
    nmjax.nnx.set_state(ema, nmjax.nnx.state(model))
    state = nmjax.nnx.state(ema)
    nmjax.check(nmjax.nnx.params(ema), plan, state)
    expected = nmjax.bake({"kernel": weights["kernel"][...]}, plan, state)
    np.testing.assert_allclose(ema(jnp.eye(8)), expected["kernel"])


def test_set_state_refuses_what_is_not_of_the_model():
    model = pair()
    rules = [nmjax.Rule("a", FROZEN), nmjax.Rule("b", "2:4")]
    sparse, plan = nmjax.sparsify(model, rules), nmjax.plan(model, rules)
    params, state = nmjax.nnx.params(model), nmjax.nnx.state(sparse)
    nmjax.nnx.set_state(sparse, state)
    with pytest.raises(ValueError, match=r"\['a/kernel', 'b/kernel'\]"):
        nmjax.nnx.set_state(sparse, nmjax.prepare(params, plan, state))
    with pytest.raises(ValueError, match=r"\[\], but .*\['a/kernel'\]"):
        nmjax.nnx.set_state(sparse, {})
    wrong = jax.tree.map(lambda mask: mask[:4], state)
    with pytest.raises(ValueError, match=r"a/kernel.*shape \(4, 4\).*\(8, 4\)"):
        nmjax.nnx.set_state(sparse, wrong)


def test_set_state_gives_tied_layers_one_mask():
    model = nmjax.sparsify(pair(), whatever_can_be(FROZEN))
    model.b.kernel = model.a.kernel
    plan = nmjax.plan(model, whatever_can_be(FROZEN))
    state = nmjax.init_state(nmjax.nnx.params(model), plan)
    nmjax.nnx.set_state(model, state)
    assert model.b.nm_mask is model.a.nm_mask
    np.testing.assert_array_equal(model.b.nm_mask[...], state["a"]["kernel"]["mask"])


def test_a_mask_is_sharded_as_its_kernel():
    metadata = {"out_sharding": (None, "model")}
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = nnx.Linear(
            8, 8, kernel_init=drawn, kernel_metadata=metadata, rngs=nnx.Rngs(0)
        )
        sparse = nmjax.sparsify(layer, whatever_can_be(FROZEN))
        specs = nnx.get_partition_spec(nnx.state(sparse))
    assert sparse.nm_mask[...].sharding == sparse.kernel[...].sharding
    assert specs["nm_mask"].get_value() == specs["kernel"].get_value()
    assert specs["nm_mask"].get_value() == P(None, "model")


@pytest.mark.parametrize("refresh", [1, 4])
def test_own_loop(refresh):
    """The decay comes once for each step, from the optimizer, at the plan's paths."""
    recipe = recipes.sr_ste("2:4", decay=DECAY, decay_in="optimizer", refresh=refresh)
    rules = [nmjax.Rule("head", None), nmjax.Rule(".*", recipe)]
    model, x = build("nnx_mixer")
    sparse, plan = nmjax.sparsify(model, rules), nmjax.plan(model, rules)
    tx = optax.chain(nmjax.add_decay(plan), optax.sgd(0.1))
    optimizer = nnx.Optimizer(sparse, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss = lambda model: jnp.mean(jnp.square(model(x) - 1))  # noqa: E731
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients, nm=nmjax.nnx.state(model))
        nmjax.nnx.refresh(model, plan, optimizer.step[...])
        return value, gradients

    losses = []
    for _ in range(8):
        before, state = nmjax.nnx.params(sparse), nmjax.nnx.state(sparse)
        value, gradients = train_step(sparse, optimizer)
        gradients = nnx.to_pure_dict(gradients)
        gradients = expected_gradients(before, plan, state, gradients)
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, before, gradients)
        assert_close(nmjax.nnx.params(sparse), expected)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    params, state = nmjax.nnx.params(sparse), nmjax.nnx.state(sparse)
    nmjax.check(params, plan, state)
    if refresh == 4:  # the eighth step refreshed: the masks are those of the weights
        chosen = nmjax.init_state(params, plan)
        assert nmjax.metrics.flip_rate(chosen, state)["total"] == 0


class ByHand(nnx.Module):
    """Reads its weight without a layer."""

    def __init__(self):
        self.w = nnx.Param(values(8, 4))

    def __call__(self, x):
        return x @ self.w[...]


def test_weights_read_by_hand_go_through_sparsify_params():
    model, x = ByHand(), values(2, 8)
    plan = nmjax.plan_params(nmjax.nnx.params(model), [nmjax.Rule("w", SR_STE)])
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params):
        masked = nmjax.sparsify_params(nnx.to_pure_dict(params), plan)
        return jnp.mean(jnp.square(nnx.merge(graphdef, nnx.State(masked))(x)))

    w = model.w[...]
    mask = oracle.magnitude_mask(w, 2, 4)
    dense = jax.grad(lambda w: jnp.mean(jnp.square(x @ w)))(jnp.where(mask, w, 0))
    expected = oracle.sr_ste_gradient(dense, w, mask, DECAY)
    np.testing.assert_allclose(jax.grad(loss)(params)["w"][...], expected, 1e-5, 1e-6)

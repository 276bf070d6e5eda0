"""Every named recipe in real layers, against its equations in NumPy.

One Dense layer has a reference of each method: y, dx and dW from x, W and dy alone, in
float64. The other layers are held to the same: dense layers given the same operands.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nmjax
from nmjax import Recipe, recipes
from nmjax.masks.learned import patterns
from nmjax.sampling import mvue
from nmjax.sparsity import Sparsity
from tests import oracle

DECAY = 2.0**-6
METHODS = {
    "ste": recipes.ste("2:4"),
    "multipliers": recipes.ste("2:4", multipliers=(1.5, 0.25)),
    "sr_ste": recipes.sr_ste("2:4", decay=DECAY),
    "transposable": recipes.transposable("2:4"),
    "transposable sr_ste": recipes.transposable("2:4", decay=DECAY, refresh=1),
    "bi_mask": recipes.bi_mask("2:4", decay=DECAY),
    "bi_mask as stored": recipes.bi_mask("2:4", reorder=None),
    "bi_mask refresh": recipes.bi_mask("1:4", refresh=5),
    "fst": recipes.fst(),
    "semi_sparse_weight": recipes.semi_sparse_weight(),
    "causal": recipes.semi_sparse_weight(algorithm="causal1122"),
    "one way": recipes.semi_sparse_weight(algorithm="largest_abs_notranspose"),
    "semi_sparse_activation": recipes.semi_sparse_activation(),
    "two_by_four": recipes.two_by_four(decay=DECAY),
    "s_ste": recipes.s_ste("2:4"),
    "step": recipes.step("2:4"),
    "one_shot": recipes.one_shot("2:4"),
    "frozen": recipes.frozen("2:4", decay=DECAY),
}
LEARNED = recipes.learned("2:4")
each_method = pytest.mark.parametrize("name", METHODS)

rng = np.random.default_rng(7)
X = rng.normal(size=(12, 8)).astype(np.float32)
W = rng.normal(size=(8, 4)).astype(np.float32)
DY = rng.normal(size=(12, 4)).astype(np.float32)
KEY = jax.random.key(11)


def s_ste(w):
    """β S(W) group by group, and β from the whole weight."""
    s = np.zeros_like(w)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], 4):
            group = w[start : start + 4, column]
            t = np.sort(np.abs(group))[1]  # the second smallest of 2:4
            shrunk = np.maximum(np.abs(group) - t, 0)
            s[start : start + 4, column] = np.sign(group) * shrunk
    return (w * s).sum() / (s * s).sum() * s


def masked_twice(recipe, w, order):
    """E' ⊙ E ⊙ W: the largest of what E keeps, of each group of outputs in an order."""
    n, m = recipe.pattern.n, recipe.pattern.m
    w = np.where(oracle.magnitude_mask(w, n, m, axis=-2), w, 0)
    order = np.arange(w.shape[1]) if order is None else np.asarray(order).ravel()
    kept = oracle.magnitude_mask(w[:, order], n, m, axis=-1)
    return np.where(kept[:, np.argsort(order)], w, 0)


def reference(recipe, x, w, dy, masks, key):
    """(y, dx, dW) by the equations; masks other than magnitude's are given."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    mask = masks.get("mask", np.ones(w.shape, bool))
    w_fprop = s_ste(w) if recipe.name == "s_ste" else np.where(mask, w, 0)
    w_dgrad, x_fprop, dy_wgrad, x_wgrad = w_fprop, x, dy, x
    if recipe.name == "bi_mask":
        w_dgrad = masked_twice(recipe, w, masks.get("output_order"))
    if recipe.name == "fst":
        n, m = recipe.pattern.n, recipe.pattern.m
        w_dgrad = np.where(oracle.magnitude_mask(w, n, m, axis=-1), w, 0)
    if recipe.name == "semi_sparse_activation":
        tiles = nmjax.tile_mask(x.astype(np.float32), "largest_values_greedy")
        x_fprop = x_wgrad = np.where(tiles, x, 0)
    if recipe.name == "two_by_four":
        dy_wgrad = np.asarray(mvue(jnp.asarray(dy, jnp.float32), key, "2:4")[0])
    if recipe.name == "fst":
        pairs = dy.reshape(-1, 2, dy.shape[-1])
        x_wgrad, dy_wgrad = x[::2], pairs.sum(1)  # 0 and 2 of 4, with 1 and 3 added
    g = x_wgrad.T @ dy_wgrad
    dropped = np.where(mask, 0, w)
    if recipe.name == "one_shot":
        g = np.where(mask, g, 0)
    kept, other = recipe.multipliers
    g = np.where(mask, kept * g, other * g)
    if recipe.decay_in == "op":
        g = g + recipe.decay * dropped
    return x_fprop @ w_fprop, dy @ w_dgrad.T, g


def layer_key(key, path, w):
    """The key that the parameter at a path draws from."""
    own = Sparsity(path, METHODS["two_by_four"], -2).own_key(key)
    return jax.random.split(own, (1,) * w.ndim).reshape(-1)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="layer")(x)


def linen_run(recipe, x=X, w=W, dy=DY, state=None):
    rules = [nmjax.Rule(".*", recipe)]
    model, params = (
        nmjax.sparsify(Layer(), rules),
        {"layer": {"kernel": jnp.asarray(w)}},
    )
    plan = nmjax.plan(Layer(), rules, x)
    state = nmjax.init_state(params, plan) if state is None else state

    @jax.jit
    def run(params, state, x, dy, key):
        def apply(params, x):
            return model.apply({"params": params, "nm": state}, x, rngs={"nm": key})

        y, vjp = jax.vjp(apply, params, x)
        dparams, dx = vjp(dy)
        return y, dx, dparams["layer"]["kernel"]

    return run(params, state, x, dy, KEY), params, plan, state


@functools.cache
def linen_run_of(name):
    """Compiled once for the tests that look at it."""
    return linen_run(METHODS[name])


def masks_of(params, plan, state):
    prepared = nmjax.prepare(params, plan, state)
    entry = prepared.get("layer", {}).get("kernel", {})
    return {n: np.asarray(m) for n, m in entry.items() if n != "scale"}


def assert_close(actual, expected, atol=2e-5):
    for a, b, name in zip(actual, expected, ("y", "dx", "dW"), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol, err_msg=name)


@each_method
def test_a_linen_layer_is_the_equations(name, gemm_atol):
    recipe = METHODS[name]
    actual, params, plan, state = linen_run_of(name)
    assert len(plan.sparse) == 1
    masks = masks_of(params, plan, state)
    if recipe.mask == "magnitude":  # the others are the business of nmjax.masks
        n, m = recipe.pattern.n, recipe.pattern.m
        np.testing.assert_array_equal(masks["mask"], oracle.magnitude_mask(W, n, m))
    key = layer_key(KEY, "layer/kernel", W)
    expected = reference(recipe, X, W, DY, masks, key)
    assert_close(actual, expected, gemm_atol("float32", 64))
    nmjax.check(params, plan, nmjax.prepare(params, plan, state))
    nmjax.check(params, plan, state)


@pytest.mark.parametrize(
    "name",
    [
        "sr_ste",
        "multipliers",
        "transposable",
        "bi_mask",
        "bi_mask refresh",
        "fst",
        "semi_sparse_activation",
        "two_by_four",
        "s_ste",
    ],
)
def test_an_nnx_layer_is_the_equations(name, gemm_atol):
    recipe = METHODS[name]
    layer = nmjax.nnx.Linear(8, 4, use_bias=False, recipe=recipe, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(W))
    model = nnx.Dict(layer=layer)
    plan = nmjax.plan(model, [])
    params = nmjax.nnx.params(model)
    state = nmjax.init_state(params, plan)
    if state:
        nmjax.nnx.set_state(model, state)
    nmjax.nnx.set_key(model, KEY)

    @nnx.jit
    def run(model, x, dy):
        def loss(model, x):
            y = model["layer"](x)
            return jnp.sum(y * dy), y

        argnums = (nnx.DiffState(0, nnx.Param), 1)
        (dmodel, dx), y = nnx.grad(loss, argnums=argnums, has_aux=True)(model, x)
        return y, dx, dmodel["layer"]["kernel"][...]

    actual = run(model, X, DY)
    key = layer_key(KEY, "layer/kernel", W)
    expected = reference(recipe, X, W, DY, masks_of(params, plan, state), key)
    assert_close(actual, expected, gemm_atol("float32", 64))
    nmjax.check(params, plan, nmjax.prepare(params, plan, state))


@pytest.mark.parametrize("name", ["sr_ste", "fst", "two_by_four", "s_ste"])
def test_prepared_masks_give_the_same_bits(name):
    actual, params, plan, state = linen_run_of(name)
    prepared = nmjax.prepare(params, plan, state)
    again, *_ = linen_run(METHODS[name], state=prepared)
    for a, b in zip(actual, again, strict=True):
        np.testing.assert_array_equal(a, b)


@each_method
def test_baked_parameters_are_those_of_fprop(name):
    actual, params, plan, state = linen_run_of(name)
    if METHODS[name].fprop != "weight":
        baked = nmjax.bake(params, plan, state)["layer"]["kernel"]
        np.testing.assert_array_equal(baked, W)
        return
    dense = Layer().apply({"params": nmjax.bake(params, plan, state)}, X)
    np.testing.assert_allclose(dense, actual[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, recipe in METHODS.items() if recipe.needs_state]
)
def test_missing_state_raises(name):
    with pytest.raises(ValueError, match="layer/kernel.*init_state"):
        linen_run(METHODS[name], state={})


def test_a_gradient_without_a_key_names_the_way_out():
    rules = [nmjax.Rule(".*", METHODS["two_by_four"])]
    model, params = nmjax.sparsify(Layer(), rules), {"layer": {"kernel": W}}
    state = nmjax.init_state(params, nmjax.plan(Layer(), rules, X))
    apply = lambda params: model.apply({"params": params, "nm": state}, X).sum()  # noqa: E731
    apply(params)  # evaluation needs none
    with pytest.raises(ValueError, match=r'layer/kernel.*rngs=\{"nm": key\}'):
        jax.grad(apply)(params)


# Learned masks


def learned(train_weights=False):
    recipe = recipes.learned("2:4", train_weights=train_weights)
    rules = [nmjax.Rule(".*", recipe)]
    params = {"layer": {"kernel": jnp.asarray(W)}}
    plan = nmjax.plan(Layer(), rules, X)
    logits = jnp.asarray(rng_logits().normal(size=(2, 6, 4)), jnp.float32)
    model, state = nmjax.sparsify(Layer(), rules), nmjax.init_state(params, plan)
    return model, params, plan, state, {"layer": {"kernel": logits}}


def rng_logits():
    return np.random.default_rng(3)


def test_learned_masks_evaluate_to_the_most_probable():
    model, params, plan, state, logits = learned()
    variables = {"params": params, "nm": state, "nm_logits": logits}
    best = patterns("2:4")[np.argmax(logits["layer"]["kernel"], 1)]  # (2, out, 4)
    mask = best.transpose(0, 2, 1).reshape(8, 4)
    expected = X @ np.where(mask, W, 0)
    np.testing.assert_allclose(
        model.apply(variables, X), expected, rtol=1e-5, atol=1e-5
    )
    prepared = nmjax.prepare(params, plan, state, logits=logits)
    np.testing.assert_array_equal(prepared["layer"]["kernel"]["mask"], mask)
    nmjax.check(params, plan, prepared)
    baked = nmjax.bake(params, plan, state, logits=logits)
    np.testing.assert_array_equal(baked["layer"]["kernel"], np.where(mask, W, 0))
    with pytest.raises(nmjax.CheckError, match="no mask"):
        nmjax.check(params, plan, state)


@pytest.mark.parametrize("train_weights", [False, True])
def test_learned_masks_train_by_sampling(train_weights):
    model, params, _, state, logits = learned(train_weights)

    @jax.jit
    def gradients(params, logits, key):
        def loss(params, logits):
            variables = {"params": params, "nm": state, "nm_logits": logits}
            y = model.apply(variables, X, rngs={"nm": key})
            return jnp.sum(y * DY), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, logits)

    (dparams, dlogits), y = gradients(params, logits, KEY)
    own = jax.random.split(Sparsity("layer/kernel", LEARNED, -2).own_key(KEY), (1, 1))
    noise = jax.random.gumbel(own.reshape(-1)[0], (2, 6, 4), jnp.float32)
    scores = np.asarray(logits["layer"]["kernel"] + noise, np.float64)
    table = patterns("2:4").astype(np.float64)
    mask = table[scores.argmax(1)].transpose(0, 2, 1).reshape(8, 4)
    np.testing.assert_allclose(y, X @ (mask * W), rtol=1e-5, atol=1e-5)

    g = X.T.astype(np.float64) @ DY  # of the masked weight
    expected = mask * g if train_weights else np.zeros_like(g)
    np.testing.assert_allclose(
        dparams["layer"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )
    dmask = (g * W).reshape(2, 4, 4)  # (groups, position, out)
    dsoft = np.einsum("gpo,cp->gco", dmask, table)
    soft = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    dscores = soft * (dsoft - (soft * dsoft).sum(1, keepdims=True))
    np.testing.assert_allclose(
        dlogits["layer"]["kernel"], dscores, rtol=1e-4, atol=1e-5
    )


def test_learning_masks_leaves_the_weights_bit_for_bit():
    model, params, plan, state, logits = learned()
    before = np.asarray(params["layer"]["kernel"]).copy()

    @jax.jit
    def step(params, logits, state, key, count):
        def loss(params, logits):
            variables = {"params": params, "nm": state, "nm_logits": logits}
            return jnp.sum(model.apply(variables, X, rngs={"nm": key}) ** 2)

        dparams, dlogits = jax.grad(loss, (0, 1))(params, logits)
        descend = lambda w, g: w - 0.1 * g  # noqa: E731
        params = jax.tree.map(descend, params, dparams)
        logits = jax.tree.map(descend, logits, dlogits)
        return params, logits, nmjax.refresh(state, params, plan, count)

    moved = logits
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        params, moved, state = step(params, moved, state, key, i)
    np.testing.assert_array_equal(params["layer"]["kernel"], before)
    assert (moved["layer"]["kernel"] != logits["layer"]["kernel"]).any()


def test_a_learned_mask_needs_logits_and_a_key_to_train():
    model, params, plan, state, logits = learned()
    with pytest.raises(ValueError, match="nmjax.init_logits"):
        model.apply({"params": params, "nm": state}, X)
    variables = {"params": params, "nm": state}

    def loss(logits):
        return model.apply({**variables, "nm_logits": logits}, X).sum()

    with pytest.raises(ValueError, match=r'layer/kernel.*rngs=\{"nm": key\}'):
        jax.grad(loss)(logits)
    with pytest.raises(ValueError, match="there are logits for .*other/kernel"):
        loss({"other": logits["layer"]})
    zeros = nmjax.init_logits(params, plan)
    assert zeros["layer"]["kernel"].shape == (2, 6, 4)
    with pytest.raises(ValueError, match="temperature in the state"):
        model.apply({"params": params, "nm_logits": logits}, X, rngs={"nm": KEY})
    prepared = nmjax.prepare(params, plan, state, logits=logits)
    variables = {"params": params, "nm": prepared}

    def loss(logits, x):
        return model.apply({**variables, "nm_logits": logits}, x).sum()

    with pytest.raises(ValueError, match="give logits no gradient"):
        model.apply({**variables, "nm_logits": logits}, X, rngs={"nm": KEY})
    with pytest.raises(ValueError, match="give logits no gradient"):
        jax.jit(jax.grad(loss))(logits, X)
    assert jax.jit(jax.grad(loss, argnums=1))(logits, X).any()


def test_the_temperature_follows_the_step():
    from nmjax.masks.learned import Temperature

    cooling = Temperature(4.0, 1.0, 10, "linear")
    recipe = recipes.learned("2:4", temperature=cooling)
    plan = nmjax.plan_params({"kernel": W}, [nmjax.Rule(".*", recipe)])
    state = nmjax.init_state({"kernel": W}, plan)
    np.testing.assert_array_equal(state["kernel"]["temperature"], [[4.0]])
    state = jax.jit(lambda s, t: nmjax.refresh(s, {"kernel": W}, plan, t))(state, 5)
    np.testing.assert_array_equal(state["kernel"]["temperature"], [[2.5]])
    state = nmjax.next_state({"kernel": W}, plan, state, plan)
    np.testing.assert_array_equal(state["kernel"]["temperature"], [[2.5]])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.slow
def test_nnx_learns_masks():
    layer = nmjax.nnx.Linear(8, 4, recipe=LEARNED, rngs=nnx.Rngs(0))
    model = nnx.Dict(layer=layer)
    assert set(nmjax.nnx.params(model)["layer"]) == {"kernel", "bias"}
    logits = nmjax.nnx.logits(model)
    assert logits["layer"]["kernel"].shape == (2, 6, 4)
    only_logits = nnx.DiffState(0, nmjax.nnx.NMLogits)

    def loss(model):
        return jnp.sum(model["layer"](X) ** 2)

    with pytest.raises(ValueError, match="set_key"):
        nnx.grad(loss, argnums=only_logits)(model)
    nmjax.nnx.set_key(model, KEY)
    sampled = loss(model)
    grads = nnx.grad(loss, argnums=only_logits)(model)
    assert np.abs(grads["layer"]["nm_logits"][...]).max() > 0
    weights = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model)
    assert not np.any(weights["layer"]["kernel"][...])
    quiet = nnx.view(model, deterministic=True)
    assert loss(model) == sampled
    model.eval()
    most_probable = loss(model)
    with pytest.raises(ValueError, match="training mode"):
        nnx.grad(loss, argnums=only_logits)(model)
    model.train()
    assert loss(model) == sampled
    nmjax.nnx.set_key(model, None)
    assert loss(model) == loss(quiet) == most_probable != sampled
    plan = nmjax.plan(model, [])
    masks = nmjax.prepare(
        nmjax.nnx.params(model), plan, nmjax.nnx.state(model), logits=logits
    )
    nmjax.check(nmjax.nnx.params(model), plan, masks)


class OwnMode(nnx.Linear):
    """A user's layer with a mode of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.deterministic = False

    def set_view(self, deterministic=None):
        self.deterministic = deterministic


@pytest.mark.parametrize("recipe", ["2:4", LEARNED], ids=["SR-STE", "learned"])
@pytest.mark.parametrize("cls", [nnx.Linear, OwnMode])
def test_nnx_modes_leave_a_layer_as_it_was(cls, recipe):
    dense = cls(8, 4, rngs=nnx.Rngs(0))
    model = nmjax.sparsify(nnx.Dict(layer=dense), [nmjax.Rule(".*", recipe)])
    has_mode = cls is OwnMode or recipe is LEARNED
    assert hasattr(model["layer"], "deterministic") == has_mode
    assert hasattr(model["layer"], "set_view") == has_mode
    model.eval()
    model.train()
    again = nmjax.densify(model)["layer"]
    assert nnx.graphdef(again) == nnx.graphdef(dense)
    if has_mode:
        seen = nnx.view(model, deterministic=True)
        assert seen["layer"].deterministic and not model["layer"].deterministic


# Every layer shares the three GEMMs


class Net(nn.Module):
    """Conv (strided, dilated, grouped), attention, Einsum and Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.Conv(
            8, (2, 2), kernel_dilation=2, feature_group_count=2, name="grouped"
        )(x)
        x = jnp.tanh(x.reshape(x.shape[0], -1, 8))
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attn")(x)
        x = nn.Einsum((8, 2, 4), "bsd,dhk->bshk", name="einsum")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="general")(x)
        return nn.Dense(4, name="dense")(x)


IMAGES = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6, 6, 8)), jnp.float32)


@functools.cache
def net_params():
    """Drawn by NumPy: Flax's own initializers take seconds to compile."""
    shapes = jax.eval_shape(Net().init, jax.random.key(0), IMAGES)["params"]
    draw = np.random.default_rng(4)
    scaled = lambda w: jnp.asarray(draw.normal(0, 0.4, w.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(scaled, shapes)


@jax.jit
def dense_loss(params):
    return jax.value_and_grad(
        lambda p: jnp.mean(Net().apply({"params": p}, IMAGES) ** 2)
    )(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fst",
        "two_by_four",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("transposable", "semi_sparse_activation")
        ),
    ],
)
def test_every_layer_follows_the_recipe(name):
    recipe = METHODS[name]
    rules = [nmjax.Rule(".*", recipe)]
    params, plan = net_params(), nmjax.plan(Net(), rules, IMAGES)
    assert len(plan.sparse) == 9
    state = nmjax.init_state(params, plan)
    model = nmjax.sparsify(Net(), rules)

    @jax.jit
    def run(params, state):
        def loss(params):
            variables = {"params": params, "nm": state}
            return jnp.mean(model.apply(variables, IMAGES, rngs={"nm": KEY}) ** 2)

        return jax.value_and_grad(loss)(params)

    value, gradient = run(params, state)
    prepared = nmjax.prepare(params, plan, state)
    nmjax.check(params, plan, prepared)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))
    baked = nmjax.bake(params, plan, state)
    expected, dense_gradient = dense_loss(baked)
    if recipe.fprop == "weight":
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    else:
        assert abs(value / expected - 1) > 1e-3
    # The last layer's own gradient needs no dgrad before it: exact where wgrad is.
    if recipe.wgrad is None:
        for a, b in zip(
            jax.tree.leaves(gradient["dense"]),
            jax.tree.leaves(dense_gradient["dense"]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_init_gives_the_dense_parameters_bit_for_bit():
    dense = Layer().init(jax.random.key(0), X)
    for recipe in (METHODS["two_by_four"], METHODS["fst"], LEARNED):
        ours = nmjax.sparsify(Layer(), recipe).init(jax.random.key(0), X)
        jax.tree.map(np.testing.assert_array_equal, ours, dense)


class Scanned(nn.Module):
    """Dense layers in a scan, with remat."""

    recipe: Recipe | None = None

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(8, use_bias=False, name="d")(x)), None

        scan = nn.scan(
            nn.remat(Block),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="blocks")(x, None)[0]

    axis: int = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("bi_mask", 0),
        ("bi_mask", 1),
        ("fst", 1),
        ("two_by_four", 1),
        ("s_ste", 0),
        ("s_ste", 1),
        ("semi_sparse_activation", 0),
        ("transposable", 1),
    ],
)
def test_a_scanned_layer_is_its_layers_one_by_one(name, axis):
    recipe = METHODS[name]
    kernels = np.random.default_rng(2).normal(0, 0.5, (3, 8, 8)).astype(np.float32)
    stored = jnp.moveaxis(jnp.asarray(kernels), 0, axis)
    params = {"blocks": {"d": {"kernel": stored}}}
    rules = [nmjax.Rule(".*", recipe)]
    plan = nmjax.plan(Scanned(axis=axis), rules, X)
    (entry,) = plan.sparse
    assert entry.stacked == (axis - 3,)
    state = nmjax.init_state(params, plan)
    model = nmjax.sparsify(Scanned(axis=axis), rules)

    @jax.jit
    def run(params, state, x):
        def loss(params):
            variables = {"params": params, "nm": state}
            return jnp.sum(model.apply(variables, x, rngs={"nm": KEY}) * 1.0)

        return jax.value_and_grad(loss)(params)

    value, gradient = run(params, state, X)
    gradient = np.moveaxis(np.asarray(gradient["blocks"]["d"]["kernel"]), axis, 0)

    own = Sparsity.of(entry).own_key(KEY)
    keys = jax.random.split(own, tuple(np.where(np.arange(3) == axis, 3, 1))).reshape(
        -1
    )
    x, inputs = X.astype(np.float64), []
    masks = []
    orders = state["blocks"]["d"]["kernel"].get("output_order") if state else None
    for i, w in enumerate(kernels):
        plan_one = nmjax.plan_params(
            {"kernel": w}, [nmjax.Rule(".*", weight_only(recipe))]
        )
        one = {"kernel": jnp.asarray(w)}
        kept = nmjax.prepare(one, plan_one, nmjax.init_state(one, plan_one))
        masks.append({n: np.asarray(m) for n, m in kept.get("kernel", {}).items()})
        if orders is not None:
            masks[-1]["output_order"] = np.moveaxis(np.asarray(orders), axis, 0)[i]
        inputs.append(x)
        x = np.tanh(reference(recipe, x, w, x, masks[-1], keys[0])[0])
    np.testing.assert_allclose(value, x.sum(), rtol=1e-4)
    dy = np.ones_like(x)
    outputs = [*inputs[1:], x]
    for i in reversed(range(3)):
        dy = dy * (1 - outputs[i] ** 2)
        args = (recipe, inputs[i], kernels[i], dy, masks[i], keys[i])
        _, dy, dw = reference(*args)
        np.testing.assert_allclose(gradient[i], dw, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_logits_of_a_scanned_layer_are_sliced_with_it(axis):
    kernels = np.random.default_rng(2).normal(0, 0.5, (3, 8, 8)).astype(np.float32)
    stored = jnp.moveaxis(jnp.asarray(kernels), 0, axis)
    params = {"blocks": {"d": {"kernel": stored}}}
    rules = [nmjax.Rule(".*", LEARNED)]
    plan = nmjax.plan(Scanned(axis=axis), rules, X)
    model = nmjax.sparsify(Scanned(axis=axis), rules)
    zeros = nmjax.init_logits(params, plan)
    draw = np.random.default_rng(6)
    logits = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), zeros
    )
    state = nmjax.init_state(params, plan)
    baked = nmjax.bake(params, plan, state, logits=logits)["blocks"]["d"]["kernel"]
    expected = X
    for w in np.moveaxis(np.asarray(baked), axis, 0):
        assert (np.count_nonzero(w.reshape(2, 4, 8), axis=1) == 2).all()
        expected = np.tanh(expected @ w)

    @jax.jit
    def run(logits, rngs):
        variables = {"params": params, "nm": state, "nm_logits": logits}
        return model.apply(variables, X, rngs=rngs)

    np.testing.assert_allclose(run(logits, {}), expected, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda logits: run(logits, {"nm": KEY}).sum())(logits)
    of_layers = np.moveaxis(gradient["blocks"]["d"]["kernel"], 2 * axis, 0)
    assert all(np.any(layer) for layer in of_layers)


def weight_only(recipe):
    """The recipe's mask of W alone, for a bare parameter."""
    if recipe.mask is None:
        return None
    dgrad = recipe.dgrad if recipe.dgrad == "weight" else None
    return dataclasses.replace(recipe, wgrad=None, dgrad=dgrad, reorder=None)


# The order of outputs of Bi-Mask, with more outputs than one group


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, use_bias=False, name="layer")(x)


W_WIDE = np.random.default_rng(5).normal(size=(8, 24)).astype(np.float32)
DY_WIDE = np.random.default_rng(6).normal(size=(12, 24)).astype(np.float32)


@functools.cache
def wide(refresh=1):
    rules = [nmjax.Rule(".*", recipes.bi_mask("2:4", decay=DECAY, refresh=refresh))]
    params = {"layer": {"kernel": jnp.asarray(W_WIDE)}}
    plan = nmjax.plan(Wide(), rules, X)
    return nmjax.sparsify(Wide(), rules), params, plan, nmjax.init_state(params, plan)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [1, 50])
def test_dgrad_groups_outputs_in_the_order_of_the_state(refresh, gemm_atol):
    model, params, plan, state = wide(refresh)
    entry = state["layer"]["kernel"]
    order = np.asarray(entry["output_order"])
    assert order.shape == (1, 24) and (order != np.arange(24)).any()
    (recipe,) = {e.recipe for e in plan.sparse}

    @jax.jit
    def run(params, state, x):
        def apply(params, x):
            return model.apply({"params": params, "nm": state}, x)

        y, vjp = jax.vjp(apply, params, x)
        dparams, dx = vjp(DY_WIDE)
        return y, dx, dparams["layer"]["kernel"]

    masks = {
        "mask": oracle.magnitude_mask(W_WIDE, 2, 4, axis=-2),
        "output_order": order,
    }
    expected = reference(recipe, X, W_WIDE, DY_WIDE, masks, KEY)
    for given in (state, nmjax.prepare(params, plan, state)):
        assert_close(run(params, given, X), expected, gemm_atol("float32", 64))
        nmjax.check(params, plan, given)
    layer = nmjax.nnx.Linear(8, 24, use_bias=False, recipe=recipe, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(W_WIDE))
    nnx_model = nnx.Dict(layer=layer)
    nmjax.nnx.set_state(nnx_model, state)
    dx = nnx.grad(lambda m, x: jnp.sum(m["layer"](x) * DY_WIDE), argnums=1)(
        nnx_model, X
    )
    np.testing.assert_allclose(dx, expected[1], rtol=2e-5, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, nmjax.nnx.state(nnx_model), state)


@pytest.mark.slow
def test_the_order_changes_at_its_interval_and_never_for_a_worse_one():
    _, params, plan, state = wide(50)
    refresh = jax.jit(
        lambda state, params, step: nmjax.refresh(state, params, plan, step)
    )
    moved = jax.tree.map(lambda w: w[::-1] * 1.5, params)

    def dropped(state):
        entry = state["layer"]["kernel"]
        return int((entry["mask"] & ~entry["mask_dgrad"]).sum())

    kept = refresh(state, moved, 50)["layer"]["kernel"]
    order = state["layer"]["kernel"]["output_order"]
    np.testing.assert_array_equal(kept["output_order"], order)
    nmjax.check(moved, plan, {"layer": {"kernel": kept}})
    changed = refresh(state, moved, 100)
    nmjax.check(moved, plan, changed)
    assert (changed["layer"]["kernel"]["output_order"] != order).any()
    assert dropped(changed) < dropped({"layer": {"kernel": kept}})


def test_frozen_masks_keep_their_order():
    recipe = recipes.bi_mask("2:4").during(dense_until=0, freeze_from=0.5)
    _, late = nmjax.phases([nmjax.Rule(".*", recipe)], 200)
    _, params, plan, state = wide()
    params = jax.tree.map(lambda w: w[:, ::-1] * 1.5, params)
    state = nmjax.refresh(state, params, plan, 100)  # in an order that no start finds
    late = nmjax.plan(Wide(), late.rules, X)
    frozen = nmjax.next_state(params, late, state, plan)
    entry, old = frozen["layer"]["kernel"], state["layer"]["kernel"]
    np.testing.assert_array_equal(entry["output_order"], old["output_order"])
    moved = jax.tree.map(lambda w: w[::-1], params)
    again = nmjax.refresh(frozen, moved, late, 100)
    jax.tree.map(np.testing.assert_array_equal, again, frozen)
    nmjax.check(moved, late, frozen)
    in_force = nmjax.prepare(params, plan, state)["layer"]["kernel"]
    np.testing.assert_array_equal(entry["mask_dgrad"], in_force["mask_dgrad"])


@pytest.mark.parametrize(
    "change", [{"reorder": None}, {"dgrad": "weight-own-mask", "reorder": None}]
)
def test_masks_chosen_in_another_way_are_chosen_anew(change):
    _, params, _, _ = wide()
    recipe = recipes.bi_mask("2:4", refresh=4)  # whose masks live in the state
    plan = nmjax.plan(Wide(), [nmjax.Rule(".*", recipe)], X)
    state = nmjax.init_state(params, plan)
    later = dataclasses.replace(recipe, refresh=None, **change)
    later = nmjax.plan(Wide(), [nmjax.Rule(".*", later)], X)
    begun = nmjax.next_state(params, later, state, plan)
    jax.tree.map(np.testing.assert_array_equal, begun, nmjax.init_state(params, later))
    nmjax.check(params, later, begun)


def test_check_judges_dgrads_mask_in_the_order_of_the_state():
    _, params, plan, state = wide(50)
    entry = state["layer"]["kernel"]
    other = {**entry, "output_order": jnp.roll(entry["output_order"], 1, axis=-1)}
    with pytest.raises(nmjax.CheckError, match=r"\[pattern\].*along axis -1"):
        nmjax.check(params, plan, {"layer": {"kernel": other}})
    more = {**entry, "mask_dgrad": ~entry["mask"]}
    with pytest.raises(nmjax.CheckError, match="keeps weights that mask drops"):
        nmjax.check(params, plan, {"layer": {"kernel": more}})
    without = {n: x for n, x in entry.items() if n != "output_order"}
    with pytest.raises(nmjax.CheckError, match="no output_order"):
        nmjax.check(params, plan, {"layer": {"kernel": without}})
    with pytest.raises(ValueError, match="no output_order.*init_state"):
        nmjax.refresh({"layer": {"kernel": without}}, params, plan, 100)


def test_vmap_over_examples():
    recipe = METHODS["bi_mask"]
    (y, _, _), params, _, state = linen_run_of("bi_mask")
    model = nmjax.sparsify(Layer(), [nmjax.Rule(".*", recipe)])
    variables = {"params": params, "nm": state}
    each = jax.jit(jax.vmap(lambda x: model.apply(variables, x[None])[0]))(X)
    np.testing.assert_allclose(each, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "bi_mask",
        "fst",
        pytest.param("semi_sparse_activation", marks=pytest.mark.slow),
        "two_by_four",
        "s_ste",
    ],
)
def test_shard_map_over_tokens(name):
    """Four tokens on each device: whole groups, so the sum is that of one device."""
    recipe, x = METHODS[name], np.concatenate([X, X[:4] + 1])
    _, params, _, state = linen_run_of(name)
    model = nmjax.sparsify(Layer(), [nmjax.Rule(".*", recipe)])

    def gradient(params, state, x, key):
        def loss(params):
            variables = {"params": params, "nm": state}
            return jnp.sum(jnp.sin(model.apply(variables, x, rngs={"nm": key})))

        return jax.grad(loss)(params)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(spec(), spec(), spec("data"), spec()),
        out_specs=spec(),
    )
    actual = jax.jit(sharded)(params, state, x, KEY)["layer"]["kernel"]
    expected = jax.jit(gradient)(params, state, x, KEY)["layer"]["kernel"]
    if recipe.draws:  # other random numbers: the devices draw the same
        assert np.isfinite(actual).all()
        return
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_new_key_and_new_masks_do_not_retrace():
    recipe = METHODS["two_by_four"]
    _, params, plan, state = linen_run_of("two_by_four")
    model, traces = nmjax.sparsify(Layer(), [nmjax.Rule(".*", recipe)]), []

    @jax.jit
    def gradient(params, state, key):
        traces.append(None)
        apply = lambda p: model.apply({"params": p, "nm": state}, X, rngs={"nm": key})  # noqa: E731
        return jax.grad(lambda p: (apply(p) * DY).sum())(params)

    first = gradient(params, state, KEY)["layer"]["kernel"]
    again = gradient(params, state, KEY)["layer"]["kernel"]
    other = gradient(params, state, jax.random.fold_in(KEY, 1))["layer"]["kernel"]
    moved = jax.tree.map(lambda w: w + 1, params)
    gradient(moved, nmjax.refresh(state, moved, plan, 40), KEY)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(traces) == 1


# What cannot be


@pytest.mark.parametrize(
    ("recipe", "shape", "reason"),
    [
        (
            recipes.transposable("2:4"),
            (8, 6),
            "axis -1 has size 6, not a multiple of 4",
        ),
        (recipes.bi_mask("2:4"), (8, 6), "axis -1 has size 6"),
        (recipes.semi_sparse_activation(), (6, 8), "axis -2 has size 6"),
    ],
)
def test_every_axis_of_groups_is_checked(recipe, shape, reason):
    model = nn.Dense(shape[1], use_bias=False)
    x = jnp.ones((4, shape[0]))
    with pytest.raises(nmjax.PlanError, match=reason):
        nmjax.sparsify(model, [nmjax.Rule(".*", recipe)]).init(jax.random.key(0), x)
    with pytest.raises(nmjax.PlanError, match=reason):
        nmjax.nnx.Linear(*shape, recipe=recipe, rngs=nnx.Rngs(0))


def test_groups_along_the_outputs_stay_in_a_feature_group():
    recipe, x = recipes.bi_mask("2:4"), jnp.ones((1, 2, 2, 8))
    reason = "axis -1 has size 12 in 2 feature groups, not a multiple of 4"
    layer = nn.Conv(12, (1, 1), feature_group_count=2)
    with pytest.raises(nmjax.PlanError, match=reason):
        nmjax.plan(layer, [nmjax.Rule(".*", recipe)], x)
    options = {"feature_group_count": 2, "recipe": recipe}
    with pytest.raises(nmjax.PlanError, match=reason):
        nmjax.linen.Conv(12, (1, 1), **options).init(jax.random.key(0), x)
    with pytest.raises(nmjax.PlanError, match=reason):
        nmjax.nnx.Conv(8, 12, (1, 1), **options, rngs=nnx.Rngs(0))
    assert nmjax.plan(layer, [nmjax.Rule(".*", recipes.ste("2:4"))], x).sparse


def test_ragged_is_for_masks_along_one_axis():
    rules = [nmjax.Rule(".*", recipes.transposable("2:4"), ragged="pad")]
    with pytest.raises(nmjax.PlanError, match="ragged='pad' is for magnitude masks"):
        nmjax.plan(nn.Dense(6), rules, jnp.ones((4, 8)))


def test_a_layer_without_a_hook_refuses_more_than_a_masked_weight():
    x = jnp.ones((2, 4, 4, 8))
    rules = [nmjax.Rule(".*", recipes.fst())]
    with pytest.raises(nmjax.PlanError, match="'ConvTranspose' cannot be replaced"):
        nmjax.plan(nn.ConvTranspose(8, (2, 2)), rules, x)
    with pytest.raises(nmjax.PlanError, match="'parameter' cannot be replaced"):
        nmjax.plan_params({"kernel": jnp.ones((8, 8))}, rules)
    rules = [nmjax.Rule(".*", recipes.transposable("2:4"))]
    assert nmjax.plan(nn.ConvTranspose(8, (2, 2)), rules, x).sparse


def test_check_judges_both_axes_and_dgrads_own_mask():
    params = {"layer": {"kernel": jnp.asarray(W)}}
    plan = nmjax.plan(Layer(), [nmjax.Rule(".*", METHODS["transposable"])], X)
    along_inputs = {"mask": nmjax.magnitude_mask(W, "2:4")}
    with pytest.raises(nmjax.CheckError, match=r"\[pattern\].*along axis -1"):
        nmjax.check(params, plan, {"layer": {"kernel": along_inputs}})
    plan = nmjax.plan(Layer(), [nmjax.Rule(".*", METHODS["bi_mask refresh"])], X)
    state = nmjax.init_state(params, plan)
    nmjax.check(params, plan, state)
    entry = dict(state["layer"]["kernel"])
    swapped = {**entry, "mask_dgrad": entry["mask"]}
    with pytest.raises(nmjax.CheckError, match="layer/kernel"):
        nmjax.check(params, plan, {"layer": {"kernel": swapped}})
    del entry["mask_dgrad"]
    with pytest.raises(nmjax.CheckError, match="no mask_dgrad"):
        nmjax.check(params, plan, {"layer": {"kernel": entry}})


def test_summary_says_why_a_weight_is_dense():
    params = {"layer": {"kernel": jnp.asarray(W)}}
    plan = nmjax.plan(Layer(), [nmjax.Rule(".*", METHODS["semi_sparse_activation"])], X)
    text = nmjax.summary(params, plan)
    assert "W dense: x of fprop, x of wgrad is N:M" in text
    assert "32 of 32 parameters, 32 kept" in text
    with pytest.raises(nmjax.CheckError, match=r"\[stranger\]"):
        nmjax.check(params, plan, {"layer": {"kernel": {"mask": W > 0}}})

"""Meshes with Explicit axes, of outputs and of tokens: the values of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import NMPattern, recipes
from nmjax.masks.output_order import mask_in_order
from nmjax.ops import nm_conv, nm_dot_general
from nmjax.sparsity import Sparsity
from nmjax.tokens import joined_rows, kept_rows, sampled, sparse_tiles, spread_rows

ACTIVATION = recipes.semi_sparse_activation()
FST, SAMPLED = recipes.fst(), recipes.two_by_four()
BI_MASK = recipes.bi_mask("2:4")


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def cut(array, mesh, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def integers(rng, *shape):
    return rng.integers(-3, 4, shape).astype(np.float32)


def weight(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


# Tokens


def dot(recipe, axes=1):
    def loss(x, w, key):
        contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
        y = nm_dot_general(x, w, (contracted, ((), ())), recipe=recipe, key=key)
        return jnp.sum(y**2)

    return jax.value_and_grad(loss, (0, 1))


def check_dot(rng, run, x_shape, w_shape, mesh, x_spec, w_spec):
    """Value and gradients are those of one device, the latter cut as x and w are."""
    x, w, key = integers(rng, *x_shape), integers(rng, *w_shape), jax.random.key(1)
    expected = jax.jit(run)(x, w, key)
    with jax.set_mesh(mesh):
        x, w = cut(x, mesh, x_spec), cut(w, mesh, w_spec)
        actual = jax.jit(run)(x, w, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3),
        actual,
        expected,
    )
    for gradient, primal in zip(actual[1], (x, w), strict=True):
        assert gradient.sharding.is_equivalent_to(primal.sharding, primal.ndim)


each_recipe = pytest.mark.parametrize(
    "recipe", [ACTIVATION, FST, SAMPLED], ids=lambda r: r.name
)


@each_recipe
@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [
        (P(None, "a"), P(None, "b")),
        pytest.param(P("a", "b"), P(), marks=pytest.mark.slow),
        pytest.param(P(None, ("b", "a")), P(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_cut_sequence(rng, recipe, x_spec, w_spec):
    check_dot(rng, dot(recipe), (2, 16, 8), (8, 4), mesh_of(2, 2), x_spec, w_spec)


@each_recipe
def test_more_token_axes_and_more_columns(rng, recipe):
    """Images cut by their rows; heads and channels, contracted and made."""
    shapes, specs = ((2, 4, 2, 2, 4), (2, 4, 2, 4)), (P(None, "a"), P(None, None, "b"))
    check_dot(rng, dot(recipe, axes=2), *shapes, mesh_of(2, 2), *specs)


@each_recipe
def test_a_mesh_axis_of_one_device_cuts_nothing(rng, recipe):
    """6 tokens a row, 12 in all: no groups of one row, but of both."""
    mesh = mesh_of(1, 1)
    check_dot(rng, dot(recipe), (2, 6, 8), (8, 4), mesh, P("a", "b"), P())


@pytest.mark.slow
@each_recipe
def test_a_cut_sequence_under_vmap_and_checkpoint(rng, recipe):
    numbers = (((2,), (0,)), ((), ()))

    @jax.value_and_grad
    def loss(w, x, key):
        gemm = lambda x: nm_dot_general(x, w, numbers, recipe=recipe, key=key)  # noqa: E731
        return jnp.sum(jax.checkpoint(jax.vmap(gemm))(x) ** 2)

    x, w, key = integers(rng, 2, 2, 8, 8), integers(rng, 8, 4), jax.random.key(1)
    expected, mesh = jax.jit(loss)(w, x, key), mesh_of(2, 2)
    with jax.set_mesh(mesh):
        actual = jax.jit(loss)(w, cut(x, mesh, P("a", None, "b")), key)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-3)


@each_recipe
def test_convolutions_of_a_cut_batch(rng, recipe):
    def loss(x, w, key):
        numbers = ("NHWC", "HWIO", "NHWC")
        options = {"dimension_numbers": numbers, "recipe": recipe, "key": key}
        return jnp.sum(nm_conv(x, w, (1, 1), "SAME", **options) ** 2)

    run = jax.value_and_grad(loss, (0, 1))
    shapes = (4, 4, 4, 8), (3, 3, 8, 4)
    check_dot(rng, run, *shapes, mesh_of(2, 2), P(("a", "b")), P())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pointwise_convolution_of_images_cut_by_their_rows(rng, groups):
    def loss(x, w, key):
        options = {"recipe": ACTIVATION, "key": key, "feature_group_count": groups}
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jnp.sum(nm_conv(x, w, (1, 1), "SAME", **numbers, **options) ** 2)

    run = jax.value_and_grad(loss, (0, 1))
    shapes = (4, 4, 4, 8), (1, 1, 8 // groups, 4)
    check_dot(rng, run, *shapes, mesh_of(2, 2), P(None, "a"), P())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: sparse_tiles("largest_abs_values_greedy", x),
        lambda x: sampled(NMPattern("2:4"), jax.random.key(0), x),
        lambda x: kept_rows(NMPattern("2:4"), x),
        lambda x: joined_rows(NMPattern("2:4"), x),
        lambda x: spread_rows(NMPattern("2:4"), x),
    ],
    ids=["sparse_tiles", "sampled", "kept_rows", "joined_rows", "spread_rows"],
)
def test_whole_groups_of_tokens_need_no_communication(rng, change):
    x, mesh = weight(rng, 2, 16, 8), mesh_of(2, 2)
    expected = jax.jit(change)(x)
    with jax.set_mesh(mesh):
        x = cut(x, mesh, P(None, "a", "b"))
        compiled = jax.jit(change).lower(x).compile()
        actual = compiled(x)
    np.testing.assert_array_equal(actual, expected)
    assert actual.sharding.is_equivalent_to(x.sharding, 3)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


@each_recipe
@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((2, 12, 4), P("a", "b"), r"\(2, 12, 4\) .*parts of 6, .* m = 4 .*straddle"),
        ((2, 6, 4), P("a"), r"\(12, 4\) .*parts of 6, .* m = 4 .*jax.reshard"),
    ],
)
def test_tokens_whose_groups_straddle_devices_are_refused(recipe, shape, spec, message):
    mesh, run = mesh_of(2, 2), jax.jit(dot(recipe))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        run(cut(jnp.ones(shape), mesh, spec), jnp.ones((4, 4)), jax.random.key(0))


def test_a_cut_through_columns_is_refused(rng):
    mesh, run, key = mesh_of(2, 2), jax.jit(dot(SAMPLED)), jax.random.key(0)
    x, w = integers(rng, 2, 8, 8), integers(rng, 8, 2, 4)
    with jax.set_mesh(mesh):
        run(x, cut(w, mesh, P(None, "b")), key)
        message = r"axis 3 of shape \(2, 8, 2, 4\) is sharded, .*axes 2 to 3 .*axis 2 "
        with pytest.raises(ValueError, match=message):
            run(x, cut(w, mesh, P(None, None, "b")), key)


def test_mvue_draws_the_same_from_a_key(rng):
    x, key, mesh = weight(rng, 16, 8), jax.random.key(0), mesh_of(2, 2)
    expected = nmjax.mvue(x, key)
    with jax.set_mesh(mesh):
        actual = nmjax.mvue(cut(x, mesh, P("a", "b")), key)
        with pytest.raises(ValueError, match="axis 0 .*parts of 2, .* m = 4 "):
            nmjax.mvue(cut(x[:8], mesh, P(("a", "b"))), key)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(a.sharding.spec == P("a", "b") for a in actual)


# Outputs


def test_a_bi_mask_layer_whose_outputs_are_cut(rng):
    """The state, its refresh, value and gradient; tokens are cut the other way."""
    recipe = recipes.bi_mask("2:4", refresh=2, reorder=2)
    rules, x = [nmjax.Rule(".*", recipe)], integers(rng, 4, 8, 8)
    dense = nn.Dense(16)
    model, plan = nmjax.sparsify(dense, rules), nmjax.plan(dense, rules, x)
    params = {"kernel": weight(rng, 8, 16), "bias": weight(rng, 16)}
    specs = {"kernel": P(None, "b"), "bias": P("b")}

    @jax.jit
    def run(params, x):
        state = nmjax.init_state(params, plan)
        moved = jax.tree.map(lambda w: w[::-1] * 1.5, params)
        after = nmjax.refresh(state, moved, plan, 2)
        loss = lambda p: jnp.sum(model.apply({"params": p, "nm": after}, x) ** 2)  # noqa: E731
        return (state, after), jax.value_and_grad(loss)(moved)

    (states, products), mesh = run(params, x), mesh_of(2, 2)
    with jax.set_mesh(mesh):
        params = {name: cut(params[name], mesh, specs[name]) for name in params}
        actual = run(params, cut(x, mesh, P(None, "a")))
    jax.tree.map(np.testing.assert_array_equal, actual[0], states)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3),
        actual[1],
        products,
    )
    for name in ("mask", "mask_dgrad"):
        assert actual[0][1]["kernel"][name].sharding.spec == specs["kernel"]


@pytest.mark.parametrize(
    ("shape", "stacked", "spec"),
    [
        ((8, 16), (), P("a", "b")),
        ((2, 8, 16), (-3,), P("a", None, "b")),
        ((2, 2, 8, 16), (), P(None, None, "a", "b")),
        pytest.param((8, 16), (), P(None, ("a", "b")), marks=pytest.mark.slow),
        pytest.param((2, 8, 16), (-3,), P("a"), marks=pytest.mark.slow),
        pytest.param((2, 2, 8, 16), (-3, -4), P("b", "a"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_masks_and_orders_of_cut_outputs(rng, shape, stacked, spec):
    """Matrices, kernels of convolutions, and stacked weights."""
    w, mesh = weight(rng, *shape), mesh_of(2, 2)
    sparsity = Sparsity("w", BI_MASK, -2, -1, None, stacked)

    @jax.jit
    def run(w):
        entry = sparsity.init(w)
        order = sparsity.search_order(w, entry["output_order"], 1)
        loss = lambda w: jnp.sum(sparsity.apply(w, entry) ** 2)  # noqa: E731
        return order, sparsity.masks(w, entry), jax.grad(loss)(w)

    expected = run(w)
    with jax.set_mesh(mesh):
        w = cut(w, mesh, spec)
        actual = run(w)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for mask in actual[1].values():
        assert mask.sharding.is_equivalent_to(w.sharding, w.ndim)


def test_an_order_may_be_cut_too(rng):
    w, mesh = weight(rng, 8, 16), mesh_of(2, 2)
    sparsity = Sparsity("w", BI_MASK, -2, -1)
    entry = sparsity.init(jnp.asarray(w))
    expected = sparsity.choose_masks(jnp.asarray(w), entry)
    with jax.set_mesh(mesh):
        entry = {"output_order": cut(entry["output_order"], mesh, P(None, "b"))}
        actual = sparsity.choose_masks(cut(w, mesh, P(None, "b")), entry)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_only_outputs_are_gathered(rng):
    """No device receives the inputs of another."""
    w, mesh = weight(rng, 8, 16), mesh_of(2, 2)
    run = lambda w, e: mask_in_order(w, e, "2:4", jnp.arange(16)[::-1])  # noqa: E731
    with jax.set_mesh(mesh):
        w, e = (cut(a, mesh, P("a", "b")) for a in (w, nmjax.magnitude_mask(w, "2:4")))
        text = jax.jit(run).lower(w, e).compile().as_text()
    assert "f32[4,16]" in text
    assert "[8,16]" not in text


def test_outputs_whose_groups_straddle_devices_are_refused(rng):
    """By their path, as along every other axis of groups."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))
    rules, x = [nmjax.Rule(".*", BI_MASK)], jnp.ones((4, 8))
    plan = nmjax.plan(nn.Dense(24), rules, x)
    init = jax.jit(lambda params: nmjax.init_state(params, plan))
    message = "kernel: axis -1 of size 24 is sharded in parts of 6, .* groups of 4"
    with jax.set_mesh(mesh), pytest.raises(nmjax.PlanError, match=message):
        init({"kernel": cut(weight(rng, 8, 24), mesh, P(None, "a")), "bias": x[0]})

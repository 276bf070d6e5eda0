"""The three GEMMs against lax and its autodiff: same bits, same number of GEMMs."""

import traceback
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.ops import nm_conv, nm_dot_general

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATMUL = (((1,), (0,)), ((), ()))


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def small_integers(rng, *shape):
    """Floats whose sums of products are exact in any order."""
    return jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)


def fprop_dgrad_wgrad(gemm, x, w):
    """Jitted `(y, dx, dw)` for a cotangent of many values."""

    @jax.jit
    def run(x, w):
        y, vjp = jax.vjp(gemm, x, w)
        dy = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *vjp(dy.astype(y.dtype))

    return run(x, w)


def assert_same(ours, theirs):
    for a, b, name in zip(ours, theirs, ("fprop", "dgrad", "wgrad"), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def count(name: str, jaxpr: Any) -> int:
    """How often a primitive occurs in a jaxpr and in those inside it."""
    is_jaxpr = lambda x: isinstance(x, jex.core.ClosedJaxpr | jex.core.Jaxpr)  # noqa: E731
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        total += sum(count(name, value) for value in inner if is_jaxpr(value))
    return total


# Values and gradients

DOTS = {
    "dense": ((5, 8), (8, 6), MATMUL, {}),
    "leading dims": ((2, 3, 8), (8, 6), (((2,), (0,)), ((), ())), {}),
    "batch": ((4, 5, 8), (4, 8, 6), (((2,), (1,)), ((0,), (0,))), {}),
    "two batch": ((2, 5, 3, 8), (3, 8, 2, 6), (((3,), (1,)), ((0, 2), (2, 0))), {}),
    "two contracted": ((5, 4, 8), (4, 8, 6), (((1, 2), (0, 1)), ((), ())), {}),
    "crossed": ((4, 5, 8), (8, 4, 6), (((0, 2), (1, 0)), ((), ())), {}),
    "transposed w": ((5, 8), (6, 8), (((1,), (1,)), ((), ())), {}),
    "lists": ((5, 8), (8, 6), [[[1], [0]], [[], []]], {}),
    "vector": ((8,), (8, 6), (((0,), (0,)), ((), ())), {}),
    "precision": ((5, 8), (8, 6), MATMUL, {"precision": "highest"}),
    "wide output": ((5, 8), (8, 6), MATMUL, {"preferred_element_type": jnp.float32}),
}


def in_dtypes(cases, narrow):
    """Every case in float32, those whose name is in `narrow` in bfloat16 too."""
    wide = [(name, jnp.float32) for name in cases]
    return pytest.mark.parametrize(
        ("case", "dtype"), wide + [(name, jnp.bfloat16) for name in narrow]
    )


@in_dtypes(DOTS, narrow=["dense", "batch", "two contracted", "wide output"])
def test_dot_general_is_that_of_lax(rng, case, dtype):
    x_shape, w_shape, numbers, options = DOTS[case]
    x, w = normal(rng, *x_shape, dtype=dtype), normal(rng, *w_shape, dtype=dtype)
    ours = fprop_dgrad_wgrad(
        lambda x, w: nm_dot_general(x, w, numbers, **options), x, w
    )
    theirs = fprop_dgrad_wgrad(
        lambda x, w: lax.dot_general(x, w, numbers, **options), x, w
    )
    assert_same(ours, theirs)
    assert ours[1].dtype == ours[2].dtype == dtype


HWIO = ("NHWC", "HWIO", "NHWC")
CONVS: dict[str, Any] = {
    "3x3": ((2, 7, 6, 8), (3, 3, 8, 4), ((1, 1), "SAME"), {}),
    "1x1": ((2, 7, 6, 8), (1, 1, 8, 4), ((1, 1), "VALID"), {}),
    "stride 2": ((2, 7, 6, 8), (3, 3, 8, 4), ((2, 2), "SAME"), {}),
    "stride 2, 1": ((2, 7, 6, 8), (3, 3, 8, 4), ((2, 1), "VALID"), {}),
    "pad list": ((2, 7, 6, 8), (3, 3, 8, 4), ((1, 1), [(0, 2), (1, 0)]), {}),
    "pad lists": ((2, 7, 6, 8), (3, 3, 8, 4), ([2, 1], [[1, 1], [2, 0]]), {}),
    "kernel dilation": (
        (2, 9, 8, 8),
        (3, 3, 8, 4),
        ((1, 1), "SAME"),
        {"rhs_dilation": [2, 3]},
    ),
    "input dilation": (
        (2, 5, 4, 8),
        (3, 3, 8, 4),
        ((1, 1), [(1, 1), (2, 1)]),
        {"lhs_dilation": (2, 3)},
    ),
    "all dilations": (
        (2, 9, 8, 8),
        (3, 2, 8, 4),
        ((2, 1), [(2, 1), (0, 1)]),
        {"lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    ),
    "2 groups": (
        (2, 7, 6, 8),
        (3, 3, 4, 6),
        ((1, 1), "SAME"),
        {"feature_group_count": 2},
    ),
    "4 groups": (
        (2, 7, 6, 16),
        (3, 3, 4, 8),
        ((2, 2), "SAME"),
        {"feature_group_count": 4},
    ),
    "batch groups": (
        (4, 7, 6, 8),
        (3, 3, 8, 4),
        ((1, 1), "SAME"),
        {"batch_group_count": 2},
    ),
    "1-D": (
        (2, 9, 8),
        (3, 8, 4),
        ((2,), "SAME"),
        {"dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "3-D": (
        (2, 5, 4, 5, 8),
        (3, 3, 2, 8, 4),
        ((1, 2, 1), "SAME"),
        {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
    "wide output": (
        (2, 7, 6, 8),
        (3, 3, 8, 4),
        ((1, 1), "SAME"),
        {"preferred_element_type": jnp.float32},
    ),
}


@in_dtypes(CONVS, narrow=["3x3", "stride 2", "2 groups", "wide output"])
def test_conv_is_that_of_lax(rng, case, dtype):
    x_shape, w_shape, args, options = CONVS[case]
    options = {"dimension_numbers": HWIO, **options}
    x, w = normal(rng, *x_shape, dtype=dtype), normal(rng, *w_shape, dtype=dtype)
    ours = fprop_dgrad_wgrad(lambda x, w: nm_conv(x, w, *args, **options), x, w)
    theirs = fprop_dgrad_wgrad(
        lambda x, w: lax.conv_general_dilated(x, w, *args, **options), x, w
    )
    assert_same(ours, theirs)
    assert ours[1].dtype == ours[2].dtype == dtype


def test_conv_takes_dimension_numbers_as_flax_makes_them(rng):
    x, w = normal(rng, 2, 7, 6, 8), normal(rng, 3, 3, 8, 4)
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, HWIO)
    assert_same(
        fprop_dgrad_wgrad(
            lambda x, w: nm_conv(x, w, (1, 1), "SAME", dimension_numbers=numbers), x, w
        ),
        fprop_dgrad_wgrad(
            lambda x, w: lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=numbers
            ),
            x,
            w,
        ),
    )


def dot(x, w):
    return nm_dot_general(x, w, MATMUL)


def conv(x, w):
    return nm_conv(x, w, (1, 1), "SAME", dimension_numbers=HWIO)


def test_dgrad_reads_the_sparse_weight_and_wgrad_is_dense(rng):
    """With values by hand: dx = dy Wᵀ, dw = xᵀ dy, dropped entries included."""
    x, dy = small_integers(rng, 5, 8), small_integers(rng, 5, 6)
    w = small_integers(rng, 8, 6) * jnp.asarray(rng.random((8, 6)) < 0.5, jnp.float32)
    y, vjp = jax.vjp(dot, x, w)
    dx, dw = vjp(dy)
    x, w, dy = np.asarray(x), np.asarray(w), np.asarray(dy)
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, dy @ w.T)
    np.testing.assert_array_equal(dw, x.T @ dy)
    assert np.count_nonzero(np.asarray(dw)[w == 0])


# How many GEMMs run


@pytest.mark.parametrize(
    ("gemm", "primitive", "shapes"),
    [
        (dot, "dot_general", ((5, 8), (8, 6))),
        (conv, "conv_general_dilated", ((2, 7, 6, 8), (3, 3, 8, 4))),
    ],
)
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, 3),
        (jax.checkpoint_policies.dots_saveable, 3),
        (jax.checkpoint_policies.everything_saveable, 3),
        (jax.checkpoint_policies.nothing_saveable, 4),
    ],
)
def test_a_gradient_runs_three_gemms(rng, gemm, primitive, shapes, policy, expected):
    layer = lambda x, w: jnp.tanh(gemm(x, w))  # noqa: E731
    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    loss = lambda x, w: jnp.sum(layer(x, w))  # noqa: E731
    x, w = (normal(rng, *shape) for shape in shapes)
    jaxpr = jax.make_jaxpr(jax.jit(jax.grad(loss, (0, 1))))(x, w)
    assert count(primitive, jaxpr) == expected


@pytest.mark.parametrize("argument", [0, 1])
def test_a_gradient_that_nobody_asks_for_is_not_computed(rng, argument):
    x, w = normal(rng, 5, 8), normal(rng, 8, 6)
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.tanh(dot(x, w))), argument)
    jaxpr = jax.make_jaxpr(jax.jit(gradient))(x, w)
    compiled = jax.jit(gradient).lower(x, w).compile().as_text()
    assert count("dot_general", jaxpr) <= 3
    assert compiled.count(" dot(") <= 2


def test_equal_geometry_shares_a_trace(rng):
    x, w = normal(rng, 5, 8), normal(rng, 8, 6)
    traces = []

    @jax.jit
    def run(x, w):
        traces.append(None)
        return dot(x, w)

    run(x, w), run(x + 1, w)
    assert len(traces) == 1


# Transformations


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize(
    ("gemm", "reference", "shapes"),
    [
        (dot, lambda x, w: lax.dot_general(x, w, MATMUL), ((5, 8), (8, 6))),
        (
            conv,
            lambda x, w: lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=HWIO
            ),
            ((2, 5, 4, 8), (3, 3, 8, 4)),
        ),
    ],
)
def test_vmap(rng, gemm, reference, shapes, axes):
    x, w = (
        small_integers(rng, *(() if axis is None else (3,)), *shape)
        for axis, shape in zip(axes, shapes, strict=True)
    )

    def run(gemm):
        def loss(x, w):
            return jnp.sum(jax.vmap(gemm, axes)(x, w) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    ours, theirs = run(gemm), run(reference)
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


def test_per_example_gradients(rng):
    x, w = small_integers(rng, 3, 8), small_integers(rng, 8, 6)
    loss = lambda w, x: jnp.sum(dot(x[None], w) ** 2)  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, x)
    for i in range(3):
        np.testing.assert_array_equal(each[i], 2 * np.outer(x[i], np.asarray(x[i]) @ w))


@pytest.mark.parametrize("policy", [None, "dots_saveable", "nothing_saveable"])
def test_scan_over_stacked_weights(rng, policy):
    x, w = small_integers(rng, 5, 8), small_integers(rng, 3, 8, 8)

    def run(gemm):
        layer = lambda x, w: (jnp.clip(gemm(x, w), -4, 4), None)  # noqa: E731
        if policy:
            named = getattr(jax.checkpoint_policies, policy)
            layer = jax.checkpoint(layer, policy=named)
        loss = lambda x, w: jnp.sum(lax.scan(layer, x, w)[0] ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    ours, theirs = run(dot), run(lambda x, w: lax.dot_general(x, w, MATMUL))
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


def test_second_derivatives_are_those_of_lax(rng):
    x, w = small_integers(rng, 3, 4), small_integers(rng, 4, 2)
    loss = lambda gemm: lambda w: jnp.sum(gemm(x, w) ** 2)  # noqa: E731
    reference = loss(lambda x, w: lax.dot_general(x, w, MATMUL))
    np.testing.assert_array_equal(jax.hessian(loss(dot))(w), jax.hessian(reference)(w))


# Devices


def mesh_of(name: str, axis_type: AxisType = AxisType.Auto):
    return jax.make_mesh((4,), (name,), axis_types=(axis_type,))


@pytest.mark.parametrize(
    ("gemm", "shapes"),
    [(dot, ((8, 8), (8, 6))), (conv, ((4, 5, 4, 8), (3, 3, 8, 4)))],
)
def test_shard_map_sums_wgrad_over_the_batch_axis(rng, gemm, shapes):
    x, w = (small_integers(rng, *shape) for shape in shapes)
    gradient = jax.grad(lambda w, x: jnp.sum(gemm(x, w) ** 2))
    sharded = jax.shard_map(
        gradient, mesh=mesh_of("data"), in_specs=(P(), P("data")), out_specs=P()
    )
    np.testing.assert_array_equal(jax.jit(sharded)(w, x), jax.jit(gradient)(w, x))


def test_shard_map_sums_dgrad_over_the_output_axis(rng):
    x, w = small_integers(rng, 5, 8), small_integers(rng, 8, 16)
    gradient = jax.grad(lambda x, w: jnp.sum(dot(x, w) ** 2), (0, 1))
    sharded = jax.shard_map(
        gradient,
        mesh=mesh_of("model"),
        in_specs=(P(), P(None, "model")),
        out_specs=(P(), P(None, "model")),
    )
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(sharded)(x, w), jax.jit(gradient)(x, w)
    )


def test_shard_map_over_the_contracted_axis(rng):
    x, w = small_integers(rng, 5, 16), small_integers(rng, 16, 6)

    def loss(x, w):
        return jnp.sum(lax.psum(dot(x, w), "model") ** 2)

    sharded = jax.shard_map(
        jax.value_and_grad(loss, (0, 1)),
        mesh=mesh_of("model"),
        in_specs=(P(None, "model"), P("model")),
        out_specs=(P(), (P(None, "model"), P("model"))),
    )
    value, gradients = jax.jit(sharded)(x, w)
    whole = jax.value_and_grad(lambda x, w: jnp.sum(dot(x, w) ** 2), (0, 1))
    expected = jax.jit(whole)(x, w)
    assert value == expected[0]
    jax.tree.map(np.testing.assert_array_equal, gradients, expected[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [(P("data", None), P(None, None)), (P(None, None), P(None, "data"))],
)
def test_sharded_operands(rng, axis_type, x_spec, w_spec):
    x, w = small_integers(rng, 8, 8), small_integers(rng, 8, 16)
    gradient = jax.grad(lambda x, w: jnp.sum(dot(x, w) ** 2), (0, 1))
    expected = jax.jit(gradient)(x, w)
    mesh = mesh_of("data", axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        w = jax.device_put(w, NamedSharding(mesh, w_spec))
        dx, dw = jax.jit(gradient)(x, w)
    np.testing.assert_array_equal(dx, expected[0])
    np.testing.assert_array_equal(dw, expected[1])
    if axis_type == AxisType.Explicit:
        assert (dx.sharding.spec, dw.sharding.spec) == (x_spec, w_spec)


# Forward mode


@pytest.mark.parametrize("gemm", [dot, conv])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_forward_mode_names_densify(gemm, wrap):
    x, w = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 1, 8, 4))
    if gemm is dot:
        x, w = x[0, 0], w[0, 0]
    for transform in (
        lambda: jax.jvp(wrap(gemm), (x, w), (x, w)),
        lambda: jax.jacfwd(wrap(gemm))(x, w),
        lambda: jax.linearize(wrap(gemm), x, w)[1](x, w),
    ):
        with pytest.raises(TypeError, match="forward-mode") as error:
            transform()
        text = "".join(traceback.format_exception(error.value))
        assert "nmjax.densify(model)" in text

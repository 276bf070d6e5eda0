"""The masked weight and its gradient, against the equations in NumPy."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax import estimators
from nmjax.estimators import masked, sr_ste, ste, straight_through
from tests import oracle

pytestmark = pytest.mark.usefixtures("strict_promotion")

DECAY = 2.0**-12  # with dyadic weights λ(1 − E)W is exact, in whatever order


def dyadic(rng, *shape):
    """Floats whose sums and products with each other are exact."""
    return (rng.integers(-64, 64, shape) / 16).astype(np.float32)


def weighted_sum(c):
    """loss(W_s) = sum(W_s * C), whose gradient with respect to W_s is C."""
    return lambda w_s: jnp.sum(w_s * c.astype(w_s.dtype))


# Values


def test_known_group():
    w = jnp.asarray([1.0, -3.0, 2.0, -0.5])
    np.testing.assert_array_equal(ste(w, "2:4", axis=-1), [0, -3, 2, 0])
    np.testing.assert_array_equal(sr_ste(w, "2:4", axis=-1), [0, -3, 2, 0])


@pytest.mark.parametrize(
    ("pattern", "axis", "shape"),
    [
        ("2:4", -2, (8, 6)),
        ("1:4", -1, (6, 8)),
        ("4:8", -3, (16, 3, 2)),
        ("2:4", 0, (8, 3)),
        ("2:4", -2, (3, 3, 8, 5)),
        ("4:4", -2, (8, 6)),
        ("1:2", -1, (4,)),
    ],
)
@pytest.mark.parametrize("function", [ste, sr_ste])
def test_values_are_the_masked_weight(rng, function, pattern, axis, shape):
    w = rng.standard_normal(shape).astype(np.float32)
    n, m = map(int, pattern.split(":"))
    expected = oracle.masked(w, oracle.magnitude_mask(w, n, m, axis))
    out = function(jnp.asarray(w), pattern, axis)
    np.testing.assert_array_equal(out, expected)
    assert out.dtype == jnp.float32


def test_axis_defaults_to_the_contracted_one(rng):
    w = jnp.asarray(rng.standard_normal((3, 3, 8, 4)), jnp.float32)
    np.testing.assert_array_equal(ste(w, "2:4"), ste(w, "2:4", axis=2))
    np.testing.assert_array_equal(sr_ste(w, "2:4"), sr_ste(w, "2:4", axis=2))


def test_nan_and_negative_zero_stay_out():
    w = jnp.asarray([jnp.nan, 1.0, -0.0, -2.0])
    c = jnp.asarray([5.0, -0.0, -0.0, 3.0])
    np.testing.assert_array_equal(ste(w, "2:4", -1), [0, 1, 0, -2])
    gradient = jax.grad(lambda w: weighted_sum(c)(ste(w, "2:4", -1)))(w)
    np.testing.assert_array_equal(gradient, c)
    assert np.signbit(gradient).tolist() == np.signbit(c).tolist()


# Gradients


@pytest.mark.parametrize("axis", [-1, -2])
def test_sr_ste_gradient_is_the_equation(rng, axis):
    w, c = dyadic(rng, 8, 16), dyadic(rng, 8, 16)
    gradient = jax.grad(
        lambda w: weighted_sum(jnp.asarray(c))(sr_ste(w, "2:4", axis, decay=DECAY))
    )(jnp.asarray(w))
    mask = oracle.magnitude_mask(w, 2, 4, axis)
    np.testing.assert_array_equal(gradient, oracle.sr_ste_gradient(c, w, mask, DECAY))
    assert (np.asarray(gradient) != c).any()


@pytest.mark.parametrize("decay", [0, 0.0, np.float32(0), jnp.zeros(())])
def test_without_decay_it_is_straight_through_exactly(rng, decay):
    w, c = rng.standard_normal((2, 8, 4)).astype(np.float32)
    gradient = jax.grad(
        lambda w: weighted_sum(jnp.asarray(c))(sr_ste(w, "2:4", decay=decay))
    )(jnp.asarray(w))
    np.testing.assert_array_equal(gradient, c)


def test_pruned_weights_receive_the_whole_gradient_of_the_masked_weight(rng):
    # Small, for 1 - tanh² cancels where tanh is near 1.
    w, x = rng.standard_normal((2, 8, 4)).astype(np.float32) / 2
    gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(ste(w, "2:4") * x)))(jnp.asarray(w))
    w_s = oracle.masked(w, oracle.magnitude_mask(w, 2, 4))
    np.testing.assert_allclose(gradient, x * (1 - np.tanh(w_s * x) ** 2), rtol=1e-5)


def test_every_use_of_the_weight_decays_it(rng):
    w = dyadic(rng, 8, 4)

    def loss(w):
        return jnp.sum(sr_ste(w, "2:4", decay=DECAY)) + jnp.sum(
            sr_ste(w, "2:4", decay=DECAY)
        )

    mask = oracle.magnitude_mask(w, 2, 4)
    expected = oracle.sr_ste_gradient(np.full_like(w, 2), w, mask, 2 * DECAY)
    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(w)), expected)


def test_gradient_with_respect_to_decay_is_zero(rng):
    w = jnp.asarray(dyadic(rng, 8, 4))
    gradient = jax.grad(lambda d: jnp.sum(sr_ste(w, "2:4", decay=d) ** 2))(0.5)
    assert gradient == 0


def test_traced_decay_does_not_retrace(rng):
    w = dyadic(rng, 8, 4)
    traces = []

    @jax.jit
    def gradient(w, decay):
        traces.append(None)
        return jax.grad(lambda w: jnp.sum(sr_ste(w, "2:4", decay=decay)))(w)

    mask = oracle.magnitude_mask(w, 2, 4)
    for decay in (DECAY, 2 * DECAY, 0.0):
        expected = oracle.sr_ste_gradient(np.ones_like(w), w, mask, decay)
        np.testing.assert_array_equal(gradient(jnp.asarray(w), decay), expected)
    assert len(traces) == 1


def test_equal_patterns_share_a_trace(rng):
    w = jnp.asarray(dyadic(rng, 8, 4))
    traces = []

    def masked_weight(w, pattern):
        traces.append(None)
        return sr_ste(w, pattern)

    jitted = jax.jit(masked_weight, static_argnums=1)
    jitted(w, "2:4"), jitted(w, "2:4")
    assert len(traces) == 1


def test_masked_gradient_reaches_kept_weights_only(rng):
    w, c = dyadic(rng, 8, 4), dyadic(rng, 8, 4)
    mask = oracle.magnitude_mask(w, 2, 4)
    value, gradient = jax.value_and_grad(
        lambda w: weighted_sum(jnp.asarray(c))(masked(w, jnp.asarray(mask)))
    )(jnp.asarray(w))
    np.testing.assert_array_equal(gradient, oracle.masked(c, mask))
    assert value == np.sum(oracle.masked(w, mask) * c)


def test_straight_through_takes_any_mask(rng):
    w, c = dyadic(rng, 6, 5), dyadic(rng, 6, 5)
    mask = rng.random((6, 5)) < 0.3
    out, vjp = jax.vjp(
        lambda w: straight_through(w, jnp.asarray(mask), DECAY), jnp.asarray(w)
    )
    np.testing.assert_array_equal(out, oracle.masked(w, mask))
    expected = oracle.sr_ste_gradient(c, w, mask, DECAY)
    np.testing.assert_array_equal(vjp(jnp.asarray(c))[0], expected)


def test_decay_term_is_the_difference_between_sr_ste_and_ste(rng):
    w = jnp.asarray(dyadic(rng, 8, 4))
    mask = jnp.asarray(oracle.magnitude_mask(w, 2, 4))
    gradients = [
        jax.grad(lambda w, d=d: jnp.sum(straight_through(w, mask, d)))(w)
        for d in (0, DECAY)
    ]
    term = estimators.decay_term(w, mask, DECAY)
    np.testing.assert_array_equal(gradients[1] - gradients[0], term)


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights(rng, dtype):
    w = jnp.asarray(dyadic(rng, 8, 4), dtype)
    out, vjp = jax.vjp(lambda w: sr_ste(w, "2:4", decay=DECAY), w)
    mask = oracle.magnitude_mask(w, 2, 4)
    np.testing.assert_array_equal(out, oracle.masked(w, mask))
    (gradient,) = vjp(jnp.zeros_like(out))
    assert out.dtype == gradient.dtype == dtype
    expected = np.float32(DECAY) * oracle.masked(np.asarray(w, np.float32), ~mask)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_, np.complex64])
@pytest.mark.parametrize("function", [ste, sr_ste])
def test_weights_that_have_no_gradient_are_refused(function, dtype):
    with pytest.raises(ValueError, match=rf"{np.dtype(dtype).name}.*float"):
        function(np.ones((8, 4), dtype), "2:4")


def test_malformed_arguments_are_refused(rng):
    w = jnp.ones((8, 6))
    with pytest.raises(ValueError, match="N:M pattern"):
        ste(w, "2:4:1")
    with pytest.raises(ValueError, match="size 6, not a multiple of m = 4"):
        sr_ste(w, "2:4", axis=-1)
    with pytest.raises(ValueError, match="out of range"):
        ste(w, "2:4", axis=-3)


# Transformations


def value_and_gradient(w, c):
    return jax.value_and_grad(lambda w: weighted_sum(c)(sr_ste(w, "2:4", decay=DECAY)))(
        w
    )


def expected_value_and_gradient(w, c):
    mask = oracle.magnitude_mask(w, 2, 4)
    value = np.sum(oracle.masked(w, mask) * c)
    return value, oracle.sr_ste_gradient(c, w, mask, DECAY)


def test_jit(rng):
    w, c = dyadic(rng, 8, 4), dyadic(rng, 8, 4)
    value, gradient = jax.jit(value_and_gradient)(jnp.asarray(w), jnp.asarray(c))
    expected = expected_value_and_gradient(w, c)
    assert value == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])


def test_vmap(rng):
    w, c = dyadic(rng, 3, 8, 4), dyadic(rng, 8, 4)
    values, gradients = jax.vmap(value_and_gradient, (0, None))(
        jnp.asarray(w), jnp.asarray(c)
    )
    for i in range(3):
        expected = expected_value_and_gradient(w[i], c)
        assert values[i] == expected[0]
        np.testing.assert_array_equal(gradients[i], expected[1])


def test_scan_over_stacked_weights(rng):
    w, c = dyadic(rng, 3, 8, 4), dyadic(rng, 3, 8, 4)

    def loss(w):
        def body(total, wc):
            return total + weighted_sum(wc[1])(sr_ste(wc[0], "2:4", decay=DECAY)), None

        return jax.lax.scan(body, 0.0, (w, jnp.asarray(c)))[0]

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(w))
    expected = [expected_value_and_gradient(w[i], c[i])[1] for i in range(3)]
    np.testing.assert_array_equal(gradient, np.stack(expected))


def test_remat(rng):
    w, c = dyadic(rng, 8, 4), dyadic(rng, 8, 4)
    loss = jax.checkpoint(
        lambda w: weighted_sum(jnp.asarray(c))(sr_ste(w, "2:4", decay=DECAY))
    )
    expected = expected_value_and_gradient(w, c)
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_array_equal(gradient(jnp.asarray(w)), expected[1])


@pytest.mark.parametrize("decay", [DECAY, "traced"])
def test_shard_map_over_the_columns(rng, decay):
    w, c = dyadic(rng, 8, 16), dyadic(rng, 8, 16)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    @jax.jit
    def gradient(w, c, traced):
        rate = traced if decay == "traced" else decay

        def shard(w, c):
            return jax.grad(lambda w: weighted_sum(c)(sr_ste(w, "2:4", decay=rate)))(w)

        spec = P(None, "model")
        return jax.shard_map(shard, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(
            w, c
        )

    out = gradient(jnp.asarray(w), jnp.asarray(c), DECAY)
    np.testing.assert_array_equal(out, expected_value_and_gradient(w, c)[1])


@pytest.mark.slow
def test_shard_map_with_a_replicated_weight_adds_the_decay_once(rng):
    """The weight's gradient is summed over the mesh; λ(1 − E)W is not."""
    w, c = dyadic(rng, 8, 4), dyadic(rng, 4, 8, 4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def shard(w, c):
        return jax.grad(lambda w: weighted_sum(c[0])(sr_ste(w, "2:4", decay=DECAY)))(w)

    out = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(
        jnp.asarray(w), jnp.asarray(c)
    )
    np.testing.assert_array_equal(out, expected_value_and_gradient(w, c.sum(0))[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None), P(None, None)])
def test_sharded_weight(rng, axis_type, spec):
    w, c = dyadic(rng, 16, 8), dyadic(rng, 16, 8)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        args = jax.device_put((w, c), sharding)
        value, gradient = jax.jit(value_and_gradient)(*args)
    expected = expected_value_and_gradient(w, c)
    assert value == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    if axis_type == AxisType.Explicit:
        assert gradient.sharding.spec == spec


@pytest.mark.parametrize("function", [ste, sr_ste])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_forward_mode_names_densify(function, wrap):
    w = jnp.ones((8, 4))
    with pytest.raises(TypeError, match="forward-mode") as error:
        jax.jvp(wrap(lambda w: function(w, "2:4")), (w,), (w,))
    assert "nmjax.densify(model)" in "".join(traceback.format_exception(error.value))


# Multipliers and the soft threshold


def test_multipliers_act_on_the_gradient_before_the_decay():
    w = jnp.asarray([[1.0], [-3.0], [2.0], [-0.5]])  # kept: -3 and 2
    mask = estimators.magnitude_mask(w, "2:4")
    cotangent = jnp.asarray([[1.0], [2.0], [3.0], [4.0]])

    def gradient(decay):
        masked = lambda w: estimators.straight_through(w, mask, decay, (2.0, 0.5))  # noqa: E731
        value, vjp = jax.vjp(masked, w)
        np.testing.assert_array_equal(value[:, 0], [0, -3, 2, 0])
        return vjp(cotangent)[0][:, 0]

    np.testing.assert_array_equal(gradient(0), [0.5, 4, 6, 2])
    np.testing.assert_array_equal(gradient(0.5), [1.0, 4, 6, 1.75])


def test_s_ste_by_hand():
    w = jnp.asarray([[1.0], [-3.0], [2.0], [-0.5]])
    # t = 1; S = (0, -2, 1, 0); beta = (6 + 2) / (4 + 1)
    value, vjp = jax.vjp(lambda w: estimators.s_ste(w, "2:4"), w)
    np.testing.assert_allclose(value[:, 0], [0, -3.2, 1.6, 0], rtol=1e-6)
    cotangent = jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)  # the identity's
    fixed = estimators.s_ste(w, "2:4", scale=0.5)
    np.testing.assert_allclose(fixed[:, 0], [0, -1, 0.5, 0])


@pytest.mark.parametrize("axis", [-2, -1, 0])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (4, 4)])
def test_the_soft_threshold_is_the_definition(rng, axis, n, m):
    w = rng.normal(size=(8, 8, 8)).astype(np.float32)
    rows = np.moveaxis(w, axis, -1).reshape(-1, m)
    order = np.sort(np.abs(rows), -1)
    t = order[:, m - n - 1 : m - n] if n < m else np.zeros((len(rows), 1))
    s = np.sign(rows) * np.maximum(np.abs(rows) - t, 0)
    expected = np.moveaxis(s.reshape(np.moveaxis(w, axis, -1).shape), -1, axis)
    beta = (w * expected).sum(dtype=np.float64) / (expected**2).sum(dtype=np.float64)
    actual = jax.jit(lambda w: estimators.s_ste(w, f"{n}:{m}", axis))(w)
    np.testing.assert_allclose(actual, beta * expected, rtol=1e-4, atol=1e-6)


def test_the_soft_threshold_is_continuous_where_the_order_changes():
    below = jnp.asarray([[1.0], [2.0 - 1e-6], [2.0], [3.0]])
    above = jnp.asarray([[1.0], [2.0 + 1e-6], [2.0], [3.0]])
    hard = [estimators.ste(w, "2:4")[1, 0] for w in (below, above)]
    soft = [estimators.s_ste(w, "2:4", scale=1.0)[1, 0] for w in (below, above)]
    assert abs(hard[0] - hard[1]) > 1.9
    assert abs(soft[0] - soft[1]) < 3e-6


def test_a_soft_threshold_of_constant_weights_is_zero_and_not_nan():
    value = estimators.s_ste(jnp.ones((8, 2)), "2:4")
    np.testing.assert_array_equal(value, 0)


def test_stacked_weights_have_a_scale_each(rng):
    w = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
    mask = estimators.magnitude_mask(w, "2:4")
    scale = estimators.soft_threshold_scale(w, mask, "2:4", over=(-2, -1))
    assert scale.shape == (3, 1, 1)
    for i in range(3):
        one = estimators.soft_threshold_scale(w[i], mask[i], "2:4")
        np.testing.assert_allclose(scale[i], one, rtol=1e-6)

"""nm_matmul: the five uses of training, derivatives, batching, and what it refuses."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from pallas_kernels import (
    NMCompressed,
    compress,
    decompress,
    dispatch,
    matmul,
    nm_matmul,
    ptx,
    reference,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

T, K, N = 24, 16, 12  # tokens, features in, features out


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def masked(x, axis):
    return jnp.where(nmjax.magnitude_mask(x, "2:4", axis=axis), x, jnp.zeros_like(x))


def compressed(x, axis):
    return compress(x, nmjax.magnitude_mask(x, "2:4", axis=axis), axis=axis)


def product(x, y):
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)


@pytest.fixture(params=["reference", "through a kernel"])
def implementation(request, monkeypatch):
    """The reference, and the same behind the rules that kernels are called with."""
    if request.param == "reference":
        return "reference"
    fake = types.SimpleNamespace(gemm=reference.gemm, unavailable=lambda *_: None)
    monkeypatch.setattr(matmul, "_kernel", lambda name: fake)
    return "sm90"


def five_uses(x, w, dy):
    """(lhs, rhs, options), and the dense product it equals."""
    t = jnp.transpose
    yield "fprop W24", (x, compressed(w, -2)), {}, product(x, masked(w, -2))
    yield "dgrad W24ᵀ", (dy, compressed(t(w), -2)), {}, product(dy, masked(w, -1).T)
    yield "fprop x24", (compressed(x, -1), w), {}, product(masked(x, -1), w)
    x24_tokens = compressed(t(x), -1)  # groups along the tokens
    yield "wgrad x24ᵀ dy", (x24_tokens, dy), {}, product(masked(x, -2).T, dy)
    dy24_tokens = compressed(t(dy), -1)
    yield "wgrad dy24ᵀ x", (dy24_tokens, x), {}, product(masked(dy, -2).T, x)
    yield (
        "wgrad xᵀ dy24, x as it lies",
        (x, dy24_tokens.T),
        {"transpose_dense": True},
        product(x.T, masked(dy, -2)),
    )
    yield (
        "fprop W24, written transposed",
        (x, compressed(w, -2)),
        {"transpose_out": True},
        product(x, masked(w, -2)).T,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "float32")),
    ],
)
def test_the_five_uses_of_training(rng, gemm_atol, dtype, implementation):
    x, w, dy = (normal(rng, *s, dtype=dtype) for s in ((T, K), (K, N), (T, N)))
    for name, operands, options, expected in five_uses(x, w, dy):
        out = nm_matmul(*operands, implementation=implementation, **options)
        assert out.dtype == dtype, name
        np.testing.assert_allclose(
            np.asarray(out, np.float64),
            expected,
            atol=gemm_atol(dtype, T),
            rtol=0,
            err_msg=name,
        )


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:8", "4:8"])
def test_patterns_without_an_instruction_take_the_portable_path(rng, pattern):
    x, w = normal(rng, T, K), normal(rng, K, N)
    mask = nmjax.magnitude_mask(w, pattern)
    out = nm_matmul(x, compress(w, mask, pattern))
    expected = product(x, np.where(mask, w, 0))
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_integers_accumulate_in_int32(rng):
    x = jnp.asarray(rng.integers(-128, 128, (T, K)), jnp.int8)
    w = jnp.asarray(rng.integers(-128, 128, (K, N)), jnp.int8)
    out = nm_matmul(x, compressed(w, -2))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, product(x, masked(w, -2)))


def test_a_bias_makes_floats_of_integers():
    x, w = jnp.ones((2, 8), jnp.int8), compressed(jnp.ones((8, 4), jnp.int8), -2)
    out = nm_matmul(x, w, bias=jnp.full(4, -0.75), out_dtype=jnp.float32)
    np.testing.assert_array_equal(out, np.full((2, 4), 3.25))
    out = nm_matmul(x, w, bias=jnp.full(4, 3))
    np.testing.assert_array_equal(out, np.full((2, 4), 7))
    assert out.dtype == jnp.int32


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (3, 0, 8), (2, 3, 0)])
def test_empty_products(shape, implementation):
    w = compressed(jnp.ones((shape[-1], 4)), -2)
    out = nm_matmul(jnp.ones(shape), w, implementation=implementation)
    np.testing.assert_array_equal(out, jnp.ones(shape) @ decompress(w))


@pytest.mark.skipif(ptx.JAX_VERSION < (0, 11), reason="needs jax 0.11, as documented")
def test_explicit_axes_may_cut_the_compressed_side(rng):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh, spec = jax.make_mesh((2,), ("d",), explicit), jax.sharding.PartitionSpec
    x, whole = normal(rng, 8, 64), compressed(normal(rng, 64, 32), -2)
    with jax.set_mesh(mesh):
        w = jax.device_put(whole, spec("d"))
        np.testing.assert_array_equal(decompress(w), decompress(whole))
        out = nm_matmul(jax.device_put(x, spec()), w)
        np.testing.assert_allclose(out, x @ decompress(whole), atol=1e-5)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    "activation, function",
    [
        (None, lambda x: x),
        ("relu", lambda x: np.maximum(x, 0)),
        ("squared_relu", lambda x: np.maximum(x, 0) ** 2),
        ("gelu", gelu),
    ],
)
def test_bias_and_activation(rng, activation, function):
    x, w, bias = normal(rng, T, K), normal(rng, K, N), normal(rng, N)
    options = {"bias": bias, "activation": activation}
    expected = function(product(x, masked(w, -2)) + np.asarray(bias, np.float64))
    out = nm_matmul(x, compressed(w, -2), **options)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    out = nm_matmul(x, compressed(w, -2), transpose_out=True, **options)
    np.testing.assert_allclose(out.T, expected, atol=1e-4)
    expected = function(product(masked(x, -1), w) + np.asarray(bias, np.float64))
    out = nm_matmul(compressed(x, -1), w, **options)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_the_result_is_rounded_once(rng):
    x, w = (normal(rng, *s, dtype="bfloat16") for s in ((T, K), (K, N)))
    wide = nm_matmul(x, compressed(w, -2), out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    narrow = nm_matmul(x, compressed(w, -2))
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


def test_leading_axes_flatten(rng, implementation):
    x, w = normal(rng, 2, 3, 4, K), compressed(normal(rng, K, N), -2)
    out = nm_matmul(x, w, implementation=implementation)
    assert out.shape == (2, 3, 4, N)
    np.testing.assert_allclose(out, x @ decompress(w), atol=1e-5)


def test_gradients_reach_the_dense_side_the_bias_and_the_values(rng, implementation):
    x, w, bias = normal(rng, T, K), normal(rng, K, N), normal(rng, N)
    d_out = normal(rng, T, N)

    def sparse(x, w24, bias):
        out = nm_matmul(
            x, w24, bias=bias, activation="gelu", implementation=implementation
        )
        return (out * d_out).sum()

    def dense(x, w, bias):
        return (jax.nn.gelu(x @ w + bias) * d_out).sum()

    w24 = compressed(w, -2)
    dx, dw24, dbias = jax.grad(sparse, (0, 1, 2), allow_int=True)(x, w24, bias)
    expected = jax.grad(dense, (0, 1, 2))(x, masked(w, -2), bias)
    np.testing.assert_allclose(dx, expected[0], atol=1e-5)
    np.testing.assert_allclose(dbias, expected[2], atol=1e-5)
    dvalues = NMCompressed(dw24.values, w24.metadata)
    kept = np.where(nmjax.magnitude_mask(w, "2:4"), expected[1], 0)
    np.testing.assert_allclose(decompress(dvalues), kept, atol=1e-5)


def test_vmap_over_either_side(rng, implementation):
    xs, ws = normal(rng, 3, T, K), normal(rng, 3, K, N)
    biases = normal(rng, 3, N)
    w24s = compressed(ws, -2)

    def f(x, w24, bias=None):
        return nm_matmul(x, w24, bias=bias, implementation=implementation)

    one = jax.tree.map(lambda leaf: leaf[0], w24s)
    ms = masked(ws, -2)
    cases = [
        (jax.vmap(f, (0, None))(xs, one), xs @ ms[0]),
        (jax.vmap(f, (None, 0))(xs[0], w24s), xs[0] @ ms),
        (jax.vmap(f)(xs, w24s), xs @ ms),
        (jax.vmap(f)(xs, w24s, biases), xs @ ms + biases[:, None]),
        (jax.vmap(f, (1, None), 1)(xs, one), xs @ ms[0]),
    ]
    for out, expected in cases:
        np.testing.assert_allclose(out, expected, atol=1e-4)
    grad = jax.vmap(jax.grad(lambda x, w24: f(x, w24).sum()), (0, None))(xs, one)
    np.testing.assert_allclose(
        grad, jnp.broadcast_to(ms[0].sum(1), xs.shape), atol=1e-4
    )


def test_inside_shard_map_on_the_local_shard(rng, implementation):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, w = normal(rng, T, K), compressed(normal(rng, K, N), -2)
    out = jax.shard_map(
        lambda x, w: nm_matmul(x, w, implementation=implementation),
        mesh=mesh,
        in_specs=(spec("d"), spec()),
        out_specs=spec("d"),
    )(x, w)
    np.testing.assert_allclose(out, x @ decompress(w), atol=1e-5)


@pytest.mark.parametrize("implementation", ["sm90", None])
def test_devices_share_the_tokens(rng, monkeypatch, implementation):
    """Each chooses by what it has: here a kernel for parts of 32 tokens and no more."""
    parts = []

    def gemm(a, b, bias, form, **_):
        parts.append(reference.sizes(a, b, form))
        return reference.gemm(a, b, bias, form)

    def judge(m, n, k, **_):
        return dispatch.Choice("sm90" if n <= 32 else "reference")

    fake = types.SimpleNamespace(gemm=gemm, unavailable=lambda *_: None)
    monkeypatch.setattr(matmul, "_kernel", lambda name: fake)
    monkeypatch.setattr(dispatch, "kernel", lambda name: fake)
    monkeypatch.setattr(dispatch, "judge", judge)
    monkeypatch.setattr(dispatch, "is_measured", lambda: True)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, w = (normal(rng, *shape, dtype="bfloat16") for shape in ((8, 16, K), (K, N)))
    w24 = compressed(w, -2)

    @jax.jit
    def loss(x, w24):
        out = nm_matmul(x, w24, activation="relu", implementation=implementation)
        return out.astype("float32").sum()

    gradient = jax.grad(loss)
    local = gradient(x, w24)
    del parts[:]
    shared = gradient(jax.device_put(x, sharding), w24)
    np.testing.assert_array_equal(shared, local)
    assert parts[-1] == (N, 32, K)


@pytest.mark.parametrize("pattern, dtype", [("1:4", "float32"), ("2:4", "int8")])
def test_what_has_no_instruction_is_dense_on_several_devices(
    rng, monkeypatch, pattern, dtype
):
    monkeypatch.setattr(dispatch, "is_measured", lambda: True)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(auto,))
    spec = jax.sharding.PartitionSpec(None, "data")
    w = jnp.asarray(rng.integers(-9, 10, (256, N)), dtype)
    w24 = compress(w, nmjax.magnitude_mask(w, pattern, axis=-2), pattern)
    x = jnp.asarray(rng.integers(-9, 10, (T, 256)), dtype)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    out = jax.jit(nm_matmul)(sharded, w24)
    np.testing.assert_array_equal(out, product(x, decompress(w24)))


def test_one_trace_under_jit(rng):
    traces = []

    @jax.jit
    def f(x, w):
        traces.append(1)
        return nm_matmul(x, w)

    for _ in range(2):
        f(normal(rng, T, K), compressed(normal(rng, K, N), -2))
    assert len(traces) == 1


def test_the_portable_path_says_so_once(rng, caplog):
    matmul._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            nm_matmul(normal(rng, T, K), compressed(normal(rng, K, N), -2))
    assert len(caplog.records) == 1 and "decompressing" in caplog.text


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100"])
def test_a_kernel_asked_for_runs_or_raises(rng, name):
    if jax.default_backend() == "gpu":
        pytest.skip("here it may run")
    with pytest.raises(NotImplementedError, match=f"{name}.*(GPU|needs jax)"):
        nm_matmul(
            normal(rng, T, K), compressed(normal(rng, K, N), -2), implementation=name
        )


def ones24(k, n, axis=-2):
    return compressed(jnp.ones((k, n)), axis)


@pytest.mark.parametrize(
    "lhs, rhs, options, message",
    [
        (jnp.ones((2, 8)), jnp.ones((8, 4)), {}, "exactly one side"),
        (ones24(4, 8, -1), ones24(8, 4), {}, "exactly one side"),
        (jnp.ones((2, 8)), ones24(8, 4, -1), {}, "right-hand side .* axis -1"),
        (ones24(8, 4, -2), jnp.ones((4, 4)), {}, "left-hand side .* axis -2"),
        (jnp.ones((2, 9)), ones24(8, 4), {}, "contracts 8, axis -1 .* has 9"),
        (jnp.ones((2, 8), "bfloat16"), ones24(8, 4), {}, "float32.*bfloat16"),
        (jnp.ones(8), ones24(8, 4), {}, "expected a matrix"),
        (ones24(4, 8, -1), jnp.ones((2, 8, 4)), {}, "expected a matrix"),
        (jnp.ones((2, 8)), ones24(8, 4), {"bias": jnp.ones(8)}, r"expected \(4,\)"),
        (jnp.ones((2, 8)), ones24(8, 4), {"bias": 1.0}, r"shape \(\), expected \(4,"),
        (
            jnp.ones((2, 8)),
            ones24(8, 4),
            {"bias": [1j] * 4},
            "complex64: expected real",
        ),
        (jnp.ones((2, 8)), ones24(8, 4), {"activation": "silu"}, "'silu': expected"),
        (jnp.ones((2, 8)), ones24(8, 4), {"implementation": "sm75"}, "'sm75'"),
        (
            jnp.ones((2, 8)),
            ones24(8, 4),
            {"transpose_dense": True},
            "contracts 8, axis -2 .* has 2",
        ),
    ],
)
def test_bad_operands_are_named(lhs, rhs, options, message):
    with pytest.raises(ValueError, match=message):
        nm_matmul(lhs, rhs, **options)


def test_a_batch_of_matrices_is_mapped_not_guessed():
    with pytest.raises(ValueError, match="jax.vmap"):
        nm_matmul(jnp.ones((2, 8)), compressed(jnp.ones((3, 8, 4)), -2))

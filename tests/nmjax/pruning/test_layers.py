"""Layers out of their models: features times the kernel as a matrix is the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nmjax.pruning.layers import Layer, why_not_a_gemm
from tests.foreign import draw

IMAGE = (2, 7, 6, 8)

# What makes it, the shape of its input, the axes that its GEMM contracts.
LINEN = {
    "dense": (nn.Dense(5), (3, 4, 8), (-2,)),
    "general": (nn.DenseGeneral((2, 3), axis=-1), (3, 8), (-3,)),
    "general_two": (nn.DenseGeneral(5, axis=(-2, -1)), (3, 2, 8), (-3, -2)),
    "general_swapped": (nn.DenseGeneral(5, axis=(2, 1)), (3, 2, 8), (-3, -2)),
    "conv": (nn.Conv(5, (3, 2), strides=2, padding="VALID"), IMAGE, (-2,)),
    "dilated": (nn.Conv(5, (3, 3), kernel_dilation=2, padding=1), IMAGE, (-2,)),
    "circular": (nn.Conv(5, (3, 3), padding="CIRCULAR"), IMAGE, (-2,)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGE, (-2,)),
    "conv_1d": (nn.Conv(5, 3, padding="CAUSAL"), (2, 9, 8), (-2,)),
    "transposed": (nn.ConvTranspose(5, (4, 4), strides=(2, 2)), IMAGE, (-2,)),
    "kernel_transposed": (
        nn.ConvTranspose(5, (3, 3), strides=(2, 2), transpose_kernel=True),
        IMAGE,
        (-1,),
    ),
    "einsum": (nn.Einsum((8, 2, 3), "...d,dhk->...hk"), (3, 4, 8), (-3,)),
    "einsum_two": (nn.Einsum((2, 8, 5), "bhk,hkd->bd"), (3, 2, 8), (-3, -2)),
    "einsum_out_first": (nn.Einsum((5, 8), "bd,cd->bc"), (3, 8), (-1,)),
    "einsum_experts": (
        nn.Einsum((2, 8, 5), "bed,edf->bef", use_bias=False),
        (3, 2, 8),
        (-2,),
    ),
}
NNX = {
    "linear": (lambda r: nnx.Linear(8, 5, rngs=r), (3, 4, 8), (-2,)),
    "general": (
        lambda r: nnx.LinearGeneral((2, 8), 5, axis=(-2, -1), rngs=r),
        (3, 2, 8),
        (-3, -2),
    ),
    "grouped": (
        lambda r: nnx.Conv(8, 6, (3, 3), feature_group_count=2, strides=2, rngs=r),
        IMAGE,
        (-2,),
    ),
    "no_bias": (lambda r: nnx.Conv(8, 6, (1, 1), use_bias=False, rngs=r), IMAGE, (-2,)),
    "transposed": (
        lambda r: nnx.ConvTranspose(8, 5, (3, 3), strides=2, rngs=r),
        IMAGE,
        (-2,),
    ),
    "kernel_transposed": (
        lambda r: nnx.ConvTranspose(8, 5, (3, 3), transpose_kernel=True, rngs=r),
        IMAGE,
        (-1,),
    ),
}


# More cases of what the others cover.
SLOW = {"general_two", "dilated", "grouped", "conv_1d", "transposed", "no_bias"}


def names(layers):
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in layers
    ]


def assert_features_times_kernel_is_the_layer(layer, parameters, x, axes, expected):
    kernel = parameters["kernel"]
    matrices = layer.matrices(kernel.ndim, axes)
    w = matrices.of(kernel)
    features = layer.features(x, w.shape[1])
    y = jnp.moveaxis(features @ w, 0, 1).reshape(expected.shape)  # (samples, g, out)
    y += parameters.get("bias", 0)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(layer(parameters, x), expected, atol=2e-5)
    back = matrices.kernel(w, kernel.shape)
    np.testing.assert_array_equal(back, kernel)
    # m consecutive rows of a matrix are m consecutive channels of the kernel.
    channel = np.broadcast_to(
        np.expand_dims(np.arange(kernel.shape[axes[-1]]), list(range(1, -axes[-1]))),
        kernel.shape,
    )
    rows = matrices.of(jnp.asarray(channel))[..., 0]
    expected_rows = np.arange(rows.shape[1]) % kernel.shape[axes[-1]]
    np.testing.assert_array_equal(rows, np.broadcast_to(expected_rows, rows.shape))


@pytest.mark.parametrize("name", names(LINEN))
def test_linen(rng, name):
    module, shape, axes = LINEN[name]
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    parameters = {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in shapes.items()
    }
    expected = module.apply({"params": parameters}, x)
    assert_features_times_kernel_is_the_layer(
        Layer("layer/kernel", module), parameters, x, axes, expected
    )


@pytest.mark.parametrize("name", names(NNX))
def test_nnx(rng, name):
    make, shape, axes = NNX[name]
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    nnx.update(module, draw(nnx.state(module), 0))
    parameters = {"kernel": module.kernel[...]}
    if module.bias is not None:
        parameters["bias"] = module.bias[...]
    layer = Layer("layer/kernel", module)
    assert_features_times_kernel_is_the_layer(layer, parameters, x, axes, module(x))
    assert module.kernel[...] is parameters["kernel"]  # the model's own stays


def test_a_bfloat16_layer_is_judged_in_float32(rng):
    module = nn.Dense(5, dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    y = Layer("kernel", module)({"kernel": kernel}, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ kernel, atol=1e-5)


def test_what_is_no_gemm_says_so():
    for equation, reason in (
        ("bi,io->o", "not one GEMM"),  # sums over the batch
        ("bi,...io->b...o", "not one GEMM"),
        ("...i,io->o", "not one GEMM"),
        ("bi,io->...bo", "not one GEMM"),
        (None, "given at the call"),
    ):
        assert reason in why_not_a_gemm(Layer("kernel", nn.Einsum((8, 5), equation)))
    assert not why_not_a_gemm(Layer("kernel", nn.Einsum((8, 5), "...i,io->...o")))
    batched = Layer("kernel", nn.DenseGeneral(5, axis=-1, batch_dims=0))
    assert "batch dimensions" in why_not_a_gemm(batched)
    assert not why_not_a_gemm(Layer("kernel", nn.Conv(5, (3, 3))))

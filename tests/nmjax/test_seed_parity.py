"""Parity with NM-sparsity, the reference implementation of SR-STE (arXiv:2102.04010).

The reference below is written from its README's equations, in NumPy and in its own
layouts: convolution kernels are OIHW, images NCHW, linear weights (out, in). Its
`Sparse_NHWC` lays a kernel out as OHWI, takes every M consecutive weights of the
flattened array for a group and drops the M - N smallest magnitudes:

    forward   W_s = E ⊙ W          backward   dW = dW_s + λ (1 - E) ⊙ W
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import nmjax
from nmjax import Rule, recipes
from nmjax.ops import nm_conv, nm_dot_general


def seed_mask(w, n, m):
    """The seed's mask of a kernel (O, I, H, W), or of a weight (out, in)."""
    last_is_input = w.transpose(0, 2, 3, 1) if w.ndim == 4 else w
    groups = np.abs(last_is_input).reshape(-1, m)
    mask = np.ones(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(groups, axis=1)[:, : m - n], False, axis=1)
    mask = mask.reshape(last_is_input.shape)
    return mask.transpose(0, 3, 1, 2) if w.ndim == 4 else mask


def to_flax(w):
    """OIHW to HWIO, (out, in) to (in, out)."""
    return w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T


def to_seed(w):
    """HWIO to OIHW, (in, out) to (out, in)."""
    w = np.asarray(w)
    return w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T


def tie_free(rng, *shape):
    """Weights of different magnitudes, exact in float32 as are their sums."""
    magnitudes = rng.permutation(np.prod(shape)) + 1
    signs = rng.choice([-1, 1], np.prod(shape))
    return (magnitudes * signs / 256).reshape(shape).astype(np.float32)


WEIGHTS = [(6, 16, 1, 1), (4, 8, 7, 7), (5, 64, 3, 3), (12, 8), (10, 64)]


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "2:8"])
def test_masks_are_those_of_the_seed(rng, shape, pattern):
    n, m = map(int, pattern.split(":"))
    w = tie_free(rng, *shape)
    mask = nmjax.magnitude_mask(jnp.asarray(to_flax(w)), pattern)
    np.testing.assert_array_equal(to_seed(mask), seed_mask(w, n, m))


def test_groups_that_straddle_filters_are_refused(rng):
    """The seed's stem: 3 input channels, 147 weights a filter."""
    with pytest.raises(ValueError, match="size 3, not a multiple of m = 4"):
        nmjax.magnitude_mask(jnp.asarray(to_flax(tie_free(rng, 8, 3, 7, 7))), "2:4")


def windows(x, size):
    """(N, C, H, W) to (N, C, H - size + 1, W - size + 1, size, size)."""
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))


def test_gradient_of_a_convolution_is_that_of_the_seed(rng):
    """Small integers and dyadic weights: every sum is exact."""
    w = tie_free(rng, 6, 8, 3, 3)
    x = rng.integers(-3, 4, (2, 8, 7, 5)).astype(np.float32)
    dy = rng.integers(-3, 4, (2, 6, 5, 3)).astype(np.float32)
    mask, decay = seed_mask(w, 2, 4), 2.0**-4
    y = np.einsum("ncijhw,ochw->noij", windows(x, 3), mask * w)
    dw = np.einsum("ncijhw,noij->ochw", windows(x, 3), dy) + decay * ~mask * w

    def layer(w):
        numbers = ("NHWC", "HWIO", "NHWC")
        w_s = nmjax.sr_ste(w, "2:4", decay=decay)
        x_nhwc = jnp.asarray(x.transpose(0, 2, 3, 1))
        return nm_conv(x_nhwc, w_s, (1, 1), "VALID", dimension_numbers=numbers)

    ours, vjp = jax.vjp(layer, jnp.asarray(to_flax(w)))
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 3, 1, 2), y)
    (gradient,) = vjp(jnp.asarray(dy.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(to_seed(gradient), dw)


def test_gradient_of_a_linear_layer_is_that_of_the_seed(rng):
    w = tie_free(rng, 6, 16)
    x = rng.integers(-3, 4, (5, 16)).astype(np.float32)
    dy = rng.integers(-3, 4, (5, 6)).astype(np.float32)
    mask, decay = seed_mask(w, 2, 4), 2.0**-4

    def layer(w):
        w_s = nmjax.sr_ste(w, "2:4", decay=decay)
        return nm_dot_general(jnp.asarray(x), w_s, (((1,), (0,)), ((), ())))

    ours, vjp = jax.vjp(layer, jnp.asarray(to_flax(w)))
    np.testing.assert_array_equal(ours, x @ (mask * w).T)
    (gradient,) = vjp(jnp.asarray(dy))
    np.testing.assert_array_equal(to_seed(gradient), dy.T @ x + decay * ~mask * w)


# 200 steps

BATCH, STEPS, LR, MOMENTUM, WEIGHT_DECAY = 8, 200, 0.05, 0.9, 5e-5
STRONG = 2e-2  # λ at which forgetting the term would show


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        float64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.Conv(8, (3, 3), padding="VALID", name="conv", **float64)(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(4, name="dense", **float64)(x)


def problem(rng):
    """Parameters in the seed's layout, and images (NCHW) and targets for each step."""
    params = {
        "conv": (rng.standard_normal((8, 4, 3, 3)) / 6, np.zeros(8)),
        "dense": (rng.standard_normal((4, 8)) / 3, np.zeros(4)),
    }
    images = rng.standard_normal((STEPS, BATCH, 4, 6, 6))
    teacher = rng.standard_normal((4, 4))
    targets = np.tanh(images.mean((3, 4)) * 6) @ teacher
    return params, images, targets


def reference_gradient(params, x, target, decay):
    """Gradient of the mean squared error; weights in the seed's layout."""
    (w1, b1), (w2, b2) = params["conv"], params["dense"]
    e1, e2 = seed_mask(w1, 2, 4), seed_mask(w2, 2, 4)
    h = np.einsum("ncijhw,ochw->noij", windows(x, 3), e1 * w1) + b1[:, None, None]
    a = np.maximum(h, 0).mean((2, 3))
    y = a @ (e2 * w2).T + b2

    dy = 2 * (y - target) / y.size
    da = dy @ (e2 * w2)
    dh = (h > 0) * da[:, :, None, None] / (h.shape[2] * h.shape[3])
    return {
        "conv": (
            np.einsum("ncijhw,noij->ochw", windows(x, 3), dh) + decay * ~e1 * w1,
            dh.sum((0, 2, 3)),
        ),
        "dense": (dy.T @ a + decay * ~e2 * w2, dy.sum(0)),
    }


def reference_training(params, images, targets, decay):
    """SGD with momentum as the seed has it: b = μ b + (g + wd w), w = w - lr b."""
    buffers = {
        name: (np.zeros_like(w), np.zeros_like(b)) for name, (w, b) in params.items()
    }
    for x, target in zip(images, targets, strict=True):
        gradient = reference_gradient(params, x, target, decay)
        for name in params:
            buffers[name] = tuple(
                MOMENTUM * b + (g + WEIGHT_DECAY * w)
                for b, g, w in zip(
                    buffers[name], gradient[name], params[name], strict=True
                )
            )
            params = params | {
                name: tuple(
                    w - LR * b for w, b in zip(params[name], buffers[name], strict=True)
                )
            }
    return params


def our_training(params, images, targets, recipe):
    rules = [Rule(".*", recipe)]
    model = nmjax.sparsify(Net(), rules)
    params = {
        name: {"kernel": jnp.asarray(to_flax(w)), "bias": jnp.asarray(b)}
        for name, (w, b) in params.items()
    }
    images = jnp.asarray(images.transpose(0, 1, 3, 4, 2))
    plan = nmjax.plan(model, rules, images[0])
    tx = optax.chain(
        nmjax.add_decay(plan),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LR, MOMENTUM),
    )

    def step(carry, batch):
        params, state = carry
        x, target = batch

        def loss(params):
            return jnp.mean((model.apply({"params": params}, x) - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        carry, _ = jax.lax.scan(
            step, (params, tx.init(params)), (images, jnp.asarray(targets))
        )
        return carry[0]

    trained = train(params)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(trained))
    return {
        name: (to_seed(tree["kernel"]), np.asarray(tree["bias"]))
        for name, tree in trained.items()
    }


def largest_difference(a, b):
    return max(
        np.abs(x - y).max()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("decay_in", ["op", "optimizer"])
def test_200_steps_follow_the_seeds_equations(decay_in):
    params, images, targets = problem(np.random.default_rng(0))
    expected = reference_training(params, images, targets, STRONG)
    recipe = recipes.sr_ste("2:4", decay=STRONG, decay_in=decay_in)
    with jax.enable_x64(True):
        trained = our_training(params, images, targets, recipe)
    assert largest_difference(trained, expected) < 1e-9


def test_the_reference_would_notice():
    """Masks move on the way, and every term of the equations matters."""
    params, images, targets = problem(np.random.default_rng(0))
    expected = reference_training(params, images, targets, STRONG)
    for name, (w, _) in expected.items():
        assert (seed_mask(w, 2, 4) != seed_mask(params[name][0], 2, 4)).any()
    without = reference_training(params, images, targets, 0.0)
    assert largest_difference(expected, without) > 1e-2

"""Sparse operands of the three GEMMs, against the equations in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax import recipes
from nmjax.ops import nm_conv, nm_dot_general, nm_einsum
from nmjax.recipe import Recipe
from nmjax.sampling import mvue
from tests import oracle

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATMUL = (((1,), (0,)), ((), ()))
FST = recipes.fst()
BI_MASK = recipes.bi_mask("2:4")
ACTIVATION = recipes.semi_sparse_activation()
SAMPLED = Recipe("mvue", FST.pattern, wgrad="gradient")


def integers(rng, *shape):
    """Floats whose sums of products are exact in any order."""
    return jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)


def gradients(gemm, x, w, dy, **aux):
    """(y, dx, dw) as NumPy arrays, jitted; aux arrays are arguments."""

    def run(x, w, dy, aux):
        y, vjp = jax.vjp(lambda x, w: gemm(x, w, **aux), x, w)
        return y, *vjp(dy)

    return [np.asarray(a) for a in jax.jit(run)(x, w, dy, aux)]


def greedy_tiles(x, key=lambda value: value):
    """torchao's rule by hand: heaviest first, at most two per row and column."""
    mask = np.zeros(x.shape, bool)
    for r, c in itertools.product(range(0, x.shape[0], 4), range(0, x.shape[1], 4)):
        order = sorted(
            itertools.product(range(4), range(4)),
            key=lambda at, r=r, c=c: -key(x[r + at[0], c + at[1]]),
        )
        for i, j in order:
            tile = mask[r : r + 4, c : c + 4]
            if tile[i].sum() < 2 and tile[:, j].sum() < 2:
                tile[i, j] = True
    return mask


# dgrad with its own weight


def test_dgrad_reads_its_own_weight(rng):
    x, w, dy = integers(rng, 6, 8), integers(rng, 8, 4), integers(rng, 6, 4)
    w_dgrad = integers(rng, 8, 4)
    gemm = functools.partial(nm_dot_general, dimension_numbers=MATMUL, recipe=BI_MASK)
    y, dx, dw = gradients(gemm, x, w, dy, w_dgrad=w_dgrad)
    x, w, dy = map(np.asarray, (x, w, dy))
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, dy @ np.asarray(w_dgrad).T)
    np.testing.assert_array_equal(dw, x.T @ dy)


# Activations


def test_activations_by_tiles_in_fprop_and_wgrad(rng):
    x = jnp.asarray(rng.permutation(128).reshape(8, 16) - 64.0, jnp.float32)
    w, dy = integers(rng, 16, 4), integers(rng, 8, 4)
    gemm = functools.partial(
        nm_dot_general, dimension_numbers=MATMUL, recipe=ACTIVATION
    )
    y, dx, dw = gradients(gemm, x, w, dy)
    x, w, dy = map(np.asarray, (x, w, dy))
    sparse = np.where(greedy_tiles(x), x, 0)
    np.testing.assert_array_equal(y, sparse @ w)
    np.testing.assert_array_equal(dx, dy @ w.T)  # straight through, dropped ones too
    np.testing.assert_array_equal(dw, sparse.T @ dy)


def test_tokens_are_all_axes_that_are_not_contracted(rng):
    x = jnp.asarray(rng.permutation(96).reshape(2, 3, 16) + 0.0, jnp.float32)
    w = integers(rng, 16, 4)  # 6 tokens: two zero rows fill the second tile
    numbers = (((2,), (0,)), ((), ()))
    y = nm_dot_general(x, w, numbers, recipe=ACTIVATION)
    padded = np.zeros((8, 16))
    padded[:6] = np.asarray(x).reshape(6, 16)
    sparse = np.where(greedy_tiles(padded), padded, 0)[:6]
    np.testing.assert_array_equal(y, (sparse @ np.asarray(w)).reshape(2, 3, 4))


@pytest.mark.slow
def test_after_a_squared_relu_signed_ranking_is_that_of_magnitudes(rng):
    x = jnp.square(nn.relu(jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)))
    w = integers(rng, 16, 4)
    by_magnitude = recipes.semi_sparse_activation(algorithm="largest_abs_values_greedy")
    np.testing.assert_array_equal(
        nm_dot_general(x, w, MATMUL, recipe=ACTIVATION),
        nm_dot_general(x, w, MATMUL, recipe=by_magnitude),
    )


CONVS = {
    "3x3": ((2, 5, 4, 8), (3, 3, 8, 4), ((1, 1), "SAME"), {}),
    "strides": ((2, 7, 6, 8), (3, 2, 8, 4), ((2, 3), "VALID"), {}),
    "pads": ((1, 5, 4, 8), (2, 3, 8, 4), ((1, 2), [(2, 0), (-1, 3)]), {}),
    "kernel dilation": (
        (1, 7, 6, 8),
        (2, 2, 8, 4),
        ((1, 1), "SAME"),
        {"rhs_dilation": (2, 3)},
    ),
    "input dilation": (
        (1, 3, 4, 8),
        (2, 2, 8, 4),
        ((1, 1), [(1, 0), (0, 1)]),
        {"lhs_dilation": (2, 3)},
    ),
    "groups": (
        (2, 4, 4, 8),
        (3, 3, 4, 6),
        ((1, 1), "SAME"),
        {"feature_group_count": 2},
    ),
    "layout": (
        (2, 8, 5, 4),
        (4, 8, 3, 3),
        ((2, 1), "SAME"),
        {"dimension_numbers": ("NCHW", "OIHW", "HWNC")},
    ),
    "1-D": (
        (2, 9, 8),
        (3, 8, 4),
        ((2,), "SAME"),
        {"dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
}


def lax_conv(x, w, args, options):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lax.conv_general_dilated(x, w, *args, **options)


@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_of_patches_is_the_convolution(rng, monkeypatch, case):
    """With a mask that keeps everything: the geometry alone."""
    monkeypatch.setattr(
        "nmjax.masks.tile_mask", lambda x, algorithm: jnp.ones(x.shape, jnp.bool_)
    )
    x_shape, w_shape, args, options = CONVS[case]
    x, w = integers(rng, *x_shape), integers(rng, *w_shape)
    reference = lambda x, w: lax_conv(x, w, args, options)  # noqa: E731
    options_ = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    dy = integers(rng, *jax.eval_shape(reference, x, w).shape)
    ours = gradients(
        lambda x, w: nm_conv(x, w, *args, **options_, recipe=ACTIVATION), x, w, dy
    )
    for a, b in zip(ours, gradients(reference, x, w, dy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_convolution_masks_tiles_of_its_patches(rng):
    x = jnp.asarray(rng.permutation(2 * 4 * 2 * 4).reshape(2, 4, 2, 4), jnp.float32)
    w, dy = integers(rng, 2, 1, 4, 3), integers(rng, 2, 3, 2, 3)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    gemm = lambda x, w: nm_conv(x, w, (1, 1), "VALID", **numbers, recipe=ACTIVATION)  # noqa: E731
    y, dx, dw = gradients(gemm, x, w, dy)
    patches = np.zeros((12, 8))  # (batch · 3 · 2, window 2 · channels 4)
    for row, (n, i, j) in enumerate(itertools.product(range(2), range(3), range(2))):
        patches[row] = np.asarray(x)[n, i : i + 2, j].reshape(-1)
    sparse = np.where(greedy_tiles(patches), patches, 0)
    matrix, dy_rows = np.asarray(w).reshape(8, 3), np.asarray(dy).reshape(12, 3)
    np.testing.assert_array_equal(y, (sparse @ matrix).reshape(2, 3, 2, 3))
    np.testing.assert_array_equal(dw, (sparse.T @ dy_rows).reshape(w.shape))
    dense = lambda x: lax.conv_general_dilated(x, w, (1, 1), "VALID", **numbers)  # noqa: E731
    (expected,) = jax.linear_transpose(dense, x)(dy)
    np.testing.assert_array_equal(dx, expected)


def test_batch_groups_refuse_sparse_activations(rng):
    x, w = integers(rng, 4, 4, 4, 8), integers(rng, 1, 1, 8, 4)
    with pytest.raises(ValueError, match="batch_group_count=2"):
        nm_conv(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            batch_group_count=2,
            recipe=ACTIVATION,
        )


# Output gradients, sampled


def test_wgrad_samples_the_output_gradient_along_tokens(rng):
    x, w, dy = integers(rng, 8, 4), integers(rng, 4, 3), integers(rng, 8, 3)
    key = jax.random.key(3)
    gemm = functools.partial(nm_dot_general, dimension_numbers=MATMUL, recipe=SAMPLED)
    y, dx, dw = gradients(gemm, x, w, dy, key=key)
    sampled, mask = mvue(dy, key, "2:4", axis=0)
    assert (np.asarray(mask).reshape(2, 4, 3).sum(1) == 2).all()
    x, w = np.asarray(x), np.asarray(w)
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, np.asarray(dy) @ w.T)
    np.testing.assert_allclose(dw, x.T @ np.asarray(sampled), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens", [8, 6])
def test_the_sampled_wgrad_is_unbiased(rng, tokens):
    x, w, dy = integers(rng, tokens, 4), integers(rng, 4, 3), integers(rng, tokens, 3)

    def dw(key):
        gemm = lambda w: nm_dot_general(x, w, MATMUL, recipe=SAMPLED, key=key)  # noqa: E731
        return jax.vjp(gemm, w)[1](dy)[0]

    draws = np.asarray(jax.jit(jax.vmap(dw))(jax.random.split(jax.random.key(0), 4000)))
    error = draws.std(0) / len(draws) ** 0.5
    assert (
        np.abs(draws.mean(0) - np.asarray(x).T @ np.asarray(dy)) < 5 * error + 1e-4
    ).all()
    assert draws.std(0).max() > 0.1  # it does sample


def test_a_convolution_samples_along_batch_and_positions(rng):
    x, w, dy = (
        integers(rng, 2, 3, 2, 4),
        integers(rng, 1, 1, 4, 3),
        integers(rng, 2, 3, 2, 3),
    )
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    key = jax.random.key(1)
    gemm = lambda x, w, key: nm_conv(  # noqa: E731
        x, w, (1, 1), "SAME", **numbers, recipe=SAMPLED, key=key
    )
    _, _, dw = gradients(gemm, x, w, dy, key=key)
    rows = dy.reshape(12, 3)
    sampled, _ = mvue(rows, key, "2:4", axis=0)
    expected = np.asarray(x).reshape(12, 4).T @ np.asarray(sampled)
    np.testing.assert_allclose(dw[0, 0], expected, rtol=1e-6, atol=1e-5)


def test_a_gradient_without_a_key_is_refused(rng):
    x, w = integers(rng, 8, 4), integers(rng, 4, 3)
    gemm = lambda w, **aux: nm_dot_general(x, w, MATMUL, recipe=SAMPLED, **aux).sum()  # noqa: E731
    np.testing.assert_array_equal(gemm(w), (np.asarray(x) @ np.asarray(w)).sum())
    with pytest.raises(ValueError, match="needs key="):
        jax.grad(gemm)(w)
    with pytest.raises(ValueError, match="layer/kernel"):
        jax.grad(lambda w: gemm(w, no_key="layer/kernel"))(w)


# Fixed tokens


def restored(x, dy, kept, m):
    """dW = Σ_k x_kᵀ Σ_{t from k to the next kept} dy_t, token by token."""
    dw = np.zeros((x.shape[1], dy.shape[1]))
    for token in range(len(dy)):
        group, place = divmod(token, m)
        k = group * m + max(p for p in kept if p <= place)
        dw += np.outer(x[k], dy[token])
    return dw


@pytest.mark.parametrize("tokens", [8, 7])
def test_wgrad_at_fixed_tokens_restores_the_others(rng, tokens):
    x, w, dy = integers(rng, tokens, 8), integers(rng, 8, 3), integers(rng, tokens, 3)
    gemm = functools.partial(nm_dot_general, dimension_numbers=MATMUL, recipe=FST)
    y, dx, dw = gradients(gemm, x, w, dy, w_dgrad=w)
    x, w, dy = map(np.asarray, (x, w, dy))
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, dy @ w.T)
    np.testing.assert_array_equal(dw, restored(x, dy, (0, 2), 4))


@pytest.mark.parametrize(
    ("pattern", "kept"), [("1:4", (0,)), ("2:8", (0, 4)), ("3:4", (0, 1, 2))]
)
def test_fixed_places_of_other_patterns(rng, pattern, kept):
    x, w, dy = integers(rng, 8, 8), integers(rng, 8, 3), integers(rng, 8, 3)
    gemm = functools.partial(
        nm_dot_general, dimension_numbers=MATMUL, recipe=recipes.fst(pattern)
    )
    _, _, dw = gradients(gemm, x, w, dy, w_dgrad=w)
    expected = restored(np.asarray(x), np.asarray(dy), kept, int(pattern[-1]))
    np.testing.assert_array_equal(dw, expected)


def test_equal_neighbours_make_it_exact(rng):
    """The known answer: activations constant in space give the dense dW."""
    one = integers(rng, 2, 1, 1, 8)
    x = jnp.broadcast_to(one, (2, 4, 4, 8))
    w, dy = integers(rng, 1, 1, 8, 3), integers(rng, 2, 4, 4, 3)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    gemm = lambda x, w, w_dgrad: nm_conv(  # noqa: E731
        x, w, (1, 1), "SAME", **numbers, recipe=FST, w_dgrad=w_dgrad
    )
    dense = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", **numbers)  # noqa: E731
    ours, theirs = gradients(gemm, x, w, dy, w_dgrad=w), gradients(dense, x, w, dy)
    np.testing.assert_array_equal(ours[2], theirs[2])


def test_a_convolution_at_fixed_tokens(rng):
    x, w, dy = (
        integers(rng, 1, 3, 3, 4),
        integers(rng, 1, 1, 4, 3),
        integers(rng, 1, 3, 3, 3),
    )
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    gemm = lambda x, w, w_dgrad: nm_conv(  # noqa: E731
        x, w, (1, 1), "SAME", **numbers, recipe=FST, w_dgrad=w_dgrad
    )
    _, _, dw = gradients(gemm, x, w, dy, w_dgrad=w)
    expected = restored(
        np.asarray(x).reshape(9, 4), np.asarray(dy).reshape(9, 3), (0, 2), 4
    )
    np.testing.assert_array_equal(dw[0, 0], expected)


def test_wgrad_at_fixed_tokens_contracts_half_of_them():
    x, w = jnp.ones((8, 4)), jnp.ones((4, 3))
    gemm = lambda w: nm_dot_general(x, w, MATMUL, recipe=FST, w_dgrad=w).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(gemm))(w))
    assert "f32[4,4]" in text  # 4 of 8 tokens


# Any layout of x and w

LAYOUTS = {
    "batch": ((2, 4, 8), (2, 8, 3), (((2,), (1,)), ((0,), (0,)))),
    "crossed": ((8, 4, 2), (2, 8, 3), (((2, 0), (0, 1)), ((), ()))),
    "two free": ((2, 8, 4), (8, 3, 2), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize(
    "layout",
    [
        "batch",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("crossed", "two free")
        ),
    ],
)
@pytest.mark.parametrize("recipe", [ACTIVATION, SAMPLED, FST], ids=lambda r: r.name)
def test_layouts_are_one_matrix_for_each_batch_index(rng, layout, recipe):
    x_shape, w_shape, numbers = LAYOUTS[layout]
    (xc, wc), (xb, wb) = numbers
    x = jnp.asarray(
        rng.permutation(int(np.prod(x_shape))).reshape(x_shape), jnp.float32
    )
    w = integers(rng, *w_shape)
    key = jax.random.key(5)
    y_shape = jax.eval_shape(lambda x, w: lax.dot_general(x, w, numbers), x, w).shape
    dy = integers(rng, *y_shape)
    gemm = functools.partial(nm_dot_general, dimension_numbers=numbers, recipe=recipe)
    aux = {"key": key} if recipe is SAMPLED else {}
    aux |= {"w_dgrad": w} if recipe is FST else {}
    ours = gradients(gemm, x, w, dy, **aux)

    x_order = [*xb, *(i for i in range(x.ndim) if i not in (*xb, *xc)), *xc]
    w_order = [*wb, *wc, *(i for i in range(w.ndim) if i not in (*wb, *wc))]
    batch = int(np.prod([x.shape[i] for i in xb]))
    features = int(np.prod([x.shape[i] for i in xc]))
    xm = np.transpose(x, x_order).reshape(batch, -1, features)
    wm = np.transpose(w, w_order).reshape(batch, features, -1)
    dym = np.asarray(dy).reshape(batch, xm.shape[1], wm.shape[2])
    if recipe is ACTIVATION:
        xm = np.stack([np.where(greedy_tiles(part), part, 0) for part in xm])
    if recipe is SAMPLED:
        dy_w = np.asarray(mvue(jnp.asarray(dym), key, "2:4", axis=-2)[0])
        dw = np.einsum("btf,bto->bfo", xm, dy_w)
    elif recipe is FST:
        pairs = zip(xm, dym, strict=True)
        dw = np.stack([restored(a, b, (0, 2), 4) for a, b in pairs])
    else:
        dw = np.einsum("btf,bto->bfo", xm, dym)
    back = np.argsort(w_order)
    dw = np.transpose(dw.reshape([w.shape[i] for i in w_order]), back)
    np.testing.assert_allclose(ours[0], (xm @ wm).reshape(y_shape), rtol=1e-6)
    np.testing.assert_allclose(ours[2], dw, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "equation", ["bsd,dhk->bshk", "...d,dk->...k", "bgd,gdk->kgb", "bdk,kd->b"]
)
def test_einsum_is_that_of_jnp(rng, equation):
    shapes = {
        "bsd,dhk->bshk": ((2, 3, 8), (8, 2, 4)),
        "...d,dk->...k": ((2, 3, 8), (8, 4)),
        "bgd,gdk->kgb": ((3, 2, 8), (2, 8, 4)),
        "bdk,kd->b": ((3, 4, 2), (2, 4)),
    }[equation]
    x, w = (integers(rng, *shape) for shape in shapes)
    reference = functools.partial(jnp.einsum, equation)
    dy = integers(rng, *jax.eval_shape(reference, x, w).shape)
    ours = gradients(functools.partial(nm_einsum, equation), x, w, dy)
    for a, b in zip(ours, gradients(reference, x, w, dy), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("equation", ["bd,de->b", "bdd,de->be", "bdc,de->be"])
def test_an_einsum_that_is_no_gemm_is_refused(equation):
    x, w = jnp.ones((2, 4, 4)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="not one GEMM"):
        nm_einsum(equation, x, w)


# Transformations


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [ACTIVATION, SAMPLED, FST], ids=lambda r: r.name)
def test_vmap_scan_and_remat_give_the_same(rng, recipe):
    x, w = integers(rng, 8, 8), integers(rng, 2, 8, 8)
    keys = jax.random.split(jax.random.key(0), 2)

    def layer(x, inputs):
        w, key = inputs
        aux = {"key": key} if recipe is SAMPLED else {}
        aux |= {"w_dgrad": w} if recipe is FST else {}
        return jnp.tanh(nm_dot_general(x, w, MATMUL, recipe=recipe, **aux)), None

    def unrolled(w):
        y = x
        for i in range(2):
            y, _ = layer(y, (w[i], keys[i]))
        return jnp.sum(y)

    scanned = lambda w: jnp.sum(lax.scan(jax.checkpoint(layer), x, (w, keys))[0])  # noqa: E731
    expected = jax.jit(jax.value_and_grad(unrolled))(w)
    actual = jax.jit(jax.value_and_grad(scanned))(w)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-5)

    def alone(w, key):
        return jax.grad(lambda w: jnp.sum(layer(x, (w, key))[0]))(w)

    each = jax.jit(jax.vmap(alone))(w, keys)
    for i in range(2):
        one = jax.jit(alone)(w[i], keys[i])
        np.testing.assert_allclose(each[i], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(ACTIVATION, marks=pytest.mark.slow), SAMPLED, FST, BI_MASK],
    ids=lambda r: r.name,
)
def test_explicit_mesh_axes(rng, recipe):
    x, w = integers(rng, 4, 4, 8), integers(rng, 8, 4)
    numbers = (((2,), (0,)), ((), ()))

    def gradient(x, w, key):
        aux = {"w_dgrad": w} if recipe.dgrad else {}
        gemm = lambda x, w: nm_dot_general(x, w, numbers, recipe=recipe, key=key, **aux)  # noqa: E731
        return jax.grad(lambda x, w: jnp.sum(gemm(x, w) ** 2), (0, 1))(x, w)

    key = jax.random.key(2)
    expected = jax.jit(gradient)(x, w, key)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        w = jax.device_put(w, NamedSharding(mesh, P()))
        actual = jax.jit(gradient)(x, w, key)
    assert actual[0].sharding.spec == P("data", None, None)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_the_oracle_of_this_file_is_two_of_four():
    mask = greedy_tiles(np.arange(1.0, 17.0).reshape(4, 4))
    np.testing.assert_array_equal(
        mask, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    )
    assert oracle.magnitude_mask(np.ones((4, 1)), 2, 4).sum() == 2

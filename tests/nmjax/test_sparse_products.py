"""Which products of a layer go to a sparse tensor core, and that they stay the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import recipes, sparse_products
from pallas_kernels import implementations, matmul
from pallas_kernels.dispatch import Choice
from pallas_kernels.partitioning import partitioned

T, K, N = 16, 32, 24


@pytest.fixture
def products(monkeypatch):
    """A device on which every sparse product was measured faster: what it was asked."""
    asked = []

    def judge(m, n, k, *, compressing, **kwargs):
        assert compressing
        if asked[-1:] != [(m, n, k)]:  # before a product is traced, and within
            asked.append((m, n, k))
        return Choice("a kernel")

    def choose(a, b, form):
        # The sizes and layouts that were judged are those that are multiplied.
        assert asked[-1] == (a.shape[0], b.shape[1 if form.b_is_kn else 0], a.shape[1])
        return Choice("reference")

    monkeypatch.setattr(sparse_products, "judge", judge)
    monkeypatch.setattr(sparse_products, "is_measured", lambda: True)
    monkeypatch.setattr(implementations, "choose", lambda *_: "mosaic")
    monkeypatch.setattr(matmul.dispatch, "choose", choose)
    partitioned.cache_clear()  # and with it what is traced of its functions
    yield asked
    partitioned.cache_clear()


def masked(x, axis):
    return jnp.where(nmjax.magnitude_mask(x, "2:4", axis=axis), x, jnp.zeros_like(x))


@pytest.mark.parametrize(
    "sparse, options",
    [
        ("rhs", {}),
        ("rhs", {"transpose_rhs": True}),
        ("rhs", {"transpose_lhs": True}),
        ("lhs", {}),
        ("lhs", {"transpose_lhs": True}),
    ],
)
def test_a_product_is_the_dense_one(rng, products, gemm_atol, sparse, options):
    lhs = jnp.asarray(rng.standard_normal((T, K)), jnp.bfloat16)
    rhs = jnp.asarray(rng.standard_normal((K, N)), jnp.bfloat16)
    lhs = masked(lhs, -1) if sparse == "lhs" else lhs
    rhs = masked(rhs, -2) if sparse == "rhs" else rhs
    out = sparse_products.sparse_product(
        lhs.T if options.get("transpose_lhs") else lhs,
        rhs.T if options.get("transpose_rhs") else rhs,
        sparse,
        **options,
    )
    expected = np.asarray(lhs, np.float64) @ np.asarray(rhs, np.float64)
    np.testing.assert_allclose(out, expected, rtol=0, atol=gemm_atol("bfloat16", K))
    assert len(products) == 1


def assert_like_dense(actual, function, *args):
    """`actual` is what the function gives where every product is dense."""
    with pytest.MonkeyPatch.context() as dense:
        dense.setattr(sparse_products, "is_measured", lambda: False)
        expected = function(*args)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05 * np.abs(b).max())


@pytest.mark.parametrize(
    "recipe, sizes",
    [
        pytest.param("dense", [], marks=pytest.mark.slow),
        pytest.param("sr_ste", [(N, T, K)], marks=pytest.mark.slow),
        pytest.param("transposable", [(N, T, K), (K, T, N)], marks=pytest.mark.slow),
        pytest.param("bi_mask", [(N, T, K), (K, T, N)], marks=pytest.mark.slow),
        ("semi_sparse_activation", [(T, N, K), (K, N, T)]),
        ("two_by_four", [(N, T, K), (K, T, N), (N, K, T)]),
        ("sr_ste 4:8", []),
    ],
)
@pytest.mark.parametrize(
    "layer", ["Dense", pytest.param("DenseGeneral", marks=pytest.mark.slow)]
)
def test_a_layer_runs_each_sparse_gemm_there(rng, products, recipe, sizes, layer):
    recipe = {
        "dense": recipes.dense(),
        "sr_ste": recipes.sr_ste("2:4"),
        "transposable": recipes.transposable("2:4", refresh=1),
        "bi_mask": recipes.bi_mask("2:4"),
        "semi_sparse_activation": recipes.semi_sparse_activation(),
        "two_by_four": recipes.two_by_four(refresh=1),
        "sr_ste 4:8": recipes.sr_ste("4:8"),
    }[recipe]
    rules = [nmjax.Rule(".*", recipe)]
    flax_layer = {
        "Dense": nn.Dense(N, dtype=jnp.bfloat16),
        "DenseGeneral": nn.DenseGeneral((3, N // 3), dtype=jnp.bfloat16),
    }[layer]
    model = nmjax.sparsify(flax_layer, rules)
    x = jnp.asarray(rng.standard_normal((2, T // 2, K)), jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    plan = nmjax.plan(flax_layer, rules, x)
    state = nmjax.init_state(variables["params"], plan)
    variables = {**variables, "nm": state}
    products.clear()
    keys = {"nm": jax.random.key(1)}

    def loss(params, x):
        out = model.apply({**variables, "params": params}, x, rngs=keys)
        return (out.astype(jnp.float32) ** 2).sum()

    grads = jax.grad(loss, (0, 1))(variables["params"], x)
    assert products == sizes
    assert_like_dense(grads, jax.grad(loss, (0, 1)), variables["params"], x)
    assert products == sizes


@pytest.fixture
def passes(monkeypatch, products):
    """How often activations were masked and compressed both ways: their shapes."""
    seen = []

    def choose(a, b, form):
        sizes = a.shape[0], b.shape[1 if form.b_is_kn else 0], a.shape[1]
        assert sizes in products[-2:]  # both products were judged before the pass
        return Choice("reference")

    def compress_transposable(x, **options):
        seen.append(x.shape)
        return compress_here(x, **options)

    compress_here = sparse_products.compress_transposable
    monkeypatch.setattr(sparse_products, "compress_transposable", compress_transposable)
    monkeypatch.setattr(matmul.dispatch, "choose", choose)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return seen


EXACT = recipes.semi_sparse_activation(algorithm="largest_abs_values_exact")


def test_exact_tiles_are_masked_and_compressed_in_one_pass(rng, products, passes):
    layer = nn.Dense(N, dtype=jnp.bfloat16)
    model = nmjax.sparsify(layer, [nmjax.Rule(".*", EXACT)])
    x = jnp.asarray(rng.standard_normal((2, T // 2, K)), jnp.bfloat16)
    params = model.init(jax.random.key(0), x)["params"]
    products.clear()
    passes.clear()

    def loss(params, x):
        out = model.apply({"params": params}, x)
        return (out.astype(jnp.float32) ** 2).sum()

    both = jax.value_and_grad(loss, (0, 1))
    value, grads = both(params, x)
    assert passes == [(T, K)]
    assert products == [(T, N, K), (K, N, T)]
    assert_like_dense((value, grads), both, params, x)
    assert passes == [(T, K)]


def test_the_mask_of_one_pass_is_that_of_the_dense_product(products, passes, rng):
    """Integers, with ties, whose products are exact."""
    x = jnp.asarray(rng.integers(-2, 3, (T, K)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-2, 3, (K, N)), jnp.bfloat16)

    def loss(x, w):
        y = nmjax.ops.nm_dot_general(x, w, (((1,), (0,)), ((), ())), recipe=EXACT)
        return (y.astype(jnp.float32) ** 3).sum()

    mask = nmjax.transposable_mask(abs(x), "2:4")
    dense = jnp.where(mask, x, 0) @ w
    assert loss(x, w) == (dense.astype(jnp.float32) ** 3).sum()
    for function in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1)))):
        actual = function(x, w)
        d_out = (3 * dense.astype(jnp.float32) ** 2).astype(jnp.bfloat16)
        np.testing.assert_array_equal(actual[1], jnp.where(mask, x, 0).T @ d_out)
        np.testing.assert_array_equal(actual[0], d_out @ w.T)
    assert passes == [(T, K)] * 3
    # Rows of a batch, one after another; the second derivative reaches x as well.
    stacked = jax.vmap(jax.grad(loss), (0, None))(jnp.stack([x, -x]), w)
    np.testing.assert_array_equal(stacked[0], jax.grad(loss)(x, w))
    second = jax.grad(lambda x: (jax.grad(loss, 1)(x, w) ** 2).sum())(x)
    assert_like_dense(
        second, jax.grad(lambda x: (jax.grad(loss, 1)(x, w) ** 2).sum()), x
    )


def on_mesh(array, devices, axis_type):
    """With its first axis on so many devices."""
    types = (getattr(jax.sharding.AxisType, axis_type),)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=types)
    spec = jax.sharding.PartitionSpec("data")
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))


def test_one_pass_on_a_mesh_of_one_device(products, passes, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    x = on_mesh(jnp.ones((T, K), jnp.bfloat16), 1, "Auto")
    w, numbers = jnp.ones((K, N), jnp.bfloat16), (((1,), (0,)), ((), ()))
    jax.jit(lambda x: nmjax.ops.nm_dot_general(x, w, numbers, recipe=EXACT))(x)
    assert passes == []  # nothing is known of w
    w = on_mesh(w, 1, "Auto")
    product = lambda x, w: nmjax.ops.nm_dot_general(x, w, numbers, recipe=EXACT)  # noqa: E731
    jax.jit(product)(x, w)
    assert passes == [(T, K)]


@pytest.mark.parametrize("window", [(1, 1), (2, 2)])
def test_patches_of_a_convolution_go_through_one_pass(rng, products, passes, window):
    layer = nn.Conv(N, window, use_bias=False, dtype=jnp.bfloat16)
    model = nmjax.sparsify(layer, [nmjax.Rule(".*", EXACT)])
    x = jnp.asarray(rng.standard_normal((2, 4, 2, 8)), jnp.bfloat16)
    params = model.init(jax.random.key(0), x)["params"]
    passes.clear()

    def loss(params, x):
        return (model.apply({"params": params}, x).astype(jnp.float32) ** 2).sum()

    both = jax.value_and_grad(loss, (0, 1))
    actual = both(params, x)
    assert passes == [(16, 8 * window[0] * window[1])]
    assert_like_dense(actual, both, params, x)


@pytest.mark.parametrize(
    "change",
    [
        *("greedy", "tokens", "float32", "mixed", "batch", "slower"),
        *("mesh", "mesh of w", "explicit", "several devices"),
    ],
)
def test_one_pass_is_not_taken_where_it_cannot_be(
    products, passes, monkeypatch, change
):
    recipe, x, w = EXACT, jnp.ones((T, K), jnp.bfloat16), jnp.ones((K, N), jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    if change == "greedy":
        recipe = recipes.semi_sparse_activation()
    if change == "tokens":
        x = x[:-1]
    if change == "float32":
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if change == "batch":
        x, w, numbers = x[None], w[None], (((2,), (1,)), ((0,), (0,)))
    if change == "mixed":
        w = w.astype(jnp.float16)
    if change == "several devices":  # of which nothing is known
        monkeypatch.setattr(jax, "device_count", lambda: 2)
    if change == "mesh":
        x = on_mesh(x, 2, "Auto")
    if change == "mesh of w":
        w = on_mesh(w, 2, "Auto")
    if change == "explicit":
        x = on_mesh(x, 1, "Explicit")
    if change == "slower":
        monkeypatch.setattr(
            sparse_products, "judge", lambda *_, **__: Choice("reference")
        )
    product = jax.jit(
        lambda x, w: nmjax.ops.nm_dot_general(x, w, numbers, recipe=recipe)
    )
    assert product(x, w).shape[-1] == N
    assert passes == []


@pytest.mark.parametrize(
    "window, options, sizes",
    [
        ((1, 1), {}, [(N, T, K), (K, T, N)]),
        pytest.param(
            (1,), {"padding": "VALID"}, [(N, T, K), (K, T, N)], marks=pytest.mark.slow
        ),
        ((1, 1), {"padding": ((0, 0), (0, 0))}, [(N, T, K), (K, T, N)]),
        ((1, 1), {"padding": 1}, []),
        ((1, 1), {"strides": (1, 2)}, []),
        ((1, 1), {"input_dilation": (2, 1), "padding": 0}, []),
        pytest.param((1, 3), {}, [], marks=pytest.mark.slow),
        pytest.param((1, 1), {"feature_group_count": 2}, [], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_pointwise_convolution_is_a_product_of_matrices(
    rng, products, window, options, sizes
):
    layer = nn.Conv(N, window, use_bias=False, dtype=jnp.bfloat16, **options)
    rules = [nmjax.Rule(".*", recipes.transposable("2:4", refresh=1))]
    model = nmjax.sparsify(layer, rules)
    space = (4, T // 8) if len(window) == 2 else (T // 2,)
    x = jnp.asarray(rng.standard_normal((2, *space, K)), jnp.bfloat16)
    params = model.init(jax.random.key(0), x)["params"]
    products.clear()

    def loss(params, x):
        out = model.apply({"params": params}, x)
        return out.astype(jnp.float32).sum(), out

    grads = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    assert products == sizes
    assert_like_dense(grads, jax.grad(loss, (0, 1), has_aux=True), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transposable", "semi_sparse_activation"])
def test_gradients_sum_over_devices_inside_shard_map(rng, products, monkeypatch, name):
    """Data over one axis: dW is summed over it; outputs over the other: dx is."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)
    spec = jax.sharding.PartitionSpec
    x = jnp.asarray(rng.integers(-3, 4, (T, K)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-3, 4, (K, N)), jnp.bfloat16)
    recipe = recipes.semi_sparse_activation()
    if name == "transposable":
        recipe = recipes.transposable("2:4", refresh=1)
        w *= nmjax.transposable_mask(abs(w), "2:4")

    def loss(x, w):
        numbers = (((1,), (0,)), ((), ()))
        y = nmjax.ops.nm_dot_general(x, w, numbers, recipe=recipe)
        return jax.lax.psum(y.astype(jnp.float32).sum(), ("data", "model"))

    loss = jax.shard_map(
        loss, mesh=mesh, in_specs=(spec("data"), spec(None, "model")), out_specs=spec()
    )
    actual = jax.grad(loss, (0, 1))(x, w)
    assert len(products) == 2
    monkeypatch.setattr(sparse_products, "is_measured", lambda: False)
    expected = jax.grad(loss, (0, 1))(x, w)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_float32_and_ragged_products_stay_dense(products):
    product = sparse_products.sparse_product
    assert product(jnp.ones((4, 8)), jnp.ones((8, 4)), "rhs") is None
    six = jnp.ones((6, 6), jnp.bfloat16)
    assert product(six, six, "rhs") is None
    assert products == []


def test_without_a_measurement_nothing_is_judged():
    assert not sparse_products.may_run_on_tensor_core(recipes.sr_ste("2:4"))


def test_nothing_runs_there_that_plain_jnp_would_compress(products, monkeypatch):
    recipe = recipes.sr_ste("2:4")
    assert sparse_products.may_run_on_tensor_core(recipe)
    monkeypatch.setattr(implementations, "choose", lambda *_: "reference")
    assert not sparse_products.may_run_on_tensor_core(recipe)


def test_what_is_slower_is_dense(rng, products, monkeypatch):
    monkeypatch.setattr(sparse_products, "judge", lambda *_, **__: Choice("reference"))
    lhs = jnp.asarray(rng.standard_normal((T, K)), jnp.bfloat16)
    rhs = jnp.asarray(rng.standard_normal((K, N)), jnp.bfloat16)
    assert sparse_products.sparse_product(lhs, rhs, "rhs") is None
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=axis_types)
    spec = jax.sharding.PartitionSpec("data")
    lhs = jax.device_put(lhs, jax.sharding.NamedSharding(mesh, spec))
    product = jax.jit(lambda *both: sparse_products.sparse_product(*both, "rhs"))
    # Nothing is masked, and a compressed operand would lose half.
    np.testing.assert_array_equal(product(lhs, rhs), jnp.dot(lhs, rhs))


@pytest.mark.slow
def test_products_of_stacked_operands(rng, products):
    lhs = jnp.asarray(rng.integers(-3, 4, (3, T, K)), jnp.bfloat16)
    rhs = masked(jnp.asarray(rng.integers(-3, 4, (K, N)), jnp.bfloat16), -2)

    def loss(lhs, rhs):
        y = sparse_products.sparse_product(lhs, rhs, "rhs")
        return (y.astype(jnp.float32) ** 2).sum()

    values = jax.vmap(loss, (0, None))(lhs, rhs)
    grads = jax.vmap(jax.grad(loss), (0, None))(lhs, rhs)
    for i, one in enumerate(lhs):
        assert values[i] == loss(one, rhs)
        np.testing.assert_array_equal(grads[i], jax.grad(loss)(one, rhs))


@pytest.mark.parametrize("types", ["Explicit", "Manual and Auto"])
def test_axes_that_cannot_be_cut_are_dense(products, types):
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    spec = jax.sharding.PartitionSpec
    asked = []

    def ask(lhs):
        rhs = jnp.ones((K, N), jnp.bfloat16)
        asked.append(sparse_products.sparse_product(lhs, rhs, "rhs"))
        return lhs

    lhs = jnp.ones((T, K), jnp.bfloat16)
    if types == "Explicit":
        mesh = jax.make_mesh((2,), ("data",), axis_types=(explicit,))
        with jax.set_mesh(mesh):
            jax.jit(ask)(jax.device_put(lhs, spec("data")))
    else:
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(auto, auto))
        specs = {"in_specs": spec("data"), "out_specs": spec("data")}
        jax.jit(jax.shard_map(ask, mesh=mesh, axis_names={"data"}, **specs))(lhs)
    assert asked == [None]


@pytest.mark.parametrize("recipe", [EXACT, recipes.bi_mask("2:4", refresh=2)], ids=str)
def test_layers_on_explicit_meshes_are_dense(rng, products, recipe):
    """Also where a sequence and outputs are cut, which matrices would have to join."""
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types)
    spec = jax.sharding.PartitionSpec
    rules = [nmjax.Rule(".*", recipe)]
    layer = nn.Dense(N, use_bias=False, dtype=jnp.bfloat16)
    model = nmjax.sparsify(layer, rules)
    x = jnp.asarray(rng.standard_normal((2, T, K)), jnp.bfloat16)
    params = {"kernel": jnp.asarray(rng.standard_normal((K, N)), jnp.float32)}
    plan = nmjax.plan(layer, rules, x)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            state = nmjax.init_state(params, plan)
            y = model.apply({"params": params, "nm": state}, x)
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1))(params, x)

    def put(array, *axes):
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec(*axes)))

    with jax.set_mesh(mesh):
        params = {"kernel": put(params["kernel"], None, "model")}
        gradients(params, put(x, None, "data"))
    assert products == []


@pytest.mark.parametrize(
    "name",
    ["transposable", pytest.param("semi_sparse_activation", marks=pytest.mark.slow)],
)
def test_devices_share_the_products_of_a_layer(rng, products, name):
    """Data parallel, by `jax.jit` alone; each device has half of the tokens."""
    recipe = {
        "transposable": recipes.transposable("2:4", refresh=1),
        "semi_sparse_activation": recipes.semi_sparse_activation(),
    }[name]
    sizes = {
        "transposable": [(N, T, K), (K, T, N)],
        "semi_sparse_activation": [(T, N, K), (K, N, T)],
    }[name]
    halves = [tuple(n // 2 if n == T else n for n in size) for size in sizes]
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=axis_types)
    spec = jax.sharding.PartitionSpec
    x = jnp.asarray(rng.integers(-1, 2, (T, K)), jnp.bfloat16)
    model = nmjax.sparsify(
        nn.Dense(N, use_bias=False, dtype=jnp.bfloat16), [nmjax.Rule(".*", recipe)]
    )
    params = {"kernel": jnp.asarray(rng.integers(-1, 2, (K, N)), jnp.float32)}

    @jax.jit
    def gradients(params, x):
        def loss(params, x):  # all of it is exact in bfloat16
            y = model.apply({"params": params}, x)
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(params, x)

    expected = gradients(params, x)
    assert products == sizes
    products.clear()
    data = jax.sharding.NamedSharding(mesh, spec("data"))
    actual = gradients(params, jax.device_put(x, data))
    assert [size for size in products if size not in sizes] == halves
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

"""Our own kernels on several devices: each makes its part."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    NMCompressed,
    compress_magnitude,
    compress_transposable,
    compression_mosaic,
    dispatch,
    nm_matmul,
    ptx,
    reference,
)
from pallas_kernels.devices import this_device
from pallas_kernels.format import decompress
from pallas_kernels.partitioning import (
    partitioned,
    partitioned_compression,
    partitioned_gemm,
)
from pallas_kernels.reference import Form
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.ahead_of_time import H200, on
from tests.pallas_kernels.element_wise import assert_same
from tests.pallas_kernels.gemm_suite import FORMS

M, K, N = 24, 64, 16


@dataclasses.dataclass(frozen=True)
class Product:
    """Notes the sizes of each part that is made; equal to no other."""

    transpose_lhs: bool = False
    transpose_rhs: bool = False
    parts: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, lhs, rhs):
        lhs = lhs.T if self.transpose_lhs else lhs
        rhs = rhs.T if self.transpose_rhs else rhs
        self.parts.append((*lhs.shape, rhs.shape[1]))
        return lhs @ rhs


@pytest.fixture(autouse=True)
def new_traces():
    """What was traced for one test tells another nothing."""
    partitioned.cache_clear()


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def operands(rng):
    return tuple(
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((M, K), (K, N))
    )


def put(x, mesh, axes, transposed):
    axes = axes[::-1] if transposed else axes
    return jax.device_put(x.T if transposed else x, NamedSharding(mesh, P(*axes)))


HALF_M, HALF_K, HALF_N = M // 2, K // 2, N // 2


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "lhs_axes, rhs_axes, part, out_axes",
    [
        # Data parallel, fprop and dgrad; then wgrad.
        (("a", None), (None, None), (HALF_M, K, N), ("a", None)),
        ((None, "a"), ("a", None), (M, HALF_K, N), ()),
        # Weights that lie on the devices of the batch are gathered.
        (("a", None), ("a", None), (HALF_M, K, N), ("a", None)),
        (("a", None), (None, "a"), (HALF_M, K, N), ("a", None)),
        # Outputs on other devices, then inputs.
        (("a", None), (None, "b"), (HALF_M, K, HALF_N), ("a", "b")),
        (("a", "b"), ("b", None), (HALF_M, HALF_K, N), ("a", None)),
        # One axis of the matrix over both axes of the mesh.
        ((("a", "b"), None), (None, None), (M // 4, K, N), (("a", "b"), None)),
        ((None, ("a", "b")), (("a", "b"), None), (M, K // 4, N), ()),
        ((None, None), (None, None), (M, K, N), ()),
    ],
    ids=str,
)
def test_each_device_makes_its_part(
    mesh, operands, transposed, lhs_axes, rhs_axes, part, out_axes
):
    lhs, rhs = operands
    product = Product(*transposed)
    out = jax.jit(partitioned(product, *transposed))(
        put(lhs, mesh, lhs_axes, transposed[0]), put(rhs, mesh, rhs_axes, transposed[1])
    )
    np.testing.assert_array_equal(out, lhs @ rhs)
    assert product.parts[-1] == part
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(*out_axes)), 2)


@pytest.mark.parametrize(
    "k, axes, part",
    [
        (24, "a", (6, 12, 10)),
        (20, "a", (6, 20, 10)),
        (24, ("a", "b"), (6, 12, 10)),
    ],
)
def test_no_device_holds_a_part_of_a_group(mesh, rng, k, axes, part):
    lhs, rhs = rng.integers(-3, 4, (6, k)), rng.integers(-3, 4, (k, 10))
    product = Product()
    out = jax.jit(partitioned(product, False, False))(
        put(lhs, mesh, (None, axes), False), put(rhs, mesh, (axes, None), False)
    )
    np.testing.assert_array_equal(out, lhs @ rhs)
    assert product.parts[-1] == part


def test_sizes_that_devices_do_not_divide(mesh, operands):
    lhs, rhs = (operand[:, :6] if i else operand for i, operand in enumerate(operands))
    product = Product()

    @jax.jit
    def on_four(lhs, rhs):
        rhs = jax.lax.with_sharding_constraint(
            rhs, NamedSharding(mesh, P(None, ("a", "b")))
        )
        return partitioned(product, False, False)(lhs, rhs)

    np.testing.assert_array_equal(on_four(lhs, rhs), lhs @ rhs)
    assert product.parts[-1] == (M, K, 2)  # of 6 outputs, the last device has none


def test_within_transforms(mesh, operands):
    lhs, rhs = operands
    product = Product()
    function = partitioned(product, False, False)
    sharded = put(lhs, mesh, ("a", None), False)

    def repeated(lhs):
        return jax.lax.scan(lambda c, _: (c, function(lhs, rhs)), 0, length=2)[1]

    for out in jax.jit(repeated)(sharded):
        np.testing.assert_array_equal(out, lhs @ rhs)
    assert product.parts[-1] == (HALF_M, K, N)
    stacked = jnp.stack([lhs, -lhs])
    out = jax.jit(jax.vmap(function, (0, None)))(stacked, rhs)
    np.testing.assert_array_equal(out, stacked @ rhs)
    manual = jax.shard_map(
        function, mesh=mesh, in_specs=(P("a"), P(None, "b")), out_specs=P("a", "b")
    )
    np.testing.assert_array_equal(jax.jit(manual)(lhs, rhs), lhs @ rhs)
    assert product.parts[-1] == (HALF_M, K, HALF_N)


def for_two_gpus(test):
    """What XLA compiles for them, without a GPU here."""
    missing = ahead_of_time.missing()
    test = pytest.mark.skipif(missing is not None, reason=str(missing))(test)
    older = ptx.JAX_VERSION < ptx.AMPERE_SINCE
    test = pytest.mark.skipif(older, reason="the Hopper kernel in XLA needs it")(test)
    return pytest.mark.slow(test)


ROWS, COLUMNS, TOKENS = 64, 256, 24  # of A, and the other axis of B


class Gemm:
    """The reference; notes m, n, k of each part that is made. Equal to no other."""

    def __init__(self):
        self.parts = []

    def __call__(self, a, b, bias, form):
        self.parts.append(reference.sizes(a, b, form))
        return reference.gemm(a, b, bias, form)


def on_mesh(mesh, a, b, form, a_axes, b_axes):
    a = jax.tree.map(lambda array: put(array, mesh, a_axes, False), a)
    return a, put(b, mesh, b_axes, not form.b_is_kn)


def expected(a, b, bias, form):
    """In float64, rounded once."""
    out = np.asarray(decompress(a), np.float64) @ np.asarray(b, np.float64)
    out += np.asarray(bias, np.float64).reshape((-1, 1) if form.bias_along_m else (-1,))
    out = np.maximum(out, 0) if form.activation else out
    out = out.T if form.out_is_nm else out
    return np.asarray(jnp.asarray(out, form.out_dtype))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "a_axes, b_axes, part, out_axes",
    [
        # Tokens on several devices; then outputs and inputs too.
        ((None, None), (None, "a"), (ROWS, TOKENS // 2, COLUMNS), (None, "a")),
        (("b", None), (None, "a"), (ROWS // 2, TOKENS // 2, COLUMNS), ("b", "a")),
        ((None, "b"), ("b", "a"), (ROWS, TOKENS // 2, COLUMNS // 2), (None, "a")),
        ((None, ("a", "b")), (None, None), (ROWS, TOKENS, COLUMNS // 4), ()),
        ((None, None), (None, ("a", "b")), (ROWS, TOKENS // 4, COLUMNS), None),
        ((None, None), (None, None), (ROWS, TOKENS, COLUMNS), ()),
    ],
    ids=str,
)
def test_each_device_makes_its_part_of_a_compressed_product(
    mesh, rng, form, a_axes, b_axes, part, out_axes
):
    """Sums of parts are not rounded, and what follows the product follows the sum."""
    form = dataclasses.replace(form, activation="relu")
    integers = functools.partial(rng.integers, -9, 10)
    w, b = (
        jnp.asarray(integers(shape), jnp.bfloat16)
        for shape in ((ROWS, COLUMNS), (COLUMNS, TOKENS))
    )
    a = compress_magnitude(w, axis=-1)
    bias = integers(ROWS if form.bias_along_m else TOKENS)
    bias = jnp.asarray(bias, jnp.float32)
    gemm = Gemm()
    function = functools.partial(partitioned_gemm, gemm, bias=bias, form=form)
    out = jax.jit(function)(*on_mesh(mesh, a, b, form, a_axes, b_axes))
    np.testing.assert_array_equal(out, expected(a, b, bias, form))
    assert gemm.parts[-1] == part
    if out_axes is not None:
        spec = P(*(out_axes[::-1] if form.out_is_nm else out_axes))
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize("on_left", [False, True])
@pytest.mark.parametrize("tokens, part_of_tokens", [(256, 128), (16, 16)])
def test_weights_on_the_devices_of_the_batch(
    mesh, rng, on_left, tokens, part_of_tokens
):
    """The smaller operand is gathered, and D lies as the larger one does."""
    m, n = (tokens, ROWS) if on_left else (ROWS, tokens)
    form = Form(b_is_kn=on_left, out_is_nm=not on_left, bias_along_m=not on_left)
    a = jnp.asarray(rng.integers(-3, 4, (m, COLUMNS)), jnp.bfloat16)
    b = jnp.asarray(rng.integers(-3, 4, (COLUMNS, n)), jnp.bfloat16)
    a, bias, gemm = compress_magnitude(a, axis=-1), jnp.arange(64.0), Gemm()
    function = functools.partial(partitioned_gemm, gemm, bias=bias, form=form)
    operands = on_mesh(mesh, a, b, form, ("a", None), (None, "a"))
    lowered = jax.jit(function).lower(*operands).compile()
    np.testing.assert_array_equal(lowered(*operands), expected(a, b, bias, form))
    features = ROWS if part_of_tokens < tokens else ROWS // 2
    sizes = (part_of_tokens, features)
    assert gemm.parts[-1] == (*(sizes if on_left else sizes[::-1]), COLUMNS)
    assert "all-to-all" not in lowered.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("rows, columns", [(40, 256), (64, 192), (24, 72)])
def test_no_device_holds_a_part_of_a_word(mesh, rng, rows, columns):
    w = jnp.asarray(rng.integers(-3, 4, (rows, columns)), jnp.bfloat16)
    x = jnp.asarray(rng.integers(-3, 4, (6, columns)), jnp.bfloat16)
    a, form, gemm = compress_magnitude(w, axis=-1), Form(), Gemm()

    @jax.jit
    def function(a, x):
        where = NamedSharding(mesh, P("b", "a"))
        values = jax.lax.with_sharding_constraint(a.values, where)
        a = NMCompressed(values, a.metadata, axis=-1)
        return partitioned_gemm(gemm, a, x, None, form)

    x = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
    out = function(jax.device_put(a, NamedSharding(mesh, P())), x)
    np.testing.assert_array_equal(out, expected(a, x.T, np.zeros(rows), form))
    m = rows if rows % 32 else rows // 2
    k = columns if columns % 128 else columns // 2
    assert gemm.parts[-1] == (m, 6, k)


class Compress:
    """The reference; notes the shape of each part. Equal to no other."""

    def __init__(self, *axes):
        self.axes, self.parts = axes, []

    def __call__(self, w):
        self.parts.append(w.shape)
        if len(self.axes) == 2:
            form, transposed = reference.compress_transposable(
                w, jnp.bfloat16, at_most=False
            )
            return [form, transposed.T]
        if self.axes == (-1,):
            return [reference.compress_2to4(w, jnp.bfloat16)]
        return [reference.compress_2to4(w.T, jnp.bfloat16).T]


ROWS_FIRST, COLUMNS_FIRST, BOTH = (-1,), (-2,), (-2, -1)


def compressed_on_mesh(rng, mesh, axes, shape, spec, wanted=None):
    """Compresses a matrix on a mesh, whose axes cut it and the values of its form.

    Returns:
      What each device was asked for, and the forms, which one device makes too.
    """
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    compress = Compress(*axes)

    @jax.jit
    def function(w):
        form, *others = partitioned_compression(compress, w, axes)
        if wanted is not None:
            where = NamedSharding(mesh, P(*wanted))
            values = jax.lax.with_sharding_constraint(form.values, where)
            form = dataclasses.replace(form, values=values)
        return [form, *others]

    forms = function(jax.device_put(w, NamedSharding(mesh, P(*spec))))
    for form, same in zip(forms, Compress(*axes)(w), strict=True):
        assert_same(form, same)
    return compress.parts[-1], forms


@pytest.mark.parametrize(
    "axes, shape, spec, part",
    [
        (ROWS_FIRST, (32, 256), (None, None), (32, 256)),
        (ROWS_FIRST, (32, 256), ("a", None), (16, 256)),
        (ROWS_FIRST, (32, 256), (None, "a"), (32, 128)),
        (ROWS_FIRST, (32, 256), (None, ("a", "b")), (32, 64)),
        (COLUMNS_FIRST, (128, 64), ("a", None), (64, 64)),
        (COLUMNS_FIRST, (128, 64), ("a", "b"), (64, 32)),
        (COLUMNS_FIRST, (64, 64), (None, ("a", "b")), (64, 16)),
        (COLUMNS_FIRST, (20, 64), (None, "a"), (20, 32)),
        (BOTH, (128, 256), ("b", None), (64, 256)),
        (BOTH, (128, 256), ("a", "b"), (64, 128)),
        (BOTH, (128, 256), (None, ("b", "a")), (128, 64)),
    ],
    ids=str,
)
def test_each_device_compresses_its_part(mesh, rng, axes, shape, spec, part):
    found, forms = compressed_on_mesh(rng, mesh, axes, shape, spec)
    assert found == part
    for form, axis in zip(forms, axes, strict=True):
        where = NamedSharding(mesh, P(*(spec if axis == -1 else spec[::-1])))
        assert form.values.sharding.is_equivalent_to(where, 2)
        assert form.metadata.sharding.is_equivalent_to(where, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, shape, spec, part",
    [
        # No whole words; fewer words than devices; an axis of the mesh too many.
        (ROWS_FIRST, (40, 192), ("a", "b"), (40, 192)),
        (ROWS_FIRST, (16, 64), ("a", "b"), (16, 64)),
        (COLUMNS_FIRST, (192, 48), ("a", None), (192, 48)),
        (COLUMNS_FIRST, (192, 48), (None, "a"), (192, 48)),
        (COLUMNS_FIRST, (8, 4), ("a", "b"), (8, 4)),
        (COLUMNS_FIRST, (128, 40), ("a", "b"), (64, 40)),
        (ROWS_FIRST, (32, 64), (("a", "b"), None), (16, 64)),
        (BOTH, (128, 32), ("b", "a"), (64, 32)),
        (BOTH, (128, 64), (("a", "b"), None), (64, 64)),
    ],
    ids=str,
)
def test_no_device_compresses_a_part_of_a_word(mesh, rng, axes, shape, spec, part):
    """What is gathered is not cut afterwards, for the product to gather it again."""
    found, forms = compressed_on_mesh(rng, mesh, axes, shape, spec)
    assert found == part
    for form, axis in zip(forms, axes, strict=True):
        own = part if axis == -1 else part[::-1]
        assert form.values.sharding.shard_shape(form.values.shape) == (
            own[0],
            own[1] // 2,
        )


@pytest.mark.parametrize(
    "spec, wanted, part",
    [
        ((None, None), ("a", "b"), (64, 32)),
        (("a", None), ("b", "a"), (64, 32)),
        (("a", None), ("a", None), (64, 64)),  # the values move, and they are smaller
    ],
    ids=str,
)
def test_a_matrix_is_cut_as_its_values_are_wanted(mesh, rng, spec, wanted, part):
    axes = COLUMNS_FIRST
    found, _ = compressed_on_mesh(rng, mesh, axes, (128, 64), spec, wanted)
    assert found == part


@for_two_gpus
def test_two_gpus_multiply_their_own_tokens():
    """As XLA compiles a feed-forward block for them, without a GPU here."""
    devices = ahead_of_time.devices(H200, 2)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def block(x, up, down):
        h = nm_matmul(x, up, activation="gelu", implementation="sm90")
        return x + nm_matmul(h, down, implementation="sm90")

    x = jax.ShapeDtypeStruct((4, 64, 256), jnp.bfloat16)
    up, down = (
        on(mesh, jax.eval_shape(compress_magnitude, jnp.zeros(shape)))
        for shape in ((256, 512), (512, 256))
    )
    hlo = ahead_of_time.program(mesh, block, on(mesh, x, "data"), up, down)
    products = re.findall(r"= (bf16\[[\d,]+\])\S* custom-call\(.*mosaic_gpu", hlo)
    assert products == ["bf16[128,512]", "bf16[128,256]"]
    assert not re.search("all-|collective-permute", hlo)


@for_two_gpus
@pytest.mark.parametrize("cut", [("data", None), (None, "data")], ids=str)
def test_two_gpus_compress_their_own_parts(cut, monkeypatch):
    """And exchange nothing, in the gradient too: only the product sums or gathers."""
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    devices = ahead_of_time.devices(H200, 2)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def magnitude(w):
        return [compress_magnitude(w, implementation="mosaic")]

    def transposable(w):
        return compress_transposable(w, implementation="mosaic")

    def update(compress, w):
        def energy(w):
            forms = compress(w)
            squares = [jnp.square(f.values.astype(jnp.float32)).sum() for f in forms]
            return sum(squares), forms

        gradient, forms = jax.grad(energy, has_aux=True)(w)
        return w - gradient, forms

    w = on(mesh, jax.ShapeDtypeStruct((512, 256), jnp.float32), *cut)
    for compress in (magnitude, transposable):
        hlo = ahead_of_time.program(mesh, functools.partial(update, compress), w)
        (kernel,) = re.findall(r"= \((.*)\) custom-call\(.*mosaic_gpu", hlo)
        values = re.findall(r"bf16\[([\d,]+)\]", kernel)
        kept = {math.prod(map(int, shape.split(","))) for shape in values}
        assert kept == {512 * 256 // 2 // 2}, "half of a half"
        assert not re.search("all-|collective-permute", hlo)


@for_two_gpus
def test_two_gpus_gather_what_they_compressed(monkeypatch):
    """In fully sharded data parallelism: 9 bits an entry in place of 32."""
    monkeypatch.setattr(compression_mosaic, "unavailable", lambda: None)
    devices = ahead_of_time.devices(H200, 2)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def layer(x, w):
        w24 = compress_magnitude(w, implementation="mosaic")
        return nm_matmul(x, w24, implementation="sm90")

    x, w = (jax.ShapeDtypeStruct((256, 256), d) for d in (jnp.bfloat16, jnp.float32))
    hlo = ahead_of_time.program(mesh, layer, on(mesh, x, "data"), on(mesh, w, "data"))
    gathered = re.findall(r"= (.*) all-gather(?:-start)?\(", hlo)
    assert set(re.findall(r"\w+(?=\[)", str(gathered))) == {"bf16", "s32"}
    products = re.findall(r"= (bf16\[[\d,]+\])\S* custom-call\(.*mosaic_gpu", hlo)
    assert products == ["bf16[128,256]"]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "a_axes, b_axes",
    [
        ((None, None), (None, "a")),
        (("a", None), (None, None)),
        ((None, "a"), ("a", None)),
    ],
    ids=["tokens", "features", "contracted"],
)
def test_on_two_gpus(rng, form, a_axes, b_axes):
    """With this device's kernel; the last layout sums over the devices."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",), axis_types=(AxisType.Auto,))
    m, n, k = 512, 512, 512
    w, b = (
        jnp.asarray(rng.integers(-4, 5, shape), jnp.bfloat16)
        for shape in ((m, k), (k, n))
    )
    bias = jnp.asarray(rng.integers(-9, 10, 512), jnp.float32)
    a = compress_magnitude(w, axis=-1, implementation="reference")
    kernel = dispatch.kernel(this_device().kernel).gemm
    function = functools.partial(partitioned_gemm, kernel, bias=bias, form=form)
    out = jax.jit(function)(*on_mesh(mesh, a, b, form, a_axes, b_axes))
    np.testing.assert_array_equal(out, expected(a, b, bias, form))

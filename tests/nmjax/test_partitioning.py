"""Products of our own kernels on several devices: each makes its part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.partitioning import partitioned

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


@pytest.mark.parametrize("k, part", [(24, (6, 12, 10)), (20, (6, 20, 10))])
def test_no_device_holds_a_part_of_a_group(mesh, rng, k, part):
    lhs, rhs = rng.integers(-3, 4, (6, k)), rng.integers(-3, 4, (k, 10))
    product = Product()
    out = jax.jit(partitioned(product, False, False))(
        put(lhs, mesh, (None, "a"), False), put(rhs, mesh, ("a", None), False)
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

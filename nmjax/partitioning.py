"""Matrix products by a kernel, cut over devices as XLA cuts its own.

To XLA's partitioner a kernel is a sealed box: on several devices it gathers the
operands and has every device make the whole product. Here it is told what the box
computes,

    D[i, j] = sum_k L[i, k] R[k, j]

so each device makes the part of D that it holds, from the parts that it needs of L and
R: batches (i) that lie on several devices stay there, as do outputs (j). Where k lies
on several devices their products are summed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

_GROUP = 4  # along k, of which no device may hold a part

Product = Callable[[jax.Array, jax.Array], jax.Array]


@functools.cache
def partitioned(product: Product, transpose_lhs: bool, transpose_rhs: bool) -> Product:
    """`product`, which the partitioner can cut.

    Inside `jax.shard_map` and on one device it is `product` itself; `jax.vmap` maps
    `product`, which the partitioner then cannot cut.

    Args:
      product: A hashable function of L and R, each device's part, that gives D.
      transpose_lhs: L comes as (k, i) in place of (i, k).
      transpose_rhs: R comes as (j, k) in place of (k, j).
    """
    lhs = "k i" if transpose_lhs else "i k"
    rhs = "j k" if transpose_rhs else "k j"
    cut = custom_partitioning(lambda lhs, rhs: product(lhs, rhs))
    cut.def_partition(
        functools.partial(_cut, product, transpose_lhs, transpose_rhs),
        sharding_rule=f"{lhs}, {rhs} -> i j",
        reduction_factors=("k",),
    )
    mapped = jax.custom_batching.custom_vmap(cut)

    @mapped.def_vmap
    def rule(size, batched, lhs, rhs):
        del size
        in_axes = [0 if is_batched else None for is_batched in batched]
        return jax.vmap(product, in_axes)(lhs, rhs), True

    return mapped


def _cut(product, transpose_lhs, transpose_rhs, mesh, operands, result):
    """What each device makes, and which part of L, R and D it holds."""
    (l_i, l_k), (r_k, r_j) = (
        axes[::-1] if transposed else axes
        for axes, transposed in zip(
            map(_mesh_axes, operands), (transpose_lhs, transpose_rhs), strict=True
        )
    )
    d_i, d_j = _mesh_axes(result)
    i = d_i or l_i
    j = _without(d_j or r_j, i)
    k = _without(l_k or r_k, i + j)
    size = operands[0].shape[0 if transpose_lhs else 1]
    if size % (_GROUP * math.prod(mesh.shape[axis] for axis in k)):
        k = ()

    def part(lhs, rhs):
        out = product(lhs, rhs)
        return lax.psum(out, k) if k else out

    def sharding(*axes, transposed=False):
        spec = PartitionSpec(*(axes[::-1] if transposed else axes))
        return NamedSharding(mesh, spec)

    return (
        mesh,
        part,
        sharding(i, j),
        (
            sharding(i, k, transposed=transpose_lhs),
            sharding(k, j, transposed=transpose_rhs),
        ),
    )


def _mesh_axes(x: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that cut each axis of a matrix."""
    spec = (*x.sharding.spec, None, None)[:2]
    return tuple(
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in spec
    )


def _without(axes: tuple[str, ...], taken: tuple[str, ...]) -> tuple[str, ...]:
    """Mesh axes of which none is taken, or no axes."""
    return () if set(axes) & set(taken) else axes

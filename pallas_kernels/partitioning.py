"""Kernels that XLA cuts over devices as it cuts its own operations.

To XLA's partitioner a kernel is a sealed box: on several devices it gathers the
operands and has every device compute the whole result. Here it is told what the box
computes. Of a matrix product,

    D[i, j] = sum_k L[i, k] R[k, j]

so each device makes the part of D that it holds, from the parts that it needs of L and
R: tokens that lie on several devices stay there, as do features. Where both lie on the
same ones, XLA keeps those of the larger operand and gathers the other. Where k lies on
several devices their products are summed.

A matrix is compressed where it lies: each device compresses its own part.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.format import NMCompressed
from pallas_kernels.reference import Form, epilogue

Product = Callable[[jax.Array, jax.Array], jax.Array]
Gemm = Callable[[NMCompressed, jax.Array, jax.Array | None, Form], jax.Array]
Compress = Callable[[jax.Array], list[NMCompressed]]

_Axes = tuple[str, ...]  # of the mesh, that cut one axis of a matrix

# Of what no device may hold a part: a group along k; of a compressed matrix a word.
_GROUP = 4
_WORD = (16, 64)


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
    cut = _cuttable(
        lambda lhs, rhs: product(lhs, rhs),
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
    l_i, l_k = _mesh_axes(operands[0], transpose_lhs)
    r_k, r_j = _mesh_axes(operands[1], transpose_rhs)
    d_i, d_j = _mesh_axes(result)
    i = d_i or _without(l_i, d_j)
    j = d_j or _without(r_j, i)
    size = operands[0].shape[0 if transpose_lhs else 1]
    k = _whole(_without(l_k or r_k, i + j), size, _GROUP, mesh)

    def part(lhs, rhs):
        out = product(lhs, rhs)
        return lax.psum(out, k) if k else out

    return (
        mesh,
        part,
        _sharding(mesh, i, j),
        (
            _sharding(mesh, i, k, transposed=transpose_lhs),
            _sharding(mesh, k, j, transposed=transpose_rhs),
        ),
    )


def partitioned_gemm(
    gemm: Gemm, a: NMCompressed, b: jax.Array, bias: jax.Array | None, form: Form
) -> jax.Array:
    """`gemm(a, b, bias, form)`, which the partitioner can cut.

    It cuts the compressed operand between its metadata words, 16 rows and 64 columns;
    sums over devices are of float32 products, before bias and activation.

    Args:
      gemm: As `reference.gemm`, of each device's part.
      a: Operand A, one 2:4 matrix, `axis=-1`.
      b: Operand B.
      bias: None, or a vector.
      form: The layouts of B and D, the activation, the dtype of D.
    """
    rule = ("k n" if form.b_is_kn else "n k") + ", m h, r w"
    if bias is not None:
        rule += ", m" if form.bias_along_m else ", n"

    cut = _cuttable(
        functools.partial(_on_arrays, gemm, form),
        functools.partial(_parts_of_gemm, gemm, form),
        sharding_rule=f"{rule} -> " + ("n m" if form.out_is_nm else "m n"),
        reduction_factors=("k", "h", "r", "w"),  # in the order of the rule
    )
    return cut(b, a.values, a.metadata, bias)


def _on_arrays(gemm: Gemm, form: Form, b, values, metadata, bias) -> jax.Array:
    return gemm(NMCompressed(values, metadata, axis=-1), b, bias, form)


def _parts_of_gemm(gemm, form: Form, mesh, operands, result):
    """What each device makes, and which part of A, B, the bias and D it holds."""
    b, values, _, bias = operands
    a_m, a_k = _mesh_axes(values)
    b_k, b_n = _mesh_axes(b, not form.b_is_kn)
    d_m, d_n = _mesh_axes(result, form.out_is_nm)
    rows, columns = values.shape[0], 2 * values.shape[1]
    n = d_n or _without(b_n, d_m)
    m = _whole(d_m or _without(a_m, n), rows, _WORD[0], mesh)
    k = _whole(_without(b_k or a_k, m + n), columns, _WORD[1], mesh)

    def part(b, values, metadata, bias):
        if not k:
            return _on_arrays(gemm, form, b, values, metadata, bias)
        product = dataclasses.replace(form, activation=None, out_dtype=jnp.float32)
        out = _on_arrays(gemm, product, b, values, metadata, None)
        return epilogue(lax.psum(out, k), bias, form)

    along = m if form.bias_along_m else n
    return (
        mesh,
        part,
        _sharding(mesh, m, n, transposed=form.out_is_nm),
        (
            _sharding(mesh, k, n, transposed=not form.b_is_kn),
            _sharding(mesh, m, k),
            _sharding(mesh, m, k),
            None if bias is None else _sharding(mesh, along),
        ),
    )


def partitioned_compression(
    compress: Compress, w: jax.Array, axes: tuple[int, ...]
) -> list[NMCompressed]:
    """`compress(w)`, which the partitioner can cut.

    It cuts the matrix between the metadata words of all its forms: every 64 entries
    along an axis of groups, every 16 along another. What cuts a word is gathered.

    Args:
      compress: Of each device's part, makes compressed forms of the part's shape.
      w: The matrix.
      axes: The group axis of each form, -2 or -1.
    """
    units = {axis: _WORD[axis in axes] for axis in (-2, -1)}
    rule, sizes = _rule_of_compression(w, axes, units)
    cut = _cuttable(
        compress,
        functools.partial(_parts_of_compression, compress, units),
        sharding_rule=rule,
        **sizes,
    )
    return cut(w)


def _rule_of_compression(w, axes, units):
    """How axes of the matrix and its forms are cut alike, and the sizes of factors.

    An axis of each array is `i` or `j` words of so many entries. Where it is no whole
    number of words, or one, it is cut like no other.
    """
    sizes = {}
    names = (f"x{n}" for n in itertools.count())

    def along(axis, share):  # in an array with one of `share` entries of the matrix
        words, rest = divmod(w.shape[axis], units[axis])
        entries = next(names)
        if rest or words < 2:
            return entries
        word = "j" if axis == -1 else "i"
        sizes.update({word: words, entries: units[axis] // share})
        return f"({word} {entries})"

    arrays = [f"{along(-2, 1)} {along(-1, 1)}"]
    for axis in axes:
        rows = -3 - axis
        arrays.append(f"{along(rows, 1)} {along(axis, 2)}")  # values
        arrays.append(f"{along(rows, 2)} {along(axis, 16)}")  # metadata
    matrix, *forms = arrays
    return f"{matrix} -> {', '.join(forms)}", sizes


def _parts_of_compression(compress: Compress, units, mesh, operands, forms):
    """What each device makes, and which part of the matrix and its forms it holds."""
    (w,) = operands
    w_i, w_j = _mesh_axes(w)
    form_i, form_j = _mesh_axes(forms[0].values, forms[0].axis == -2)
    i = w_i or _without(form_i, w_j)
    j = w_j or _without(form_j, i)
    i = _whole(i, w.shape[-2], units[-2], mesh)
    j = _whole(j, w.shape[-1], units[-1], mesh)

    def sharding(form):
        where = _sharding(mesh, i, j, transposed=form.axis == -2)
        return jax.tree.map(lambda _: where, form)

    return mesh, compress, [sharding(form) for form in forms], (_sharding(mesh, i, j),)


def _cuttable(function: Callable, parts: Callable, **rule: Any) -> Callable:
    """`function`, which the partitioner cuts into `parts` by a rule for Shardy.

    With `jax_use_shardy_partitioner` off it is `function` itself, and XLA gathers.
    """
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return function
    cut = custom_partitioning(function)
    cut.def_partition(parts, **rule)
    return cut


def axis_types(*operands: jax.Array) -> set[AxisType]:
    """Of the meshes that arrays lie on, as far as is known while they are traced."""
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands]
    return {axis_type for mesh in meshes for axis_type in mesh.axis_types}


def _mesh_axes(x: Any, transposed: bool = False) -> tuple[_Axes, ...]:
    """The mesh axes that cut each axis of a matrix, or of its transpose."""
    spec = (*x.sharding.spec, None, None)[:2]
    axes = tuple(
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in spec
    )
    return axes[::-1] if transposed else axes


def _without(axes: _Axes, taken: _Axes) -> _Axes:
    """Mesh axes of which none is taken, or no axes."""
    return () if set(axes) & set(taken) else axes


def _whole(axes: _Axes, size: int, unit: int, mesh: Any) -> _Axes:
    """The mesh axes, from the first, over which `size` is cut into whole units."""
    while axes and size % (unit * math.prod(mesh.shape[axis] for axis in axes)):
        axes = axes[:-1]
    return axes


def _sharding(mesh: Any, *axes: _Axes, transposed: bool = False) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axes[::-1] if transposed else axes)))

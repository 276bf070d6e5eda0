"""A layer's matrix products on sparse tensor cores, where that was measured faster.

A GEMM of which one operand is 2:4 along the axis that it contracts, a pointwise
convolution's too, can run on the kernels of `pallas_kernels`. It does where
`pallas_kernels.dispatch` knows a measurement of this device that says so, the time to
compress the operand included; elsewhere, and that is everywhere until a device was
measured with `python -m pallas_kernels.bench --tune`, the product of the masked operand
is dense. Both accumulate in float32 and round once. On a kernel a layer has gradients
to any order in reverse mode, but no Hessian.

On several devices XLA's partitioner cuts the product as it cuts a dense one
(`pallas_kernels.partitioning`); whether a part is sparse is decided by its own sizes.

The operand arrives masked, with zeros. It is compressed on the way: zeros lose every
comparison of magnitudes, so what is compressed is what the dense product would read.
Activations under the exact mask of 4×4 tiles are masked and compressed for both of
their GEMMs in one pass (`both_ways`).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from nmjax.masks.tiles import EXACT
from nmjax.pattern import NMPattern
from nmjax.recipe import Recipe
from pallas_kernels import (
    NMCompressed,
    compress_magnitude,
    compress_transposable,
    implementations,
    nm_matmul,
)
from pallas_kernels.devices import this_device
from pallas_kernels.dispatch import is_measured, judge
from pallas_kernels.partitioning import axis_types, partitioned
from pallas_kernels.reference import Form

_PATTERN = NMPattern("2:4")  # that instructions multiply
_DTYPES = ("bfloat16", "float16")


def may_run_on_tensor_core(recipe: Recipe) -> bool:
    """Whether a GEMM of this recipe can run on a sparse tensor core of this device."""
    return (
        recipe.pattern == _PATTERN
        and is_measured()
        and implementations.choose(None, "compression") != "reference"
    )


class BothWays(NamedTuple):
    """Activations (t, k) under one mask that is 2:4 along both axes.

    Attributes:
      fprop: x24, (t, k), groups along k.
      wgrad: x24ᵀ, (k, t), groups along t.
    """

    fprop: NMCompressed
    wgrad: NMCompressed


def both_ways(gemm: Any, recipe: Recipe, x: jax.Array, w: jax.Array) -> BothWays | None:
    """x masked and compressed for fprop and wgrad in one pass.

    That reads and writes 4.25 bytes an entry of 16 bits, where a mask and one pass for
    each GEMM take 10.25.

    Args:
      gemm: Of `nmjax.ops`.
      recipe: Both GEMMs read x, under tiles.
      x: Activations as they come.
      w: Weight.

    Returns:
      None where a GEMM is to be dense, the mask is not the exact one, 4 does not divide
      the tokens, or XLA may cut the products over several devices: how large the parts
      are, and whether sparse, is only known then.
    """
    if recipe.tile != EXACT or recipe.wgrad != "activation":
        return None
    if not (may_run_on_tensor_core(recipe) and _is_whole(x) and _is_whole(w)):
        return None
    matrices = gemm.matrices(x, w)
    if matrices is None:
        return None
    x2, w2 = matrices
    if x2.dtype != w2.dtype or x2.dtype.name not in _DTYPES:
        return None
    if x2.shape[0] % 4 or x2.shape[1] % 4:
        return None
    dy2 = jax.ShapeDtypeStruct((x2.shape[0], w2.shape[1]), x2.dtype)
    fprop = SparseProduct("lhs", transpose_lhs=False, transpose_rhs=False)
    wgrad = SparseProduct("lhs", transpose_lhs=True, transpose_rhs=False)
    if not (fprop.is_faster(x2, w2) and wgrad.is_faster(x2, dy2)):
        return None
    along_tokens, along_features = compress_transposable(x2, dtype=x2.dtype)
    return BothWays(along_features.T, along_tokens.T)


def _is_whole(x: jax.Array) -> bool:
    """Whether XLA will not cut an array: it is on one device, or a device's part.

    Of an array without a mesh nothing is known, where there are several devices.
    """
    types, mesh = axis_types(x), jax.typeof(x).sharding.mesh
    if not types:
        return jax.device_count() == 1
    return types == {AxisType.Manual} or (types == {AxisType.Auto} and mesh.size == 1)


def on_tensor_core(
    name: Literal["fprop", "dgrad", "wgrad"],
    gemm: Any,
    recipe: Recipe | None,
    x: jax.Array,
    w: jax.Array,
    dy: Any = None,
    order: jax.Array | None = None,
    x24: BothWays | None = None,
) -> jax.Array | None:
    """y, dx or dW of a layer; None where its GEMM is to be dense.

    Args:
      name: Which of the three GEMMs.
      gemm: Of `nmjax.ops`; `gemm.matrices(x, w)` gives x as (t, k) and w as (k, n).
      recipe: Says which operand is 2:4.
      x: Activations, masked where the recipe masks them.
      w: Weight that the GEMM reads, masked.
      dy: Gradient of y; for wgrad as it was sampled.
      order: Of the outputs, the last axis of w and dy, in which dgrad's w is 2:4.
      x24: Of `both_ways`, to be read in place of x; there is no dense product of it.

    Returns:
      y, or dx and dW of the shapes of x and w; inside `shard_map` summed over the mesh
      axes that the product varies over and x or w does not.
    """
    if recipe is None or not may_run_on_tensor_core(recipe):
        return None
    if AxisType.Explicit in axis_types(x, w):
        return None
    if order is not None:
        w, dy = (jnp.take(a, order, axis=-1) for a in (w, dy))
    matrices = gemm.matrices(x, w)
    operand = getattr(recipe, name)
    if matrices is None or operand in (None, "activation-fixed"):
        return None
    x2, w2 = matrices
    if name == "fprop":
        if x24 is None:
            y = sparse_product(x2, w2, "rhs" if operand == "weight" else "lhs")
        else:
            y = nm_matmul(x24.fprop, w2)
        return None if y is None else y.reshape(jax.eval_shape(gemm, x, w).shape)
    dy2 = jnp.reshape(dy, (-1, w2.shape[1]))
    if name == "dgrad":
        dx = sparse_product(dy2, w2, "rhs", transpose_rhs=True)
        return None if dx is None else _as_cotangent(dx, x)
    if x24 is None:
        sparse = "lhs" if operand == "activation" else "rhs"
        dw = sparse_product(x2, dy2, sparse, transpose_lhs=True)
    else:
        dw = nm_matmul(x24.wgrad, dy2)
    return None if dw is None else _as_cotangent(dw, w)


def _as_cotangent(d: jax.Array, primal: jax.Array) -> jax.Array:
    over, of = (jax.typeof(a).manual_axis_type.varying for a in (d, primal))
    summed = jax.lax.psum(d, tuple(over - of)) if over - of else d
    return summed.reshape(primal.shape)


def sparse_product(
    lhs: jax.Array,
    rhs: jax.Array,
    sparse: Literal["lhs", "rhs"],
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> jax.Array | None:
    """`lhs · rhs` on a sparse tensor core; None where a dense product is to be made.

    Along Auto axes of a mesh each device makes its own part, whose sizes are known when
    XLA has cut the product: then that part is sparse or dense.

    Args:
      lhs: `(m, k)`; with `transpose_lhs` its transpose.
      rhs: `(k, n)`; with `transpose_rhs` its transpose, where it is the sparse one.
      sparse: The operand that is 2:4 along k; the other is dense.
      transpose_lhs: `lhs` lies in memory as `(k, m)`.
      transpose_rhs: `rhs` lies in memory as `(n, k)`.

    Returns:
      `(m, n)` in the dtype of the operands, or None: the dtype has no instruction, 4
      does not divide k, no measurement of this device says that it is faster, or the
      mesh has axes neither all Auto nor all Manual.
    """
    product = SparseProduct(sparse, transpose_lhs, transpose_rhs)
    _, _, k = product.sizes(lhs, rhs)
    if lhs.dtype != rhs.dtype or lhs.dtype.name not in _DTYPES or k % 4:
        return None
    of_mesh = axis_types(lhs, rhs)
    if len(of_mesh) > 1 or AxisType.Explicit in of_mesh:
        return None
    if AxisType.Auto not in of_mesh and not product.is_faster(lhs, rhs):
        return None
    return _product(product, lhs, rhs)


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """`lhs · rhs` as one device makes it; the fields as of `sparse_product`."""

    sparse: Literal["lhs", "rhs"]
    transpose_lhs: bool
    transpose_rhs: bool

    def sizes(self, lhs: Any, rhs: Any) -> tuple[int, int, int]:
        """m, n and k."""
        m, k = lhs.shape[::-1] if self.transpose_lhs else lhs.shape
        return m, rhs.shape[0 if self.transpose_rhs else 1], k

    def is_faster(self, lhs: Any, rhs: Any) -> bool:
        """Whether it was measured to be, on this device near these sizes."""
        m, n, k = self.sizes(lhs, rhs)
        on_right = self.sparse == "rhs"
        # As `nm_matmul` makes it: the compressed operand is the instruction's A.
        form = Form(b_is_kn=self.transpose_lhs or not on_right, out_is_nm=on_right)
        sizes = (n, m, k) if on_right else (m, n, k)
        device = this_device()
        choice = judge(
            *sizes, dtype=lhs.dtype, form=form, device=device, compressing=True
        )
        return choice.name != "reference"

    def dense(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The same product with the zeros in it."""
        axes = ((0 if self.transpose_lhs else 1,), (1 if self.transpose_rhs else 0,))
        return lax.dot_general(lhs, rhs, (axes, ((), ())))

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The product, sparse if that is faster."""
        _, _, k = self.sizes(lhs, rhs)
        if k % 4 or not self.is_faster(lhs, rhs):
            return self.dense(lhs, rhs)
        if self.sparse == "rhs":
            compressed = _compressed(rhs, -1 if self.transpose_rhs else -2)
            right = compressed.T if self.transpose_rhs else compressed
            return nm_matmul(lhs, right, transpose_dense=self.transpose_lhs)
        compressed = _compressed(lhs, -2 if self.transpose_lhs else -1)
        return nm_matmul(compressed.T if self.transpose_lhs else compressed, rhs)


def _compressed(x: jax.Array, axis: int):
    return compress_magnitude(x, axis=axis, dtype=x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(product: SparseProduct, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return partitioned(product, product.transpose_lhs, product.transpose_rhs)(lhs, rhs)


def _product_fwd(product, lhs, rhs):
    return _product(product, lhs, rhs), (lhs, rhs)


def _product_bwd(product, operands, d_out):
    _, vjp = jax.vjp(product.dense, *operands)
    return vjp(d_out)


_product.defvjp(_product_fwd, _product_bwd)

"""The three GEMMs of a layer, written once.

    fprop  y  = gemm(x, w)
    dgrad  dx = gemmᵀ(dy; w)        the transpose of fprop in x
    wgrad  dw = gemmᵀ(dy; x)        the transpose of fprop in w

A GEMM is any function linear in `x` and in `w`: a frozen dataclass that holds the
static geometry and calls the lax primitive, so that matrix products and convolutions
share one `custom_vjp`. `w` is the sparse weight, already masked and cast: choosing a
mask and decaying dropped weights are not the business of this file. A method that
uses another operand in one of the three GEMMs replaces that line here and nowhere
else.

Gradients are reverse mode, to any order; a Hessian is forward over reverse and works.
jax refuses `jvp`, `jacfwd` and `linearize`, and its traceback shows the line that calls
the `custom_vjp`: the comment there is for the user.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

Gemm = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def three_gemms(gemm: Gemm, x: jax.Array, w: jax.Array) -> jax.Array:
    """`gemm(x, w)` with its two backward GEMMs explicit.

    Args:
      gemm: Hashable function, linear in each of its two arguments.
      x: Activations.
      w: Sparse weight, in the compute dtype.

    Returns:
      `gemm(x, w)`; the gradients have the dtypes of `x` and `w`. Inside
      `shard_map`, wgrad sums over the mesh axes that `x` varies over and `w` does
      not.
    """
    return gemm(x, w)


def _fprop(gemm: Gemm, x, w):
    return gemm(x, w), (x, w)


def _dgrad_wgrad(gemm: Gemm, residuals, dy):
    x, w = residuals
    (dx,) = jax.linear_transpose(lambda x: gemm(x, w), x)(dy)
    (dw,) = jax.linear_transpose(lambda w: gemm(x, w), w)(dy)
    return dx, dw


three_gemms.defvjp(_fprop, _dgrad_wgrad)


@dataclasses.dataclass(frozen=True)
class _Dot:
    dimension_numbers: Any
    precision: Any
    preferred_element_type: Any

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x,
            w,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


@dataclasses.dataclass(frozen=True)
class _Conv:
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: Any
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            batch_group_count=self.batch_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


def nm_dot_general(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general(x, w, …)` as three GEMMs.

    Args:
      x: Activations, `(…, k)` or any shape that `dimension_numbers` describes.
      w: Sparse weight, in the dtype of `x`.
      dimension_numbers: `((x_contract, w_contract), (x_batch, w_batch))`.
      precision: As in `lax.dot_general`.
      preferred_element_type: As in `lax.dot_general`.

    Returns:
      What `lax.dot_general` returns.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    numbers = (
        (tuple(x_contract), tuple(w_contract)),
        (tuple(x_batch), tuple(w_batch)),
    )
    gemm = _Dot(numbers, precision, preferred_element_type)
    return three_gemms(gemm, x, w)  # no forward mode (jvp): use nmjax.densify(model)


def nm_conv(
    x: jax.Array,
    w: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated(x, w, …)` as three GEMMs.

    Args:
      x: Images, for Flax layers `(batch, *space, channels)`.
      w: Sparse kernel, for Flax layers `(*window, channels / groups, features)`.
      window_strides: As in `lax.conv_general_dilated`, as the rest.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: Input dilation.
      rhs_dilation: Kernel dilation.
      dimension_numbers: Layout of the operands.
      feature_group_count: Number of feature groups.
      batch_group_count: Number of batch groups.
      precision: As in `lax.conv_general_dilated`.
      preferred_element_type: As in `lax.conv_general_dilated`.

    Returns:
      What `lax.conv_general_dilated` returns.
    """
    gemm = _Conv(
        tuple(window_strides),
        padding if isinstance(padding, str) else tuple((a, b) for a, b in padding),
        None if lhs_dilation is None else tuple(lhs_dilation),
        None if rhs_dilation is None else tuple(rhs_dilation),
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    return three_gemms(gemm, x, w)  # no forward mode (jvp): use nmjax.densify(model)

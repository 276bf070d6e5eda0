"""The three GEMMs of a layer, written once, each with its sparse operand.

    fprop  y  = gemm(x, w)
    dgrad  dx = gemmᵀ(dy; w)        the transpose of fprop in x
    wgrad  dw = gemmᵀ(dy; x)        the transpose of fprop in w

A GEMM is any function linear in `x` and in `w`, as `nmjax.gemms` has them, so that
matrix products and convolutions share one `custom_vjp`. `w` is the sparse weight,
already masked and cast: choosing its mask and decaying dropped weights are not the
business of this file. What a recipe does to the other operands is: with the
(tokens, features) matrices of x and dy,

    fprop="activation"        y = gemm(E ⊙ x, w), dw = gemmᵀ(dy; E ⊙ x), dx as if E = 1
    dgrad="weight-own-mask"   dx = gemmᵀ(dy; w_dgrad), as for "weight-masked-twice"
    wgrad="gradient"          dw = gemmᵀ(MVUE(dy); x), n of every m tokens of dy kept
    wgrad="activation-fixed"  dw = Σ x_kᵀ · Σ dy_t over the kept tokens k, and for each
                              the tokens t from k to the next kept one

Tokens are all axes of x that the GEMM neither contracts nor has in common with w,
flattened; for a convolution, batch and output positions. Where m does not divide their
number, zeros fill the last group.

Gradients are reverse mode, to any order; a Hessian is forward over reverse and works.
jax refuses `jvp`, `jacfwd` and `linearize`, and its traceback shows the line that calls
the `custom_vjp`: the comment there is for the user.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.equation import Equation
from nmjax.gemms import Conv, Dot, Gemm
from nmjax.patches import patches_of
from nmjax.recipe import Recipe
from nmjax.sparse_products import both_ways, may_run_on_tensor_core, on_tensor_core
from nmjax.tokens import sampled, sparse_tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def three_gemms(
    gemm: Gemm,
    recipe: Recipe | None,
    no_key: str,
    x: jax.Array,
    w: jax.Array,
    w_dgrad: jax.Array | None = None,
    dgrad_order: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`gemm(x, w)` with its two backward GEMMs explicit.

    Args:
      gemm: Hashable function, linear in each of its two arguments.
      recipe: Says which operands are sparse; None = at most `w`.
      no_key: What to say where wgrad needs a key and there is none.
      x: Activations.
      w: Sparse weight, in the compute dtype.
      w_dgrad: The weight that dgrad reads in place of `w`, if it is another.
      dgrad_order: The order of outputs in which that is N:M, int32; None = their own.
      key: PRNG key of the sampling in wgrad.

    Returns:
      `gemm(x, w)`; the gradients have the dtypes of `x` and `w`. Inside
      `shard_map`, wgrad sums over the mesh axes that `x` varies over and `w` does
      not.
    """
    return _fprop(gemm, recipe, no_key, x, w, w_dgrad, dgrad_order, key)[0]


def _fprop(gemm, recipe, no_key, x, w, w_dgrad, dgrad_order, key):
    del no_key
    x24 = None
    if recipe is not None and recipe.fprop == "activation":
        x24 = both_ways(gemm, recipe, x, w)
        if x24 is None:
            x = gemm.on_tokens(functools.partial(sparse_tiles, recipe.tile), x)
    y = on_tensor_core("fprop", gemm, recipe, x, w, x24=x24)
    y = gemm(x, w) if y is None else y
    return y, (x, w, w_dgrad, dgrad_order, key, x24)


def _dgrad_wgrad(gemm, recipe, no_key, residuals, dy):
    x, w, w_dgrad, dgrad_order, key, x24 = residuals
    w_read = w if w_dgrad is None else w_dgrad
    dx = on_tensor_core("dgrad", gemm, recipe, x, w_read, dy, dgrad_order)
    if dx is None:
        (dx,) = jax.linear_transpose(lambda x: gemm(x, w_read), x)(dy)
    if recipe is not None and recipe.pattern is not None:
        if recipe.wgrad == "gradient" and key is None:
            raise ValueError(no_key)
        if recipe.wgrad == "gradient":
            dy = gemm.on_rows(functools.partial(sampled, recipe.pattern, key), dy, x)
        if recipe.wgrad == "activation-fixed":
            gemm, x, dy = gemm.restore(recipe.pattern, x, dy)
    dw = on_tensor_core("wgrad", gemm, recipe, x, w, dy, x24=x24)
    if dw is None:
        (dw,) = jax.linear_transpose(lambda w: gemm(x, w), w)(dy)
    return dx, dw, None, None, None


three_gemms.defvjp(_fprop, _dgrad_wgrad)


def nm_dot_general(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    recipe: Recipe | None = None,
    w_dgrad: jax.Array | None = None,
    dgrad_order: jax.Array | None = None,
    key: jax.Array | None = None,
    no_key: str = "wgrad samples the output gradient and needs key=",
) -> jax.Array:
    """`lax.dot_general(x, w, …)` as three GEMMs.

    Args:
      x: Activations, `(…, k)` or any shape that `dimension_numbers` describes.
      w: Sparse weight, in the dtype of `x`.
      dimension_numbers: `((x_contract, w_contract), (x_batch, w_batch))`.
      precision: As in `lax.dot_general`.
      preferred_element_type: As in `lax.dot_general`.
      recipe: Says which operands besides `w` are sparse; None = none.
      w_dgrad: The weight that dgrad reads where the recipe masks it apart; else None.
      dgrad_order: int32, (size of w's last axis,): the order of outputs in which
        `w_dgrad` is N:M; None = as they are. No value depends on it.
      key: PRNG key, where `wgrad="gradient"`; the forward pass does without.
      no_key: The error's text where wgrad needs a key and there is none.

    Returns:
      What `lax.dot_general` returns.

    Raises:
      ValueError: A gradient is asked for that needs a key.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    numbers = (
        (tuple(x_contract), tuple(w_contract)),
        (tuple(x_batch), tuple(w_batch)),
    )
    gemm = Dot(numbers, precision, preferred_element_type)
    statics, aux = (gemm, _operands(recipe), no_key), (w_dgrad, dgrad_order, key)
    return three_gemms(*statics, x, w, *aux)  # no jvp: use nmjax.densify(model)


def nm_einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **aux: Any,
) -> jax.Array:
    """`jnp.einsum(equation, x, w)` as three GEMMs.

    Args:
      equation: Explicit, of two operands; only the first may have an ellipsis. Every
        letter occurs in two of x, w and the result, or in all three.
      x: Activations.
      w: Sparse weight, in the dtype of `x`.
      precision: As in `jnp.einsum`.
      preferred_element_type: As in `jnp.einsum`.
      **aux: `recipe`, `w_dgrad`, `dgrad_order`, `key`, `no_key` of `nm_dot_general`.

    Returns:
      What `jnp.einsum` returns.

    Raises:
      ValueError: The equation is of another form; or as `nm_dot_general`.
    """
    read = Equation.read(equation).for_ndim(x.ndim)
    if not read.is_gemm():
        raise ValueError(
            f"einsum equation {equation!r} is not one GEMM of activations and kernel: "
            "a letter occurs once, or twice in one operand; leave this layer dense"
        )
    numbers = tuple(
        ([read.x.index(c) for c in letters], read.axes(letters))
        for letters in (read.contracted, read.batch)
    )
    y = nm_dot_general(x, w, numbers, precision, preferred_element_type, **aux)
    order = read.batch + read.rows + read.columns
    return jnp.transpose(y, [order.index(c) for c in read.result])


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
    recipe: Recipe | None = None,
    w_dgrad: jax.Array | None = None,
    dgrad_order: jax.Array | None = None,
    key: jax.Array | None = None,
    no_key: str = "wgrad samples the output gradient and needs key=",
) -> jax.Array:
    """`lax.conv_general_dilated(x, w, …)` as three GEMMs.

    With `fprop="activation"` the matrix that has tiles is that of the patches,
    `(batch · output positions, window · channels)` for each feature group, and dx is
    that of the patches' product with w; else lax's own convolutions run.

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
      recipe: As in `nm_dot_general`, as the rest.
      w_dgrad: The weight that dgrad reads, or None.
      dgrad_order: Its order of outputs, or None.
      key: PRNG key, or None.
      no_key: The error's text.

    Returns:
      What `lax.conv_general_dilated` returns.

    Raises:
      ValueError: A gradient is asked for that needs a key; or sparse activations meet
        batch groups.
    """
    gemm = Conv(
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
    recipe = _operands(recipe)
    if recipe is not None and recipe.fprop == "activation":
        return _conv_of_patches(gemm, x, w, recipe=recipe, key=key, no_key=no_key)
    statics, aux = (gemm, recipe, no_key), (w_dgrad, dgrad_order, key)
    return three_gemms(*statics, x, w, *aux)  # no jvp: use nmjax.densify(model)


def _operands(recipe: Recipe | None) -> Recipe | None:
    """The recipe, if it asks more of the GEMMs than a dense product of `w`."""
    if recipe is None:
        return None
    needed = recipe.needs_op or may_run_on_tensor_core(recipe)
    return recipe if needed else None


def _conv_of_patches(gemm: Conv, x: jax.Array, w: jax.Array, **aux) -> jax.Array:
    """The convolution as `patches · matrix`, by `nm_dot_general`."""
    if gemm.batch_group_count != 1:
        raise ValueError(
            f"batch_group_count={gemm.batch_group_count} with sparse activations is "
            "not supported: use another recipe for this convolution"
        )
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, gemm.dimension_numbers)
    batch, channels, *space = numbers.lhs_spec
    x = jnp.transpose(x, (batch, *space, channels))
    features, inputs, *window = numbers.rhs_spec
    w = jnp.transpose(w, (*window, inputs, features))
    patches = patches_of(
        x,
        w.shape[:-2],
        gemm.strides,
        gemm.padding,
        gemm.lhs_dilation,
        gemm.rhs_dilation,
    )  # (N, *out, window, channels)
    outputs, groups = patches.shape[:-2], gemm.feature_group_count
    if groups == 1:
        patches, w = patches.reshape(*outputs, -1), w.reshape(-1, w.shape[-1])
        axes = ((len(outputs),), (0,)), ((), ())
    else:
        patches = patches.reshape(*patches.shape[:-1], groups, -1)
        patches = jnp.moveaxis(patches, -2, 0).reshape(groups, *outputs, -1)
        w = w.reshape(-1, groups, w.shape[-1] // groups)  # (window · C/g, g, out/g)
        axes = ((len(outputs) + 1,), (0,)), ((0,), (1,))
    dtypes = gemm.precision, gemm.preferred_element_type
    y = nm_dot_general(patches, w, axes, *dtypes, **aux)
    if groups > 1:
        y = jnp.moveaxis(y, 0, -2).reshape(*outputs, -1)  # features are group-major
    batch, features, *space = numbers.out_spec
    order = (batch, *space, features)
    return jnp.transpose(y, [order.index(axis) for axis in range(y.ndim)])

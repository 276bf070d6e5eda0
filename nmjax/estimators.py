"""A masked weight and the gradient that its dropped entries receive.

    Forward   w_s = E ⊙ w                             E: the N:M mask, True = kept
    Backward  dw  = dw_s + λ (1 − E) ⊙ w               λ: `decay`

With λ = 0 this is the straight-through estimator (STE): the gradient of the
masked weight reaches every entry of `w`. With λ > 0 it is SR-STE
(arXiv:2102.04010, equation 9), which also pulls dropped entries towards zero.
`masked` lets the gradient reach kept entries only. `soft_threshold` also shrinks what
it keeps (S-STE, arXiv:2409.09099).

Each function acts on one weight and knows nothing of layers or GEMMs. Masks are
read from `w` as it is stored: cast to the compute dtype after, never before.

Gradients are reverse mode. jax refuses `jvp`, `jacfwd` and `linearize`, and its
traceback shows the line that calls the `custom_vjp`: the comment there is for the user.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from nmjax.masks import magnitude_mask
from nmjax.pattern import NMPattern


def ste(w: jax.Array, pattern: str | NMPattern, axis: int = -2) -> jax.Array:
    """Masks `w` by magnitude; the gradient passes straight through.

    Args:
      w: Weight of any rank and float dtype.
      pattern: N:M pattern, n kept of every m.
      axis: The axis that the groups run along: the one the GEMM contracts.

    Returns:
      `w` with the dropped entries set to zero; its shape and dtype.

    Raises:
      ValueError: The pattern is malformed, `axis` does not divide by m, or `w` is not
        floating point.
    """
    return sr_ste(w, pattern, axis, decay=0)


def sr_ste(
    w: jax.Array,
    pattern: str | NMPattern,
    axis: int = -2,
    decay: float | jax.Array = 2e-4,
) -> jax.Array:
    """Masks `w` by magnitude; dropped entries also decay (arXiv:2102.04010).

    The term λ(1 − E)w is added once for each use of the masked weight, as in the
    paper. It enters as a gradient, so momentum and Adam's moments see it. Under a
    scaled loss, or where gradients of devices are summed, it is scaled or summed
    with them: `nmjax.add_decay` adds it exactly once for each optimizer step.

    Args:
      w: Weight of any rank and float dtype.
      pattern: N:M pattern, n kept of every m.
      axis: The axis that the groups run along: the one the GEMM contracts.
      decay: λ, a number or a traced scalar; its own gradient is zero.

    Returns:
      `w` with the dropped entries set to zero; its shape and dtype.

    Raises:
      ValueError: The pattern is malformed, `axis` does not divide by m, or `w` is not
        floating point.
    """
    _require_float(w)
    return straight_through(w, magnitude_mask(w, pattern, axis=axis), decay)


def s_ste(
    w: jax.Array,
    pattern: str | NMPattern,
    axis: int = -2,
    scale: float | jax.Array | None = None,
) -> jax.Array:
    """Soft-thresholds `w` by magnitude, with identity gradient (arXiv:2409.09099).

    Args:
      w: Weight of any rank and float dtype.
      pattern: N:M pattern, n kept of every m.
      axis: The axis that the groups run along: the one the GEMM contracts.
      scale: β, a number or a traced scalar; None = `soft_threshold_scale` of this
        `w`. The paper computes it once, at initialisation, and keeps it.

    Returns:
      `β S(w)`; shape and dtype of `w`. Backward: `dw = dw_s`.

    Raises:
      ValueError: The pattern is malformed, `axis` does not divide by m, or `w` is not
        floating point.
    """
    _require_float(w)
    mask = magnitude_mask(w, pattern, axis=axis)
    if scale is None:
        scale = soft_threshold_scale(jax.lax.stop_gradient(w), mask, pattern, axis)
    return soft_threshold(w, mask, scale, pattern, axis)


def straight_through(
    w: jax.Array,
    mask: jax.Array,
    decay: float | jax.Array = 0,
    multipliers: tuple[float, float] = (1.0, 1.0),
) -> jax.Array:
    """Masks `w` by a given mask with the gradient of SR-STE.

    Args:
      w: Weight of any shape and float dtype.
      mask: Bool, the shape of `w`, True = kept.
      decay: λ, a number or a traced scalar. Zero is STE exactly.
      multipliers: (a, b) on the gradient of kept and of dropped entries.

    Returns:
      `where(mask, w, 0)`. Backward:
      `dw = where(mask, a * dw_s, b * dw_s) + decay * where(mask, 0, w)`.
    """
    if isinstance(decay, int | float) and decay == 0:
        w_s = _ste(w, mask)  # no forward mode (jvp): use nmjax.densify(model)
    else:
        decay = jnp.asarray(decay, w.dtype)
        w_s = _sr_ste(w, mask, decay)  # no forward mode (jvp): use nmjax.densify(model)
    if multipliers == (1.0, 1.0):
        return w_s
    return _multiply_gradient(multipliers, w_s, mask)  # no jvp: nmjax.densify(model)


def masked(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Masks `w`; the gradient reaches kept entries only: `dw = E ⊙ dw_s`."""
    return jnp.where(mask, w, jnp.zeros_like(w))


def soft_threshold(
    w: jax.Array,
    mask: jax.Array,
    scale: float | jax.Array,
    pattern: str | NMPattern,
    axis: int = -2,
) -> jax.Array:
    """`β S(w)`, `S(a) = sign(a) · max(|a| − t, 0)`, with the gradient of the identity.

    t is the largest magnitude that a group drops, the (m − n)-th smallest, so S is
    continuous in w where two magnitudes change their order (arXiv:2409.09099).

    Args:
      w: Weight of any rank and float dtype.
      mask: The magnitude mask of `w`.
      scale: β; a number, or an array that broadcasts against `w`.
      pattern: The pattern of the mask; m divides the axis.
      axis: The axis that the groups run along.

    Returns:
      Shape and dtype of `w`. Backward: `dw = dw_s`.
    """
    scale = jnp.asarray(scale, w.dtype)
    s = jax.lax.stop_gradient(_shrunk(w, mask, NMPattern(pattern), axis))
    return _identity_gradient(w, scale * s)  # no jvp: use nmjax.densify(model)


def soft_threshold_scale(
    w: jax.Array,
    mask: jax.Array,
    pattern: str | NMPattern,
    axis: int = -2,
    over: tuple[int, ...] | None = None,
) -> jax.Array:
    """β = ⟨w, S(w)⟩ / ‖S(w)‖², which brings β S(w) closest to w (arXiv:2409.09099).

    Args:
      w: Weight.
      mask: The magnitude mask of `w`.
      pattern: The pattern of the mask.
      axis: The axis that the groups run along.
      over: The axes of one weight, counted from the end; None = all. Others hold
        stacked weights, each with a β of its own.

    Returns:
      The shape of `w` with the axes of `over` reduced to 1, float32; 1 where S(w) is 0.
    """
    s = _shrunk(w, mask, NMPattern(pattern), axis).astype(jnp.float32)
    dot = jnp.sum(w.astype(jnp.float32) * s, over, keepdims=True)
    square = jnp.sum(s * s, over, keepdims=True)
    safe = jnp.where(square > 0, square, jnp.ones_like(square))
    return jnp.where(square > 0, dot / safe, jnp.ones_like(square))


def _shrunk(w: jax.Array, mask: jax.Array, pattern: NMPattern, axis: int) -> jax.Array:
    """S(w): zero where dropped; kept magnitudes less the largest dropped one."""
    axis %= w.ndim
    before, after = w.shape[:axis], w.shape[axis + 1 :]
    a = jnp.abs(w)
    dropped = jnp.where(mask, jnp.zeros_like(a), a)
    groups = dropped.reshape(*before, -1, pattern.m, *after)
    t = jnp.broadcast_to(jnp.max(groups, axis + 1, keepdims=True), groups.shape)
    return jnp.where(mask, jnp.sign(w) * (a - t.reshape(w.shape)), jnp.zeros_like(w))


def _require_float(w: jax.Array) -> None:
    dtype = jnp.result_type(w)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"a weight of dtype {dtype} has no gradient: expected a floating-point "
            "dtype; for the mask alone use nmjax.magnitude_mask"
        )


def decay_term(w: jax.Array, mask: jax.Array, decay: float | jax.Array) -> jax.Array:
    """The term λ(1 − E)w that SR-STE adds to the gradient of `w`."""
    return jnp.asarray(decay, w.dtype) * jnp.where(mask, jnp.zeros_like(w), w)


@jax.custom_vjp
def _ste(w: jax.Array, mask: jax.Array) -> jax.Array:
    return masked(w, mask)


_ste.defvjp(lambda w, mask: (masked(w, mask), None), lambda _, dw_s: (dw_s, None))


@jax.custom_vjp
def _sr_ste(w: jax.Array, mask: jax.Array, decay: jax.Array) -> jax.Array:
    del decay
    return masked(w, mask)


def _sr_ste_fwd(w, mask, decay):
    return masked(w, mask), (w, mask, decay)


def _sr_ste_bwd(residuals, dw_s):
    w, mask, decay = residuals
    return dw_s + decay_term(w, mask, decay), None, jnp.zeros_like(decay)


_sr_ste.defvjp(_sr_ste_fwd, _sr_ste_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_gradient(multipliers, w_s: jax.Array, mask: jax.Array) -> jax.Array:
    del multipliers, mask
    return w_s


def _multiply_gradient_bwd(multipliers, mask, dw_s):
    kept, dropped = (jnp.asarray(factor, dw_s.dtype) for factor in multipliers)
    return dw_s * jnp.where(mask, kept, dropped), None


_multiply_gradient.defvjp(lambda _, w_s, mask: (w_s, mask), _multiply_gradient_bwd)


@jax.custom_vjp
def _identity_gradient(w: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient given to `w` as it comes."""
    del w
    return value


_identity_gradient.defvjp(lambda w, value: (value, None), lambda _, dw_s: (dw_s, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def refuse_gradient(message: str, value: jax.Array, of: Any) -> jax.Array:
    """`value` as it is; whoever differentiates it by a leaf of `of` is told why not.

    Args:
      message: Of the error.
      value: Of any shape and dtype; its own gradient passes.
      of: A tree of arrays.

    Raises:
      ValueError: In the backward pass: a gradient comes, and is for a leaf of `of`.
    """
    del message, of
    return value


def _refuse_gradient_fwd(message, value, of):
    del message
    differentiated = any(leaf.perturbed for leaf in jax.tree.leaves(of))
    return value.value, {"refused": jnp.zeros(())} if differentiated else {}


def _refuse_gradient_bwd(message, residuals, dvalue):
    if residuals and not isinstance(dvalue, SymbolicZero):
        raise ValueError(message)
    return dvalue, None


refuse_gradient.defvjp(_refuse_gradient_fwd, _refuse_gradient_bwd, symbolic_zeros=True)

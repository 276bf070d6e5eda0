"""A masked weight and the gradient that its dropped entries receive.

    Forward   w_s = E ⊙ w                        E: the N:M mask, True = kept
    Backward  dw  = dw_s + λ (1 − E) ⊙ w          λ: `decay`

With λ = 0 this is the straight-through estimator (STE): the gradient of the
masked weight reaches every entry of `w`. With λ > 0 it is SR-STE
(arXiv:2102.04010, equation 9), which also pulls dropped entries towards zero.
`masked` lets the gradient reach kept entries only.

Each function acts on one weight and knows nothing of layers or GEMMs. Masks are
read from `w` as it is stored: cast to the compute dtype after, never before.

Gradients are reverse mode. jax refuses `jvp`, `jacfwd` and `linearize`, and its
traceback shows the line that calls the `custom_vjp`: the comment there is for the user.
"""

import jax
import jax.numpy as jnp

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
    dtype = jnp.result_type(w)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"a weight of dtype {dtype} has no gradient: expected a floating-point "
            "dtype; for the mask alone use nmjax.magnitude_mask"
        )
    return straight_through(w, magnitude_mask(w, pattern, axis=axis), decay)


def straight_through(
    w: jax.Array, mask: jax.Array, decay: float | jax.Array = 0
) -> jax.Array:
    """Masks `w` by a given mask with the gradient of SR-STE.

    Args:
      w: Weight of any shape and float dtype.
      mask: Bool, the shape of `w`, True = kept.
      decay: λ, a number or a traced scalar. Zero is STE exactly.

    Returns:
      `where(mask, w, 0)`. Backward: `dw = dw_s + decay * where(mask, 0, w)`.
    """
    if isinstance(decay, int | float) and decay == 0:
        return _ste(w, mask)  # no forward mode (jvp): use nmjax.densify(model)
    decay = jnp.asarray(decay, w.dtype)
    return _sr_ste(w, mask, decay)  # no forward mode (jvp): use nmjax.densify(model)


def masked(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Masks `w`; the gradient reaches kept entries only: `dw = E ⊙ dw_s`."""
    return jnp.where(mask, w, jnp.zeros_like(w))


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

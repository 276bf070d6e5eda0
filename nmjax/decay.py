"""The SR-STE term as a gradient transformation, added once for each optimizer step."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nmjax.estimators import decay_term
from nmjax.paths import map_named, named_leaves
from nmjax.plans import Plan
from nmjax.sparsity import Sparsity
from nmjax.state import NMState, state_entries

DecaySchedule = Callable[[jax.Array], jax.Array]


class AddDecayState(NamedTuple):
    """Attributes: count: number of updates so far, int32 scalar."""

    count: jax.Array


def add_decay(plan: Plan, decay: float | DecaySchedule | None = None) -> Any:
    """Adds λ(1 − E)W to the gradient of each weight (SR-STE, arXiv:2102.04010).

    Acts on weights whose recipe has `decay_in="optimizer"` and on no other. Put it
    where gradients are complete (averaged over devices and micro-batches, unscaled)
    and before clipping, weight decay and moments:

        tx = optax.chain(nmjax.add_decay(plan), optax.adamw(learning_rate))

    The term is then the same whatever the number of devices, micro-batches and uses
    of the weight, and whatever the loss scale.

    Args:
      plan: The plan.
      decay: λ for all of them, a number, a traced scalar (as of
        `optax.inject_hyperparams`) or a schedule (of the update count); None = each
        recipe's own.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its update takes the parameters, and
      `nm=` (a state, or what `nmjax.prepare` made) where a recipe keeps its mask.

    Raises:
      ValueError: `decay` is no such thing, or a number that is negative or not finite.
        At update: the parameters are missing or are those of another plan,
        or a needed mask is not in `nm`.
    """
    import optax

    _require_decay(decay)
    sparse = {entry.path: Sparsity.of(entry) for entry in plan.sparse}
    sparse = {
        path: sparsity
        for path, sparsity in sparse.items()
        if sparsity.recipe.decay_in == "optimizer"
        and sparsity.recipe.masks_weight
        and (sparsity.recipe.decay if decay is None else not _is_zero(decay))
    }

    def init(params):
        del params
        return AddDecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, nm: NMState | None = None, **extra):
        del extra
        if params is None:
            raise ValueError("add_decay needs the parameters: tx.update(g, s, params)")
        entries, weights = state_entries(nm or {}, plan), named_leaves(params)
        if sparse and sparse.keys().isdisjoint(weights):
            raise ValueError(
                f"none of the weights to decay, {list(sparse)}, is among the params "
                f"{list(weights)}: give the tree that the plan was made for"
            )

        def add(path, gradient):
            if path not in sparse:
                return gradient
            sparsity, w = sparse[path], weights[path]
            entry = entries.get(path, {})
            if sparsity.recipe.keeps_mask and "mask" not in entry:
                raise ValueError(
                    f"{path}: recipe {sparsity.recipe.name!r} keeps its mask in the "
                    "state and the update was given none: pass it, tx.update(g, s, "
                    "params, nm=state) with the state from nmjax.init_state; of an nnx "
                    "model optimizer.update(model, g, nm=nmjax.nnx.state(model))"
                )
            rate = sparsity.recipe.decay if decay is None else decay
            rate = rate(state.count) if callable(rate) else rate
            term = decay_term(w, sparsity.mask(w, entry), rate)
            return gradient + term.astype(gradient.dtype)

        return map_named(add, updates), AddDecayState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _require_decay(decay: Any) -> None:
    if isinstance(decay, int | float):
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"decay must be finite and at least 0, got {decay}")
    elif not (decay is None or callable(decay) or getattr(decay, "ndim", 1) == 0):
        raise ValueError(
            f"decay must be a number, a scalar or a function of the count of updates, "
            f"got {decay!r}"
        )


def _is_zero(decay: Any) -> bool:
    """Whether a decay is known to be none: a traced one is not."""
    return isinstance(decay, int | float) and decay == 0


def choose_decay(
    dense: float,
    sparse: Mapping[float, float],
    *,
    low: float = 0.6,
    high: float = 0.95,
) -> float:
    """Picks λ from flip rates in warm-up (arXiv:2404.01847).

    Masked decay is right when masks flip slightly less often than the masks of a dense
    network would: μ = r_sparse / r_dense in [0.6, 0.95]. Train a few hundred steps
    dense and, from the same weights, with each candidate; `nmjax.metrics.flip_rate` of
    the prepared masks, averaged, is r.

    Args:
      dense: Flip rate of the masks that the dense network would have.
      sparse: By candidate λ, the flip rate of the masks in training.
      low: Least ratio that is acceptable.
      high: Greatest.

    Returns:
      The smallest λ whose ratio is acceptable: the least that tames the masks.

    Raises:
      ValueError: No candidate is acceptable; the message lists their ratios and says
        in which direction to look. Or a rate is not a positive finite number.
    """
    if not (math.isfinite(dense) and dense > 0):
        raise ValueError(f"the dense flip rate must be above 0, got {dense}")
    if not sparse or not all(math.isfinite(r) and r >= 0 for r in sparse.values()):
        raise ValueError(f"expected finite flip rates by decay, got {dict(sparse)}")
    ratios = {decay: rate / dense for decay, rate in sorted(sparse.items())}
    for decay, ratio in ratios.items():
        if low <= ratio <= high:
            return decay
    over = [decay for decay, ratio in ratios.items() if ratio > high]
    under = [decay for decay, ratio in ratios.items() if ratio < low]
    way = f"above {max(over)}" if over else ""
    way += " and " if over and under else ""
    way += f"below {min(under)}" if under else ""
    shown = {decay: round(ratio, 3) for decay, ratio in ratios.items()}
    raise ValueError(
        f"no decay has a ratio of flip rates in [{low}, {high}]: {shown}; "
        f"try some {way}"
    )

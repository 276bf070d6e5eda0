"""How masks move and how much they keep: density, flip rate, SAD, retained magnitude,
and how far transposable ones are from the best.

The functions take states, `{…: {"kernel": {"mask": bool array}}}`, as `init_state` or
`prepare` make them, and give float32 scalars by path plus one under "total". They are
jittable.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nmjax.masks import kept_and_best
from nmjax.paths import named_leaves
from nmjax.plans import Plan
from nmjax.state import NMState, prepare, state_leaves


def density(state: NMState) -> dict[str, jax.Array]:
    """Share of weights kept: `sum(E) / size`, by path and in total."""
    masks = state_leaves(state, "mask")
    return _shares({path: (jnp.sum(m), m.size) for path, m in masks.items()})


def sad(old: NMState, new: NMState) -> dict[str, jax.Array]:
    """Sparse architecture divergence ‖E_new − E_old‖₁ (arXiv:2102.04010, eq. 7).

    Args:
      old: State before.
      new: State after, with masks for the same paths.

    Returns:
      Number of mask bits that differ, float32, by path and under "total".

    Raises:
      ValueError: The states hold masks for different paths.
    """
    counts = {path: _count(d) for path, d in _changes(old, new).items()}
    return {**counts, "total": sum(counts.values(), jnp.zeros((), jnp.float32))}


def flip_rate(old: NMState, new: NMState) -> dict[str, jax.Array]:
    """Share of mask bits that changed, SAD / size (arXiv:2404.01847, eq. 5).

    Args:
      old: State before.
      new: State after, with masks for the same paths.

    Returns:
      Shares from 0 to 1, float32, by path and under "total".

    Raises:
      ValueError: The states hold masks for different paths.
    """
    changes = _changes(old, new)
    return _shares({path: (jnp.sum(d), d.size) for path, d in changes.items()})


def retained_magnitude(
    params: Any, plan: Plan, state: NMState | None = None
) -> dict[str, jax.Array]:
    """Share of magnitude kept: `sum(|E ⊙ W|) / sum(|W|)`, by path and in total."""
    masks = state_leaves(prepare(params, plan, state), "mask")
    leaves = named_leaves(params)
    sums = {}
    for path, mask in masks.items():
        w = jnp.abs(leaves[path]).astype(jnp.float32)
        sums[path] = (jnp.sum(jnp.where(mask, w, 0)), jnp.sum(w))
    return _shares(sums)


def transposable_gap(
    params: Any, plan: Plan, state: NMState | None = None
) -> dict[str, jax.Array]:
    """Share of magnitude that a mask loses to the best one N:M along both axes.

    `1 - sum(|E ⊙ W|) / sum(|E* ⊙ W|)`, E* the exact optimum for the weights as they are
    now: what a mask loses by its algorithm and by its age. The optimum keeps n of every
    m along both axes; where the recipe's masks may keep fewer (by "tile"), at most n.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `init_state` or `prepare`; may be omitted where it is empty.

    Returns:
      Shares from 0 to 1, float32, by path and under "total": of the parameters whose
      recipe masks them "transposable" or by "tile", the others are left out.
    """
    masks = state_leaves(prepare(params, plan, state), "mask")
    leaves = named_leaves(params)
    lost = {}
    for entry in plan.sparse:
        recipe = entry.recipe
        pattern = recipe.pattern if recipe else None
        if not (recipe and pattern) or recipe.mask not in ("transposable", "tile"):
            continue
        axes = (entry.axis, entry.out_axes[-1])
        scores, mask = (
            jnp.moveaxis(x, axes, (-2, -1))
            for x in (jnp.abs(leaves[entry.path]), masks[entry.path])
        )
        at_most = recipe.mask == "tile"
        kept, best = kept_and_best(scores, mask, pattern, at_most=at_most)
        lost[entry.path] = (best - kept, best)
    return _shares(lost)


def of_masks(
    params: Any, plan: Plan, state: NMState
) -> dict[str, dict[str, jax.Array]]:
    """All that can be said of the masks of one moment: what a training loop logs.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `prepare`: a mask for every masked parameter.

    Returns:
      `density`, `retained_magnitude` and, where any mask is N:M along both axes,
      `transposable_gap`, by name.
    """
    found = {
        "density": density(state),
        "retained_magnitude": retained_magnitude(params, plan, state),
    }
    gap = transposable_gap(params, plan, state)
    return {**found, "transposable_gap": gap} if len(gap) > 1 else found


def _changes(old: NMState, new: NMState) -> dict[str, jax.Array]:
    before, after = state_leaves(old, "mask"), state_leaves(new, "mask")
    if before.keys() != after.keys():
        raise ValueError(
            f"the states hold masks for different paths: {sorted(before)} and "
            f"{sorted(after)}; make both with nmjax.prepare and the same plan"
        )
    return {path: before[path] != after[path] for path in before}


def _count(changed: jax.Array) -> jax.Array:
    return jnp.sum(changed).astype(jnp.float32)


def _shares(parts: dict[str, tuple[Any, Any]]) -> dict[str, jax.Array]:
    """Part over whole by path; the total is the sum of parts over that of wholes."""
    whole = {path: jnp.asarray(b, jnp.float32) for path, (_, b) in parts.items()}
    part = {path: jnp.asarray(a, jnp.float32) for path, (a, _) in parts.items()}
    zero = jnp.zeros((), jnp.float32)
    part["total"], whole["total"] = sum(part.values(), zero), sum(whole.values(), zero)
    return {path: part[path] / jnp.maximum(whole[path], 1e-30) for path in part}

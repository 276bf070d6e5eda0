"""The state: masks that outlive a step, and what is made of parameters and masks.

A state mirrors the parameter tree in plain dictionaries; each sparse parameter whose
recipe keeps a mask has an entry at its path:

    {"block1": {"conv1": {"kernel": {"mask": bool array, ...}}}}

It is empty where every recipe chooses its masks anew at each use (SR-STE). The caller
holds it: `model.apply({"params": params, "nm": state}, x)`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.paths import join, map_named, named_leaves, nest
from nmjax.planning import NOT_USED, Plan, check_sharding
from nmjax.sparse_kernel import Sparsity

NMState = dict[str, Any]


def init_state(params: Any, plan: Plan) -> NMState:
    """Chooses the masks of recipes that keep them, from the weights as stored.

    Args:
      params: Parameter tree that the plan was made for.
      plan: From `nmjax.plan` or `nmjax.plan_params`.

    Returns:
      The state; `{}` where no recipe keeps a mask.

    Raises:
      ValueError: A parameter of the plan is missing or has another shape, or its
        sharding cuts groups in two.
    """
    flat: dict[str, Any] = {}
    for sparsity, w in _sparse_weights(params, plan):
        if sparsity.recipe.needs_state:
            entry = {"mask": sparsity.choose_mask(w)}
            if sparsity.recipe.refresh is not None:
                entry["flip_rate"] = jnp.zeros((), jnp.float32)
            flat[sparsity.path] = entry
    return nest(flat)


def refresh(state: NMState, params: Any, plan: Plan, step: int | jax.Array) -> NMState:
    """Chooses anew the masks whose interval ends at this step; jittable.

    Args:
      state: From `init_state`.
      params: Parameters after the optimizer's update.
      plan: The plan.
      step: Number of updates done; a mask with interval k changes where k divides it.

    Returns:
      A state of the same structure. `flip_rate` of an entry is the share of mask bits
      that its last refresh changed.

    Raises:
      ValueError: As `init_state`; or the state is not of this plan.
    """
    stored = state_masks(state, plan)
    rates = state_leaves(state, "flip_rate")
    flat: dict[str, Any] = {}
    for sparsity, w in _sparse_weights(params, plan):
        path, interval = sparsity.path, sparsity.recipe.refresh
        if not sparsity.recipe.needs_state:
            continue
        mask = sparsity.mask(w, stored.get(path))
        flat[path] = {"mask": mask}
        if interval is None:
            continue
        if path not in rates:
            raise ValueError(
                f"{path}: recipe {sparsity.recipe.name!r} refreshes its mask and this "
                "state cannot be: give the one from nmjax.init_state, not from prepare"
            )
        due = jnp.asarray(step) % interval == 0
        new = jax.lax.cond(due, sparsity.choose_mask, lambda w, mask=mask: mask, w)
        rate = jnp.mean(new != mask, dtype=jnp.float32)
        flat[path] = {"mask": new, "flip_rate": jnp.where(due, rate, rates[path])}
    return nest(flat)


def prepare(params: Any, plan: Plan, state: NMState | None = None) -> NMState:
    """The mask of every sparse weight, computed once for many uses.

    Passed to `apply` in place of the state, it gives the same bits as the state
    itself and spares each micro-batch, and each evaluation batch, the choice of masks.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `init_state`; may be omitted where it is empty.

    Returns:
      A state with an entry `{"mask": …}` for every sparse parameter of the plan.

    Raises:
      ValueError: As `init_state`; or a recipe keeps its mask and `state` lacks it.
    """
    stored = state_masks(state or {}, plan)
    return nest(
        {
            sparsity.path: {"mask": sparsity.mask(w, stored.get(sparsity.path))}
            for sparsity, w in _sparse_weights(params, plan)
        }
    )


def sparsify_params(params: Any, plan: Plan, state: NMState | None = None) -> Any:
    """The parameters with every sparse weight masked; differentiable.

    For models that read their weights by hand: call it inside the loss function and
    give its result to the model. The gradient of the parameters is what the recipes
    prescribe.

    Args:
      params: Parameter tree.
      plan: The plan, usually from `nmjax.plan_params`.
      state: From `init_state` or `prepare`; may be omitted where it is empty.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: As `prepare`.
    """
    stored = state_masks(state or {}, plan)
    masked = {
        sparsity.path: sparsity.apply(w, stored.get(sparsity.path))
        for sparsity, w in _sparse_weights(params, plan)
    }
    return map_named(lambda path, leaf: masked.get(path, leaf), params)


def bake(params: Any, plan: Plan, state: NMState | None = None) -> Any:
    """Ordinary parameters, dropped weights set to zero, for a dense model.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `init_state` or `prepare`; may be omitted where it is empty.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: As `prepare`.
    """
    return jax.lax.stop_gradient(sparsify_params(params, plan, state))


def state_masks(state: NMState, plan: Plan) -> dict[str, jax.Array]:
    """The masks of a state by path.

    Raises:
      ValueError: The state has an entry for a parameter that is not sparse here, or a
        mask that is not bool.
    """
    masks = state_leaves(state, "mask")
    known = {entry.path for entry in plan if entry.sparse or entry.reason == NOT_USED}
    strangers = sorted(state_paths(state) - known)
    if strangers:
        raise ValueError(
            f"the state has entries for {strangers}, which this plan does not make "
            f"sparse (it does {[entry.path for entry in plan.sparse]}); make it anew "
            "with nmjax.init_state(params, plan)"
        )
    for path, mask in masks.items():
        if mask.dtype != jnp.bool_:
            raise ValueError(f"{path}: the state's mask is {mask.dtype}, not bool")
    return masks


def state_paths(state: NMState) -> set[str]:
    """Paths of the parameters that a state has entries for."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {join(path[:-1]) for path, _ in leaves}


def state_leaves(state: NMState, name: str) -> dict[str, jax.Array]:
    """What every entry of a state holds under `name`, such as "mask", by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    paths = ((join(path), leaf) for path, leaf in leaves)
    suffix = f"/{name}"
    return {p.removesuffix(suffix): leaf for p, leaf in paths if p.endswith(suffix)}


def _sparse_weights(params: Any, plan: Plan) -> Iterator[tuple[Sparsity, jax.Array]]:
    """The sparse parameters of the plan, each with its weight, checked."""
    leaves = named_leaves(params)
    for entry in plan.sparse:
        if entry.path not in leaves:
            raise ValueError(
                f"the plan has {entry.path}, the parameters do not; they have "
                f"{list(leaves)}"
            )
        w = leaves[entry.path]
        if tuple(np.shape(w)) != entry.shape:
            raise ValueError(
                f"{entry.path}: the plan was made for shape {entry.shape}, the "
                f"parameter has {np.shape(w)}; make the plan anew"
            )
        check_sharding(entry.path, w, entry.axis, entry.recipe)
        yield Sparsity.of(entry), jnp.asarray(w)

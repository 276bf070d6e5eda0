"""Whole nnx models: what rules make of them, their parameters and their masks."""

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from nmjax.nnx.layers import keeps_mask, kept_mask, make_dense, make_sparse, store_mask
from nmjax.nnx.recording import Weight, find_weights
from nmjax.paths import nest
from nmjax.planning import Plan, check_sharding, log_dense_layers, make_plan
from nmjax.rules import Rule
from nmjax.state import NMState, init_state, state_leaves
from nmjax.state import refresh as refresh_state

Model = TypeVar("Model", bound=nnx.Module)
logger = logging.getLogger("nmjax")


def plan(model: nnx.Module, rules: Sequence[Rule]) -> Plan:
    """What parsed rules make of a model; `nmjax.plan` calls it.

    Args:
      model: The model; its arrays may be abstract.
      rules: Rules.

    Returns:
      The plan, in the order of the model's state. Layers that share a weight have one
      entry, at the path where `nnx.state` has it.

    Raises:
      PlanError: As `nmjax.plan`; or a sharding cuts a group in two.
    """
    return _plan(find_weights(model), rules)


def _plan(weights: dict[str, Weight], rules: Sequence[Rule]) -> Plan:
    made = make_plan([weight.candidate for weight in weights.values()], rules)
    for entry in made.sparse:
        kernel = weights[entry.path].param.get_value()
        check_sharding(entry.path, kernel, entry.axis, entry.recipe)
    return made


def sparsify(model: Model, rules: Sequence[Rule]) -> Model:
    """The model's sparse clone; `nmjax.sparsify` calls it.

    Recipes that keep a mask choose it here, from the weights that the model has; a
    layer that has the very same recipe already keeps its mask.

    Args:
      model: The model, sparse or not.
      rules: Parsed rules, in place of those of an earlier `sparsify`.

    Returns:
      The clone, with the Variables of `model`. Recipes that keep a mask add an
      `NMMask` beside the kernel; the others leave `nnx.state` as it is.

    Raises:
      PlanError: As `nmjax.plan`.
    """
    model = nnx.clone(model, variables=False)
    weights = find_weights(model)
    made = _plan(weights, rules)
    log_dense_layers(made)
    changed = []
    for entry in made:
        layers = weights[entry.path].layers
        if not entry.sparse:
            for layer in layers:
                make_dense(layer)
        elif any([make_sparse(layer, entry) for layer in layers]):
            changed.append(entry)
    keeping = tuple(entry for entry in changed if entry.recipe.needs_state)
    chosen = init_state(params(model), Plan(keeping))
    for entry in keeping:
        store_mask(weights[entry.path], chosen)
    return model


def densify(model: Model) -> Model:
    """The model's dense clone; `nmjax.densify` calls it.

    Args:
      model: The model, sparse or not.

    Returns:
      The clone, with the Variables of `model` but its masks; every layer is Flax's,
      also where the model was written with the layers of this module.
    """
    model = nnx.clone(model, variables=False)
    for _, module in list(nnx.iter_modules(model)):
        make_dense(module)
    return model


def params(model: nnx.Module) -> dict[Any, Any]:
    """The parameters, as the rest of the library takes them.

    Args:
      model: The model.

    Returns:
      Nested plain dictionaries of arrays, addressed by the paths of the plan.
      `nnx.update(model, …)` takes them back, from `nmjax.bake` for example.
    """
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def state(model: nnx.Module) -> NMState:
    """The masks that the layers keep, as the rest of the library takes them.

    Args:
      model: The model.

    Returns:
      The state, in the form of `nmjax.init_state`; `{}` where no recipe keeps a mask.

    Raises:
      ValueError: A recipe keeps its mask and the layer has none.
    """
    flat: dict[str, Any] = {}
    for path, weight in _keeping(model).items():
        layer = weight.layers[0]
        flat[path] = {"mask": kept_mask(layer, path)}
        if layer.nm_flip_rate is not None:
            flat[path]["flip_rate"] = layer.nm_flip_rate[...].ravel()[0]
    return nest(flat)


def set_state(model: nnx.Module, state: NMState) -> None:
    """Puts a state into the layers of a model, in place.

    Args:
      model: The model.
      state: From `nmjax.nnx.state`, `nmjax.init_state` or `nmjax.refresh`: an entry
        for each layer whose recipe keeps a mask, and for no other. (Other layers have
        no place for a mask, so what `nmjax.prepare` makes for them is refused.)

    Raises:
      ValueError: The state is of another model: its paths or shapes differ.
    """
    keeping, masks = _keeping(model), state_leaves(state, "mask")
    if masks.keys() != keeping.keys():
        raise ValueError(
            f"the state has masks for {sorted(masks)}, but the layers whose recipe "
            f"keeps one are {sorted(keeping)}; make it with "
            "nmjax.init_state(nmjax.nnx.params(model), plan)"
        )
    for path, weight in keeping.items():
        if masks[path].shape != weight.candidate.shape:
            raise ValueError(
                f"{path}: the state holds a mask of shape {masks[path].shape} for a "
                f"weight of shape {weight.candidate.shape}; make it anew with "
                "nmjax.init_state"
            )
    for weight in keeping.values():
        store_mask(weight, state)


def refresh(model: nnx.Module, plan: Plan, step: int | jax.Array) -> None:
    """Chooses anew, in place, the masks whose interval ends at this step; jittable.

    Args:
      model: The model, after the optimizer's update.
      plan: The plan that it follows: `nmjax.plan(model, rules)`.
      step: Number of updates done; a mask with interval k changes where k divides it.

    Raises:
      ValueError: As `nmjax.refresh`.
    """
    set_state(model, refresh_state(state(model), params(model), plan, step))


def _keeping(model: nnx.Module) -> dict[str, Weight]:
    """The weights whose recipe keeps a mask, by path."""
    return {
        path: weight
        for path, weight in find_weights(model).items()
        if any(map(keeps_mask, weight.layers))
    }

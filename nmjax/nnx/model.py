"""Whole nnx models: what rules make of them, their parameters and their masks."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from nmjax.nnx.entries import (
    check_dtypes,
    keeps_entry,
    kept_entry,
    new_entries,
    store_entry,
    store_key,
)
from nmjax.nnx.layers import make_dense, make_sparse
from nmjax.nnx.recording import Weight, find_weights
from nmjax.nnx.variables import NMLogits
from nmjax.paths import nest
from nmjax.planning import check_entry_sharding, log_dense_layers, make_plan
from nmjax.plans import Plan
from nmjax.rules import Rule
from nmjax.sparsity import MASKS, NUMBERS
from nmjax.state import NMState, entries_of
from nmjax.state import refresh as refresh_state

Model = TypeVar("Model", bound=nnx.Module)


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
        check_entry_sharding(entry, kernel)
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
    keeping = tuple(e for e in changed if e.recipe.needs_state)
    for path, kept in new_entries(params(model), Plan(keeping)).items():
        store_entry(weights[path], kept)
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
    weights = nnx.All(nnx.Param, nnx.Not(NMLogits))
    return nnx.to_pure_dict(nnx.state(model, weights))


def logits(model: nnx.Module) -> dict[Any, Any]:
    """The logits of learned masks, as the rest of the library takes them.

    Args:
      model: The model.

    Returns:
      Nested dictionaries, in the form of `nmjax.init_logits`.
    """
    found = {
        path: weight.layers[0].nm_logits.get_value()
        for path, weight in find_weights(model).items()
        if weight.layers and getattr(weight.layers[0], "nm_logits", None) is not None
    }
    return nest(found)


def set_key(model: nnx.Module, key: jax.Array | None) -> None:
    """Gives the layers whose recipe draws their random bits, in place; jittable.

    Args:
      model: The model.
      key: PRNG key of this step (and micro-batch): `jax.random.fold_in(key, step)`.
        None takes them away: learned masks are then the most probable ones, as they
        are after `model.eval()`, and a gradient that must be sampled raises. The first
        key adds a Variable to each of these layers, which traces a jitted step anew.
    """
    for weight in find_weights(model).values():
        if any(map(_draws, weight.layers)):
            store_key(weight, key)


def _draws(layer: Any) -> bool:
    sparsity = getattr(layer, "nm_sparsity", None)
    return sparsity is not None and sparsity.recipe.draws


def state(model: nnx.Module) -> NMState:
    """The masks that the layers keep, as the rest of the library takes them.

    Args:
      model: The model.

    Returns:
      The state, in the form of `nmjax.init_state`; `{}` where no recipe keeps a mask.

    Raises:
      ValueError: A recipe keeps its mask and the layer has none, or one not bool.
    """
    flat: dict[str, Any] = {}
    for path, weight in _keeping(model).items():
        layer = weight.layers[0]
        entry = kept_entry(layer, path)
        flat[path] = {name: x for name, x in entry.items() if name != "logits"}
        if layer.nm_flip_rate is not None:
            flat[path]["flip_rate"] = layer.nm_flip_rate.get_value()
    return nest(flat)


def set_state(model: nnx.Module, state: NMState) -> None:
    """Puts a state into the layers of a model, in place.

    Args:
      model: The model.
      state: From `nmjax.nnx.state`, `nmjax.init_state` or `nmjax.refresh`: an entry
        for each layer whose recipe keeps a mask, and for no other. (Other layers have
        no place for a mask, so what `nmjax.prepare` makes for them is refused.)

    Raises:
      ValueError: The state is of another model: its paths or shapes differ; or a mask
        in it is not bool, or an order of outputs not an integer.
    """
    keeping = _keeping(model)
    entries = entries_of(state)
    given = {path: entry.keys() & _NAMES for path, entry in entries.items()}
    wanted = {path: _wanted(weight) for path, weight in keeping.items()}
    if given != wanted:
        raise ValueError(
            f"the state has masks for {_say(given)}, but the layers whose recipe "
            f"keeps one are {_say(wanted)}; make it with "
            "nmjax.init_state(nmjax.nnx.params(model), plan)"
        )
    for path, entry in entries.items():
        check_dtypes(path, entry)
        shape = keeping[path].candidate.shape
        for name in entry.keys() & set(MASKS):
            if entry[name].shape != shape:
                raise ValueError(
                    f"{path}: the state holds a {name} of shape {entry[name].shape} "
                    f"for a weight of shape {shape}; make it anew with nmjax.init_state"
                )
    for path, entry in entries.items():
        store_entry(keeping[path], entry)


_NAMES = {*MASKS, *NUMBERS}


def _wanted(weight: Weight) -> set[str]:
    layer = next(layer for layer in weight.layers if keeps_entry(layer))
    return set(layer.nm_sparsity.recipe.state_names)


def _say(names: dict[str, set[str]]) -> str:
    """Paths, with what they keep where that is more than a mask."""
    return str([p if n == {"mask"} else f"{p} {n}" for p, n in sorted(names.items())])


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
        if any(map(keeps_entry, weight.layers))
    }

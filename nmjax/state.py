"""The state: masks that outlive a step, and what is made of parameters and masks.

A state mirrors the parameter tree in plain dictionaries; each sparse parameter whose
recipe keeps something has an entry at its path, described in `nmjax.sparsity`:

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
from nmjax.planning import NOT_USED, check_entry_sharding
from nmjax.plans import Plan
from nmjax.sparsity import MASKS, Sparsity

NMState = dict[str, Any]


def init_state(params: Any, plan: Plan) -> NMState:
    """Chooses what recipes keep, such as masks, from the weights as stored.

    Args:
      params: Parameter tree that the plan was made for.
      plan: From `nmjax.plan` or `nmjax.plan_params`.

    Returns:
      The state; `{}` where no recipe keeps anything.

    Raises:
      ValueError: A parameter of the plan is missing or has another shape, or its
        sharding cuts groups in two.
    """
    flat: dict[str, Any] = {}
    for sparsity, w in _sparse_weights(params, plan):
        if sparsity.recipe.needs_state:
            flat[sparsity.path] = sparsity.init(w)
    return nest(flat)


def init_logits(params: Any, plan: Plan) -> dict[str, Any]:
    """Logits of the learned masks: what trains, beside or instead of the parameters.

    Args:
      params: Parameter tree that the plan was made for.
      plan: The plan.

    Returns:
      Nested dictionaries with an array at the path of each parameter whose mask is
      learned, see `nmjax.masks.learned`; all patterns are equally probable. In linen
      they are the collection "nm_logits".

    Raises:
      ValueError: As `init_state`.
    """
    return nest(
        {
            sparsity.path: sparsity.init_logits(w)
            for sparsity, w in _sparse_weights(params, plan)
            if sparsity.recipe.mask == "learned"
        }
    )


def next_state(params: Any, plan: Plan, state: NMState, before: Plan) -> NMState:
    """The state with which a phase of another plan begins; jittable.

    Args:
      params: Parameters at the border.
      plan: Of the phase that begins.
      state: In force so far: from `init_state`, `refresh` or `prepare`.
      before: Of the phase that ends.

    Returns:
      As `init_state(params, plan)`, except that a recipe that chooses its mask once
      takes over the masks in force where they were chosen as its own are (masks freeze
      as they are), a soft threshold its scale, dgrad's mask its order of outputs, and
      a learned mask its temperature.

    Raises:
      ValueError: As `init_state`.
    """
    known, earlier = state_entries(state, before), {e.path: e for e in before.sparse}
    flat: dict[str, Any] = {}
    for sparsity, w in _sparse_weights(params, plan):
        path, recipe = sparsity.path, sparsity.recipe
        if not recipe.needs_state:
            continue
        old = Sparsity.of(earlier[path]) if path in earlier else None
        same = old is not None and _choice_of(old) == _choice_of(sparsity)
        carried = known.get(path, {}) if same else {}
        entry = sparsity.init(w, carried.get("output_order"))
        kept = {"scale", "temperature"}
        if recipe.refresh is None:
            kept |= set(MASKS)
        entry |= {n: x for n, x in carried.items() if n in kept and n in entry}
        flat[path] = entry
    return nest(flat)


def _choice_of(sparsity: Sparsity) -> tuple:
    """What the masks of a weight depend on besides the weight."""
    recipe = sparsity.recipe
    how = recipe.mask, recipe.tile, recipe.dgrad, bool(recipe.reorder)
    return sparsity.pattern, sparsity.axis, sparsity.out_axis, how


def refresh(state: NMState, params: Any, plan: Plan, step: int | jax.Array) -> NMState:
    """Chooses anew the masks whose interval ends at this step; jittable.

    Args:
      state: From `init_state`.
      params: Parameters after the optimizer's update.
      plan: The plan.
      step: Number of updates done; a mask with interval k changes where k divides it.
        Temperatures of learned masks become those of this step.

    Returns:
      A state of the same structure. `flip_rate` of an entry is the share of mask bits
      that its last refresh changed, one for each layer that a scan or vmap stacks.

    Raises:
      ValueError: As `init_state`; or the state is not of this plan.
    """
    stored = state_entries(state, plan)
    flat: dict[str, Any] = {}
    for sparsity, w in _sparse_weights(params, plan):
        if not sparsity.recipe.needs_state:
            continue
        entry = dict(stored.get(sparsity.path, {}))
        entry |= _refresh_order(sparsity, w, entry, step)
        if sparsity.recipe.keeps_mask:
            entry |= _refresh_masks(sparsity, w, entry, step)
        if "temperature" in sparsity.recipe.state_names:
            entry["temperature"] = sparsity.temperature(step, w.shape)
        flat[sparsity.path] = entry
    return nest(flat)


def _refresh_order(sparsity: Sparsity, w, entry, step) -> dict[str, jax.Array]:
    name, interval = "output_order", sparsity.recipe.reorder
    if interval is None:
        return {}
    if name not in entry:
        raise ValueError(
            f"{sparsity.path}: the state has no {name}; give the one from "
            "nmjax.init_state"
        )
    if sparsity.recipe.refresh is None:
        return {}
    due = jnp.asarray(step) % interval == 0
    search = lambda w, order: sparsity.search_order(w, order, step)  # noqa: E731
    return {name: jax.lax.cond(due, search, lambda w, order: order, w, entry[name])}


def _refresh_masks(sparsity: Sparsity, w, entry, step) -> dict[str, jax.Array]:
    masks, interval = sparsity.masks(w, entry), sparsity.recipe.refresh
    if interval is None:
        return masks
    if "flip_rate" not in entry:
        raise ValueError(
            f"{sparsity.path}: recipe {sparsity.recipe.name!r} refreshes its mask and "
            "this state cannot be: give the one from nmjax.init_state, not from prepare"
        )
    due = jnp.asarray(step) % interval == 0
    choose = lambda w: sparsity.choose_masks(w, entry)  # noqa: E731
    new = jax.lax.cond(due, choose, lambda w: masks, w)
    changed, over = new["mask"] != masks["mask"], sparsity.own_axes(w.ndim)
    rate = jnp.mean(changed, over, jnp.float32, keepdims=True)
    return {**new, "flip_rate": jnp.where(due, rate, entry["flip_rate"])}


def prepare(
    params: Any, plan: Plan, state: NMState | None = None, *, logits: Any = None
) -> NMState:
    """The masks of every sparse weight, computed once for many uses.

    Passed to `apply` in place of the state, it gives the same bits as the state
    itself and spares each micro-batch, and each evaluation batch, the choice of masks.
    Learned masks are the exception: they train from the state itself.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `init_state`; may be omitted where it is empty.
      logits: From `init_logits`, where masks are learned: the most probable ones.

    Returns:
      A state with an entry `{"mask": …}` for every masked parameter of the plan, and
      what else is read: dgrad's own mask and its order of outputs, the scale of a soft
      threshold.

    Raises:
      ValueError: As `init_state`; or a recipe keeps something and `state` lacks it.
    """
    return nest(
        {
            sparsity.path: {
                **{n: x for n, x in entry.items() if n in ("scale", "output_order")},
                **sparsity.masks(w, entry),
            }
            for sparsity, w, entry in _masked_weights(params, plan, state, logits)
        }
    )


def sparsify_params(
    params: Any,
    plan: Plan,
    state: NMState | None = None,
    *,
    logits: Any = None,
    key: jax.Array | None = None,
) -> Any:
    """The parameters with every masked weight masked; differentiable.

    For models that read their weights by hand: call it inside the loss function and
    give its result to the model. The gradient of the parameters is what the recipes
    prescribe.

    Args:
      params: Parameter tree.
      plan: The plan, usually from `nmjax.plan_params`.
      state: From `init_state` or `prepare`; may be omitted where it is empty.
      logits: From `init_logits`, where masks are learned.
      key: PRNG key for training learned masks; None = the most probable ones.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: As `prepare`.
    """
    masked = {}
    for sparsity, w, entry in _masked_weights(params, plan, state, logits):
        if key is not None and sparsity.recipe.draws:
            entry = {**entry, "key": sparsity.own_key(key)}
        masked[sparsity.path] = sparsity.apply(w, entry)
    return map_named(lambda path, leaf: masked.get(path, leaf), params)


def bake(
    params: Any, plan: Plan, state: NMState | None = None, *, logits: Any = None
) -> Any:
    """Ordinary parameters, dropped weights set to zero, for a dense model.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: From `init_state` or `prepare`; may be omitted where it is empty.
      logits: From `init_logits`, where masks are learned.

    Returns:
      A tree of the same structure, shapes and dtypes. Recipes that mask activations
      leave their weights as they are.

    Raises:
      ValueError: As `prepare`.
    """
    return jax.lax.stop_gradient(sparsify_params(params, plan, state, logits=logits))


def state_entries(state: NMState, plan: Plan) -> dict[str, dict[str, jax.Array]]:
    """The entries of a state by path, those of a plan.

    Raises:
      ValueError: The state has an entry for a parameter that is not sparse here, an
        entry of another recipe, or a mask that is not bool.
    """
    recipes = {entry.path: entry.recipe for entry in plan.sparse}
    known = recipes.keys() | {e.path for e in plan if e.reason == NOT_USED}
    entries = entries_of(state)
    strangers = sorted(set(entries) - known)
    if strangers:
        raise ValueError(
            f"the state has entries for {strangers}, which this plan does not make "
            f"sparse (it does {[entry.path for entry in plan.sparse]}); make it anew "
            "with nmjax.init_state(params, plan)"
        )
    for path, entry in entries.items():
        recipe = recipes.get(path)
        if recipe is not None and not entry.keys() <= recipe.entry_names:
            raise ValueError(
                f"{path}: the state holds its {sorted(entry)}, of which recipe "
                f"{recipe.name!r} knows {sorted(recipe.entry_names)}: it is of another "
                "recipe or phase; make it anew with nmjax.init_state(params, plan), "
                "or at the border of two phases with nmjax.next_state"
            )
        for name in entry.keys() & set(MASKS):
            if entry[name].dtype != jnp.bool_:
                dtype = entry[name].dtype
                raise ValueError(f"{path}: the state's {name} is {dtype}, not bool")
    return entries


def state_logits(logits: Any, plan: Plan) -> dict[str, jax.Array]:
    """Logits of learned masks by path.

    Raises:
      ValueError: Some belong to a parameter whose mask is not learned.
    """
    known = {e.path for e in plan.masked if e.recipe and e.recipe.mask == "learned"}
    unused = {entry.path for entry in plan if entry.reason == NOT_USED}
    leaves = named_leaves(logits or {})
    if strangers := sorted(leaves.keys() - known - unused):
        raise ValueError(
            f"there are logits for {strangers}, whose masks this plan does not learn "
            f"(it learns those of {sorted(known)}); make them with "
            "nmjax.init_logits(params, plan)"
        )
    return leaves


def entries_of(state: NMState) -> dict[str, dict[str, jax.Array]]:
    """The entries of any state by path, unchecked."""
    entries: dict[str, dict[str, jax.Array]] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    for path, leaf in leaves:
        entries.setdefault(join(path[:-1]), {})[join(path[-1:])] = leaf
    return entries


def state_leaves(state: NMState, name: str) -> dict[str, jax.Array]:
    """What every entry of a state holds under `name`, such as "mask", by path."""
    return {p: entry[name] for p, entry in entries_of(state).items() if name in entry}


def _masked_weights(
    params: Any, plan: Plan, state: NMState | None, logits: Any
) -> Iterator[tuple[Sparsity, jax.Array, dict[str, jax.Array]]]:
    """The parameters with masked weights, each with what is known for its mask."""
    entries, learned = state_entries(state or {}, plan), state_logits(logits, plan)
    for sparsity, w in _sparse_weights(params, plan):
        if sparsity.recipe.masks_weight:
            entry, path = entries.get(sparsity.path, {}), sparsity.path
            more = {"logits": learned[path]} if path in learned else {}
            yield sparsity, w, {**entry, **more}


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
        if isinstance(w, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{entry.path} is abstract, and masks are of values: for shapes alone "
                "call this inside jax.eval_shape (nnx.eval_shape for a model), the "
                "parameters among its arguments or made there"
            )
        check_entry_sharding(entry, w)
        yield Sparsity.of(entry), jnp.asarray(w)

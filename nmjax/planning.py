"""Planning: what the rules make of the layers that a model has.

A list of rules says what the user wants; the model says which layers it has and what
each contracts. A plan is the outcome; see `plans.py`.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nmjax.masks import Ragged
from nmjax.masks.magnitude import shard_size
from nmjax.paths import named_leaves
from nmjax.plans import Plan, PlanEntry, group_axes_of
from nmjax.recipe import Recipe
from nmjax.rules import Rule, Rules, as_rules, layer_path

NO_RULE = "no rule matches"
DENSE_BY_RULE = "dense by rule"
NOT_USED = "not used by this call"
EMBEDDING = "embedding: a table, not a GEMM"

logger = logging.getLogger("nmjax")


class PlanError(ValueError):
    """Rules that do not fit the model: every offending path and the way out."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A parameter that a rule may speak of, as the model's own pass found it.

    Attributes:
      path: Path of the parameter.
      shape: Its shape as stored, with the axes that scan or vmap stack.
      dtype: Name of its dtype as stored.
      layer: Class name of the layer that owns it, or "parameter".
      axes: The axes that the layer's GEMM contracts, counted from the end.
      out_axes: The axes that run over its outputs, which dgrad contracts.
      out_parts: How many GEMMs divide the last of them: a convolution's feature groups.
      stacked: The axes that scan or vmap stack.
      weight_only: The layer's op cannot be replaced: recipes can mask its weight and no
        more.
      reason: Why no recipe can act on it, or "".
      recipe: The recipe that the layer brings itself (drop-in layers).
      ignored: Whether the traced call did not reach it, so that nothing is known of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layer: str = "parameter"
    axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    out_parts: int = 1
    stacked: tuple[int, ...] = ()
    weight_only: bool = False
    reason: str = ""
    recipe: Recipe | None = None
    ignored: bool = False


def plan_params(params: Any, rules: Rules) -> Plan:
    """A plan for a bare parameter tree, without its model.

    Rank alone does not tell which axis a GEMM contracts: parameters of rank 2, and
    kernels of rank 4 named "kernel" (HWIO), use axis -2; a rule that matches any
    other, or an "embedding", must say `axis=`. Recipes that mask along the outputs too
    do so along the last axis (along -2 where `axis=-1`).

    Args:
      params: A pytree of arrays, or of `jax.ShapeDtypeStruct`.
      rules: As for `nmjax.sparsify`.

    Returns:
      The plan, for `nmjax.sparsify_params` and the rest of the library.

    Raises:
      PlanError: A rule matches nothing, or a parameter that it matches cannot be
        sparse.
    """
    rules = as_rules(rules)
    candidates = []
    for path, leaf in named_leaves(params).items():
        if not is_weight(path, np.ndim(leaf)):
            continue
        rule = next((rule for rule in rules if rule.matches(path)), None)
        shape = tuple(leaf.shape)
        axes, reason = (-2,), ""
        if rule is not None and rule.axis is not None:
            axes = (rule.axis,)
            if -rule.axis > len(shape):
                reason = f"axis {rule.axis} does not exist in shape {shape}"
        elif path.rsplit("/", 1)[-1] == "embedding":
            reason = f"{EMBEDDING}, unless Rule(axis=) says otherwise"
        elif len(shape) != 2 and not (len(shape) == 4 and path.endswith("kernel")):
            reason = f"rank {len(shape)} does not tell the contracted axis: Rule(axis=)"
        candidates.append(
            Candidate(
                path,
                shape,
                str(leaf.dtype),
                axes=axes,
                out_axes=(-2,) if axes == (-1,) else (-1,),
                weight_only=True,
                reason=reason,
            )
        )
    made, leaves = make_plan(candidates, rules), named_leaves(params)
    for entry in made.sparse:
        check_entry_sharding(entry, leaves[entry.path])
    return made


def is_weight(path: str, ndim: int) -> bool:
    """Whether a parameter is one that a GEMM might read."""
    return ndim >= 2 and path.rsplit("/", 1)[-1] not in ("bias", "scale")


def make_plan(candidates: Iterable[Candidate], rules: Sequence[Rule]) -> Plan:
    """Applies the rules to what the model has.

    Raises:
      PlanError: A rule matches nothing, or a matching layer cannot be sparse: the
        message lists all of them.
    """
    candidates = list(candidates)
    used, entries, refused = set(), [], []
    for candidate in candidates:
        index = next(
            (i for i, rule in enumerate(rules) if rule.matches(candidate.path)), None
        )
        rule = None if index is None else rules[index]
        used.add(index)
        recipe, ragged, reason = candidate.recipe, None, ""
        if recipe is None and rule is not None:
            recipe, ragged = rule.recipe, rule.ragged
        if recipe is None:
            reason = NO_RULE if rule is None else DENSE_BY_RULE
        elif candidate.ignored:
            recipe, reason = None, NOT_USED
        else:
            reason = candidate.reason or _why_not(candidate, recipe, ragged)
        if recipe is not None and reason:
            recipe = None
            if rule is None or rule.ineligible == "error":
                refused.append((candidate, reason))
        entries.append(
            PlanEntry(
                candidate.path,
                candidate.layer,
                candidate.shape,
                candidate.dtype,
                candidate.axes,
                candidate.out_axes,
                candidate.stacked,
                recipe,
                ragged if recipe else None,
                reason,
            )
        )
    _refuse_idle_rules(rules, used, candidates)
    _refuse_ineligible(refused)
    return Plan(tuple(entries))


def _why_not(candidate: Candidate, recipe: Recipe, ragged: Ragged | None) -> str:
    if not jnp.issubdtype(jnp.dtype(candidate.dtype), jnp.floating):
        return f"dtype {candidate.dtype} is not floating point"
    if candidate.weight_only and recipe.needs_op:
        return (
            f"recipe {recipe.name!r} acts on more than the weight, and the op of "
            f"{candidate.layer!r} cannot be replaced"
        )
    axes = list(group_axes_of(recipe, candidate.axes, candidate.out_axes))
    if recipe.on_both_axes and not candidate.out_axes:
        return f"recipe {recipe.name!r} needs an output axis, and there is none"
    if recipe.fprop == "activation":
        axes.append(candidate.axes[-1])  # that of the features of x
    if ragged is not None and recipe.mask == "magnitude" and len(axes) == 1:
        return ""
    m = recipe.pattern.m if recipe.pattern else 1
    for axis in axes:
        parts = candidate.out_parts if axis in candidate.out_axes else 1
        if size_error := _size_error(candidate.shape[axis], axis, m, parts):
            ragged_hint = f"; ragged={ragged!r} is for magnitude masks along one axis"
            return size_error + (ragged_hint if ragged else "")
    if recipe.reorder and candidate.out_parts > 1:
        return (
            f"recipe {recipe.name!r} orders outputs anew, which must stay in their "
            f"{candidate.out_parts} feature groups: reorder=None"
        )
    return ""


def _size_error(size: int, axis: int, m: int, parts: int) -> str:
    if size // parts % m == 0:
        return ""
    each = f" in {parts} feature groups" if parts > 1 else ""
    return f"axis {axis} has size {size}{each}, not a multiple of {m}"


def _refuse_idle_rules(rules, used, candidates):
    idle = [repr(rule.path) for i, rule in enumerate(rules) if i not in used]
    if idle:
        paths = "\n  ".join(layer_path(c.path) for c in candidates) or "(none)"
        raise PlanError(
            f"rule {', '.join(idle)} matches no layer that an earlier rule has not "
            f"taken. The expression must match a whole path; the paths are\n  {paths}"
        )


def _refuse_ineligible(refused):
    if not refused:
        return
    lines = "\n".join(f"  {c.path} {c.shape}: {reason}" for c, reason in refused)
    paste = "\n".join(
        f"    nmjax.Rule({re.escape(layer_path(c.path))!r}, None)," for c, _ in refused
    )
    raise PlanError(
        f"{len(refused)} parameter(s) cannot be sparse:\n{lines}\n"
        'Say ineligible="dense" in the rule that matches them, or ragged= where only '
        f"the size is at fault, or put before your rules\n{paste}"
    )


@functools.lru_cache(maxsize=256)
def log_dense_layers(plan: Plan) -> None:
    """Says, once for each plan, which layers a rule would make sparse but cannot."""
    for entry in plan:
        if entry.reason not in ("", DENSE_BY_RULE, NO_RULE, NOT_USED):
            logger.warning("%s stays dense: %s", entry.path, entry.reason)


def check_entry_sharding(entry: PlanEntry, array: Any) -> None:
    """Refuses a sharding that cuts a group in two.

    Args:
      entry: What the plan says of the parameter.
      array: Concrete (any sharding), or traced under explicit mesh axes; other
        tracers carry no sharding and pass.

    Raises:
      PlanError: The shard's size along an axis of groups is not a multiple of m.
    """
    for axis in entry.group_axes:
        check_sharding(entry.path, array, axis, entry.recipe)


def check_sharding(path: str, array: Any, axis: int, recipe: Recipe | None) -> None:
    """As `check_entry_sharding`, for one axis."""
    if recipe is None or recipe.pattern is None or not isinstance(array, jax.Array):
        return
    shape, m = array.shape, recipe.pattern.m
    size = _shard_size(array, axis)
    if size != shape[axis] and size % m:
        raise PlanError(
            f"{path}: axis {axis} of size {shape[axis]} is sharded in parts of {size}, "
            f"which cuts groups of {m}; shard another axis, or in parts that are a "
            f"multiple of {m}"
        )


def _shard_size(array: jax.Array, axis: int) -> int:
    """How much of `axis` one device holds, as far as the array tells."""
    if not isinstance(array, Tracer):
        return array.sharding.shard_shape(array.shape)[axis]
    return shard_size(array, axis)

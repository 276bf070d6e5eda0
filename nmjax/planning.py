"""The plan: which parameters are sparse, along which axis, and why the rest are not.

A list of rules says what the user wants; the model says which layers it has and what
each contracts. A plan is the outcome: plain data, hashable, and JSON in every
checkpoint, so that a trained network can be judged without the code of its model.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nmjax.masks import Ragged
from nmjax.paths import named_leaves
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
      ignored: The pass did not come by; no statement about this parameter.
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


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What the plan says of one parameter.

    Attributes:
      path: Slash-joined path of the parameter, such as "block1/conv1/kernel".
      layer: Class name of the layer, such as "Conv", or "parameter".
      shape: Shape as stored.
      dtype: Name of the dtype as stored.
      axes: The axes that the GEMM contracts, counted from the end; groups run along
        the last of them.
      out_axes: The axes that dgrad contracts, counted from the end; groups of recipes
        that mask along the outputs too run along the last of them.
      stacked: The axes that scan or vmap stack, counted from the end.
      recipe: The recipe, or None: dense.
      ragged: As in `Rule`.
      reason: Why the parameter is dense; "" where it is sparse.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stacked: tuple[int, ...]
    recipe: Recipe | None
    ragged: Ragged | None
    reason: str

    def __post_init__(self):
        """Refuses a sparse parameter without an axis to run groups along."""
        rank = len(self.shape)
        if self.sparse and not (self.axes and -rank <= self.axes[-1] < 0):
            raise ValueError(f"{self.path}: axes {self.axes} of shape {self.shape}")
        if self.sparse and len(self.group_axes) > 1 and not self.out_axes:
            raise ValueError(f"{self.path}: no output axes for {self.recipe}")

    @property
    def sparse(self) -> bool:
        """Whether a recipe acts on the parameter."""
        return self.recipe is not None

    @property
    def axis(self) -> int:
        """The axis along which groups run, counted from the end."""
        return self.axes[-1]

    @property
    def masks_weight(self) -> bool:
        """Whether the GEMM reads a masked weight."""
        return self.recipe is not None and self.recipe.masks_weight

    @property
    def group_axes(self) -> tuple[int, ...]:
        """The axes along which masks of the weight run, counted from the end."""
        return _group_axes(self.recipe, self.axes, self.out_axes)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One entry for each parameter that a rule may speak of; see `nmjax.plan`."""

    entries: tuple[PlanEntry, ...]

    def __iter__(self) -> Iterator[PlanEntry]:
        """Iterates over the entries in the order of the parameter tree."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of entries, sparse or not."""
        return len(self.entries)

    def __getitem__(self, path: str) -> PlanEntry:
        """The entry of a parameter.

        Raises:
          KeyError: No such path; the message lists those that exist.
        """
        for entry in self.entries:
            if entry.path == path:
                return entry
        raise KeyError(f"no {path!r} in the plan; it has {[e.path for e in self]}")

    @property
    def sparse(self) -> tuple[PlanEntry, ...]:
        """The entries on which a recipe acts."""
        return tuple(entry for entry in self.entries if entry.sparse)

    @property
    def masked(self) -> tuple[PlanEntry, ...]:
        """The sparse entries whose recipe masks the weight."""
        return tuple(entry for entry in self.entries if entry.masks_weight)

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back equal."""
        entries = []
        for entry in self.entries:
            fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
            fields["recipe"] = entry.recipe.to_dict() if entry.recipe else None
            entries.append(fields)
        return json.dumps({"format": 2, "entries": entries}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: The text is not a plan of this version.
        """
        names = {field.name for field in dataclasses.fields(PlanEntry)}
        try:
            data = json.loads(text)
            if data["format"] != 2:
                raise ValueError(f"format {data['format']!r}, this version reads 2")
            entries = []
            for fields in data["entries"]:
                if set(fields) != names:
                    raise ValueError(f"fields {sorted(fields)}, not {sorted(names)}")
                recipe = fields["recipe"]
                entry = {
                    **fields,
                    "shape": tuple(fields["shape"]),
                    "axes": tuple(fields["axes"]),
                    "out_axes": tuple(fields["out_axes"]),
                    "stacked": tuple(fields["stacked"]),
                    "recipe": Recipe.from_dict(recipe) if recipe else None,
                }
                entries.append(PlanEntry(**entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a plan that nmjax wrote: {error}") from error
        return cls(tuple(entries))


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
    axes = list(_group_axes(recipe, candidate.axes, candidate.out_axes))
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
    return ""


def _size_error(size: int, axis: int, m: int, parts: int) -> str:
    if size // parts % m == 0:
        return ""
    each = f" in {parts} feature groups" if parts > 1 else ""
    return f"axis {axis} has size {size}{each}, not a multiple of {m}"


def _group_axes(
    recipe: Recipe | None, axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> tuple[int, ...]:
    """The axes along which a recipe's masks of the weight run."""
    if recipe is None or not recipe.masks_weight:
        return ()
    return (axes[-1], *(out_axes[-1:] if recipe.on_both_axes else ()))


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
    """As `check_sharding`, for one axis."""
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
    sharding = jax.typeof(array).sharding
    names = dict(enumerate(sharding.spec)).get(axis % array.ndim) or ()
    names = (names,) if isinstance(names, str) else names
    return array.shape[axis] // math.prod(sharding.mesh.shape[name] for name in names)

"""Is what the GEMM reads really N:M? Where not, and why not.

`check` judges masks that were saved, not masks that it would make itself: that every
parameter of the plan is there, that each mask is N:M along the axis that the plan
names, and that it is the mask of the weights beside it. So it can fail.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from nmjax.paths import named_leaves
from nmjax.plans import Plan, PlanEntry
from nmjax.recipe import Recipe
from nmjax.sparsity import MASKS, Sparsity
from nmjax.state import NMState, entries_of, state_leaves

Kind = Literal["missing", "shape", "axis", "pattern", "weights", "stranger"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One finding of `check`.

    Attributes:
      path: The parameter.
      kind: "missing" (parameter or mask not there), "shape" (or no bool mask), "axis"
        (N:M along another axis than the plan's), "pattern" (not N:M), "weights" (N:M,
        but not the mask of the stored weights), "stranger" (a mask that the plan does
        not know).
      detail: Groups and values, in words.
    """

    path: str
    kind: Kind
    detail: str


class CheckError(ValueError):
    """A network is not what its plan says.

    Attributes:
      problems: Every finding.
    """

    def __init__(self, problems: list[Problem]):
        """The message lists every finding."""
        self.problems = tuple(problems)
        lines = "\n".join(f"  {p.path}: [{p.kind}] {p.detail}" for p in problems)
        super().__init__(f"{len(problems)} parameter(s) fail the check:\n{lines}")


def check(params: Any, plan: Plan, state: NMState | None = None) -> None:
    """Raises unless every mask is what the plan says.

    Args:
      params: Parameter tree.
      plan: The plan.
      state: Masks that the op used: from `prepare`, or the "masks" of a checkpoint; or
        those that recipes keep, from `init_state`: of the others the mask of the
        weights is then judged. For learned masks:
        `nmjax.prepare(params, plan, state, logits=logits)`.

    Raises:
      CheckError: A parameter or mask is missing or has another shape, a mask is not
        N:M along the plan's axis (along both, where the recipe's mask is), or is not
        the mask of the stored weights where the recipe chooses it at every step, or
        belongs to no masked parameter. Every offending path is listed, with its first
        groups and their values. Of recipes that mask activations only shapes are
        judged: their weights are dense.
      ValueError: An array lies on several hosts.
    """
    weights = {path: _fetched(path, w) for path, w in _arrays(params).items()}
    masks, orders = _masks(state), state_leaves(state or {}, "output_order")
    problems = [
        Problem(path, "stranger", "has a mask, but the plan does not mask it")
        for path in sorted(
            entries_of(state or {}).keys() - {e.path for e in plan.masked}
        )
    ]
    whole = _is_whole(plan, masks)
    for entry in plan.sparse:
        problems += _judge(entry, weights.get(entry.path), masks, orders, whole)
    if problems:
        raise CheckError(problems)


def _arrays(params: Any) -> dict[str, Any]:
    return {p: w for p, w in named_leaves(params).items() if hasattr(w, "shape")}


def _fetched(path: str, x: Any) -> np.ndarray:
    whole = getattr(x, "is_fully_addressable", True) or x.is_fully_replicated
    if not whole:
        raise ValueError(
            f"{path} lies on several hosts; gather it on all of them first: "
            "jax.experimental.multihost_utils.process_allgather(params, tiled=True)"
        )
    return np.asarray(x)


def _masks(state: NMState | None) -> dict[str, dict[str, np.ndarray]]:
    """The masks of a state, by path and name."""
    masks: dict[str, dict[str, np.ndarray]] = {}
    for name in MASKS:
        for path, mask in state_leaves(state or {}, name).items():
            masks.setdefault(path, {})[name] = _fetched(path, mask)
    return masks


def _is_whole(plan: Plan, masks: Mapping[str, Any]) -> bool:
    """Whether the masks are all that the op used, not only those that recipes keep."""
    kept = {e.path for e in plan.masked if e.recipe and e.recipe.keeps_mask}
    return not masks.keys() <= kept


def _judge(entry: PlanEntry, w, masks, orders, whole: bool) -> list[Problem]:
    path, sparsity = entry.path, Sparsity.of(entry)
    if w is None:
        return [Problem(path, "missing", "is in the plan, not in the parameters")]
    if w.shape != entry.shape:
        return [Problem(path, "shape", f"plan {entry.shape}, parameter {w.shape}")]
    if not entry.masks_weight:
        return []
    recipe, m = sparsity.recipe, sparsity.pattern.m
    for axis in entry.group_axes:
        if entry.shape[axis] % m and entry.ragged is None:
            detail = f"axis {axis} of {entry.shape} does not hold groups of {m}"
            return [Problem(path, "axis", detail)]
    learned = recipe.mask == "learned"
    given = masks.get(path, {})
    if "mask" not in given and (whole or recipe.keeps_mask or learned):
        return [Problem(path, "missing", "the state has no mask for it")]
    if recipe.reorder and path not in orders:
        return [Problem(path, "missing", "the state has no output_order for it")]
    order = {"output_order": orders[path]} if path in orders else {}
    own = {} if recipe.keeps_mask or learned else _choose(sparsity, w, order)
    judged = given or own
    for name in ("mask", *(["mask_dgrad"] * recipe.masks_dgrad)):
        if name not in judged:
            return [Problem(path, "missing", f"the state has no {name} for it")]
    mask, axes = judged["mask"], _mask_axes(sparsity)
    problem = _judge_mask(entry, w, mask, own.get("mask"), axes)
    if problem is None and recipe.masks_dgrad:
        problem = _judge_mask_dgrad(entry, w, judged, own.get("mask_dgrad"), order)
    return [] if problem is None else [problem]


def _choose(sparsity: Sparsity, w, order) -> dict[str, np.ndarray]:
    return {n: np.asarray(mask) for n, mask in sparsity.choose_masks(w, order).items()}


def _judge_mask_dgrad(entry: PlanEntry, w, judged, own, order) -> Problem | None:
    """What is wrong with dgrad's own mask."""
    sparsity, mask = Sparsity.of(entry), judged["mask_dgrad"]
    twice = sparsity.recipe.dgrad == "weight-masked-twice"
    if twice and mask.shape == w.shape and (mask & ~judged["mask"]).any():
        at = tuple(int(i) for i in np.argwhere(mask & ~judged["mask"])[0])
        detail = f"mask_dgrad keeps weights that mask drops, the first at {at}"
        return Problem(entry.path, "pattern", detail)
    axis = sparsity.out_axis
    if order and mask.shape == w.shape:
        order = np.asarray(order["output_order"])
        w, mask = (np.take_along_axis(a, order, axis) for a in (w, mask))
        own = None if own is None else np.take_along_axis(own, order, axis)
    return _judge_mask(entry, w, mask, own, (axis,), fewer=twice)


def _mask_axes(sparsity: Sparsity) -> tuple[int, ...]:
    """The axes along which fprop's mask must be N:M."""
    both = sparsity.recipe.mask_on_both_axes
    return (sparsity.axis, sparsity.out_axis) if both else (sparsity.axis,)


def _judge_mask(entry: PlanEntry, w, mask, own, axes, fewer=False) -> Problem | None:
    """What is wrong with one mask; `own` is that of the weights, if it must be.

    Masks by tiles, and with `fewer` all, may keep less than n of a group.
    """
    sparsity = Sparsity.of(entry)
    if mask.shape != entry.shape or mask.dtype != bool:
        detail = f"weight {entry.shape}, mask {mask.shape} of dtype {mask.dtype}"
        return Problem(entry.path, "shape", detail)
    for axis in axes:
        along = dataclasses.replace(sparsity, axis=axis)
        wrong = _wrong_groups(mask, along, fewer)
        if wrong.any():
            return _not_nm(entry, w, mask, wrong, axis)
    if own is not None and (mask != own).any():
        at = tuple(int(i) for i in np.argwhere(mask != own)[0])
        return Problem(
            entry.path,
            "weights",
            f"{int((mask != own).sum())} bits differ from the mask of the stored "
            f"weights, the first at {at} (weight {w[at]!s}, mask {bool(mask[at])})",
        )
    return None


def _groups(array: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """(..., size / m, m): the full groups along the axis, which comes last."""
    m = sparsity.pattern.m
    rows = np.moveaxis(array, sparsity.axis, -1)
    full = rows.shape[-1] // m * m
    return rows[..., :full].reshape(*rows.shape[:-1], full // m, m)


def _wrong_groups(
    mask: np.ndarray, sparsity: Sparsity, fewer: bool = False
) -> np.ndarray:
    """(..., number of groups): where the number kept is not n, tails included.

    Masks by tiles may keep fewer: the greedy algorithms leave a tile at 7 of 8.
    """
    pattern, kept = sparsity.pattern, _groups(mask, sparsity).sum(-1)
    fewer = fewer or sparsity.recipe.mask == "tile"
    wrong = kept > pattern.n if fewer else kept != pattern.n
    tail = mask.shape[sparsity.axis] % pattern.m
    if tail:
        kept = np.moveaxis(mask, sparsity.axis, -1)[..., -tail:].sum(-1)
        wrong_tail = kept != _kept_of_tail(sparsity, tail)
        wrong = np.concatenate([wrong, wrong_tail[..., None]], axis=-1)
    return wrong


def _kept_of_tail(sparsity: Sparsity, tail: int) -> int:
    return tail if sparsity.ragged == "dense-tail" else min(sparsity.pattern.n, tail)


def _density(entry: PlanEntry) -> float:
    """The share of weights that the plan keeps, tails included (tiles: at most)."""
    if not entry.masks_weight:
        return 1.0
    sparsity, size = Sparsity.of(entry), entry.shape[entry.axis]
    groups, tail = divmod(size, sparsity.pattern.m)
    return (groups * sparsity.pattern.n + _kept_of_tail(sparsity, tail)) / size


def _not_nm(entry: PlanEntry, w, mask, wrong, judged: int) -> Problem:
    sparsity = Sparsity.of(entry)
    pattern = sparsity.pattern
    one_axis = len(_mask_axes(sparsity)) == 1
    for axis in range(-mask.ndim, 0) if one_axis else ():
        other = dataclasses.replace(sparsity, axis=axis)
        fits = mask.shape[axis] % pattern.m == 0
        if axis != judged and fits and not _wrong_groups(mask, other).any():
            return Problem(
                entry.path,
                "axis",
                f"is {pattern} along axis {axis}, but the GEMM contracts {judged}",
            )
    examples = []
    for index in np.argwhere(wrong)[:3]:
        *row, group = (int(i) for i in index)
        span = slice(group * pattern.m, (group + 1) * pattern.m)
        bits = np.moveaxis(mask, judged, -1)[(*row, span)]
        values = np.moveaxis(w, judged, -1)[(*row, span)]
        examples.append(
            f"group {group} at {tuple(row)} keeps {int(bits.sum())} of {bits.size}: "
            f"mask {bits.astype(int).tolist()}, weights {_short(values)}"
        )
    return Problem(
        entry.path,
        "pattern",
        f"{int(wrong.sum())} of {wrong.size} groups along axis {judged} are not "
        f"{pattern}; " + "; ".join(examples),
    )


def _sparse_operands(recipe: Recipe) -> str:
    """Which operands of a recipe that masks no weight are sparse, in words."""
    words = {"activation": "x", "activation-fixed": "x", "gradient": "dy"}
    sides = (("fprop", recipe.fprop), ("wgrad", recipe.wgrad))
    return ", ".join(f"{words[word]} of {side}" for side, word in sides if word)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{float(value):.4g}") for value in values]


def summary(params: Any, plan: Plan, state: NMState | None = None) -> str:
    """A table: what each parameter is, whether it is N:M, and why it is dense.

    Args:
      params: Parameter tree; arrays, or `jax.ShapeDtypeStruct` (nothing is judged).
      plan: The plan.
      state: As in `check`.

    Returns:
      Text: a row for each parameter of the plan with path, layer, shape, contracted
      axes, recipe, density, whether N:M holds, or the reason it is dense; then totals.
    """
    weights = _arrays(params)
    masks, orders = _masks(state), state_leaves(state or {}, "output_order")
    whole = _is_whole(plan, masks)
    rows = [("path", "layer", "shape", "axes", "recipe", "density", "N:M")]
    kept = total = present = 0
    for entry in plan:
        w = weights.get(entry.path)
        density, verdict, recipe = 1.0, entry.reason, "-"
        if entry.sparse:
            sparsity = Sparsity.of(entry)
            recipe = f"{sparsity.recipe.name} {sparsity.pattern}"
            density, verdict = _density(entry), "not judged"
            if w is None or hasattr(w, "__array__"):
                w = None if w is None else _fetched(entry.path, w)
                problems = _judge(entry, w, masks, orders, whole)
                verdict = f"no: {problems[0].kind}" if problems else "yes"
            if not entry.masks_weight and verdict == "yes":
                verdict = f"W dense: {_sparse_operands(sparsity.recipe)} is N:M"
        shape = "x".join(map(str, entry.shape))
        axes = ",".join(map(str, entry.axes)) or "-"
        row = (entry.path, entry.layer, shape, axes, recipe, f"{density:.3f}", verdict)
        rows.append(row)
        kept, total = kept + density * entry.size, total + entry.size
        present += 0 if w is None else math.prod(w.shape)
    other = sum(math.prod(w.shape) for w in weights.values()) - present
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    sparse = sum(entry.size for entry in plan.sparse)
    lines.append(
        f"{len(plan.sparse)} of {len(plan)} weights sparse; {sparse:,} of "
        f"{total + other:,} parameters, {round(kept) + other:,} kept"
    )
    return "\n".join(line.rstrip() for line in lines)

"""Rules: what the user wants, by the path of a layer and by the part of the run."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from nmjax.masks import Ragged
from nmjax.pattern import NMPattern
from nmjax.recipe import Recipe
from nmjax.recipes import as_recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    """Gives a recipe to the layers whose path matches; the first match wins.

    Attributes:
      path: Regular expression that must match the whole slash-joined path of a
        layer, such as "encoder/layers_0/attn/query", without the final "/kernel"; for
        a parameter of another name, the path of the parameter.
      recipe: A recipe; a pattern such as "2:4", short for `recipes.sr_ste("2:4")`;
        or None: the layer stays dense.
      axis: The axis along which groups run, counted from the end. Only for
        parameters outside Flax's layers; a layer's own geometry decides otherwise.
      ineligible: What to do with a matching layer that cannot be sparse: "error", or
        "dense": it stays dense and the plan gives the reason.
      ragged: What to do where m does not divide the axis: None = ineligible,
        "dense-tail" = the remainder is kept, "pad" = the remainder is a group of its
        own, padded with scores that are never kept.
    """

    path: str
    recipe: Recipe | None
    axis: int | None
    ineligible: Literal["error", "dense"]
    ragged: Ragged | None

    def __init__(
        self,
        path: str,
        recipe: Recipe | str | NMPattern | None,
        *,
        axis: int | None = None,
        ineligible: Literal["error", "dense"] = "error",
        ragged: Ragged | None = None,
    ):
        """Parses the pattern and refuses what cannot be meant.

        Raises:
          ValueError: The expression, the recipe or an option is malformed.
        """
        try:
            re.compile(path)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Rule path {path!r} is not a regular expression: {error}"
            ) from None
        if axis is not None and (type(axis) is not int or axis >= 0):
            raise ValueError(
                f"Rule({path!r}): axis counts from the end, so it must be a negative "
                f"integer such as -2, got {axis!r}"
            )
        if ineligible not in ("error", "dense"):
            raise ValueError(
                f'Rule({path!r}): ineligible must be "error" or "dense", '
                f"got {ineligible!r}"
            )
        if ragged not in (None, "dense-tail", "pad"):
            raise ValueError(
                f'Rule({path!r}): ragged must be None, "dense-tail" or "pad", '
                f"got {ragged!r}"
            )
        parsed = as_recipe(recipe)
        for field, value in {
            "path": path,
            "recipe": parsed if parsed.sparse else None,
            "axis": axis,
            "ineligible": ineligible,
            "ragged": ragged,
        }.items():
            object.__setattr__(self, field, value)

    def matches(self, path: str) -> bool:
        """Whether the rule speaks of the parameter at `path`."""
        return re.fullmatch(self.path, layer_path(path)) is not None


Rules = Sequence[Rule] | Rule | Recipe | NMPattern | str


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Rules as users may write them; "2:4" makes sparse whatever can be.

    Raises:
      ValueError: An element is not a `Rule`.
    """
    if isinstance(rules, str | NMPattern | Recipe):
        return (Rule(".*", rules, ineligible="dense"),)
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(
                f"expected nmjax.Rule, got {rule!r}; write nmjax.Rule('.*', '2:4')"
            )
    return rules


@dataclasses.dataclass(frozen=True)
class RulePhase:
    """A part of a run in which every recipe is constant.

    Attributes:
      name: "dense" before the first sparse step, "sparse", "frozen" where no mask moves
        any more, "finish" where all is dense again; "sparse-2" is a second "sparse".
      first_step: The step with which it begins.
      rules: The rules in force, for `nmjax.plan` and `nmjax.sparsify`.
    """

    name: str
    first_step: int
    rules: tuple[Rule, ...]


def phases(rules: Rules, steps: int) -> tuple[RulePhase, ...]:
    """Cuts a run at the borders of the schedules of its recipes.

    Each phase has rules, hence a plan, a model and one compilation of its own. At a
    border `nmjax.next_state` makes the state of the new phase from that of the old:

        for phase in nmjax.phases(rules, steps):
            model = nmjax.sparsify(dense_model, phase.rules)
            plan = nmjax.plan(dense_model, phase.rules, *example)

    Args:
      rules: As for `nmjax.sparsify`.
      steps: Length of the run in optimizer steps.

    Returns:
      The phases in order, the first at step 0; neighbours differ. Borders are rounded
      to whole steps.

    Raises:
      ValueError: `steps` is below 1.
    """
    rules = as_rules(rules)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"a run has at least 1 step, got {steps!r}")
    recipes = [rule.recipe for rule in rules if rule.recipe is not None]
    borders = sorted({0.0, *(b for recipe in recipes for b in recipe.schedule.borders)})
    found: list[RulePhase] = []
    for border in borders:
        step, now = round(border * steps), tuple(_at(rule, border) for rule in rules)
        if found and found[-1].first_step == step:
            found.pop()
        if step < steps and not (found and found[-1].rules == now):
            found.append(RulePhase(_phase_name(found, now, border), step, now))
    return _numbered(found)


def _at(rule: Rule, progress: float) -> Rule:
    if rule.recipe is None:
        return rule
    return dataclasses.replace(rule, recipe=rule.recipe.at(progress))


def _phase_name(
    before: list[RulePhase], rules: tuple[Rule, ...], progress: float
) -> str:
    recipes = [rule.recipe for rule in rules if rule.recipe is not None]
    if not recipes:
        sparse_before = any(phase.name != "dense" for phase in before)
        return "finish" if sparse_before else "dense"
    frozen = all(recipe.schedule.freeze_from <= progress for recipe in recipes)
    return "frozen" if frozen else "sparse"


def _numbered(phases: list[RulePhase]) -> tuple[RulePhase, ...]:
    counts: dict[str, int] = {}
    numbered = []
    for phase in phases:
        counts[phase.name] = number = counts.get(phase.name, 0) + 1
        suffix = f"-{number}" if number > 1 else ""
        numbered.append(dataclasses.replace(phase, name=phase.name + suffix))
    return tuple(numbered)


def layer_path(path: str) -> str:
    """The path that rules match: a parameter's without a final "/kernel"."""
    return path.removesuffix("/kernel")

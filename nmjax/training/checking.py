"""Whether a trained network, as its checkpoint holds it, is what its plan says."""

from collections.abc import Mapping
from typing import Any

from nmjax.audit import CheckError, Problem, check
from nmjax.paths import named_leaves
from nmjax.plans import Plan
from nmjax.state import prepare, state_leaves


def check_network(network: Mapping[str, Any]) -> None:
    """`nmjax.check` of a checkpoint, in which every mask has to be.

    Args:
      network: What `restore` returns.

    Raises:
      CheckError: As `nmjax.check`; or the checkpoint lacks the mask of a masked weight,
        or has one that is not the most probable of the logits beside it.
    """
    plan: Plan = network["plan"]
    params, masks = network["params"], state_leaves(network["masks"], "mask")
    problems = [
        Problem(entry.path, "missing", "the checkpoint has no mask for it")
        for entry in plan.masked
        if entry.path not in masks
    ]
    try:
        check(params, plan, network["masks"])
    except CheckError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in error.problems if problem.path not in known]
    if problems:
        raise CheckError(problems)

    learned = [e.path for e in plan.masked if e.recipe and e.recipe.mask == "learned"]
    if not learned:
        return
    logits = network["nm_logits"]
    there = named_leaves(logits)
    problems = [
        Problem(path, "missing", "the checkpoint has no logits for it")
        for path in learned
        if path not in there
    ]
    if problems:
        raise CheckError(problems)
    own = state_leaves(prepare(params, plan, network["nm"], logits=logits), "mask")
    bits = {path: int((own[path] != masks[path]).sum()) for path in learned}
    problems = [
        Problem(path, "weights", f"{number} bits differ from the mask of the logits")
        for path, number in bits.items()
        if number
    ]
    if problems:
        raise CheckError(problems)

"""`python -m nmjax check RUN`, `python -m nmjax summary RUN`.

Both read checkpoints of `nmjax.training`, which hold the plan, the weights and the
masks that the network used: neither the code of the model nor its data are needed.
"""

import argparse
import collections
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import nmjax
from nmjax.plans import Plan

SPARSE, DENSE, FAILED, UNREADABLE = "sparse", "dense", "failed", "unreadable"

_DESCRIPTION = """\
Judges and describes networks that nmjax.training or python -m experiments.imagenet
trained. The plan is in the checkpoint: no model code is needed, and no device."""

_RUN = """a run folder, a folder of several (such as a comparison of methods and seeds),
RUN/best, or one checkpoint, RUN/checkpoints/STEP"""

_CHECK = """\
Is the trained network really N:M? Reads the masks that the network used and tells, for
every weight of the plan, whether its mask is there, is N:M along the axis that the GEMM
contracts, and is the mask of the weights stored beside it."""

_CHECK_CODES = """\
exit code: 0 = all fine (a dense run is, and is reported as dense); 1 = a network is not
what its plan says, every finding is listed; 2 = bad usage, or nothing that can be read.

example: python -m nmjax check runs/digits"""

_SUMMARY = """\
Lists every weight: layer, shape, the axes that its GEMM contracts, recipe, density,
whether N:M holds, or the reason why it is dense."""

_SUMMARY_CODES = """\
exit code: 0 = printed; 2 = bad usage, or nothing that can be read.

example: python -m nmjax summary runs/digits/best"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: Those of the command line by default.

    Returns:
      The exit code: 0 = fine, 1 = a network fails its check, 2 = something cannot be
      read. Wrong usage leaves through argparse, with code 2 too.
    """
    options = _parser().parse_args(arguments)
    try:
        from nmjax.training import restore

        folders = _find_runs(options.run)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        _say_error(error)
        return 2
    verdicts: dict[Path, str] = {}
    for folder in folders:
        try:
            network = restore(folder, options.step)
            verdicts[folder] = options.command(folder, network)
        except (OSError, ValueError) as error:
            _say_error(error)
            verdicts[folder] = UNREADABLE
    if options.command is _check:
        _say_verdict(options.run, verdicts)
    found = set(verdicts.values())
    return 1 if FAILED in found else 2 if UNREADABLE in found else 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m nmjax", description=_DESCRIPTION, formatter_class=layout
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, line, text, codes in (
        ("check", _check, "is the trained network really N:M?", _CHECK, _CHECK_CODES),
        ("summary", _summary, "every weight, and why", _SUMMARY, _SUMMARY_CODES),
    ):
        sub = commands.add_parser(
            name, help=line, description=text, epilog=codes, formatter_class=layout
        )
        sub.add_argument("run", metavar="RUN", type=Path, help=_RUN)
        sub.add_argument(
            "--step", type=int, help="step of the checkpoint (default: the latest)"
        )
        sub.set_defaults(command=command)
    return parser


def _find_runs(path: Path) -> list[Path]:
    """The folder itself where it holds a checkpoint, else the run folders in it."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected a run folder")
    holds_checkpoints = (path / "meta", path / "checkpoints")
    if any(map(Path.is_dir, holds_checkpoints)):
        return [path]
    children = sorted(child for child in path.iterdir() if child.is_dir())
    runs = [child for child in children if (child / "checkpoints").is_dir()]
    if not runs and any(child.name.isdigit() for child in children):
        return [path]  # RUN/best, RUN/checkpoints
    if not runs:
        raise ValueError(
            f"{path} holds no run: a run folder has checkpoints/STEP, and a folder of "
            "runs has run folders directly below it"
        )
    return runs


def _check(folder: Path, network: dict[str, Any]) -> str:
    """Prints what is to be said of one network; returns the verdict."""
    from nmjax.training import check_network

    plan: Plan = network["plan"]
    label = f"{folder}, step {network['step']}:"
    if not plan.sparse:
        dense_yet = network["phase"] == "dense" and _is_sparse_later(folder)
        why = "this phase of the run is dense" if dense_yet else "no weight is sparse"
        print(f"{label} dense, {why}")
        return DENSE
    try:
        check_network(network)
    except nmjax.CheckError as error:
        print(f"{label} FAILED, {error}")
        return FAILED
    patterns = sorted({str(e.recipe.pattern) for e in plan.sparse if e.recipe})
    what = f"{len(plan.masked)} of {len(plan)} weights are"
    if not plan.masked:
        what = f"weights are dense, activations of {len(plan.sparse)} layers are"
    print(
        f"{label} ok, {what} {' or '.join(patterns)} along the axis that their GEMM "
        "contracts"
    )
    return SPARSE


def _summary(folder: Path, network: dict[str, Any]) -> str:
    """Prints the table of one network; returns which kind it is."""
    print(f"{folder}, step {network['step']}, {network['phase']} phase:")
    masks = network["masks"]
    print(nmjax.summary(network["params"], network["plan"], masks), end="\n\n")
    return SPARSE if network["plan"].sparse else DENSE


def _is_sparse_later(folder: Path) -> bool:
    """Whether the run that a dense checkpoint belongs to has a sparse phase."""
    from nmjax.training import load_plan

    for parent in (folder, *folder.parents[:2]):
        if (parent / "plan.json").is_file():
            return bool(load_plan(parent).sparse)
    return False


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _say_verdict(run: Path, verdicts: dict[Path, str]) -> None:
    count = collections.Counter(verdicts.values())
    sparse = count[SPARSE] + count[FAILED]
    print()
    if count[FAILED]:
        first = next(folder for folder, kind in verdicts.items() if kind == FAILED)
        print(
            f"FAILED: {count[FAILED]} of {sparse} sparse networks fail the check. "
            f"Next: python -m nmjax summary {_quoted(first)}; train again, or check an "
            "earlier checkpoint with --step"
        )
    elif sparse:
        dense = f"; {count[DENSE]} dense" if count[DENSE] else ""
        print(
            f"N:M holds in {sparse} of {sparse} sparse networks{dense}. Next: "
            f"python -m nmjax summary {_quoted(run)}"
        )
    elif count[DENSE]:
        print(
            f"No network here is sparse. Next: python -m nmjax summary {_quoted(run)}"
        )
    if count[UNREADABLE]:
        print(f"{count[UNREADABLE]} of {len(verdicts)} could not be read")


def _say_error(error: Exception) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)


def _hide_late_reads(unraisable: Any) -> None:
    """Once a read has failed, TensorStore's others report to a loop that is gone."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _hide_late_reads
    # A judge needs no accelerator, and must not take memory from a running training.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())

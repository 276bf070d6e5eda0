"""Trains N:M sparse image classifiers: `python -m experiments.imagenet`.

Without arguments it compares dense and 2:4 training on bundled data. With a preset's
name, `--model`, `--dataset` or `--resume` it trains, continues or evaluates one
network.
"""

import contextlib
import difflib
import io
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from experiments.methods import METHODS, CompareOptions
from experiments.presets import (
    PRESETS,
    Options,
    flag,
    read_options,
    refuse,
)

T = TypeVar("T")

PROG = "python -m experiments.imagenet"

_EXAMPLES = f"""\
{PROG}
    compares dense, SR-STE 2:4 and one-shot pruning on bundled data; what its options
    are: compare --help
{PROG} compare --recipes all --patterns 2:4,1:8 --folds 5 --seeds 4
    compares all methods by cross-validation, on the same parameters and batches
{PROG} resnet50-2to4 --data-path D --output-dir runs/r50
    trains a preset; the same command again continues after an interruption
{PROG} --dataset digits --model resnet8 --pattern 1:4 --epochs 15
    trains one network from options alone
{PROG} --test-only --resume runs/r50
    evaluates a trained network"""

# What torchvision's reference trainer calls options that have another name here.
_TORCHVISION = {
    "-b": "--batch-size",
    "--wd": "--weight-decay",
    "--amp": "--dtype bfloat16",
    "--lr-step-size": "--lr-steps",
}

# These words on a command line without a preset or compare mean: one network.
_SINGLE = {"model", "dataset", "resume", "test_only", "help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: The arguments; None = those of the process.

    Returns:
      The exit code: 0; 2 for a command that cannot be meant or carried out, 1 for a
      training that failed.

    Raises:
      SystemExit: After `--help`, or after a signal has stopped the training.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parse(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> Options | CompareOptions:
    """Reads the command line.

    Args:
      arguments: The words after the command's name.

    Returns:
      Options of one network, or of the comparison.

    Raises:
      ValueError: A word is no preset, an option is unknown, without effect, or has a
        value of the wrong type.
      SystemExit: `--help` was asked for and has been printed.
    """
    name, rest = None, list(arguments)
    if rest and not rest[0].startswith("-"):
        name, *rest = rest
        if name not in (*PRESETS, "compare"):
            raise ValueError(
                f"no preset {name!r}{_closest(name, PRESETS)}. There are: "
                + ", ".join(PRESETS)
            )
    given = _given(rest)
    if name == "compare" or (name is None and not given & _SINGLE):
        return _read(CompareOptions(), rest, f"{PROG} compare", _about_compare())

    options = _read(
        PRESETS[name].options if name else Options(),
        rest,
        f"{PROG} {name}" if name else PROG,
        _about_preset(name) if name else _about(),
    )
    if options.run.resume is not None:
        options = _resumed(options, name, rest)
    refuse(options, given)
    if options.run.output_dir is None:
        parts = (options.data.dataset, options.model.model, options.sparsity.recipe)
        options = options.replace(output_dir=f"runs/{name or '-'.join(parts)}")
    return options


def _resumed(options: Options, preset: str | None, rest: list[str]) -> Options:
    """Reads the command line again, over the options of the run to go on with."""
    path = Path(options.run.resume or "")
    if preset is not None:
        raise ValueError(
            f"--resume {path} takes its options from that run: leave {preset} out, or "
            f"continue it with {preset} --output-dir {path}"
        )
    # To evaluate, a path may also be RUN/best or RUN/checkpoints/STEP.
    above = path.absolute().parents[:2] if options.run.test_only else ()
    folders = [path, *above]
    for folder in folders:
        saved = read_options(folder)
        if saved is not None:
            base = saved.replace(resume=None, output_dir=str(folder), test_only=False)
            return _read(base, rest, PROG, _about())
    raise ValueError(
        f"--resume {path}: no options.json there, so it is no run folder of this "
        "command"
    )


def _run(command: Options | CompareOptions) -> int:
    """Carries out what was parsed; jax comes in here and not before."""
    from experiments.compare import compare
    from nmjax import training

    try:
        if isinstance(command, CompareOptions):
            compare(command)
        else:
            _run_single(command)
    except training.TrainingDiverged as error:
        message = str(error).replace("clip_norm", flag("clip_grad_norm"))
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


def _run_single(options: Options) -> None:
    """Trains, continues or evaluates one network and says how it went."""
    from experiments import single

    single.train_config(options)
    single.sparsity_rules(options)
    if options.run.test_only:
        run = options.run.resume or ""  # `refuse` has seen to it that there is one
        scores = single.evaluate_run(options, single.load_data(options), run)
        print(
            f"{run} on the {scores['count']:,.0f} test images of "
            f"{options.data.dataset}: {_scores(scores['top1'], scores.get('top5'))}"
        )
        return
    folder = single.run_folder(options)
    data = single.load_data(options)
    single.describe(options, data, print)
    print(f"run folder: {folder}\n", flush=True)
    outcome = single.train_network(options, data, folder)
    layers, run = outcome.sparse_layers, shlex.quote(str(folder))
    found = f"passed, {layers} layers" if layers else "weights are dense"
    print(
        f"\nTest set: {_scores(outcome.top1, outcome.top5)}\n"
        f"N:M check: {found}\n"
        f"Results: {folder}/metrics.csv, plots/*.png, checkpoints/, best/\n"
        f"Next: python -m nmjax check {run}, python -m nmjax summary {run}, or "
        f"{PROG} --test-only --resume {run}"
    )


def _scores(top1: float, top5: float | None) -> str:
    text = f"top-1 {100 * top1:.2f} %"
    return text if top5 is None else f"{text}, top-5 {100 * top5:.2f} %"


def _read(default: T, arguments: list[str], prog: str, description: str) -> T:
    """Reads options over defaults.

    Raises:
      ValueError: tyro's message on one line.
      SystemExit: `--help` was asked for and has been printed.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box: a title, the message, a rule, and advice that is longer.
    lines = [line.strip("│ ") for line in errors.getvalue().splitlines()]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), None)
    message = " ".join(lines[1:rule])
    if message.startswith("Unrecognized options: "):
        unknown = message.split()[2].rstrip(",")
        names = default.flat() if isinstance(default, Options) else vars(default)
        message += _closest(unknown, [flag(name) for name in names])
        if isinstance(default, CompareOptions):
            message += (
                ". The comparison has few options; to train one network, name a preset "
                "or give --model"
            )
    raise ValueError(f"{message} ({prog} --help)")


def _given(arguments: Iterable[str]) -> set[str]:
    """Names of the options that the user wrote.

    Raises:
      ValueError: One is there twice, where the second would replace the first.
    """
    names = [
        word.lstrip("-").split("=")[0].replace("-", "_")
        for word in arguments
        if word.startswith("--") or word == "-h"
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{flag(name)} is given twice; several values follow it once, as in "
                "--dense stem head"
            )
    return {"help" if name == "h" else name for name in names}


def _closest(word: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(names), n=1)
    matches = [_TORCHVISION[word]] if word in _TORCHVISION else matches
    return f" (did you mean {matches[0]}?)" if matches else ""


def _about() -> str:
    presets = "\n".join(
        f"{name}\n{textwrap.indent(textwrap.fill(preset.about, 72), '    ')}"
        for name, preset in PRESETS.items()
    )
    return (
        "Trains N:M sparse image classifiers in JAX and Flax.\n\n"
        f"Examples:\n{textwrap.indent(_EXAMPLES, '  ')}\n\n"
        "Presets, named before the options; PRESET --help shows its own defaults:\n"
        + textwrap.indent(presets, "  ")
    )


def _about_preset(name: str) -> str:
    return textwrap.indent(textwrap.fill(PRESETS[name].about, 76), "  ")


def _about_compare() -> str:
    methods = "\n".join(f"  {name}: {m.label}" for name, m in METHODS.items())
    return (
        "Compares methods on a small dataset with ResNet-8: the same initial "
        "parameters, batches and folds for all of them.\n\nMethods:\n" + methods
    )


if __name__ == "__main__":
    sys.exit(main())

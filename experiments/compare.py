"""All methods on the same seeds, folds, initial parameters and batches.

A unit is a seed on a fold of the data: within it every method starts from the same
parameters and sees the same batches, so that a difference is the method's and not the
seed's. Units are worked through one after the other, all methods in each, and every
network that is done is on disk: a comparison that is killed continues with the same
command, and one that is done can be given more seeds, recipes or patterns.
"""

import dataclasses
import functools
import os
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax

import nmjax
from experiments import data as datasets
from experiments import single
from experiments.methods import (
    Arm,
    CompareOptions,
    arms,
    options_of,
    output_dir,
    run_folder,
)
from experiments.plots import plot_comparison, plot_runs, read_metrics
from experiments.presets import Options, flag
from experiments.records import Record, Records
from experiments.tables import Comparison, report
from nmjax import pruning, training
from nmjax.training.run_folder import versions, write_whole

_CALIBRATION = 4  # batches of training images for pruning after training

_say = functools.partial(print, flush=True)


def compare(options: CompareOptions, say: Callable[[str], None] = _say) -> None:
    """Runs the comparison, or what is left of it, and prints its tables.

    Raises:
      ValueError: An option is out of range, or the folder holds another comparison.
      nmjax.CheckError: A network is not N:M.
      nmjax.training.TrainingDiverged: A network diverged; leave its recipe out.
    """
    folder, compared = Path(output_dir(options)), arms(options)
    units = _units(options)
    for arm in compared:  # refuses wrong values before anything is loaded
        run = options_of(arm, options, *units[0])
        try:
            single.train_config(run)
            single.sparsity_rules(run)
        except ValueError as error:
            raise ValueError(f"{arm.label}: {error}") from None
    records = Records(folder, options)
    first = options_of(compared[0], options, *units[0])
    if options.validate and first.data.train_size is None:
        raise ValueError("--validate tests on what --train-size leaves out: give it")
    whole = single.open_data(first)
    splits = {
        fold: single.select(options_of(compared[0], options, fold, 0), whole)
        for fold, _ in units
    }
    _describe(compared, options, splits[0], say)
    say(f"{len(units)} units of paired networks; results go to {folder}\n")

    for number, unit in enumerate(units, 1):
        for arm in compared:
            label = f"[{number}/{len(units)}] {arm.label}, {_name(unit, options)}:"
            record = records.get((arm.name, arm.pattern, *unit))
            if record:
                say(f"{label} top-1 {record.top1:.2f} % (already there)")
                continue
            record = _network(arm, options, unit, splits[unit[0]])
            records.add(record)
            say(f"{label} top-1 {record.top1:.2f} %")
        if number > 1:
            found = Comparison(compared, units[:number], records.all())
            text = report(found, splits[0].num_test)
            write_whole(folder / "table.md", f"{text}\n\n{_origin(options)}")
    say(f"\n{text}\n")
    plot_comparison(found, folder / "plots")
    if runs := _kept_runs(compared, options, units):
        plot_runs(runs, folder / "plots")
    say(f"Results: {folder}/table.md, table.json, plots/*.png and one folder per run.")
    say(
        f"Next: python -m nmjax check {shlex.quote(str(folder))}, or "
        "python -m experiments.imagenet --help to train a network of your own choice."
    )


def _units(options: CompareOptions) -> list[tuple[int, int]]:
    """(fold, seed) of every unit; all folds of a seed before the next seed.

    Raises:
      ValueError: There would be fewer than two.
    """
    if options.folds is not None and options.folds < 2:
        raise ValueError(f"--folds must be at least 2, got {options.folds}")
    folds = options.folds or 1
    if options.seeds < 1 or folds * options.seeds < 2:
        raise ValueError(
            f"--seeds must be at least 2 (1 with --folds), got {options.seeds}: a "
            "deviation needs two values"
        )
    return [(fold, seed) for seed in range(options.seeds) for fold in range(folds)]


def _kept_runs(compared, options: CompareOptions, units) -> dict[str, list[Path]]:
    """Run folders by label; a record outlives the folder of its run."""
    folders = {
        arm.label: [Path(run_folder(arm, options, *unit)) for unit in units]
        for arm in compared
    }
    kept = {
        label: [run for run in runs if (run / "metrics.csv").exists()]
        for label, runs in folders.items()
    }
    return {label: runs for label, runs in kept.items() if runs}


def _describe(compared, options, data, say) -> None:
    """Plans every method, and prints the plan of one that is sparse.

    Raises:
      ValueError: A method does not fit the model.
    """
    sparse = [arm for arm in compared if arm.method.patterns != ()]
    for arm in sparse:
        try:
            single.plan_of(options_of(arm, options, 0, 0), data)
        except ValueError as error:
            raise ValueError(f"{arm.label}: {error}") from None
    shown = (sparse or compared)[0]
    single.describe(options_of(shown, options, 0, 0), data, say)


def _network(arm: Arm, options: CompareOptions, unit, data: datasets.Data) -> Record:
    """Trains, or makes from a trained one, the network of an arm in a unit."""
    run = options_of(arm, options, *unit)
    if not arm.method.trains:
        return _convert(arm, run, unit, data)
    outcome = single.train_network(run, data, single.run_folder(run), progress=False)
    curves = read_metrics(Path(run.run.output_dir or "") / "metrics.csv")
    _, retained = curves.get("retained_magnitude", ([], [None]))
    return Record(
        arm.name,
        arm.pattern,
        *unit,
        top1=100 * outcome.top1,
        sparse_layers=outcome.sparse_layers,
        step_seconds=outcome.step_seconds,
        flip_rate=_mean_rate(curves["flip_rate"]) if "flip_rate" in curves else None,
        retained_magnitude=retained[-1],
    )


def _mean_rate(curve: tuple[list[int], list[float]]) -> float:
    """Mean over the steps of a curve whose values are means since the one before."""
    steps, rates = curve
    lengths = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    total = sum(n * rate for n, rate in zip(lengths, rates, strict=True))
    return total / sum(lengths)


def _convert(arm: Arm, run: Options, unit, data: datasets.Data) -> Record:
    """What a recipe makes of a trained network, without training it again.

    Raises:
      nmjax.CheckError: The result is not N:M.
    """
    saved = training.restore(run.model.pretrained or "")
    model, rules = single.make_model(run, data), single.sparsity_rules(run)
    plan = nmjax.plan(model, rules, single.example(data))
    batch, method = run.optim.batch_size, arm.method
    variables = {name: saved[name] for name in ("params", "batch_stats")}
    if method.prune is not None:
        batches = data.train_batches(batch, seed=run.run.seed)
        pruned = getattr(pruning, method.prune)(
            model,
            rules,
            [next(batches)["image"] for _ in range(_CALIBRATION)],
            variables=variables,
            kwargs={"train": False},
        )
        variables["params"] = pruned.params
    variables["nm"] = nmjax.init_state(variables["params"], plan)
    masks = nmjax.prepare(variables["params"], plan, variables["nm"])
    nmjax.check(variables["params"], plan, masks)
    if method.reestimate:
        # The running averages forget by 0.9 a batch: after 100, nothing is left of
        # before.
        variables = training.reestimate_batch_stats(
            model, rules, variables, data, batch, batches=100, seed=run.run.seed
        )
    top1 = training.evaluate(model, rules, variables, data, batch)["top1"]
    retained = nmjax.metrics.retained_magnitude(saved["params"], plan, masks)
    return Record(
        arm.name,
        arm.pattern,
        *unit,
        top1=100 * top1,
        sparse_layers=len(plan.masked),
        step_seconds=None,
        flip_rate=None,
        retained_magnitude=float(retained["total"]),
    )


def _origin(options: CompareOptions) -> str:
    """The command, the versions, the date and the machine."""
    words = ["python", "-m", "experiments.imagenet", "compare"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        # Where things are is nobody else's business.
        if value != field.default and field.name not in ("output_dir", "data_path"):
            # Boolean options have no value on the command line.
            words += [flag(field.name)] + ([] if value is True else [str(value)])
    on = versions()
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    text = f"""`{shlex.join(words)}`, Python {on["python"]}, jax {on["jax"]}, flax
        {on["flax"]}, {on["date"][:10]}, commit {str(on["commit"])[:10]}, {_machine()},
        load average {load}: on a machine that others use, step times are rough."""
    return textwrap.fill(" ".join(text.split()), 88, break_on_hyphens=False)


def _machine() -> str:
    """The processor, or the accelerator."""
    devices = jax.devices()
    kind = devices[0].device_kind
    cpuinfo = Path("/proc/cpuinfo")
    if devices[0].platform == "cpu" and cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        name = names[0].partition(":")[2].strip() if names else kind
        return f"{os.cpu_count()} cores of {name}"
    return f"{len(devices)} × {kind}"


def _name(unit: tuple[int, int], options: CompareOptions) -> str:
    fold, seed = unit
    return f"fold {fold}, seed {seed}" if options.folds else f"seed {seed}"

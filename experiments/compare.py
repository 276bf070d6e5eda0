"""Dense against N:M on a small dataset: paired seeds, one-shot pruning as control.

For each seed the dense and the sparse network start from the same parameters and see
the same batches, so that their difference is the method's and not the seed's. Each
dense network is then also pruned in one shot, without training: what SR-STE must beat.
"""

import dataclasses
import functools
import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nmjax
from experiments import single
from experiments.plots import plot_pairs, plot_runs
from experiments.presets import PRESETS, CompareOptions, Options
from nmjax import training

DENSE, SPARSE = "dense", "SR-STE"
PRUNED, PRUNED_AS_IS = "one-shot, batch norm re-estimated", "one-shot, as it is"
METHODS = (DENSE, SPARSE, PRUNED, PRUNED_AS_IS)
TRAINED = {DENSE: "dense", SPARSE: "sr_ste"}  # method -> recipe, and name of its folder

# Quantiles 0.975 of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclasses.dataclass(frozen=True)
class Record:
    """One network of the comparison.

    Attributes:
      method: One of `METHODS`.
      seed: Of the initial parameters and the data order.
      top1: Test accuracy in percent.
      sparse_layers: Layers found to be N:M; 0 for the dense network.
      step_seconds: Median seconds per optimizer step; None where none was made, or
        the run was continued after its last one.
    """

    method: str
    seed: int
    top1: float
    sparse_layers: int
    step_seconds: float | None


_say = functools.partial(print, flush=True)


def compare(options: CompareOptions, say: Callable[[str], None] = _say) -> None:
    """Runs the comparison, or what is left of it, and prints its table.

    Raises:
      ValueError: An option is out of range, or the folder holds another comparison.
    """
    if not 2 <= options.seeds <= 10:
        raise ValueError(f"--seeds must be from 2 to 10, got {options.seeds}")
    folder = Path(options.output_dir)
    runs = {
        (method, seed): _options(options, method, seed)
        for seed in range(options.seeds)
        for method in TRAINED
    }
    for run in runs.values():  # refuses wrong values before anything is loaded
        single.train_config(run)
        single.sparsity_rules(run)
    records = _read(folder, options)
    data = single.load_data(runs[DENSE, 0])
    single.describe(runs[SPARSE, 0], data, say)
    say(
        f"{options.seeds} seeds, dense and {SPARSE}, each pair from the same parameters"
        f" with the same batches; results go to {folder}\n"
    )

    for number, ((method, seed), run) in enumerate(runs.items(), 1):
        label = f"[{number}/{len(runs)}] {method}, seed {seed}:"
        if (method, seed) in records:
            say(f"{label} top-1 {records[method, seed].top1:.2f} % (already there)")
            continue
        run_folder = single.run_folder(run)
        outcome = single.train_network(run, data, run_folder, progress=False)
        made = [
            Record(
                method,
                seed,
                100 * outcome.top1,
                outcome.sparse_layers,
                outcome.step_seconds,
            )
        ]
        say(f"{label} top-1 {made[0].top1:.2f} %")
        if method == DENSE:
            made += prune(run, data, run_folder)
            say(
                f"      pruned in one shot: {made[1].top1:.2f} %, "
                f"{made[2].top1:.2f} % without new batch statistics"
            )
        records |= {(record.method, record.seed): record for record in made}
        _write(folder, options, records)

    kept = [
        records[method, seed] for seed in range(options.seeds) for method in METHODS
    ]
    text = table(kept, options.pattern) + "\n\n" + verdict(kept, data.num_test)
    (folder / "table.md").write_text(text + "\n")
    plot_runs(
        {
            method: [folder / f"{name}-seed{seed}" for seed in range(options.seeds)]
            for method, name in TRAINED.items()
        },
        folder / "plots",
    )
    # Without new batch statistics accuracy may be anything: the figure would show no
    # other difference.
    shown = (DENSE, SPARSE, PRUNED)
    accuracies = {m: [r.top1 for r in kept if r.method == m] for m in shown}
    plot_pairs(accuracies, range(options.seeds), folder / "plots" / "accuracy.png")
    say(f"\n{text}\n")
    say(f"Results: {folder}/table.md, table.json, plots/*.png and one folder per run.")
    say(
        f"Next: python -m nmjax check {folder}, or python -m experiments.imagenet "
        "--help to train a network of your own choice."
    )


def prune(options: Options, data: Any, folder: Path) -> tuple[Record, Record]:
    """Prunes a trained dense network by magnitude, without training it again.

    Args:
      options: Those of the dense run; its pattern and layers are used.
      data: The dataset.
      folder: Its run folder.

    Returns:
      The records with batch statistics re-estimated on training batches, and with
      those of the dense network.

    Raises:
      nmjax.CheckError: The pruned network is not N:M.
    """
    saved = training.restore(folder)
    model, batch = single.make_model(options, data), options.optim.batch_size
    # SR-STE's forward pass masks the weights that it finds by magnitude; given those
    # of a dense network, it is the network pruned in one shot.
    rules = single.sparsity_rules(options.replace(recipe=TRAINED[SPARSE]))
    plan = nmjax.plan(model, rules, single.example(data))
    nmjax.check(saved["params"], plan, nmjax.prepare(saved["params"], plan))
    pruned = {name: saved[name] for name in ("params", "batch_stats")}
    # The running averages forget by 0.9 a batch: after 100, nothing is left of before.
    again = training.reestimate_batch_stats(
        model, rules, pruned, data, batch, batches=100, seed=options.run.seed
    )
    as_is, estimated = (
        100 * training.evaluate(model, rules, variables, data, batch)["top1"]
        for variables in (pruned, again)
    )
    seed, layers = options.run.seed, len(plan.sparse)
    return (
        Record(PRUNED, seed, estimated, layers, None),
        Record(PRUNED_AS_IS, seed, as_is, layers, None),
    )


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of two values or more."""
    return statistics.fmean(values), statistics.stdev(values)


def paired_gap(
    values: Sequence[float], reference: Sequence[float]
) -> tuple[float, float, float]:
    """How far values are from those of the same seeds in a reference.

    Args:
      values: One value for each seed, two or more.
      reference: The same seeds in the same order.

    Returns:
      Mean and sample standard deviation of the differences, and half the width of the
      95 % confidence interval of the mean (Student's t).
    """
    gaps = [a - b for a, b in zip(values, reference, strict=True)]
    mean, deviation = mean_deviation(gaps)
    quantile = _STUDENT[len(gaps) - 2]
    return mean, deviation, quantile * deviation / len(gaps) ** 0.5


def step_ratio(records: Sequence[Record], method: str) -> float | None:
    """Median over the seeds of a method's step time over the dense network's."""
    seconds = {(r.method, r.seed): r.step_seconds for r in records}
    ratios = [
        time / reference
        for (name, seed), time in seconds.items()
        if name == method and time and (reference := seconds[DENSE, seed])
    ]
    return statistics.median(ratios) if ratios else None


def table(records: Sequence[Record], pattern: str) -> str:
    """The comparison as a Markdown table that is also aligned as plain text."""
    dense = [r.top1 for r in records if r.method == DENSE]
    rows = [
        ["method", "top-1 (%)", "gap to dense, paired", "N:M checked", "step time"],
    ]
    for method in METHODS:
        own = [r for r in records if r.method == method]
        top1 = [r.top1 for r in own]
        layers, ratio = own[0].sparse_layers, step_ratio(records, method)
        gap = "" if method == DENSE else _plus_minus(*paired_gap(top1, dense)[:2], "+")
        name = method if method == DENSE else method.replace(",", f" {pattern},", 1)
        if method == SPARSE:
            name = f"{SPARSE} {pattern}"
        rows.append(
            [
                name,
                _plus_minus(*mean_deviation(top1)),
                gap,
                f"yes, {layers} layers" if layers else "dense",
                f"{ratio:.2f}" if ratio else "no training",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def verdict(records: Sequence[Record], num_test: int) -> str:
    """What the table shows and what it does not."""
    dense, sparse = (
        [r.top1 for r in records if r.method == method] for method in (DENSE, SPARSE)
    )
    gap, deviation, half = paired_gap(sparse, dense)
    n = len(dense)
    # A deviation estimated from three or four values is itself too rough to rank by.
    can = "tell apart" if n >= 5 and abs(gap) > half else "are too few to rank"
    text = f"""Mean ± standard deviation over {n} seeds. {n} seeds {can} dense and
        {SPARSE}: the 95 % interval of their paired gap is {gap - half:+.2f} to
        {gap + half:+.2f} points (Student's t, {n - 1} degrees of freedom), its
        deviation of {deviation:.2f} is itself a rough estimate, and one test image is
        {100 / num_test:.2f} points. Step time is relative to dense on this machine,
        where masked weights go through dense GEMMs: no speed-up is to be expected."""
    return textwrap.fill(" ".join(text.split()), 88)


def _plus_minus(mean: float, deviation: float, sign: str = "") -> str:
    return f"{mean:{sign}.2f} ± {deviation:.2f}"


def _options(options: CompareOptions, method: str, seed: int) -> Options:
    """The options of one run of the comparison."""
    name = TRAINED[method]
    return PRESETS["digits-resnet8-2to4"].options.replace(
        recipe=name,
        pattern=options.pattern,
        decay=options.decay,
        epochs=options.epochs,
        seed=seed,
        checkpoint_every=110,  # a run takes seconds: less often than each epoch
        output_dir=str(Path(options.output_dir) / f"{name}-seed{seed}"),
    )


def _settings(options: CompareOptions) -> dict[str, Any]:
    """What must be equal for records to belong to one comparison."""
    settings = dataclasses.asdict(options)
    del settings["output_dir"], settings["seeds"]
    return settings


def _read(folder: Path, options: CompareOptions) -> dict[tuple[str, int], Record]:
    """The records that a folder already holds.

    Raises:
      ValueError: They are damaged or of a comparison with other options.
    """
    path = folder / "table.json"
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        records = [Record(**fields) for fields in saved["runs"]]
        settings = saved["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the runs beside it are "
            "read again"
        ) from None
    if settings != _settings(options):
        raise ValueError(
            f"{folder} holds a comparison with other options, {settings}: choose "
            "another --output-dir"
        )
    return {(record.method, record.seed): record for record in records}


def _write(
    folder: Path, options: CompareOptions, records: Mapping[Any, Record]
) -> None:
    """Writes the records so far; a kill leaves the old file or the new one."""
    content = {
        "options": _settings(options),
        "runs": [dataclasses.asdict(record) for record in records.values()],
    }
    temporary = folder / "table.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(folder / "table.json")

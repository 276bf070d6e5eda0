"""Figures as PNG files: of runs their curves and masks, of comparisons the gaps."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, here or on a cluster

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

from experiments.methods import DENSE, Arm  # noqa: E402
from experiments.tables import Comparison  # noqa: E402

_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}

Curve = tuple[list[int], list[float]]


def read_metrics(path: Path) -> dict[str, Curve]:
    """The columns of a metrics.csv.

    Returns:
      For each column of numbers its (steps, values), without the empty cells.
    """
    columns: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    continue  # an empty cell, or a column of words such as "phase"
                steps, values = columns.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(value)
    return columns


def plot_run(folder: Path) -> None:
    """Draws the learning curves, and for a sparse run its masks, into plots/."""
    output = folder / "plots"
    plot_runs({folder.name: [folder]}, output)
    if (folder / "layers.csv").exists():
        _plot_layers(folder / "layers.csv", output / "layers.png")


def plot_runs(methods: Mapping[str, Sequence[Path]], output: Path) -> None:
    """Draws runs together: for each method the mean of its runs, and their range.

    Writes learning_curves.png and, where a run has masks, flip_rate.png.

    Args:
      methods: Run folders by the name of their method.
      output: Folder for the figures; made where it does not exist.
    """
    curves = {
        method: [read_metrics(run / "metrics.csv") for run in runs]
        for method, runs in methods.items()
    }
    colors = {method: f"C{index}" for index, method in enumerate(methods)}
    with plt.rc_context(_STYLE):
        figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.6))
        _draw(loss, curves, "train_loss", colors)
        loss.set(title="Training loss", ylabel="cross-entropy (nats)", yscale="log")
        _draw(accuracy, curves, "test_top1", colors, marker=".")
        accuracy.set(title="Test accuracy", ylabel="top-1")
        # An early epoch near chance would squeeze the part that differs.
        lowest = _lowest(curves, "test_top1", skip=0.2)
        accuracy.set_ylim(bottom=math.floor(20 * lowest) / 20, top=1.005)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _save(figure, output / "learning_curves.png")

        masked = {
            method: [run for run in runs if "flip_rate" in run]
            for method, runs in curves.items()
        }
        masked = {method: runs for method, runs in masked.items() if runs}
        if masked:
            figure, (flips, kept) = plt.subplots(1, 2, figsize=(9, 3.6))
            _draw(flips, masked, "flip_rate", colors)
            flips.set(title="Mask changes", ylabel="flip rate (mask bits per step)")
            flips.set_ylim(bottom=0)
            flips.yaxis.set_major_formatter(PercentFormatter(1))
            _draw(kept, masked, "retained_magnitude", colors)
            kept.set(title="Magnitude under the masks", ylabel="share of all weights'")
            kept.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _save(figure, output / "flip_rate.png")


def _plot_layers(file: Path, path: Path) -> None:
    """Draws flip rate and retained magnitude of each layer over the run."""
    columns: dict[str, dict[str, Curve]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            layer = columns.setdefault(row["path"].removesuffix("/kernel"), {})
            for name in ("flip_rate", "retained_magnitude"):
                steps, values = layer.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(row[name]))
    if not columns:
        return
    colors = plt.get_cmap("viridis")
    with plt.rc_context(_STYLE):
        figure, (flips, kept) = plt.subplots(1, 2, figsize=(10, 4))
        for index, (layer, curves) in enumerate(columns.items()):
            color = colors(index / max(1, len(columns) - 1))
            flips.plot(*curves["flip_rate"], color=color, label=layer)
            kept.plot(*curves["retained_magnitude"], color=color, label=layer)
        flips.set(title="Mask changes", ylabel="flip rate (mask bits per step)")
        kept.set(title="Magnitude under the masks", ylabel="share of the layer's")
        for axes in (flips, kept):
            axes.set_xlabel("optimizer step")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if len(columns) <= 20:  # more names than lines that can be told apart
            kept.legend(fontsize="x-small")
        _save(figure, path)


def plot_comparison(found: Comparison, output: Path) -> None:
    """Draws accuracy.png, gaps.png and step_time.png of a comparison."""
    dense = Arm(DENSE, "")
    shown = _without_far(found)
    labels = [arm.label for arm in shown]
    height = 1.2 + 0.34 * len(shown)
    rows = range(len(shown))[::-1]  # the first on top
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8, height))
        for row, arm in zip(rows, shown, strict=True):
            values = found.top1(arm)
            axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.35)
            axes.plot(sum(values) / len(values), row, "|", color="k", markersize=16)
        axes.set(title="Accuracy of each network, and mean", xlabel="test top-1 (%)")
        axes.set_yticks(rows, labels)
        _save(figure, output / "accuracy.png")

        figure, axes = plt.subplots(figsize=(8, height))
        for row, arm in zip(rows, shown, strict=True):
            mean, _, half = (0, 0, 0) if arm == dense else found.gap(arm, dense)
            axes.errorbar(mean, row, xerr=half, fmt="o", color="C0", capsize=3)
        axes.axvline(0, color="k", linewidth=0.8)
        axes.set(
            title="Paired gap to dense, with its 95 % interval",
            xlabel="percentage points",
        )
        axes.set_yticks(rows, labels)
        _save(figure, output / "gaps.png")

        ratios = {a.label: r for a in found.arms if (r := found.step_ratio(a))}
        if ratios:
            figure, axes = plt.subplots(figsize=(8, 1.2 + 0.34 * len(ratios)))
            axes.boxplot(
                list(ratios.values())[::-1],
                orientation="horizontal",
                tick_labels=list(ratios)[::-1],
            )
            axes.set(title="Step time, dense = 1", xlabel="ratio within a unit")
            axes.set_xlim(left=0)
            _save(figure, output / "step_time.png")


def _without_far(found: Comparison) -> list[Arm]:
    """The arms within 15 points of dense: a farther one would hide all differences."""
    dense = Arm(DENSE, "")
    return [a for a in found.arms if a == dense or found.gap(a, dense)[0] > -15]


def _draw(
    axes: Axes,
    methods: Mapping[str, Sequence[Mapping[str, Curve]]],
    column: str,
    colors: Mapping[str, str],
    marker: str = "",
) -> None:
    """Draws one column against the step: mean of the runs of a method, and range."""
    for method, runs in methods.items():
        curves = [run[column] for run in runs if column in run]
        if not curves:
            continue
        # A run that was made with another --print-freq has other steps.
        steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
        values = [dict(zip(*curve, strict=True)) for curve in curves]
        at = [[run[step] for run in values] for step in steps]
        mean = [sum(row) / len(row) for row in at]
        color = colors[method]
        axes.plot(steps, mean, color=color, lw=1.3, marker=marker, label=method)
        if len(curves) > 1:
            low, high = [min(row) for row in at], [max(row) for row in at]
            axes.fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
    axes.set_xlabel("optimizer step")
    if len(colors) > 1:
        axes.legend(fontsize="x-small")


def _lowest(methods, column: str, skip: float) -> float:
    """The lowest value after the first `skip` of each run; 0 if there is none."""
    values = [
        value
        for runs in methods.values()
        for run in runs
        for value in run.get(column, ([], []))[1][
            math.ceil(skip * len(run.get(column, ([], []))[1])) :
        ]
    ]
    return min(values, default=0.0)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)

"""Figures of runs, as PNG files: learning curves, flip rate, paired accuracy."""

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
    """Draws the learning curves, and for a sparse run the flip rate, into plots/."""
    plot_runs({folder.name: [folder]}, folder / "plots")


def plot_runs(methods: Mapping[str, Sequence[Path]], output: Path) -> None:
    """Draws runs together: one colour for each method, one line for each run.

    Writes learning_curves.png and, where a run has sparse weights, flip_rate.png.

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

        sparse = {
            method: [run for run in runs if "flip_rate" in run]
            for method, runs in curves.items()
        }
        sparse = {method: runs for method, runs in sparse.items() if runs}
        if sparse:
            figure, axes = plt.subplots(figsize=(5.4, 3.6))
            _draw(axes, sparse, "flip_rate", colors)
            axes.set(title="Mask changes", ylabel="flip rate (mask bits per step)")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            _save(figure, output / "flip_rate.png")


def plot_pairs(
    methods: Mapping[str, Sequence[float]], seeds: Sequence[int], path: Path
) -> None:
    """Draws the accuracy of each method, joined by a line for each seed.

    Args:
      methods: Top-1 in percent by method, one value for each seed.
      seeds: The seeds, in the same order.
      path: The PNG file.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(1.6 + 1.7 * len(methods), 3.6))
        for index, seed in enumerate(seeds):
            values = [accuracies[index] for accuracies in methods.values()]
            axes.plot(range(len(methods)), values, marker="o", label=f"seed {seed}")
        axes.set_xticks(range(len(methods)), [m.replace(", ", "\n") for m in methods])
        axes.set_xlim(-0.3, len(methods) - 0.7)
        axes.set(title="Paired runs", ylabel="test top-1 (%)")
        # Room on both sides, lest one test image look like a cliff.
        every = [value for values in methods.values() for value in values]
        axes.set_ylim(min(every) - 0.5, max(every) + 0.5)
        axes.legend()
        _save(figure, path)


def _draw(
    axes: Axes,
    methods: Mapping[str, Sequence[Mapping[str, Curve]]],
    column: str,
    colors: Mapping[str, str],
    marker: str = "",
) -> None:
    """Draws one column of all runs against the step."""
    for method, runs in methods.items():
        for number, run in enumerate(runs):
            steps, values = run.get(column, ([], []))
            axes.plot(
                steps,
                values,
                color=colors[method],
                alpha=0.9 if len(runs) == 1 else 0.6,
                linewidth=1.3,
                marker=marker,
                label=method if number == 0 else None,
            )
    axes.set_xlabel("optimizer step")
    if len(colors) > 1:
        axes.legend()


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

"""The statistics of a comparison, as Markdown that is also aligned as plain text."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence

from scipy.special import stdtrit

from experiments.methods import DENSE, PAIRS, Arm
from experiments.records import Record

Units = Sequence[tuple[int, int]]  # (fold, seed): where methods are paired


class Comparison:
    """Records of the same units for each of several arms.

    Attributes:
      arms: Methods with their patterns, dense among them.
      units: The (fold, seed) of the networks of each arm.
    """

    def __init__(self, arms: Sequence[Arm], units: Units, records: Iterable[Record]):
        """Takes the records that belong to the arms and units.

        Raises:
          KeyError: One is missing.
        """
        self.arms, self.units = list(arms), list(units)
        found = {record.key: record for record in records}
        self._records = {
            arm: [found[arm.name, arm.pattern, *unit] for unit in units] for arm in arms
        }

    def __getitem__(self, arm: Arm) -> list[Record]:
        """The records of an arm, in the order of the units."""
        return self._records[arm]

    def top1(self, arm: Arm) -> list[float]:
        """Accuracies of an arm in percent, in the order of the units."""
        return [record.top1 for record in self[arm]]

    def gap(self, arm: Arm, reference: Arm) -> tuple[float, float, float]:
        """`paired_gap` of two arms."""
        return paired_gap(self.top1(arm), self.top1(reference))

    def mean(self, arm: Arm, field: str) -> float | None:
        """Mean of a field of the records; None where one has none."""
        values = [getattr(record, field) for record in self[arm]]
        return None if None in values else statistics.fmean(values)

    def step_ratio(self, arm: Arm) -> list[float]:
        """Step times over those of the dense network of the same unit."""
        return [
            own.step_seconds / reference.step_seconds
            for own, reference in zip(self[arm], self[Arm(DENSE, "")], strict=True)
            if own.step_seconds and reference.step_seconds
        ]


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of two values or more."""
    return statistics.fmean(values), statistics.stdev(values)


def paired_gap(
    values: Sequence[float], reference: Sequence[float]
) -> tuple[float, float, float]:
    """How far values are from those of the same units in a reference.

    Args:
      values: One value for each unit, two or more.
      reference: The same units in the same order.

    Returns:
      Mean and sample standard deviation of the differences, and half the width of the
      95 % confidence interval of the mean (Student's t, n - 1 degrees of freedom).
    """
    gaps = [a - b for a, b in zip(values, reference, strict=True)]
    mean, deviation = mean_deviation(gaps)
    quantile = float(stdtrit(len(gaps) - 1, 0.975))
    return mean, deviation, quantile * deviation / len(gaps) ** 0.5


def table(found: Comparison) -> str:
    """One row for each arm."""
    dense = Arm(DENSE, "")
    rows = [
        [
            "method",
            "top-1 (%)",
            "gap to dense, paired",
            "95 % interval",
            "flip rate (%)",
            "magnitude kept (%)",
            "step time",
            "N:M checked",
        ]
    ]
    for arm in found.arms:
        gap = interval = ""
        if arm != dense:
            mean, deviation, half = found.gap(arm, dense)
            gap, interval = _plus_minus(mean, deviation, "+"), _interval(mean, half)
        layers, ratios = found[arm][0].sparse_layers, found.step_ratio(arm)
        untimed = "" if arm.method.trains else "no training"
        rows.append(
            [
                arm.label,
                _plus_minus(*mean_deviation(found.top1(arm))),
                gap,
                interval,
                _percent(found.mean(arm, "flip_rate"), ".3f"),
                _percent(found.mean(arm, "retained_magnitude"), ".1f"),
                f"{statistics.median(ratios):.2f}" if ratios else untimed,
                f"yes, {layers} layers" if layers else "dense",
            ]
        )
    return _aligned(rows)


def pairs_table(found: Comparison) -> str:
    """The differences of `PAIRS` that can be told; "" without any."""
    rows = [["difference", "points, paired", "95 % interval"]]
    for arm in found.arms:
        for name, other_name in PAIRS:
            other = Arm(other_name, arm.pattern_of(other_name))
            if arm.name == name and other in found.arms:
                mean, deviation, half = found.gap(arm, other)
                rows.append(
                    [
                        f"{arm.label} minus {other.label}",
                        _plus_minus(mean, deviation, "+"),
                        _interval(mean, half),
                    ]
                )
    return _aligned(rows) if len(rows) > 1 else ""


def verdict(found: Comparison, num_test: int) -> str:
    """What the tables show and what they do not."""
    n, folds = len(found.units), len({fold for fold, _ in found.units})
    seeds = len({seed for _, seed in found.units})
    over = f"{seeds} seeds" if folds == 1 else f"{folds} folds × {seeds} seeds"
    gaps = {
        arm: found.gap(arm, Arm(DENSE, ""))
        for arm in found.arms
        if arm != Arm(DENSE, "")
    }
    # A deviation estimated from three or four values is itself too rough to rank by.
    apart = [
        arm.label
        for arm, (mean, _, half) in gaps.items()
        if n >= 5 and abs(mean) > half
    ]
    alike = [arm.label for arm in gaps if arm.label not in apart]
    text = f"""Mean ± standard deviation over {over}; each network is compared with the
        dense one of the same initial parameters and batches."""
    if apart:
        text += f" {over} tell apart from dense: {'; '.join(apart)}."
    if alike:
        text += f" {over} are too few to rank against dense: {'; '.join(alike)}."
    text += f""" Intervals are Student's t with {n - 1} degrees of freedom, and one test
        image is {100 / num_test:.2f} points."""
    if folds > 1:
        text += """ They take the pairs as independent; folds share training images, so
            that for other digits than these they are somewhat too narrow."""
    text += """ Flip rate: share of mask bits that one step changes, mean over the run.
        Step time is the median ratio to dense on this machine, where masked weights go
        through dense GEMMs: no speed-up is to be expected."""
    return textwrap.fill(" ".join(text.split()), 88, break_on_hyphens=False)


def report(found: Comparison, num_test: int) -> str:
    """Tables and verdict."""
    parts = (table(found), pairs_table(found), verdict(found, num_test))
    return "\n\n".join(part for part in parts if part)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def _plus_minus(mean: float, deviation: float, sign: str = "") -> str:
    return f"{mean:{sign}.2f} ± {deviation:.2f}"


def _interval(mean: float, half: float) -> str:
    return f"{mean - half:+.2f} to {mean + half:+.2f}"


def _percent(share: float | None, form: str) -> str:
    return "" if share is None else format(100 * share, form)

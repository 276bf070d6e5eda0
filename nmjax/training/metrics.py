"""What a run reports: metrics.csv, TensorBoard event files, a progress bar.

`metrics.csv` has one row for each logging interval. Train columns are means over the
steps of the interval, `sad` is a sum. The sums of an unfinished interval travel with
the checkpoint, so that a resumed run writes the rows of an uninterrupted one;
`images_per_second` alone depends on the machine.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOP5_FROM_CLASSES = 6  # below that, top-5 is always 1 and says nothing


def columns(num_classes: int, *, sparse: bool) -> tuple[str, ...]:
    """The columns of metrics.csv for a run.

    Args:
      num_classes: With fewer than six, the top-5 columns are absent.
      sparse: Whether any weight is ever sparse; if not, the mask columns are absent.
    """
    top5 = num_classes >= TOP5_FROM_CLASSES
    return (
        *("step", "epoch", "phase", "lr", "train_loss", "train_top1"),
        *(("train_top5",) if top5 else ()),
        *(("flip_rate", "sad") if sparse else ()),
        *("images_per_second", "test_loss", "test_top1"),
        *(("test_top5",) if top5 else ()),
    )


class Interval:
    """Sums over the steps since the last row, in float64.

    Attributes:
      sums: Name to sum; "steps" counts the steps. JSON-able: saved and restored with
        a checkpoint.
    """

    def __init__(self, sums: Mapping[str, float] | None = None):
        """Starts empty, or with the sums of a checkpoint."""
        self.sums = dict(sums or {})

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of one step."""
        for name, value in {"steps": 1, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def row(self, num_weights: int) -> dict[str, float]:
        """The train columns, and empties the interval.

        Args:
          num_weights: Number of weights under a mask; the flip rate is SAD per step
            and weight (arXiv:2404.01847, eq. 5). With none, both are left out.
        """
        sums, self.sums = self.sums, {}
        steps = sums.pop("steps")
        sad = sums.pop("sad")
        means = {f"train_{name}": total / steps for name, total in sums.items()}
        if not num_weights:
            return means
        return {**means, "sad": sad, "flip_rate": sad / (steps * num_weights)}


class MetricsWriter:
    """Writes rows to metrics.csv and to TensorBoard's event file.

    A row of metrics.csv is with the operating system when `write` returns; events are
    written in the background, at most ten seconds later.

    Attributes:
      file: Path of metrics.csv.
      last_step: Step of the last row, or 0.
    """

    def __init__(
        self, run_dir: Path, names: Sequence[str], *, step: int, primary: bool = True
    ):
        """Opens the files, without the rows later than `step`.

        Args:
          run_dir: The run folder.
          names: The columns.
          step: The step from which the run continues; 0 starts anew.
          primary: Whether this is the host that writes; others only read.

        Raises:
          ValueError: metrics.csv has other columns.
        """
        self.file = run_dir / "metrics.csv"
        rows = _read_rows(self.file, names) if step else []
        # A process that was killed may have left half a line, or rows of steps that
        # are about to run again.
        rows = [row for row in rows if int(row["step"]) <= step]
        self.last_step = int(rows[-1]["step"]) if rows else 0
        self._names, self._primary = tuple(names), primary
        if not primary:
            return
        from tensorboardX import SummaryWriter

        new = self.file.with_suffix(".csv.new")
        with new.open("w", newline="") as file:
            csv_writer = csv.DictWriter(file, names, lineterminator="\n")
            csv_writer.writeheader()
            csv_writer.writerows(rows)
        os.replace(new, self.file)
        self._file = self.file.open("a", newline="")
        self._csv = csv.DictWriter(self._file, names, lineterminator="\n")
        # TensorBoard hides what an earlier process wrote from the purged step on.
        self._events = SummaryWriter(
            str(run_dir), purge_step=step + 1 if step else None, flush_secs=10
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; what is None, or names no column, is left out."""
        row = {n: row[n] for n in self._names if row.get(n) is not None}
        self.last_step = row["step"]
        if not self._primary:
            return
        self._csv.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "epoch", "phase"):
                tag = name.replace("train_", "train/").replace("test_", "test/")
                self._events.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Closes both files."""
        if self._primary:
            self._file.close()
            self._events.close()


def _read_rows(file: Path, names: Sequence[str]) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    lines = file.read_text().splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n"))
    if reader.fieldnames and tuple(reader.fieldnames) != tuple(names):
        raise ValueError(
            f"{file} has columns {', '.join(reader.fieldnames)}; this run writes "
            f"{', '.join(names)}. Use another run folder"
        )
    return list(reader)


class Progress:
    """A bar with the rate and the time left, on standard error."""

    def __init__(self, *, total: int, step: int, shown: bool):
        """Starts at `step` of `total`; writes nothing where not `shown`."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not shown,
        )
        self._shown: dict[str, str] = {}

    def advance(self, **values: float) -> None:
        """One step further, with the newest values of what it names."""
        self._show(values)
        self._bar.update(1)

    def note(self, **values: float) -> None:
        """Changes the values shown."""
        self._show(values)
        self._bar.refresh()

    def _show(self, values: Mapping[str, float]) -> None:
        self._shown |= {name: f"{value:.3f}" for name, value in values.items()}
        self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

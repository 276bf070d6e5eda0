"""What a run reports: metrics.csv, layers.csv, TensorBoard files, a progress bar.

`metrics.csv` has one row for each logging interval. Train columns are means over the
steps of the interval, `sad` is a sum, density, retained magnitude and the gap to the
transposable optimum are those of the masks after its last step. `layers.csv` has the
same of every masked weight, once an epoch. The sums of an unfinished interval travel
with the checkpoint, so that a resumed run writes the rows of an uninterrupted one;
`images_per_second` alone depends on the machine.
"""

import contextlib
import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOP5_FROM_CLASSES = 6  # below that, top-5 is always 1 and says nothing

MASK_COLUMNS = ("flip_rate", "sad", "density", "retained_magnitude", "transposable_gap")
LAYER_COLUMNS = ("step", "epoch", "phase", "path", *MASK_COLUMNS)


def columns(num_classes: int, *, sparse: bool) -> tuple[str, ...]:
    """The columns of metrics.csv for a run.

    Args:
      num_classes: With fewer than six, the top-5 columns are absent.
      sparse: Whether any weight is ever masked; if not, the mask columns are absent.
    """
    top5 = num_classes >= TOP5_FROM_CLASSES
    return (
        *("step", "epoch", "phase", "lr", "train_loss", "train_top1"),
        *(("train_top5",) if top5 else ()),
        *(MASK_COLUMNS if sparse else ()),
        *("images_per_second", "test_loss", "test_top1"),
        *(("test_top5",) if top5 else ()),
    )


class Interval:
    """Sums over the steps since the last row, in float64.

    Attributes:
      sums: Name to sum; "steps" counts the steps. Sums for the rows of layers.csv,
        which come more rarely, have names that begin with "layers/". JSON-able: saved
        and restored with a checkpoint.
    """

    def __init__(self, sums: Mapping[str, float] | None = None):
        """Starts empty, or with the sums of a checkpoint."""
        self.sums = dict(sums or {})

    def add(self, metrics: Mapping[str, float], sad: Mapping[str, float]) -> None:
        """Adds one step.

        Args:
          metrics: Its metrics; "sad" is the number of mask bits that it changed.
          sad: The same by path.
        """
        added = {"steps": 1, **metrics, "layers/steps": 1}
        added |= {f"layers/{path}": count for path, count in sad.items()}
        for name, value in added.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def row(self, num_weights: int) -> dict[str, float]:
        """The train columns since the last row; their sums begin anew.

        Args:
          num_weights: Number of weights under a mask; the flip rate is SAD per step
            and weight (arXiv:2404.01847, eq. 5). With none, both are left out.
        """
        sums = {n: x for n, x in self.sums.items() if not n.startswith("layers/")}
        self.sums = {n: x for n, x in self.sums.items() if n not in sums}
        if not sums:  # no step since
            return {}
        steps, sad = sums.pop("steps"), sums.pop("sad")
        means = {f"train_{name}": total / steps for name, total in sums.items()}
        if not num_weights:
            return means
        return {**means, "sad": sad, "flip_rate": sad / (steps * num_weights)}

    def layers(self, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """SAD and flip rate by path since the last call; their sums begin anew.

        Args:
          sizes: Number of weights under each mask, by path.
        """
        sums = {n: x for n, x in self.sums.items() if n.startswith("layers/")}
        self.sums = {n: x for n, x in self.sums.items() if n not in sums}
        steps = sums.get("layers/steps", 0)
        found = {}
        for path, size in sizes.items():
            sad = sums.get(f"layers/{path}", 0.0)
            found[path] = {"sad": sad, "flip_rate": sad / max(1, steps * size)}
        return found


class MetricsWriter:
    """Writes rows to metrics.csv, layers.csv and TensorBoard's event file.

    A row of a table is with the operating system when `write` returns, its events ten
    seconds later at most.

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
          names: The columns of metrics.csv; with mask columns there is a layers.csv.
          step: The step from which the run continues; 0 starts anew.
          primary: Whether this is the host that writes; others only read.

        Raises:
          ValueError: A file has other columns.
        """
        self.file = run_dir / "metrics.csv"
        masked = set(MASK_COLUMNS) <= set(names)
        self._rows = _Table(self.file, names, step, primary)
        self._layers = (
            _Table(run_dir / "layers.csv", LAYER_COLUMNS, step, primary)
            if masked
            else None
        )
        self.last_step = self._rows.last_step
        self._events = _EventFile(run_dir, step=step) if primary else None

    def write(
        self,
        row: Mapping[str, Any],
        layers: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Writes one row; what is None, or names no column, is left out.

        Args:
          row: Values by column.
          layers: Values of mask columns by path, for layers.csv and TensorBoard, where
            their tag is COLUMN/PATH.

        Raises:
          OSError: It cannot be written, for example on a full disk.
        """
        self.last_step = row["step"]
        if self._events is None:
            return
        values = self._rows.kept(row)
        events = {
            n: x for n, x in values.items() if n not in ("step", "epoch", "phase")
        }
        try:
            self._rows.write([values])
            if self._layers is not None and layers:
                where = {name: row.get(name) for name in ("step", "epoch", "phase")}
                rows = [{**where, "path": path, **own} for path, own in layers.items()]
                self._layers.write([self._layers.kept(row) for row in rows])
                for path, own in layers.items():
                    events |= {f"{name}/{path}": x for name, x in own.items()}
            self._events.write(row["step"], events)
        except OSError as error:
            raise OSError(
                error.errno,
                f"a row of metrics could not be written ({error.strerror}); make room "
                "on the disk and run the same command again: it continues from the "
                "last checkpoint",
                str(self.file),
            ) from error

    def close(self) -> None:
        """Closes the files."""
        for part in (self._rows, self._layers, self._events):
            if part is not None:
                # What a full disk did not take was reported by `write`.
                with contextlib.suppress(OSError):
                    part.close()


class _Table:
    """A CSV file of rows by step, which a resumed run continues."""

    def __init__(self, file: Path, names: Sequence[str], step: int, primary: bool):
        """Opens the file without the rows later than `step`."""
        rows = _read_rows(file, names) if step else []
        # A process that was killed may have left half a line, or rows of steps that
        # are about to run again.
        rows = [row for row in rows if int(row["step"]) <= step]
        self.last_step = int(rows[-1]["step"]) if rows else 0
        self._names = tuple(names)
        self._file = None
        if not primary:
            return
        new = file.with_suffix(".csv.new")
        with new.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(new, file)
        self._file = file.open("a", newline="")
        self._csv = csv.DictWriter(self._file, names, lineterminator="\n")

    def kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of a row has a column, in their order."""
        return {name: row[name] for name in self._names if row.get(name) is not None}

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows and hands them to the operating system."""
        if self._file is not None:
            self._csv.writerows(rows)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class _EventFile:
    """TensorBoard's event file, written in the caller's thread.

    tensorboardX's SummaryWriter has a thread of its own; when it dies of a full disk,
    the next caller waits for it without end.
    """

    def __init__(self, run_dir: Path, *, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event: Any = event_pb2  # classes made at run time, unknown to pyright
        self._summary: Any = summary_pb2
        # Two files of one second must not have the same name.
        suffix = f".{os.getpid()}-{step}"
        self._writer = EventsWriter(str(run_dir / "events"), suffix)
        self._flushed = -math.inf
        if step:
            # TensorBoard hides what earlier files hold from this step on.
            log = self._event.SessionLog
            self._write(step + 1, session_log=log(status=log.SessionStatus.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one scalar for each value."""
        tags = (n.replace("train_", "train/").replace("test_", "test/") for n in values)
        scalars = [
            self._summary.Summary.Value(tag=tag, simple_value=value)
            for tag, value in zip(tags, values.values(), strict=True)
        ]
        self._write(step, summary=self._summary.Summary(value=scalars))

    def _write(self, step: int, **content: Any) -> None:
        now = time.time()
        self._writer.write_event(self._event.Event(step=step, wall_time=now, **content))
        if now - self._flushed > 10:
            self._writer.flush()
            self._flushed = now

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


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

"""What a comparison has found so far, in its table.json: nothing is lost by a kill."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.methods import METHODS, TRAINING, CompareOptions, Method
from experiments.presets import Options
from nmjax.training.run_folder import write_whole

# What may differ when a comparison is continued or extended.
_FREE = ("output_dir", "data_path", "recipes", "patterns", "seeds")


@dataclasses.dataclass(frozen=True)
class Record:
    """One network of a comparison.

    Attributes:
      method: Name of the method.
      pattern: N:M, or "" for a method without.
      fold: Which part of the data was the test set; 0 without folds.
      seed: Of the initial parameters and the data order.
      top1: Test accuracy after the last step, in percent.
      sparse_layers: Layers found to be N:M; 0 for a dense network.
      step_seconds: Median seconds per optimizer step; None where none was made, the
        run was continued after its last one, or other networks had another machine.
      flip_rate: Share of mask bits that one step changed, the mean over the run; None
        where no mask was trained.
      retained_magnitude: Share of the weights' magnitude under the final masks; None
        without masks.
    """

    method: str
    pattern: str
    fold: int
    seed: int
    top1: float
    sparse_layers: int
    step_seconds: float | None
    flip_rate: float | None
    retained_magnitude: float | None

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What no two networks have in common."""
        return self.method, self.pattern, self.fold, self.seed


class Records:
    """The records of a comparison, by key; each is on disk when `add` returns."""

    def __init__(self, folder: Path, options: CompareOptions):
        """Reads what the folder already holds.

        Raises:
          ValueError: It is damaged, or of other options or another training.
        """
        self._file = folder / "table.json"
        self._head: dict[str, Any] = {
            "options": {
                name: value
                for name, value in dataclasses.asdict(options).items()
                if name not in _FREE
            },
            "training": _training(options),
            "methods": {name: _facts(method) for name, method in METHODS.items()},
        }
        self._found: dict[tuple, Record] = {}
        if self._file.exists():
            self._read()

    def _read(self) -> None:
        try:
            saved = json.loads(self._file.read_text())
            records = [Record(**fields) for fields in saved["runs"]]
            methods = saved["methods"]
            same = {name: saved[name] for name in ("options", "training")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file} is damaged ({error}): delete it, and the runs beside it "
                "are read again"
            ) from None
        for name, value in same.items():
            if value != self._head[name]:
                raise ValueError(
                    f"{self._file.parent} holds a comparison with other {name}, "
                    f"{value}: choose another --output-dir"
                )
        for name in sorted({record.method for record in records}):
            if methods[name] != self._head["methods"].get(name):
                raise ValueError(
                    f"{self._file.parent} holds runs of {name} as it was before, "
                    f"{methods[name]}: choose another --output-dir"
                )
        self._found = {record.key: record for record in records}

    def get(self, key: tuple[str, str, int, int]) -> Record | None:
        """The record of a network, if it is there."""
        return self._found.get(key)

    def all(self) -> list[Record]:
        """Every record."""
        return list(self._found.values())

    def add(self, record: Record) -> None:
        """Adds a record; a kill leaves the old file or the new one."""
        self._found[record.key] = record
        runs = [dataclasses.asdict(record) for record in self._found.values()]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps({**self._head, "runs": runs}, indent=1))


def _training(options: CompareOptions) -> dict[str, Any]:
    """What all networks' training has that is not the default, as JSON."""
    return _changed(TRAINING[options.dataset].flat(), Options().flat())


def _facts(method: Method) -> dict[str, Any]:
    """What a method's networks depend on, where it is not the default, as JSON."""
    plain = dataclasses.asdict(Method(method.label, method.recipe))
    return _changed(dataclasses.asdict(method), {**plain, "recipe": None})


def _changed(values: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The values that differ from the plain ones, as JSON reads them back."""
    changed = {name: value for name, value in values.items() if value != plain[name]}
    return json.loads(json.dumps(changed))

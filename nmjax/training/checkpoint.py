"""Checkpoints: written by Orbax, verified when read, readable without nmjax.

    RUN/checkpoints/STEP/{params, batch_stats, nm, masks, opt_state, data, meta}
    RUN/best/STEP/{params, batch_stats, nm, masks, meta}

An item whose tree is empty (`nm` of SR-STE, `batch_stats` of a network without
batch norm) is absent. `masks` are those that evaluation at this step uses, `data`
is the position of the data iterator, `meta` is JSON: step, phase, plan, config,
test metrics, and of every array shape, dtype and CRC-32, because a flipped bit in a
chunk of an array goes unnoticed below. Arrays are stored without a device
layout, so that they open on any number of devices, and with plain Orbax:

    import orbax.checkpoint as ocp
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore("/absolute/RUN/checkpoints/STEP/params")
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nmjax.paths import named_leaves
from nmjax.planning import Plan
from nmjax.training.config import TrainConfig

FORMAT = 1
EVALUATION_ITEMS = ("params", "batch_stats", "nm", "masks")


class CheckpointError(ValueError):
    """No checkpoint, one of another model, or one that could not be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is truncated, incomplete or altered."""


class CheckpointWriter:
    """Writes checkpoints in the background; one at a time, oldest dropped last.

    A step appears under its number only when it is complete: a process that dies
    while writing leaves the earlier ones as they are.
    """

    def __init__(self, run_dir: Path, *, keep: int):
        """Opens `checkpoints/` (the latest `keep` steps) and `best/` (one step)."""
        self._latest = _manager(run_dir / "checkpoints", keep)
        self._best = _manager(run_dir / "best", 1)

    def wait(self) -> None:
        """Waits until the steps begun are complete.

        Raises:
          CheckpointError: Writing one failed.
        """
        for manager in (self._latest, self._best):
            self._wait(manager)

    def save(self, items: Mapping[str, Any], data: Any, meta: Mapping[str, Any]):
        """Starts to write a step; its arrays may be donated when this returns.

        Args:
          items: Name to tree of NumPy arrays, the optimizer's state included.
          data: JSON-able position of the data iterator, one for each host.
          meta: JSON-able; must hold "step". The descriptions of the arrays are
            added.

        Raises:
          CheckpointError: This or the previous checkpoint cannot be written.
        """
        meta = {**meta, "data_crc32": _json_crc32(data)}
        self._save(self._latest, items, meta, {"data": ocp.args.JsonSave(data)})

    def save_best(self, items: Mapping[str, Any], meta: Mapping[str, Any]):
        """Starts to write the best step so far, without what only training needs."""
        # A run that went back to an earlier checkpoint may find its best at a step
        # before that of the best so far.
        for step in self._best.all_steps():
            if step >= meta["step"]:
                self._best.delete(step)
        items = {name: items[name] for name in EVALUATION_ITEMS if name in items}
        self._save(self._best, items, meta, {})

    def close(self):
        """Waits for the steps begun, and ends the threads.

        Raises:
          CheckpointError: Writing one failed.
        """
        self.wait()
        for manager in (self._latest, self._best):
            manager.close()

    def _save(self, manager, items, meta, more):
        trees = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        arrays = {name: describe(tree) for name, tree in trees.items()}
        meta = {"format": FORMAT, **meta, "arrays": arrays}
        meta["crc32"] = _json_crc32(meta)
        args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**args, **more, meta=ocp.args.JsonSave(meta))
        self._wait(manager)
        try:
            manager.save(meta["step"], args=args, force=True)
        except Exception as error:  # Orbax raises whatever the file system gave
            raise _write_error(manager, error) from error

    def _wait(self, manager):
        try:
            manager.wait_until_finished()
        except Exception as error:
            raise _write_error(manager, error) from error


def _manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,  # of processes that died while writing
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _write_error(manager: ocp.CheckpointManager, error: Exception) -> CheckpointError:
    steps = list_steps(Path(manager.directory))
    last = f"the last complete one is step {steps[-1]}" if steps else "there is none"
    return CheckpointError(
        f"a checkpoint could not be written in {manager.directory} ({last}): "
        f"{_first_line(error)}. Make room on the disk or repair the folder, and run "
        "the same command again: it continues from there"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and CRC-32 of every array, by slash-joined path."""
    return {
        path: {
            "shape": list(np.shape(leaf)),
            "dtype": str(np.asarray(leaf).dtype),
            "crc32": zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data),
        }
        for path, leaf in named_leaves(tree).items()
    }


def _json_crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def list_steps(folder: Path) -> list[int]:
    """The complete steps in a folder of checkpoints, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def read_meta(step_dir: Path) -> dict[str, Any]:
    """The JSON description of one checkpoint.

    Raises:
      DamagedCheckpointError: It is missing, unreadable or altered.
      CheckpointError: Another version of nmjax wrote it.
    """
    meta = _read(step_dir, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.pop("crc32", None) != _json_crc32(meta):
        raise DamagedCheckpointError(f"{step_dir / 'meta'} has been altered")
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{step_dir} has format {meta['format']}, this version reads {FORMAT}"
        )
    return meta


def read_item(
    step_dir: Path, name: str, meta: Mapping[str, Any], target: Any = None
) -> Any:
    """One item of a checkpoint, every array verified.

    Args:
      step_dir: Folder of the step.
      name: The item.
      meta: From `read_meta`.
      target: Tree of the wanted structure with shapes and dtypes; None = plain
        nested dictionaries.

    Returns:
      A tree of NumPy arrays; `{}` or the empty target where the item is absent.

    Raises:
      CheckpointError: The item's arrays are not those of the target: the first that
        differ are named.
      DamagedCheckpointError: It cannot be read, or an array has been altered.
    """
    stored = meta["arrays"].get(name, {})
    if target is not None:
        _refuse_foreign(step_dir, name, stored, target)
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), target)
    if not stored:
        return {} if target is None else target
    args = ocp.args.StandardRestore(target)
    tree = _read(step_dir, name, ocp.StandardCheckpointHandler(), args)
    found = describe(tree)
    for path in [*stored, *(path for path in found if path not in stored)]:
        if found.get(path) != stored.get(path):
            raise DamagedCheckpointError(
                f"{step_dir / name} is damaged: array {path} is not the one that was "
                "written"
            )
    return tree


def read_data_state(step_dir: Path, meta: Mapping[str, Any]) -> Any:
    """The position of the data iterator, one for each host.

    Raises:
      DamagedCheckpointError: It cannot be read or has been altered.
    """
    data = _read(step_dir, "data", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    if _json_crc32(data) != meta["data_crc32"]:
        raise DamagedCheckpointError(f"{step_dir / 'data'} has been altered")
    return data


def _read(step_dir: Path, name: str, handler: Any, args: Any) -> Any:
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore((step_dir / name).absolute(), args=args)
    except Exception as error:  # Orbax and what lies below raise a dozen types
        raise DamagedCheckpointError(
            f"{step_dir / name} is damaged: {_first_line(error)}"
        ) from error


def _refuse_foreign(step_dir, name, stored, target):
    wanted = {
        path: (list(leaf.shape), str(leaf.dtype))
        for path, leaf in named_leaves(target).items()
    }
    found = {path: (entry["shape"], entry["dtype"]) for path, entry in stored.items()}
    differ = [
        f"{path}: {found.get(path, 'absent')} in the checkpoint, "
        f"{wanted.get(path, 'absent')} in this model"
        for path in [*wanted, *(path for path in found if path not in wanted)]
        if found.get(path) != wanted.get(path)
    ]
    if differ:
        raise CheckpointError(
            f"{step_dir} is of another model or optimizer; {len(differ)} arrays of "
            f"{name!r} differ, the first are\n  " + "\n  ".join(differ[:5])
        )


def set_aside(run_dir: Path, kind: str, step: int) -> Path:
    """Moves a checkpoint that must not be continued out of the way.

    Args:
      run_dir: The run folder.
      kind: "checkpoints" or "best".
      step: The step.

    Returns:
      Its new place, below `RUN/set_aside`.
    """
    folder = run_dir / "set_aside"
    folder.mkdir(exist_ok=True)
    number, place = 0, folder / f"{kind}-{step}"
    while place.exists():
        number += 1
        place = folder / f"{kind}-{step}.{number}"
    shutil.move(run_dir / kind / str(step), place)
    return place


def find_step(path: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint.

    Args:
      path: A run folder, its `checkpoints` or `best`, or the folder of a step.
      step: The step; None = the latest.

    Raises:
      CheckpointError: There is none.
    """
    path = Path(path)
    if (path / "meta").is_dir():
        if step not in (None, int(path.name) if path.name.isdigit() else None):
            raise CheckpointError(f"{path} is one checkpoint, and not of step {step}")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = list_steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"there are {steps}" if steps else "a run folder holds checkpoints/STEP"
        raise CheckpointError(f"no {wanted} in {folder}; {there}")
    return folder / str(steps[-1] if step is None else step)


def verify(step_dir: Path) -> dict[str, Any]:
    """Reads every array of a checkpoint and returns its description.

    Raises:
      DamagedCheckpointError: Something is missing, unreadable or altered.
    """
    meta = read_meta(step_dir)
    for name in meta["arrays"]:
        read_item(step_dir, name, meta)
    if "data_crc32" in meta:
        read_data_state(step_dir, meta)
    return meta


def newest_intact(folder: Path, below: int) -> int | None:
    """The latest step under `below` that can be read in full, or None."""
    for step in reversed([step for step in list_steps(folder) if step < below]):
        try:
            verify(folder / str(step))
        except CheckpointError:
            continue
        return step
    return None


def restore(path: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads a trained network; no model code and no device is needed.

    Args:
      path: A run folder (its latest checkpoint), `RUN/best`, `RUN/checkpoints` or
        `RUN/checkpoints/STEP`.
      step: The step; None = the latest.

    Returns:
      `params`, `batch_stats`, `nm`, `masks`: nested dictionaries of NumPy arrays;
      `plan` (Plan), `step`, `config` (TrainConfig), `phase` ("dense", "sparse" or
      "frozen"), `test` (metrics at this step, or None).

    Raises:
      CheckpointError: There is no such checkpoint, or another version wrote it.
      DamagedCheckpointError: It is damaged; the message names the latest intact one.
    """
    step_dir = find_step(path, step)
    try:
        meta = read_meta(step_dir)
        items = {name: read_item(step_dir, name, meta) for name in EVALUATION_ITEMS}
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}. {way_out(step_dir)}") from error
    return {
        **items,
        "plan": plan_of(meta),
        "step": meta["step"],
        "config": TrainConfig.from_dict(meta["config"]),
        "phase": meta["phase"],
        "test": meta["test"],
    }


def way_out(step_dir: Path) -> str:
    """What to do about a damaged checkpoint, as a sentence."""
    step = int(step_dir.name) if step_dir.name.isdigit() else 0
    intact = newest_intact(step_dir.parent, below=step)
    if intact is None:
        return f"No earlier checkpoint in {step_dir.parent} is intact"
    return f"Step {intact} is intact: give it as the step to restore or resume"


def load_plan(path: str | Path) -> Plan:
    """The plan of a run folder or of a checkpoint, without reading an array.

    Args:
      path: A run folder, `RUN/best`, `RUN/checkpoints`, or the folder of a step.

    Raises:
      CheckpointError: There is no plan.
      ValueError: The plan is not one of this version of nmjax.
    """
    file = Path(path) / "plan.json"
    if file.is_file():
        return Plan.from_json(file.read_text())
    return plan_of(read_meta(find_step(path)))


def plan_of(meta: Mapping[str, Any]) -> Plan:
    """The plan in the description of a checkpoint."""
    return Plan.from_json(json.dumps(meta["plan"]))

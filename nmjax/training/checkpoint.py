"""Checkpoints: written by Orbax, verified when read, readable without nmjax.

    RUN/checkpoints/STEP/{params, batch_stats, nm, masks, nm_logits,
                          opt_state, logits_opt_state, data, meta}
    RUN/best/STEP/{params, batch_stats, nm, masks, nm_logits, meta}

An item whose tree is empty (`nm` of SR-STE, `batch_stats` of a network without batch
norm, the logits where no mask is learned) is absent. `masks` are those that evaluation
at this step uses, `data` is the position of the data iterator, `meta` is JSON: step,
phase, plan, config, test metrics, and of every array shape, dtype and CRC-32, because
a flipped bit in a chunk of an array goes unnoticed below. Arrays are stored without a
device layout, so that they open on any number of devices, and with plain Orbax:

    import orbax.checkpoint as ocp
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore("/absolute/RUN/checkpoints/STEP/params")
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nmjax.paths import named_leaves

FORMAT = 1
EVALUATION_ITEMS = ("params", "batch_stats", "nm", "masks", "nm_logits")


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
        data = json.loads(json.dumps(data))
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
        # Written in the background: what the caller changes meanwhile is not meant.
        meta = json.loads(json.dumps(meta))
        args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**args, **more, meta=ocp.args.JsonSave(meta))
        if jax.process_count() > 1:
            self.wait()  # hosts may enter Orbax's barriers of one save at a time
        else:
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
        # Hosts wait for each other by name; two managers write at the same time.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=folder.name
        ),
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
    """The error without the specification that TensorStore appends to its own."""
    line = (str(error).splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {line}"


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

"""The folder of a run: made and probed before any work, continued only by its like."""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from nmjax.plans import Plan
from nmjax.schedule import Schedule
from nmjax.training.checkpoint import CheckpointError
from nmjax.training.config import TrainConfig

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger("nmjax")

# These say how long and how often, not what is computed in a step already done.
MAY_CHANGE = ("epochs", "keep", "checkpoint_every", "log_every")
PACKAGES = ("nmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def probe(run_dir: Path, needed: int) -> None:
    """Makes the folder and writes to it, so that no hour of training is lost.

    Args:
      run_dir: The run folder.
      needed: Bytes of one checkpoint.

    Raises:
      ValueError: It cannot be made or written to, or lacks room for one checkpoint.
    """
    file = run_dir / f".probe-{jax.process_index()}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
        file.unlink()
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise ValueError(
            f"cannot write to the run folder {run_dir}: {error.strerror or error} "
            f"({error.filename}); give another folder"
        ) from error
    if free < needed:
        raise ValueError(
            f"the disk of {run_dir} has {free / 2**20:.0f} MiB free, and a checkpoint "
            f"of this network takes {needed / 2**20:.0f} MiB; make room or give "
            "another folder"
        )


def take_lock(file: Any) -> bool:
    """Takes the lock of an open file or folder; whether no other process holds it.

    It is let go when the file is closed. Nobody holds one where there are no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.info("there are no locks here: %s", error.strerror)
    return True


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder; ends with this one, however it ends.

    Raises:
      CheckpointError: Another process trains there.
    """
    if jax.process_index() != 0:
        yield
        return
    with (run_dir / "lock").open("a") as file:
        if not take_lock(file):
            raise CheckpointError(
                f"another process trains in {run_dir} (lslocks shows which): wait "
                "until it has ended, or give another folder"
            )
        yield


def refuse_other_config(run_dir: Path, config: TrainConfig) -> None:
    """Refuses to continue a run with hyperparameters that it was not begun with.

    Raises:
      CheckpointError: They differ; every field is named with both values.
    """
    file = run_dir / "config.json"
    if not file.is_file():
        return
    try:
        old = TrainConfig.from_dict(json.loads(file.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{file} is not a config of nmjax: {error}") from error
    differ = [
        f"{field.name}: {getattr(old, field.name)!r} before, "
        f"{getattr(config, field.name)!r} now"
        for field in dataclasses.fields(config)
        if field.name not in MAY_CHANGE
        and getattr(old, field.name) != getattr(config, field.name)
    ]
    if differ:
        raise CheckpointError(
            f"{run_dir} holds a run with other settings:\n  "
            + "\n  ".join(differ)
            + f"\nGive those, or another folder; {', '.join(MAY_CHANGE)} may change"
        )


def refuse_other_plan(where: Path, old: Plan, new: Plan) -> None:
    """Refuses to continue a run of another model, or with other rules.

    Raises:
      CheckpointError: The plans differ; the first paths that do are named.
    """
    before = {entry.path: _without_schedule(entry) for entry in old}
    now = {entry.path: _without_schedule(entry) for entry in new}
    paths = [*now, *(path for path in before if path not in now)]
    differ = [path for path in paths if before.get(path) != now.get(path)]
    if differ:
        lines = [
            f"{p}: {_say(before.get(p))} before, {_say(now.get(p))} now" for p in differ
        ]
        raise CheckpointError(
            f"{where} is of another model or was made with other rules; {len(differ)} "
            "parameters differ, the first are\n  " + "\n  ".join(lines[:5])
        )


def _without_schedule(entry: Any) -> Any:
    """The entry at any length of the run: a schedule's fractions change with it."""
    if entry.recipe is None:
        return entry
    recipe = dataclasses.replace(entry.recipe, schedule=Schedule())
    return dataclasses.replace(entry, recipe=recipe)


def _say(entry: Any) -> str:
    if entry is None:
        return "absent"
    recipe = entry.recipe
    if recipe is None:
        return f"{entry.layer} {entry.shape} dense"
    decay = f" decay {recipe.decay}" if recipe.decay else ""
    return f"{entry.layer} {entry.shape} {recipe.name} {recipe.pattern}{decay}"


def write_descriptions(
    run_dir: Path, config: TrainConfig, plan: Plan, options: str | None
) -> None:
    """Writes config.json, plan.json, versions.json and, if any, options.json.

    From the first host; `options` is JSON.
    """
    if jax.process_index() != 0:
        return
    if options is not None:
        write_whole(run_dir / "options.json", options)
    write_whole(run_dir / "config.json", json.dumps(config.to_dict(), indent=1))
    write_whole(run_dir / "plan.json", plan.to_json())
    write_whole(run_dir / "versions.json", json.dumps(versions(), indent=1))


def write_whole(file: Path, text: str) -> None:
    """Writes a text file; a full disk, or a death meanwhile, leaves the old one."""
    new = file.with_name(file.name + ".new")
    new.write_text(text + "\n")
    os.replace(new, file)


def versions() -> dict[str, Any]:
    """What a run runs on: versions, devices, date, the commit if there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        **found,
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that nmjax runs from; None for an installed one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Finding, verifying and restoring checkpoints; the folders of one run."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nmjax.plans import Plan
from nmjax.training.checkpoint import (
    EVALUATION_ITEMS,
    CheckpointError,
    DamagedCheckpointError,
    list_steps,
    read_data_state,
    read_item,
    read_meta,
)
from nmjax.training.config import TrainConfig

logger = logging.getLogger("nmjax")


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


def plan_of(meta: Mapping[str, Any]) -> Plan:
    """The plan in the description of a checkpoint."""
    return Plan.from_json(json.dumps(meta["plan"]))


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


def way_out(step_dir: Path) -> str:
    """What to do about a damaged checkpoint, as a sentence."""
    step = int(step_dir.name) if step_dir.name.isdigit() else 0
    intact = newest_intact(step_dir.parent, below=step)
    if intact is None:
        return f"No earlier checkpoint in {step_dir.parent} is intact"
    return f"Step {intact} is intact: give it as the step to restore or resume"


def restore(path: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads a trained network; no model code and no device is needed.

    Args:
      path: A run folder (its latest checkpoint), `RUN/best`, `RUN/checkpoints` or
        `RUN/checkpoints/STEP`.
      step: The step; None = the latest.

    Returns:
      `params`, `batch_stats`, `nm`, `masks`, `nm_logits` (of learned masks): nested
      dictionaries of NumPy arrays;
      `plan` (Plan), `step`, `config` (TrainConfig), `phase` ("dense", "sparse",
      "frozen" or "finish"), `test` (metrics at this step, or None).

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


def set_aside(run_dir: Path, kind: str, step: int) -> None:
    """Moves a checkpoint that must not be continued below `RUN/set_aside`.

    Args:
      run_dir: The run folder.
      kind: "checkpoints" or "best".
      step: The step.
    """
    if jax.process_index() != 0:
        return
    folder = run_dir / "set_aside"
    folder.mkdir(exist_ok=True)
    number, place = 0, folder / f"{kind}-{step}"
    while place.exists():
        number += 1
        place = folder / f"{kind}-{step}.{number}"
    shutil.move(run_dir / kind / str(step), place)
    logger.warning("%s moved to %s", run_dir / kind / str(step), place)

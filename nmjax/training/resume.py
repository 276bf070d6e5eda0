"""From where a run continues, and what a checkpoint of it holds."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
from nmjax.training.restoring import plan_of, set_aside, way_out
from nmjax.training.run_folder import refuse_other_plan
from nmjax.training.state import TrainState

logger = logging.getLogger("nmjax")

ITEMS = (*EVALUATION_ITEMS, "opt_state", "logits_opt_state")


@dataclasses.dataclass(frozen=True)
class Position:
    """A point of a run, as a checkpoint holds it.

    Attributes:
      state: The state, in NumPy arrays.
      phase: Name of the phase that the state is of.
      data: Position of each host's data iterator.
      interval: Sums of the metrics since the last row.
    """

    state: TrainState
    phase: str
    data: Sequence[Any]
    interval: Mapping[str, float]


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint, fetched from the devices."""
    return {name: jax.device_get(getattr(state, name)) for name in ITEMS}


def find_position(
    run_dir: Path,
    resume: bool | int,
    abstract: Mapping[str, TrainState],
    plans: Mapping[str, Plan],
) -> Position | None:
    """Reads the checkpoint from which to continue; later ones are set aside.

    Args:
      run_dir: The run folder.
      resume: As for `train`.
      abstract: By phase, shapes and dtypes of the state.
      plans: By phase, the plan.

    Returns:
      The position, or None: nothing to continue.

    Raises:
      CheckpointError: The checkpoints are of another model, none is intact, or the
        one asked for is missing or damaged, or `resume` is False and there are some.
    """
    folder = run_dir / "checkpoints"
    steps = list_steps(folder)
    if resume is False and steps:
        raise CheckpointError(
            f"{run_dir} holds checkpoints up to step {steps[-1]}; continue from there "
            "(resume) or give another folder"
        )
    if resume is not True and resume is not False and resume not in steps:
        raise CheckpointError(f"no checkpoint of step {resume} in {folder}: {steps}")
    if not steps:
        return None
    asked = [resume] if resume is not True else list(reversed(steps))
    for step in asked:
        try:
            position = _read(folder / str(step), abstract, plans)
        except DamagedCheckpointError as error:
            if resume is not True:
                message = f"{error}. {way_out(folder / str(step))}"
                raise DamagedCheckpointError(message) from error
            logger.warning("%s; trying the one before", error)
            continue
        wait_for_hosts()  # all have read what is moved now
        for kind in ("checkpoints", "best"):
            for later in list_steps(run_dir / kind):
                if later > step:
                    set_aside(run_dir, kind, later)
        logger.info("continuing from %s", folder / str(step))
        return position
    raise CheckpointError(
        f"none of the checkpoints in {folder} is intact (steps {steps}); to begin "
        "anew, give another folder or remove this one"
    )


def _read(step_dir: Path, abstract, plans) -> Position:
    meta = read_meta(step_dir)
    phase = meta["phase"]
    if phase not in abstract:
        raise CheckpointError(
            f"{step_dir} is of a phase {phase!r}, this run has {', '.join(abstract)}: "
            "it was made with other rules"
        )
    refuse_other_plan(step_dir, plan_of(meta), plans[phase])
    items = {
        name: read_item(step_dir, name, meta, getattr(abstract[phase], name))
        for name in ITEMS
    }
    data = read_data_state(step_dir, meta)
    if len(data) != jax.process_count():
        raise CheckpointError(
            f"{step_dir} was written by {len(data)} hosts, now there are "
            f"{jax.process_count()}; the data position is one for each host: continue "
            f"with {len(data)} hosts (any number of devices)"
        )
    state = TrainState(step=np.asarray(meta["step"], np.int32), **items)
    return Position(state, phase, data, meta["interval"])


def best_so_far(run_dir: Path) -> tuple[bool, float]:
    """The `rank` of the checkpoint in `best/`; the least where there is none."""
    for step in reversed(list_steps(run_dir / "best")):
        try:
            meta = read_meta(run_dir / "best" / str(step))
            return rank(meta["phase"], meta["test"]["top1"])
        except DamagedCheckpointError as error:
            logger.warning("%s", error)
            wait_for_hosts()
            set_aside(run_dir, "best", step)
    return rank("dense", -1.0)


def rank(phase: str, top1: float) -> tuple[bool, float]:
    """How good a checkpoint is: where a run turns sparse, its best is sparse."""
    return phase != "dense", top1


def wait_for_hosts() -> None:
    """Returns when every host has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("nmjax.training")


def of_every_host(value: Any) -> list[Any]:
    """A JSON-able value of each host, in their order, on all hosts."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[:size]))
        for row, size in zip(np.asarray(texts), sizes, strict=True)
    ]

"""`train`: everything that can be wrong is refused here, then the loop begins."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

import nmjax
from nmjax.paths import map_named, named_leaves
from nmjax.rules import Rules
from nmjax.training import run_folder
from nmjax.training.checkpoint import list_steps
from nmjax.training.config import TrainConfig
from nmjax.training.evaluation import check_batch_size
from nmjax.training.loop import Loop, TrainResult
from nmjax.training.resume import Position, find_position, wait_for_hosts
from nmjax.training.state import (
    Phase,
    init_variables,
    jit_new_train_state,
    make_phases,
    new_train_state,
    phase_of_step,
)
from nmjax.training.steps import data_mesh, replicate

logger = logging.getLogger("nmjax")


def train(
    model: nn.Module,
    rules: Rules,
    data: Any,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool | int = True,
    progress: bool = True,
    init_params: Mapping[str, Any] | None = None,
    init_batch_stats: Mapping[str, Any] | None = None,
    devices: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a model, or continues to, until `config.epochs` are done.

    Everything that can be wrong with the arguments is refused before the first step.
    The decay of SR-STE is always added in the optimizer, once for each step.

    Where masks are learned (arXiv:2411.00288) their logits train beside the parameters
    and are saved with them; the weights under these masks stay as they are, bit for
    bit, unless the recipe trains them, and everything else trains as usual. Evaluation
    takes the most probable masks.

    Args:
      model: A linen model `(images, train: bool) -> logits`, with no collections but
        "params" and "batch_stats"; hashable, so with tuples for lists in its fields.
      rules: As for `nmjax.sparsify`; `[]` is dense.
      data: The data set; see `nmjax.training`.
      config: What to do.
      run_dir: The run folder; made if it is missing.
      resume: True = continue from the latest intact checkpoint, if there is one; a
        step = from exactly that one; in both cases later ones are set aside; False =
        refuse a folder that holds checkpoints.
      progress: Whether to show a bar on standard error.
      init_params: Parameters to begin with; None = those of
        `model.init(jax.random.key(config.seed), ...)`.
      init_batch_stats: Batch statistics to begin with.
      devices: Devices to use; None = all, of all hosts.
      options: What else this run is made from, JSON-able; written to `options.json`
        once all arguments are accepted.

    Returns:
      The result; a run that is already complete is evaluated again.

    Raises:
      CheckpointError: The folder holds another run, or no checkpoint that is intact;
        another process trains in it; or a checkpoint cannot be written.
      OSError: A row of metrics cannot be written.
      PlanError: The rules do not fit the model.
      TrainingDiverged: A loss, or a number in the state, is NaN or infinite.
      TrainingInterrupted: SIGTERM or SIGINT came; a checkpoint was written.
      ValueError: Another argument is wrong.
    """
    given = {"params": init_params, "batch_stats": init_batch_stats}
    # In a function of its own, so that the first parameters are not held for the
    # whole run beside those that are trained.
    with contextlib.ExitStack() as held:
        where = Path(run_dir)
        loop = _prepare(
            model,
            rules,
            data,
            config,
            where,
            resume,
            progress,
            given,
            devices,
            options,
            held,
        )
        return loop.run()


def _prepare(
    model,
    rules,
    data,
    config,
    run_dir,
    resume,
    progress,
    given,
    devices,
    options,
    held,
) -> Loop:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"train takes a linen model, got {type(model).__name__}; for an nnx model, "
            "docs/README.md has loops of one's own"
        )
    options = json.dumps(options, indent=1) if options is not None else None
    mesh = data_mesh(devices)
    steps_per_epoch = _steps_per_epoch(config, data, mesh)
    phases = make_phases(
        model,
        rules,
        config,
        steps_per_epoch=steps_per_epoch,
        image_shape=data.image_shape,
        mesh=mesh,
    )
    dense = nmjax.densify(model)
    variables = init_variables(dense, config.seed, data.image_shape, mesh)
    _check_logits(dense, variables, data)
    for name, arrays in given.items():
        if arrays is not None:
            variables[name] = _like(variables[name], arrays, f"init_{name}")

    abstract = {
        phase.name: jax.eval_shape(functools.partial(new_train_state, phase), variables)
        for phase in phases
    }
    run_folder.probe(run_dir, max(_bytes(state) for state in abstract.values()))
    held.enter_context(run_folder.locked(run_dir))
    if list_steps(run_dir / "checkpoints"):
        run_folder.refuse_other_config(run_dir, config)
    plans = {phase.name: phase.plan for phase in phases}
    position = find_position(run_dir, resume, abstract, plans)
    if position is not None and position.state.step > config.epochs * steps_per_epoch:
        raise ValueError(
            f"{config.epochs} epochs of {steps_per_epoch} steps is shorter than what "
            f"is done in {run_dir}, {position.state.step} steps"
        )
    if position is None:
        state = jit_new_train_state(phases[0])(variables)
        position = Position(state, phases[0].name, data=(), interval={})
    else:
        _warn_of_another_phase(position, phases)
        state = replicate(position.state, mesh)
        position = dataclasses.replace(position, state=state)
    loop = Loop(config, data, phases, run_dir, position, progress=progress)
    held.callback(loop.close)
    plan = plans.get("sparse", phases[-1].plan)
    run_folder.write_descriptions(run_dir, config, plan, options)
    wait_for_hosts()
    return loop


def _warn_of_another_phase(position: Position, phases: Sequence[Phase]) -> None:
    """Phases that are shares of the run move when its length changes."""
    step = int(position.state.step)
    now = phase_of_step(phases, step - 1).name
    if now != position.phase:
        logger.warning(
            "step %d was in phase %r, which in a run of this length is %r: what "
            "follows is trained in the phases of the new length",
            step,
            position.phase,
            now,
        )


def _steps_per_epoch(config: TrainConfig, data: Any, mesh: Mesh) -> int:
    check_batch_size(config.batch_size, mesh, config.micro_batches)
    if not data.num_test:
        raise ValueError(f"the test set of {data.name} is empty")
    if data.num_train < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the training set of "
            f"{data.name}, {data.num_train} images"
        )
    return data.num_train // config.batch_size


def _check_logits(model: nn.Module, variables: Any, data: Any) -> None:
    images = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
    apply = functools.partial(model.apply, train=False)
    logits = jax.eval_shape(apply, variables, images)
    if logits.shape != (1, data.num_classes):
        raise ValueError(
            f"the model maps one image to shape {logits.shape}; {data.name} has "
            f"{data.num_classes} classes, so it should be (1, {data.num_classes})"
        )


def _like(own: Any, given: Any, name: str) -> Any:
    """The given arrays, if they have the paths and shapes of the model's own."""
    wanted = {path: np.shape(x) for path, x in named_leaves(own).items()}
    found = {path: np.shape(x) for path, x in named_leaves(given).items()}
    for path in [*wanted, *(path for path in found if path not in wanted)]:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"{name} does not fit the model: {path} is "
                f"{found.get(path, 'absent')}, the model's own is "
                f"{wanted.get(path, 'absent')}"
            )
    # NumPy arrays: the steps donate the state, and the caller's arrays are not theirs.
    arrays = named_leaves(given)
    return map_named(lambda path, x: np.asarray(arrays[path], x.dtype), own)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

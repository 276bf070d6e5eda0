"""One network from its options: plan it, train it, check it, plot it."""

import ast
import dataclasses
import inspect
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments import data as datasets
from experiments import resampling
from experiments.plots import plot_run
from experiments.presets import (
    Options,
    SparsityOptions,
    flag,
    read_options,
)
from nmjax import models, training
from nmjax.training.checkpoint import list_steps

# Fields of TrainConfig by the options that they come from.
_CONFIG = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "micro_batches": "gradient_accumulation",
    "optimizer": "opt",
    "lr": "lr",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "weight_decay": "weight_decay",
    "schedule": "lr_scheduler",
    "warmup_epochs": "lr_warmup_epochs",
    "step_epochs": "lr_steps",
    "step_factor": "lr_gamma",
    "label_smoothing": "label_smoothing",
    "clip_norm": "clip_grad_norm",
    "seed": "seed",
    "checkpoint_every": "checkpoint_every",
    "log_every": "print_freq",
    "dense_epochs": "dense_epochs",
    "freeze_epochs": "freeze_epochs",
}

# Options that may differ between the start of a run and its continuation.
_FREE = {
    "data_path",
    "output_dir",
    "resume",
    "test_only",
    "epochs",
    "checkpoint_every",
    "print_freq",
}


def train_config(options: Options) -> training.TrainConfig:
    """The trainer's part of the options.

    Raises:
      ValueError: A value is out of range; the message names the option.
    """
    values = options.flat()
    fields = {field: values[name] for field, name in _CONFIG.items()}
    try:
        return training.TrainConfig(**fields)
    except ValueError as error:
        # The trainer speaks of its fields; a user of the command knows its options.
        message = str(error)
        for field, name in _CONFIG.items():
            message = re.sub(rf"(?<![-\w]){field}(?= is | \d)", flag(name), message)
        raise ValueError(message) from None


def sparsity_rules(options: Options) -> list[nmjax.Rule]:
    """The rules that the options stand for; `[]` is dense.

    Raises:
      ValueError: The recipe's arguments or an expression is malformed.
    """
    given = options.sparsity
    recipe = _recipe(given)
    if not recipe.sparse:
        return []
    try:
        dense = [nmjax.Rule(path, None) for path in given.dense]
    except ValueError as error:
        raise ValueError(f"--dense: {error}") from None
    return [*dense, nmjax.Rule(".*", recipe, ineligible=given.ineligible)]


def _recipe(given: SparsityOptions) -> nmjax.Recipe:
    """The recipe of a name of `nmjax.recipes` and its arguments."""
    try:
        pattern = nmjax.NMPattern(given.pattern)
    except ValueError as error:
        raise ValueError(f"--pattern: {error}") from None
    function = getattr(nmjax.recipes, given.recipe)
    # The phases are the command's own options; the trainer places the decay.
    own = inspect.signature(function).parameters.keys() - {"schedule", "decay_in"}
    arguments: dict[str, Any] = {}
    for text in given.recipe_options:
        name, equals, value = text.partition("=")
        if not equals or name not in own - {"pattern", "decay"}:
            known = ", ".join(sorted(own - {"pattern", "decay"})) or "none"
            raise ValueError(
                f"--recipe-options {text}: expected NAME=VALUE, and the names of "
                f"--recipe {given.recipe} are: {known}"
            )
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value  # a word
    if "pattern" in own:
        arguments["pattern"] = pattern
    if given.decay is not None:
        if "decay" not in own:
            raise ValueError(
                f"--decay has no effect with --recipe {given.recipe}: leave it out"
            )
        arguments["decay"] = given.decay
    try:
        recipe = function(**arguments)
    except ValueError as error:
        name = "--recipe-options" if given.recipe_options else "--decay"
        raise ValueError(f"{name}: {error}") from None
    if recipe.sparse and recipe.pattern != pattern:
        raise ValueError(
            f"--pattern {pattern}: --recipe {given.recipe} is for "
            f"{recipe.pattern} alone"
        )
    return recipe


def load_data(options: Options) -> datasets.Data:
    """The images to train and to test on.

    Raises:
      ValueError: The dataset is missing or damaged, or there are too few.
    """
    return select(options, open_data(options))


def open_data(options: Options) -> datasets.Data:
    """Opens the whole dataset.

    Raises:
      ValueError: It is missing or damaged.
    """
    given = options.data
    return datasets.load(
        given.dataset,
        given.data_path,
        image_size=given.image_size,
        augment=given.augment,
    )


def select(options: Options, data: datasets.Data) -> datasets.Data:
    """The images to train and to test on, of a whole dataset.

    Raises:
      ValueError: There are fewer than the options ask for.
    """
    given = options.data
    if given.folds is not None:
        data = resampling.fold(data, given.fold, given.folds)
    if given.train_size is not None:
        data = resampling.subset(data, given.train_size, validate=given.validate)
    if options.optim.batch_size > data.num_train and not options.run.test_only:
        raise ValueError(
            f"--batch-size {options.optim.batch_size} is more than the "
            f"{data.num_train} training images of {given.dataset}"
        )
    return data


def make_model(options: Options, data: datasets.Data):
    """The dense linen model for the images of `data`."""
    return models.create(
        options.model.model,
        num_classes=data.num_classes,
        stem=data.stem,
        dtype=jnp.dtype(options.model.dtype),
    )


def example(data: datasets.Data) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one image as the model takes it, `(1, H, W, C)` float32."""
    return jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)


def run_folder(options: Options) -> Path:
    """The run folder, which need not exist yet.

    Raises:
      ValueError: It cannot be made, or holds a run that these options do not continue;
        or a run that begins there would never lower its rate, as it is to.
    """
    if not options.run.output_dir:
        raise ValueError("--output-dir is empty: name a folder, or leave it out")
    folder = Path(options.run.output_dir)
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if not exists.is_dir():
        raise ValueError(f"--output-dir {folder}: {exists} is a file, not a folder")
    begun = list_steps(folder / "checkpoints")
    optim = options.optim
    falls = any(epoch < optim.epochs for epoch in optim.lr_steps)
    if not begun and optim.lr_scheduler == "step" and not falls:
        raise ValueError(
            f"--lr-scheduler step: none of --lr-steps {optim.lr_steps} is below "
            f"--epochs {optim.epochs}, so the rate would never fall"
        )
    # A run that has no checkpoint yet starts afresh, with whatever options.
    if begun and (saved := read_options(folder)):
        then, now = saved.flat(), options.flat()
        changed = [k for k in now if k not in _FREE and now[k] != then[k]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other options: "
                + ", ".join(f"{flag(k)} {then[k]}, not {now[k]}" for k in changed)
                + ". Choose another --output-dir, or continue that run with "
                f"--resume {shlex.quote(str(folder))} alone"
            )
    return folder


def plan_of(options: Options, data: datasets.Data) -> nmjax.Plan:
    """What the options make of the network, computing nothing.

    Raises:
      ValueError: The rules do not fit the model, or no layer of it.
    """
    model, rules = make_model(options, data), sparsity_rules(options)
    try:
        plan = nmjax.plan(model, rules, example(data))
    except nmjax.PlanError as error:
        raise ValueError(
            f"{error}\nHere, rules are made by --dense REGEX ... and --ineligible"
        ) from None
    if rules and not plan.sparse:
        reasons = "".join(f"\n  {entry.path}: {entry.reason}" for entry in plan)
        given = options.sparsity
        raise ValueError(
            f"--recipe {given.recipe} --pattern {given.pattern} fits no layer of "
            f"{options.model.model}; take another pattern, or --recipe dense:{reasons}"
        )
    return plan


def describe(options: Options, data: datasets.Data, say: Callable[[str], None]):
    """Says what is about to be trained, computing nothing.

    Raises:
      ValueError: As `plan_of`.
    """
    plan = plan_of(options, data)
    model, rules = make_model(options, data), sparsity_rules(options)
    # The sparse model's init, because it logs now what it would log in mid-training.
    init = nmjax.sparsify(model, rules).init
    params = jax.eval_shape(init, jax.random.key(0), example(data))["params"]
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    config = train_config(options)
    steps = config.epochs * (data.num_train // config.batch_size)
    if rules:
        say(nmjax.summary(params, plan) + "\n")
    say(
        f"{options.model.model} on {data.name}: {size:,} parameters, {data.num_train:,}"
        f" training images, {config.epochs} epochs, {steps:,} steps of "
        f"{config.batch_size} images"
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one network.

    Attributes:
      top1: Share of the test images whose class has the highest logit.
      top5: The same among the five highest; None with fewer than six classes.
      sparse_layers: Masked parameters, which were checked to be N:M.
      step_seconds: Median seconds per optimizer step; None if no step was left.
    """

    top1: float
    top5: float | None
    sparse_layers: int
    step_seconds: float | None


def train_network(
    options: Options, data: datasets.Data, folder: Path, *, progress: bool = True
) -> Outcome:
    """Trains one network in its run folder, or continues it there.

    Afterwards the last checkpoint is checked: N:M with the masks that were used.

    Args:
      options: What to train.
      data: What `load_data(options)` gave.
      folder: What `run_folder(options)` gave.
      progress: Whether to show a progress bar.

    Raises:
      ValueError: A checkpoint in the folder, or `--pretrained`, does not fit.
      nmjax.CheckError: The trained network is not N:M.
    """
    config, rules = train_config(options), sparsity_rules(options)
    start = {}
    begun = list_steps(folder / "checkpoints")
    if options.model.pretrained is not None and not begun:
        loaded = training.restore(options.model.pretrained)
        start = {
            "init_params": loaded["params"],
            "init_batch_stats": loaded["batch_stats"],
        }
    result = training.train(
        make_model(options, data),
        rules,
        data,
        config,
        folder,
        progress=progress,
        options=options.flat(),
        **start,
    )
    plot_run(folder)
    return Outcome(
        result.test_top1, result.test_top5, check_run(folder), result.step_seconds
    )


def check_run(folder: Path) -> int:
    """Checks the masks that the last checkpoint of a run used.

    Returns:
      The number of masked parameters, all of them N:M; 0 for a dense run.

    Raises:
      nmjax.CheckError: One is not.
    """
    saved = training.restore(folder)
    training.check_network(saved)
    return len(saved["plan"].masked)


def evaluate_run(
    options: Options, data: datasets.Data, checkpoint: str
) -> dict[str, float]:
    """Evaluates a trained network, with the masks of its checkpoint.

    Args:
      options: Those of the run.
      data: What `load_data(options)` gave.
      checkpoint: The run folder, or one checkpoint in it.

    Returns:
      `loss`, `top1`, `count` and, with six classes or more, `top5`.

    Raises:
      ValueError: There is no checkpoint of this model.
    """
    saved = training.restore(checkpoint)
    return training.evaluate(
        make_model(options, data),
        saved["plan"],
        saved,
        data,
        options.optim.batch_size,
    )

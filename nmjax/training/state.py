"""The state of training, and its phases.

The schedules of its recipes cut a run into phases: dense (no layer is sparse), sparse,
frozen (masks stay as they are), and finish (dense again). Each has its own model and
plan and is compiled once; what passes from one to the next is the state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nmjax
from nmjax.paths import map_named
from nmjax.plans import Plan
from nmjax.rules import Rule, Rules, as_rules
from nmjax.schedule import Schedule
from nmjax.training.config import TrainConfig


@flax.struct.dataclass
class TrainState:
    """All that a step reads and changes; replicated over the devices.

    Attributes:
      step: Optimizer steps done, int32 scalar.
      params: Parameters as stored (float32), pruned weights included.
      batch_stats: Running statistics of batch norm; `{}` without it.
      opt_state: Of the optimizer; its structure is the same in all phases.
      nm: The state of the recipes, as `nmjax.init_state` makes it.
      masks: The mask of every sparse weight at these parameters, as `nmjax.prepare`
        makes it: used by the next step and by evaluation. One byte for each sparse
        weight.
      nm_logits: Logits of learned masks, as `nmjax.init_logits` makes them; trained.
      logits_opt_state: Of their optimizer; `()` where no mask is learned.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    nm: Any
    masks: Any
    nm_logits: Any
    logits_opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the run: all that is static in its steps.

    Compared by value: phases of two runs that differ in the seed alone are equal and
    share a compilation.

    Attributes:
      name: "dense", "sparse", "frozen" or "finish", as of `nmjax.phases`.
      first_step: The step with which it begins.
      sparse_from: The first step of the run in which a layer is sparse.
      model: The model with the rules of the phase applied.
      plan: The plan of model and rules.
      config: The hyperparameters, those that shape no step set to constants.
      steps_per_epoch: Steps of one epoch.
      mesh: One axis, "data".
    """

    name: str
    first_step: int
    sparse_from: int
    model: nn.Module
    plan: Plan
    config: TrainConfig
    steps_per_epoch: int
    mesh: Mesh


def make_phases(
    model: nn.Module,
    rules: Rules,
    config: TrainConfig,
    *,
    steps_per_epoch: int,
    image_shape: Sequence[int],
    mesh: Mesh,
) -> tuple[Phase, ...]:
    """The phases of a run, in order.

    Where no rule makes a weight sparse there is one phase, "dense". The decay of
    SR-STE is moved into the optimizer, where it is added exactly once for each step.

    Args:
      model: A linen model `(images, train) -> logits`.
      rules: As for `nmjax.sparsify`.
      config: Its `dense_epochs` and `freeze_epochs` lengthen the dense start and the
        frozen phase of every schedule.
      steps_per_epoch: Steps of one epoch.
      image_shape: Height, width, channels.
      mesh: One axis, "data".

    Raises:
      PlanError: The rules do not fit the model.
      ValueError: A recipe has no room for the config's phases, or one that learns its
        masks has phases; or "step_adam" without a dense start.
    """
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    no_matter = {"seed": 0, "keep": 1, "log_every": 1, "checkpoint_every": None}
    static = dataclasses.replace(config, **no_matter)

    scheduled = tuple(_scheduled(rule, config) for rule in as_rules(rules))
    phases = []
    for part in nmjax.phases(scheduled, config.epochs * steps_per_epoch):
        plan = nmjax.plan(model, part.rules, example, train=False)
        made = nmjax.sparsify if plan.sparse else lambda model, _: nmjax.densify(model)
        phases.append(
            Phase(
                name=part.name,
                first_step=part.first_step,
                sparse_from=0,
                model=made(model, part.rules),
                plan=plan,
                config=static,
                steps_per_epoch=steps_per_epoch,
                mesh=mesh,
            )
        )
    sparse_from = min((p.first_step for p in phases if p.plan.sparse), default=0)
    if config.optimizer == "step_adam" and not sparse_from:
        raise ValueError(
            "optimizer 'step_adam' takes its second moment from a dense start, and no "
            "layer of this run turns sparse after one: use nmjax.recipes.step, or a "
            "schedule with dense_until, or dense_epochs for every recipe; or 'adamw'"
        )
    if not any(phase.plan.sparse for phase in phases):
        return (dataclasses.replace(phases[-1], name="dense", first_step=0),)
    return tuple(dataclasses.replace(p, sparse_from=sparse_from) for p in phases)


def phase_of_step(phases: Sequence[Phase], step: int) -> Phase:
    """The phase to which a step belongs; steps count from 0."""
    return [phase for phase in phases if phase.first_step <= step][-1]


def _scheduled(rule: Rule, config: TrainConfig) -> Rule:
    """The rule with the config's phases, and decay moved into the optimizer."""
    recipe = rule.recipe
    if recipe is None:
        return rule
    phases = (
        config.dense_epochs or config.freeze_epochs or recipe.schedule != Schedule()
    )
    if recipe.mask == "learned" and phases:
        raise ValueError(
            f"Rule({rule.path!r}): recipe {recipe.name!r} trains logits during the "
            "whole run: leave out its schedule, dense_epochs and freeze_epochs. Dense "
            "weights to begin with come from a run of their own, as init_params"
        )
    recipe = dataclasses.replace(recipe, decay_in="optimizer")
    if config.dense_epochs or config.freeze_epochs:
        recipe = recipe.during(
            dense_until=config.dense_epochs / config.epochs,
            freeze_from=1 - config.freeze_epochs / config.epochs,
        )
    return dataclasses.replace(rule, recipe=recipe)


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then cosine to 0, or steps."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(1, total - warmup))
    else:
        # `after` counts from the end of the warm-up.
        borders = [round(e * steps_per_epoch) - warmup for e in config.step_epochs]
        passed = sum(border <= 0 for border in borders)
        after = optax.piecewise_constant_schedule(
            config.lr * config.step_factor**passed,
            {border: config.step_factor for border in borders if border > 0},
        )
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, warmup), after], [warmup]
    )


def make_optimizer(phase: Phase) -> optax.GradientTransformationExtraArgs:
    """Decay of SR-STE, clip, weight decay, moments, learning rate, in this order.

    AdamW adds its weight decay after the moments (arXiv:1711.05101); the decay of
    SR-STE is a gradient and passes through them in both. The update takes
    `nm=` the masks of the step. `frozen_weights` have no moments and no decay.
    """
    parts = _descent(phase, phase.config.weight_decay)
    tx = optax.chain(nmjax.add_decay(phase.plan), *parts)
    frozen = frozen_weights(phase.plan)
    if frozen:
        tx = optax.masked(
            tx, functools.partial(map_named, lambda p, _: p not in frozen)
        )
    return optax.with_extra_args_support(tx)


def make_logits_optimizer(phase: Phase) -> optax.GradientTransformation:
    """As `make_optimizer`, for logits of learned masks: no decay of any kind.

    The clip bounds the norm of their own gradient.
    """
    return optax.chain(*_descent(phase, weight_decay=0.0))


def _descent(phase: Phase, weight_decay: float) -> list[Any]:
    """Clip, weight decay, moments, learning rate."""
    config = phase.config
    schedule = make_schedule(config, phase.steps_per_epoch)
    clip = config.clip_norm
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    match config.optimizer:
        case "sgd":
            parts.append(optax.add_decayed_weights(weight_decay))
            parts.append(optax.sgd(schedule, config.momentum or None, config.nesterov))
        case "adamw":
            parts.append(optax.adamw(schedule, weight_decay=weight_decay))
        case "step_adam":
            start = phase.sparse_from
            parts.append(
                nmjax.two_phase_adam(
                    schedule, earliest=start, latest=start, weight_decay=weight_decay
                )
            )
    return parts


def frozen_weights(plan: Plan) -> frozenset[str]:
    """Paths of the weights that a recipe keeps as they are: those under learned masks.

    All else trains: logits, biases, batch norm, and the layers without such a recipe.
    """
    return frozenset(
        e.path for e in plan.sparse if e.recipe and e.recipe.gradient == "none"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@functools.lru_cache(maxsize=64)
def _jitted_init(model: nn.Module, image_shape: tuple[int, ...], mesh: Mesh):
    """Compiled once for runs that differ in the seed alone."""

    def init(key):
        return model.init(key, jnp.zeros((1, *image_shape)), train=False)

    return jax.jit(init, out_shardings=replicated(mesh))


def init_variables(
    model: nn.Module, seed: int, image_shape: Sequence[int], mesh: Mesh
) -> dict[str, Any]:
    """`{"params", "batch_stats"}` of `model.init(jax.random.key(seed), …)`.

    Raises:
      ValueError: The model has variables of another collection.
    """
    key = jax.random.key(seed)
    variables = meta.unbox(_jitted_init(model, tuple(image_shape), mesh)(key))
    refuse_other_collections(variables)
    return {"batch_stats": {}, **variables}


def refuse_other_collections(variables: Mapping[str, Any]) -> None:
    """Refuses a model whose state the training loop would lose."""
    if others := sorted(set(variables) - {"params", "batch_stats"}):
        raise ValueError(
            f"the model has variables in {', '.join(others)}; nmjax.training keeps "
            "params and batch_stats only: write your own loop around nmjax.sparsify"
        )


def new_train_state(phase: Phase, variables: Mapping[str, Any]) -> TrainState:
    """The state before the first step of a run that begins in a phase; traceable.

    Args:
      phase: The phase.
      variables: `{"params", "batch_stats"}`.
    """
    params = variables["params"]
    nm = nmjax.init_state(params, phase.plan)
    logits = nmjax.init_logits(params, phase.plan)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=make_optimizer(phase).init(params),
        nm=nm,
        masks=nmjax.prepare(params, phase.plan, nm, logits=logits),
        nm_logits=logits,
        logits_opt_state=make_logits_optimizer(phase).init(logits) if logits else (),
    )


def enter_phase(before: Phase, phase: Phase, state: TrainState) -> TrainState:
    """The state with which a phase begins, after another; traceable.

    The frozen phase keeps the masks in force; the sparse phase chooses its own.
    Learned masks have no phases of their own: their logits pass on as they are.
    """
    nm = nmjax.next_state(state.params, phase.plan, state.masks, before.plan)
    # Temperatures are those of the step; masks chosen just now stay the same.
    nm = nmjax.refresh(nm, state.params, phase.plan, state.step)
    masks = nmjax.prepare(state.params, phase.plan, nm, logits=state.nm_logits)
    return dataclasses.replace(state, nm=nm, masks=masks)


@functools.lru_cache(maxsize=64)
def jit_new_train_state(phase: Phase) -> Callable[..., TrainState]:
    """`variables -> state`, replicated over the devices."""
    return jax.jit(
        functools.partial(new_train_state, phase),
        out_shardings=replicated(phase.mesh),
    )


@functools.lru_cache(maxsize=64)
def jit_enter_phase(before: Phase, phase: Phase) -> Callable[..., TrainState]:
    """`state -> state`; the old one is donated."""
    return jax.jit(
        functools.partial(enter_phase, before, phase),
        donate_argnums=0,
        out_shardings=replicated(phase.mesh),
    )

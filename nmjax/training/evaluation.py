"""Loss and accuracy on the test set, and batch statistics of a changed network."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

import nmjax
from nmjax.plans import Plan
from nmjax.rules import Rule, Rules, layer_path
from nmjax.state import NMState
from nmjax.training.steps import (
    check_labels,
    data_mesh,
    jit_eval_step,
    put_batch,
    replicate,
)


def evaluate(
    model: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    data: Any,
    batch_size: int,
    *,
    devices: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Loss and accuracy on the whole test set.

    Args:
      model: A linen model `(images, train) -> logits`.
      rules: As for `nmjax.sparsify`, or the plan of a checkpoint; `[]` is dense.
      variables: "params", and where there are any "batch_stats", "nm" and "nm_logits"
        (the most probable masks); what `restore` returns will do.
      data: The data set; see `nmjax.training`.
      batch_size: Images per batch, over all devices and hosts.
      devices: Devices to use; None = all.

    Returns:
      "loss" (mean cross entropy), "top1" and, with six classes or more, "top5"
      (shares in [0, 1]), "count" (images).

    Raises:
      ValueError: `batch_size` does not divide over the devices, or the rules or the
        variables do not fit the model.
    """
    mesh = data_mesh(devices)
    check_batch_size(batch_size, mesh)
    model, plan = _apply_rules(model, rules, data)
    params, masks = variables["params"], _masks_of(variables, plan)
    batch_stats = variables.get("batch_stats") or {}
    params, batch_stats, masks = replicate((params, batch_stats, masks), mesh)
    step = jit_eval_step(model, mesh)
    step = functools.partial(step, params, batch_stats, masks)
    return run_evaluation(step, data, batch_size, mesh)


def run_evaluation(
    step: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    data: Any,
    batch_size: int,
    mesh: Mesh,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sums a compiled evaluation step over the test set.

    Args:
      step: Batch to sums; "count" is one of them.
      data: The data set.
      batch_size: Over all hosts.
      mesh: Where the batches go.
      before_batch: Called before every batch; may raise to end the evaluation.

    Returns:
      Means by name and "count".

    Raises:
      ValueError: The test set is empty, or has labels that are no classes.
    """
    hosts = {"num_hosts": jax.process_count(), "host": jax.process_index()}
    totals: dict[str, float] = {}

    def add(sums):
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)

    pending: Mapping[str, jax.Array] = {}
    for batch in data.test_batches(batch_size // jax.process_count(), **hosts):
        before_batch()
        check_labels(batch, data)
        # The sums of one batch are fetched while the device works on the next.
        done, pending = pending, step(put_batch(batch, mesh))
        add(done)
    add(pending)
    count = totals.pop("count", 0)
    if not count:
        raise ValueError(f"the test set of {data.name} is empty")
    means = {name: total / count for name, total in totals.items()}
    return {**means, "count": int(count)}


def reestimate_batch_stats(
    model: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    data: Any,
    batch_size: int,
    *,
    batches: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Lets batch norm see the network as it is now; nothing is trained.

    After pruning, the running statistics are still those of the dense network. Each
    batch moves them by 1 - momentum of the model's layers: with Flax's 0.99 some
    hundred batches replace them, with 0.9 some fifty.

    Args:
      model: A linen model `(images, train) -> logits`.
      rules: As for `evaluate`.
      variables: As for `evaluate`.
      data: The data set; its training images are read.
      batch_size: Images per batch; one device is used.
      batches: Number of batches.
      seed: Of the order of the images, and of dropout.

    Returns:
      `variables` with new "batch_stats".

    Raises:
      ValueError: The rules or the variables do not fit the model.
    """
    model, plan = _apply_rules(model, rules, data)
    params, masks = variables["params"], _masks_of(variables, plan)
    batch_stats = variables.get("batch_stats") or {}
    update = _jit_update_batch_stats(model)
    batches_of = data.train_batches(batch_size, seed=seed)
    for number in range(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        images = next(batches_of)["image"]
        batch_stats = update(params, batch_stats, masks, images, key)
    return {**variables, "batch_stats": batch_stats}


@functools.lru_cache(maxsize=64)
def _jit_update_batch_stats(model: nn.Module) -> Callable[..., Any]:
    """`(params, batch_stats, masks, images, key) -> batch_stats`, compiled."""

    def update(params, batch_stats, masks, images, key):
        variables = {"params": params, "batch_stats": batch_stats, "nm": masks}
        _, new = model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return new.get("batch_stats", batch_stats)

    return jax.jit(update)


def check_batch_size(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Refuses a batch that does not divide over devices and micro-batches.

    Raises:
      ValueError: With the numbers.
    """
    parts = mesh.size * micro_batches
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = f"{lower} or {upper}" if lower else f"{upper}"
        times = f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"batch size {batch_size} does not divide over {mesh.size} devices{times}; "
            f"the nearest that does is {near}"
        )


def _apply_rules(
    model: nn.Module, rules: Rules | Plan, data: Any
) -> tuple[nn.Module, Plan]:
    if isinstance(rules, Plan):
        rules = rules_of(rules)
    example = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
    plan = nmjax.plan(model, rules, example, train=False)
    sparse = nmjax.sparsify(model, rules) if plan.sparse else nmjax.densify(model)
    return sparse, plan


def _masks_of(variables: Mapping[str, Any], plan: Plan) -> NMState:
    nm, logits = variables.get("nm"), variables.get("nm_logits")
    return nmjax.prepare(variables["params"], plan, nm, logits=logits)


def rules_of(plan: Plan) -> list[Rule]:
    """Rules that give a model this plan: one for each sparse layer."""
    return [
        Rule(re.escape(layer_path(entry.path)), entry.recipe, ragged=entry.ragged)
        for entry in plan.sparse
    ]

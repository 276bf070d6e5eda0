"""One optimizer step and one evaluation batch, as pure functions.

The batch is sharded over the mesh axis "data", the state is replicated; XLA inserts
the means over devices, those of batch norm included: its statistics are of the whole
micro-batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import nmjax
from nmjax import metrics as nm_metrics
from nmjax.paths import map_named, named_leaves, nest
from nmjax.state import NMState, state_entries
from nmjax.training.metrics import TOP5_FROM_CLASSES
from nmjax.training.state import (
    Phase,
    TrainState,
    frozen_weights,
    make_logits_optimizer,
    make_optimizer,
    replicated,
)

Batch = Mapping[str, jax.Array]


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis "data" over the devices; all of them by default."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays that every host has on all devices of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def check_labels(batch: Mapping[str, np.ndarray], data: Any) -> None:
    """Raises ValueError where a label is none of the classes of `data`."""
    labels = np.asarray(batch["label"])
    if "valid" in batch:  # others are padding
        labels = labels[np.asarray(batch["valid"]) > 0]
    if labels.size and not 0 <= labels.min() <= labels.max() < data.num_classes:
        raise ValueError(
            f"{data.name} has labels from {labels.min()} to {labels.max()}; its "
            f"{data.num_classes} classes are 0 to {data.num_classes - 1}"
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this host's part of a batch on its devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(part))
        for name, part in batch.items()
    }


@functools.lru_cache(maxsize=64)  # a comparison goes round its methods
def jit_train_step(phase: Phase) -> Callable[..., tuple[TrainState, dict]]:
    """`(state, batch, key) -> (state, metrics)`, compiled; the state is donated."""
    return jax.jit(
        functools.partial(train_step, phase),
        donate_argnums=0,
        out_shardings=replicated(phase.mesh),
    )


@functools.lru_cache(maxsize=64)
def jit_eval_step(model: nn.Module, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """`(params, batch_stats, masks, batch) -> sums`, compiled."""
    return jax.jit(functools.partial(eval_step, model), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=64)
def jit_mask_metrics(phase: Phase) -> Callable[[TrainState], dict[str, dict]]:
    """`state -> {metric: {path: scalar}}`, compiled; see `nmjax.metrics.of_masks`."""

    def measure(state):
        return nm_metrics.of_masks(state.params, phase.plan, state.masks)

    return jax.jit(measure, out_shardings=replicated(phase.mesh))


def train_step(
    phase: Phase, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step.

    The masks in the state are those of its parameters; each micro-batch reads them,
    and those of the new parameters are chosen once, at the end.

    Args:
      phase: What is static.
      state: Before the step.
      batch: "image" `(B, H, W, C)` and "label" `(B,)` int32.
      key: Of the run; dropout, sampled gradients and learned masks of step s draw from
        `fold_in(key, s)`.

    Returns:
      The state after the step, and float32 scalars: "loss", "top1" and "top5" (shares
      of the batch, before the update), "sad" (mask bits that the step changed); and
      "layer_sad" `(masks,)`, the same by mask in the order of the state.
    """
    count = phase.config.micro_batches
    key = jax.random.fold_in(key, state.step)
    if count == 1:
        batch_stats, (grads, sums) = _gradient(
            phase, state, state.batch_stats, batch, key
        )
    else:

        def accumulate(carry, inputs):
            batch_stats, totals = carry
            part, key = inputs
            batch_stats, parts = _gradient(phase, state, batch_stats, part, key)
            return (batch_stats, jax.tree.map(jnp.add, totals, parts)), None

        parts = _micro_batches(batch, count, phase.mesh)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(
            functools.partial(_gradient, phase, state), state.batch_stats, first, key
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
        (batch_stats, (grads, sums)), _ = jax.lax.scan(
            accumulate,
            (state.batch_stats, zeros),
            (parts, jax.random.split(key, count)),
            # XLA on CPU convolves five times slower within a loop (ResNet-8, measured).
            unroll=phase.mesh.devices.flat[0].platform == "cpu",
        )
    grads = jax.tree.map(lambda g: g / (count * phase.config.loss_scale), grads)

    grads, logit_grads = grads
    tx = make_optimizer(phase)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, nm=state.masks)
    params = optax.apply_updates(state.params, updates)
    params = _keep(frozen_weights(phase.plan), state.params, params)
    logits, logits_opt_state = state.nm_logits, state.logits_opt_state
    if logits:
        tx = make_logits_optimizer(phase)
        updates, logits_opt_state = tx.update(logit_grads, logits_opt_state, logits)
        logits = optax.apply_updates(logits, updates)
    step = state.step + 1
    nm = nmjax.refresh(state.nm, params, phase.plan, step)
    masks = nmjax.prepare(params, phase.plan, nm, logits=logits)
    new = TrainState(
        step=step,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        nm=nm,
        masks=masks,
        nm_logits=logits,
        logits_opt_state=logits_opt_state,
    )
    size = batch["label"].shape[0]
    *by_mask, sad = nm_metrics.sad(state.masks, masks).values()
    return new, {
        **{name: total / size for name, total in sums.items()},
        "sad": sad,
        "layer_sad": jnp.asarray(by_mask, jnp.float32),
    }


def _gradient(phase, state, batch_stats, batch, key):
    """New batch statistics, and (gradient of the scaled mean loss, metric sums)."""

    def loss_of(trained):
        params, nm_logits = trained
        variables = {
            "params": params,
            "batch_stats": batch_stats,
            "nm": _drawn_or_prepared(phase, state),
            "nm_logits": nm_logits,
        }
        logits, new = phase.model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key, "nm": jax.random.fold_in(key, 1)},
        )
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        targets = optax.smooth_labels(targets, phase.config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        sums = {"loss": jnp.sum(losses), **_correct(logits, batch["label"], 1.0)}
        new_stats = new.get("batch_stats", batch_stats)
        return jnp.mean(losses) * phase.config.loss_scale, (new_stats, sums)

    trained = state.params, state.nm_logits
    grads, (batch_stats, sums) = jax.grad(loss_of, has_aux=True)(trained)
    return batch_stats, (grads, sums)


def _drawn_or_prepared(phase: Phase, state: TrainState) -> NMState:
    """The prepared masks; where masks are learned the temperature, to draw them."""
    kept = state_entries(state.nm, phase.plan)
    sparse = phase.plan.sparse
    learned = {e.path for e in sparse if e.recipe and e.recipe.mask == "learned"}
    masks = state_entries(state.masks, phase.plan)
    return nest({**masks, **{path: kept[path] for path in learned}})


def _keep(frozen: frozenset[str], old: Any, new: Any) -> Any:
    """`new` with the frozen weights of `old`: adding 0 would change the sign of −0."""
    leaves = named_leaves(old)
    return map_named(lambda path, w: leaves[path] if path in frozen else w, new)


def _micro_batches(batch: Batch, count: int, mesh: Mesh) -> dict[str, jax.Array]:
    """`(B, …)` as `(count, B/count, …)`, every part spread over all devices.

    Part j takes the elements i·count + j: the elements of one device stay on it.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))

    def split(x):
        x = x.reshape(-1, count, *x.shape[1:])  # (B/count, count, …)
        return jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), sharding)

    return {name: split(x) for name, x in batch.items()}


def eval_step(
    model: nn.Module, params: Any, batch_stats: Any, masks: Any, batch: Batch
) -> dict[str, jax.Array]:
    """Sums over one batch, with the running statistics of batch norm.

    Args:
      model: The model with its rules applied.
      params: Parameters.
      batch_stats: Running statistics, or `{}`.
      masks: Of `nmjax.prepare`.
      batch: "image" `(B, H, W, C)`, "label" `(B,)` int32, "valid" `(B,)` float32,
        0 where the batch is padded.

    Returns:
      float32 scalars "loss" (cross entropy without label smoothing), "top1", with six
      classes or more "top5", and "count".
    """
    variables = {"params": params, "batch_stats": batch_stats, "nm": masks}
    logits: Any = model.apply(variables, batch["image"], train=False)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    valid = batch["valid"]
    return {
        # where, not *: a padded image may give NaN.
        "loss": jnp.sum(jnp.where(valid > 0, losses, 0)),
        **_correct(logits, batch["label"], valid),
        "count": jnp.sum(valid),
    }


def _correct(logits, labels, weights) -> dict[str, jax.Array]:
    """Number of images whose label is the first, or among the first five."""
    top1 = jnp.argmax(logits, axis=-1) == labels
    correct = {"top1": jnp.sum(top1 * weights)}
    if logits.shape[-1] >= TOP5_FROM_CLASSES:
        _, best = jax.lax.top_k(logits, 5)
        correct["top5"] = jnp.sum(jnp.any(best == labels[:, None], -1) * weights)
    return correct

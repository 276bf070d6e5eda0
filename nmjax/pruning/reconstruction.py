"""AdaPrune: a pruned layer learns to compute what the dense layer did.

The mask E of a layer is the one that its recipe chooses from the dense weight: by
magnitude, transposable or by tiles; it stays. Each kept weight first takes its share of
what its group lost, where that lowers the error below,

    w' = w + Σ_dropped w / number kept

so that equal inputs give what they gave. Then Adam changes what is kept, and the bias,
so as to minimise over cached calibration inputs x

    ‖f(E ⊙ W', b'; x) − f(W, b; x)‖²

for one layer f at a time (arXiv:2102.08124). Every layer sees the inputs
that the dense model gives it, so the order of the layers does not matter.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.paths import named_leaves
from nmjax.plans import Plan
from nmjax.pruning.calibration import Batch, Calibration, with_leaves
from nmjax.pruning.layers import Layer, Parameters
from nmjax.pruning.report import LayerReport, Pruned
from nmjax.rules import Rules
from nmjax.sparsity import Sparsity


def ada_prune(
    model: Any,
    rules: Rules | Plan,
    batches: Iterable[Batch],
    *,
    variables: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    bias_learning_rate: float = 1e-2,
    batch_size: int = 50,
    seed: int = 0,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Pruned:
    """Prunes a trained model to N:M, layer by layer (AdaPrune, arXiv:2102.08124).

    Steps and defaults are those of the authors' code. A layer that they do not improve
    keeps its magnitude-pruned weights, so no error is above that of magnitude pruning.
    Needs optax: `pip install 'nmjax[train]'`.

    Args:
      model: A linen or nnx model. It runs eagerly, layer by layer.
      rules: What to prune: rules, a pattern such as "2:4", or a plan.
      batches: Calibration inputs, each what the model takes: an array, or a tuple of
        positional arguments. A few hundred examples are usual.
      variables: Variables of a linen model, `{"params": …, "batch_stats": …}`.
      kwargs: Keyword arguments of the model's call, such as `{"train": False}`. An nnx
        model runs in evaluation mode.
      steps: Steps of Adam for each layer.
      learning_rate: Of the kernel.
      bias_learning_rate: Of the bias.
      batch_size: Inputs (entries of the first axis) that a step draws.
      seed: Decides which inputs a step draws.
      on_layer: Called after each layer.

    Returns:
      Parameters, plan and the error of each layer.

    Raises:
      ValueError: A layer's inputs cannot be had (see `nmjax.pruning.calibration`) or
        differ in shape from batch to batch; a calibration input is not finite; a recipe
        chooses no mask from the weight; an option is out of range.
      PlanError: As `nmjax.plan`.
      ImportError: optax is not installed.
    """
    for name, value in {"steps": steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    adam = _adam()
    masks = ("magnitude", "transposable", "tile")
    calibration = Calibration(model, rules, batches, variables, kwargs, masks)
    leaves = named_leaves(calibration.params)
    new: dict[str, jax.Array] = {}
    reports = []
    rates = {"kernel": learning_rate, "bias": bias_learning_rate}
    for path in calibration.order():
        calls = list(calibration.inputs(calibration.params, [path]))
        layer, x = calls[0][0], _join(path, [x for _, x in calls])
        dense = {"kernel": jnp.asarray(leaves[path], jnp.float32)}
        if layer.bias_path in leaves:
            dense["bias"] = jnp.asarray(leaves[layer.bias_path], jnp.float32)
        mask = calibration.sparsity(path).choose_mask(dense["kernel"])
        masked = {**dense, "kernel": jnp.where(mask, dense["kernel"], 0)}
        y = jax.jit(layer)(dense, x)
        error = jax.jit(functools.partial(_relative_error, layer))
        before = float(error(masked, x, y))
        if not math.isfinite(before):
            raise ValueError(f"{path}: its calibration inputs are not finite")
        keys = jax.random.split(jax.random.key(seed), steps)
        shared = _share_dropped(dense["kernel"], mask, calibration.sparsity(path))
        start = {**dense, "kernel": shared}
        if not float(error(start, x, y)) < before:
            start = masked
        step = jax.jit(functools.partial(_step, layer, adam, rates, batch_size))
        trained, state = start, adam.init(start)
        for key in keys:  # no lax.scan: XLA's CPU convolutions are slow inside loops
            trained, state = step(trained, state, mask, x, y, key)
        after = float(error(trained, x, y))
        if not after < before:
            trained, after = masked, before
        new[path] = trained["kernel"]
        if "bias" in trained:
            new[layer.bias_path] = trained["bias"]
        report = LayerReport(path, len(x), before, after)
        reports.append(report)
        if on_layer is not None:
            on_layer(report)
    params = with_leaves(calibration.params, new)
    return Pruned(params, calibration.plan, tuple(reports))


def _adam() -> Any:
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            "ada_prune needs optax: pip install 'nmjax[train]'"
        ) from error
    return optax.scale_by_adam()


def _share_dropped(w: jax.Array, mask: jax.Array, sparsity: Sparsity) -> jax.Array:
    """Kept weights, each with its share of the sum of the dropped ones of its group."""
    m, axis, size = sparsity.pattern.m, sparsity.axis, w.shape[sparsity.axis]

    def of_group(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, axis, -1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % m)])
        sums = x.reshape(*x.shape[:-1], -1, m).sum(-1)
        return jnp.moveaxis(jnp.repeat(sums, m, axis=-1)[..., :size], -1, axis)

    dropped, kept = of_group(jnp.where(mask, 0, w)), of_group(mask.astype(w.dtype))
    return jnp.where(mask, w + dropped / jnp.maximum(kept, 1), 0)


def _join(path: str, inputs: list[jax.Array]) -> jax.Array:
    """All inputs of a layer as one array, (inputs, …)."""
    shapes = {x.shape[1:] for x in inputs}
    if len(shapes) > 1 or inputs[0].ndim < 2:
        raise ValueError(
            f"{path}: its calibration inputs have shapes {[x.shape for x in inputs]}, "
            "which are no batches of one shape: give batches with equal shapes behind "
            "the first axis, or leave this layer dense by a rule"
        )
    return jnp.concatenate(inputs)


def _relative_error(
    layer: Layer, parameters: Parameters, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Σ‖f(parameters; x) − y‖² / Σ‖y‖²."""
    error = jnp.sum((layer(parameters, x) - y) ** 2)
    return error / jnp.maximum(jnp.sum(y**2), 1e-30)


def _step(
    layer: Layer,
    adam: Any,
    rates: dict[str, float],
    batch_size: int,
    parameters: Parameters,
    state: Any,
    mask: jax.Array,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
) -> tuple[Parameters, Any]:
    """One step of Adam towards y, on inputs drawn with replacement."""
    chosen = jax.random.randint(key, (batch_size,), 0, len(x))

    def loss(parameters):
        masked = {**parameters, "kernel": jnp.where(mask, parameters["kernel"], 0)}
        return jnp.mean((layer(masked, x[chosen]) - y[chosen]) ** 2)

    update, state = adam.update(jax.grad(loss)(parameters), state)
    new = {name: p - rates[name] * update[name] for name, p in parameters.items()}
    return new, state

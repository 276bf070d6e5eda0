"""Which layers an nnx model has, and which kernel axes each of them contracts.

An nnx model is a graph of objects, so nothing has to run: a layer's own attributes say
what its GEMM contracts. Axes are counted from the end, because `nnx.vmap` stacks
kernels along a new axis; where a kernel's shape does not end in the layer's own, its
axes were moved and no recipe can act on it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from nmjax.nnx.variables import NMLogits
from nmjax.planning import EMBEDDING, Candidate, is_weight
from nmjax.recording import (
    OWN_PARAMETER,
    einsum_axes,
    einsum_out_axes,
    own_body,
)

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose, nnx.Einsum)

_DEFAULT_HOOKS = {
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "einsum_op": (None, jnp.einsum),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter that a GEMM might read.

    Attributes:
      param: The Variable.
      layers: The Flax layers whose kernel it is: several where it is shared.
      candidate: What the plan is told.
    """

    param: nnx.Variable
    layers: tuple[Any, ...]
    candidate: Candidate

    @property
    def ndim(self) -> int:
        """Rank inside the layer, without the axes that `nnx.vmap` stacks."""
        if not self.layers:
            return len(self.candidate.shape)
        return len(_own_shape(self.layers[0]))


def find_weights(model: nnx.Module) -> dict[str, Weight]:
    """The parameters of a model that a GEMM might read.

    Args:
      model: Any nnx module; its arrays may be abstract.

    Returns:
      By path, in the order of `nnx.state(model, nnx.Param)`; a shared Variable once,
      at the path that it has there.
    """
    holders: dict[int, list[tuple[Any, str]]] = {}
    rewritten: dict[int, str] = {}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, (nnx.WeightNorm, nnx.SpectralNorm)):
            rewritten[id(module.layer_instance)] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                holders.setdefault(id(value), []).append((module, name))
    weights = {}
    for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, keys))
        if not hasattr(param.get_value(), "shape"):  # a bare number, a tree of arrays
            continue
        weight = make_weight(path, param, holders.get(id(param), ()))
        norms = [rewritten[id(x)] for x in weight.layers if id(x) in rewritten]
        if norms:
            reason = f"{norms[0]} rewrites the weights of the layer inside it"
            candidate = dataclasses.replace(weight.candidate, reason=reason)
            weight = dataclasses.replace(weight, candidate=candidate)
        if is_weight(path, weight.ndim) and not isinstance(param, NMLogits):
            weights[path] = weight
    return weights


def make_weight(
    path: str, param: nnx.Variable, holders: Sequence[tuple[Any, str]]
) -> Weight:
    """What is known of a parameter from the modules that hold it.

    Args:
      path: Its path.
      param: The Variable.
      holders: Each module that has it as an attribute, with the attribute's name.
    """
    value = param.get_value()
    candidate = Candidate(path, tuple(value.shape), str(value.dtype))
    layers, others = [], []
    for module, name in holders:
        known = isinstance(module, LAYERS) and name == "kernel"
        (layers if known else others).append(module)
    if others or not layers:
        embedding = any(isinstance(module, nnx.Embed) for module in others)
        candidate = dataclasses.replace(
            candidate,
            layer=type(others[0]).__name__ if others else candidate.layer,
            reason=EMBEDDING if embedding else OWN_PARAMETER,
        )
        return Weight(param, (), candidate)
    uses = [_contracted_axes(layer) for layer in layers]
    reasons = [_why_not(layer, candidate.shape) for layer in layers]
    if any(axes != uses[0] for axes in uses):
        reasons.append(
            f"the layers that share it contract axes {' and '.join(map(str, uses))}: "
            "no single mask serves them"
        )
    candidate = dataclasses.replace(
        candidate,
        layer=type(layers[0]).__name__,
        axes=uses[0],
        out_axes=_output_axes(layers[0]),
        out_parts=getattr(layers[0], "feature_group_count", 1),
        stacked=tuple(range(-value.ndim, -len(_own_shape(layers[0])))),
        weight_only=isinstance(layers[0], nnx.ConvTranspose),
        reason=next(filter(None, reasons), ""),
        recipe=getattr(layers[0], "nm_recipe", None),
    )
    return Weight(param, tuple(layers), candidate)


def _own_shape(layer: Any) -> tuple[int, ...]:
    """The kernel's shape as the layer made it."""
    match layer:
        case nnx.Linear():
            return (layer.in_features, layer.out_features)
        case nnx.LinearGeneral():
            batch = layer.batch_axis.values()
            return (*batch, *layer.in_features, *layer.out_features)
    return tuple(layer.kernel_shape)


def _contracted_axes(layer: Any) -> tuple[int, ...]:
    """The kernel axes that the layer contracts, from the end; () if there are none."""
    ndim = len(_own_shape(layer))
    match layer:
        case nnx.LinearGeneral():
            first, number = len(layer.batch_axis), len(layer.in_features)
            return tuple(range(first - ndim, first - ndim + number))
        case nnx.ConvTranspose():
            return (-1,) if layer.transpose_kernel else (-2,)
        case nnx.Einsum():
            axes = einsum_axes(layer.einsum_str) or ()
            return tuple(axis - ndim for axis in axes)
    return (-2,)


def _output_axes(layer: Any) -> tuple[int, ...]:
    """The kernel axes that run over the layer's outputs, from the end."""
    ndim = len(_own_shape(layer))
    match layer:
        case nnx.LinearGeneral():
            first = len(layer.batch_axis) + len(layer.in_features)
            return tuple(range(first - ndim, 0))
        case nnx.ConvTranspose():
            return (-2,) if layer.transpose_kernel else (-1,)
        case nnx.Einsum():
            axes = einsum_out_axes(layer.einsum_str)
            return tuple(axis - ndim for axis in axes)
    return (-1,)


def _why_not(layer: Any, shape: tuple[int, ...]) -> str:
    """Why a known layer cannot take a sparse kernel, or ""."""
    own = _own_shape(layer)
    if shape[-len(own) :] != own:
        return f"its shape {shape} does not end in the layer's own {own}"
    for hook, defaults in _DEFAULT_HOOKS.items():
        if not any(vars(layer).get(hook) is default for default in defaults):
            return f"the layer has its own {hook}"
    if getattr(layer, "mask", None) is not None:
        return "the layer has its own mask"
    if no_hook := own_body(type(layer), LAYERS):
        return no_hook
    if not _contracted_axes(layer):
        return "its equation contracts no axis of the kernel"
    if isinstance(layer, nnx.Conv) and layer.feature_group_count > 1 and own[-2] == 1:
        return "depthwise: 1 input channel in each group"
    return ""

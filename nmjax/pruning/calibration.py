"""Calibration: what the layers of a model receive when it sees example batches.

The model runs on each batch as its author wrote it, one operation at a time, and every
call of a layer that the plan makes sparse is noted with its input.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.core import Tracer

from nmjax.paths import map_named, named_leaves
from nmjax.plans import Plan
from nmjax.pruning.layers import Layer
from nmjax.recording import equation_of
from nmjax.rules import Rules, layer_path
from nmjax.sparsity import Sparsity
from nmjax.swap import densify, plan

Batch = Any
"""The positional arguments of one call of the model: a tuple, or the only one."""

_Note = Callable[[Any, Any], None]  # (layer, its input)


class Calibration:
    """A model with its parameters, a plan and batches to run it on.

    Attributes:
      plan: What is to be sparse.
      params: The dense parameters, as the caller has them.
    """

    def __init__(
        self,
        model: Any,
        rules: Rules | Plan,
        batches: Iterable[Batch],
        variables: Mapping[str, Any] | None,
        kwargs: Mapping[str, Any] | None,
        masks: tuple[str, ...],
    ):
        """Makes the plan and checks what can be checked before the model runs.

        Args:
          model: A linen or nnx model.
          rules: What to prune.
          batches: Calibration inputs.
          variables: Variables of a linen model, None for nnx.
          kwargs: Keyword arguments of the model's call.
          masks: Which `Recipe.mask` the method can make.

        Raises:
          ValueError: There are no batches, or an array instead; a linen model came
            without variables or an nnx model with them; the plan has nothing sparse, or
            other masks.
          PlanError: As `nmjax.plan`.
        """
        if isinstance(batches, jax.Array | np.ndarray):
            raise ValueError(
                f"batches is one array of shape {batches.shape}, whose rows would be "
                "taken for batches: give a list of batches, [x]"
            )
        self._batches = [b if isinstance(b, tuple) else (b,) for b in batches]
        self._kwargs = dict(kwargs or {})
        if not self._batches:
            raise ValueError("no calibration batches: give at least one")
        linen = isinstance(model, nn.Module)
        if linen != (variables is not None):
            raise ValueError(
                "a linen model needs variables={'params': ..., ...}, and an nnx model "
                f"has its own: got a {type(model).__name__} "
                + ("without" if variables is None else "with")
            )
        if isinstance(rules, Plan):
            self.plan = rules
        elif linen:
            self.plan = plan(model, rules, *self._batches[0], **self._kwargs)
        else:
            self.plan = plan(model, rules)
        self._model = densify(model)
        if variables is not None:
            self._variables = dict(variables)
            self.params = self._variables["params"]
        else:
            import nmjax.nnx

            self.params = nmjax.nnx.params(self._model)
        self._check_plan(masks)

    def sparsity(self, path: str) -> Sparsity:
        """What the plan has for a sparse kernel."""
        return Sparsity.of(self.plan[path])

    def order(self) -> list[str]:
        """Paths of the sparse kernels in the order in which the model reads them.

        Raises:
          ValueError: As `inputs`.
        """
        paths = [entry.path for entry in self.plan.sparse]
        calls = self.inputs(self.params, paths)
        return list(dict.fromkeys(layer.path for layer, _ in calls))

    def inputs(
        self, params: Any, paths: Sequence[str]
    ) -> Iterator[tuple[Layer, jax.Array]]:
        """Runs the model and yields every call of the layers that are asked for.

        Args:
          params: Parameters to run it with, a tree like the attribute of this name.
          paths: Paths of kernels.

        Raises:
          ValueError: A layer was not called by any batch, or is part of a scan, vmap,
            remat or jit, out of which its input cannot be taken; or a kernel is read by
            layers that differ in more than their input, or a batch has no sample.
        """
        missing = dict.fromkeys(paths)
        first: dict[str, Layer] = {}
        for batch in self._batches:
            calls: list[tuple[Layer, jax.Array]] = []

            def note(path, module, x, calls=calls):
                if path in paths:
                    calls.append((Layer(path, module), x))

            self._run(params, batch, note)
            inside = sorted({lay.path for lay, x in calls if isinstance(x, Tracer)})
            if inside:
                raise ValueError(
                    f"{inside} are called inside a scan, vmap, remat or jit of the "
                    "model, out of which their inputs cannot be taken: build the model "
                    "without it for pruning, or leave them dense, "
                    f"nmjax.Rule({re.escape(layer_path(inside[0]))!r}, None)"
                )
            for layer, x in calls:
                missing.pop(layer.path, None)
                known = first.setdefault(layer.path, layer)
                if known.geometry != layer.geometry:
                    raise ValueError(
                        f"{layer.path} is read in two ways, {known.geometry} and "
                        f"{layer.geometry}: leave it dense, "
                        f"nmjax.Rule({re.escape(layer_path(layer.path))!r}, None)"
                    )
                if not x.size:
                    raise ValueError(
                        f"{layer.path} receives an input of shape {x.shape}: leave out "
                        "the batch that has no sample"
                    )
                yield layer, x
        if missing:
            raise ValueError(
                f"no calibration batch reaches {list(missing)} (or a transformation of "
                "the model hides them): leave them dense by a rule"
            )

    def _check_plan(self, masks: tuple[str, ...]) -> None:
        leaves = named_leaves(self.params)
        if not self.plan.sparse:
            reasons = {entry.path: entry.reason for entry in self.plan}
            raise ValueError(f"the plan makes nothing sparse: {reasons}")
        for entry in self.plan.sparse:
            path, recipe = entry.path, self.sparsity(entry.path).recipe
            if path not in leaves or tuple(leaves[path].shape) != entry.shape:
                raise ValueError(
                    f"the plan has {path} of shape {entry.shape}, the parameters do "
                    f"not; they have {list(leaves)}"
                )
            if recipe.mask not in masks:
                raise ValueError(
                    f"{path}: recipe {recipe.name!r} has mask={recipe.mask!r}, and "
                    f"this method prunes to masks of {masks}: give a pattern such as "
                    '"2:4" instead of the recipe'
                )

    def _run(self, params: Any, batch: tuple, note: Callable[..., None]) -> None:
        if isinstance(self._model, nn.Module):
            variables = {**self._variables, "params": params}
            noting = functools.partial(_note_linen, note, named_leaves(params))
            with nn.intercept_methods(noting):
                self._model.apply(variables, *batch, **self._kwargs)
        else:
            _run_nnx(self._model, params, batch, self._kwargs, note)


def with_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """The tree with other arrays at some paths, cast to the dtypes that it has there.

    Args:
      params: A tree of named arrays.
      new: Arrays by path.
    """

    def replace(path, leaf):
        return new[path].astype(leaf.dtype) if path in new else leaf

    return map_named(replace, params)


def _note_linen(note, leaves, next_function, args, kwargs, context):
    layer, path = context.module, _own_kernel(context.module, leaves)
    if context.method_name == "__call__" and path is not None:
        if getattr(layer, "nm_recipe", None) is not None:
            raise ValueError(
                f"{path}: the layer brings its own recipe, so its model is not dense: "
                "prune the model made of Flax's layers"
            )
        alone = layer.clone(parent=None)
        if isinstance(layer, nn.Einsum):
            alone = alone.clone(einsum_str=equation_of(layer, args, kwargs))
        note(path, alone, args[0] if args else kwargs.get("inputs"))
    return next_function(*args, **kwargs)


def _own_kernel(layer: nn.Module, leaves: Mapping[str, Any]) -> str | None:
    """Path of a layer's kernel; None where that is of a model that this one applies."""
    if layer.scope is None or not layer.scope.has_variable("params", "kernel"):
        return None
    path = "/".join((*layer.path, "kernel"))
    kernel = meta.unbox(layer.scope.get_variable("params", "kernel"))
    is_own = kernel is leaves.get(path) or isinstance(kernel, Tracer)
    return path if is_own else None


def _run_nnx(model, params, batch, kwargs, note) -> None:
    """Runs a copy of an nnx model in evaluation mode, its layers noting their calls."""
    from flax import nnx

    from nmjax.nnx.recording import find_weights

    copy = nnx.clone(model)
    nnx.update(copy, params)
    copy.eval()
    paths = {
        id(layer): path
        for path, weight in find_weights(copy).items()
        for layer in weight.layers
    }
    plain = {id(layer): layer for _, layer in nnx.iter_modules(copy)}
    with _noting(lambda layer, x: note(paths.get(id(layer), ""), layer, x)):
        for key in paths:
            cls = _noting_class(type(plain[key]))
            object.__setattr__(plain[key], "__class__", cls)
        copy(*batch, **kwargs)
    for key in paths:
        base = type(plain[key]).__mro__[1]
        object.__setattr__(plain[key], "__class__", base)


_NOTE: contextvars.ContextVar[_Note | None] = contextvars.ContextVar("note")


@contextlib.contextmanager
def _noting(note: _Note) -> Iterator[None]:
    token = _NOTE.set(note)
    try:
        yield
    finally:
        _NOTE.reset(token)


@functools.cache
def _noting_class(cls: Any) -> type:
    """The class of a layer that notes its calls before it makes them."""

    def call(self, *args, **kwargs):
        note = _NOTE.get()
        if note is not None:
            note(self, args[0] if args else kwargs["inputs"])
        return cls.__call__(self, *args, **kwargs)

    attributes = {"__call__": call, "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), attributes, pytree=cls._pytree__is_pytree)

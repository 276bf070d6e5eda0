"""Flax nnx layers with `recipe=`, and how a layer becomes one of them.

A sparse layer's class changes what Flax's own code reads as its hooks. What the layer
stores stays as Flax stored it: equal layers stay equal and share traces, and turning
one sparse or dense is a change of class and of one static attribute.
"""

import copyreg
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from flax import nnx

from nmjax.nnx.entries import (
    kept_entry,
    new_entries,
    remove,
    remove_entry,
    store_entry,
)
from nmjax.nnx.recording import make_weight
from nmjax.nnx.variables import NMFlipRate, NMKey, NMLogits, NMMask, NMNumber
from nmjax.pattern import NMPattern
from nmjax.planning import PlanError, check_sharding, make_plan
from nmjax.plans import PlanEntry
from nmjax.recipe import Recipe
from nmjax.recipes import as_recipe
from nmjax.rules import Rule
from nmjax.sparse_kernel import (
    ConvGeneralDilated,
    DotGeneral,
    MaskKernel,
    PromoteKernel,
    SparseKernel,
)
from nmjax.sparse_kernel import Einsum as EinsumOp
from nmjax.sparsity import MASKS, Sparsity

RecipeLike = Recipe | NMPattern | str | None


class _Hook:
    """An attribute of a layer that reads differently while the layer is sparse."""

    def __init__(self, sparse: Callable[[Any, Any], Any]):
        self.sparse = sparse

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.name not in vars(layer):
            raise AttributeError(f"{type(layer).__name__} has no {self.name!r}")
        own = vars(layer)[self.name]
        return own if layer.nm_sparsity is None else self.sparse(layer, own)

    def __set__(self, layer: Any, value: Any):
        vars(layer)[self.name] = value


class _SparseLayer(nnx.Module):
    """What the layers below share.

    Attributes:
      nm_base: The class that the layer has when it is dense.
      nm_recipe: The layer's own recipe, which no rule overrides, or None.
      nm_sparsity: What acts on the kernel, by the layer's recipe or by a rule. Its
        path names the class alone: layers that differ in place only are equal.
      nm_mask: The mask, where the recipe keeps it; so are the next five.
      nm_mask_dgrad: dgrad's own mask.
      nm_output_order: The order of outputs in which its groups run.
      nm_scale: β of a soft threshold.
      nm_temperature: τ of a learned mask.
      nm_flip_rate: Where the recipe refreshes the mask.
      nm_logits: Where the mask is learned.
      nm_key: Random bits of this step, where the recipe draws and has been given any.
      nm_mode: Whether it has `deterministic` for its learned mask alone, which is then
        without noise after `model.eval()`, as `nnx.Dropout` is.
    """

    kernel: nnx.Param
    nm_base: type[nnx.Module]
    nm_recipe: Recipe | None = None
    nm_sparsity: Sparsity | None = None
    nm_mask: NMMask | None = None
    nm_mask_dgrad: NMMask | None = None
    nm_output_order: NMNumber | None = None
    nm_scale: NMNumber | None = None
    nm_temperature: NMNumber | None = None
    nm_flip_rate: NMFlipRate | None = None
    nm_logits: NMLogits | None = None
    nm_key: NMKey | None = None
    nm_mode: bool = False

    def __init__(self, *args: Any, recipe: RecipeLike = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own = as_recipe(recipe)
        if not own.sparse:
            return
        self.nm_recipe = own
        weight = make_weight("kernel", self.kernel, [(self, "kernel")])
        made = make_plan([weight.candidate], [Rule(".*", own, ineligible="dense")])
        (entry,) = made
        if not entry.sparse:
            raise PlanError(
                f"{type(self).__name__} with a kernel of shape {entry.shape} cannot be "
                f"sparse ({entry.reason}): use recipe=None"
            )
        make_sparse(self, entry)
        kernel = {"kernel": self.kernel.get_value()}
        store_entry(weight, new_entries(kernel, made).get("kernel", {}))

    promote_dtype = _Hook(
        lambda layer, own: PromoteKernel(own, packed=True, wrap=layer.nm_kernel)
    )
    dot_general = _Hook(lambda layer, own: DotGeneral())
    conv_general_dilated = _Hook(lambda layer, own: ConvGeneralDilated())
    einsum_op = _Hook(lambda layer, own: EinsumOp())

    @property
    def set_view(self) -> Callable[..., None]:
        """What `nnx.view(model, deterministic=True)` calls, where there is any."""
        own = getattr(self.nm_base, "set_view", None)
        if own is not None:
            return functools.partial(own, self)
        if not self.nm_mode:
            raise AttributeError(f"{type(self).__name__} has no 'set_view'")
        return self._set_deterministic

    def _set_deterministic(self, deterministic: bool | None = None):
        if deterministic is not None:
            self.deterministic = deterministic

    def nm_kernel(self, kernel: jax.Array) -> SparseKernel:
        """What the layer's op reads in place of the plain kernel."""
        sparsity = cast(Sparsity, self.nm_sparsity)
        for axis in sparsity.group_axes:
            check_sharding(sparsity.path, kernel, axis, sparsity.recipe)
        entry = kept_entry(self, sparsity.path)
        for name in MASKS:
            if name in entry and entry[name].shape != kernel.shape:
                raise ValueError(
                    f"{sparsity.path} of shape {kernel.shape} meets a mask of shape "
                    f"{entry[name].shape}: a transformation that takes an axis of "
                    "nnx.Param must take it of the mask too, "
                    "nnx.StateAxes({nnx.Param: 0, nmjax.nnx.NMMask: 0, ...})"
                )
        quiet = sparsity.recipe.mask == "learned" and vars(self)["deterministic"]
        if self.nm_key is not None and not quiet:
            entry["key"] = self.nm_key[...]
        return SparseKernel(kernel, entry, sparsity.in_layer())


class _MaskedLayer(_SparseLayer):
    """Layers whose op cannot be replaced: it reads a kernel already masked."""

    promote_dtype = _Hook(
        lambda layer, own: MaskKernel(own, packed=True, wrap=layer.nm_kernel)
    )


class Linear(_SparseLayer, nnx.Linear):
    """`flax.nnx.Linear` with `recipe=`: kernel `(in, out)`, groups along in.

    Args:
      *args: Flax's own, as the rest of the keywords.
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.

    Raises:
      PlanError: The kernel cannot be sparse: m does not divide `in`, for example.
    """

    nm_base = nnx.Linear


class LinearGeneral(_SparseLayer, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with `recipe=`: groups along the last contracted axis.

    Args:
      *args: Flax's own, as the rest of the keywords.
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.

    Raises:
      PlanError: The kernel cannot be sparse: m does not divide the axis, for example.
    """

    nm_base = nnx.LinearGeneral


class Conv(_SparseLayer, nnx.Conv):
    """`flax.nnx.Conv` with `recipe=`: kernel HWIO, groups along input channels.

    Args:
      *args: Flax's own, as the rest of the keywords.
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.

    Raises:
      PlanError: The kernel cannot be sparse: the layer is depthwise, for example.
    """

    nm_base = nnx.Conv


class ConvTranspose(_MaskedLayer, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with `recipe=`: groups along input channels.

    Args:
      *args: Flax's own, as the rest of the keywords.
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.

    Raises:
      PlanError: The kernel cannot be sparse: m does not divide the axis, for example.
    """

    nm_base = nnx.ConvTranspose


class Einsum(_SparseLayer, nnx.Einsum):
    """`flax.nnx.Einsum` with `recipe=`: groups along the last contracted axis.

    Args:
      *args: Flax's own, as the rest of the keywords.
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.

    Raises:
      PlanError: The kernel cannot be sparse: the equation contracts none of its axes,
        for example.
    """

    nm_base = nnx.Einsum

    promote_dtype = _Hook(
        lambda layer, own: _einsum_promote(layer)(
            own, packed=True, wrap=layer.nm_kernel
        )
    )


def _einsum_promote(layer: Any) -> type[PromoteKernel]:
    """Where a masked weight is all, jnp.einsum reads it, of any equation."""
    return PromoteKernel if layer.nm_sparsity.recipe.needs_op else MaskKernel


_LAYERS = (Linear, LinearGeneral, Conv, ConvTranspose, Einsum)


class _SubclassMeta(type(nnx.Module)):
    """The type of the classes that `_sparse_class` makes: it lets them pickle."""

    nm_base: type


@functools.cache
def _sparse_class(cls: type) -> type:
    """What a layer's class becomes; the same for the same class.

    One of the layers above; for a user's subclass of Flax's layer, a subclass of both
    with the name of the user's.
    """
    if issubclass(cls, _SparseLayer):
        return cls
    layer = next(layer for layer in _LAYERS if issubclass(cls, layer.nm_base))
    if cls is layer.nm_base:
        return layer
    attributes = {
        "nm_base": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    pytree = cls._pytree__is_pytree
    return _SubclassMeta(cls.__name__, (layer, cls), attributes, pytree=pytree)


copyreg.pickle(_SubclassMeta, lambda cls: (_sparse_class, (cls.nm_base,)))


def make_sparse(layer: Any, entry: PlanEntry) -> bool:
    """Makes a layer follow an entry; whether that is new to it."""
    path = f"{type(layer).__name__} kernel"
    sparsity = dataclasses.replace(Sparsity.of(entry), path=path)
    if getattr(layer, "nm_sparsity", None) == sparsity:
        return False
    remove_entry(layer)
    object.__setattr__(layer, "__class__", _sparse_class(type(layer)))
    layer.nm_sparsity = sparsity
    if sparsity.recipe.mask == "learned" and "deterministic" not in vars(layer):
        layer.nm_mode, layer.deterministic = True, False
    return True


def make_dense(module: Any) -> None:
    """Takes from a module what `make_sparse` gave it, and a recipe of its own."""
    if not isinstance(module, _SparseLayer):
        return
    remove_entry(module)
    remove(module, "nm_recipe", "nm_sparsity")
    # A user's subclass of a layer of this module has no base: dense as it is now.
    base = vars(type(module)).get("nm_base", type(module))
    object.__setattr__(module, "__class__", base)

"""Flax linen layers with `recipe=`, and the hooks that make any linen layer sparse.

The layers here are Flax's own, with one more argument; without it they are exactly
Flax's:

    nmjax.linen.Dense(1024, recipe="2:4")

A recipe that keeps its mask reads it from the collection "nm":
`model.apply({"params": params, "nm": state}, x)`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
from flax import linen as nn

from nmjax.pattern import NMPattern
from nmjax.planning import PlanError
from nmjax.recipes import Recipe, as_recipe
from nmjax.recording import contracted_axes, own_hook, why_no_hook
from nmjax.sparse_kernel import (
    ConvGeneralDilated,
    DotGeneral,
    KernelBox,
    MaskKernel,
    PromoteKernel,
    SparseKernel,
    Sparsity,
)

_Base = nn.Module if TYPE_CHECKING else object

RecipeLike = Recipe | NMPattern | str | None


@contextlib.contextmanager
def hooked(
    layer: nn.Module, wrap: Callable[[jax.Array], SparseKernel] | None = None
) -> Iterator[None]:
    """Lets a bound Flax layer read a sparse kernel, for the length of one call.

    Args:
      layer: A bound Dense, DenseGeneral, Conv, ConvTranspose or Einsum.
      wrap: Makes the layer's plain kernel sparse; None where it comes in a box.
    """
    own = layer.promote_dtype
    if isinstance(own, PromoteKernel):
        yield
        return
    match layer:
        case nn.Dense() | nn.DenseGeneral():
            op = {"dot_general": DotGeneral()}
        case nn.Conv():
            op = {"conv_general_dilated": ConvGeneralDilated()}
        case _:
            op = {}
    promote = PromoteKernel if op else MaskKernel
    hooks = {"promote_dtype": promote(own, wrap=wrap), **op}
    saved = {name: getattr(layer, name) for name in hooks}
    try:
        for name, hook in hooks.items():
            object.__setattr__(layer, name, hook)
        yield
    finally:
        for name, value in saved.items():
            object.__setattr__(layer, name, value)


_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.Einsum)


def hook_boxed_layers(next_function, args, kwargs, context):
    """Interceptor: hooks each layer whose kernel comes in a box."""
    layer, scope = context.module, context.module.scope
    if isinstance(layer, _LAYERS) and context.method_name == "__call__" and scope:
        if isinstance(scope.get_variable("params", "kernel"), KernelBox):
            with hooked(layer):
                return next_function(*args, **kwargs)
    return next_function(*args, **kwargs)


class _Layer(_Base):
    """What the layers below share: a recipe of their own."""

    recipe: RecipeLike

    @property
    def nm_recipe(self) -> Recipe | None:
        """The layer's recipe, or None where it is dense."""
        recipe = as_recipe(self.recipe)
        return recipe if recipe.sparse else None

    def _hooked(self, *args, **kwargs):
        recipe = self.nm_recipe
        if recipe is None or recipe.pattern is None:
            return contextlib.nullcontext()
        m, scope, taken = recipe.pattern.m, self.scope, own_hook(self)

        def wrap(kernel):
            path = "/".join((*self.path, "kernel"))
            axes = contracted_axes(self, kernel.ndim, args, kwargs)
            reason = taken or why_no_hook(self, kernel.shape)
            if axes is None:
                raise PlanError(f"{path}: the equation contracts no axis of the kernel")
            size = kernel.shape[axes[-1]]
            if not reason and size % m:
                reason = f"the contracted axis has size {size}, not a multiple of {m}"
            if reason:
                raise PlanError(f"{path} cannot be sparse ({reason}): use recipe=None")
            stored = (scope.get_variable("nm", "kernel") if scope else None) or {}
            sparsity = Sparsity(path, recipe, axes[-1] - kernel.ndim)
            return SparseKernel(kernel, stored.get("mask"), sparsity)

        return hooked(self, wrap)


class Dense(_Layer, nn.Dense):
    """`flax.linen.Dense` with `recipe=`: kernel `(in, out)`, groups along in.

    Attributes:
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.
    """

    recipe: RecipeLike = None

    @nn.compact
    def __call__(self, inputs):
        """Applies the layer to inputs `(…, in)`; returns `(…, out)`."""
        with self._hooked(inputs):
            return super().__call__(inputs)


class DenseGeneral(_Layer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with `recipe=`: groups along the last contracted axis.

    Attributes:
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.
    """

    recipe: RecipeLike = None

    @nn.compact
    def __call__(self, inputs):
        """Applies the layer as Flax's does."""
        with self._hooked(inputs):
            return super().__call__(inputs)


class Conv(_Layer, nn.Conv):
    """`flax.linen.Conv` with `recipe=`: kernel HWIO, groups along input channels.

    Attributes:
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.
    """

    recipe: RecipeLike = None

    @nn.compact
    def __call__(self, inputs):
        """Applies the layer to inputs `(*batch, *space, in)`."""
        with self._hooked(inputs):
            return super().__call__(inputs)


class ConvTranspose(_Layer, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with `recipe=`: groups along input channels.

    Attributes:
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.
    """

    recipe: RecipeLike = None

    @nn.compact
    def __call__(self, inputs):
        """Applies the layer to inputs `(*batch, *space, in)`."""
        with self._hooked(inputs):
            return super().__call__(inputs)


class Einsum(_Layer, nn.Einsum):
    """`flax.linen.Einsum` with `recipe=`: groups along the last contracted axis.

    Attributes:
      recipe: A recipe, a pattern such as "2:4" (SR-STE), or None: dense.
    """

    recipe: RecipeLike = None

    @nn.compact
    def __call__(self, inputs, einsum_str=None):
        """Applies the equation to inputs and kernel."""
        with self._hooked(inputs, einsum_str):
            return super().__call__(inputs, einsum_str)

"""Flax linen layers with `recipe=`, and the hooks that make any linen layer sparse.

The layers here are Flax's own, with one more argument; without it they are exactly
Flax's:

    nmjax.linen.Dense(1024, recipe="2:4")

A recipe that keeps its mask reads it from the collection "nm", one that learns it from
"nm_logits", and one that draws from the rng stream "nm":
`model.apply({"params": params, "nm": state}, x, rngs={"nm": key})`. While a layer is
initialised it chooses its mask from the new weight.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from nmjax.pattern import NMPattern
from nmjax.planning import Candidate, PlanError, make_plan
from nmjax.recipe import Recipe
from nmjax.recipes import as_recipe
from nmjax.recording import (
    LAYERS,
    contracted_axes,
    equation_of,
    is_recording,
    output_axes,
    own_hook,
    why_no_hook,
)
from nmjax.rules import Rule
from nmjax.sparse_kernel import (
    ConvGeneralDilated,
    DotGeneral,
    KernelBox,
    MaskKernel,
    PromoteKernel,
    SparseKernel,
)
from nmjax.sparse_kernel import (
    Einsum as EinsumOp,
)
from nmjax.sparsity import Sparsity

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


def hook_boxed_layers(next_function, args, kwargs, context):
    """Interceptor: hooks each layer whose kernel comes in a box."""
    layer, scope = context.module, context.module.scope
    if isinstance(layer, LAYERS) and context.method_name == "__call__" and scope:
        box = scope.get_variable("params", "kernel")
        if isinstance(box, KernelBox):
            if isinstance(layer, nn.Einsum) and box.sparsity.recipe.needs_op:
                bias = scope.get_variable("params", "bias")
                return _einsum(layer, box.unbox(), meta.unbox(bias), args, kwargs)
            with hooked(layer):
                return next_function(*args, **kwargs)
    return next_function(*args, **kwargs)


def _einsum(
    layer: nn.Einsum, kernel: SparseKernel, bias: Any, args: tuple, kwargs: dict
) -> jax.Array:
    """What `flax.linen.Einsum` computes, by an op that it has no hook for."""
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
    equation = equation_of(layer, args, kwargs).replace(" ", "")
    promote = PromoteKernel(layer.promote_dtype)
    shape = None
    if bias is not None:
        _, shape = layer._get_bias_shape(equation, inputs, kernel.value)
    inputs, kernel, bias = promote(inputs, kernel, bias, dtype=layer.dtype)
    y = EinsumOp()(
        equation,
        inputs,
        kernel,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    return y if bias is None else y + jnp.reshape(bias, shape)


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
        if recipe is None:
            return contextlib.nullcontext()
        taken = own_hook(self)  # before our own hook is there
        return hooked(self, lambda kernel: self._sparse(kernel, taken, args, kwargs))

    def _sparse(self, kernel, taken: str, args, kwargs) -> SparseKernel:
        """The kernel with the layer's recipe, or what forbids it."""
        path = "/".join((*self.path, "kernel"))
        ndim, axes = kernel.ndim, contracted_axes(self, kernel.ndim, args, kwargs)
        if axes is None:
            raise PlanError(f"{path}: the equation contracts no axis of the kernel")
        candidate = Candidate(
            path,
            kernel.shape,
            str(kernel.dtype),
            type(self).__name__,
            axes=tuple(axis - ndim for axis in axes),
            out_axes=tuple(a - ndim for a in output_axes(self, ndim, args, kwargs)),
            out_parts=getattr(self, "feature_group_count", 1),
            weight_only=isinstance(self, nn.ConvTranspose),
            reason=taken or why_no_hook(self, kernel.shape),
        )
        rules = [Rule(".*", self.nm_recipe, ineligible="dense")]
        (entry,) = make_plan([candidate], rules)
        if not entry.sparse:
            raise PlanError(f"{path} cannot be sparse ({entry.reason}): recipe=None")
        sparsity = Sparsity.of(entry)
        return SparseKernel(kernel, self._entry(sparsity, kernel), sparsity)

    def _entry(self, sparsity: Sparsity, kernel: jax.Array) -> dict[str, Any]:
        """What the collections hold for the kernel."""
        recipe, scope = sparsity.recipe, self.scope
        if is_recording() or self.is_initializing():
            logits = recipe.mask == "learned"
            more = {"logits": sparsity.init_logits(kernel)} if logits else {}
            return {**sparsity.init(kernel), **more}
        entry = dict((scope.get_variable("nm", "kernel") if scope else None) or {})
        if scope and scope.has_variable("nm_logits", "kernel"):
            entry["logits"] = scope.get_variable("nm_logits", "kernel")
        if recipe.draws and self.has_rng("nm"):
            entry["key"] = self.make_rng("nm")
        return entry


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
        recipe = self.nm_recipe
        if recipe is None or not recipe.needs_op:
            with self._hooked(inputs, einsum_str):
                return super().__call__(inputs, einsum_str)
        args = (inputs, einsum_str)
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias = None
        if self.use_bias:
            equation = equation_of(self, args, {}).replace(" ", "")
            shape, _ = self._get_bias_shape(equation, inputs, kernel)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        if not isinstance(kernel, SparseKernel):
            kernel = self._sparse(kernel, own_hook(self), args, {})
        return _einsum(self, kernel, bias, args, {})

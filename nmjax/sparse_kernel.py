"""A kernel that carries its recipe: what reaches a layer in place of a plain array.

`SparseKernel` is what a layer's hooks see: the master weight as stored, the mask if
one is kept in the state, and the static facts. `KernelBox` is its form inside a
variable tree: a Flax metadata box, so it travels through the model's own scan, vmap,
remat and jit, and Flax itself opens it where the layer asks for its parameter. The
recipe sits in the tree structure and is thereby part of every jit key. Boxes live for
the length of one call.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.core import meta
from jax import lax

from nmjax import estimators
from nmjax.masks import Ragged, magnitude_mask
from nmjax.ops import nm_conv, nm_dot_general
from nmjax.paths import map_named
from nmjax.pattern import NMPattern
from nmjax.planning import Plan, PlanEntry
from nmjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The static facts of one sparse parameter.

    Attributes:
      path: Slash-joined path, for messages.
      recipe: Always sparse.
      axis: The axis along which groups run, counted from the end.
      ragged: As in `nmjax.Rule`.
    """

    path: str
    recipe: Recipe
    axis: int
    ragged: Ragged | None = None

    @classmethod
    def of(cls, entry: PlanEntry) -> "Sparsity":
        """The facts that a sparse entry of a plan holds.

        Raises:
          ValueError: The entry is dense.
        """
        if entry.recipe is None:
            raise ValueError(f"{entry.path} is dense in this plan: {entry.reason}")
        return cls(entry.path, entry.recipe, entry.axis, entry.ragged)

    @property
    def pattern(self) -> NMPattern:
        """The recipe's pattern."""
        return cast(NMPattern, self.recipe.pattern)

    def choose_mask(self, w: jax.Array) -> jax.Array:
        """The mask of `w` as stored: bool, its shape, True = kept."""
        return magnitude_mask(w, self.pattern, axis=self.axis, ragged=self.ragged)

    def mask(self, w: jax.Array, stored: jax.Array | None) -> jax.Array:
        """The mask that acts on `w`: the stored one if there is one.

        Raises:
          ValueError: The recipe keeps its mask in the state and there is none, or
            the stored one has another shape.
        """
        if stored is None:
            if self.recipe.needs_state:
                raise ValueError(
                    f"{self.path}: recipe {self.recipe.name!r} keeps its mask in the "
                    "state and none was given; call state = nmjax.init_state(params, "
                    'plan) and pass it: model.apply({"params": params, "nm": state}, '
                    "...)"
                )
            return self.choose_mask(w)
        if stored.shape != w.shape:
            raise ValueError(
                f"{self.path}: the state holds a mask of shape {stored.shape} for a "
                f"weight of shape {w.shape}; make it anew with nmjax.init_state"
            )
        return stored

    def apply(self, w: jax.Array, stored: jax.Array | None = None) -> jax.Array:
        """The masked weight with the gradient that the recipe prescribes.

        Args:
          w: Master weight as stored.
          stored: Mask from the state, or None.

        Returns:
          Shape and dtype of `w`.

        Raises:
          ValueError: As `mask`.
        """
        recipe, mask = self.recipe, self.mask(w, stored)
        if recipe.gradient == "masked":
            return estimators.masked(w, mask)
        decay = recipe.decay if recipe.decay_in == "op" else 0
        return estimators.straight_through(w, mask, decay)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseKernel:
    """What a layer reads instead of its kernel: not an array, but becomes one.

    Attributes:
      value: Master weight as stored.
      mask: Mask from the state, or None.
      sparsity: The static facts.
      compute_dtype: What the masked weight is cast to; None = the master's dtype.
    """

    value: jax.Array
    mask: jax.Array | None
    sparsity: Sparsity
    compute_dtype: Any = None

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.compute_dtype or self.value.dtype)

    def astype(self, dtype: Any) -> "SparseKernel":
        """The same kernel, to be cast once its mask has been chosen."""
        return dataclasses.replace(self, compute_dtype=dtype)

    def masked(self) -> jax.Array:
        """The masked weight in the compute dtype, differentiable."""
        return self.sparsity.apply(self.value, self.mask).astype(self.dtype)

    def __jax_array__(self) -> jax.Array:
        """Lets jnp functions that convert their arguments read the masked weight."""
        return self.masked()


@jax.tree_util.register_pytree_with_keys_class
class KernelBox(meta.AxisMetadata):
    """A `SparseKernel` in a variable tree; Flax opens it where the layer reads it."""

    def __init__(self, value: Any, mask: Any, sparsity: Sparsity):
        """Children of the pytree: `value` and `mask`; static: `sparsity`."""
        self.value, self.mask, self.sparsity = value, mask, sparsity

    def tree_flatten_with_keys(self):
        """Keys, children and static data, as jax asks for them."""
        attribute = jax.tree_util.GetAttrKey
        children = ((attribute("value"), self.value), (attribute("mask"), self.mask))
        return children, self.sparsity

    @classmethod
    def tree_unflatten(cls, sparsity, children):
        """The inverse of `tree_flatten_with_keys`."""
        value, mask = children
        return cls(value, mask, sparsity)

    def unbox(self) -> SparseKernel:
        """What the layer's `self.param` returns."""
        return SparseKernel(self.value, self.mask, self.sparsity)

    def replace_boxed(self, val: Any) -> "KernelBox":
        """The same box around another value."""
        return KernelBox(val, self.mask, self.sparsity)

    def remove_axis(self, index: int, params: Any) -> "KernelBox":
        """For the inside of a scan or vmap that takes axis `index` off `value`."""
        del params
        ndim, axis = self.value.ndim, self.sparsity.axis
        return self._with_axis(axis + (index % ndim > ndim + axis))

    def add_axis(self, index: int, params: Any) -> "KernelBox":
        """For the outside of a scan or vmap that put axis `index` into `value`."""
        del params
        ndim, axis = self.value.ndim, self.sparsity.axis
        return self._with_axis(axis - (index % ndim >= ndim + axis))

    def _with_axis(self, axis: int) -> "KernelBox":
        sparsity = dataclasses.replace(self.sparsity, axis=axis)
        return KernelBox(self.value, self.mask, sparsity)


@dataclasses.dataclass(frozen=True)
class PromoteKernel:
    """Hook for `promote_dtype`: the master weight reaches the op, uncast.

    Flax casts the kernel to the compute dtype before the op sees it, and a mask
    chosen from the cast copy differs. `own` is the layer's function; `packed` says
    whether it takes its operands as one tuple (nnx) or one by one (linen); `wrap`
    makes a plain kernel sparse (drop-in layers).
    """

    own: Callable[..., Any]
    packed: bool = False
    wrap: Callable[[jax.Array], SparseKernel] | None = None

    def __call__(self, *operands: Any, dtype: Any = None) -> tuple[Any, Any, Any]:
        """Promotes activations and bias; the kernel remembers its dtype."""
        x, kernel, bias = operands[0] if self.packed else operands
        if not isinstance(kernel, SparseKernel):
            if self.wrap is None:
                return self.own(*operands, dtype=dtype)
            kernel = self.wrap(kernel)
        plain = (x, kernel.value, bias)
        x, cast, bias = self.own(*((plain,) if self.packed else plain), dtype=dtype)
        return x, kernel.astype(cast.dtype), bias


@dataclasses.dataclass(frozen=True)
class MaskKernel(PromoteKernel):
    """Hook for `promote_dtype` in layers whose op cannot be replaced."""

    def __call__(self, *operands: Any, dtype: Any = None) -> tuple[Any, Any, Any]:
        """Promotes all three; the kernel comes out masked."""
        x, kernel, bias = super().__call__(*operands, dtype=dtype)
        if isinstance(kernel, SparseKernel):
            kernel = kernel.masked()
        return x, kernel, bias


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """Hook for `dot_general`: three GEMMs with a sparse kernel, else lax."""

    def __call__(self, x: Any, kernel: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """As `lax.dot_general`."""
        if not isinstance(kernel, SparseKernel):
            return lax.dot_general(x, kernel, *args, **kwargs)
        return nm_dot_general(x, kernel.masked(), *args, **_without_out(kwargs))


@dataclasses.dataclass(frozen=True)
class ConvGeneralDilated:
    """Hook for `conv_general_dilated`: three GEMMs with a sparse kernel, else lax."""

    def __call__(self, x: Any, kernel: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """As `lax.conv_general_dilated`."""
        if not isinstance(kernel, SparseKernel):
            return lax.conv_general_dilated(x, kernel, *args, **kwargs)
        return nm_conv(x, kernel.masked(), *args, **_without_out(kwargs))


OPS = (DotGeneral, ConvGeneralDilated)


def _without_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drops nnx's `out_sharding` where it says nothing, refuses it where it does."""
    if kwargs.pop("out_sharding", None) is not None:
        raise NotImplementedError(
            "out_sharding with a sparse kernel is not supported: constrain the output "
            "with jax.lax.with_sharding_constraint instead"
        )
    return kwargs


def box_kernels(params: Any, plan: Plan, masks: dict[str, jax.Array]) -> Any:
    """Puts every sparse kernel of `params` into its box, for one call."""
    sparse = {entry.path: Sparsity.of(entry) for entry in plan.sparse}

    def box(path, leaf):
        if path not in sparse:
            return leaf
        return KernelBox(jnp.asarray(leaf), masks.get(path), sparse[path])

    return map_named(box, params, keep_boxes=False)


def open_boxes(tree: Any) -> Any:
    """The plain tree: every kernel box replaced by its master weight."""
    is_box = lambda node: isinstance(node, KernelBox)  # noqa: E731
    return jax.tree.map(lambda n: n.value if is_box(n) else n, tree, is_leaf=is_box)

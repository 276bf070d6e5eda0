"""A kernel that carries its recipe: what reaches a layer in place of a plain array.

`SparseKernel` is what a layer's hooks see: the master weight as stored, the mask if
one is kept in the state, and the static facts. `KernelBox` is its form inside a
variable tree: a Flax metadata box, so it travels through the model's own scan, vmap,
remat and jit, and Flax itself opens it where the layer asks for its parameter. The
recipe sits in the tree structure and is thereby part of every jit key. Boxes live for
the length of one call.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax import lax

from nmjax.ops import nm_conv, nm_dot_general, nm_einsum
from nmjax.paths import map_named
from nmjax.plans import Plan
from nmjax.sparsity import NO_KEY, Sparsity


@dataclasses.dataclass(frozen=True, eq=False)
class SparseKernel:
    """What a layer reads instead of its kernel: not an array, but becomes one.

    Attributes:
      value: Master weight as stored.
      entry: What the state holds for it, with logits and key where there are any.
      sparsity: The static facts.
      compute_dtype: What the masked weight is cast to; None = the master's dtype.
    """

    value: jax.Array
    entry: Mapping[str, jax.Array]
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
        """The weight that fprop reads, in the compute dtype, differentiable."""
        return self.sparsity.apply(self.value, self.entry).astype(self.dtype)

    def aux(self) -> dict[str, Any]:
        """What the three GEMMs need besides: keyword arguments of `nmjax.ops`."""
        w_dgrad = self.sparsity.apply_dgrad(self.value, self.entry)
        order, key = self.entry.get("output_order"), self.entry.get("key")
        return {
            "recipe": self.sparsity.recipe,
            "w_dgrad": None if w_dgrad is None else w_dgrad.astype(self.dtype),
            "dgrad_order": None if order is None else order.ravel(),
            "key": None if key is None else key.reshape(-1)[0],
            "no_key": f"{self.sparsity.path}: {NO_KEY}",
        }

    def __jax_array__(self) -> jax.Array:
        """Lets jnp functions that convert their arguments read the masked weight."""
        return self.masked()


@jax.tree_util.register_pytree_with_keys_class
class KernelBox(meta.AxisMetadata):
    """A `SparseKernel` in a variable tree; Flax opens it where the layer reads it.

    All arrays of `entry` have the rank of `value`, logits in their flat form, so that
    a transformation of the model slices them as it slices the kernel.
    """

    def __init__(self, value: Any, entry: Any, sparsity: Sparsity):
        """Children of the pytree: `value` and `entry`; static: `sparsity`."""
        self.value, self.entry, self.sparsity = value, entry, sparsity

    # Of the weight, for a model that asks: to read values by hand is refused.
    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.value.dtype)

    def tree_flatten_with_keys(self):
        """Keys, children and static data, as jax asks for them."""
        attribute = jax.tree_util.GetAttrKey
        children = ((attribute("value"), self.value), (attribute("entry"), self.entry))
        return children, self.sparsity

    @classmethod
    def tree_unflatten(cls, sparsity, children):
        """The inverse of `tree_flatten_with_keys`."""
        value, entry = children
        return cls(value, entry, sparsity)

    def unbox(self) -> SparseKernel:
        """What the layer's `self.param` returns."""
        entry = dict(self.entry)
        if "logits" in entry:
            entry["logits"] = self.sparsity.unflat_logits(entry["logits"])
        return SparseKernel(self.value, entry, self.sparsity.in_layer())

    def replace_boxed(self, val: Any) -> "KernelBox":
        """The same box around another value."""
        return KernelBox(val, self.entry, self.sparsity)

    def remove_axis(self, index: int, params: Any) -> "KernelBox":
        """For the inside of a scan or vmap that takes axis `index` off `value`."""
        del params
        ndim = self.value.ndim
        return self._with_axes(lambda axis: axis + (index % ndim > ndim + axis))

    def add_axis(self, index: int, params: Any) -> "KernelBox":
        """For the outside of a scan or vmap that put axis `index` into `value`."""
        del params
        ndim = self.value.ndim
        return self._with_axes(lambda axis: axis - (index % ndim >= ndim + axis))

    def _with_axes(self, move: Callable[[int], int]) -> "KernelBox":
        sparsity = dataclasses.replace(
            self.sparsity,
            axis=move(self.sparsity.axis),
            out_axis=move(self.sparsity.out_axis),
        )
        return KernelBox(self.value, self.entry, sparsity)


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
        kwargs = _without_out(kwargs) | kernel.aux()
        return nm_dot_general(x, kernel.masked(), *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class ConvGeneralDilated:
    """Hook for `conv_general_dilated`: three GEMMs with a sparse kernel, else lax."""

    def __call__(self, x: Any, kernel: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """As `lax.conv_general_dilated`."""
        if not isinstance(kernel, SparseKernel):
            return lax.conv_general_dilated(x, kernel, *args, **kwargs)
        kwargs = _without_out(kwargs) | kernel.aux()
        return nm_conv(x, kernel.masked(), *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Einsum:
    """Hook for `einsum_op`: three GEMMs with a sparse kernel, else jnp."""

    def __call__(self, equation: str, x: Any, kernel: Any, **kwargs: Any) -> jax.Array:
        """As `jnp.einsum` of two operands."""
        if not isinstance(kernel, SparseKernel):
            return jnp.einsum(equation, x, kernel, **kwargs)
        kwargs = _without_out(kwargs) | kernel.aux()
        return nm_einsum(equation, x, kernel.masked(), **kwargs)


OPS = (DotGeneral, ConvGeneralDilated, Einsum)


def _without_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drops nnx's `out_sharding` where it says nothing, refuses it where it does."""
    if kwargs.pop("out_sharding", None) is not None:
        raise NotImplementedError(
            "out_sharding with a sparse kernel is not supported: constrain the output "
            "with jax.lax.with_sharding_constraint instead"
        )
    return kwargs


def box_kernels(
    params: Any,
    plan: Plan,
    entries: Mapping[str, Mapping[str, jax.Array]],
    logits: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> Any:
    """Puts every sparse kernel of `params` into its box, for one call.

    Args:
      params: Parameter tree.
      plan: The plan.
      entries: By path, what the state holds.
      logits: By path, logits of learned masks.
      key: PRNG key of the call, or None; each parameter draws from it by its path.
    """
    sparse = {entry.path: Sparsity.of(entry) for entry in plan.sparse}

    def box(path, leaf):
        if path not in sparse:
            return leaf
        sparsity, w = sparse[path], jnp.asarray(leaf)
        entry = dict(entries.get(path, {}))
        if path in logits:
            entry["logits"] = sparsity.flat_logits(logits[path])
        if key is not None and sparsity.recipe.draws:
            entry["key"] = keys_of(key, sparsity, w.shape)
        return KernelBox(w, entry, sparsity)

    return map_named(box, params, keep_boxes=False)


def keys_of(key: jax.Array, sparsity: Sparsity, shape: tuple[int, ...]) -> jax.Array:
    """The keys of a parameter for one call: one, or one for each that is stacked."""
    return jax.random.split(sparsity.own_key(key), sparsity.number_shape(shape))


def open_boxes(tree: Any) -> Any:
    """The plain tree: every kernel box replaced by its master weight.

    What has no box comes back as it is.
    """
    is_box = lambda node: isinstance(node, KernelBox)  # noqa: E731
    try:
        nodes = jax.tree.leaves(tree, is_leaf=is_box)
    except ValueError:  # a dictionary whose keys have no order: no tree of jax's
        return tree
    if not any(map(is_box, nodes)):
        return tree
    return jax.tree.map(lambda n: n.value if is_box(n) else n, tree, is_leaf=is_box)

"""A Flax layer taken out of its model: its function, and the GEMM that it is.

A layer multiplies features of its input by its kernel, seen as a matrix (k, out):

    y = φ(x) · W          φ(x): (samples, k)

For a Dense layer φ(x) is x; for a convolution, the patches under the window. A
convolution with f feature groups is f such products side by side. φ comes from the
layer itself: with the identity as its kernel it returns the features, whatever its
strides, padding and dilation are.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Parameters = dict[str, Any]
"""A layer's own: "kernel", and "bias" where it has one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer, by its parameters' paths.

    Attributes:
      path: Path of its kernel.
      module: The layer: a linen module that is not bound, or an nnx module.
    """

    path: str
    module: Any

    @property
    def bias_path(self) -> str:
        """Path of its bias, which may not exist."""
        return self.path.removesuffix("kernel") + "bias"

    def __call__(self, parameters: Parameters, x: jax.Array) -> jax.Array:
        """The layer's output in float32, for an input as it came in the model."""
        module, bias = self.module, parameters.get("bias")
        if isinstance(module, nn.Module):
            module = _linen(module, use_bias=bias is not None)
            return module.apply({"params": parameters}, x.astype(jnp.float32))
        return _nnx(module, parameters["kernel"], bias)(x.astype(jnp.float32))

    @property
    def groups(self) -> int:
        """Number of feature groups; 1 for all but grouped convolutions."""
        return getattr(self.module, "feature_group_count", 1)

    def features(self, x: jax.Array, k: int) -> jax.Array:
        """φ(x) for each feature group: (groups, samples, k) in float32.

        Args:
          x: The layer's input.
          k: Number of rows of the kernel as a matrix.
        """
        window = self._window(x, k)
        identity = jnp.tile(jnp.eye(k, dtype=jnp.float32), (1, self.groups))
        kernel = identity.reshape(*window, -1)
        if getattr(self.module, "transpose_kernel", False):
            kernel = jnp.swapaxes(kernel, -1, -2)
        x, module = x.astype(jnp.float32), self.module
        if isinstance(module, nn.Module):
            module = _linen(module, use_bias=False, features=kernel.size // k)
            y = module.apply({"params": {"kernel": kernel}}, x)
        else:
            y = _nnx(module, kernel, None)(x)
        return jnp.moveaxis(y.reshape(-1, self.groups, k), 1, 0)

    def _window(self, x: jax.Array, k: int) -> tuple[int, ...]:
        """The kernel's axes that make up its k rows."""
        match type(self.module).__name__:
            case "DenseGeneral" | "LinearGeneral":
                axes = self.module.axis
                axes = (axes,) if isinstance(axes, int) else tuple(axes)
                return tuple(x.shape[axis] for axis in axes)
        size = getattr(self.module, "kernel_size", ())
        size = (size,) if isinstance(size, int) else tuple(size)
        return (*size, k // math.prod(size))


def why_not_a_gemm(layer: Layer) -> str:
    """Why the kernel of a layer is no matrix behind features of its input, or ""."""
    module, cls = layer.module, type(layer.module)
    if cls.__module__.startswith("flax."):
        match cls.__name__:
            case "Dense" | "Linear" | "Conv" | "ConvTranspose":
                return ""
            case "DenseGeneral" if module.batch_dims == ():
                return ""
            case "LinearGeneral" if not module.batch_axis:
                return ""
            case "DenseGeneral" | "LinearGeneral":
                return "its kernel has batch dimensions"
    return f"{cls.__name__} is not a layer whose features are known"


def to_matrices(kernel: jax.Array, axes: tuple[int, ...], groups: int) -> jax.Array:
    """A kernel as matrices: (groups, k, out / groups), N:M groups along k.

    Args:
      kernel: As the layer has it.
      axes: The axes that the GEMM contracts, counted from the end, as in the plan.
      groups: Number of feature groups.
    """
    rows, columns = _split(kernel.ndim, axes)
    moved = jnp.transpose(kernel, rows + columns)
    k = math.prod(kernel.shape[axis] for axis in rows)
    return jnp.moveaxis(moved.reshape(k, groups, -1), 1, 0)


def from_matrices(
    matrices: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]
) -> jax.Array:
    """The inverse of `to_matrices`, for a kernel of `shape`."""
    rows, columns = _split(len(shape), axes)
    order = rows + columns
    moved = jnp.moveaxis(matrices, 0, 1).reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(shape))])


def _split(ndim: int, axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes from the front: those of the rows, that of the groups last; the others.

    A kernel's outputs follow what it contracts. A transposed kernel (…, out, in) alone
    has them before; what comes before a single contracted axis otherwise is a window.
    """
    axes = tuple(axis % ndim for axis in axes)
    last = axes[-1]
    columns = tuple(range(last + 1, ndim)) or (last - 1,)
    return tuple(axis for axis in range(ndim) if axis not in columns), columns


def _linen(module: nn.Module, **fields: Any) -> Any:
    return module.clone(
        parent=None,
        dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        **fields,
    )


def _nnx(module: Any, kernel: jax.Array, bias: jax.Array | None) -> Any:
    from flax import nnx

    module = nnx.clone(module)
    module.kernel = nnx.Param(kernel)
    module.bias = nnx.data(None) if bias is None else nnx.Param(bias)
    module.use_bias = bias is not None
    module.dtype, module.precision = jnp.float32, jax.lax.Precision.HIGHEST
    return module

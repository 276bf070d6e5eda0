"""A Flax layer taken out of its model: its function, and the GEMM that it is.

A layer multiplies features of its input by its kernel, seen as a matrix (k, out):

    y = φ(x) · W          φ(x): (samples, k)

For a Dense layer φ(x) is x; for a convolution, the patches under the window. A
convolution with f feature groups is f such products side by side, and an Einsum is one
for each value of the letters that all its operands share. φ comes from the layer
itself: with the identity as its kernel it returns the features, whatever its strides,
padding and dilation are; that of an Einsum, from its equation.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nmjax.equation import Equation

_GEOMETRY = (
    *("axis", "batch_dims", "batch_axis", "einsum_str", "kernel_size", "strides"),
    *("padding", "input_dilation", "kernel_dilation", "feature_group_count"),
    "transpose_kernel",
)

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
    def geometry(self) -> dict[str, Any]:
        """What its features depend on besides its input."""
        found = {name: getattr(self.module, name, None) for name in _GEOMETRY}
        present = {name: x for name, x in found.items() if x is not None}
        return {"layer": type(self.module).__name__, **present}

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

    def matrices(self, ndim: int, axes: tuple[int, ...]) -> "Matrices":
        """How its kernel is matrices.

        Args:
          ndim: Number of axes of the kernel.
          axes: Those that the GEMM contracts, from the front or the end, as in the
            plan; N:M groups are along the last.
        """
        axes = tuple(axis % ndim for axis in axes)
        if _is_einsum(self.module):
            equation = Equation.read(self.module.einsum_str)
            batch, columns = map(equation.axes, (equation.batch, equation.columns))
            return Matrices(batch, axes, columns)
        # A kernel's outputs follow what it contracts. A transposed kernel (…, out, in)
        # alone has them before; what else comes before the contracted axes is a window.
        columns = tuple(range(axes[-1] + 1, ndim)) or (axes[-1] - 1,)
        rows = tuple(axis for axis in range(ndim) if axis not in columns)
        return Matrices((), rows, columns, self._feature_groups)

    @property
    def _feature_groups(self) -> int:
        return getattr(self.module, "feature_group_count", 1)

    def features(self, x: jax.Array, k: int) -> jax.Array:
        """φ(x) for each matrix of the kernel: (matrices, samples, k) in float32.

        Args:
          x: The layer's input.
          k: Number of rows of the matrices.
        """
        if _is_einsum(self.module):
            equation = Equation.read(self.module.einsum_str).for_ndim(x.ndim)
            parts = equation.batch, equation.rows, equation.contracted
            order = [equation.x.index(letter) for letter in "".join(parts)]
            sizes = [math.prod(x.shape[equation.x.index(c)] for c in p) for p in parts]
            return jnp.transpose(x.astype(jnp.float32), order).reshape(sizes)
        window, groups = self._window(x, k), self._feature_groups
        identity = jnp.tile(jnp.eye(k, dtype=jnp.float32), (1, groups))
        kernel = identity.reshape(*window, -1)
        if getattr(self.module, "transpose_kernel", False):
            kernel = jnp.swapaxes(kernel, -1, -2)
        x, module = x.astype(jnp.float32), self.module
        if isinstance(module, nn.Module):
            module = _linen(module, use_bias=False, features=kernel.size // k)
            y = module.apply({"params": {"kernel": kernel}}, x)
        else:
            y = _nnx(module, kernel, None)(x)
        return jnp.moveaxis(y.reshape(-1, groups, k), 1, 0)

    def _window(self, x: jax.Array, k: int) -> tuple[int, ...]:
        """The kernel's axes that make up its k rows."""
        match type(self.module).__name__:
            case "DenseGeneral" | "LinearGeneral":
                axes = self.module.axis
                axes = (axes,) if isinstance(axes, int) else axes
                return tuple(x.shape[i] for i in sorted(i % x.ndim for i in axes))
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
            case "Einsum" if module.einsum_str is None:
                return "its equation is given at the call"
            case "Einsum":
                equation = module.einsum_str
                is_gemm = Equation.read(equation).is_gemm()
                return "" if is_gemm else f"{equation!r} is not one GEMM"
            case "DenseGeneral" if module.batch_dims == ():
                return ""
            case "LinearGeneral" if not module.batch_axis:
                return ""
            case "DenseGeneral" | "LinearGeneral":
                return "its kernel has batch dimensions"
    return f"{cls.__name__} is not a layer whose features are known"


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How a kernel is matrices (k, out): its axes, counted from the front.

    Attributes:
      batch: For each value of these there is a matrix.
      rows: Together k; N:M groups are along the last.
      columns: Together the outputs.
      groups: Feature groups that the columns are cut into: a matrix each.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    groups: int = 1

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch + self.rows + self.columns

    def of(self, kernel: jax.Array) -> jax.Array:
        """The matrices of a kernel: (matrices, k, out)."""
        moved = jnp.transpose(kernel, self._order)
        batch, k = (
            math.prod(kernel.shape[axis] for axis in axes)
            for axes in (self.batch, self.rows)
        )
        split = moved.reshape(batch, k, self.groups, -1)
        return jnp.moveaxis(split, 2, 1).reshape(batch * self.groups, k, -1)

    def kernel(self, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The kernel of `shape` that `of` made the matrices from."""
        count, k, _ = matrices.shape
        split = matrices.reshape(count // self.groups, self.groups, k, -1)
        moved = jnp.moveaxis(split, 1, 2).reshape([shape[a] for a in self._order])
        return jnp.transpose(moved, [self._order.index(a) for a in range(len(shape))])


def _is_einsum(module: Any) -> bool:
    return type(module).__name__ == "Einsum"


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

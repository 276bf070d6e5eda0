"""`nm_matmul`: a matrix product of which one side is 2:4 compressed.

The five uses in training of a layer `y = x · W`, with t tokens:

    fprop W24          nm_matmul(x, w24)                            (t, k) · (k, n)
    dgrad W24ᵀ         nm_matmul(dy, w24_transposed)                (t, n) · (n, k)
    fprop x24          nm_matmul(x24, w)                            (t, k) · (k, n)
    wgrad x24ᵀ · dy    nm_matmul(x24_transposed, dy)                (k, t) · (t, n)
    wgrad dy24ᵀ · x    nm_matmul(dy24_transposed, x)                (n, t) · (t, k)

A GEMM contracts the group axis of its compressed side, so dgrad needs Wᵀ compressed
along n: a transposable mask compressed twice, or a mask of its own. Where the dense
side lies in memory transposed, or the result should, `transpose_dense` and
`transpose_out` say so and no copy is made:

    wgrad xᵀ · dy24    nm_matmul(x, dy24, transpose_dense=True)     (t, k)ᵀ · (t, n)
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from pallas_kernels import dispatch, reference
from pallas_kernels.dispatch import Choice
from pallas_kernels.dispatch import kernel as _kernel
from pallas_kernels.format import NMCompressed, check_shapes
from pallas_kernels.partitioning import axis_types, partitioned_gemm
from pallas_kernels.reference import ACTIVATIONS, Activation, Form

Implementation = Literal["sm80", "sm90", "sm100", "reference"]

_LOGGER = logging.getLogger(__name__)


def nm_matmul(
    lhs: jax.Array | NMCompressed,
    rhs: jax.Array | NMCompressed,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    implementation: Implementation | None = None,
    transpose_dense: bool = False,
    transpose_out: bool = False,
    out_dtype: Any = None,
) -> jax.Array:
    """`activation(lhs · rhs + bias)`, accumulated in float32.

    The gradient reaches the dense side, the bias and the values of the compressed side
    (not its dropped entries), by dense products. `jax.vmap` over the dense left-hand
    side flattens into its rows; over anything else it runs one product after another.

    On several devices XLA cuts a kernel's product as it cuts a dense one
    (`partitioning.py`), the compressed side between whole metadata words, and each part
    is chosen for by its own sizes; inside `jax.shard_map` it is called with a part. On
    a mesh with Explicit axes, or with Manual and Auto ones, XLA cannot cut a kernel:
    every device makes the whole product. Explicit axes may cut the compressed side from
    jax 0.11 on, and of leading axes the first alone; `jax.shard_map` has no such limit.

    What an infinity or NaN of the dense side gives where it meets dropped entries alone
    differs: by the reference 0 · inf = NaN, while an instruction does not read it.

    Args:
      lhs: `(..., m, k)`; or compressed, one matrix `(m, k)` with `axis=-1`.
      rhs: `(k, n)`; or compressed, `(k, n)` with `axis=-2`. Exactly one side is
        compressed, and both have one dtype, of at most four bytes.
      bias: `(n,)`, any floating dtype, or for int8 an integer one; added in float32,
        integers to integers in int32.
      activation: "gelu" (the tanh approximation), "relu", "squared_relu" or None.
      implementation: "sm80" (Ampere and later), "sm90" (Hopper), "sm100" (Blackwell)
        run that kernel or raise; "reference" decompresses and multiplies, anywhere.
        None takes the kernel of this device where it was measured to be faster than
        the dense product, and else the reference: `dispatch.explain` says which.
      transpose_dense: The dense side is given as its transpose, `(k, m)` or `(n, k)`.
      transpose_out: The result is written as its transpose, `(n, m)`; for one matrix.
      out_dtype: Of the result; by default the dtype of the operands, int32 for int8.

    Returns:
      `(..., m, n)`.

    Raises:
      ValueError: The sides do not fit together, or bias or activation do not fit them.
      NotImplementedError: `implementation` cannot run here or does not take these
        operands; the message says why.
    """
    bias = None if bias is None else jnp.asarray(bias)
    a, b, form = _canonical(
        lhs, rhs, bias, activation, transpose_dense, transpose_out, out_dtype
    )
    *batch, rows, _ = b.shape
    if batch:
        b = b.reshape(math.prod(b.shape[:-1]), b.shape[-1])
    out: jax.Array = _product(implementation, a, b, bias, form)
    return out.reshape(*batch, rows, out.shape[-1]) if batch else out


def _canonical(lhs, rhs, bias, activation, transpose_dense, transpose_out, out_dtype):
    """The product as a Form of D = A · B, checked."""
    on_left = isinstance(lhs, NMCompressed)
    if on_left == isinstance(rhs, NMCompressed):
        raise ValueError(
            f"exactly one side must be an NMCompressed, got {type(lhs).__name__} · "
            f"{type(rhs).__name__}: compress one with pallas_kernels.compress"
        )
    a, b = (lhs, jnp.asarray(rhs)) if on_left else (rhs, jnp.asarray(lhs))
    side, axis = ("left", -1) if on_left else ("right", -2)
    if a.axis != axis:
        raise ValueError(
            f"the {side}-hand side {a.shape} has its groups along axis {a.axis}, and "
            f"the product contracts axis {axis}: compress the matrix along that axis"
        )
    if a.ndim != 2:
        raise ValueError(
            f"the compressed side has shape {a.shape}: one matrix is multiplied at a "
            "time; map over leading axes with jax.vmap"
        )
    if b.ndim < 2 or b.ndim > 2 and (on_left or transpose_dense or transpose_out):
        raise ValueError(
            f"the dense side has shape {b.shape}: expected a matrix, or leading axes "
            "on a left-hand side that is not transposed and whose result is not"
        )
    check_shapes(a)
    if a.dtype.itemsize > 4:
        raise ValueError(
            f"the operands are {a.dtype}, and products accumulate in 32 bits: cast them"
        )
    if a.dtype != b.dtype:
        raise ValueError(
            f"the compressed side is {a.dtype}, the dense side {b.dtype}: cast one"
        )
    # Of the dense side as the caller sees it, the contracted axis is -2 on the right.
    contracted = -2 if on_left != transpose_dense else -1
    k = a.values.shape[-1] * a.pattern[1] // a.pattern[0]
    if b.shape[contracted] != k:
        raise ValueError(
            f"{lhs.shape} · {rhs.shape}: the compressed side contracts {k}, axis "
            f"{contracted} of the dense side has {b.shape[contracted]}"
            + (" (transpose_dense=True)" if transpose_dense else "")
        )
    m, other = a.values.shape[-2], b.shape[-1 if contracted == -2 else -2]
    features = other if on_left else m
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias has shape {bias.shape}, expected ({features},)")
    if bias is not None and jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise ValueError(f"bias is {bias.dtype}: expected real numbers")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected {[*ACTIVATIONS]}")
    if out_dtype is None:
        integers = jnp.issubdtype(a.dtype, jnp.integer)
        out_dtype = jnp.int32 if integers else a.dtype
    a = a if on_left else a.T
    form = Form(
        b_is_kn=contracted == -2,
        out_is_nm=on_left == transpose_out,
        bias_along_m=not on_left,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype),
    )
    return a, b, form


def _product(implementation, a: NMCompressed, b, bias, form: Form) -> Any:
    """The reference, which XLA cuts and derives itself, or a kernel."""
    of_mesh = axis_types(a.values, b)
    each_part_chooses = (
        implementation is None
        and of_mesh == {AxisType.Auto}
        and dispatch.is_measured()
        and reference.unsupported(a, b, form) is None
    )
    if not each_part_chooses:
        if _choose(implementation, a, b, form).name == "reference":
            return reference.gemm(a, b, bias, form)
    is_cut = of_mesh <= {AxisType.Auto}
    return _derived(implementation, is_cut, a, b, bias, form)


def _choose(implementation, a: NMCompressed, b, form: Form) -> Choice:
    """What runs; raises where a name that was asked for cannot."""
    if implementation is None:
        choice = dispatch.choose(a, b, form)
        _say_once(f"{choice.name}: {choice.reason}")
        return choice
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r}: expected None or one of "
            f"{get_args(Implementation)}"
        )
    if implementation != "reference":
        reason = _kernel(implementation).unavailable(a, b, form)
        if reason:
            raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    return Choice(implementation)


@functools.cache
def _say_once(message: str) -> None:
    _LOGGER.info("nm_matmul: %s", message)


def _gemm(implementation, a: NMCompressed, b, bias, form: Form) -> Any:
    """`reference.gemm` by what is chosen for the operands."""
    choice = _choose(implementation, a, b, form)
    if choice.name == "reference":
        return reference.gemm(a, b, bias, form)
    config = {} if choice.config is None else {"config": choice.config}
    return _kernel(choice.name).gemm(a, b, bias, form, **config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def _derived(implementation, is_cut: bool, a: NMCompressed, b, bias, form: Form) -> Any:
    """The product with the derivatives and the batching rule of `nm_matmul`."""
    gemm = functools.partial(_gemm, implementation)
    if is_cut:
        gemm = functools.partial(partitioned_gemm, gemm)
    return _batched(lambda a, b, bias: gemm(a, b, bias, form), form)(a, b, bias)


def _fwd(implementation, is_cut, a, b, bias, form):
    return _derived(implementation, is_cut, a, b, bias, form), (a, b, bias)


def _bwd(implementation, is_cut, form, residuals, d_out):
    del implementation, is_cut
    _, vjp = jax.vjp(lambda a, b, bias: reference.gemm(a, b, bias, form), *residuals)
    return vjp(d_out)


_derived.defvjp(_fwd, _bwd)


def _batched(gemm: Callable, form: Form) -> Callable:
    """`gemm(a, b, bias)` with a rule for `jax.vmap`."""
    mapped = jax.custom_batching.custom_vmap(gemm)

    @mapped.def_vmap
    def rule(size, batched, a, b, bias):
        only_b = not any(jax.tree.leaves((batched[0], batched[2])))
        if only_b and form.out_is_nm and not form.b_is_kn:
            rows = b.shape[-2]
            out = mapped(a, b.reshape(size * rows, b.shape[-1]), bias)
            return out.reshape(size, rows, out.shape[-1]), True
        operands = jax.tree.map(
            lambda x, is_batched: (
                x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            ),
            (a, b, bias),
            tuple(batched),
        )
        return lax.map(lambda one: mapped(*one), operands), True

    return mapped

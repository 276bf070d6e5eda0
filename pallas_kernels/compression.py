"""Mask and compress a matrix in one pass, by magnitude or under a transposable mask.

    w24 = compress_magnitude(w)                  # a Flax kernel (k, n), groups along k
    w24, wt24 = compress_transposable(w)         # W for fprop, Wᵀ for dgrad

The matrix is read once, in its own dtype, and the mask is chosen from it as it is: a
float32 master keeps what `nmjax.magnitude_mask(w, "2:4")` keeps, bit for bit, whatever
the dtype of the values is. What is written is what the GEMM reads, `values (n, k/2)`
and the metadata words of `format.py`, so the transposition of a Flax kernel is paid
here, once.

The kernels do little arithmetic: bytes of memory bound them. An element costs, with
values of 16 bits,

                                          bfloat16 in    float32 in
    compress_magnitude                    3.125          5.125 bytes
    compress_transposable                 4.25           6.25  bytes
    a copy, to compare with               4              8     bytes

On several devices each compresses its own part of the matrix, between whole metadata
words, and nothing is exchanged (`partitioning.py`).

How each of them reads and writes is in `compression_mosaic.py` and in `triton/`. None
of them has run on a GPU yet.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from pallas_kernels import reference
from pallas_kernels.format import NMCompressed, decompress
from pallas_kernels.implementations import Implementation, choose, module
from pallas_kernels.partitioning import axis_types, partitioned_compression

_READABLE = ("float32", "bfloat16", "float16")
_WRITABLE = ("bfloat16", "float16")


def compress_magnitude(
    w: jax.Array,
    *,
    axis: int = -2,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> NMCompressed:
    """Keeps the two largest magnitudes of every four, and compresses what is kept.

    The mask is that of `reference.magnitude_2to4`: ties go to the lower position, -0.0
    ties with 0.0, subnormal numbers differ, infinities are largest, NaN is smallest.

    The gradient of the values reaches the kept entries of `w`. `jax.vmap` runs a kernel
    once for each matrix.

    On several devices each compresses its part of `w` where parts hold whole metadata
    words, multiples of 16 rows and of 64 along k; an axis that is cut otherwise is
    gathered. Inside `jax.shard_map`, parts that are to be joined must hold whole words.
    With Explicit axes, or Manual and Auto ones, XLA cannot cut a kernel: it belongs
    inside `jax.shard_map`.

    Args:
      w: One matrix, `(k, rows)` or with `axis=-1` `(rows, k)`; float32, bfloat16 or
        float16. 4 divides k; everything else may have any size: a kernel pads with
        zeros what its tiles do not divide, which costs a copy.
      axis: The group axis, -2 or -1.
      dtype: Of the values, bfloat16 or float16; each is rounded once.
      implementation: "mosaic" (Ampere and later), "triton" (the same, with
        `pip install 'nmjax[triton]'`) or "reference", which is plain jnp; a name runs
        that or raises. None takes a kernel on devices where it is proven
        (`implementations.PROVEN_ON`), and else the reference, and says so once.

    Returns:
      The compressed matrix, of the shape of `w`.

    Raises:
      ValueError: `w` is no such matrix, or `axis`, `dtype` or `implementation` is none
        of the above.
      NotImplementedError: `implementation` cannot run here; the message says why.
    """
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 or -2, got {axis}")
    w, dtype = _checked(w, dtype, axes=(axis,))
    name = choose(implementation, "compression")
    (compressed,) = _jitted(w, name, dtype, axis, False)
    return compressed


def compress_transposable(
    w: jax.Array,
    *,
    at_most: bool = False,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> tuple[NMCompressed, NMCompressed]:
    """Compresses W and Wᵀ under the best 2:4 mask that serves both (arXiv:2102.08124).

    In every 4x4 tile the mask keeps two entries in each row and column, with the
    largest sum of magnitudes, as float32 sums them; `tile_selection.transposable_2to4`
    chooses it, and says what counts at the ends of the range.
    The gradient of both reaches the kept entries of `w`. On several devices parts are
    as for `compress_magnitude`, here multiples of 64 along both axes.

    Args:
      w: `(k, n)`, as for `compress_magnitude`; 4 divides both.
      at_most: Allow tiles of 7 entries, where one row and one column keep one: 186
        masks in place of 90, for a sum that is never less.
      dtype: As for `compress_magnitude`.
      implementation: As for `compress_magnitude`.

    Returns:
      `w` and its transpose, both with `axis=-2`: the right-hand sides of `x · W` and
      `dy · Wᵀ`.

    Raises:
      ValueError: As `compress_magnitude`.
      NotImplementedError: As `compress_magnitude`.
    """
    w, dtype = _checked(w, dtype, axes=(-2, -1))
    name = choose(implementation, "compression")
    compressed, transposed = _jitted(w, name, dtype, None, at_most)
    return compressed, transposed.T


def _checked(w: jax.Array, dtype: Any, axes: tuple[int, ...]) -> tuple[jax.Array, Any]:
    w, dtype = jnp.asarray(w), jnp.dtype(dtype)
    if w.dtype.name not in _READABLE:
        raise ValueError(f"w is {w.dtype}, expected one of {_READABLE}: cast it")
    if dtype.name not in _WRITABLE:
        raise ValueError(
            f"dtype={dtype.name!r}: values are written as one of {_WRITABLE}; "
            "pallas_kernels.compress makes any other"
        )
    if w.ndim != 2:
        raise ValueError(
            f"w has shape {w.shape}: expected one matrix; map over leading axes with "
            "jax.vmap, or reshape a convolution's kernel to (k, n)"
        )
    for axis in axes:
        if w.shape[axis] % 4:
            raise ValueError(
                f"axis {axis} of shape {w.shape} has size {w.shape[axis]}, not a "
                "multiple of 4: pad it with zeros"
            )
    return w, dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _compress(w, name, dtype, axis, at_most) -> list[NMCompressed]:
    """The compressed forms of `w`, each of its shape: with axis=None W and (Wᵀ)ᵀ."""
    if name == "reference" or not w.size:
        return _by_reference(w, dtype, axis, at_most)
    kernel = functools.partial(_by_kernel, name, dtype, axis, at_most)
    if axis_types(w) <= {AxisType.Auto}:
        axes = (-2, -1) if axis is None else (axis,)
        kernel = functools.partial(partitioned_compression, kernel, axes=axes)
    return _one_by_one(kernel)(w)


def _by_reference(w, dtype, axis, at_most) -> list[NMCompressed]:
    """`_compress` in plain jnp, which XLA cuts itself."""
    if axis is None:
        both = reference.compress_transposable(w, dtype, at_most=at_most)
        return [both[0], both[1].T]
    compressed = reference.compress_2to4(w if axis == -1 else w.T, dtype)
    return [dataclasses.replace(compressed, axis=axis)]


def _by_kernel(name, dtype, axis, at_most, w) -> list[NMCompressed]:
    """`_compress` by a kernel."""
    kernels = module(name, "compression")
    if axis is None:
        both = kernels.compress_transposable(w, dtype=dtype, at_most=at_most)
        return [both[0], both[1].T]
    return [kernels.compress_magnitude(w, axis=axis, dtype=dtype)]


_jitted = jax.jit(_compress, static_argnums=(1, 2, 3, 4))


def _fwd(w, *static):
    out: Any = _compress(w, *static)
    # Of `w` the dtype alone is needed, and an array without entries carries it.
    return out, ([c.metadata for c in out], jnp.zeros(0, w.dtype))


def _bwd(name, dtype, axis, at_most, residuals, d_out: Any):
    del name, dtype, axis, at_most
    metadata, like = residuals
    dense = [
        decompress(dataclasses.replace(d, metadata=m)).astype(jnp.float32)
        for d, m in zip(d_out, metadata, strict=True)
    ]
    return (functools.reduce(jnp.add, dense).astype(like.dtype),)


_compress.defvjp(_fwd, _bwd)


def _one_by_one(kernel):
    """A kernel of one matrix under `jax.vmap`: one matrix after another."""
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def rule(size, batched, w):
        del size, batched
        out = lax.map(mapped, w)
        return out, jax.tree.map(lambda _: True, out)

    return mapped

"""What each kernel computes, in plain jnp: the oracle, and what runs everywhere else.

    gemm                   D = act(A24 · B + bias)   accumulated in float32
    magnitude_2to4         which two of four entries are kept, and what is stored
    compress_2to4          mask and compress a matrix in one go
    tile_mask              the 4x4 transposable mask of a matrix
    compress_transposable  mask W by it, and compress W and Wᵀ

The kernels call the functions of lists of arrays themselves, those of this file and
`tile_selection.transposable_2to4`, so a choice is written once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.format import NMCompressed, compress, decompress
from pallas_kernels.tile_selection import transposable_2to4, unpack_tile

Activation = Literal["gelu", "relu", "squared_relu"]

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda x: x,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": lambda x: jnp.maximum(x, jnp.zeros_like(x)),
    "squared_relu": lambda x: jnp.square(jnp.maximum(x, jnp.zeros_like(x))),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static of a sparse GEMM `D = act(A · B + bias)`, A (M, K), B (K, N).

    Attributes:
      b_is_kn: Whether B lies in memory as `(K, N)`; else as `(N, K)`.
      out_is_nm: Whether D is written as `(N, M)`; else as `(M, N)`.
      bias_along_m: Whether the bias is `(M,)`; else it is `(N,)`.
      activation: Applied to the float32 sum; gelu is the tanh approximation.
      out_dtype: Of D, which is rounded once, at the end.
    """

    b_is_kn: bool = False
    out_is_nm: bool = True
    bias_along_m: bool = True
    activation: Activation | None = None
    out_dtype: Any = jnp.bfloat16


def gemm(
    a: NMCompressed, b: jax.Array, bias: jax.Array | None, form: Form
) -> jax.Array:
    """`act(A · B + bias)`: the contract of every sparse GEMM of this package.

    Args:
      a: Operand A, one matrix of dense shape (M, K): `axis=-1`.
      b: Operand B in the dtype of A, `(K, N)` or `(N, K)` as `form` says.
      bias: None, or a vector.
      form: The layouts of B and D, the activation, the dtype of D.

    Returns:
      `(M, N)` or `(N, M)`. Floating operands accumulate in float32, integers in int32.
    """
    integers = jnp.issubdtype(a.dtype, jnp.integer)
    accumulator = jnp.int32 if integers else jnp.float32
    b_contract = 0 if form.b_is_kn else 1
    if form.out_is_nm:
        operands, contract = (b, decompress(a)), ((b_contract,), (1,))
    else:
        operands, contract = (decompress(a), b), ((1,), (b_contract,))
    out = lax.dot_general(
        *operands, (contract, ((), ())), preferred_element_type=accumulator
    )
    return epilogue(out, bias, form)


def epilogue(out: jax.Array, bias: jax.Array | None, form: Form) -> jax.Array:
    """`act(out + bias)` in `form.out_dtype`, from the accumulated product.

    A floating bias makes float32 of an integer product.
    """
    if bias is not None:
        if jnp.issubdtype(bias.dtype, jnp.floating):
            out = out.astype(jnp.float32)
        bias = bias.astype(out.dtype)
        along_last = form.bias_along_m == form.out_is_nm
        out += bias[None, :] if along_last else bias[:, None]
    return ACTIVATIONS[form.activation](out).astype(form.out_dtype)


def unsupported(a: NMCompressed, b: jax.Array, form: Form) -> str | None:
    """Why no sparse instruction takes these operands; None where one does."""
    if a.pattern != (2, 4):
        n, m = a.pattern
        return f"the instruction multiplies 2:4 alone, the operand is {n}:{m}"
    if a.dtype not in (jnp.bfloat16, jnp.float16) or b.dtype != a.dtype:
        return f"takes bfloat16 or float16 twice, the operands are {a.dtype}, {b.dtype}"
    out_dtype = jnp.dtype(form.out_dtype)
    if out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"writes bfloat16, float16 or float32, not {out_dtype}"
    return None


def sizes(a: NMCompressed, b: jax.Array, form: Form) -> tuple[int, int, int]:
    """M, N and K of `A · B`.

    Raises:
      ValueError: B does not fit A.
    """
    m, k = a.shape
    n, b_k = b.shape[::-1] if form.b_is_kn else b.shape
    if b_k != k:
        raise ValueError(f"A {a.shape} contracts {k}, B {b.shape} has {b_k}: {form}")
    return m, n, k


def magnitude_keys(x: jax.Array) -> jax.Array:
    """Integers in the order of |x|: NaN lowest, -0.0 equal to 0.0; int32, from 0 up.

    Args:
      x: float32, or float16 and bfloat16, which float32 holds exactly.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    # Infinity becomes the largest integer, and NaN, which is above it, negative.
    return jnp.maximum((bits & 0x7FFF_FFFF) + 0x007F_FFFF, 0)


def magnitude_2to4(
    columns: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keeps the two entries of largest magnitude of every group of four.

    Ties go to the lower position, and NaN is below everything.

    Args:
      columns: The first, second, third and fourth entries of the groups: four arrays
        of one shape, float32, bfloat16 or float16.

    Returns:
      `(v0, v1, nibble)`: the kept entries in increasing position, in their dtype, and
      `i0 | i1 << 2`, int32.
    """
    keys = [magnitude_keys(column) for column in columns]

    def behind(i, j):  # negative where entry i ranks behind entry j
        return keys[i] - keys[j] if i < j else ~(keys[j] - keys[i])

    def kept(i):
        a, b, c = (behind(i, j) for j in range(4) if j != i)
        return ((a & b) | ((a | b) & c)) >= 0  # the sign of most of the three

    return stored_2to4(columns, [kept(i) for i in range(4)])


def stored_2to4(
    columns: Sequence[jax.Array], kept: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is stored of groups of four of which at most two entries are kept.

    Where fewer are, zeros at the lowest other positions fill up, as in
    `format.compress`.

    Args:
      columns: As for `magnitude_2to4`.
      kept: Whether each entry is kept: four boolean arrays.

    Returns:
      As `magnitude_2to4`.
    """
    c0, c1, c2, c3 = columns
    k0, k1, k2, k3 = kept
    first1, first2 = k1 & (k2 | k3), k2 & k3  # entry 1, or 2, is the first of two
    zero = jnp.zeros_like(c0)
    v0 = jnp.where(k0, c0, jnp.where(first1, c1, jnp.where(first2, c2, zero)))
    v1 = jnp.where(k3, c3, jnp.where(k2, c2, jnp.where(k1, c1, zero)))
    i0 = jnp.where(k0, 0, jnp.where(first1, 1, jnp.where(first2, 2, 0)))
    i1 = jnp.where(k3, 3, jnp.where(k2, 2, 1))
    return v0, v1, (i0 | (i1 << 2)).astype(jnp.int32)


def compress_2to4(w: jax.Array, dtype: Any) -> NMCompressed:
    """The 2:4 magnitude mask of a matrix and the matrix compressed under it.

    Args:
      w: `(rows, k)`, groups along k; float32, bfloat16 or float16. The mask is chosen
        from it as it is.
      dtype: Of the values.

    Returns:
      The compressed matrix, `axis=-1`.
    """
    rows, k = w.shape
    groups = w.reshape(rows, k // 4, 4)
    _, _, nibbles = magnitude_2to4([groups[..., i] for i in range(4)])
    mask = [(nibbles & 3 == i) | (nibbles >> 2 == i) for i in range(4)]
    mask = jnp.stack(mask, axis=-1).reshape(rows, k)
    return compress(w, mask, axis=-1, dtype=dtype)


def tile_mask(scores: jax.Array, *, at_most: bool) -> jax.Array:
    """`transposable_2to4` of every 4x4 tile of a matrix: bool, True = kept."""
    rows, columns = scores.shape
    tiles = scores.reshape(rows // 4, 4, columns // 4, 4)
    bits = transposable_2to4(
        [[tiles[:, r, :, c] for c in range(4)] for r in range(4)], at_most=at_most
    )
    return mask_of_bits(bits)


def mask_of_bits(bits: jax.Array) -> jax.Array:
    """The mask `(4 r, 4 c)` of bits `(r, c)` that `transposable_2to4` chose."""
    rows = [jnp.stack(row, axis=-1) for row in unpack_tile(bits)]  # (r, c, 4)
    mask = jnp.stack(rows, axis=1)  # (r, 4, c, 4)
    return mask.reshape(4 * bits.shape[0], 4 * bits.shape[1])


def compress_transposable(
    w: jax.Array, dtype: Any, *, at_most: bool
) -> tuple[NMCompressed, NMCompressed]:
    """W and Wᵀ compressed under one transposable mask of |W|.

    Args:
      w: `(k, n)`, as for `compress_2to4`.
      dtype: Of the values.
      at_most: As for `transposable_2to4`.

    Returns:
      `w` and its transpose, both with `axis=-2`.
    """
    mask = tile_mask(jnp.abs(w), at_most=at_most)
    return (
        compress(w, mask, axis=-2, dtype=dtype),
        compress(w.T, mask.T, axis=-2, dtype=dtype),
    )

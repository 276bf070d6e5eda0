"""The compressed form of an N:M matrix: kept values and where they stood.

An N:M matrix has at most n nonzeros in every group of m consecutive entries along the
axis that the GEMM contracts, its group axis. `NMCompressed` stores exactly n entries
of each group, in increasing position, and their positions:

    values    (..., rows, k n/m)   row-major, group after group
    metadata  the positions, packed

`rows` is the other axis: the compressed operand is always the instruction's A, with
the group axis last, whatever orientation the dense matrix has. So a Flax kernel
`(k, n)` with groups along k (`axis=-2`) has values `(n, k/2)`, and its transpose,
`compressed.T`, costs nothing.

Metadata of 2:4, the pattern that sparse tensor cores read, are the words of `mma.sp`
m16n8k32 and `wgmma.sp` m64nNk32 (PTX ISA, "Sparse matrix storage"): two bits a kept
value, a nibble a group. int32, `(..., 8 ceil(rows/16), 4 ceil(k/64))`; the word at
(8b + g, 4s + t) holds the four groups of row 16b + g in columns 64s + 16t to +15 in
its low half, and those of row 16b + g + 8 in its high half. Rows and columns that
pad the words hold zeros at positions 0 and 1.

Metadata of any other pattern are bytes, `(..., rows, bytes)`, for which no instruction
exists: a position takes the lowest power of two of bits that holds m - 1, and the first
position of a byte is in its lowest bits.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

# Two positions of a group of 2:4 are the nibble i0 | i1 << 2; this one is 0 and 1.
_NIBBLE_OF_PADDING = 0x4
_WORD_OF_PADDING = 0x4444_4444


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "metadata"),
    meta_fields=("pattern", "axis"),
)
@dataclasses.dataclass(frozen=True)
class NMCompressed:
    """An N:M matrix as values and metadata; a pytree of the two arrays.

    Made by `compress`. Leading axes are batch axes: `jax.vmap`, `lax.scan` and
    `lax.map` run over them. Shards have to hold whole groups, for 2:4 whole words: 16
    rows and 64 columns.

    Attributes:
      values: `(..., rows, k n/m)`, the kept entries in increasing position.
      metadata: Their positions, as the docstring of this module says.
      pattern: `(n, m)`: n entries kept of every m.
      axis: The group axis of the dense matrix: -2 for `(k, rows)`, the right-hand side
        of a product, -1 for `(rows, k)`, the left-hand side.
    """

    values: jax.Array
    metadata: jax.Array
    pattern: tuple[int, int] = (2, 4)
    axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense matrix."""
        n, m = self.pattern
        *batch, rows, kept = self.values.shape
        k = kept * m // n
        return (*batch, k, rows) if self.axis == -2 else (*batch, rows, k)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense matrix."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.values.nbytes + self.metadata.nbytes

    # The name that NumPy and jax give a transposed matrix.
    @property
    def T(self) -> "NMCompressed":  # noqa: N802
        """The transposed matrix, of the same two arrays; batch axes stay in front."""
        return dataclasses.replace(self, axis=-3 - self.axis)

    def validate(self) -> None:
        """Raises unless the metadata can be read: for data from a file or a network.

        Raises:
          ValueError: The shapes or dtypes of the two arrays do not belong together, or
            a group's positions repeat, run backwards or pass m: with the batch index,
            row and group of the first one.
        """
        n, m = self.pattern
        if self.axis not in (-1, -2):
            raise ValueError(f"axis must be -1 or -2, got {self.axis}")
        check_shapes(self)
        found = np.asarray(positions(self))
        wrong = found[..., -1] >= m
        wrong |= (np.diff(found.astype(np.int32), axis=-1) <= 0).any(-1)
        if wrong.any():
            *batch, row, group = (int(i) for i in np.argwhere(wrong)[0])
            where = f"batch index {tuple(batch)}, " if batch else ""
            raise ValueError(
                f"corrupt metadata at {where}row {row}, group {group} (columns "
                f"{m * group} to {m * group + m - 1}): positions "
                f"{found[(*batch, row, group)].tolist()}, expected {n} increasing "
                f"positions below {m}"
            )


def check_shapes(compressed: NMCompressed) -> None:
    """Raises unless values and metadata have shapes and dtypes that belong together.

    Under `jax.jit` too, where `NMCompressed.validate` cannot read the metadata.

    Raises:
      ValueError: They have not, or the pattern is none.
    """
    values, metadata = compressed.values, compressed.metadata
    n, m = _check_pattern(compressed.pattern)
    if values.ndim < 2 or values.shape[-1] % n:
        raise ValueError(f"values of shape {values.shape} are no whole groups of {n}")
    dtype, shape = _metadata_type((n, m), values.shape[-2], values.shape[-1] // n)
    expected = (*values.shape[:-2], *shape)
    if metadata.shape != expected or metadata.dtype != dtype:
        raise ValueError(
            f"metadata are {metadata.dtype}{metadata.shape}; values of shape "
            f"{values.shape} in {n}:{m} need {dtype}{expected}. Matrices that were "
            "compressed in parts have to be joined between whole words: for 2:4, parts "
            "of 16 rows and 64 columns of the group axis, or multiples"
        )


def compress(
    w: jax.Array,
    mask: jax.Array,
    pattern: Any = "2:4",
    *,
    axis: int = -2,
    dtype: Any = None,
) -> NMCompressed:
    """The kept entries of `w` as values and metadata.

    A group in which the mask keeps fewer than n entries stores zeros for the missing
    ones, at the first positions that the mask drops.

    Args:
      w: Dense matrix `(..., k, rows)`, or `(..., rows, k)` with `axis=-1`; any real
        dtype of one, two or four bytes. Leading axes are batch axes.
      mask: Bool, the shape of `w`, True = kept; at most n of every group of m.
      pattern: `"n:m"` or anything that prints so, n kept of every m.
      axis: The group axis, the one that the GEMM contracts: -2 or -1.
      dtype: Of the values; the dtype of `w` by default. The cast follows the mask.

    Returns:
      The compressed matrix; `decompress` gives `where(mask, w, 0)` back, bit for bit.

    Raises:
      ValueError: The pattern, shapes, dtypes or axis are not as above, m does not
        divide the group axis, or (where the mask is known: not under `jax.jit`) a group
        keeps more than n entries.
    """
    n, m = _check_pattern(pattern)
    w, mask = jnp.asarray(w), jnp.asarray(mask)
    dtype = jnp.dtype(dtype or w.dtype)
    if axis not in (-1, -2):
        raise ValueError(
            f"axis must be -1 or -2, got {axis}: groups run along one of the last two"
        )
    if w.ndim < 2 or mask.shape != w.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"expected a matrix and a bool mask of its shape, got w of shape {w.shape} "
            f"and a mask {mask.dtype}{mask.shape}"
        )
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in (w.dtype, dtype)):
        raise ValueError(f"w is {w.dtype}, stored as {dtype}: expected real numbers")
    if w.shape[axis] % m:
        raise ValueError(
            f"axis {axis} of shape {w.shape} has size {w.shape[axis]}, not a multiple "
            f"of m = {m} (pattern {n}:{m}): pad it with zeros, and the mask with False"
        )
    if not isinstance(mask, jax.core.Tracer):
        kept = _group_columns(np.asarray(mask), m, axis)
        most = int(np.max(sum(column.astype(int) for column in kept), initial=0))
        if most > n:
            raise ValueError(
                f"the mask keeps {most} of {m} entries in a group, more than n = {n} "
                f"(pattern {n}:{m})"
            )
    return _compress(w, mask, (n, m), axis, dtype)


@functools.partial(jax.jit, static_argnames=("pattern", "axis", "dtype"))
def _compress(w, mask, pattern, axis, dtype) -> NMCompressed:
    n, m = pattern
    kept = _group_columns(mask, m, axis)
    count = sum(column.astype(jnp.int32) for column in kept)
    missing = n - count
    slot = jnp.zeros_like(missing)  # where the next stored entry goes
    w = _movable(w.astype(dtype))
    zero = jnp.zeros((), w.dtype)
    values = [jnp.zeros_like(slot, w.dtype)] * n
    places = [jnp.zeros_like(slot, jnp.uint8)] * n
    for j, column in enumerate(_group_columns(w, m, axis)):
        filler = ~kept[j] & (missing > 0)
        missing = missing - filler.astype(jnp.int32)
        stored = kept[j] | filler
        entry = jnp.where(kept[j], column, zero)
        # m - 1 - j entries follow, and all n slots will be taken.
        for s in range(max(0, n - m + j), min(j + 1, n)):
            here = stored & (slot == s)
            values[s] = jnp.where(here, entry, values[s])
            places[s] = jnp.where(here, jnp.uint8(j), places[s])
        slot = slot + stored.astype(jnp.int32)
    last = (lambda x: jnp.swapaxes(x, -1, -2)) if axis == -2 else (lambda x: x)
    stacked = jnp.stack([last(v) for v in values], axis=-1)  # (..., rows, groups, n)
    flat = _moved(_joined(stacked), dtype)
    metadata = pack(jnp.stack([last(p) for p in places], axis=-1), pattern)
    return NMCompressed(flat, metadata, pattern, axis)


@jax.jit
def decompress(compressed: NMCompressed) -> jax.Array:
    """The dense matrix, zeros at dropped positions; `compressed.shape` and dtype.

    Metadata are taken as they are: `NMCompressed.validate` judges them.
    """
    check_shapes(compressed)
    n, m = compressed.pattern
    values = _cut(_movable(compressed.values), n)  # (..., rows, groups, n)
    places = positions(compressed)
    columns = []
    for j in range(m):
        column = jnp.zeros_like(values[..., 0])
        for s in range(n):
            column = jnp.where(places[..., s] == j, values[..., s], column)
        columns.append(column)
    dense = jnp.stack(columns, axis=-1)
    dense = _moved(_joined(dense), compressed.dtype)
    return jnp.swapaxes(dense, -1, -2) if compressed.axis == -2 else dense


def pad(compressed: NMCompressed, rows: int, k: int) -> NMCompressed:
    """A 2:4 matrix with zeros after its rows and columns, up to multiples.

    Args:
      compressed: 2:4, in either orientation.
      rows: The multiple for the rows of the values, itself a multiple of 16.
      k: The multiple for the group axis, itself a multiple of 64.
    """
    values = pad_to(compressed.values, (rows, k // 2))
    metadata = pad_to(compressed.metadata, (rows // 2, k // 16), _WORD_OF_PADDING)
    return dataclasses.replace(compressed, values=values, metadata=metadata)


def positions(compressed: NMCompressed) -> jax.Array:
    """Where the values stand in their groups: uint8 `(..., rows, k/m, n)`, below m."""
    n, _ = compressed.pattern
    *batch, rows, kept = compressed.values.shape
    if compressed.pattern == (2, 4):
        nibbles = nibbles_of_words(compressed.metadata)[..., :rows, : kept // 2]
        return jnp.stack([nibbles & 3, nibbles >> 2], axis=-1)
    bits = _bits(compressed.pattern)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    places = (compressed.metadata[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return _cut(_joined(places)[..., :kept], n)


def pack(places: jax.Array, pattern: tuple[int, int]) -> jax.Array:
    """The metadata of positions, uint8 `(..., rows, k/m, n)`; undone by `positions`."""
    if pattern == (2, 4):
        return words_of_nibbles(places[..., 0] | (places[..., 1] << 2))
    bits = _bits(pattern)
    places = _cut(pad_to(_joined(places), (1, 8 // bits)), 8 // bits)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    return (places << shifts).sum(-1, dtype=jnp.uint8)


def words_of_nibbles(nibbles: jax.Array) -> jax.Array:
    """2:4 metadata words, int32 `(..., R/2, C/4)`, of a nibble a group.

    Args:
      nibbles: `i0 | i1 << 2` of each group, uint8 `(..., rows, k/4)`.

    Returns:
      The words of this module's docstring; R is rows rounded up to 16, C is k/4
      rounded up to 16.
    """
    nibbles = pad_to(nibbles, (16, 16), _NIBBLE_OF_PADDING).astype(jnp.uint32)
    *batch, rows, groups = nibbles.shape
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint32)
    halves = nibbles.reshape(*batch, rows, groups // 4, 4) << shifts
    halves = halves.sum(-1, dtype=jnp.uint32)  # (..., rows, k/16)
    halves = halves.reshape(*batch, rows // 16, 2, 8, groups // 4)
    words = halves[..., 0, :, :] | (halves[..., 1, :, :] << 16)
    words = words.reshape(*batch, rows // 2, groups // 4)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def nibbles_of_words(words: jax.Array) -> jax.Array:
    """The nibbles that `words_of_nibbles` packed, with the padding: uint8."""
    *batch, half, columns = words.shape
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape(*batch, half // 8, 1, 8, columns)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-3)
    halves = halves.reshape(*batch, 2 * half, columns, 1)
    nibbles = (halves >> jnp.arange(0, 16, 4, dtype=jnp.uint32)) & 0xF
    return nibbles.reshape(*batch, 2 * half, 4 * columns).astype(jnp.uint8)


def _metadata_type(pattern, rows: int, groups: int) -> tuple[Any, tuple[int, int]]:
    """The dtype and shape, without batch axes, of metadata."""
    if pattern == (2, 4):
        return jnp.dtype(jnp.int32), (8 * -(-rows // 16), 4 * -(-groups // 16))
    bits = _bits(pattern)
    return jnp.dtype(jnp.uint8), (rows, -(-groups * pattern[0] * bits // 8))


def _check_pattern(pattern: Any) -> tuple[int, int]:
    if isinstance(pattern, tuple):
        pattern = ":".join(map(str, pattern))
    n, _, m = str(pattern).partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m) <= 256):
        raise ValueError(
            f"expected a pattern n:m with 0 < n <= m <= 256, such as '2:4', "
            f"got {pattern!r}"
        )
    return int(n), int(m)


def _bits(pattern: tuple[int, int]) -> int:
    """Bits of a position: the lowest of 1, 2, 4 and 8 that hold m - 1."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= pattern[1])


def _movable(x: jax.Array) -> jax.Array:
    """Eight-bit floats as integers: XLA on CPU moves them through wider floats."""
    if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x, jnp.uint8)
    return x


def _moved(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _group_columns(x: Any, m: int, axis: int) -> list[Any]:
    """The m arrays of first, second, ... entries of the groups along `axis`."""
    if axis == -1:
        groups = _cut(x, m)
        return [groups[..., j] for j in range(m)]  # (..., rows, groups)
    *batch, k, rows = x.shape
    groups = x.reshape(*batch, k // m, m, rows)
    return [groups[..., j, :] for j in range(m)]  # (..., groups, rows)


def _cut(x: Any, size: int) -> Any:
    """The last axis as groups of `size`; `_joined` undoes it."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _joined(x: Any) -> Any:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def pad_to(x: jax.Array, multiples: Sequence[int], value: int = 0) -> jax.Array:
    """Rounds the last axes of an array up to multiples, one for each."""
    first = x.ndim - len(multiples)
    sizes = zip(x.shape[first:], multiples, strict=True)
    after = [-size % multiple for size, multiple in sizes]
    if not any(after):
        return x
    widths = [(0, 0)] * first + [(0, pad) for pad in after]
    return jnp.pad(x, widths, constant_values=value)

"""Mask + compress by magnitude in Triton: `reference.magnitude_2to4`, line for line.

A block of four warps has 4,096 entries, 32 a thread, loaded along the contiguous axis;
Triton moves what it transposes through shared memory, and chooses the vectors.

Compiled for sm_80 and sm_90, interpreted, and the PTX run on a CPU
(`tests/pallas_kernels/ptx_machine.py`). Not yet run on a GPU.
"""

# Triton reads Python of its own, whose types are not those of Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def nm_compress(
    w_ptr,
    values_ptr,
    words_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # whether w is (K, ROWS) rather than (ROWS, K)
    BLOCK_ROWS: tl.constexpr,  # a multiple of 16
    BLOCK_K: tl.constexpr,  # a multiple of 64
):
    """Writes values (ROWS, K/2) and words (8 ceil(ROWS/16), 4 ceil(K/64))."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    k = tl.program_id(1).to(tl.int64) * BLOCK_K
    rows = row + tl.arange(0, BLOCK_ROWS)
    ks = k + tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        inside = (ks[:, None] < K) & (rows[None, :] < ROWS)
        w = tl.load(w_ptr + ks[:, None] * ROWS + rows[None, :], mask=inside, other=0.0)
        w = tl.trans(w)
    else:
        inside = (rows[:, None] < ROWS) & (ks[None, :] < K)
        w = tl.load(w_ptr + rows[:, None] * K + ks[None, :], mask=inside, other=0.0)
    c0, c1, c2, c3 = split_4(tl.reshape(w, (BLOCK_ROWS, BLOCK_K // 4, 2, 2)))
    v0, v1, nibble = magnitude_2to4(c0, c1, c2, c3)

    values = tl.reshape(tl.join(v0, v1), (BLOCK_ROWS, BLOCK_K // 2))
    store(values_ptr, words_ptr, values, nibble, row, k, ROWS, K, BLOCK_ROWS, BLOCK_K)


@triton.jit
def split_4(x):
    """The four arrays of x[..., i, j], in the order of 2 i + j."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def magnitude_keys(x):
    """As `reference.magnitude_keys`."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum((bits & 0x7FFFFFFF) + 0x007FFFFF, 0)


@triton.jit
def kept(a, b, c):
    """Whether most of the three are not negative."""
    return ((a & b) | ((a | b) & c)) >= 0


@triton.jit
def magnitude_2to4(c0, c1, c2, c3):
    """As `reference.magnitude_2to4`."""
    k0, k1, k2, k3 = (
        magnitude_keys(c0),
        magnitude_keys(c1),
        magnitude_keys(c2),
        magnitude_keys(c3),
    )
    # Negative where the entry of the first number ranks behind that of the second.
    b01, b02, b03 = k0 - k1, k0 - k2, k0 - k3
    b12, b13, b23 = k1 - k2, k1 - k3, k2 - k3
    return stored_2to4(
        c0,
        c1,
        c2,
        c3,
        kept(b01, b02, b03),
        kept(~b01, b12, b13),
        kept(~b02, ~b12, b23),
        kept(~b03, ~b13, ~b23),
    )


@triton.jit
def stored_2to4(c0, c1, c2, c3, k0, k1, k2, k3):
    """As `reference.stored_2to4`."""
    first1, first2 = k1 & (k2 | k3), k2 & k3
    v0 = tl.where(k0, c0, tl.where(first1, c1, tl.where(first2, c2, 0.0)))
    v1 = tl.where(k3, c3, tl.where(k2, c2, tl.where(k1, c1, 0.0)))
    i0 = tl.where(k0, 0, tl.where(first1, 1, tl.where(first2, 2, 0)))
    i1 = tl.where(k3, 3, tl.where(k2, 2, 1))
    return v0, v1, i0 | (i1 << 2)


@triton.jit
def store(
    values_ptr,
    words_ptr,
    values,  # (BLOCK_ROWS, BLOCK_K / 2)
    nibble,  # (BLOCK_ROWS, BLOCK_K / 4)
    row,
    k,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a block, its nibbles as the words of `format.py`: bit fields add up."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    columns = k // 2 + tl.arange(0, BLOCK_K // 2)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < K // 2)
    if values.dtype != values_ptr.dtype.element_ty:
        values = values.to(tl.float32).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + rows[:, None] * (K // 2) + columns[None, :], values, inside)

    groups = k // 4 + tl.arange(0, BLOCK_K // 4)
    inside = (rows[:, None] < ROWS) & (groups[None, :] < K // 4)
    nibble = tl.where(inside, nibble, 4)  # positions 0 and 1
    nibble = tl.reshape(nibble, (BLOCK_ROWS, BLOCK_K // 16, 4))
    half = tl.sum(nibble << (4 * tl.arange(0, 4))[None, None, :], axis=2)
    half = tl.reshape(half, (BLOCK_ROWS // 16, 2, 8, BLOCK_K // 16))
    word = tl.sum(half << (16 * tl.arange(0, 2))[None, :, None, None], axis=1)
    word = tl.reshape(word, (BLOCK_ROWS // 2, BLOCK_K // 16))
    rows = row // 2 + tl.arange(0, BLOCK_ROWS // 2)
    columns = k // 16 + tl.arange(0, BLOCK_K // 16)
    height: tl.constexpr = (ROWS + 15) // 16 * 8
    width: tl.constexpr = (K + 63) // 64 * 4
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    tl.store(words_ptr + rows[:, None] * width + columns[None, :], word, inside)

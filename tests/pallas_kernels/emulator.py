"""`mma.sp` m16n8k32 and `wgmma.sp` m64nNk32 in NumPy, lane by lane.

Written from the fragment tables of the PTX ISA ("Warp-level matrix instructions" and
"Asynchronous warpgroup level matrix instructions", sparse matrix A, 16-bit types), and
from nothing else of this repository: a lane has group g = lane / 4 and thread t =
lane % 4.

    A  16x16 values     a0..a7:  row g, or g + 8 for a2 a3 a6 a7;
                                 column 2t + i % 2, plus 8 for a4..a7
    B  32x8             b0..b7:  row 2t + i % 2 + 8 (i / 2), column g
    C  16x8             c0..c3:  row g + 8 (i / 2), column 2t + i % 2
    metadata            one 32-bit word of the lanes t = 2 sel, 2 sel + 1: the low half
                        is for row g, the high half for row g + 8; four nibbles each,
                        for 16 columns of A
"""

import numpy as np

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def a_positions() -> tuple[np.ndarray, np.ndarray]:
    """Row and column in the 16x16 values of each lane's a0..a7: (32, 8) each."""
    i = np.arange(8)
    rows = GROUP[:, None] + 8 * (i // 2 % 2)
    columns = 2 * THREAD[:, None] + i % 2 + 8 * (i // 4)
    return rows, columns


def b_positions() -> tuple[np.ndarray, np.ndarray]:
    """Row and column in the 32x8 tile of each lane's b0..b7."""
    i = np.arange(8)
    rows = 2 * THREAD[:, None] + i % 2 + 8 * (i // 2)
    return rows, np.broadcast_to(GROUP[:, None], rows.shape)


def c_positions() -> tuple[np.ndarray, np.ndarray]:
    """Row and column in the 16x8 tile of each lane's c0..c3."""
    i = np.arange(4)
    return GROUP[:, None] + 8 * (i // 2), 2 * THREAD[:, None] + i % 2


def decompressed(values: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
    """Rows of a 2:4 matrix: values (rows, 2G) and nibbles (rows, G) to (rows, 4G)."""
    first, second = nibbles & 3, nibbles >> 2
    assert (first < second).all(), "metadata out of order: the result is undefined"
    row, group = np.indices(nibbles.shape)
    dense = np.zeros((len(values), 2 * values.shape[1]))
    dense[row, 4 * group + first] = values[:, ::2]
    dense[row, 4 * group + second] = values[:, 1::2]
    return dense


def expand(a: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """The dense 16x32 tile of A that one instruction multiplies.

    Args:
      a: Registers of A, (32 lanes, 8).
      metadata: A word of each lane, uint32 (32,); half of them are read.
      selector: Which half: 0 or 1.
    """
    values = np.zeros((16, 16))
    values[a_positions()] = a
    row, group = np.indices((16, 8))
    words = metadata[4 * (row % 8) + 2 * selector + group // 4].astype(np.int64)
    return decompressed(values, words >> 16 * (row // 8) + 4 * (group % 4) & 0xF)


def mma_sp(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, metadata: np.ndarray, selector: int
) -> np.ndarray:
    """One `mma.sp.m16n8k32`.

    Args:
      a: Registers of A, (32 lanes, 8).
      b: Registers of B, (32, 8).
      c: Registers of the accumulator, (32, 4).
      metadata: As for `expand`.
      selector: As for `expand`.

    Returns:
      The new accumulator registers.
    """
    dense_b = np.zeros((32, 8))
    dense_b[b_positions()] = b
    return c + (expand(a, metadata, selector) @ dense_b)[c_positions()]


def gemm_mma_sp(values: np.ndarray, words: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A · B tile by tile by `mma_sp`: values (M, K/2), words (M/2, K/16), B (K, N)."""
    (m, _), (k, n) = values.shape, b.shape
    out = np.zeros((m, n))
    words = np.asarray(words).view(np.uint32)
    for i in range(0, m, 16):
        for j in range(0, n, 8):
            tile = np.zeros((32, 4))
            for kk in range(0, k, 32):
                column = kk // 64 * 4
                tile = mma_sp(
                    values[i : i + 16, kk // 2 : kk // 2 + 16][a_positions()],
                    b[kk : kk + 32, j : j + 8][b_positions()],
                    tile,
                    words[i // 2 : i // 2 + 8, column : column + 4].ravel(),
                    kk // 32 % 2,
                )
            out[i : i + 16, j : j + 8][c_positions()] = tile
    return out


def wgmma_sp(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, metadata: np.ndarray, selector: int
) -> np.ndarray:
    """One `wgmma.mma_async.sp.m64nNk32` with A in registers.

    Warp w of the four owns rows 16w to 16w + 15, with the fragments of `mma.sp`; N is
    cut into tiles of eight columns.

    Args:
      a: Registers of A, (128 threads, 8).
      b: B in shared memory, (32, N).
      c: Registers of the accumulator, (128, N/2): four for each eight columns.
      metadata: A word of each thread, uint32 (128,).
      selector: Which two of the four lanes of a row hold its metadata.

    Returns:
      The new accumulator registers.
    """
    out = np.empty_like(c)
    for warp in range(4):
        lanes = slice(32 * warp, 32 * warp + 32)
        for tile in range(b.shape[1] // 8):
            columns = slice(4 * tile, 4 * tile + 4)
            out[lanes, columns] = mma_sp(
                a[lanes],
                b[:, 8 * tile : 8 * tile + 8][b_positions()],
                c[lanes, columns],
                metadata[lanes],
                selector,
            )
    return out


def prmt(low: np.ndarray, high: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`prmt.b32` (PTX ISA, "Data movement and conversion instructions").

    Args:
      low: uint32, bytes 0 to 3 of those to choose from.
      high: uint32, bytes 4 to 7.
      places: uint32; of nibbles 0 to 3 the low three bits choose bytes 0 to 3 of the
        result, and the fourth asks for copies of the sign of the byte.
    """
    pool = np.stack([(x >> 8 * i) & 255 for x in (low, high) for i in range(4)], -1)
    out = np.zeros(np.broadcast_shapes(low.shape, places.shape), np.uint32)
    for byte in range(4):
        nibble = (places >> 4 * byte) & 15
        chosen = np.take_along_axis(pool, (nibble & 7)[..., None], -1)[..., 0]
        chosen = np.where(nibble & 8, np.where(chosen & 128, 255, 0), chosen)
        out |= (chosen << 8 * byte).astype(np.uint32)
    return out

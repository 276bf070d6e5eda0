"""Our values and words, read as the instructions read them, are the masked matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from pallas_kernels import compress, compression_mosaic, ptx
from pallas_kernels.reference import compress_2to4
from tests.pallas_kernels import emulator


@pytest.fixture
def case(rng):
    w = rng.integers(-8, 9, (32, 128)).astype(np.float32)
    b = rng.integers(-8, 9, (128, 24)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    return a, b, np.where(mask, w, 0) @ b


def test_mma_sp_of_our_words_is_the_masked_product(case):
    a, b, expected = case
    out = emulator.gemm_mma_sp(np.asarray(a.values), np.asarray(a.metadata), b)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("fault", ["selector", "half", "row", "values"])
def test_a_wrong_layout_gives_another_product(case, fault):
    a, b, expected = case
    values, words = np.asarray(a.values), np.asarray(a.metadata).view(np.uint32)
    match fault:
        case "selector":  # lanes 0, 1 and 2, 3 of each row exchanged
            words = words.reshape(16, -1, 2, 2)[:, :, ::-1].reshape(words.shape)
        case "half":  # row g and row g + 8 exchanged
            words = words >> 16 | words << 16
        case "row":
            words = np.roll(words, 1, axis=0)
        case "values":  # of a group, in decreasing position
            values = values.reshape(32, -1, 2)[:, :, ::-1].reshape(values.shape)
    out = emulator.gemm_mma_sp(values, words, b)
    assert (out != expected).mean() > 0.5


@pytest.mark.slow
def test_the_one_pass_selection_is_the_mask_of_nmjax(rng):
    """Ties, signed zeros, infinities, NaN and subnormals among ordinary entries."""
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 1, -1])
    w = rng.choice(special, (48, 128)).astype(np.float32)
    expected = compress(
        jnp.asarray(w), nmjax.magnitude_mask(w, "2:4", axis=-1), axis=-1
    )
    actual = compress_2to4(jnp.asarray(w), jnp.float32)
    np.testing.assert_array_equal(actual.metadata, expected.metadata)
    np.testing.assert_array_equal(
        np.asarray(actual.values).view(np.uint32),
        np.asarray(expected.values).view(np.uint32),
    )


def test_what_wgmma_reads_from_registers(rng):
    """64 rows over four warps, the metadata of thread 32 w + 4 g + t in row 8 w + g."""
    w = rng.integers(-8, 9, (64, 64)).astype(np.float32)
    b = rng.integers(-8, 9, (64, 16)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4", axis=-1))
    a = compress(jnp.asarray(w), jnp.asarray(mask), axis=-1)
    values, words = np.asarray(a.values), np.asarray(a.metadata).view(np.uint32)
    rows, columns = emulator.a_positions()
    acc = np.zeros((128, 8))
    for step in range(2):
        tiles = values[:, 16 * step : 16 * step + 16].reshape(4, 16, 16)
        fragments = tiles[:, rows, columns].reshape(128, 8)
        part = b[32 * step : 32 * step + 32]
        acc = emulator.wgmma_sp(fragments, part, acc, words.ravel(), step)
    out = np.zeros((4, 16, 16))
    c_rows, c_columns = emulator.c_positions()
    for tile in range(2):
        out[:, c_rows, 8 * tile + c_columns] = acc[:, 4 * tile : 4 * tile + 4].reshape(
            4, 32, 4
        )
    np.testing.assert_array_equal(out.reshape(64, 16), np.where(mask, w, 0) @ b)


@pytest.mark.slow
def test_what_prmt_picks_of_a_mask_is_what_the_interpreter_picks():
    """For all 90 masks, rows and columns: the pair that is kept, and its nibble."""
    masks = (np.arange(2**16)[:, None] >> np.arange(16) & 1).reshape(-1, 4, 4)
    masks = masks[(masks.sum(1) == 2).all(1) & (masks.sum(2) == 2).all(1)]
    assert len(masks) == 90
    bits = (masks.reshape(90, 16) << np.arange(16)).sum(1).astype(np.uint32)
    entries = np.arange(1, 17, dtype=np.uint16).reshape(4, 4)
    first, second, nibbles = (
        emulator.prmt(
            *np.array(table, np.uint8).view(np.uint32)[:, None], bits & 0x7777
        )
        for table in (
            compression_mosaic._FIRST,
            compression_mosaic._SECOND,
            compression_mosaic._NIBBLE,
        )
    )
    for row in range(4):
        kept = np.nonzero(masks[:, row])[1].reshape(90, 2)
        both = emulator.prmt(first, second, np.uint32(row | (4 + row) << 4)[None])
        low, high = entries[row].view(np.uint32)
        pair = emulator.prmt(np.full_like(both, low), np.full_like(both, high), both)
        pair = pair.view(np.uint16).reshape(90, 2)
        np.testing.assert_array_equal(pair, entries[row][kept])
        np.testing.assert_array_equal(
            (nibbles >> 8 * row) & 15, kept[:, 0] | kept[:, 1] << 2
        )
        index = jnp.asarray(bits.view(np.int32))[:, None]
        meanings = [
            ptx._lookup_meaning(index, table)
            for table in (compression_mosaic._FIRST, compression_mosaic._SECOND)
        ]
        meant = ptx._pick_pair_meaning(
            jnp.broadcast_to(entries[row], (90, 4)), *meanings, byte=row, layout=None
        )
        np.testing.assert_array_equal(meant, pair)

"""Values and metadata: exact round trips, the words by hand, corruption found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from pallas_kernels import nm_matmul
from pallas_kernels.format import NMCompressed, compress, decompress, positions

pytestmark = pytest.mark.usefixtures("strict_promotion")

DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "float8_e5m2"]
PATTERNS = ["2:4", "1:2", "1:4", "2:8", "4:8", "3:5", "4:4"]


def bits_of(x) -> np.ndarray:
    """The bytes of an array: NaN equals itself, and -0.0 differs from 0.0."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def random_case(rng, pattern, shape, axis, dtype=np.float32):
    w = rng.integers(-9, 9, shape).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, pattern, axis=axis))
    return jnp.asarray(w, dtype), jnp.asarray(mask)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(
    "pattern",
    [
        "2:4",
        "2:8",
        "3:5",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("1:2", "1:4", "4:8", "4:4", "8:32")
        ),
    ],
)
def test_decompress_gives_the_masked_matrix_back(rng, pattern, axis):
    m = nmjax.NMPattern(pattern).m
    shape = (2, 3 * m, 5) if axis == -2 else (2, 5, 3 * m)
    w, mask = random_case(rng, pattern, shape, axis)
    compressed = compress(w, mask, nmjax.NMPattern(pattern), axis=axis)
    compressed.validate()
    assert compressed.shape == shape and compressed.dtype == w.dtype
    np.testing.assert_array_equal(
        bits_of(decompress(compressed)), bits_of(np.where(mask, w, np.float32(0)))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(rng, dtype):
    bits = 8 * jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 2**bits, (64, 24), dtype=np.uint64).astype(f"u{bits // 8}")
    w = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.dtype(dtype))
    mask = nmjax.nm_mask(rng.random((64, 24)), "2:4")
    compressed = compress(w, mask)
    assert compressed.values.shape == (24, 32) and compressed.dtype == w.dtype
    expected = np.where(mask, raw, 0).astype(raw.dtype)
    np.testing.assert_array_equal(bits_of(decompress(compressed)), expected)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (2, 0, 8), (0, 8, 8)])
def test_nothing_at_all(shape, pattern):
    for axis in (-1, -2):
        compressed = compress(np.ones(shape), np.zeros(shape, bool), pattern, axis=axis)
        compressed.validate()
        assert compressed.shape == decompress(compressed).shape == shape


def test_complex_numbers_are_refused():
    w, mask = np.ones((4, 4), np.complex64), np.zeros((4, 4), bool)
    with pytest.raises(ValueError, match="w is complex64, .* expected real numbers"):
        compress(w, mask)


def test_parts_that_end_within_a_word_are_refused_when_read(rng):
    """Each has padded its own metadata."""
    w = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    parts = [compress(x, nmjax.magnitude_mask(x, "2:4")) for x in jnp.split(w, 2)]
    joined = dataclasses.replace(
        parts[0],
        values=jnp.concatenate([part.values for part in parts], axis=-1),
        metadata=jnp.concatenate([part.metadata for part in parts], axis=-1),
    )
    for read in (decompress, lambda c: nm_matmul(jnp.ones((1, 64)), c)):
        for function in (read, jax.jit(read)):
            with pytest.raises(ValueError, match=r"\(8, 8\); .* need int32\(8, 4\)"):
                function(joined)


def test_the_words_by_hand():
    """One word: four groups of row 0 in its low half, of row 8 in its high half."""
    mask = np.zeros((16, 16), bool)
    mask[:, ::4] = mask[:, 1::4] = True  # positions 0, 1: nibble 0x4
    mask[0] = [*"1100101010010110"] == np.array("1")  # 0x4, 0x8, 0xc, 0x9
    mask[8] = [*"0101001100111100"] == np.array("1")  # 0xd, 0xe, 0xe, 0x4
    compressed = compress(jnp.ones((16, 16)), jnp.asarray(mask), axis=-1)
    assert compressed.metadata.shape == (8, 4)  # 16 columns padded to 64
    words = np.asarray(compressed.metadata).view(np.uint32)
    assert words[0, 0] == 0x4EED_9C84
    assert (words.ravel()[1:] == 0x4444_4444).all()


def test_bytes_of_another_pattern_by_hand():
    mask = jnp.asarray([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]], bool)  # 1:2
    compressed = compress(jnp.ones((2, 6)), mask, "1:2", axis=-1)
    assert compressed.metadata.tolist() == [[0b101], [0b010]]


def test_a_group_that_keeps_fewer_stores_zeros():
    w = jnp.asarray([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    mask = jnp.asarray([[0, 0, 0, 1], [0, 0, 0, 0]], bool)
    compressed = compress(w, mask, axis=-1)
    compressed.validate()
    assert compressed.values.tolist() == [[0, 4], [0, 0]]
    assert positions(compressed).tolist() == [[[0, 3]], [[0, 1]]]
    assert decompress(compressed).tolist() == [[0, 0, 0, 4], [0, 0, 0, 0]]


special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3e38]
)


@pytest.mark.slow
@given(st.data(), st.sampled_from([(1, 1), (1, 5), (17, 3)]))
def test_special_values_come_back(data, shape):
    """Ties, signed zeros, NaN, infinities, subnormals; from k = 4 and one row up."""
    rows, groups = shape
    size = 4 * groups * rows
    entries = data.draw(st.lists(special, min_size=size, max_size=size))
    w = np.asarray(entries, np.float32).reshape(4 * groups, rows)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4"))
    back = np.asarray(decompress(compress(jnp.asarray(w), jnp.asarray(mask))))
    np.testing.assert_array_equal(bits_of(back), bits_of(np.where(mask, w, 0)))


def test_transposing_is_free_and_right(rng):
    w, mask = random_case(rng, "2:4", (3, 8, 6), -2)
    compressed = compress(w, mask)
    assert compressed.T.values is compressed.values
    assert compressed.T.shape == (3, 6, 8) and compressed.T.T == compressed
    np.testing.assert_array_equal(
        decompress(compressed.T), jnp.swapaxes(decompress(compressed), -1, -2)
    )


def test_two_bits_a_value():
    compressed = compress(jnp.ones((128, 32), jnp.bfloat16), nm_ones((128, 32)))
    assert compressed.nbytes == 128 * 32 * (1 + 1 / 8)


def nm_ones(shape):
    return nmjax.nm_mask(jnp.ones(shape), "2:4")


def test_it_is_a_pytree(rng):
    """jit, vmap over a leading axis, scan, donation."""
    w, mask = random_case(rng, "2:4", (3, 8, 6), -2)
    whole = compress(w, mask)
    each = jax.vmap(compress)(w, mask)
    jax.tree.map(np.testing.assert_array_equal, each, whole)
    _, scanned = jax.lax.scan(lambda c, one: (c, decompress(one)), None, whole)
    np.testing.assert_array_equal(scanned, decompress(whole))
    assert jax.eval_shape(jax.vmap(decompress), whole).shape == whole.shape
    doubled = jax.jit(
        lambda c: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), c),
        donate_argnums=0,
    )(each)
    np.testing.assert_array_equal(doubled.values, whole.values + 1)


def test_sharded_by_output_features():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jnp.arange(64 * 32.0).reshape(64, 32)
    compressed = compress(w, nm_ones(w.shape))
    sharded = jax.device_put(compressed, by_rows)
    local = jax.shard_map(
        lambda c: decompress(c).T,
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("x"),
        out_specs=jax.sharding.PartitionSpec("x"),
    )(sharded)
    np.testing.assert_array_equal(local.T, decompress(compressed))


@pytest.mark.slow
def test_orbax_saves_and_restores_it(tmp_path, rng):
    import orbax.checkpoint as ocp

    w, mask = random_case(rng, "2:4", (8, 6), -2)
    tree = {"head": compress(w, mask)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "checkpoint", jax.tree.map(jnp.zeros_like, tree)
        )
    restored["head"].validate()
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def corrupted(compressed, index, word):
    metadata = np.array(compressed.metadata)
    metadata[index] = word
    return NMCompressed(
        compressed.values, jnp.asarray(metadata), compressed.pattern, compressed.axis
    )


@pytest.mark.parametrize("nibble, places", [(0x0, [0, 0]), (0x1, [1, 0])])
def test_validate_names_the_corrupt_group(nibble, places):
    compressed = compress(jnp.ones((64, 32)), nm_ones((64, 32)))
    word = np.uint32(0x4444_4444 & ~(0xF << 20) | nibble << 20).view(np.int32)
    bad = corrupted(compressed, (3, 2), word)  # row 11, group 9
    with pytest.raises(ValueError, match=r"row 11, group 9 .*columns 36 to 39") as e:
        bad.validate()
    assert str(places) in str(e.value)


def test_validate_names_a_position_beyond_the_group():
    compressed = compress(jnp.ones((2, 10)), jnp.eye(2, 10, dtype=bool), "1:5", axis=-1)
    compressed.validate()
    with pytest.raises(ValueError, match=r"row 1, group 1 .*\[7\]"):
        corrupted(compressed, (1, 0), 0x70).validate()


def test_validate_refuses_arrays_that_do_not_belong_together():
    compressed = compress(jnp.ones((64, 32)), nm_ones((64, 32)))
    with pytest.raises(ValueError, match=r"metadata are int32\(16, 4\).*\(24, 4\)"):
        NMCompressed(jnp.ones((48, 32)), compressed.metadata).validate()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"pattern": "4:2"}, "0 < n <= m"),
        ({"pattern": "2:300"}, "m <= 256"),
        ({"axis": 0}, "axis must be -1 or -2"),
        ({"pattern": "2:8"}, "size 4, not a multiple of m = 8"),
        ({"mask": jnp.ones((4, 3), bool)}, "keeps 4 of 4 .* more than n = 2"),
        ({"mask": jnp.ones((4, 3))}, "bool mask of its shape"),
        ({"mask": jnp.ones((3, 4), bool)}, r"mask bool\(3, 4\)"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    arguments = {"w": jnp.ones((4, 3)), "mask": nm_ones((4, 3))} | kwargs
    with pytest.raises(ValueError, match=message):
        compress(**arguments)

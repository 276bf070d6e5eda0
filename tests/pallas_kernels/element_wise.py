"""What the tests of element-wise kernels share: hard matrices, exact comparisons."""

import itertools
import re
from collections import Counter

import jax.numpy as jnp
import numpy as np

from pallas_kernels import NMCompressed

# Ties, both zeros, two subnormal numbers of every floating type, infinities, NaN.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3e-6, -6e-6, np.inf, np.nan]


def every_group(axis: int, dtype) -> np.ndarray:
    """A matrix of all 4,096 groups of four special entries: (64, 256) or (256, 64)."""
    dtype = jnp.dtype(dtype)
    scale = 1.0 if dtype == jnp.float16 else 2.0**-115  # 3e-6 becomes subnormal
    entries = np.array(SPECIAL, np.float32)
    entries[4:6] *= np.float32(scale)
    groups = np.array([*itertools.product(entries, repeat=4)], np.float32)
    matrix = groups.reshape(64, 256).astype(dtype)
    return matrix if axis == -1 else np.ascontiguousarray(matrix.T)


def assert_same(actual: NMCompressed, expected: NMCompressed) -> None:
    """The same shape and metadata, and values of the same bits but for those of NaN."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(actual.metadata, expected.metadata)
    np.testing.assert_array_equal(_bits(actual.values), _bits(expected.values))


def _bits(x) -> np.ndarray:
    x = np.asarray(x)
    bits = x.view(f"uint{8 * x.dtype.itemsize}")
    return np.where(np.isnan(x.astype(np.float32)), 1 + 0 * bits, bits)


def hard_scores(shape: tuple[int, int]) -> np.ndarray:
    """Scores of a few values, so that most tiles have ties, infinities and NaN; f32."""
    rng = np.random.default_rng(shape)
    scores = rng.integers(-2, 4, shape).astype(np.float32)
    scores += rng.integers(0, 2, shape) * rng.random(shape, np.float32)
    for value in (np.inf, -np.inf, np.nan):
        scores[rng.random(shape) < 0.02] = value
    return scores


def widths(ptx: str, instruction: str) -> dict[int, int]:
    """How many loads or stores of how many bytes a thread has in global memory."""
    found = re.findall(rf"\s{instruction}(?:\.global)?(?:\.v(\d))?\.[bfu](\d+)", ptx)
    return dict(Counter(int(count or 1) * int(bits) // 8 for count, bits in found))

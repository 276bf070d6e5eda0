"""The entropic masks: feasible whatever the scores are, and close to the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.cycle_cancelling import best_tiles, integer_scores
from nmjax.masks.entropic import entropic_tiles

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(scope="module")
def masks():
    """The entropic and the best 4:8 mask of scores `(8, 8, tiles)`, jitted."""

    @jax.jit
    def both(scores):
        integers, _ = integer_scores(scores)
        return integers, entropic_tiles(integers, 4), best_tiles(integers, 4).mask

    return lambda scores: both(jnp.asarray(scores, jnp.float32))


def test_masks_keep_nearly_the_largest_sum(rng, masks):
    integers, entropic, best = map(np.asarray, masks(abs(rng.normal(size=(8, 8, 64)))))
    kept, most = ((integers * m).sum(dtype=np.int64) for m in (entropic, best))
    assert 0.998 * most <= kept <= most


@pytest.mark.parametrize("kind", ["tied", "constant", "zero", "outliers", "infinite"])
def test_rows_and_columns_keep_n_whatever_the_scores_are(kind, rng, masks):
    scores = {
        "tied": rng.integers(0, 2, (8, 8, 64)),
        "constant": np.ones((8, 8, 64)),
        "zero": np.zeros((8, 8, 64)),
        "outliers": np.exp(9 * rng.normal(size=(8, 8, 64))),
        "infinite": rng.choice([np.inf, -np.inf, np.nan, 1.0, 0.0], (8, 8, 64)),
    }[kind]
    _, mask, _ = map(np.asarray, masks(scores))
    assert (mask.sum(0) == 4).all() and (mask.sum(1) == 4).all()

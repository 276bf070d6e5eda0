"""What the tests compare with: the definitions, in plain NumPy, loops and all."""

import math

import numpy as np


def nm_mask(scores, n: int, m: int, axis: int = -2, ragged: str | None = None):
    """n kept of every m along `axis`, ties to the lower index, NaN below -inf."""
    rows = np.moveaxis(np.asarray(scores).astype(np.float64), axis, -1)
    mask = np.zeros(rows.shape, bool)
    size = rows.shape[-1]
    for row in np.ndindex(rows.shape[:-1]):
        for start in range(0, size, m):
            group = list(rows[row][start : start + m])
            if len(group) < m and ragged == "dense-tail":
                mask[(*row, slice(start, size))] = True
                continue
            assert len(group) == m or ragged == "pad", "m must divide the axis"
            order = sorted(range(len(group)), key=lambda j: (_rank(group[j]), j))
            for j in order[:n]:
                mask[(*row, start + j)] = True
    return np.moveaxis(mask, -1, axis)


def _rank(score: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(score) else (False, -score)


def magnitude_mask(w, n: int, m: int, axis: int = -2, ragged: str | None = None):
    """The mask of |w|."""
    return nm_mask(np.abs(np.asarray(w).astype(np.float64)), n, m, axis, ragged)


def masked(w, mask):
    """E ⊙ W, the weight that the GEMM reads."""
    return np.where(mask, w, np.zeros_like(w))


def sr_ste_gradient(gradient, w, mask, decay: float):
    """g + λ(1 − E) ⊙ W in the dtype of `w` (arXiv:2102.04010, equation 9)."""
    w = np.asarray(w)
    return np.asarray(gradient) + w.dtype.type(decay) * masked(w, ~np.asarray(mask))

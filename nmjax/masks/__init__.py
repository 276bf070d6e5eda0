"""Which weights are kept: pure functions from arrays to boolean masks.

A mask has the shape of the weight; `True` means kept.
"""

from nmjax.masks import permutation
from nmjax.masks.magnitude import Ragged, magnitude_mask, nm_mask
from nmjax.masks.tiles import TileAlgorithm, sparsify_like, tile_mask
from nmjax.masks.transposable import CertifiedMask, kept_and_best, transposable_mask

__all__ = [
    "CertifiedMask",
    "Ragged",
    "TileAlgorithm",
    "kept_and_best",
    "magnitude_mask",
    "nm_mask",
    "permutation",
    "sparsify_like",
    "tile_mask",
    "transposable_mask",
]

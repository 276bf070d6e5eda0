"""Which weights are kept: pure functions from arrays to boolean masks.

A mask has the shape of the weight; `True` means kept.
"""

from nmjax.masks.magnitude import Ragged, magnitude_mask, nm_mask

__all__ = ["Ragged", "magnitude_mask", "nm_mask"]

"""Patches against lax's own, whose channel order is channel-major."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nmjax.patches import patches_of

CASES = {
    "same": ((3, 2), (1, 1), "SAME", None, None),
    "valid, strides": ((2, 3), (2, 1), "VALID", None, None),
    "negative pads": ((2, 2), (1, 1), ((-1, 2), (0, 1)), None, None),
    "dilations": ((2, 2), (1, 2), ((1, 1), (0, 0)), (2, 1), (1, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_patches_are_those_of_lax(case):
    window, strides, padding, lhs, rhs = CASES[case]
    x = jnp.arange(2.0 * 6 * 5 * 3).reshape(2, 6, 5, 3)
    ours = patches_of(x, window, strides, padding, lhs, rhs)
    theirs = lax.conv_general_dilated_patches(
        x,
        window,
        strides,
        padding,
        lhs_dilation=lhs,
        rhs_dilation=rhs,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # (N, H, W, C · window)
    theirs = theirs.reshape(*theirs.shape[:-1], 3, -1)
    np.testing.assert_array_equal(ours, np.moveaxis(theirs, -2, -1))

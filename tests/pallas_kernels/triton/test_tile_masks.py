"""Triton's 4x4 transposable mask: interpreted against the oracle, compiled."""

import functools
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.triton import tile_masks
from tests.pallas_kernels.element_wise import hard_scores, widths
from tests.pallas_kernels.triton import compiled, launches

pytestmark = [
    pytest.mark.usefixtures("strict_promotion"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton"
    ),
]

CASES = [
    (at_most, dtype, shape)
    for at_most in (False, True)
    for dtype, shape in (("float32", (64, 128)), ("bfloat16", (20, 36)))
]


def scores_of(case):
    _, dtype, shape = case
    return jnp.asarray(hard_scores(shape), dtype)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    cases = {
        case: functools.partial(tile_masks.tile_mask, scores_of(case), at_most=case[0])
        for case in CASES
    }
    folder = tmp_path_factory.mktemp("triton")
    return launches.interpret(cases, (tile_masks,), folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_is_the_reference(case, interpreted):
    expected = reference.tile_mask(scores_of(case), at_most=case[0])
    np.testing.assert_array_equal(interpreted[case], expected)


@compiled.needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("at_most", [False, True])
def test_kernel_compiles_with_wide_loads(capability, at_most):
    result = compiled.compile_launch(
        tile_masks,
        lambda: tile_masks.tile_mask(
            jnp.zeros((1024, 4096), jnp.bfloat16), at_most=at_most
        ),
        capability,
    )
    assert widths(result.ptx, "ld") == {16: 2}
    assert widths(result.ptx, "st") == {4: 1}
    assert result.launch.shared_memory <= 16 * 1024


@compiled.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("at_most, capability", [(False, 80), (True, 90)])
def test_compiled_kernel_is_the_reference(capability, at_most):
    scores = jnp.asarray(hard_scores((20, 36)))
    actual = compiled.run_launch(
        tile_masks, lambda: tile_masks.tile_mask(scores, at_most=at_most), capability
    )
    expected = reference.tile_mask(scores, at_most=at_most)
    np.testing.assert_array_equal(actual, expected)

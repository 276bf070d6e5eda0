"""What the compiler makes of the kernels, run on the CPU: `ptx_machine.py`.

The same products as the interpreted ones, on the GPUs' own instructions, addresses and
barriers. A kernel is compiled for its sizes, so there are fewer of them.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from pallas_kernels import (
    compress,
    compression_mosaic,
    matmul_sm80,
    matmul_sm90,
    matmul_sm100,
    ptx,
    reference,
    tile_masks_mosaic,
)
from pallas_kernels.config import SM80Config, SM90Config, SM100Config
from pallas_kernels.reference import Form
from tests.pallas_kernels import ahead_of_time, gemm_suite, on_machine
from tests.pallas_kernels.ahead_of_time import (
    A100,
    B200,
    H200,
    RTX3090,
    RTX4090,
    RTX5090,
)
from tests.pallas_kernels.element_wise import SPECIAL, assert_same, hard_scores
from tests.pallas_kernels.on_machine import OnMachine

pytestmark = [
    pytest.mark.usefixtures("strict_promotion"),
    pytest.mark.skipif(
        ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing())
    ),
    pytest.mark.skipif(
        ptx.JAX_VERSION < ptx.AMPERE_SINCE,
        reason="jax compiles for Ampere, and shows what the host does, from 0.11.1 on",
    ),
]

FORMS = gemm_suite.FORMS
SHARED = SM90Config(block_m=128, block_n=64, block_k=64, stages=2)
REGISTERS = dataclasses.replace(SHARED, a_from="registers")
AMPERE = SM80Config(block_m=128, block_n=64, block_k=64, stages=3)


def check(module, rng, how: OnMachine, config, sizes, *args, **kwargs):
    def gemm(*operands):
        with on_machine.kernels():
            return module.gemm(*operands, config=config, interpret=how)

    gemm_suite.check(gemm, rng, *sizes, *args, **kwargs)


@pytest.mark.parametrize("config", [SHARED, REGISTERS], ids=["shared", "registers"])
def test_hopper(rng, config):
    check(matmul_sm90, rng, OnMachine(H200), config, (256, 192, 192))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SHARED, REGISTERS], ids=["shared", "registers"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_hopper_in_every_layout(rng, form, config):
    """Three tiles a block, none of them full."""
    sizes = (300, 136, 196)
    check(matmul_sm90, rng, OnMachine(H200), config, sizes, form, with_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, sizes",
    [
        (dataclasses.replace(SHARED, cluster_m=2), (512, 128, 260)),
        (dataclasses.replace(REGISTERS, cluster_m=4), (512, 128, 260)),
        (SM90Config(128, 128, 128, 3, epilogue_n=128), (128, 256, 512)),
        (SM90Config(256, 64, 64, 3, 2, a_from="registers"), (512, 64, 320)),
        (SM90Config(128, 256, 64, 3, epilogue_n=32), (128, 300, 256)),
    ],
    ids=str,
)
def test_hopper_in_other_tiles(rng, config, sizes):
    # With steps of 128 a row of metadata has 32 bytes: of the 8 rows that ldmatrix
    # reads at a time two lie in the same banks.
    conflicts = 10 / 9 if config.block_k == 128 else 1
    check(matmul_sm90, rng, OnMachine(H200, conflicts=conflicts), config, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_hopper_float32_out(rng, form):
    form = dataclasses.replace(form, out_dtype=jnp.float32)
    how = OnMachine(H200, seeds=(0,))
    check(matmul_sm90, rng, how, SHARED, (128, 64, 128), form)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
def test_hopper_activations_of_normal_numbers(rng, activation, gemm_atol):
    form = Form(activation=activation, out_dtype=jnp.float16)
    kwargs = {"dtype": "float16", "atol": gemm_atol("float16", 256), "with_bias": True}
    how = OnMachine(H200, seeds=(0,))
    check(matmul_sm90, rng, how, SHARED, (128, 64, 256), form, **kwargs)


def test_ampere(rng):
    check(matmul_sm80, rng, OnMachine(A100), AMPERE, (128, 128, 256))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, target, config",
    [
        *zip(FORMS, (A100, RTX3090, RTX4090, RTX5090), (AMPERE,) * 4, strict=True),
        ("fprop x24, wgrad", B200, SM80Config(64, 64, 128, 2, m_warps=1)),
        ("wgrad xᵀ dy24", H200, SM80Config(128, 128, 64, 2)),  # by TMA
    ],
    ids=str,
)
def test_ampere_in_every_layout(rng, name, target, config):
    """Four or more tiles, not all of them full."""
    sizes = (200, 136, 324)
    how = OnMachine(target, seeds=(0,))
    check(matmul_sm80, rng, how, config, sizes, FORMS[name], with_bias=True)


def check_blackwell(rng, how: OnMachine, config, sizes, form, **kwargs):
    """Where others are interpreted this kernel takes A decompressed: so not `gemm`."""

    def gemm(*operands):
        with on_machine.kernels(compiled=how):
            *arrays, form = operands
            return matmul_sm100._gemm(
                *arrays, form=form, config=config, blocks=2, interpret=None
            )

    gemm_suite.check(gemm, rng, *sizes, form, **kwargs)


BLACKWELL = SM100Config(block_m=128, block_n=64, block_k=128, stages=2)


def test_blackwell(rng):
    form = FORMS["fprop W24, dgrad W24ᵀ"]
    check_blackwell(rng, OnMachine(B200), BLACKWELL, (128, 64, 256), form)


@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_blackwell_in_every_layout(rng, form, out_dtype):
    """Six tiles on two blocks, not all of them full."""
    form = dataclasses.replace(form, out_dtype=out_dtype)
    sizes = (300, 136, 388)
    check_blackwell(rng, OnMachine(B200), BLACKWELL, sizes, form, with_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, sizes",
    [
        (SM100Config(128, 256, 128, 2), (256, 300, 256)),
        (SM100Config(128, 64, 256, 2), (128, 128, 768)),
    ],
    ids=str,
)
def test_blackwell_in_other_tiles(rng, config, sizes):
    form = FORMS["fprop x24, wgrad"]
    check_blackwell(rng, OnMachine(B200), config, sizes, form)


@pytest.mark.slow
def test_missing_metadata_are_found_on_blackwell(rng):
    how = OnMachine(B200, edit=lambda ptx: re.sub(r"tcgen05\.cp.*", "", ptx))
    with pytest.raises(AssertionError, match="metadata out of order|Mismatched"):
        check_blackwell(rng, how, BLACKWELL, (128, 64, 128), Form())


def without_selector(ptx: str) -> str:
    """Each second instruction takes the metadata of the first."""
    return re.sub(r", 1, (p, 1, 1, 0)", r", 0, \1", ptx)


FAULTS = {
    "the other half's metadata": (without_selector, "Mismatched elements"),
    "products not waited for": (
        lambda ptx: ptx.replace("wgmma.wait_group.sync.aligned \t0;", ""),
        "Mismatched elements|depends on the order",
    ),
    "no fence before TMA": (
        lambda ptx: ptx.replace("fence.proxy.async.shared::cta;", ""),
        "no fence",
    ),
    "a slice written while TMA reads it": (
        lambda ptx: re.sub(r"(bulk.wait_group.read \t)0", r"\g<1>9", ptx),
        "Mismatched elements|depends on the order",
    ),
    "stages taken without waiting": (
        lambda ptx: re.sub(r"mbarrier\.try_wait.*", "setp.eq.b32 P1, 0, 0;", ptx),
        "before it was written|Mismatched|depends on the order",
    ),
    "B half a tile further": (
        lambda ptx: re.sub(
            r"(add\.s64 .*, )(46116\d+);", lambda m: f"{m[1]}{int(m[2]) + 2};", ptx
        ),
        "before it was written|Mismatched elements",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_ptx_is_found(rng, name):
    edit, message = FAULTS[name]

    def changed(ptx):
        assert edit(ptx) != ptx
        return edit(ptx)

    how = OnMachine(H200, seeds=(0, 1, 2, 3), edit=changed)
    with pytest.raises(AssertionError, match=message):
        check(matmul_sm90, rng, how, SHARED, (256, 128, 256))


def special(rng, shape, dtype):
    return jnp.asarray(rng.choice([*SPECIAL, 2.0, 0.5], shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, dtype, target",
    [
        (-1, "float32", H200),
        (-2, "bfloat16", B200),
        (-1, "bfloat16", A100),
        (-2, "float32", RTX5090),
    ],
)
def test_compression(rng, axis, dtype, target):
    w = special(rng, (68, 84) if axis == -1 else (84, 68), dtype)
    with on_machine.kernels():
        actual = compression_mosaic.compress_magnitude(
            w, axis=axis, dtype=jnp.bfloat16, interpret=OnMachine(target)
        )
    mask = nmjax.magnitude_mask(w, "2:4", axis=axis)
    assert_same(actual, compress(w, mask, axis=axis, dtype=jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "at_most, dtype, target",
    [(False, "float32", H200), (True, "bfloat16", B200), (False, "bfloat16", A100)],
)
def test_compression_of_both_forms(rng, at_most, dtype, target):
    w = special(rng, (36, 20), dtype)
    with on_machine.kernels():
        actual = compression_mosaic.compress_transposable(
            w, dtype=jnp.bfloat16, at_most=at_most, interpret=OnMachine(target)
        )
    expected = reference.compress_transposable(w, jnp.bfloat16, at_most=at_most)
    for form, same in zip(actual, expected, strict=True):
        assert_same(form, same)


@pytest.mark.slow
@pytest.mark.parametrize("at_most, target", [(False, RTX4090), (True, H200)])
def test_tile_masks(at_most, target):
    scores = jnp.asarray(hard_scores((20, 36)))
    with on_machine.kernels():
        actual = tile_masks_mosaic.tile_mask(
            scores, at_most=at_most, interpret=OnMachine(target)
        )
    expected = reference.tile_mask(scores, at_most=at_most)
    np.testing.assert_array_equal(actual, expected)

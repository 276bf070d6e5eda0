"""Configs: what they count, what they refuse, what the heuristics choose."""

import itertools

import pytest

from pallas_kernels.config import (
    SM80Config,
    SM90Config,
    SM100Config,
    heuristic_sm80,
    heuristic_sm90,
    heuristic_sm100,
    shared_memory_limit,
)

KB = 1024


@pytest.mark.parametrize(
    "config, shared_memory",
    [
        # Values and B of a stage, or a tile of D if that is more.
        (SM80Config(128, 128, 64, 4), 4 * (8 + 16) * KB),
        (SM80Config(128, 128, 64, 1), 128 * 128 * 2),
        # Values, metadata and B of a stage; then two slices of D a warpgroup.
        (SM90Config(128, 256, 64, 4), 4 * (8 + 1 + 32) * KB + 32 * KB + KB),
        (SM90Config(256, 128, 64, 6, a_from="registers"), (6 * 16 + 64 + 1) * KB),
        (SM100Config(128, 256, 128, 2), 2 * (16 + 2 + 64) * KB + 32 * KB + KB),
    ],
)
def test_shared_memory_is_the_sum_of_what_it_holds(config, shared_memory):
    assert config.shared_memory == shared_memory


def test_registers_of_a_thread():
    # 128 x 128 accumulators of 128 threads; 64 x 32 values, 64 x 64 of B, 32 x 4 words
    # of a warp's 32 threads, the values two to a register.
    assert SM80Config(128, 128, 64, 2).registers == 128 + 32 + 64 + 4
    assert SM90Config(128, 256, 64, 2).registers == 128 + 1
    # Four instructions of four registers and two words, there twice.
    assert SM90Config(256, 128, 64, 2, a_from="registers").registers == 128 + 2 * 18


@pytest.mark.parametrize(
    "tile, a_from, bound",
    [
        # By hand: 512 clocks of products, over 64 KB + 8 KB read and 41 KB written.
        ((128, 256), "shared", 1024 * 128 / (113 * KB)),
        ((256, 128), "shared", 1024 * 128 / (114 * KB)),
        ((128, 256), "registers", 1024 * 128 / (96 * KB)),
        ((256, 128), "registers", 1024 * 128 / (80 * KB)),
    ],
)
def test_the_bound_of_shared_memory(tile, a_from, bound):
    assert SM90Config(*tile, 64, 2, a_from=a_from).speed_bound == pytest.approx(bound)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (SM80Config, (96, 64, 64, 2), "block_m = 96, expected a .* multiple of 64"),
        (SM80Config, (64, 64, 96, 2), r"block_k = 96, expected one of \(64, 128\)"),
        (SM80Config, (64, 64, 64, 0), "stages = 0, expected at least 1"),
        (SM80Config, (64, 64, 64, 2.0), "stages = 2.0, expected at least 1, a whole"),
        (SM80Config, ("64", 64, 64, 2), "block_m = '64', expected a positive"),
        (SM80Config, (64, 64, 64, 2, 3), r"m_warps = 3, expected one of \(1, 2, 4\)"),
        # Compiled, this one spills.
        (SM80Config, (128, 128, 64, 2, 4), "274 registers .* 232 .* lower block_m"),
        (SM80Config, (128, 64, 128, 9), "294912 bytes .* 166912 .* lower stages"),
        (SM90Config, (64, 128, 64, 2), "block_m = 64, expected a .* multiple of 128"),
        (SM90Config, (128, 320, 64, 2), "block_n is at most 256"),
        (SM90Config, (128, 128, 64, 2, 3), "cluster_m = 3"),
        (SM90Config, (128, 64, 64, 2, 1, 128), "epilogue_n = 128 does not divide"),
        (SM90Config, (128, 64, 64, 2, 1, 64, "memory"), "a_from = 'memory'"),
        (SM90Config, (256, 256, 64, 2), "258 registers .* 200"),
        (SM90Config, (128, 128, 64, 1), "stages = 1, but with A from shared memory"),
        (SM90Config, (128, 256, 64, 5), "243712 bytes .* 232448 .* lower stages"),
        (SM100Config, (64, 128, 128, 2), r"block_m = 64, expected one of \(128,\)"),
        (SM100Config, (128, 128, 64, 2), "block_k = 64"),
        (SM100Config, (128, 256, 128, 3), "285696 bytes .* 232448"),
        (SM100Config, (128, 256, 256, 33), "520 columns of .* more than the 512"),
    ],
)
def test_what_cannot_be_compiled_cannot_be_made(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


SHAPES = list(
    itertools.product((1, 64, 768, 4096, 16384), (1, 512, 65536), (4, 576, 8192))
)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_heuristics_fit_every_shape(m, n, k):
    heuristic_sm90(m, n, k)
    heuristic_sm100(m, n, k)
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
        limit = shared_memory_limit(capability)
        assert heuristic_sm80(m, n, k, limit).shared_memory <= limit


def test_heuristics_choose_what_their_comments_say():
    large = heuristic_sm90(4096, 16384, 4096)
    assert (large.block_m, large.block_n, large.a_from) == (256, 128, "registers")
    assert large.cluster_m == 2 and large.stages == 6
    assert heuristic_sm90(4096, 512, 4096).a_from == "shared"
    assert heuristic_sm90(768, 65536, 768).cluster_m == 1  # three rows of tiles
    assert heuristic_sm80(4096, 4096, 64).block_n == 128
    assert heuristic_sm80(256, 256, 4096).block_n == 64
    assert heuristic_sm80(4096, 4096, 4096, 99 * KB).stages == 4
    assert 2 * heuristic_sm80(4096, 4096, 4096).shared_memory <= 163 * KB
    assert heuristic_sm100(4096, 16384, 4096).block_n == 256
    assert heuristic_sm100(512, 512, 4096).block_n == 128


def test_an_unknown_capability_has_the_least_shared_memory():
    assert shared_memory_limit((13, 7)) == 99 * KB

"""The Configs that a tuning run tries, for each architecture."""

import dataclasses
import itertools
from typing import Any

from pallas_kernels.config import CONFIGS, Architecture, with_most_stages


def search_space(
    architecture: Architecture, shared_memory: int | None = None
) -> list[Any]:
    """Every Config that a tuning run tries, with as many stages as fit.

    Args:
      architecture: "sm80", "sm90" or "sm100".
      shared_memory: Bytes that a block may have; by default the most there is.
    """
    if architecture not in CONFIGS:
        raise ValueError(f"{architecture!r}: expected one of {[*CONFIGS]}")
    fields: dict[str, tuple] = {
        "sm80": {
            "tile": ((64, 128), (128, 64), (128, 128), (256, 64)),
            "block_k": (64, 128),
            "m_warps": (1, 2, 4),
        },
        "sm90": {
            "tile": ((128, 128), (128, 256), (256, 128), (256, 192)),
            "block_k": (64, 128),
            "cluster_m": (1, 2, 4),
            "a_from": ("shared", "registers"),
        },
        "sm100": {
            "tile": ((128, 64), (128, 128), (128, 192), (128, 256)),
            "block_k": (128, 256),
        },
    }[architecture]
    found = []
    for values in itertools.product(*fields.values()):
        chosen = dict(zip(fields, values, strict=True))
        block_m, block_n = chosen.pop("tile")
        chosen |= {"block_m": block_m, "block_n": block_n}
        try:
            longest = with_most_stages(
                CONFIGS[architecture], chosen, most=8, shared_memory=shared_memory
            )
        except ValueError:
            continue
        if longest.stages < 2:  # nothing is loaded while it multiplies
            continue
        found.append(longest)
        # Fewer stages leave room for a second block, where blocks are not persistent.
        if architecture == "sm80" and longest.stages > 2:
            found.append(dataclasses.replace(longest, stages=longest.stages // 2 + 1))
    return found

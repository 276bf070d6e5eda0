"""The clock: how long one product takes, of several that race in one run.

One run of a contender makes the same product of several sets of operands, one after
another, in one executable. All sets together are larger than any L2, so no product
finds its operands there warm from the one before. Runs are queued without waiting, and
the clock stops when the last result is there: launches hide behind the work of the
device. The contenders take turns, round by round, and the turns change direction, so
heat, clocks and neighbours meet all of them alike; ratios are taken within a round.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# Larger than any L2 several times over, and few enough sets to compile fast.
_ROTATED_BYTES = 512 * 2**20
_MOST_SETS = 16


def sets_for(size: int) -> int:
    """How many sets of operands of `size` bytes no L2 can hold; two at least."""
    return max(2, min(_MOST_SETS, -(-_ROTATED_BYTES // size)))


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
      name: Of the contender.
      run: Starts the products, without waiting, and returns their results.
      products: How many `run` starts.
      wait: Returns when the results are there.
    """

    name: str
    run: Callable[[], Any]
    products: int = 1
    wait: Callable[[Any], Any] = jax.block_until_ready


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    warm_up: float = 0.2,
) -> dict[str, np.ndarray]:
    """Times the contenders in turns.

    Args:
      contenders: Each was run before, so that it is compiled.
      rounds: How often each is timed, after one round that does not count.
      seconds: How long a contender's turn takes, about.
      warm_up: Seconds of work before the clock starts: an idle GPU runs slowly.

    Returns:
      Seconds of one product, by name and round.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < warm_up:
        for contender in contenders:
            _time(contender, 1)
    calls = {c.name: _calls(c, seconds) for c in contenders}
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for step in range(rounds + 1):
        for contender in contenders[:: 1 if step % 2 else -1]:
            spent = _time(contender, calls[contender.name])
            if step:
                times[contender.name].append(spent)
    return {name: np.asarray(spent) for name, spent in times.items()}


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(low), float(median), float(high)


def _calls(contender: Contender, seconds: float) -> int:
    spent = _time(contender, 1) * contender.products
    return max(1, min(1000, math.ceil(seconds / max(spent, 1e-6))))


def _time(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        results = contender.run()
    contender.wait(results)
    return (time.perf_counter() - start) / (calls * contender.products)

"""Times transposable masks of a 1024x1024 float32 matrix against other solvers.

    pip install ortools; python benchmarks/transposable_masks.py

Each round runs every method once, so a change of the machine's speed meets all of them
alike; a ratio is to the exact mask of nmjax in the same round. The slow methods run in
every fifth round only. `kept` is the sum of the magnitudes kept over that of the exact
mask. The peers:

- 90 patterns: scores (t, 16) times the patterns (16, 90), argmax, take; what 2by4
  (arXiv:2404.01847) does in a kernel.
- greedy, sorted: the greedy algorithm of arXiv:2102.08124 with the steps of its
  authors' torch code, in jax: the entries of a tile sorted, then looked at one by one.
- greedy, argmax loop: the same masks, sooner: one argmax over the tile for each entry
  kept.
- OR-tools: one min-cost flow per tile in C++, on one core; the exact method of
  arXiv:2102.08124. Skipped with a message where it is not installed.
- entropic: nmjax's own form of TSENOR (arXiv:2505.23949).

Prints a Markdown table and writes it to benchmarks/results/, named after the versions
of Python and jax.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import write

from nmjax import NMPattern
from nmjax.masks import transposable_mask

SIZE = 1024
ROUNDS = 15
ROUNDS_PER_SLOW_ROUND = 5
PATTERNS = "2:4", "4:8", "8:16", "16:32"
EXACT = "nmjax exact"


def tiles_last(w, m):
    """`(R, C)` -> `(tiles, m, m)`."""
    tiles = w.reshape(SIZE // m, m, SIZE // m, m).swapaxes(1, 2)
    return tiles.reshape(-1, m, m)


def matrix(tiles):
    """The inverse of `tiles_last`."""
    m = tiles.shape[-1]
    grid = tiles.reshape(SIZE // m, SIZE // m, m, m).swapaxes(1, 2)
    return grid.reshape(SIZE, SIZE)


def ninety_patterns(magnitude, pattern):
    """The best of the 90 masks by a matrix product."""
    assert str(pattern) == "2:4"
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    masks = np.array(list(itertools.product(rows, repeat=4)))
    masks = jnp.asarray(masks[(masks.sum(1) == 2).all(1)].reshape(90, 16), jnp.float32)
    scores = tiles_last(magnitude, 4).reshape(-1, 16) @ masks.T
    return matrix(masks[scores.argmax(-1)].reshape(-1, 4, 4) > 0)


def greedy_sorted(magnitude, pattern):
    """From the heaviest entry of a tile down: it stays if row and column allow."""
    n, m = pattern.n, pattern.m
    tiles = tiles_last(magnitude, m)
    order = jnp.argsort(-tiles.reshape(-1, m * m), axis=-1)
    tile = jnp.arange(len(tiles))

    def look(step, mask):
        row, column = jnp.divmod(order[:, step], m)
        fits = (mask.sum(2)[tile, row] < n) & (mask.sum(1)[tile, column] < n)
        return mask.at[tile, row, column].set(fits)

    empty = jnp.zeros(tiles.shape, bool)
    return matrix(jax.lax.fori_loop(0, m * m, look, empty))


def greedy_argmax(magnitude, pattern):
    """From the heaviest entry of a tile down, one argmax per entry kept."""
    n, m = pattern.n, pattern.m
    tiles = tiles_last(magnitude, m)

    def keep(_, carry):
        mask, left = carry
        place = left.reshape(-1, m * m).argmax(-1)[:, None, None]
        hit = (place == jnp.arange(m * m).reshape(m, m)) & (left >= 0)
        mask |= hit
        full = (mask.sum(2) >= n)[:, :, None] | (mask.sum(1) >= n)[:, None]
        return mask, jnp.where(mask | full, -1.0, tiles)

    carry = jnp.zeros(tiles.shape, bool), tiles
    return matrix(jax.lax.fori_loop(0, n * m, keep, carry)[0])


def or_tools(magnitude, pattern):
    """A min-cost flow per tile, in integers of 2^-20 of the largest score."""
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    n, m = pattern.n, pattern.m
    rows, columns = np.divmod(np.arange(m * m, dtype=np.int32), m)
    ones = np.ones(m * m, np.int64)
    nodes = np.arange(2 * m, dtype=np.int32)
    supplies = np.repeat([n, -n], m)
    magnitude = np.asarray(magnitude)
    costs = -np.round(magnitude * 2.0**20 / magnitude.max()).astype(np.int64)
    masks = []
    for cost in tiles_last(costs, m).reshape(-1, m * m):
        flow = SimpleMinCostFlow()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(rows, columns + m, ones, cost)
        flow.set_nodes_supplies(nodes, supplies)
        if flow.solve() != flow.OPTIMAL:
            raise SystemExit("OR-tools: no optimum")
        masks.append(flow.flows(arcs))
    return matrix(np.array(masks).reshape(-1, m, m) > 0)


def methods(pattern):
    """(name, slow, function of the magnitudes) of everything that is timed."""
    nmjax = functools.partial(transposable_mask, pattern=pattern)
    yield EXACT, False, nmjax
    yield "nmjax exact, at most", False, functools.partial(nmjax, at_most=True)
    yield "nmjax greedy", False, functools.partial(nmjax, method="greedy")
    argmax = functools.partial(greedy_argmax, pattern=pattern)
    if pattern.m == 4:
        yield "90 patterns", False, functools.partial(ninety_patterns, pattern=pattern)
    if pattern.m <= 8:
        entropic = functools.partial(nmjax, method="entropic")
        authors = functools.partial(greedy_sorted, pattern=pattern)
        yield "greedy, sorted", pattern.m > 4, authors
        yield "greedy, argmax loop", pattern.m > 4, argmax
        yield "nmjax entropic", True, entropic
    yield "OR-tools", True, functools.partial(or_tools, pattern=pattern)


def compiled(name, function, w):
    """The function as it is timed: compiled, if it is jax's."""
    return function if name == "OR-tools" else jax.jit(function).lower(w).compile()


def measure(pattern, w):
    """Seconds by round, and the sum kept, of each method."""
    times, kept, cases = {}, {}, []
    for name, slow, function in methods(pattern):
        try:
            run = compiled(name, function, w)
            if name == "OR-tools":
                __import__("ortools")
        except ImportError:
            print(f"{pattern}: no OR-tools here, so no row of it: pip install ortools")
            continue
        cases.append((name, slow, run))
        times[name] = {}
    for step in range(ROUNDS):
        for name, slow, run in cases:
            if slow and step % ROUNDS_PER_SLOW_ROUND:
                continue
            start = time.perf_counter()
            mask = jax.block_until_ready(run(w))
            times[name][step] = time.perf_counter() - start
            kept[name] = float(np.asarray(w, np.float64)[np.asarray(mask)].sum())
    return times, kept


def main():
    """Measures, prints and writes the results."""
    w = jnp.abs(jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.float32))
    rows = []
    for pattern in map(NMPattern, PATTERNS):
        times, kept = measure(pattern, w)
        for name, by_round in times.items():
            ratios = [spent / times[EXACT][step] for step, spent in by_round.items()]
            low, ratio, high = np.percentile(ratios, [25, 50, 75])
            rows.append(
                {
                    "pattern": str(pattern),
                    "method": name,
                    "rounds": len(ratios),
                    "median ms": round(1e3 * float(np.median([*by_round.values()])), 1),
                    "fastest ms": round(1e3 * min(by_round.values()), 1),
                    "ratio": round(float(ratio), 2),
                    "quartiles": f"{low:.2f} to {high:.2f}",
                    "kept": round(kept[name] / kept[EXACT], 6),
                }
            )
    title = (
        f"Transposable masks of a {SIZE}x{SIZE} float32 matrix of normal weights. "
        "The ratio is to the exact mask of the same round. OR-tools ran on one core."
    )
    write("transposable_masks", title, rows)


if __name__ == "__main__":
    main()

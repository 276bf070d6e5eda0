"""Times N:M masks of a 4096x4096 float32 matrix against a copy and against peers.

    python benchmarks/masks.py

Each round runs every method once, so a change of the machine's speed meets all of
them alike; a ratio is taken within its round. The peers are the two formulations in
use elsewhere: an argsort of an argsort, and top_k with one_hot. They run in every
seventh round only, since they take most of the time. Prints a Markdown table and
writes it to benchmarks/results/, named after the versions of Python and jax.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import write

from nmjax import NMPattern, magnitude_mask

SIZE = 4096
ROUNDS = 21
ROUNDS_PER_PEER_ROUND = 7
PATTERNS = "2:4", "4:8", "1:8", "16:32"
AXES = -2, -1


# An argument that is not donated is never aliased, so the copy reads 64 MB and writes
# 64 MB. The second bound reads as much and writes what a mask needs, 16 MB.
BOUNDS = {"copy": jnp.copy, "w > 0": lambda w: w > 0}


def argsort_argsort(w, pattern, *, axis):
    """The rank by two sorts."""
    groups = jnp.moveaxis(jnp.abs(w), axis, -1)
    shape = groups.shape
    groups = groups.reshape(*shape[:-1], -1, pattern.m)  # (..., size/m, m)
    order = jnp.argsort(groups, axis=-1, descending=True, stable=True)
    mask = jnp.argsort(order, axis=-1) < pattern.n
    return jnp.moveaxis(mask.reshape(shape), -1, axis)


def top_k_one_hot(w, pattern, *, axis):
    """The n largest of each group by top_k, scattered by one_hot."""
    groups = jnp.moveaxis(jnp.abs(w), axis, -1)
    shape = groups.shape
    groups = groups.reshape(*shape[:-1], -1, pattern.m)  # (..., size/m, m)
    kept = jax.lax.top_k(groups, pattern.n)[1]
    mask = jax.nn.one_hot(kept, pattern.m, dtype=jnp.bool_).any(axis=-2)
    return jnp.moveaxis(mask.reshape(shape), -1, axis)


METHODS = {
    "nmjax": magnitude_mask,
    "top_k + one_hot": top_k_one_hot,
    "argsort(argsort)": argsort_argsort,
}


def seconds(function, w):
    """The wall time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(w))
    return time.perf_counter() - start


def measure(w):
    """Seconds by round of each bound and of each (method, pattern, axis)."""
    compiled = {
        name: jax.jit(bound).lower(w).compile() for name, bound in BOUNDS.items()
    }
    for pattern in PATTERNS:
        for axis in AXES:
            masks = {}
            for name, method in METHODS.items():
                mask = functools.partial(method, pattern=NMPattern(pattern), axis=axis)
                compiled[name, pattern, axis] = jax.jit(mask).lower(w).compile()
                masks[name] = np.asarray(compiled[name, pattern, axis](w))
                if not np.array_equal(masks[name], masks["nmjax"]):
                    raise SystemExit(f"{name}, {pattern}: another mask than ours")
    times = {case: {} for case in compiled}
    for step in range(ROUNDS):
        for case, function in compiled.items():
            if (
                case in BOUNDS
                or case[0] == "nmjax"
                or step % ROUNDS_PER_PEER_ROUND == 0
            ):
                times[case][step] = seconds(function, w)
    return times


def summarize(by_round, copies):
    """The median time, and quartiles of the ratio to the copy of the same round."""
    ratios = [spent / copies[step] for step, spent in by_round.items()]
    low, ratio, high = (round(float(q), 3) for q in np.percentile(ratios, [25, 50, 75]))
    return {
        "rounds": len(ratios),
        "median_ms": round(1e3 * float(np.median(list(by_round.values()))), 2),
        "ratio": ratio,
        "quartiles": [low, high],
    }


def main():
    """Measures, prints and writes the results."""
    times = measure(jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.float32))
    rows = []
    for case, by_round in times.items():
        method, pattern, axis = (case, "", "") if case in BOUNDS else case
        head = {"pattern": pattern, "axis": axis, "method": method}
        rows.append(head | summarize(by_round, times["copy"]))
    title = (
        f"N:M masks of a {SIZE}x{SIZE} float32 matrix, groups along `axis`. "
        "The ratio is to the copy of the same round."
    )
    write("masks", title, rows)


if __name__ == "__main__":
    main()

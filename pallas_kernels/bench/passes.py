"""One pass that chooses a mask and compresses, against a copy of the matrix."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from pallas_kernels.bench.contenders import compile_alone
from pallas_kernels.bench.report import CompressionRow
from pallas_kernels.bench.timing import Contender, quartiles, race, sets_for
from pallas_kernels.compression import compress_magnitude, compress_transposable
from pallas_kernels.format import decompress
from pallas_kernels.implementations import Implementation

# Flax kernels (k, n): ViT-L's fc1, a square, Llama-3-8B's gate and up.
MATRICES = ((1024, 4096), (4096, 4096), (4096, 14336))


@dataclasses.dataclass(frozen=True)
class Pass:
    """Mask and compression in one go.

    Attributes:
      name: What is done, and by which implementation.
      run: From the matrix to what it writes.
      written: Bytes written for each entry of the matrix: half a value of 16 bits and
        two bits of metadata for it, once or twice.
      wrong: From the matrix and the result, on the host, what is wrong or None.
      is_reference: Whether it is plain jnp, of which XLA compiles 16 in a minute.
    """

    name: str
    run: Callable[[jax.Array], Any]
    written: float
    wrong: Callable[[np.ndarray, Any], str | None]
    is_reference: bool


def passes() -> list[Pass]:
    """Both passes of `compression.py` by each implementation."""
    found = []
    for name in get_args(Implementation):
        options = {"dtype": jnp.bfloat16, "implementation": name}
        magnitude = functools.partial(compress_magnitude, **options)
        transposable = functools.partial(compress_transposable, **options)
        found += [
            Pass(f"W, {name}", magnitude, 1.125, _wrong_magnitude, name == "reference"),
            Pass(
                f"W and Wᵀ, {name}",
                transposable,
                2.25,
                _wrong_transposable,
                name == "reference",
            ),
        ]
    return found


def _wrong_magnitude(w: np.ndarray, compressed: Any) -> str | None:
    groups = np.abs(w.reshape(w.shape[0] // 4, 4, -1))
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :2], True, axis=1)
    expected = np.where(mask.reshape(w.shape), w, 0)
    expected = np.asarray(jnp.asarray(expected, compressed.dtype))
    different = np.asarray(decompress(compressed)) != expected
    return f"{different.sum()} of {w.size} entries differ" if different.any() else None


def _wrong_transposable(w: np.ndarray, both: Any) -> str | None:
    compressed, transposed = (np.asarray(decompress(side)) for side in both)
    if (compressed != transposed.T).any():
        return "W and its transpose have different masks"
    kept = compressed != 0
    if (kept & (compressed != np.asarray(jnp.asarray(w, compressed.dtype)))).any():
        return "a kept entry has another value"

    def tiles(x):
        x = x.reshape(w.shape[0] // 4, 4, w.shape[1] // 4, 4)
        return x.transpose(0, 2, 1, 3).reshape(-1, 4, 4)

    if max(tiles(kept).sum(axis).max() for axis in (1, 2)) > 2:
        return "more than two entries in a row or column of a tile"
    codes = (np.arange(1 << 16)[:, None] >> np.arange(16)) & 1
    codes = codes.reshape(-1, 4, 4)
    patterns = codes[((codes.sum(1) == 2) & (codes.sum(2) == 2)).all(1)]  # 90
    magnitudes = tiles(np.abs(w).astype(np.float64)).reshape(-1, 16)
    best = (magnitudes @ patterns.reshape(90, 16).T).max(1)
    reached = (magnitudes * tiles(kept).reshape(-1, 16)).sum(1)
    worse = reached < best * (1 - 1e-5)
    return (
        f"{worse.sum()} of {len(best)} tiles are not optimal" if worse.any() else None
    )


def measure(
    one: Pass,
    shape: tuple[int, int],
    dtype: str,
    *,
    rounds: int,
    seconds: float,
    sets: int = 0,
) -> CompressionRow:
    """Races a pass against a copy of its input, after its result was judged.

    Args:
      one: The pass.
      shape: Of the matrix.
      dtype: Of the matrix.
      rounds: Turns of each.
      seconds: Of one turn, about.
      sets: How many matrices take turns; 0 for as many as no L2 can hold.
    """
    size = shape[0] * shape[1]
    itemsize = jnp.dtype(dtype).itemsize
    sets = sets or sets_for(size * itemsize)
    keys = jax.random.split(jax.random.key(0), sets)
    matrices = [jax.random.normal(key, shape, dtype) for key in keys]
    row = CompressionRow(one.name, shape, dtype)
    try:
        run = _compiled(one.run, matrices)
        results = run(matrices)
    except NotImplementedError as error:
        return dataclasses.replace(row, status=f"cannot run: {error}")
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(row, status=f"FAILED: {error}"[:300])
    wrong = one.wrong(np.asarray(matrices[0], np.float32), results[0])
    if wrong:
        return dataclasses.replace(row, status=f"WRONG: {wrong}")
    copy = _compiled(jnp.copy, matrices)
    copy(matrices)
    times = race(
        [
            Contender("copy", lambda: copy(matrices), sets),
            Contender(one.name, lambda: run(matrices), sets),
        ],
        rounds=rounds,
        seconds=seconds,
    )
    return dataclasses.replace(
        row,
        moved=int(size * (itemsize + one.written)),
        copy_us=1e6 * quartiles(times["copy"])[1],
        us=1e6 * quartiles(times[one.name])[1],
        ratio=quartiles(times[one.name] / times["copy"]),
    )


def _compiled(function: Callable, matrices: list[jax.Array]) -> Compiled:
    """One executable that applies the function to one matrix after another."""
    run = jax.jit(lambda matrices: [function(w) for w in matrices])
    return compile_alone(run.lower(matrices))

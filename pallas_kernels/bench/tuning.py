"""A race of Configs, whose winner races the dense product and is written down."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from pallas_kernels.bench.contenders import (
    Race,
    WrongResult,
    compile_alone,
    missing_compression,
)
from pallas_kernels.bench.products import Product
from pallas_kernels.bench.search import search_space
from pallas_kernels.bench.timing import Contender, quartiles, race
from pallas_kernels.config import Config, shared_memory_limit
from pallas_kernels.devices import Device
from pallas_kernels.measurements import Measurement

# A look at each Config: enough to rank them, the winner is timed again.
_ROUNDS = 3
_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came out of the Configs for one product.

    Attributes:
      measurement: Of the fastest; None where none was right.
      wrong: Those whose result was not the oracle's, with by how much.
      failed: Those that did not compile or run, with the reason.
    """

    measurement: Measurement | None
    wrong: tuple[str, ...]
    failed: tuple[str, ...]


def configs_for(device: Device, most: int = 0) -> list[Config]:
    """The search space of a device's kernel; `most` of it, where not 0.

    On Hopper those whose reads of shared memory allow the most, elsewhere evenly.
    """
    if device.kernel is None:
        raise ValueError(f"{device.name} has no kernel to tune")
    limit = shared_memory_limit(device.capability)
    found = search_space(device.kernel, limit)  # pyright: ignore[reportArgumentType]
    if not most or len(found) <= most:
        return found
    if device.kernel == "sm90":
        return sorted(found, key=lambda config: -config.speed_bound)[:most]
    return [found[i * len(found) // most] for i in range(most)]


def tune(
    product: Product,
    configs: Sequence[Config],
    *,
    kernel: str,
    dtype: str,
    rounds: int,
    seconds: float,
    said: Callable[[str], None],
    sets: int = 0,
) -> Tuned:
    """Finds the fastest Config of a kernel for a product.

    Args:
      product: The product.
      configs: Those that race.
      kernel: "sm80", "sm90" or "sm100".
      dtype: Of operands and result.
      rounds: Of the last race, against the dense product.
      seconds: Of a contender's turn in it.
      said: Takes a line of progress after each Config.
      sets: Of operands; 0 for as many as no L2 can hold.

    Returns:
      The measurement, and what went wrong.
    """
    try:
        entrants = Race(product, dtype, sets=sets)
    except WrongResult as error:  # the dense product itself
        return Tuned(None, (f"{error}",), ())
    except jax.errors.JaxRuntimeError as error:  # too large for this device
        return Tuned(None, (), (f"{error}"[:500],))
    wrong, failed = [], []
    best: tuple[float, Config, Contender] | None = None
    for i, (config, compiled) in enumerate(_compiled(entrants, kernel, configs)):
        # Whatever the compiler or the driver says of one Config, the others go on.
        try:
            contender = entrants.judged(kernel, compiled.result())
        except WrongResult as error:
            wrong.append(f"{config}: {error}")
            continue
        except Exception as error:
            failed.append(f"{config}: {type(error).__name__}: {error}"[:500])
            continue
        times = race([contender], rounds=_ROUNDS, seconds=_SECONDS, warm_up=0)
        median = quartiles(times[contender.name])[1]
        if best is None or median < best[0]:
            best = median, config, contender
        said(f"{i + 1} of {len(configs)} Configs, fastest {1e6 * best[0]:.1f} µs")
    if best is None:
        return Tuned(None, tuple(wrong), tuple(failed))
    _, config, contender = best
    layers = []
    for other in (False, True) if missing_compression() is None else ():
        try:
            layers.append(entrants.compressing(kernel, config, other_layout=other))
        except WrongResult as error:
            wrong.append(f"{error}")
        except Exception as error:
            failed.append(f"compressing: {type(error).__name__}: {error}"[:500])
    racing = [entrants.dense, contender, *layers]
    try:
        times = race(racing, rounds=rounds, seconds=seconds)
    except jax.errors.JaxRuntimeError as error:  # a Config before it broke the device
        return Tuned(None, tuple(wrong), (*failed, f"{error}"[:500]))
    ratios = [quartiles(times["dense"] / times[layer.name]) for layer in layers]
    measurement = Measurement(
        architecture=kernel,
        m=product.m,
        n=product.n,
        k=product.k,
        dtype=dtype,
        b_is_kn=product.use.b_is_kn,
        out_is_nm=product.use.out_is_nm,
        dense_us=1e6 * quartiles(times["dense"])[1],
        sparse_us=1e6 * quartiles(times[contender.name])[1],
        ratio=quartiles(times["dense"] / times[contender.name]),
        compressing=min(ratios) if len(ratios) == 2 else None,
        config=config,
    )
    return Tuned(measurement, tuple(wrong), tuple(failed))


def _compiled(
    entrants: Race, kernel: str, configs: Sequence[Config]
) -> Iterator[tuple[Config, Future]]:
    """Lowers one Config after another, while others are compiled, on every core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for config in configs:
            try:
                lowered = entrants.lowered(kernel, config)
                future = pool.submit(compile_alone, lowered)
            except Exception as error:
                future = Future()
                future.set_exception(error)
            futures.append(future)
        yield from zip(configs, futures, strict=True)

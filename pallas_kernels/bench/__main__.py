"""python -m pallas_kernels.bench: races sparse products against dense ones."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import devices, dispatch, measurements
from pallas_kernels.bench import products, report, roofline, tuning
from pallas_kernels.bench.contenders import (
    measure,
    missing_compression,
    missing_cusparselt,
)
from pallas_kernels.bench.options import QUICK_CONFIGS, parse
from pallas_kernels.bench.products import SUITES, TOKENS, USES, Product
from pallas_kernels.bench.report import CompressionRow, Row
from pallas_kernels.devices import DATA_SHEETS, Device

# What a quick run keeps: sizes on either side of where sparse products begin to win.
_QUICK_TOKENS = (2048, 16384)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    options = parse(arguments)
    chosen = _products(options)
    # torch and jax share the GPU's memory: neither may take all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.device is not None:
        print(roofline.table(chosen, options.device), end="")
        return 0
    here = devices.this_device()
    if here is None and options.implementation != "reference":
        _explain_without_gpu(chosen)
        asked = options.tune or options.implementation
        if asked:
            print("nothing could run: there is no NVIDIA GPU", file=sys.stderr)
        return 1 if asked else 0
    if options.output_dir is not None:
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"--output-dir: {error}; name another folder", file=sys.stderr)
            return 2
    if options.tune and here is not None:
        return _tune(options, chosen, here)
    return _bench(options, chosen, here)


def _products(options) -> list[Product]:
    if options.shape:
        (use,) = (use for use in USES if use.name == options.use)
        return [Product("shape", use, m, n, k, n) for m, n, k in options.shape]
    suites = [name for name in options.suite or SUITES if name != "compression"]
    tokens = options.tokens or (_QUICK_TOKENS if options.quick else TOKENS)
    return products.select(suites, tokens)


def _explain_without_gpu(chosen: list[Product]) -> None:
    print(
        f"jax computes on {jax.default_backend()} here: there is no NVIDIA GPU, and "
        "nothing is timed.\n"
        f"On one, {len(chosen)} products would race: the kernel of its architecture "
        "(sm80: Ampere, Ada, GeForce Blackwell; sm90: Hopper; sm100: Blackwell) "
        "against jnp.dot and, where torch has it, cuSPARSELt; and mask + compression "
        "against a copy."
    )
    if chosen:
        print(
            "What the data sheet of an H200 allows (--device NAME for another of: "
            f"{', '.join(DATA_SHEETS)}):\n"
        )
        print(roofline.table(chosen, DATA_SHEETS["h200"]), end="")
    print(
        "\nTo try the pipeline on this machine: --implementation reference "
        "--shape 64,128,64"
    )


def _bench(options, chosen: list[Product], here: Device | None) -> int:
    implementation = options.implementation or (here.kernel if here else None)
    if implementation is None:
        print(f"{here.name if here else ''} has no kernel here", file=sys.stderr)
        return 1
    about = report.machine()
    on_gpu = here is not None
    sheet = devices.data_sheet(here.name) if here else None
    title = f"2:4 sparse products by {implementation} on {about['device']}"
    if not on_gpu:
        title = f"{report.NO_GPU}{title}"
    cusparselt = missing_cusparselt()
    absent = [f"No cuSPARSELt: {cusparselt}."] if cusparselt else []
    if compression := missing_compression():
        absent.append(f"No times with compression: {compression}.")
    for note in filter(None, [*absent, report.missing_plot()]):
        print(f"Note: {note}", file=sys.stderr)
    seconds = options.milliseconds / 1e3 if on_gpu else 0.0
    timed = {"rounds": options.rounds, "seconds": seconds}
    rows, passed = [], []
    folder = options.output_dir or Path("runs/bench")
    passes = _passes(options)
    progress = _Progress(len(chosen) + len(passes))

    def table() -> str:
        return _markdown(title, about, rows, passed, sheet, absent)

    # Written after every row: a run that ends early keeps what it has.
    for product in chosen:
        row = measure(
            product, implementation, options.dtype, sets=0 if on_gpu else 2, **timed
        )
        rows.append(row)
        report.write(folder, title, table(), rows, passed, about)
        progress.step(f"{product.layer}, {product.use.name}, n = {product.n}", row)
    for measure_pass, name in passes:
        row = measure_pass(**timed)
        passed.append(row)
        report.write(folder, title, table(), rows, passed, about)
        progress.step(name, row)
    if on_gpu:
        about |= {f"{name} after": now for name, now in report.machine().items()}
    print(table(), end="")
    paths = report.write(folder, title, table(), rows, passed, about)
    if rows and report.missing_plot() is None:
        paths.append(folder / "bench.png")
        report.plot(rows, title, paths[-1])
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return _status([*rows, *passed])


def _passes(options) -> list[tuple[Any, str]]:
    """The compression races that are asked for: functions and their names."""
    if options.shape or "compression" not in (options.suite or ["compression"]):
        return []
    # Loads Mosaic, which the products of the reference do not need.
    from pallas_kernels.bench import passes

    def race_of(one, shape, dtype):
        return lambda **timed: passes.measure(one, shape, dtype, **timed)

    return [
        (race_of(one, shape, dtype), f"{one.name}, {shape[0]}x{shape[1]} {dtype}")
        for one in passes.passes()
        if not (options.quick and one.is_reference)
        for shape in (passes.MATRICES[-1:] if options.quick else passes.MATRICES)
        for dtype in ("bfloat16", "float32")
    ]


def _tune(options, chosen: list[Product], here: Device) -> int:
    kernel = here.kernel
    if kernel is None or options.implementation not in (None, kernel):
        print(f"--tune: the kernel of {here.name} is {kernel}", file=sys.stderr)
        return 2
    configs = tuning.configs_for(here, QUICK_CONFIGS if options.quick else 0)
    about = report.machine()
    folder = options.output_dir
    print(f"{len(chosen)} products, {len(configs)} Configs of {kernel} each")
    wrong = 0
    progress = _Progress(len(chosen))
    for product in chosen:
        tuned = tuning.tune(
            product,
            configs,
            kernel=kernel,
            dtype=options.dtype,
            rounds=options.rounds,
            seconds=options.milliseconds / 1e3,
            said=progress.say,
        )
        wrong += len(tuned.wrong)
        for line in (*tuned.wrong, *tuned.failed):
            print(f"{product.layer}, n = {product.n}: {line}", file=sys.stderr)
        status = "no Config runs"
        if tuned.measurement:
            found = tuned.measurement
            status = f"{found.ratio[1]:.2f}x, {found.config}"
            if found.compressing:
                status = f"with compression {found.compressing[1]:.2f}x, {status}"
            old = measurements.load(here.name, folder)
            entries = measurements.merged(old.entries if old else (), [found])
            # After every product: a run that ends early keeps what it has.
            path = measurements.save(
                measurements.Measured(here.name, about, entries), folder
            )
            status += f" -> {path.name}"
        progress.step(f"{product.layer}, {product.use.name}, n = {product.n}", status)
    for p in chosen if folder is None else ():
        form = p.form(options.dtype)
        print(dispatch.explain(p.m, p.n, p.k, dtype=options.dtype, form=form))
    return 1 if wrong else 0


class _Progress:
    """A line for each step: how far, what came out, how fast, how long still."""

    def __init__(self, steps: int):
        self._steps, self._done, self._start = steps, 0, time.monotonic()

    def step(self, name: str, outcome: Row | CompressionRow | str) -> None:
        self._done += 1
        spent = time.monotonic() - self._start
        left = spent / self._done * (self._steps - self._done)
        if not isinstance(outcome, str):
            ok = outcome.status == "ok"
            said = [f"{outcome.ratio[1]:.2f}x" if ok else outcome.status]
            if isinstance(outcome, Row):
                said += outcome.notes
            outcome = "; ".join(said)
        rate = self._done / max(spent, 1e-9) * 60
        self.say(f"{name}: {outcome}  ({rate:.3g} a minute, {left:.0f} s left)")

    def say(self, line: str) -> None:
        print(f"[{self._done}/{self._steps}] {line}", file=sys.stderr, flush=True)


def _markdown(title, about, rows, passed, sheet, absent) -> str:
    lines = [f"# {title}", ""]
    about = about | ({"peaks": sheet.source} if sheet else {})
    lines += ["| machine | |", "|---|---|"]
    lines += [*(f"| {key} | {value} |" for key, value in about.items()), ""]
    if rows:
        lines += [report.product_table(rows, sheet)]
    if passed:
        lines += [report.compression_table(passed, sheet)]
    notes = sorted({note for row in rows for note in row.notes})
    return "\n".join([*lines, *absent, *notes]) + "\n"


def _status(rows: Sequence[Row | CompressionRow]) -> int:
    bad = [row for row in rows if row.bad]
    if bad:
        print(f"{len(bad)} of {len(rows)} are WRONG or FAILED", file=sys.stderr)
        return 1
    if not any(row.status == "ok" for row in rows):
        print("nothing could run", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

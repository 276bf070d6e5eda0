"""What was measured on which device: `tuned/DEVICE.json`, written by the benchmark.

One file for each device name, made by `python -m pallas_kernels.bench --tune` on such a
device and committed; a device without a file was not measured. An entry is one sparse
GEMM D = A · B of one shape, with the fastest Config found for it and its speed over the
dense product of the same operands in the same run.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.config import CONFIGS, Config

TUNED = Path(__file__).parent / "tuned"

# Of the files; raised when an entry changes its meaning.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One sparse GEMM against the dense product, both of one run.

    Attributes:
      architecture: The kernel: "sm80", "sm90" or "sm100".
      m: Rows of A, the compressed operand.
      n: Columns of B.
      k: What is contracted.
      dtype: Of both operands.
      b_is_kn: The layout of B, as in `reference.Form`.
      out_is_nm: The layout of D, as in `reference.Form`.
      dense_us: Median time of the dense product in µs.
      sparse_us: Median time of the sparse product in µs.
      ratio: Quartiles of dense over sparse time, round by round: above 1 the sparse
        product is faster.
      compressing: The same where A is compressed on the way, as in a layer: from `(m,
        k)` or `(k, m)` in `dtype`, whichever takes longer. None where no kernel does.
      config: With which the kernel ran.
    """

    architecture: str
    m: int
    n: int
    k: int
    dtype: str
    b_is_kn: bool
    out_is_nm: bool
    dense_us: float
    sparse_us: float
    ratio: tuple[float, float, float]
    compressing: tuple[float, float, float] | None
    config: Config

    def __post_init__(self):
        if self.architecture not in CONFIGS:
            raise ValueError(
                f"architecture {self.architecture!r}: expected one of {[*CONFIGS]}"
            )
        if not isinstance(self.config, CONFIGS[self.architecture]):
            raise ValueError(f"{self.config} is no Config of {self.architecture}")
        jnp.dtype(self.dtype)  # a TypeError where there is none of the name
        if min(self.m, self.n, self.k) < 1:
            raise ValueError(
                f"m, n, k = {self.m}, {self.n}, {self.k}: must be positive"
            )
        for low, median, high in filter(None, (self.ratio, self.compressing)):
            if not 0 < low <= median <= high:
                raise ValueError(
                    f"quartiles {low}, {median}, {high}: must be positive, in order"
                )
        if not self.dense_us > 0 < self.sparse_us:
            raise ValueError(
                f"times {self.dense_us} and {self.sparse_us} µs: must be positive"
            )


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of one device.

    Attributes:
      device: Its name, as CUDA has it.
      machine: Driver, versions, date, clocks: for the reader, not for the dispatch.
      entries: The measurements.
    """

    device: str
    machine: dict[str, Any] = dataclasses.field(hash=False)
    entries: tuple[Measurement, ...]


def path_of(device: str, folder: Path | None = None) -> Path:
    """The file of a device: "NVIDIA H200" -> tuned/NVIDIA_H200.json."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_")
    return (folder or TUNED) / f"{name}.json"


@functools.cache
def load(device: str, folder: Path | None = None) -> Measured | None:
    """The measurements of a device; None where there are none.

    Raises:
      ValueError: The file is of another format or device, or an entry of it cannot be:
        with the file and the entry.
    """
    path = path_of(device, folder)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds a {type(record).__name__}, no record")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} has format {record.get('format')!r}, this version reads "
            f"{FORMAT}: measure again with python -m pallas_kernels.bench --tune"
        )
    if record.get("device") != device:
        raise ValueError(
            f"{path.name} is of {record.get('device')!r}, expected {device!r}"
        )
    if missing := {"machine", "entries"} - record.keys():
        raise ValueError(f"{path.name} lacks {sorted(missing)}")
    entries = []
    for i, entry in enumerate(record["entries"]):
        try:
            fields: dict[str, Any] = dict(entry, ratio=tuple(entry["ratio"]))
            if entry["compressing"] is not None:
                fields["compressing"] = tuple(entry["compressing"])
            fields["config"] = CONFIGS[entry["architecture"]](**entry["config"])
            entries.append(Measurement(**fields))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, entry {i}: {error}") from error
    return Measured(device, record["machine"], tuple(entries))


def save(measured: Measured, folder: Path | None = None) -> Path:
    """Writes the file of a device; `load` reads it back. Returns its path.

    Whoever is stopped meanwhile leaves the old file.
    """
    record = {
        "format": FORMAT,
        "device": measured.device,
        "machine": measured.machine,
        "entries": [dataclasses.asdict(entry) for entry in measured.entries],
    }
    path = path_of(measured.device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(new, path)
    load.cache_clear()
    return path


def merged(
    old: Iterable[Measurement], new: Iterable[Measurement]
) -> tuple[Measurement, ...]:
    """Both, where of two of one product the new one stays; in the order of sizes."""

    def product(entry):
        return (
            *(entry.architecture, entry.dtype, entry.b_is_kn, entry.out_is_nm),
            *(entry.m, entry.k, entry.n),
        )

    entries = {product(entry): entry for entry in [*old, *new]}
    return tuple(entries[key] for key in sorted(entries))

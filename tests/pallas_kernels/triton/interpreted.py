"""Runs Triton kernels in Triton's interpreter on NumPy arrays, in a process of its own.

The interpreter replaces the compiler for a whole process, hence the process, and it
takes torch's tensors, hence `HostArray`, which has what it calls of them.

    python interpreted.py JOBS RESULTS      both pickles; see `run_jobs`
"""

import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Job:
    """One launch.

    Attributes:
      module: Of the kernel, below `pallas_kernels.triton`.
      kernel: Its name.
      inputs: Arrays that it reads.
      outputs: (shape, dtype) of the arrays that it writes.
      grid: How many programs run.
      constants: Its constants.
    """

    module: str
    kernel: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]
    grid: tuple[int, ...]
    constants: dict[str, Any]


def run_jobs(jobs: dict[Any, Job], folder: Path) -> dict[Any, list[np.ndarray]]:
    """What each job writes."""
    source, results = folder / "jobs", folder / "results"
    source.write_bytes(pickle.dumps({key: vars(job) for key, job in jobs.items()}))
    subprocess.run(
        [sys.executable, __file__, source, results],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    return pickle.loads(results.read_bytes())


class HostArray:
    """A NumPy array that passes for a tensor of the CPU."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def new_empty(self, size, device):
        return HostArray(np.empty(size))

    def set_(self, storage, offset, size, stride):
        self.array = storage.array

    def copy_(self, other):
        if other.array is not self.array:
            raise RuntimeError("the interpreter worked on a copy")


def main(source: Path, results: Path) -> None:
    written = {}
    for key, job in pickle.loads(source.read_bytes()).items():
        module = importlib.import_module(f"pallas_kernels.triton.{job['module']}")
        # Bytes that no kernel writes by chance: what it leaves out, shows.
        outputs = [np.empty(shape, dtype) for shape, dtype in job["outputs"]]
        for output in outputs:
            output.view(np.uint8).fill(0xA5)
        arrays = [HostArray(array) for array in (*job["inputs"], *outputs)]
        getattr(module, job["kernel"])[job["grid"]](*arrays, **job["constants"])
        written[key] = outputs
    results.write_bytes(pickle.dumps(written))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

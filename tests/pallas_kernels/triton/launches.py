"""Runs what the wrappers in `pallas_kernels.triton` launch in Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.pallas_kernels.triton.interpreted import Job, run_jobs


class Recorder:
    """Stands in for `pallas_kernels.triton.call`: records first, then gives results."""

    def __init__(self):
        self.jobs: dict[Any, Job] = {}
        self.results: dict[Any, list[np.ndarray]] = {}
        self.key: Any = None

    def call(self, kernel, *arrays, out, grid, num_warps, **constants):
        del num_warps  # the interpreter has no threads
        leaves, tree = jax.tree.flatten(out)
        if self.key not in self.results:
            self.jobs[self.key] = Job(
                module=kernel.__module__.rpartition(".")[2],
                kernel=kernel.__name__,
                inputs=tuple(np.asarray(array) for array in arrays),
                outputs=tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves),
                grid=grid,
                constants=constants,
            )
        zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        return jax.tree.unflatten(tree, self.results.get(self.key, zeros))


def interpret(
    cases: dict[Any, Callable[[], Any]], modules: tuple[Any, ...], folder: Path
) -> dict[Any, Any]:
    """What each case returns when its one launch runs in Triton's interpreter.

    Args:
      cases: Functions that call wrappers.
      modules: Whose `call` the cases use.
      folder: For temporary files.
    """
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "call", recorder.call)
        for _ in range(2):  # first recorded, then with the results
            returned = {}
            for recorder.key, case in cases.items():
                returned[recorder.key] = case()
            if not recorder.results:
                recorder.results = run_jobs(recorder.jobs, folder)
    return returned

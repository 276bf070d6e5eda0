"""Kernels compiled for a GPU and run on the CPU, where others are interpreted.

Within `on_machine.kernels()` a kernel with `interpret=OnMachine(H200)` is compiled for
that GPU, and its PTX runs in `ptx_machine.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.host_program import read_launch
from tests.pallas_kernels.ptx_machine import run_kernel


@dataclasses.dataclass(frozen=True)
class OnMachine:
    """In the place of what `ptx.interpreter` makes.

    Attributes:
      target: The GPU to compile for.
      seeds: The orders in which to run the kernel; the results have to be the same.
      edit: Changes the PTX before it runs: a fault.
      conflicts: Wavefronts that shared memory takes, over those that its bytes need.
    """

    target: ahead_of_time.Target
    seeds: tuple[int, ...] = (0, 1)
    edit: Callable[[str], str] = str
    conflicts: float = 1.0


@contextmanager
def kernels(compiled: OnMachine | None = None) -> Iterator[None]:
    """`ptx.kernel` knows `OnMachine`. Nothing is jitted meanwhile.

    Args:
      compiled: What to take for `interpret=None`.
    """
    compile_or_interpret = ptx.kernel

    def kernel(body, *, name=None, interpret=None, **kwargs):
        interpret = interpret or compiled
        if not isinstance(interpret, OnMachine):
            return compile_or_interpret(body, name=name, interpret=interpret, **kwargs)
        function = functools.partial(_launch, body=body, name=name, kwargs=kwargs)
        return functools.partial(_run, function, kwargs["out_type"], interpret)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(ptx, "kernel", kernel)
        yield


def _launch(*operands: jax.Array, body: Callable, name: str, kwargs: dict) -> Any:
    return ptx.kernel(body, name=name, **kwargs)(*operands)


def _run(function: Callable, out_type: Any, how: OnMachine, *operands: jax.Array):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    compiled = ahead_of_time.compile_kernel(function, *shapes, target=how.target)
    program, launch = how.edit(compiled.ptx), read_launch(compiled.host)
    out, tree = jax.tree.flatten(out_type)
    buffers = [_packed(np.asarray(x)) for x in operands]
    results = []
    for seed in how.seeds:
        machine, result = run_kernel(program, launch, buffers, out, seed)
        wanted = round(how.conflicts * machine.least_wavefronts)
        assert machine.wavefronts == wanted, (
            f"{machine.wavefronts} wavefronts where {machine.least_wavefronts} would do"
        )
        results.append(result)
    for result in results[1:]:
        same = [x.tobytes() for x in result] == [x.tobytes() for x in results[0]]
        assert same, "the result depends on the order of what runs at a time"
    return jax.tree.unflatten(tree, [jnp.asarray(x) for x in results[0]])


def _packed(x: np.ndarray) -> np.ndarray:
    """As it lies on a GPU, four two-bit entries a byte; NumPy takes a byte for each."""
    if x.dtype != jnp.uint2:
        return x
    fours = x.astype(np.uint8).reshape(-1, 4)
    return np.bitwise_or.reduce(fours << (0, 2, 4, 6), axis=1, dtype=np.uint8)

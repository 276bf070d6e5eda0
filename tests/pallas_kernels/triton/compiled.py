"""Compiles what a wrapper in `pallas_kernels.triton` launches, for a GPU not there.

By `jax_triton.triton_call` itself: the call is lowered for CUDA, and kernel, grid and
parameters are read from the custom call that XLA would run. The PTX runs on the CPU.
"""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jaxlib.mlir import ir

from pallas_kernels import triton
from tests.pallas_kernels import ahead_of_time
from tests.pallas_kernels.host_program import Launch
from tests.pallas_kernels.ptx_machine import run_kernel

_MISSING = ahead_of_time.missing() or triton.missing()
needs_compiler = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of one kernel.

    Attributes:
      ptx: Its instructions.
      launch: What XLA starts it with.
    """

    ptx: str
    launch: Launch


def lower(function: Callable, *arrays: Any) -> Any:
    """The function lowered for CUDA, its Triton kernels compiled."""
    with warnings.catch_warnings():
        # Of the coming default of FP fusion: no kernel has a product to fuse.
        warnings.simplefilter("ignore")
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))


def compile_launch(module: Any, case: Callable[[], Any], capability: int) -> Compiled:
    """The one kernel that `case` launches by `module.call`, for 80 or 90 ("sm_90")."""
    compiled = []

    def call(kernel, *arrays, out, **options):
        compiled.append(_compile(kernel, arrays, out, options, capability))
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call", call)
        case()
    (result,) = compiled
    return result


def run_launch(module: Any, case: Callable[[], Any], capability: int) -> Any:
    """What `case` returns when the PTX of its one launch runs on the CPU."""

    def call(kernel, *arrays, out, **options):
        program = _compile(kernel, arrays, out, options, capability)
        leaves, tree = jax.tree.flatten(out)
        operands = [np.asarray(x) for x in arrays]
        _, results = run_kernel(program.ptx, program.launch, operands, leaves, seed=0)
        return jax.tree.unflatten(tree, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call", call)
        return case()


def _compile(kernel, arrays, out, options, capability: int) -> Compiled:
    launch = functools.partial(
        triton.call, kernel, out=out, compute_capability=capability, **options
    )
    module = lower(launch, *arrays).compiler_ir("stablehlo")
    (call,) = _custom_calls(module.operation)
    name = "mhlo.backend_config"  # before jax-triton 0.4, "backend_config" held it
    if name in call.attributes:
        opaque = ir.DictAttr(call.attributes[name])["opaque"]
    else:
        opaque = call.attributes["backend_config"]
    return _read_call(zlib.decompress(ir.StringAttr(opaque).value_bytes))


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == "stablehlo.custom_call":
                    yield inner
                yield from _custom_calls(inner)


def _read_call(message: bytes) -> Compiled:
    """From jaxlib's protocol buffer, TritonAnyKernelCall (jaxlib/gpu/triton.proto)."""
    (call,) = _fields(message)[1]
    call = _fields(call)
    (kernel,) = call[1]
    kernel = _fields(kernel)
    # Each parameter has in its first field an array, in order the operands and results.
    assert all(set(_fields(parameter)) == {1} for parameter in call[5])
    launch = Launch(
        grid=tuple(call[axis][0] for axis in (2, 3, 4)),
        cluster=(1, 1, 1),
        threads=32 * kernel[2][0],
        shared_memory=kernel.get(3, [0])[0],
        # Triton's last two are memory for purposes that no kernel here has.
        parameters=(*range(len(call[5])), -1, -1),
    )
    return Compiled(kernel[4][0].decode(), launch)


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: integers, and messages as bytes."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        assert kind in (0, 2), "neither an integer nor a message"
        value: Any = varint()
        if kind == 2:
            value, at = message[at : at + value], at + value
        found.setdefault(number, []).append(value)
    return found

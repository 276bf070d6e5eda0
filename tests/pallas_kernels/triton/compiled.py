"""Compiles what a wrapper in `pallas_kernels.triton` launches, for a GPU not there.

And runs the PTX on the CPU.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.pallas_kernels.host_program import Launch
from tests.pallas_kernels.ptx_machine import run_kernel

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of one kernel.

    Attributes:
      ptx: Its instructions.
      shared_memory: Bytes of a block.
    """

    ptx: str
    shared_memory: int


def compile_launch(module: Any, case: Callable[[], Any], capability: int) -> Compiled:
    """Compiles the one kernel that `case` launches by `module.call`.

    The pointers are those of whole arrays, which jax aligns to 16 bytes and more.
    """
    launched = []

    def call(kernel, *arrays, out, grid, num_warps, **constants):
        del grid
        leaves, tree = jax.tree.flatten(out)
        types = [_TYPES[np.dtype(x.dtype).name] for x in (*arrays, *leaves)]
        launched.append(_compile(kernel, types, constants, num_warps, capability))
        return jax.tree.unflatten(tree, [np.zeros(x.shape, x.dtype) for x in leaves])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call", call)
        case()
    (result,) = launched
    return result


def run_launch(module: Any, case: Callable[[], Any], capability: int) -> Any:
    """What `case` returns when the PTX of its one launch runs on the CPU."""

    def call(kernel, *arrays, out, grid, num_warps, **constants):
        leaves, tree = jax.tree.flatten(out)
        types = [_TYPES[np.dtype(x.dtype).name] for x in (*arrays, *leaves)]
        program = _compile(kernel, types, constants, num_warps, capability)
        launch = Launch(
            grid=(*grid, 1, 1)[:3],
            cluster=(1, 1, 1),
            threads=32 * num_warps,
            shared_memory=program.shared_memory,
            # Triton's last two are memory for purposes that no kernel here has.
            parameters=(*range(len(types)), -1, -1),
        )
        operands = [np.asarray(x) for x in arrays]
        _, results = run_kernel(program.ptx, launch, operands, leaves, seed=0)
        return jax.tree.unflatten(tree, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call", call)
        return case()


def _compile(kernel, types, constants, num_warps, capability) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False))
    signature |= dict.fromkeys(names[len(types) :], "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    with warnings.catch_warnings():
        # Of the coming default of FP fusion: no kernel has a product to fuse.
        warnings.simplefilter("ignore")
        result = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
    return Compiled(result.asm["ptx"], result.metadata.shared)

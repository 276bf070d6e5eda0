"""Element-wise kernels in Triton, called through jax-triton.

For GPUs whose jax has no Mosaic for them, such as Ampere on jax 0.10. A kernel's module
imports Triton and must not be imported without it; the others only say what is missing.
"""

import importlib
import importlib.util
import inspect
from typing import Any

import jax

from pallas_kernels.devices import this_device


def unavailable() -> str | None:
    """Why no Triton kernel can run on this device; None if they can."""
    device = this_device()
    if device is None:
        return "needs an NVIDIA GPU"
    if device.capability < (8, 0):
        major, minor = device.capability
        return f"needs compute capability 8.0, this device has {major}.{minor}"
    return missing()


def missing() -> str | None:
    """Why jax-triton cannot be called, whatever the device; None if it can."""
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"needs {package}: pip install 'nmjax[triton]'"
    try:
        version = importlib.import_module("jax_triton").__version__
    except ImportError as error:
        return f"cannot import jax_triton: {error}"
    # Its rule for dead code lacks an argument that jax 0.12 passes.
    if jax.__version_info__ >= (0, 12) and version in ("0.4.0", "0.4.1"):
        return (
            f"jax_triton {version} fails with jax {jax.__version__}: "
            "take jax_triton 0.3.1 or a later one, or jax before 0.12"
        )
    return None


def call(kernel: Any, *arrays: Any, out: Any, grid: Any, **options) -> Any:
    """`jax_triton.triton_call`, whose `out_shape` is `out_type` from 0.4 on."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    parameters = inspect.signature(jax_triton.triton_call).parameters
    shapes = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *arrays, kernel=kernel, grid=grid, **{shapes: out}, **options
    )

"""Which implementation `nm_matmul` runs where the caller names none, and why.

The kernel of this device's architecture runs where a measurement of a device of this
name says that it is faster than the dense product: **every** measurement of the same
dtype and layouts whose m, n and k are each within a factor of two of the product's has
a lower quartile above 1. Where one says otherwise, or there is none, the compressed
side is decompressed and the product is dense. So nothing is extrapolated: a kernel that
was never measured on a device is not chosen there.

A layer whose operand is masked anew compresses it at every call. What counts for it
are measurements that compress too (`compressing=True`).
"""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import implementations, measurements, reference
from pallas_kernels.config import Config
from pallas_kernels.devices import DATA_SHEETS, Device, data_sheet, this_device
from pallas_kernels.format import NMCompressed
from pallas_kernels.measurements import Measurement
from pallas_kernels.reference import Form

_DENSE = "decompressing, then a dense product"
TUNE = "python -m pallas_kernels.bench --tune"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs and why.

    Attributes:
      name: "reference" or a kernel's.
      reason: A sentence.
      config: The measured Config; None leaves it to the kernel's heuristic.
    """

    name: str
    reason: str = ""
    config: Config | None = None


def choose(a: NMCompressed, b: jax.Array, form: Form) -> Choice:
    """What `nm_matmul` runs for A · B where it is free to choose."""
    choice = _judge_operands(a, b, form, device=this_device())
    if choice.name != "reference":
        unavailable = kernel(choice.name).unavailable(a, b, form)
        if unavailable:
            return Choice("reference", f"{choice.name}: {unavailable}: dense product")
    return choice


def _judge_operands(a: NMCompressed, b: Any, form: Form, **asked: Any) -> Choice:
    """`judge`, where an instruction takes the operands."""
    if reason := reference.unsupported(a, b, form):
        return Choice("reference", f"{reason}: {_DENSE}")
    m, k = a.shape
    n = b.shape[-1 if form.b_is_kn else -2]
    return judge(m, n, k, dtype=a.dtype, form=form, **asked)


def is_measured() -> bool:
    """Whether this device has measurements; without them every choice is dense."""
    device = this_device()
    return device is not None and measurements.load(device.name) is not None


def judge(
    m: int,
    n: int,
    k: int,
    *,
    dtype: Any,
    form: Form,
    device: Device | None,
    compressing: bool = False,
) -> Choice:
    """What the measurements say about A (m, k) · B (k, n) on a device.

    Args:
      m: Rows of A.
      n: Columns of B.
      k: What is contracted.
      dtype: Of both operands.
      form: The layouts of B and D.
      device: None where there is no GPU.
      compressing: A comes dense, with its zeros, and the sparse product has to
        compress it first.
    """
    if device is None:
        return Choice("reference", f"no kernel for this device: {_DENSE}")
    if 0 in (m, n, k):
        return Choice("reference", "an empty product")
    name = device.name
    if device.kernel is None:
        return Choice("reference", f"no kernel for {name}: {_DENSE}")
    measured = measurements.load(name)
    comparable = [
        entry
        for entry in (measured.entries if measured else ())
        if entry.architecture == device.kernel
        and entry.dtype == jnp.dtype(dtype).name
        and (entry.b_is_kn, entry.out_is_nm) == (form.b_is_kn, form.out_is_nm)
    ]
    near = [entry for entry in comparable if _distance(entry, m, n, k)[0] <= 2]
    if not near:
        what = f"no measurement near m, n, k = {m}, {n}, {k} for {name}"
        if measured is None:
            what = f"no measurement for {name} yet"
        return Choice("reference", f"{what}: run `{TUNE}`; {_DENSE}")
    if compressing and name not in implementations.PROVEN_ON:
        what = f"no kernel of compression is proven on {name}"
        return Choice("reference", f"{what} (implementations.PROVEN_ON): {_DENSE}")
    ratios: dict[Measurement, Any] = {
        entry: entry.compressing if compressing else entry.ratio for entry in near
    }
    if None in ratios.values():
        what = f"no kernel compressed near m, n, k = {m}, {n}, {k} on {name}"
        return Choice("reference", f"{what}: run `{TUNE}`; {_DENSE}")
    slowest = min(near, key=lambda entry: ratios[entry])
    low, median, high = ratios[slowest]
    words = (
        f"{device.kernel} was measured at {median:.2f}x the dense product's speed "
        f"({low:.2f} to {high:.2f}{', compressing' if compressing else ''}) for "
        f"m, n, k = {slowest.m}, {slowest.n}, {slowest.k} on {name}"
    )
    if low <= 1:
        return Choice("reference", f"{words}: {_DENSE}")
    nearest = min(near, key=lambda entry: _distance(entry, m, n, k))
    return Choice(device.kernel, f"{words}, the least near this size", nearest.config)


def explain(
    m: int,
    n: int,
    k: int,
    *,
    dtype: Any = "bfloat16",
    form: Form | None = None,
    device: str | None = None,
    compressing: bool = False,
) -> str:
    """What `nm_matmul` would run for a product, and why, with the measured speed.

    Args:
      m: Rows of A, the compressed side: the features out of a layer, for `x · W24`.
      n: Columns of B: its tokens.
      k: What is contracted: its features in.
      dtype: Of both operands.
      form: The layouts of B and D; by default those of `x · W24`, B `(n, k)` and D
        `(n, m)`.
      device: By default this one; else a name, as CUDA has it ("NVIDIA H200") or as
        `devices.DATA_SHEETS` does ("h200").
      compressing: What a layer of nmjax would run, which compresses A at every call.

    Raises:
      ValueError: The device has no such name, or the sizes cannot be.
      TypeError: There is no such dtype.
    """
    if min(m, n, k) < 0 or k % 4:
        raise ValueError(f"m, n, k = {m}, {n}, {k}: expected sizes, k a multiple of 4")
    form, dtype = form or Form(), jnp.dtype(dtype)
    values: Any = jax.ShapeDtypeStruct((m, k // 2), dtype)
    a = NMCompressed(values, metadata=values, axis=-1)  # of which none is read
    b = jax.ShapeDtypeStruct((k, n) if form.b_is_kn else (n, k), dtype)
    where = this_device()
    if device is not None and (where is None or device != where.name):
        where = data_sheet(device)
        if where is None:
            raise ValueError(
                f"device={device!r}: expected None, this device's name, or one of "
                f"{[*DATA_SHEETS]}"
            )
    choice = _judge_operands(a, b, form, device=where, compressing=compressing)
    name = where.name if where else jax.devices()[0].device_kind
    return f"{name}: {choice.name}; {choice.reason}"


def kernel(name: str) -> Any:
    """A kernel's module, which loads Mosaic: not for those who never use it."""
    return importlib.import_module(f"pallas_kernels.matmul_{name}")


def _distance(entry: Measurement, m: int, n: int, k: int) -> tuple[float, float]:
    """The largest factor between the sizes of two products, then all of them."""
    factors = [
        max(size, measured) / min(size, measured)
        for size, measured in ((m, entry.m), (n, entry.n), (k, entry.k))
    ]
    return max(factors), factors[0] * factors[1] * factors[2]

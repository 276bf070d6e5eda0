"""GPUs: which one this is, and what data sheets say of those that people have."""

import dataclasses
from typing import Any

import jax

# By the major compute capability: Ada and GeForce Blackwell have what Ampere has.
_KERNELS = {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm80"}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, by what the choice of a kernel depends on.

    Attributes:
      name: As CUDA has it: "NVIDIA H200".
      capability: The compute capability.
    """

    name: str
    capability: tuple[int, int]

    @property
    def kernel(self) -> str | None:
        """The name of the kernel for its architecture; None if there is none."""
        return _KERNELS.get(self.capability[0])


@dataclasses.dataclass(frozen=True)
class DataSheet(Device):
    """What the maker promises of a GPU.

    Attributes:
      tflops: Dense bfloat16 or float16 with float32 accumulation, TFLOP/s; 2:4 sparse
        products twice that.
      gb_per_s: Bandwidth of device memory.
      multiprocessors: How many there are.
      source: Where the figures stand.
    """

    tflops: float
    gb_per_s: float
    multiprocessors: int
    source: str


# Data sheets that give a figure "with sparsity" are halved.
DATA_SHEETS = {
    "a100": DataSheet(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        312,
        2039,
        108,
        "NVIDIA A100 data sheet, 80GB SXM",
    ),
    "a100-40gb": DataSheet(
        "NVIDIA A100-SXM4-40GB",
        (8, 0),
        312,
        1555,
        108,
        "NVIDIA A100 architecture whitepaper, 40GB SXM",
    ),
    "rtx3090": DataSheet(
        "NVIDIA GeForce RTX 3090",
        (8, 6),
        71,
        936,
        82,
        "NVIDIA Ampere GA102 architecture whitepaper",
    ),
    "rtx4090": DataSheet(
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        165.2,
        1008,
        128,
        "NVIDIA Ada architecture whitepaper",
    ),
    "l40s": DataSheet("NVIDIA L40S", (8, 9), 362, 864, 142, "NVIDIA L40S data sheet"),
    "h100": DataSheet(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        989.4,
        3350,
        132,
        "NVIDIA H100 data sheet, SXM",
    ),
    "h100-pcie": DataSheet(
        "NVIDIA H100 PCIe",
        (9, 0),
        756,
        2000,
        114,
        "NVIDIA H100 data sheet, PCIe",
    ),
    "h200": DataSheet(
        "NVIDIA H200", (9, 0), 989.4, 4800, 132, "NVIDIA H200 data sheet, SXM"
    ),
    "b200": DataSheet(
        "NVIDIA B200", (10, 0), 2250, 8000, 148, "NVIDIA HGX B200 data sheet, 1000 W"
    ),
    "rtx5090": DataSheet(
        "NVIDIA GeForce RTX 5090",
        (12, 0),
        209.5,
        1792,
        170,
        "NVIDIA RTX Blackwell architecture whitepaper",
    ),
}


def data_sheet(name: str) -> DataSheet | None:
    """The data sheet of a device, by its short name here or by CUDA's; None if none."""
    by_name = {sheet.name: sheet for sheet in DATA_SHEETS.values()}
    return DATA_SHEETS.get(name.lower()) or by_name.get(name)


def default_device() -> Any:
    """The device that jax computes on by default, as jax has it."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return chosen or jax.devices()[0]


def this_device() -> Device | None:
    """The NVIDIA GPU that jax computes on by default; None if it computes elsewhere."""
    device = default_device()
    if not isinstance(device, jax.Device) or device.platform not in ("gpu", "cuda"):
        return None
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdecimal():  # of AMD's: gfx90a
        return None
    major, _, minor = capability.partition(".")
    return Device(device.device_kind, (int(major), int(minor or 0)))

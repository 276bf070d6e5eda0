"""Compiles Pallas kernels for GPUs that are not there; needs the CUDA plugin's wheels.

jax's ahead-of-time topologies need no driver: Mosaic prints PTX, ptxas reports, and
`nvdisasm`, where its wheel is installed, shows the machine code. The compiler serves
one architecture a process, so each has a process of its own.
"""

import atexit
import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_HOST = "; ModuleID"  # the first words of LLVM in text
# Where NVIDIA's wheels put their binaries, below the namespace package `nvidia`.
_BINARIES = ("cu13/bin", "cuda_nvcc/bin", "cuda_nvdisasm/bin")


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for; figures of NVIDIA's data sheets and occupancy tables."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes a block may opt in to
    architecture_specific: bool = True  # sm_90a rather than sm_90

    @property
    def arch(self) -> str:
        """As ptxas names it."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + "a" * self.architecture_specific


A100 = Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, False)
RTX3090 = Target("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376, False)
RTX4090 = Target("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376, False)
H200 = Target("NVIDIA H200", (9, 0), 132, 232_448)
B200 = Target("NVIDIA B200", (10, 0), 148, 232_448)
RTX5090 = Target("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376)


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        return (
            "needs a CUDA plugin wheel, no GPU: "
            "pip install --no-deps -r .ci/gpu-compiler.txt"
        )
    if find_binary("ptxas") is None:
        return "needs ptxas: the wheel nvidia-cuda-nvcc"
    return None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of one kernel."""

    ptx: str
    host: str  # LLVM of the function that launches it; jax 0.10 does not show it
    arch: str

    @functools.cached_property
    def _assembled(self) -> tuple[str, bytes]:
        """What ptxas -v says, and the machine code."""
        with tempfile.TemporaryDirectory() as folder:
            path, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            path.write_text(self.ptx)
            report = subprocess.run(
                [find_binary("ptxas"), "-v", f"-arch={self.arch}", path, "-o", cubin],
                check=True,
                capture_output=True,
                text=True,
            ).stderr
            return report, cubin.read_bytes()

    report = property(lambda self: self._assembled[0])

    @functools.cached_property
    def sass(self) -> str | None:
        """The machine code as text; None without nvdisasm."""
        if not (disassembler := find_binary("nvdisasm")):
            return None
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(self._assembled[1])
            cubin.flush()
            return subprocess.run(
                [disassembler, "-c", "-ndf", cubin.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout

    def spilled_bytes(self) -> int:
        """Bytes of registers spilled to memory, stores and loads."""
        found = re.findall(r"(\d+) bytes spill (?:stores|loads)", self.report)
        return sum(int(count) for count in found)

    def instructions(self) -> int:
        """Machine instructions; needs `sass`."""
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", self.sass or "", re.M))

    def registers(self) -> int:
        """Registers of a thread."""
        return max(int(n) for n in re.findall(r"Used (\d+) registers", self.report))


def compile_kernel(
    function: Callable, *arguments: jax.ShapeDtypeStruct, target: Target
) -> Compiled:
    """Compiles a function with one Mosaic GPU kernel in it for `target`.

    The function goes to another process: it has to be a module's, or a
    `functools.partial` of one. The same one is compiled once: jax 0.12 dumps nothing
    the second time.
    """
    job = (function, arguments, target)
    return _compile_once(target.arch, pickle.dumps(job))


@functools.cache
def _compile_once(arch: str, job: bytes) -> Compiled:
    return _process(arch).submit(_compile, *pickle.loads(job)).result()


@functools.cache
def _process(arch: str) -> concurrent.futures.Executor:
    del arch  # one process each
    # Whose server imports jax once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    atexit.register(executor.shutdown)
    return executor


def devices(target: Target, count: int = 1) -> list[jax.Device]:
    """GPUs to compile for that are not there; of one kind in a process."""
    topology = topologies.get_topology_desc(
        target.name,
        platform="cuda",
        topology=f"1x1x{count}",
        target_config=_config(target),
    )
    return topology.devices


def on(mesh: jax.sharding.Mesh, tree: Any, *axes: Any) -> Any:
    """Shapes and dtypes of arrays that lie on a mesh, cut along its axes."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def program(mesh: jax.sharding.Mesh, function: Callable, *arguments: Any) -> str:
    """What XLA makes of a function for `devices` of a mesh; arguments as of `on`."""
    with jax.default_device(mesh.devices.flat[0]):
        lowered = jax.jit(function).trace(*arguments)
        compiled = lowered.lower(lowering_platforms=("cuda",)).compile(
            {"xla_gpu_autotune_level": 0}
        )
    return compiled.as_text()


def _compile(function, arguments, target: Target) -> Compiled:
    (device,) = devices(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with jax.default_device(device):
        traced = jax.jit(function).trace(*arguments)
        printed = _printed(traced.lower(lowering_platforms=("cuda",)).compile)
    kernel, _, host = printed.partition(_HOST)
    assert kernel.count(".visible .entry") == 1, "expected one kernel"
    return Compiled(kernel, host and _HOST + host, target.arch)


def find_binary(name: str) -> str | None:
    """A tool of the CUDA toolkit: from NVIDIA's wheels, or else from PATH."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        for folder in _BINARIES:
            path = Path(root, folder, name)
            if path.is_file():
                return str(path)
    return shutil.which(name)


def _printed(compile_lowered: Callable) -> str:
    """What Mosaic prints of what it compiles: the PTX, then the host's LLVM.

    Given a folder, it dumps all it can there, which takes as long as compiling.
    """
    settings = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
    stdout = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.environ.update(settings)
        os.dup2(file.fileno(), 1)
        try:
            compile_lowered()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            for name in settings:
                del os.environ[name]
        file.seek(0)
        return file.read().decode()


def _config(target: Target) -> str:
    major, minor = target.capability
    features = "ACCELERATED_FEATURES" if target.architecture_specific else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {target.shared_memory + 1024}
  shared_memory_per_block_optin: {target.shared_memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {target.multiprocessors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4000000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.9
  device_memory_size: 85100068864 device_address_bits: 64 name: "{target.name}"
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {features}
  }}
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.name}"
"""

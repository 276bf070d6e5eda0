"""What every test shares: the devices, the random numbers, the tolerances."""

import os

# Read by jax when it is imported, hence before the import. Four CPU devices let one
# machine test sharding. Compiling is most of a test, and takes half the time without
# LLVM's passes and with loops straight to LLVM, not through MLIR (which 0.12 ignores).
# Such loops move bfloat16 through float32, and AVX512-BF16, which some CPUs have, makes
# subnormal numbers zero when it rounds: not with these instructions.
# As users compile: XLA_FLAGS=--xla_force_host_platform_device_count=4 pytest
# The tests marked `gpu`: JAX_PLATFORMS=cuda,cpu pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
    ]
    if os.environ["JAX_PLATFORMS"] == "cpu":
        flags += [
            "--xla_backend_optimization_level=0",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_max_isa=AVX512",
        ]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

import zlib  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Same examples in every run, and no deadline: the first example pays for compilation.
hypothesis.settings.register_profile("nmjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nmjax")

# The largest error among the outputs of a GEMM of unit-variance operands is below
# base * sqrt(k): rounding errors grow as the sum does. For 16-bit types the rounding of
# the result leads (four units in the last place), else that of the accumulation.
TOLERANCE = {
    jnp.dtype("float64"): 8e-15,
    jnp.dtype("float32"): 4e-6,
    jnp.dtype("float16"): 4e-3,
    jnp.dtype("bfloat16"): 3e-2,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: on a machine with one, JAX_PLATFORMS=cuda,cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone, not on the order of runs."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Makes jax raise where two dtypes meet without a cast.

    For modules that call jax alone (Flax and optax rely on promotion):
    `pytestmark = pytest.mark.usefixtures("strict_promotion")`.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def gemm_atol() -> Callable[..., float]:
    """`gemm_atol(dtype, k)`: the absolute tolerance of a GEMM that contracts `k`."""
    return lambda dtype, k: TOLERANCE[jnp.dtype(dtype)] * k**0.5

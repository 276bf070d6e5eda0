"""What every test shares: the devices, the random numbers, the tolerances."""

import os

# Read by jax when it is imported, hence before the import. Four CPU devices let one
# machine test sharding. The tests marked `gpu`: JAX_PLATFORMS=cuda,cpu pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    ).strip()

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


# Half the time to compile: no LLVM passes; loops straight to LLVM, not through MLIR,
# where jax still has both ways (0.12 ignores the option).
_QUICK_TO_COMPILE = (
    " --xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def pytest_configure(config: pytest.Config) -> None:
    """Compiles less where the speed of what is compiled matters least.

    So for the quick suite, and for CI's `-m "not gpu"`: all tests of the kernels, which
    XLA only interprets. Slow tests of the rest are compiled as users compile. jax reads
    the flags when it first needs a device, after this.
    """
    if config.option.markexpr in ("not slow", "not gpu"):
        os.environ["XLA_FLAGS"] += _QUICK_TO_COMPILE


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

"""What every sparse GEMM has to pass, interpreted here and compiled on a GPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from pallas_kernels import NMCompressed, compress, reference
from pallas_kernels.reference import Form

# The layouts of B and D that the five uses of training need, by name.
FORMS = {
    "fprop W24, dgrad W24ᵀ": Form(b_is_kn=False, out_is_nm=True, bias_along_m=True),
    "fprop x24, wgrad": Form(b_is_kn=True, out_is_nm=False, bias_along_m=False),
    "wgrad xᵀ dy24": Form(b_is_kn=True, out_is_nm=True, bias_along_m=True),
    "B as (N, K), D as (M, N)": Form(b_is_kn=False, out_is_nm=False),
}


def operands(
    rng: np.random.Generator, m: int, n: int, k: int, form: Form, dtype, integers: bool
) -> tuple[NMCompressed, jnp.ndarray, jnp.ndarray]:
    """A, B and a bias; small integers, whose sums float32 holds exactly, or normal."""

    def random(*shape):
        if integers:
            return rng.integers(-4, 5, shape).astype(np.float32)
        return rng.standard_normal(shape).astype(np.float32)

    w = jnp.asarray(random(m, k), dtype)
    a = compress(w, nmjax.magnitude_mask(w, "2:4", axis=-1), axis=-1)
    b = random(k, n) if form.b_is_kn else random(n, k)
    bias = random(m if form.bias_along_m else n)
    return a, jnp.asarray(b, dtype), jnp.asarray(bias, dtype)


def check(
    gemm: Callable,
    rng: np.random.Generator,
    m: int,
    n: int,
    k: int,
    form: Form = FORMS["fprop W24, dgrad W24ᵀ"],
    *,
    dtype="bfloat16",
    with_bias: bool = False,
    atol: float | None = None,
) -> None:
    """Compares `gemm(a, b, bias, form)` with the reference.

    Without `atol` the operands are integers and the results have to be equal: the sums
    are exact, whatever their order, and both are rounded once.
    """
    form = Form(**{**vars(form), "out_dtype": jnp.dtype(form.out_dtype)})
    a, b, bias = operands(rng, m, n, k, form, dtype, integers=atol is None)
    bias = bias if with_bias else None
    actual = np.asarray(gemm(a, b, bias, form), np.float32)
    expected = np.asarray(reference.gemm(a, b, bias, form), np.float32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol or 0)


# (M, N, K) in tiles: 1 to 4 of them in each direction.
TILE_COUNTS = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 3, 2), (3, 2, 3)]


def check_again_and_again(
    gemm: Callable, rng: np.random.Generator, m: int, n: int, k: int, times: int
) -> None:
    """The same product `times` times, which has to be the reference's every time.

    A register or a tile that is overwritten too early shows by chance alone.
    """
    form = Form()
    a, b, _ = operands(rng, m, n, k, form, "bfloat16", integers=True)
    expected = reference.gemm(a, b, None, form)
    count = jax.jit(lambda a, b, out: (gemm(a, b, None, form) != out).sum())
    wrong = np.asarray([count(a, b, expected) for _ in range(times)])
    np.testing.assert_array_equal(wrong, 0, err_msg="wrong entries of each run")

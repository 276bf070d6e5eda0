"""Triton's mask + compress: interpreted against the oracle, compiled with no GPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import reference, triton
from pallas_kernels.format import NMCompressed
from pallas_kernels.triton import compression
from tests.pallas_kernels.element_wise import assert_same, every_group, widths
from tests.pallas_kernels.triton import compiled, launches

pytestmark = [
    pytest.mark.usefixtures("strict_promotion"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton"
    ),
]

AXES = (-1, -2)
TYPES = ("float32", "bfloat16", "float16")


# Of the values. Triton's interpreter misreads and misrounds subnormal bfloat16, which
# `every_group` has: nothing converts to or from them here.
OUT = {
    "float32": "float16",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "small integers": "bfloat16",
}


def magnitude_cases():
    for axis in AXES:
        for dtype in TYPES:
            yield ("every group", axis, dtype), every_group(axis, dtype)
        for rows, k in ((1, 4), (20, 72)):
            w = np.random.default_rng(k).integers(-3, 4, (rows, k))
            w = w if axis == -1 else w.T
            yield (f"{rows} x {k}", axis, "small integers"), w.astype(np.float32)


def transposable_cases():
    for at_most in (False, True):
        for k, n in ((64, 128), (36, 20)):
            w = np.random.default_rng(n).standard_normal((k, n))
            yield (f"{k} x {n}", at_most, "float32"), w.astype(np.float32)
            ties = np.round(w).astype(jnp.bfloat16)
            yield (f"{k} x {n}", at_most, "bfloat16"), ties


MAGNITUDE, TRANSPOSABLE = dict(magnitude_cases()), dict(transposable_cases())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the wrappers return for every case, by one process of the interpreter."""
    cases = {
        key: functools.partial(
            compression.compress_magnitude,
            jnp.asarray(w),
            axis=key[1],
            dtype=OUT[key[2]],
        )
        for key, w in MAGNITUDE.items()
    }
    for key, w in TRANSPOSABLE.items():
        cases["both", *key] = functools.partial(
            compression.compress_transposable,
            jnp.asarray(w),
            dtype=jnp.float16,
            at_most=key[1],
        )
    folder = tmp_path_factory.mktemp("triton")
    return launches.interpret(cases, (compression,), folder)


def as_jax(form):
    return NMCompressed(
        jnp.asarray(form.values), jnp.asarray(form.metadata), axis=form.axis
    )


@pytest.mark.parametrize("key", MAGNITUDE, ids=str)
def test_interpreted_kernel_masks_by_magnitude(key, interpreted):
    axis, w = key[1], jnp.asarray(MAGNITUDE[key])
    expected = reference.compress_2to4(w if axis == -1 else w.T, OUT[key[2]])
    actual = as_jax(interpreted[key])
    assert actual.axis == axis
    assert_same(actual if axis == -1 else actual.T, expected)


@pytest.mark.parametrize("key", TRANSPOSABLE, ids=str)
def test_interpreted_kernel_of_both_forms(key, interpreted):
    w = jnp.asarray(TRANSPOSABLE[key])
    expected = reference.compress_transposable(w, jnp.float16, at_most=key[1])
    for form, same in zip(interpreted["both", *key], expected, strict=True):
        assert_same(as_jax(form), same)


W = jnp.zeros((1024, 4096))


@compiled.needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype, loads", [("bfloat16", 4), ("float32", 8)])
def test_kernel_compiles_with_wide_loads(capability, axis, dtype, loads):
    result = compiled.compile_launch(
        compression,
        lambda: compression.compress_magnitude(
            W.astype(dtype), axis=axis, dtype=jnp.bfloat16
        ),
        capability,
    )
    assert widths(result.ptx, "ld") == {16: loads}
    assert widths(result.ptx, "st") == {16: 2, 4: 1}
    assert result.launch.shared_memory <= 16 * 1024


@compiled.needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("at_most", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernel_of_both_forms_compiles_with_wide_loads(capability, at_most):
    result = compiled.compile_launch(
        compression,
        lambda: compression.compress_transposable(
            W.astype(jnp.bfloat16), dtype=jnp.bfloat16, at_most=at_most
        ),
        capability,
    )
    assert widths(result.ptx, "ld") == {16: 4}
    assert widths(result.ptx, "st") == {16: 4, 4: 2}
    assert result.launch.shared_memory <= 16 * 1024


@compiled.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "key",
    [key for key in MAGNITUDE if key[2] in ("bfloat16", "small integers")],
    ids=str,
)
def test_compiled_kernel_masks_by_magnitude(key, capability):
    axis, w = key[1], jnp.asarray(MAGNITUDE[key])
    actual = compiled.run_launch(
        compression,
        lambda: compression.compress_magnitude(w, axis=axis, dtype=OUT[key[2]]),
        capability,
    )
    expected = reference.compress_2to4(w if axis == -1 else w.T, OUT[key[2]])
    actual = as_jax(actual)
    assert_same(actual if axis == -1 else actual.T, expected)


@compiled.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "key", [("36 x 20", False, "float32"), ("36 x 20", True, "bfloat16")], ids=str
)
def test_compiled_kernel_of_both_forms(key, capability):
    w = jnp.asarray(TRANSPOSABLE[key])
    actual = compiled.run_launch(
        compression,
        lambda: compression.compress_transposable(w, dtype=jnp.float16, at_most=key[1]),
        capability,
    )
    expected = reference.compress_transposable(w, jnp.float16, at_most=key[1])
    for form, same in zip(actual, expected, strict=True):
        assert_same(as_jax(form), same)


@compiled.needs_compiler
def test_public_function_calls_the_kernel_within_transforms(monkeypatch):
    """`jax_triton.triton_call` has no rule for vmap or gradients: the wrapper has."""
    call = functools.partial(triton.call, compute_capability=80)
    monkeypatch.setattr(compression, "call", call)
    monkeypatch.setattr(compression, "unavailable", lambda: None)

    def loss(w):
        w24 = pallas_kernels.compress_magnitude(w, implementation="triton")
        return jnp.sum(w24.values.astype(jnp.float32) ** 2)

    stacked = jnp.zeros((3, 64, 128))
    lowered = compiled.lower(jax.vmap(jax.grad(loss)), stacked).as_text()
    assert lowered.count("custom_call @triton_kernel_call") == 1
    assert "stablehlo.while" in lowered

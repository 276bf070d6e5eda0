"""Runs every kernel that this GPU has on its smallest problems: for compute-sanitizer.

    compute-sanitizer --tool racecheck python -m tests.pallas_kernels.smallest_products

Products in all layouts, once of whole tiles and once with ragged edges, and both
compressions. Says what ran and what did not; ends with 1 if nothing did.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.compression import compress_magnitude, compress_transposable
from pallas_kernels.config import SM90Config
from tests.pallas_kernels import gemm_suite

# One tile of any kernel, with two steps along k, and a part of one.
SIZES = ((128, 128, 256), (72, 40, 100))

# On Hopper also clusters, each with several tiles, and A from both places: what the
# heuristic takes for large products alone.
CLUSTERS = SM90Config(128, 64, 64, 2, cluster_m=2)
SEVERAL_TILES = (200, 9000, 132)


def main() -> int:
    """Runs them all; returns the exit status."""
    ran = 0
    for name in ("sm90", "sm80", "sm100"):
        ran += _products(name)
    ran += _compressions()
    if not ran:
        print("nothing ran on", jax.devices()[0].device_kind)
    return 0 if ran else 1


def _products(name: str) -> int:
    kernel = dispatch.kernel(name)
    rng, ran = np.random.default_rng(0), 0
    for form_name, form in gemm_suite.FORMS.items():
        form = dataclasses.replace(form, out_dtype=jnp.dtype(form.out_dtype))
        for sizes, config in _cases(name):
            a, b, _ = gemm_suite.operands(rng, *sizes, form, "bfloat16", integers=True)
            reason = kernel.unavailable(a, b, form)
            if reason:
                print(f"{name}, {form_name}, {sizes}: not run: {reason}")
                continue
            gemm = functools.partial(kernel.gemm, config=config)
            gemm_suite.check(gemm, rng, *sizes, form, with_bias=True)
            print(f"{name}, {form_name}, {sizes}, {config or 'by default'}: ran")
            ran += 1
    return ran


def _cases(name: str) -> list[tuple[tuple[int, int, int], SM90Config | None]]:
    """Sizes and Configs; None leaves it to the kernel."""
    cases = [(sizes, None) for sizes in SIZES]
    if name == "sm90":
        from_registers = dataclasses.replace(CLUSTERS, a_from="registers")
        cases += [(SEVERAL_TILES, c) for c in (CLUSTERS, from_registers)]
    return cases


def _compressions() -> int:
    w = jnp.asarray(np.random.default_rng(0).standard_normal((100, 72)), jnp.float32)
    ran = 0
    for compress in (compress_magnitude, compress_transposable):
        try:
            actual = compress(w, implementation="mosaic")
        except NotImplementedError as reason:
            print(f"{compress.__name__}: not run: {reason}")
            continue
        expected = compress(w, implementation="reference")
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        print(f"{compress.__name__}: ran")
        ran += 1
    return ran


if __name__ == "__main__":
    sys.exit(main())

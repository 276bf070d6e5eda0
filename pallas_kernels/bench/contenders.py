"""What races: the sparse kernel, the dense product, cuSPARSELt; compression, a copy.

Every result is compared with an oracle before it may race. The oracle of a product is
the dense product of the same matrices with zeros in them, accumulated in float32; its
mask is drawn at random, and no code of the format has a part in it.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.stages import Compiled, Lowered

from pallas_kernels import dispatch, implementations, reference
from pallas_kernels.bench.products import Product
from pallas_kernels.bench.report import Row
from pallas_kernels.bench.timing import Contender, quartiles, race, sets_for
from pallas_kernels.compression import compress_magnitude
from pallas_kernels.config import Config
from pallas_kernels.format import NMCompressed, compress

# The largest error among the outputs of a product of unit-variance operands, divided by
# sqrt(k): the rounding of results of that size, four units in the last place.
TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3}

# Seconds within which the host may not have started the next kernel.
_LAUNCH = 20e-6


class WrongResult(Exception):
    """A contender's result is not the oracle's; the message says by how much."""


class Race:
    """The contenders of one product and the operands that they share.

    Args:
      product: The product.
      dtype: Of operands and result: "bfloat16" or "float16".
      seed: Of the random operands.
      sets: How many sets of operands; by default as many as no L2 can hold.

    Attributes:
      dense: The dense product as a contender.

    Raises:
      WrongResult: The dense product is not the oracle's.
    """

    def __init__(self, product: Product, dtype: str, seed: int = 0, sets: int = 0):
        self.product = product
        self.form = product.form(jnp.dtype(dtype))
        sets = sets or sets_for(product.dense_bytes())
        # Bits from the hardware's own generator: gigabytes of them, fast to compile.
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), sets)
        made = [_operands(key, product, dtype) for key in keys]
        # The matrix with zeros, as it lies in a layer, is what the dense product takes.
        self._dense = [(a, b) for a, _, b in made]
        self._sparse = [(a24, b) for _, a24, b in made]
        self._tolerance = TOLERANCE[dtype] * product.k**0.5
        exact = functools.partial(self._dense_product, accumulator=jnp.float32)
        oracle = compile_alone(_lowered(exact, self._dense))
        self._oracle = _contender("oracle", oracle, self._dense).run()
        dense = compile_alone(_lowered(self._dense_product, self._dense))
        self.dense = _contender("dense", dense, self._dense)
        self._judge("jnp.dot", self.dense.run())

    def lowered(self, implementation: str, config: Config | None = None) -> Lowered:
        """The executable of a kernel, or of "reference", before it is compiled.

        Args:
          implementation: "sm80", "sm90", "sm100" or "reference".
          config: Of the kernel; None leaves it to the kernel.

        Raises:
          NotImplementedError: The kernel cannot run here, with its reason.
        """
        return _lowered(self._gemm(implementation, config), self._sparse)

    def judged(
        self, name: str, compiled: Compiled, sets: Sequence | None = None
    ) -> Contender:
        """A contender of what `lowered` became, or of an executable of other `sets`.

        Raises:
          WrongResult: Its result is not the oracle's.
        """
        contender = _contender(name, compiled, sets or self._sparse)
        self._judge(name, contender.run())
        return contender

    def sparse(self, implementation: str) -> Contender:
        """A kernel of this package, or "reference": lowered, compiled, judged."""
        lowered = self.lowered(implementation)
        return self.judged(implementation, compile_alone(lowered))

    def compressing(
        self,
        implementation: str,
        config: Config | None = None,
        *,
        other_layout: bool = False,
    ) -> Contender:
        """A kernel and before it the pass that compresses A, as a layer needs both.

        Args:
          implementation: As for `lowered`.
          config: As for `lowered`.
          other_layout: A lies the other way than in this use of the layer.

        Raises:
          NotImplementedError: No kernel compresses or multiplies here.
          WrongResult: Its result is not the oracle's.
        """
        compression = implementations.available("compression")
        gemm = self._gemm(implementation, config)
        a_is_km = self.product.use.a_is_km != other_layout
        axis = -2 if a_is_km else -1

        def product(a, b):
            a24 = compress_magnitude(
                a, axis=axis, dtype=a.dtype, implementation=compression
            )
            return gemm(a24.T if a_is_km else a24, b)

        sets = self._dense
        if other_layout:
            sets = [(jax.jit(jnp.transpose)(a), b) for a, b in sets]
        name = f"{implementation} compressing {'(k, m)' if a_is_km else '(m, k)'}"
        return self.judged(name, compile_alone(_lowered(product, sets)), sets)

    def cusparselt(self) -> Contender:
        """The product of NVIDIA's library through torch, its algorithm searched for.

        Raises:
          NotImplementedError: torch with cuSPARSELt is not there.
          WrongResult: Its result is not the oracle's.
        """
        torch = _torch_with_cusparselt()
        searched, alg_id = [], None
        for a, b in self._dense:
            a = torch.from_dlpack(a.T if self.product.use.a_is_km else a)
            packed = torch._cslt_compress(a.contiguous())
            b = torch.from_dlpack(b)
            b = b if self.form.b_is_kn else b.t()
            options = {"transpose_result": self.form.out_is_nm}
            if alg_id is None:  # the sets differ in their numbers alone
                alg_id = torch._cslt_sparse_mm_search(packed, b, **options)
            options["alg_id"] = alg_id
            searched.append(
                functools.partial(torch._cslt_sparse_mm, packed, b, **options)
            )

        def wait(results):
            del results
            torch.cuda.synchronize()

        contender = Contender(
            "cuSPARSELt", lambda: [call() for call in searched], len(searched), wait
        )
        results = contender.run()
        wait(results)
        self._judge(
            "cuSPARSELt", [jax.dlpack.from_dlpack(out.contiguous()) for out in results]
        )
        return contender

    def _gemm(self, implementation: str, config: Config | None) -> Any:
        """The product of A compressed and B by a kernel that can run here."""
        gemm = reference.gemm
        if implementation != "reference":
            kernel = dispatch.kernel(implementation)
            reason = kernel.unavailable(*self._sparse[0], self.form)
            if reason:
                raise NotImplementedError(reason)
            gemm = kernel.gemm
            if config is not None:
                gemm = functools.partial(gemm, config=config)
        return lambda a, b: gemm(a, b, None, self.form)

    def _dense_product(self, a, b, accumulator=None):
        """`jnp.dot`, which on a GPU accumulates in float32 and writes `a.dtype`."""
        contract_a = 0 if self.product.use.a_is_km else 1
        contract_b = 0 if self.form.b_is_kn else 1
        operands, contract = (a, b), ((contract_a,), (contract_b,))
        if self.form.out_is_nm:
            operands, contract = operands[::-1], contract[::-1]
        out = lax.dot_general(
            *operands, (contract, ((), ())), preferred_element_type=accumulator
        )
        return out.astype(self.form.out_dtype)

    def _judge(self, name: str, results: Sequence[jax.Array]) -> None:
        for result, expected in zip(results, self._oracle, strict=True):
            if result.shape != expected.shape or result.dtype != expected.dtype:
                raise WrongResult(
                    f"{name} gives {result.dtype}{result.shape}, "
                    f"expected {expected.dtype}{expected.shape}"
                )
            error = float(_largest_error(result, expected))
            if not error <= self._tolerance:  # NaN is not below either
                raise WrongResult(
                    f"{name} is off by {error:.3g}, more than {self._tolerance:.3g}"
                )


def _lowered(product: Any, sets: Sequence) -> Lowered:
    """One executable of the product of every set, one after another."""
    arrays, tree = jax.tree.flatten(sets)  # flat arguments are the fastest to pass

    def run(*arrays):
        return [product(*operands) for operands in tree.unflatten(arrays)]

    return jax.jit(run).lower(*arrays)


def compile_alone(lowered: Lowered) -> Compiled:
    """Compiles so that each product has the device for itself.

    XLA may replay small executables as one CUDA graph, whose products can overlap.
    """
    options: dict[str, str | bool] = {"xla_gpu_graph_min_graph_size": str(10**6)}
    return lowered.compile(options)


def _contender(name: str, compiled: Compiled, sets: Sequence) -> Contender:
    arrays = jax.tree.leaves(sets)
    return Contender(name, lambda: compiled(*arrays), len(sets))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _operands(
    key: jax.Array, product: Product, dtype: str
) -> tuple[jax.Array, NMCompressed, jax.Array]:
    """A with zeros as a layer has it, A compressed, and B; normal, in `dtype`."""
    m, n, k = product.m, product.n, product.k
    key_a, key_mask, key_b = jax.random.split(key, 3)
    values = jax.random.normal(key_a, (m, k), dtype)
    mask = random_mask(key_mask, m, k)
    a = jnp.where(mask, values, jnp.zeros_like(values))
    b = jax.random.normal(key_b, (k, n) if product.use.b_is_kn else (n, k), dtype)
    return a.T if product.use.a_is_km else a, compress(values, mask, axis=-1), b


def random_mask(key: jax.Array, m: int, k: int) -> jax.Array:
    """A 2:4 mask (m, k), the six of a group about equally likely."""
    pairs = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    masks = np.zeros((6, 4), bool)
    np.put_along_axis(masks, pairs, True, axis=1)
    drawn = jax.random.bits(key, (m, k // 4), jnp.uint8) % 6
    return jnp.asarray(masks)[drawn.astype(jnp.int32)].reshape(m, k)


@jax.jit
def _largest_error(result: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.abs(result.astype(jnp.float32) - expected.astype(jnp.float32)).max()


def measure(
    product: Product,
    implementation: str,
    dtype: str,
    *,
    rounds: int,
    seconds: float,
    sets: int = 0,
) -> Row:
    """Judges and races one product.

    Args:
      product: The product.
      implementation: "sm80", "sm90", "sm100" or "reference".
      dtype: Of operands and result.
      rounds: Turns of each contender.
      seconds: Of one turn, about.
      sets: Of operands; 0 for as many as no L2 can hold.
    """
    row = Row(product, dtype, implementation)
    try:
        entrants = Race(product, dtype, sets=sets)
        sparse = entrants.sparse(implementation)
    except NotImplementedError as error:
        return dataclasses.replace(row, status=f"cannot run: {error}")
    except WrongResult as error:
        return dataclasses.replace(row, status=f"WRONG: {error}")
    # What the compiler or the driver refuses costs this row, not those before it.
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(row, status=f"FAILED: {error}"[:300])
    layers, rivals, notes = [], [], []
    if missing_compression() is None:
        where = f"with compression, {product.layer}, n = {product.n}"
        try:
            layers.append(entrants.compressing(implementation))
        except NotImplementedError as error:
            notes.append(f"Not {where}: {error}")
        except WrongResult as error:
            notes.append(f"WRONG {where}: {error}")
        except Exception as error:  # of another kernel: the product's own time counts
            notes.append(f"FAILED {where}: {type(error).__name__}: {error}"[:300])
    if missing_cusparselt() is None:
        try:
            rivals.append(entrants.cusparselt())
        except Exception as error:  # whatever another library says of itself
            notes.append(f"cuSPARSELt: {error}")
    racing = [entrants.dense, sparse, *layers, *rivals]
    try:
        times = race(racing, rounds=rounds, seconds=seconds)
    except jax.errors.JaxRuntimeError as error:  # one before it broke the device
        return dataclasses.replace(
            row, status=f"FAILED: {error}"[:300], notes=(*notes,)
        )
    ours = times[sparse.name]
    shortest = min(np.median(ours), np.median(times["dense"]))
    if jax.default_backend() == "gpu" and shortest < _LAUNCH:
        notes.append("so short that launches, not the GPU, may set the time")
    return dataclasses.replace(
        row,
        dense_us=1e6 * quartiles(times["dense"])[1],
        sparse_us=1e6 * quartiles(ours)[1],
        ratio=quartiles(times["dense"] / ours),
        compressing=next(
            (quartiles(times["dense"] / times[c.name]) for c in layers), None
        ),
        rivals_us={c.name: 1e6 * quartiles(times[c.name])[1] for c in rivals},
        rivals_ratio={c.name: quartiles(times[c.name] / ours) for c in rivals},
        notes=tuple(notes),
    )


def missing_compression() -> str | None:
    """Why no kernel compresses here, as layers need it; None where one does."""
    try:
        implementations.available("compression")
    except NotImplementedError as error:
        return f"{error}"


def missing_cusparselt() -> str | None:
    """Why cuSPARSELt cannot race here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "torch has no GPU"
    if not hasattr(torch, "_cslt_sparse_mm_search"):
        return f"torch {torch.__version__} has no cuSPARSELt"
    return None


def _torch_with_cusparselt() -> Any:
    reason = missing_cusparselt()
    if reason:
        raise NotImplementedError(reason)
    return importlib.import_module("torch")

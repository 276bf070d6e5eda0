"""Sparse GEMM for Ampere and Ada: `mma.sp`, operands by cp.async and ldmatrix.

    D = act(A24 · B + bias)        A24 (M, K) compressed, B (K, N), D (M, N)

A block of four warps computes one tile of D, `block_m` × `block_n`, in registers. It
walks along K in steps of `block_k`, of which `stages` are in shared memory at a time:

    values   (block_m, block_k/2)     ldmatrix
    B        (block_n, block_k)       ldmatrix; or, where it lies in memory so,
             (block_k, block_n)       ldmatrix.trans

The metadata words, (block_m/2, block_k/16), go from global memory to registers, a step
ahead: Mosaic's cp.async takes rows of 32 bytes at least, and 64 columns have 16.

The epilogue adds the bias and applies the activation in float32. A D of 16 bits goes
through shared memory, and is written in pieces of 128 bytes of a row; where it is
written as (N, M), movmatrix transposes it in registers before. A float32 D is written
from registers, 32 bytes of a row at a time, either way.

Any M, N and K: an operand that does not fill whole tiles is copied and padded with
zeros, and D is cut. Runs wherever `mma.sp` does, capability 8.0 and later; from 9.0 on
Mosaic copies by TMA instead of cp.async. Needs jax 0.11.1, which first had Ampere.

Not yet run on a GPU. Its body is interpreted with race detection, for which jax takes
the path by TMA; it compiles for sm_80, 86, 89, 90a, 100a and 120a, and the PTX is run
on a CPU, thread by thread (`tests/pallas_kernels/ptx_machine.py`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx, reference
from pallas_kernels.config import SM80Config, heuristic_sm80, shared_memory_limit
from pallas_kernels.format import NMCompressed, pad, pad_to
from pallas_kernels.ptx import mma
from pallas_kernels.reference import ACTIVATIONS, Form

# Tiles that run at the same time share operands in L2 where they form a square: rows
# of tiles that blocks walk along before they turn.
_GRID_WIDTH = 8


def unavailable(a: NMCompressed, b: jax.Array, form: Form) -> str | None:
    """Why `gemm` cannot run these operands on this device; None where it can."""
    if ptx.JAX_VERSION < ptx.AMPERE_SINCE:
        needed = ".".join(map(str, ptx.AMPERE_SINCE))
        return f"needs jax {needed} or later, this is {jax.__version__}"
    capability = ptx.capability()
    if capability is None:
        return f"needs an NVIDIA GPU, jax runs on {jax.default_backend()}"
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, this device has {capability}"
    return reference.unsupported(a, b, form)


def gemm(
    a: NMCompressed,
    b: jax.Array,
    bias: jax.Array | None,
    form: Form,
    *,
    config: SM80Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`reference.gemm` by `mma.sp`.

    Args:
      a: Operand A, one 2:4 matrix of dense shape (M, K), `axis=-1`; bfloat16, float16.
      b: Operand B in the dtype of A, `(K, N)` or `(N, K)` as `form` says.
      bias: None, or a vector.
      form: The layouts of B and D, the activation, the dtype of D.
      config: The tiles; by default what `heuristic_sm80` chooses for this device.
      interpret: What `ptx.interpreter` made, to run on the CPU; None to compile.

    Returns:
      `(M, N)` or `(N, M)` in `form.out_dtype`.

    Raises:
      ValueError: B does not fit A, or `config` takes more shared memory than a block
        of this device has.
      NotImplementedError: The operands are none that the instruction takes.
    """
    if reason := reference.unsupported(a, b, form):
        raise NotImplementedError(f"matmul_sm80: {reason}")
    m, n, k = reference.sizes(a, b, form)
    if 0 in (m, n, k):
        return reference.gemm(a, b, bias, form)  # there is nothing to multiply
    limit = shared_memory_limit(ptx.capability() or (8, 0))
    config = config or heuristic_sm80(m, n, k, limit)
    if config.shared_memory > limit:
        raise ValueError(
            f"{config} takes {config.shared_memory} bytes of shared memory, a block of "
            f"this device has {limit}: lower stages, or a block size"
        )
    form = dataclasses.replace(form, out_dtype=jnp.dtype(form.out_dtype))
    return _gemm(a, b, bias, form=form, config=config, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("form", "config", "interpret"))
def _gemm(a, b, bias, *, form: Form, config: SM80Config, interpret: Any) -> jax.Array:
    """Pads to whole tiles, runs the kernel and cuts."""
    m, n = a.shape[0], b.shape[1 if form.b_is_kn else 0]
    a = pad(a, config.block_m, config.block_k)
    b_block = (config.block_n, config.block_k)
    b = pad_to(b, b_block[::-1] if form.b_is_kn else b_block)
    operands = [a.values, a.metadata, b]
    if bias is not None:
        block = config.block_m if form.bias_along_m else config.block_n
        operands.append(pad_to(bias.astype(jnp.float32), (block,)))
    tiles = (-(-m // config.block_m), -(-n // config.block_n))
    shape = (tiles[0] * config.block_m, tiles[1] * config.block_n)
    out = ptx.kernel(
        functools.partial(_body, config=config, form=form, tiles=tiles),
        name="nm_matmul_sm80",
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct(
            shape[::-1] if form.out_is_nm else shape, form.out_dtype
        ),
        grid=(tiles[0] * tiles[1],),
        grid_names=("tile",),
    )(*operands)
    return out[:n, :m] if form.out_is_nm else out[:m, :n]


def _body(values_gmem, words_gmem, b_gmem, *rest, config, form, tiles):
    *bias_gmem, out_gmem = rest
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    dtype, m_warps = values_gmem.dtype, config.m_warps
    lhs, rhs, acc_layout = mma.mma_layouts(dtype, m_warps)
    i, j = plgpu.planar_snake(lax.axis_index("tile"), tiles, 0, _GRID_WIDTH)
    steps = values_gmem.shape[1] // (block_k // 2)

    def load_words(step):
        rows = pl.ds(i * (block_m // 2), block_m // 2)
        columns = pl.ds(step * (block_k // 16), block_k // 16)
        layout = ptx.metadata_layout(m_warps)
        return ptx.load(words_gmem.at[rows, columns], layout)

    def multiply(index, values_smem, b_smem, carry):
        acc, words = carry
        (step,) = index
        following = load_words(jnp.minimum(step + 1, steps - 1))
        b_kn = b_smem if form.b_is_kn else b_smem.T
        a, b = ptx.load(values_smem, lhs), ptx.load(b_kn, rhs)
        acc = mma.mma_sp(acc, a, b, words, m_warps=m_warps)
        ptx.release_smem()
        return acc, following

    def operand(block, index_map):
        swizzled = ptx.swizzled(block[-1], dtype)
        return plgpu.BlockSpec(block, index_map, transforms=swizzled)

    acc = jnp.zeros((block_m, block_n), jnp.float32)
    b_block = (block_k, block_n) if form.b_is_kn else (block_n, block_k)
    acc, _ = plgpu.emit_pipeline(
        multiply,
        grid=(steps,),
        in_specs=[
            operand((block_m, block_k // 2), lambda step: (i, step)),
            operand(b_block, lambda step: (step, j) if form.b_is_kn else (j, step)),
        ],
        max_concurrent_steps=config.stages,
        init_carry=(plgpu.layout_cast(acc, acc_layout), load_words(0)),
    )(values_gmem, b_gmem)

    rows, columns = pl.ds(i * block_m, block_m), pl.ds(j * block_n, block_n)
    for bias in bias_gmem:
        axis, where = (0, rows) if form.bias_along_m else (1, columns)
        vector = ptx.load(bias.at[where], acc_layout.reduce(1 - axis))
        vector = lax.broadcast_in_dim(vector, acc.shape, (axis,))
        acc += plgpu.layout_cast(vector, acc_layout)
    out = ACTIVATIONS[form.activation](acc).astype(form.out_dtype)
    if form.out_is_nm:
        out, rows, columns = mma.transpose_acc(out, m_warps=m_warps), columns, rows
    out_gmem = out_gmem.at[rows, columns]
    if out.dtype.itemsize == 4:
        ptx.store(out_gmem, out)
        return

    swizzled = ptx.swizzled(out.shape[-1], out.dtype)
    out_smem = plgpu.SMEM(out.shape, out.dtype, transforms=swizzled)

    @functools.partial(pl.run_scoped, out_smem=out_smem)
    def _(out_smem):
        out_smem[...] = out
        layout = plgpu.Layout.SMEM_GMEM_COPY(out.shape, out.dtype, 128)
        ptx.store(out_gmem, ptx.load(out_smem, layout))

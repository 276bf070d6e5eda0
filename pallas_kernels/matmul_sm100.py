"""Sparse GEMM for Blackwell: `tcgen05.mma.sp`, the accumulator in tensor memory.

    D = act(A24 · B + bias)        A24 (M, K) compressed, B (K, N), D (M, N)

A persistent block computes one tile of D after another, 128 × `block_n`, walking along
K in steps of `block_k`, of which `stages` are in flight. Of its two warpgroups, the
first feeds the tensor core with two of its warps, the second writes D:

    copy       values, metadata and B of a step into shared memory, by TMA
    multiply   metadata from there into tensor memory, then tcgen05.mma.sp
    write      the tile from tensor memory, in slices of columns: bias and activation in
               float32, then shared memory, then TMA

The copies run ahead into the next tile. Where tensor memory has room for two tiles, one
is written while the next is multiplied. What is ready is told by barriers: `loaded` and
`consumed` of each stage, `multiplied` and `written` of each tile in tensor memory.

The instruction reads metadata in words of the same 2 × 16 entries as `mma.sp` does, in
another order: `metadata_squares`.

Any M, N and K: TMA reads zeros beyond the edges and writes nothing there. An operand
of which the rows are no multiple of 8, or not of 128 bytes, is copied and padded, and
such a D is cut. Needs jax 0.11 and capability 10.x (12.x, GeForce, has no tcgen05:
there `mma.sp` runs).

Not yet run on a GPU. Its PTX for sm_100a is run on a CPU, thread by thread
(`tests/pallas_kernels/ptx_machine.py`). Pallas' interpreter has no sparse tcgen05: the
body is interpreted with race detection with A decompressed, through the same copies,
barriers and epilogue. The order of the metadata is tested against its definition and
against jax's.
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
from pallas_kernels.config import SM100Config, heuristic_sm100
from pallas_kernels.format import NMCompressed, decompress, pad, pad_to
from pallas_kernels.reference import ACTIVATIONS, Form

# The first jax whose tcgen05_mma takes metadata and whose interpreter has tcgen05.
SINCE = (0, 11)

# A row of a slice of D, which is written at a time: a swizzle. Two slices take turns.
_SLICE_BYTES = 128
_TENSOR_MEMORY_COLUMNS = 512
# As in matmul_sm80: tiles in flight share operands in L2 where they form a square.
_GRID_WIDTH = 8
_FEEDING, _WRITING = 0, 1  # warpgroups
_COPYING, _MULTIPLYING = 0, 1  # warps of the first


def unavailable(a: NMCompressed, b: jax.Array, form: Form) -> str | None:
    """Why `gemm` cannot run these operands on this device; None where it can."""
    if ptx.JAX_VERSION < SINCE:
        needed = ".".join(map(str, SINCE))
        return f"needs jax {needed} or later, this is {jax.__version__}"
    capability = ptx.capability()
    if capability is None:
        return f"needs an NVIDIA GPU, jax runs on {jax.default_backend()}"
    if capability[0] != 10:
        return f"needs compute capability 10.x, this device has {capability}"
    return reference.unsupported(a, b, form)


def metadata_squares(words: jax.Array) -> jax.Array:
    """The metadata of `format.py` in the order of `tcgen05.mma.sp` with 16-bit types.

    Of a square of 128 rows and 128 columns, lane 16a + 8e + g of tensor memory holds
    four words. Word d has the metadata of columns 32d + 16e to +15: of row 16a + g in
    its low half, of row 16a + g + 8 in its high half (PTX ISA, "Layout of the sparsity
    metadata matrix for M = 128 / M = 256 for .kind::f16"). So words move as they are.

    Args:
      words: int32 (M/2, K/16), M and K multiples of 128.

    Returns:
      uint2 (M/128, K/128, 128, 64), what `plgpu.format_tcgen05_sparse_metadata` makes.
    """
    rows, columns = words.shape[0] // 64, words.shape[1] // 8
    words = words.reshape(rows, 8, 8, columns, 4, 2)  # (·, a, g, ·, d, e)
    words = words.transpose(0, 3, 1, 5, 2, 4).reshape(rows, columns, 128, 4)
    pairs = lax.bitcast_convert_type(words, jnp.uint2)
    return pairs.reshape(rows, columns, 128, 64)


def gemm(
    a: NMCompressed,
    b: jax.Array,
    bias: jax.Array | None,
    form: Form,
    *,
    config: SM100Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`reference.gemm` by `tcgen05.mma.sp`.

    Args:
      a: Operand A, one 2:4 matrix of dense shape (M, K), `axis=-1`; bfloat16, float16.
      b: Operand B in the dtype of A, `(K, N)` or `(N, K)` as `form` says.
      bias: None, or a vector.
      form: The layouts of B and D, the activation, the dtype of D.
      config: The tiles; by default what `heuristic_sm100` chooses.
      interpret: What `ptx.interpreter` made, to run on the CPU with A decompressed;
        None to compile.

    Returns:
      `(M, N)` or `(N, M)` in `form.out_dtype`.

    Raises:
      NotImplementedError: The operands are none that the instruction takes.
      ValueError: B does not fit A.
    """
    if reason := reference.unsupported(a, b, form):
        raise NotImplementedError(f"matmul_sm100: {reason}")
    m, n, k = reference.sizes(a, b, form)
    if 0 in (m, n, k):
        return reference.gemm(a, b, bias, form)  # there is nothing to multiply
    config = config or heuristic_sm100(m, n, k)
    form = dataclasses.replace(form, out_dtype=jnp.dtype(form.out_dtype))
    blocks = 2 if interpret else ptx.multiprocessors()
    return _gemm(
        a, b, bias, form=form, config=config, blocks=blocks, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("form", "config", "blocks", "interpret"))
def _gemm(
    a, b, bias, *, form: Form, config: SM100Config, blocks: int, interpret: Any
) -> jax.Array:
    """Pads to what TMA reads and writes whole, runs the kernel and cuts."""
    m, n = a.shape[0], b.shape[1 if form.b_is_kn else 0]
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    padded = pad(a, block_m, block_k)
    values = a.values if interpret is None else decompress(a)
    scratch = _scratch(config, form, values.dtype, is_compressed=interpret is None)
    # Of the padded matrix the metadata, which have to be legal beyond the edge too; XLA
    # drops the rest.
    operands = [
        ptx.whole_tiles(values, scratch["values_smem"]),
        metadata_squares(padded.metadata),
        ptx.whole_tiles(b, scratch["b_smem"]),
    ]
    if bias is not None:
        block = block_m if form.bias_along_m else block_n
        operands.append(pad_to(bias.astype(jnp.float32), (block,)))
    out = jax.ShapeDtypeStruct((n, m) if form.out_is_nm else (m, n), form.out_dtype)
    whole = functools.partial(ptx.whole_tiles, smem=scratch["out_smem"])
    tiles = (padded.shape[0] // block_m, -(-n // block_n))
    steps = padded.shape[1] // block_k
    blocks = min(blocks, tiles[0] * tiles[1])
    run = ptx.kernel(
        functools.partial(
            _body, config=config, form=form, blocks=blocks, tiles=tiles, steps=steps
        ),
        name="nm_matmul_sm100",
        interpret=interpret,
        out_type=jax.eval_shape(whole, out),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch,
    )
    return run(*operands)[: out.shape[0], : out.shape[1]]


def _scratch(
    config: SM100Config, form: Form, dtype: Any, *, is_compressed: bool
) -> dict[str, Any]:
    """What a block has in shared and tensor memory."""
    stages, block_m = config.stages, config.block_m
    block_n, block_k = config.block_n, config.block_k
    columns = block_k // 2 if is_compressed else block_k
    metadata_columns = stages * block_k // 2
    # A column of tensor memory holds 16 metadata of each of its 128 lanes.
    room = _TENSOR_MEMORY_COLUMNS - metadata_columns // 16
    tiles_in_flight = min(2, room // block_n)

    def smem(*shape, dtype=dtype):
        return plgpu.SMEM(shape, dtype, transforms=ptx.swizzled(shape[-1], dtype))

    def barriers(count):
        return plgpu.Barrier(
            num_arrivals=1, num_barriers=count, orders_tensor_core=True
        )

    b = (block_k, block_n) if form.b_is_kn else (block_n, block_k)
    width = _slice_width(form)
    part = (width, block_m) if form.out_is_nm else (block_m, width)
    return {
        "values_smem": smem(stages, block_m, columns),
        "metadata_smem": plgpu.SMEM((stages, 1, block_k // 128, 128, 64), jnp.uint2),
        "b_smem": smem(stages, *b),
        "out_smem": smem(2, *part, dtype=form.out_dtype),
        "acc_tmem": plgpu.TMEM((block_m, tiles_in_flight * block_n), jnp.float32),
        "metadata_tmem": plgpu.TMEM(
            (block_m, metadata_columns),
            jnp.uint2,
            layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT,
        ),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "consumed": barriers(stages),
        "multiplied": barriers(tiles_in_flight),
        "written": barriers(tiles_in_flight),
    }


def _slice_width(form: Form) -> int:
    """Columns of D that are written at a time."""
    return _SLICE_BYTES // form.out_dtype.itemsize


def _register_layout(form: Form):
    """Of a slice of D, so that it can be stored as it is written.

    stmatrix transposes 16 bits. For 32 bits the lanes lie along M, one element each.
    """
    if form.out_is_nm and form.out_dtype.itemsize == 4:
        return plgpu.Layout.TCGEN05_TMEM_NATIVE(1)
    return plgpu.Layout.TCGEN05


def _body(
    values_gmem,
    metadata_gmem,
    b_gmem,
    *rest,
    values_smem,
    metadata_smem,
    b_smem,
    out_smem,
    acc_tmem,
    metadata_tmem,
    loaded,
    consumed,
    multiplied,
    written,
    config,
    form,
    blocks,
    tiles,
    steps,
):
    *bias_gmem, out_gmem = rest
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, tiles_in_flight = config.stages, acc_tmem.shape[1] // block_n
    columns = values_smem.shape[-1]
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    count_of_tiles = lax.div(tiles[0] * tiles[1] - 1 - block, blocks) + 1

    def for_tiles(visit):
        """Calls visit(i, j, count) for tile (i, j), the count-th of this block."""

        @pl.loop(0, count_of_tiles)
        def _(count):
            index = block + count * blocks
            i, j = plgpu.planar_snake(index, tiles, 0, _GRID_WIDTH)
            visit(i, j, count)

    def copy(i, j, count):
        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(count * steps + step, stages)

            @pl.when(count * steps + step >= stages)
            def _():
                plgpu.barrier_wait(consumed.at[stage])

            rows, k = pl.ds(j * block_n, block_n), pl.ds(step * block_k, block_k)
            sources = (
                values_gmem.at[
                    pl.ds(i * block_m, block_m), pl.ds(step * columns, columns)
                ],
                metadata_gmem.at[
                    pl.ds(i, 1), pl.ds(step * (block_k // 128), block_k // 128)
                ],
                b_gmem.at[(k, rows) if form.b_is_kn else (rows, k)],
            )
            for source, target in zip(
                sources, (values_smem, metadata_smem, b_smem), strict=True
            ):
                plgpu.copy_gmem_to_smem(source, target.at[stage], loaded.at[stage])

    def multiply(i, j, count):
        del i, j
        slot = lax.rem(count, tiles_in_flight)
        acc = acc_tmem.at[:, pl.ds(slot * block_n, block_n)]

        @pl.when(count >= tiles_in_flight)
        def _():
            plgpu.barrier_wait(written.at[slot])

        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(count * steps + step, stages)
            plgpu.barrier_wait(loaded.at[stage])
            b = b_smem.at[stage]
            metadata = {}
            if columns < block_k:
                metadata_columns = pl.ds(stage * (block_k // 2), block_k // 2)
                here = metadata_tmem.at[:, metadata_columns]
                plgpu.async_copy_sparse_metadata_to_tmem(metadata_smem.at[stage], here)
                metadata = {"a_sparse_metadata": here}
            plgpu.tcgen05_mma(
                acc,
                values_smem.at[stage],
                b if form.b_is_kn else b.T,
                consumed.at[stage],
                accumulate=step > 0,
                **metadata,
            )

        plgpu.tcgen05_commit_arrive(multiplied.at[slot])

    def write(i, j, count):
        slot = lax.rem(count, tiles_in_flight)
        plgpu.barrier_wait(multiplied.at[slot])
        rows = pl.ds(i * block_m, block_m)
        layout, width = _register_layout(form), _slice_width(form)
        parts = block_n // width
        for part in range(parts):
            start = slot * block_n + part * width
            out = plgpu.async_load_tmem(
                acc_tmem.at[:, pl.ds(start, width)], layout=layout
            )
            columns = pl.ds(j * block_n + part * width, width)
            for bias in bias_gmem:
                axis, where = (0, rows) if form.bias_along_m else (1, columns)
                vector = ptx.load(bias.at[where], layout.reduce(1 - axis))
                vector = lax.broadcast_in_dim(vector, out.shape, (axis,))
                out += plgpu.layout_cast(vector, layout)
            out = ACTIVATIONS[form.activation](out).astype(form.out_dtype)
            # The slice before last has been read: two take turns.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            target = out_smem.at[lax.rem(count * parts + part, 2)]
            if form.out_is_nm:
                target.T[...] = out
                window = columns, rows
            else:
                target[...] = out
                window = rows, columns
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(target, out_gmem.at[window])
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(written.at[slot])

    def drain(barriers, total, depth):
        """Waits for the last arrivals, one of each barrier that was used."""

        @pl.loop(lax.max(total - depth, 0), total)
        def _(index):
            plgpu.barrier_wait(barriers.at[lax.rem(index, depth)])

    # The loop over tiles is each warp's own: the copies run ahead into the next tile.
    @pl.when(warpgroup == _FEEDING)
    def _():
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == _COPYING)
            def _():
                for_tiles(copy)
                drain(consumed, count_of_tiles * steps, stages)

            @pl.when(warp == _MULTIPLYING)
            def _():
                for_tiles(multiply)
                drain(written, count_of_tiles, tiles_in_flight)

    @pl.when(warpgroup == _WRITING)
    def _():
        for_tiles(write)
        plgpu.wait_smem_to_gmem(0)

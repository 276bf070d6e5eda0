"""The sparse GEMM on Hopper: `wgmma.mma_async.sp` fed by TMA.

Not yet run on a GPU. Its body is interpreted with race detection, and its PTX run on a
CPU, thread by thread (`tests/pallas_kernels/ptx_machine.py`).

    D = act(A24 · B + bias)     A (M, K) 2:4 along K, B (K, N), a float32 accumulator

A block makes tiles of D, block_m × block_n, one after another. Of its three warpgroups
the last only copies: it keeps `stages` steps of block_k in shared memory. The other two
multiply, each half of the tile's rows, and write D. A stage has two barriers: `full`,
its copies have arrived, and `empty`, both warpgroups (of every block of the cluster)
are done with it. The copies run ahead into the next tile while D is written. A
warpgroup ends a step before it loads the next one's metadata, for the instruction may
read its register late; meanwhile the other keeps the tensor cores at work.

B always lies in shared memory; the blocks of a cluster have one B, and each fetches its
part for all. A comes from where the Config says:

    shared       values and metadata as `format.py` stores them, TMA copies both
    registers    in the order of the registers (`wgmma.fragments`, a pass over A more);
                 each thread loads its own, a step ahead, the next tile's first while
                 this one is written. Every 64 rows of A read all of B from shared
                 memory, whose bandwidth is the limit: A then takes none

TMA fills what it reads beyond an edge with zeros and drops what it writes there, so no
size has to be a multiple of a block. It moves tiles of 8 rows of 128 bytes (a swizzle):
an array that is not made of whole ones, as it lies in memory, is padded, or for D cut,
at the cost of a copy. For fprop and dgrad in 16 bits that is free where 8 divides the
tokens and 64 the features. A in registers is padded to whole blocks, in the same pass.

In 16 bits gelu uses the tanh of the hardware, off by at most 2⁻¹¹ of its value, hence
the result by 2⁻¹² |x|, which is half a unit in the last place of x in float16. In
float32 it is exact to a few units.
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
from pallas_kernels.config import SM90Config, heuristic_sm90
from pallas_kernels.format import NMCompressed, pad, pad_to
from pallas_kernels.ptx import wgmma
from pallas_kernels.reference import ACTIVATIONS, Form

_COPYING = 2  # the warpgroup that does not multiply
_GPCS = 8  # graphics processing clusters of Hopper


def unavailable(a: NMCompressed, b: jax.Array, form: Form) -> str | None:
    """Why `gemm` cannot run these operands on this device; None where it can."""
    capability = ptx.capability()
    if capability is None:
        return f"needs a Hopper GPU, jax runs on {jax.default_backend()}"
    if capability != (9, 0):
        major, minor = capability
        return (
            "needs compute capability 9.0 (Hopper), which alone has wgmma; this "
            f"device has {major}.{minor}"
        )
    return _unsupported(a, b, form)


def _unsupported(a: NMCompressed, b: jax.Array, form: Form) -> str | None:
    if reason := reference.unsupported(a, b, form):
        return reason
    needed = wgmma.TRANSPOSED_FLOAT32_SINCE
    is_float32 = jnp.dtype(form.out_dtype) == jnp.float32
    if is_float32 and form.out_is_nm and ptx.JAX_VERSION < needed:
        needed = ".".join(map(str, needed))
        return (
            f"float32 written as (N, M) needs jax {needed}, this is {jax.__version__}"
        )
    return None


def gemm(
    a: NMCompressed,
    b: jax.Array,
    bias: jax.Array | None,
    form: Form,
    *,
    config: SM90Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`reference.gemm` by `wgmma.mma_async.sp`.

    Args:
      a: Operand A, one 2:4 matrix of dense shape (M, K), `axis=-1`; bfloat16, float16.
      b: Operand B in the dtype of A, `(K, N)` or `(N, K)` as `form` says.
      bias: None, or a vector; added in float32.
      form: The layouts of B and D, the activation, the dtype of D.
      config: The tiles; by default what `heuristic_sm90` chooses for these sizes.
      interpret: What `ptx.interpreter` made, to run on the CPU; None to compile.

    Returns:
      `(M, N)` or `(N, M)` in `form.out_dtype`.

    Raises:
      NotImplementedError: This is no Hopper, or the operands are none that the
        instruction takes.
      ValueError: B does not fit A.
    """
    reason = unavailable(a, b, form) if interpret is None else _unsupported(a, b, form)
    if reason:
        raise NotImplementedError(f"matmul_sm90: {reason}")
    form = dataclasses.replace(form, out_dtype=jnp.dtype(form.out_dtype))
    m, n, k = reference.sizes(a, b, form)
    if 0 in (m, n, k):
        return reference.gemm(a, b, bias, form)  # there is nothing to multiply
    config = config or heuristic_sm90(m, n, k)
    # Interpreted, two clusters: each makes several tiles.
    clusters = 2
    if interpret is None:
        clusters = clusters_at_once(ptx.multiprocessors(), config.cluster_m)
    return _gemm(a, b, bias, form, config, clusters, interpret)


def clusters_at_once(multiprocessors: int, size: int) -> int:
    """How many clusters of `size` blocks surely run side by side.

    One more would begin when the others end, and double the time. A multiprocessor has
    one block, a cluster lies in one GPC, and which multiprocessors of a GPC are turned
    off varies, but always in pairs: clusters of 4 may leave two of each GPC unused.
    """
    unused = _GPCS * max(0, size - 2)
    return max(1, -(-(multiprocessors - unused) // size))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _gemm(a, b, bias, form: Form, config: SM90Config, clusters: int, interpret):
    """Gives TMA whole tiles, and runs the kernel."""
    m, k = a.shape
    n = b.shape[1 if form.b_is_kn else 0]
    scratch = _scratch(form, config, a.dtype)
    b_smem, *a_smem = scratch["operands_smem"]
    padded = pad(a, rows=config.block_m * config.cluster_m, k=config.block_k)
    if config.a_from == "registers":
        values, metadata = wgmma.fragments(padded)
    else:
        # Of the padded matrix the metadata, which have to be legal beyond the edge too;
        # XLA drops what is not used.
        values, metadata = ptx.whole_tiles(a.values, a_smem[0]), padded.metadata
    operands = [values, metadata, ptx.whole_tiles(b, b_smem)]
    if bias is not None:
        multiple = padded.shape[0] if form.bias_along_m else config.block_n
        operands.append(pad_to(bias.astype(jnp.float32), (multiple,)))
    out = jax.ShapeDtypeStruct((n, m) if form.out_is_nm else (m, n), form.out_dtype)
    tiles = (
        padded.shape[0] // config.block_m // config.cluster_m,
        -(-n // config.block_n),
    )
    clusters = min(clusters, tiles[0] * tiles[1])
    run = ptx.kernel(
        functools.partial(
            _kernel,
            clusters=clusters,
            tiles=tiles,
            steps=padded.shape[1] // config.block_k,
            form=form,
            config=config,
        ),
        name=f"nm_matmul_sm90_{config.a_from}",
        interpret=interpret,
        out_type=jax.eval_shape(
            functools.partial(ptx.whole_tiles, smem=scratch["d_smem"]), out
        ),
        scratch_types=scratch,
        grid=(clusters,),
        grid_names=("clusters",),
        cluster=(config.cluster_m,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params={"approx_math": form.out_dtype != jnp.float32},
    )
    return run(*operands)[: out.shape[0], : out.shape[1]]


def _scratch(form: Form, config: SM90Config, dtype) -> dict[str, Any]:
    """What a block keeps in shared memory."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages = config.stages

    def smem(*shape, dtype=dtype):
        swizzled = ptx.swizzled(shape[-1], dtype)
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    b = (block_k, block_n) if form.b_is_kn else (block_n, block_k)
    operands = [smem(stages, *b)]
    if config.a_from == "shared":
        operands.append(smem(stages, block_m, block_k // 2))
        words = (stages, block_m // 2, block_k // 16)
        operands.append(plgpu.SMEM(words, jnp.int32))
    d = (_slice_width(form, config), block_m // 2)
    empty = plgpu.Barrier
    if config.cluster_m > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    return {
        "operands_smem": operands,
        "d_smem": smem(
            *(2, 2), *(d if form.out_is_nm else d[::-1]), dtype=form.out_dtype
        ),
        "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
        "empty": empty(num_arrivals=2, num_barriers=stages),
    }


def _slice_width(form: Form, config: SM90Config) -> int:
    """Columns of D that a warpgroup writes at a time; the bytes are the Config's."""
    return config.epilogue_n * 2 // form.out_dtype.itemsize


def _kernel(
    a_gmem,
    metadata_gmem,
    b_gmem,
    *rest,
    operands_smem,
    d_smem,
    full,
    empty,
    clusters: int,
    tiles: tuple[int, int],
    steps: int,
    form: Form,
    config: SM90Config,
):
    *bias_gmem, d_gmem = rest
    b_smem, *a_smem = operands_smem
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    half = block_m // 2  # rows of a warpgroup
    warpgroup = lax.axis_index("warpgroup")

    def stage(step):
        return lax.rem(step, config.stages)

    def place(index):
        """Row and column of the block's tile of this index; of the last if beyond."""
        index = lax.min(index, tiles[0] * tiles[1] - 1)
        row, column = plgpu.planar_snake(index, tiles, 0, config.grid_width)
        return row * config.cluster_m + lax.axis_index("cluster"), column

    def for_tiles(visit, held):
        """`held = visit(index, first, held)` for all tiles of the block.

        first counts the steps before the tile; returned is the count of all.
        """

        def tile(info, carry):
            first, held = carry
            return first + steps, visit(info.index[0], first, held)

        loop: Any = plgpu.nd_loop(
            (tiles[0] * tiles[1],),
            collective_axes="clusters",
            init_carry=(jnp.int32(0), held),
        )
        return loop(tile)[0]

    def copy(index, first, _):
        row, column = place(index)

        def step(i, _):
            s = stage(first + i)

            @pl.when(first + i >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[s])

            n, k = pl.ds(column * block_n, block_n), pl.ds(i * block_k, block_k)
            plgpu.copy_gmem_to_smem(
                b_gmem.at[(k, n) if form.b_is_kn else (n, k)],
                b_smem.at[s],
                full.at[s],
                collective_axes="cluster" if config.cluster_m > 1 else None,
            )
            # None of these where A comes from registers.
            for source, target in zip((a_gmem, metadata_gmem), a_smem, strict=False):
                rows, columns = target.shape[1:]
                window = pl.ds(row * rows, rows), pl.ds(i * columns, columns)
                plgpu.copy_gmem_to_smem(source.at[window], target.at[s], full.at[s])

        # Unrolled, it would spill: this warpgroup has 40 registers.
        lax.fori_loop(0, ptx.not_unrolled(steps), step, None)

    def product(step, acc, operand):
        """`acc + A · B` of a step; `operand(stage)` gives A's values and metadata."""
        s = stage(step)
        plgpu.barrier_wait(full.at[s])
        (values, words), b = operand(s), b_smem.at[s]
        acc = wgmma.wgmma_sp(acc, values, words, b, b_is_nk=not form.b_is_kn)
        acc = wgmma.wgmma_wait(acc, [values, b] if config.a_from == "shared" else [b])
        # One thread lets go of a stage for its warpgroup. Products end when all four
        # warps have issued them, hence have loaded their metadata.
        plgpu.barrier_arrive(empty.at[s])
        return acc

    def multiply_from_shared(index, first, _):
        del index
        values_smem, metadata_smem = a_smem
        rows = pl.ds(warpgroup * half, half)
        word_rows = pl.ds(warpgroup * half // 2, half // 2)

        def operand(s):
            words = ptx.load(metadata_smem.at[s, word_rows], ptx.metadata_layout())
            return values_smem.at[s, rows], words

        def step(i, acc):
            return product(first + i, acc, operand)

        return lax.fori_loop(0, steps, step, zeros()), None

    def fragments(row, i):
        """A's values and metadata of the warpgroup's rows in step i."""
        tile = row * (block_m // 64) + warpgroup * (half // 64)

        def load(source, layout, count):
            return [
                ptx.load(source.at[tile + mm, i * count + kk], layout)
                for mm in range(half // 64)
                for kk in range(count)
            ]

        values = load(a_gmem, wgmma.FRAGMENT, block_k // 32)
        return values, load(metadata_gmem, wgmma.FRAGMENT_METADATA, block_k // 64)

    def multiply_from_registers(index, first, operand):
        (row, _), (next_row, _) = place(index), place(index + clusters)

        def step(i, carry):
            acc, operand = carry
            last = i == steps - 1
            ahead = fragments(
                lax.select(last, next_row, row), lax.select(last, 0, i + 1)
            )
            return product(first + i, acc, lambda s: operand), ahead

        return lax.fori_loop(0, steps, step, (zeros(), operand))

    def zeros():
        acc = jnp.zeros((half, block_n), jnp.float32)
        return plgpu.layout_cast(acc, wgmma.WGMMA_ACC)

    def window(row, column, j):
        """The warpgroup's rows, and the columns of the slice from column j."""
        rows = pl.ds(row * block_m + warpgroup * half, half)
        return rows, pl.ds(column * block_n + j, _slice_width(form, config))

    def load_bias(row, column, j=0):
        """The bias of a slice of D; along M it is that of every slice of the tile."""
        if not bias_gmem:
            return None
        rows, columns = window(row, column, j)
        entries, summed = (rows, 1) if form.bias_along_m else (columns, 0)
        return ptx.load(bias_gmem[0].at[entries], wgmma.WGMMA.reduce(summed))

    def write(acc, bias, row, column):
        acc = plgpu.layout_cast(acc, wgmma.WGMMA)
        width = _slice_width(form, config)
        for j in range(0, block_n, width):
            part = acc[:, j : j + width]
            if bias is not None:
                axis = 0 if form.bias_along_m else 1
                part += lax.broadcast_in_dim(bias, part.shape, (axis,))
            if not form.bias_along_m and j + width < block_n:
                bias = load_bias(row, column, j + width)  # arrives meanwhile
            part = ACTIVATIONS[form.activation](part).astype(form.out_dtype)
            # The slice before last has been read: two take turns.
            plgpu.wait_smem_to_gmem(1 if j else 0, wait_read_only=True)
            target = d_smem.at[warpgroup, j // width % 2]
            rows, columns = window(row, column, j)
            if form.out_is_nm:
                wgmma.store_transposed(target, part)
                out = d_gmem.at[columns, rows]
            else:
                target[...] = part
                out = d_gmem.at[rows, columns]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(target, out)

    @pl.when(warpgroup == _COPYING)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        count = for_tiles(copy, None)

        # A block of a cluster must not end before the others have let go of its stages.
        @pl.loop(lax.max(count - config.stages, 0), count)
        def _(step):
            plgpu.barrier_wait(empty.at[stage(step)])

    @pl.when(warpgroup != _COPYING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        multiply, operand = multiply_from_shared, None
        if config.a_from == "registers":
            row, _ = place(lax.axis_index("clusters"))
            multiply, operand = multiply_from_registers, fragments(row, 0)

        def make(index, first, operand):
            row, column = place(index)
            bias = load_bias(row, column)  # arrives while the tile is multiplied
            acc, operand = multiply(index, first, operand)
            write(acc, bias, row, column)
            return operand

        for_tiles(make, operand)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

"""How a sparse GEMM is cut into tiles: one frozen Config for each architecture.

A Config checks itself when it is made: divisibility, bytes of shared memory, registers
of a thread. Whatever exists can be compiled. `heuristic_*` chooses one by arithmetic
on the shape, with the reason beside each constant; `bench/search.py` lists those that
`python -m pallas_kernels.bench --tune` times.

Sizes are those of D = A · B: A (m, k) compressed along k, B (k, n), in elements of 16
bits. A tile of A holds `block_m · block_k / 2` values and one 32-bit metadata word for
every 2 × 16 entries.
"""

import dataclasses
from typing import Any, Literal

Architecture = Literal["sm80", "sm90", "sm100"]

# Bytes of shared memory that a block may opt in to (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability", less the 1 KB that CUDA keeps).
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}

_ALIGNMENT = 1024  # Mosaic rounds every array in shared memory up to this
_BARRIERS = 1024  # and all barriers together take less than this


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have on a device of this capability.

    An unknown capability counts as the smallest known one.
    """
    return SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))


@dataclasses.dataclass(frozen=True)
class SM80Config:
    """`mma.sp` on one group of four warps, operands in shared memory by cp.async.

    Metadata go straight to registers.

    Attributes:
      block_m: Rows of a tile of D, a multiple of 64.
      block_n: Columns of a tile of D, a multiple of 64: B as (K, N) has rows of 128
        bytes, the width of its swizzle.
      block_k: Of a step along k, 64 or 128: the values of a row are then as wide as a
        swizzle.
      stages: Steps of operands in shared memory at a time.
      m_warps: Of the four warps, how many lie along M; the others lie along N.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    m_warps: int = 2

    def __post_init__(self):
        _check_multiples(self, block_m=64, block_n=64)
        _check_choice(self, "block_k", (64, 128))
        _check_choice(self, "m_warps", (1, 2, 4))
        _check_stages(self)
        # Every tile up to this count compiles for sm_80 without spills; 128 × 128 × 64
        # with four warps along M, 274, spilled.
        _check_registers(self, limit=232)
        _check_shared_memory(self, limit=SHARED_MEMORY[8, 0])

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: the stages, and after them a tile of D."""
        values = _aligned(self.block_m * self.block_k)
        b = _aligned(2 * self.block_n * self.block_k)
        return max(
            self.stages * (values + b), _aligned(2 * self.block_m * self.block_n)
        )

    @property
    def registers(self) -> int:
        """32-bit registers of a thread for the accumulator and a step's operands."""
        n_warps = 4 // self.m_warps
        accumulator = self.block_m * self.block_n // 128
        a = self.block_m * self.block_k // 2 // (64 * self.m_warps)
        b = self.block_n * self.block_k // (64 * n_warps)
        words = self.block_m // 2 * self.block_k // 16 // (32 * self.m_warps)
        return accumulator + a + b + words


@dataclasses.dataclass(frozen=True)
class SM90Config:
    """`wgmma.sp` on two warpgroups, a third one feeding them by TMA; persistent.

    Attributes:
      block_m: Rows of a tile of D, a multiple of 128: each warpgroup takes half, in
        instructions of 64 rows.
      block_n: Columns of a tile of D, a multiple of 64 up to 256, the widest
        instruction.
      block_k: Of a step along k, 64 or 128: the values of a row are then as wide as a
        swizzle.
      stages: Steps of operands in shared memory at a time.
      cluster_m: Blocks of a cluster, which lie along M and share one multicast of B.
      epilogue_n: Columns of D that a warpgroup writes at a time: 16, 32, 64 or 128.
      a_from: Whether the instruction reads A from "shared" memory or from "registers",
        which are loaded from global memory.
      grid_width: Rows of tiles that the blocks walk along before they turn, so that
        the tiles in flight share operands in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    cluster_m: int = 1
    epilogue_n: int = 64
    a_from: Literal["shared", "registers"] = "shared"
    grid_width: int = 8

    def __post_init__(self):
        _check_multiples(self, block_m=128, block_n=64, grid_width=1)
        if self.block_n > 256:
            raise ValueError(
                f"{self}: block_n is at most 256, the widest wgmma; take more tiles"
            )
        _check_choice(self, "block_k", (64, 128))
        _check_choice(self, "cluster_m", (1, 2, 4))
        _check_choice(self, "epilogue_n", (16, 32, 64, 128))
        _check_choice(self, "a_from", ("shared", "registers"))
        if self.block_n % self.epilogue_n:
            raise ValueError(
                f"{self}: epilogue_n = {self.epilogue_n} does not divide block_n = "
                f"{self.block_n}"
            )
        _check_stages(self)
        if self.a_from == "shared" and self.stages < 2:
            raise ValueError(
                f"{self}: stages = {self.stages}, but with A from shared memory the "
                "products of two steps are under way at a time: take 2 or more"
            )
        # setmaxnreg leaves 232 to a thread that multiplies; 32 are for addresses, the
        # loop, the bias and the epilogue. All tiles up to this compile without spills.
        _check_registers(self, limit=200)
        _check_shared_memory(self, limit=SHARED_MEMORY[9, 0])

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: the stages, and two slices of D a warpgroup."""
        stage = _stage_bytes(self, a_in_shared_memory=self.a_from == "shared")
        epilogue = 2 * _aligned(2 * self.block_m * self.epilogue_n)
        return self.stages * stage + epilogue + _BARRIERS

    @property
    def registers(self) -> int:
        """32-bit registers of a thread for the accumulator and the operands.

        From registers, A and its metadata are there twice: one step is loaded while
        the instructions read the other.
        """
        accumulator = self.block_m // 2 * self.block_n // 128
        instructions = self.block_m // 2 // 64 * self.block_k // 32
        a, words = 4 * instructions, instructions // 2
        if self.a_from == "shared":
            return accumulator + words
        return accumulator + 2 * (a + words)

    @property
    def speed_bound(self) -> float:
        """Upper bound of the speed, over the dense peak, by shared memory's bandwidth.

        A multiprocessor reads or writes 128 bytes of shared memory a clock, and its
        tensor cores do 64 × 256 × 32 sparse products in 128 clocks. Every 64 rows of A
        read all of B, and TMA writes what the stages hold. A dense GEMM of 128 × 256
        tiles has the bound 1 by the same count.

        Not yet held against counters. A that goes to registers passes L1, which is the
        same memory, and is not counted: with its reads, 256 × 128 × 64 from registers
        would have 1.31 in place of 1.6, with its fills too 1.10.
        """
        clocks = self.block_m * self.block_n * self.block_k / (64 * 256 * 32 / 128)
        b = 2 * self.block_n * self.block_k
        a = self.block_m * self.block_k if self.a_from == "shared" else 0
        words = self.block_m * self.block_k // 8 if self.a_from == "shared" else 0
        traffic = self.block_m // 64 * b + a + (a + words + b)
        return 2 * clocks / max(clocks, traffic / 128)


@dataclasses.dataclass(frozen=True)
class SM100Config:
    """`tcgen05.mma.sp` of one block, the accumulator in tensor memory.

    Attributes:
      block_m: Rows of a tile of D: 128, the lanes of tensor memory.
      block_n: Columns of a tile of D, a multiple of 64 up to 256.
      block_k: Of a step along k, a multiple of 128: metadata come in squares of 128.
      stages: Steps of operands in shared memory at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int

    def __post_init__(self):
        _check_choice(self, "block_m", (128,))
        _check_choice(self, "block_n", (64, 128, 192, 256))
        _check_choice(self, "block_k", (128, 256))
        _check_stages(self)
        if self.tensor_memory > 512:
            raise ValueError(
                f"{self} takes {self.tensor_memory} columns of tensor memory, more "
                "than the 512 there are: lower block_n, block_k or stages"
            )
        _check_shared_memory(self, limit=SHARED_MEMORY[10, 0])

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: the stages, and two slices of 64 columns of D."""
        stage = _stage_bytes(self, a_in_shared_memory=True)
        epilogue = 2 * _aligned(2 * self.block_m * 64)
        return self.stages * stage + epilogue + _BARRIERS

    @property
    def tensor_memory(self) -> int:
        """Columns of tensor memory: D in float32, and each stage's metadata.

        A column of 128 lanes holds 32 bits, the metadata of 32 columns of A.
        """
        return self.block_n + self.stages * self.block_k // 32


Config = SM80Config | SM90Config | SM100Config

CONFIGS: dict[str, type] = {
    "sm80": SM80Config,
    "sm90": SM90Config,
    "sm100": SM100Config,
}


def heuristic_sm80(
    m: int, n: int, k: int, shared_memory: int = SHARED_MEMORY[8, 0]
) -> SM80Config:
    """A Config for `mma.sp`, by the size of the product alone.

    Args:
      m: Rows of A.
      n: Columns of B.
      k: What is contracted.
      shared_memory: Bytes that a block may have: `shared_memory_limit`.
    """
    # The largest tile whose operands are re-read least. A smaller one where the large
    # tiles would leave more than half of an A100's 108 multiprocessors without work.
    block_n = 128 if _tiles(m, 128) * _tiles(n, 128) >= 54 else 64
    # Steps of 64 halve the operands in registers, which at 128 x 128 are all taken.
    # Two warps along M: one along M would load twice the A, four spill.
    tile = {"block_m": 128, "block_n": block_n, "block_k": 64, "m_warps": 2}
    # Three steps of 24 KB let two blocks share a multiprocessor of 163 KB, so that the
    # products of one hide the latency of the other. Where 99 KB hold one block alone,
    # a fourth step has to.
    steps = 3 if shared_memory >= 2 * 3 * 24 * 1024 else 4
    most = min(steps, max(2, _tiles(k, 64)))
    return with_most_stages(SM80Config, tile, most=most, shared_memory=shared_memory)


def heuristic_sm90(m: int, n: int, k: int) -> SM90Config:
    """A Config for `wgmma.sp`, by the size of the product alone."""
    # Putting A into the order of registers reads and writes it once, about 280 / n of
    # the product's time at H200 speeds; the bound rises from 1.12 to 1.6.
    a_from = "registers" if n >= 2048 else "shared"

    def time(tile):
        # In waves of 132 multiprocessors (H100 SXM, H200), each as long as a tile.
        block_m, block_n = tile
        waves = _tiles(_tiles(m, block_m) * _tiles(n, block_n), 132)
        bound = SM90Config(block_m, block_n, 64, 2, a_from=a_from).speed_bound
        return waves * block_m * block_n / bound

    # In a tie the first, which reads B least often.
    block_m, block_n = min([(256, 128), (128, 256), (128, 128)], key=time)
    tile = {
        "block_m": block_m,
        "block_n": block_n,
        # Longer steps save barriers, but fewer fit, and A in registers doubles.
        "block_k": 64,
        # Two blocks share each B tile: without, 128 × 256 tiles at 1.3 times the dense
        # speed ask 10.3 TB/s of L2, with two 6.3. An odd count of rows would be padded.
        "cluster_m": 2 if _tiles(m, block_m) % 2 == 0 else 1,
        # A row of 64 elements is one swizzle; two slices of it a warpgroup are 32 to
        # 64 KB and let the writing of one overlap with the filling of the other.
        "epilogue_n": 64,
        "a_from": a_from,
        # 132 tiles in flight are then about 8 × 16: close to a square, which reads
        # the least of A and B together.
        "grid_width": 8,
    }
    # Six steps of 512 clocks are 1.6 µs at 1.9 GHz, twice the latency of device memory.
    return with_most_stages(SM90Config, tile, most=min(6, max(2, _tiles(k, 64))))


def heuristic_sm100(m: int, n: int, k: int) -> SM100Config:
    """A Config for `tcgen05.mma.sp`, by the size of the product alone."""
    # The widest tile reads least: 164 bytes a clock at the tensor core's full rate, by
    # the data sheet, where 128 columns read 200. It has room for two steps and one
    # accumulator, the other for three and two; which is faster was not measured. The
    # smaller where wide ones would leave more than half of a B200's 148 multiprocessors
    # without work.
    block_n = 256 if _tiles(m, 128) * _tiles(n, 256) >= 74 else 128
    # 128 is the shortest step that metadata allow, and leaves the most stages.
    tile = {"block_m": 128, "block_n": block_n, "block_k": 128}
    # Four steps, where they fit, cover the latency of device memory, as on sm90.
    return with_most_stages(SM100Config, tile, most=min(4, max(2, _tiles(k, 128))))


def with_most_stages(
    kind: Any, tile: dict, *, most: int, shared_memory: int | None = None
) -> Any:
    """The Config of this tile with as many stages as fit, at most `most`.

    Args:
      kind: The class of the Config.
      tile: Its other fields.
      most: More stages are of no use.
      shared_memory: Bytes that a block may have; by default what the class allows.

    Raises:
      ValueError: One stage does not fit, or the tile itself cannot be.
    """
    for stages in range(most, 0, -1):
        try:
            config = kind(**tile, stages=stages)
        except ValueError:
            if stages == 1:
                raise
            continue
        if shared_memory is None or config.shared_memory <= shared_memory:
            return config
    raise ValueError(
        f"{kind.__name__} of {tile} does not fit into {shared_memory} bytes of shared "
        "memory: take a smaller block"
    )


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _aligned(size: int) -> int:
    return _tiles(size, _ALIGNMENT) * _ALIGNMENT


def _stage_bytes(config: Any, *, a_in_shared_memory: bool) -> int:
    b = _aligned(2 * config.block_n * config.block_k)
    if not a_in_shared_memory:
        return b
    values = _aligned(config.block_m * config.block_k)
    words = _aligned(config.block_m * config.block_k // 8)
    return values + words + b


def _check_multiples(config: Any, **multiples: int) -> None:
    for name, multiple in multiples.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0 or value % multiple:
            raise ValueError(
                f"{config}: {name} = {value!r}, expected a positive multiple of "
                f"{multiple}"
            )


def _check_choice(config: Any, name: str, choices: tuple) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{config}: {name} = {value!r}, expected one of {choices}")


def _check_stages(config: Any) -> None:
    if not isinstance(config.stages, int) or config.stages < 1:
        raise ValueError(
            f"{config}: stages = {config.stages!r}, expected at least 1, a whole number"
        )


def _check_registers(config: Any, *, limit: int) -> None:
    if config.registers > limit:
        raise ValueError(
            f"{config} takes {config.registers} registers of a thread for accumulator "
            f"and operands, more than the {limit} that compile without spills: lower "
            "block_m, block_n or block_k"
        )


def _check_shared_memory(config: Any, *, limit: int) -> None:
    if config.shared_memory > limit:
        raise ValueError(
            f"{config} takes {config.shared_memory} bytes of shared memory, more than "
            f"the {limit} that a block may have: lower stages, or a block size"
        )

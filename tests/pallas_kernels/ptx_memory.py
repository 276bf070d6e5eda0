"""What the blocks of `ptx_machine.py` have: shared memory, barriers, registers.

And where the layouts of the PTX ISA put things in shared memory.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.pallas_kernels.host_program import Descriptor, Launch
from tests.pallas_kernels.ptx_tensor_memory import TensorMemory

SHARED_BASE = 1024  # where a block's dynamic shared memory begins
CLUSTER_BITS = 24  # a cluster address: the block's rank, plus one, and its own address


def swizzle(address: Any, width: int) -> Any:
    """Exchanges 16-byte units by the row: the same for TMA and wgmma (PTX ISA)."""
    return address ^ ((address >> 7) % (width // 16) << 4)


def box_in_memory(
    tensor: Descriptor, origin: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Of a box's bytes, in order: their offsets in the buffer, and which exist."""
    # Elements of less than a byte, along the last axis, go by the byte.
    each, size = max(1, 8 // tensor.bits), max(1, tensor.bits // 8)
    index = np.indices((*tensor.box[:-1], tensor.box[-1] // each))
    index = index.reshape(len(tensor.box), -1)
    index[-1] *= each
    index = index + np.array(origin)[:, None]
    inside = np.all((index >= 0) & (index < np.array(tensor.shape)[:, None]), axis=0)
    offsets = np.array(tensor.strides) @ index * tensor.bits // 8
    return (offsets[:, None] + np.arange(size)).ravel(), np.repeat(inside, size)


def box_in_shared_memory(tensor: Descriptor, address: int) -> np.ndarray:
    """Where in shared memory a box's bytes lie, in order."""
    assert address % 128 == 0, "TMA wants 128 bytes of alignment"
    size = tensor.bits * int(np.prod(tensor.box)) // 8
    return swizzle(address + np.arange(size), tensor.swizzle)


def canonical_addresses(
    rows: int, columns: int, leading: int, stride: int, width: int, *, k_major: bool
) -> np.ndarray:
    """Offsets of 16-bit elements before the swizzle: (rows, columns along k).

    PTX ISA, "Asynchronous warpgroup level matrix shared memory layout", canonical
    layouts: along k 8 rows of `width` bytes each, every 8 rows a stride apart; along
    M or N `width` bytes a leading offset apart, every 8 of k a stride apart.
    """
    row, k = np.arange(rows)[:, None], np.arange(columns)
    if k_major:
        return row // 8 * stride + row % 8 * width + 2 * k
    units = width // 2
    return row // units * leading + k // 8 * stride + k % 8 * width + row % units * 2


@dataclasses.dataclass
class Barrier:
    """An mbarrier (PTX ISA, "Parallel synchronization and communication")."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, *, arrivals: int = 0, expected: int = 0, arrived: int = 0) -> None:
        """Arrivals, bytes to wait for, bytes that came."""
        self.pending -= arrivals
        self.bytes += expected - arrived
        assert self.pending >= 0, "more arrivals at an mbarrier than it counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Block:
    """A block: its shared memory, its barriers, its warps."""

    def __init__(
        self, index: tuple[int, ...], launch: Launch, random: np.random.Generator
    ):
        self.index = index
        self.rank = index[0] % launch.cluster[0]
        self.shared = random.integers(0, 256, launch.shared_memory, np.uint8)
        self.written = np.zeros(launch.shared_memory, bool)
        # Written by the warp of this number, plus one, and not yet fenced for TMA.
        self.unfenced = np.zeros(launch.shared_memory, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.waiting: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self.products: dict[int, list[list]] = defaultdict(list)
        self.tensor_memory = TensorMemory(random)
        self.cluster: list[Block] = []
        self.warps = [Warp(self, i) for i in range(launch.threads // 32)]

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """Indices into `shared`."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        outside = (offsets < 0) | (offsets >= self.shared.size)
        assert not outside.any(), f"shared memory: {addresses[outside]} out of bounds"
        return offsets

    def load(self, addresses: np.ndarray) -> np.ndarray:
        """The bytes at these addresses, random ones where none were written."""
        return self.shared[self.offsets(addresses)]

    def read(self, addresses: np.ndarray) -> np.ndarray:
        """`load` for TMA and tensor cores, which read only what counts."""
        written = self.written[self.offsets(addresses)]
        assert written.all(), "shared memory read before it was written"
        return self.load(addresses)

    def write(self, addresses: np.ndarray, data: np.ndarray, warp: int = -1) -> None:
        """Writes bytes; those of a warp have to be fenced before TMA reads them."""
        offsets = self.offsets(addresses)
        self.shared[offsets], self.written[offsets] = data, True
        self.unfenced[offsets] = warp + 1

    def barrier(self, address: int) -> Barrier:
        """The mbarrier at an address of this block, or of one of its cluster."""
        rank = address >> CLUSTER_BITS
        owner = self.cluster[rank - 1] if rank else self
        return owner.barriers[address & (1 << CLUSTER_BITS) - 1]


class Warp:
    """32 threads, each with its place in the program; registers by name."""

    def __init__(self, block: Block, number: int):
        self.block, self.number = block, number
        self.at = np.zeros(32, int)
        self.registers: dict[str, np.ndarray] = {}
        self.done = False
        self.blocked_on: tuple | None = None
        self.copies: list[list[Callable]] = [[]]  # to shared memory, in groups
        self.stores: list[list[Callable]] = [[]]  # TMA from shared memory, in groups

    @property
    def warpgroup(self) -> int:
        """Of four warps."""
        return self.number // 4

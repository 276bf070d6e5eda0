"""`tcgen05` of `ptx_machine.py`: tensor memory, its copies and its sparse products.

PTX ISA, "Tensorcore 5th generation family instructions". An address of tensor memory
has the lane in its high half and the column, of 32 bits, in its low half. For 16-bit
types and 128 rows, lane 16a + 8e + g of a column of metadata has the word of 16 columns
of A, 16e to 16e + 15: of row 16a + g in its low half, of row 16a + g + 8 in its high.

Copies and products of a block are done in their order, when a `tcgen05.commit` after
them takes effect: late.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.pallas_kernels import emulator

LANES, COLUMNS = 128, 512


class TensorMemory:
    """Of one block.

    Attributes:
      words: (lanes, columns), 32 bits each.
      pending: What was issued and is not done.
    """

    def __init__(self, random: np.random.Generator):
        self.words = random.integers(0, 2**32, (LANES, COLUMNS), np.uint32)
        self.pending: list[Callable] = []


def tcgen05(machine: Any, warp: Any, instruction: Any, active: np.ndarray) -> None:
    """Runs one `tcgen05` instruction."""
    name, _, rest = instruction.opcode.removeprefix("tcgen05.").partition(".")
    operands, memory = instruction.operands, warp.block.tensor_memory
    if name == "alloc":  # the only one of a block
        address = machine.uniform(warp, operands[0], active)
        warp.block.write(address + np.arange(4), np.zeros(4, np.uint8))
    elif name == "ld":
        assert active.all()
        _load(machine, warp, instruction, memory)
    elif name == "cp":
        assert rest.endswith("128x128b") and active.sum() == 1
        target = machine.uniform(warp, operands[0].base, active)
        source = machine.uniform(warp, operands[1], active)
        memory.pending.append(lambda: _copy(warp.block, memory, target, source))
    elif name == "mma":
        assert rest.startswith("sp.cta_group::1.kind::f16") and active.sum() == 1
        d, *numbers = (
            machine.uniform(warp, getattr(x, "base", x), active) for x in operands[:5]
        )
        adds = bool(warp.registers[operands[5]][active][0])
        memory.pending.append(lambda: _product(machine, warp, memory, d, numbers, adds))
    elif name == "commit":
        assert "mbarrier::arrive::one" in rest and active.sum() == 1
        barrier = warp.block.barrier(machine.uniform(warp, operands[0], active))
        memory.pending.append(lambda: barrier.change(arrivals=1))
        machine.arriving.append(_done_up_to(memory, memory.pending[-1]))
    else:
        assert name in (
            *("dealloc", "relinquish_alloc_permit", "wait::ld"),
            *("fence::after_thread_sync", "fence::before_thread_sync"),
        ), instruction


def _done_up_to(memory: TensorMemory, last: Callable) -> Callable:
    def do():
        while last in memory.pending:
            memory.pending.pop(0)()

    return do


def _load(machine, warp, instruction, memory) -> None:
    """`tcgen05.ld`: a warp reaches the 32 lanes of its place in the warpgroup alone.

    Mosaic gives all four the same address, of lane 0 or 16.
    """
    targets, operand = instruction.operands
    address = machine.uniform(warp, operand, np.ones(32, bool))
    first, column = address >> 16, address & 0xFFFF
    assert first < 32
    first += 32 * (warp.number % 4)
    lane = np.arange(32)
    for i, target in enumerate(targets):
        if ".16x256b." in instruction.opcode:
            # As a fragment of C of mma: 16 lanes and 8 columns in four registers.
            lanes = first + lane // 4 + 8 * (i // 2 % 2)
            columns = column + 8 * (i // 4) + 2 * (lane % 4) + i % 2
        else:
            assert ".32x32b." in instruction.opcode
            lanes, columns = first + lane, np.full(32, column + i)
        machine.assign(warp, target, memory.words[lanes, columns], lane >= 0)


def _copy(block, memory, target: int, source: int) -> None:
    """`tcgen05.cp.128x128b`: 16 bytes a lane; every 8 lanes a stride apart."""
    start, stride = (source & 0x3FFF) << 4, (source >> 32 & 0x3FFF) << 4
    assert source >> 61 & 7 == 0, "no swizzle"
    lane = np.arange(LANES)
    addresses = start + lane // 8 * stride + lane % 8 * 16
    data = block.read(addresses[:, None] + np.arange(16)).view(np.uint32)
    memory.words[:, target & 0xFFFF : (target & 0xFFFF) + 4] = data


def _product(machine, warp, memory, d: int, numbers: list[int], adds: bool) -> None:
    """128 rows of `tcgen05.mma.sp`: D (+)= A24 (128, 32) · B (32, N)."""
    a, b, metadata, kind = numbers
    assert kind >> 2 & 1 and kind >> 4 & 3 == 1 and kind >> 24 & 31 == 8, hex(kind)
    dtype = {0: "f16", 1: "bf16"}[kind >> 7 & 7]
    assert kind >> 10 & 7 == kind >> 7 & 7 and not kind >> 13 & 7
    n, b_is_nk = (kind >> 17 & 63) * 8, not kind >> 16 & 1
    values = machine.matrix(warp.block, a, LANES, 16, True, dtype)
    dense_b = machine.matrix(warp.block, b, n, 32, b_is_nk, dtype)
    words = memory.words[:, (metadata & 0xFFFF) + (kind & 3)].astype(np.int64)
    row, group = np.arange(LANES)[:, None], np.arange(8)
    lane = row // 16 * 16 + group // 4 * 8 + row % 8
    nibbles = words[lane] >> 16 * (row // 8 % 2) + 4 * (group % 4) & 0xF
    dense_a = emulator.decompressed(values, nibbles)
    place = memory.words[:, d & 0xFFFF : (d & 0xFFFF) + n]
    product = (dense_a @ dense_b.T).astype(np.float32)
    if adds:
        product = product + place.view(np.float32)
    place[:] = product.view(np.uint32)

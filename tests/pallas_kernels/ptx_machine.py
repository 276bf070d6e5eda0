"""Runs the PTX of a kernel on the CPU: what the compiler made of it, for one launch.

Pallas' interpreter runs a kernel's body as we wrote it. This machine runs what Mosaic
and LLVM made of it: threads, registers, addresses, swizzles, descriptors, barriers.
Written from the PTX ISA 9.0; `emulator.py` has the sparse products.

What is asynchronous happens late: `wgmma` reads its operands, registers too, when a
warp waits for it; a copy is made when a thread waits for it or, by chance, at once.
`seed` decides which, and in what order warps run: a kernel that relies on luck gives
another result for some seed. Registers and shared memory begin with random bytes. These
raise: an access out of bounds or misaligned, a product or a TMA store of shared memory
that nobody wrote, such a store without a fence, a copy that nobody waited for, a
deadlock, an instruction not known.

ptxas, which gives physical registers and machine code, is not covered.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.pallas_kernels import emulator
from tests.pallas_kernels.host_program import Descriptor, Launch
from tests.pallas_kernels.ptx_arithmetic import DTYPES, ELEMENTWISE
from tests.pallas_kernels.ptx_memory import (
    CLUSTER_BITS,
    SHARED_BASE,
    Barrier,
    Block,
    Warp,
    box_in_memory,
    box_in_shared_memory,
    canonical_addresses,
    swizzle,
)
from tests.pallas_kernels.ptx_program import Address, parse
from tests.pallas_kernels.ptx_tensor_memory import tcgen05

LANES = np.arange(32)
BUFFER_BITS = 40  # a global address: the number of the buffer, plus one, and an offset
PARAMETER_BASE = 1 << 36


BLOCKED = "blocked"  # what an instruction returns that has to be tried again


class Machine:
    """Runs a launch of a kernel to its end.

    Attributes:
      buffers: Operands and results, as bytes.
      wavefronts: How often threads went to shared memory, for 128 bytes at most. None
        of it is for bank conflicts where it equals `least_wavefronts`.
      least_wavefronts: What the bytes need.
    """

    def __init__(self, ptx: str, launch: Launch, buffers: list[np.ndarray], seed: int):
        self.program, self.labels = parse(ptx)
        self.launch = launch
        self.buffers = buffers
        self.random = np.random.default_rng(seed)
        self.arriving: list[Callable] = []  # TMA to shared memory, under way
        self.wavefronts = self.least_wavefronts = 0
        names = re.findall(r"\.param [^,)]*?(\w+_param_\d+)", ptx)
        pairs = zip(names, launch.parameters, strict=True)
        self.pointers, self.tensors = {}, {}
        for name, parameter in pairs:
            if isinstance(parameter, tuple):
                self.tensors[name] = parameter
            else:
                self.pointers[name] = parameter
        self.blocks = [
            Block((x, y, z), launch, self.random)
            for z, y, x in itertools.product(*map(range, launch.grid[::-1]))
        ]
        size = launch.cluster[0]
        assert launch.cluster[1:] == (1, 1)
        for i in range(0, len(self.blocks), size):
            for block in self.blocks[i : i + size]:
                block.cluster = self.blocks[i : i + size]

    def run(self) -> None:
        """Runs all blocks; results are in `buffers`."""
        warps = [warp for block in self.blocks for warp in block.warps]
        with np.errstate(all="ignore"):
            while live := [warp for warp in warps if not warp.done]:
                self.random.shuffle(live)
                moved = sum(self._run_warp(warp) for warp in live)
                if self.arriving and (not moved or self.random.random() < 0.5):
                    self.arriving.pop(self.random.integers(len(self.arriving)))()
                else:
                    assert moved, "deadlock: " + self._where(live)
        assert not self.arriving, "a copy to shared memory that nobody waited for"

    def _where(self, warps: list[Warp]) -> str:
        """What each warp of these stands at, for an error."""
        return "; ".join(
            f"block {w.block.index} warp {w.number}: {self.program[w.at.min()]}"
            for w in sorted(warps, key=lambda w: (w.block.index, w.number))
        )

    def _run_warp(self, warp: Warp) -> int:
        """Runs a warp until it has to wait; whether that moved it.

        Of threads that have parted those run that are behind, until they have to wait.
        """
        moved = 0
        while not warp.done:
            if not self._step(warp, int(warp.at.min())):
                ahead = np.unique(warp.at)[1:]
                if not any(self._step(warp, int(at)) for at in ahead):
                    return moved
            moved += 1
        return moved

    def _step(self, warp: Warp, at: int) -> bool:
        """Runs the instruction for the threads that are there, or they have to wait."""
        here = active = warp.at == at
        instruction = self.program[at]
        if instruction.guard:
            active = here & (warp.registers[instruction.guard] ^ instruction.negated)
        name = instruction.name
        try:
            if name in ("bra", "ret"):
                getattr(self, "_" + name)(warp, instruction, active, here)
                return True
            if name in ELEMENTWISE:
                run = self._elementwise
            else:
                run = getattr(self, "_" + name)
            if run(warp, instruction, active) == BLOCKED:
                return False
        except (AssertionError, AttributeError, KeyError, IndexError) as error:
            error.add_note(
                f"at {instruction}, block {warp.block.index}, warp {warp.number}"
            )
            raise
        warp.at[here] += 1
        return True

    # Registers and addresses

    def value(self, warp: Warp, operand: Any, kind: str) -> np.ndarray:
        """An operand of each thread; of two elements a register where the kind says."""
        if kind.endswith("x2"):
            element = DTYPES[kind[:-2]]
            pairs = self.value(warp, operand, f"b{16 * element.itemsize}")
            return pairs.reshape(32, 1).view(element)
        dtype = DTYPES[kind]
        if isinstance(operand, str):
            found = warp.registers.get(operand)
            if found is None and re.fullmatch(r"%(r|rd|rs)\d+", operand):
                garbage = self.random.bytes(32 * dtype.itemsize)
                found = np.frombuffer(garbage, f"u{dtype.itemsize}")
                warp.registers[operand] = found
            if found is not None:
                assert found.itemsize == dtype.itemsize, (operand, kind)
                return found.view(dtype)
        if isinstance(operand, str):
            operand = self._special(warp, operand)
        if isinstance(operand, np.ndarray):
            return operand.astype(dtype)
        bits = operand & (1 << 8 * dtype.itemsize) - 1
        return np.full(32, bits, f"u{dtype.itemsize}").view(dtype)

    def _special(self, warp: Warp, name: str) -> Any:
        name = name.rsplit(":", 1)[-1]
        axis = {"x": 0, "y": 1, "z": 2}.get(name[-1], 0)
        block = warp.block
        if name in ("__dynamic_shmem__0", "global_smem"):  # of Mosaic, of Triton
            return SHARED_BASE
        if name in self.tensors:
            return PARAMETER_BASE
        return {
            "%tid": 32 * warp.number + LANES if axis == 0 else 0,
            "%ctaid": block.index[axis],
            "%nctaid": self.launch.grid[axis],
            "%cluster_ctaid": block.index[axis] % self.launch.cluster[axis],
            "%cluster_ctarank": block.rank,
            "%laneid": LANES,
        }[name.split(".")[0]]

    def assign(self, warp: Warp, name: str, value: Any, active: np.ndarray) -> None:
        """Sets a register of the active threads."""
        if name == "_":
            return
        unsigned = value if value.dtype == bool else value.view(f"u{value.itemsize}")
        old = warp.registers.get(name)
        if active.all() or old is None:
            warp.registers[name] = unsigned.copy()
        else:
            warp.registers[name] = np.where(active, unsigned, old)

    def addresses(self, warp: Warp, operand: Address) -> np.ndarray:
        """An address of each thread, 64 bits."""
        kind = "b64"
        if isinstance(operand.base, str) and operand.base in warp.registers:
            kind = f"b{8 * warp.registers[operand.base].itemsize}"
        base = self.value(warp, operand.base, kind).astype(np.int64)
        return base + operand.offset

    def uniform(self, warp: Warp, operand: Any, active: np.ndarray) -> int:
        """An operand that is the same in all active threads, signed."""
        if isinstance(operand, Address):
            values = self.addresses(warp, operand)
        elif isinstance(operand, str) and operand in warp.registers:
            found = warp.registers[operand]
            values = found.view(f"i{found.itemsize}")
        else:
            values = self.value(warp, operand, "s64")
        values = values[active]
        assert (values == values[0]).all(), f"{operand} differs"
        return int(values[0])

    # Data movement

    def _mov(self, warp, instruction, active):
        """Also puts two halves together, or takes a register apart."""
        target, source = instruction.operands
        half = {"b32": "b16", "b64": "b32"}.get(instruction.kind)
        if isinstance(source, list):
            low, high = (self.value(warp, x, half) for x in source)
            value = np.stack([low, high], -1).view(DTYPES[instruction.kind])[:, 0]
        elif instruction.kind == "pred" and isinstance(source, int):
            value = np.full(32, bool(source))
        else:
            value = self.value(warp, source, instruction.kind)
        if isinstance(target, list):
            halves = value.reshape(32, 1).view(DTYPES[half])
            for name, value in zip(target, halves.T, strict=True):
                self.assign(warp, name, np.ascontiguousarray(value), active)
        else:
            self.assign(warp, target, value, active)

    def _cvta(self, warp, instruction, active):
        self._mov(warp, instruction, active)

    def _memory(self, warp, instruction, operand, active):
        """Bytes of each thread's access, and its address: (threads, bytes) each."""
        addresses = self.addresses(warp, operand)[active]
        count = int((re.findall(r"\.v(\d)\b", instruction.opcode) or [1])[0])
        size = count * DTYPES[instruction.kind].itemsize
        assert not (addresses % size).any(), "misaligned address"
        return addresses[:, None] + np.arange(size), count

    def _count(self, addresses: np.ndarray) -> None:
        """Counts an access to shared memory: (threads, bytes) addresses."""
        at_a_time = max(1, 128 // addresses.shape[1])
        for i in range(0, len(addresses), at_a_time):
            words = np.unique(addresses[i : i + at_a_time] // 4)
            self.wavefronts += int(np.bincount(words % 32).max())
            self.least_wavefronts += 1

    def _buffer(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        number = int(addresses.flat[0]) >> BUFFER_BITS
        offsets = addresses - (number << BUFFER_BITS)
        assert number > 0, "a global access to an address that is none"
        buffer = self.buffers[number - 1]
        outside = (offsets < 0) | (offsets >= buffer.size)
        assert not outside.any(), f"buffer {number - 1}: {offsets[outside]} outside"
        return buffer, offsets

    def _ld(self, warp, instruction, active):
        targets, operand = instruction.operands
        if ".param" in instruction.opcode:
            buffer = self.pointers[operand.base] + 1
            value = np.full(32, buffer << BUFFER_BITS, np.uint64)
            return self.assign(warp, targets, value, active)
        if not active.any():
            return None
        addresses, count = self._memory(warp, instruction, operand, active)
        targets = targets if isinstance(targets, list) else [targets]
        if ".shared" in instruction.opcode:
            self._count(addresses)
            data = warp.block.load(addresses)
        else:
            buffer, offsets = self._buffer(addresses)
            data = buffer[offsets]
        columns = data.view(f"u{data.shape[1] // count}")
        for target, column in zip(targets, columns.T, strict=True):
            value = np.zeros(32, column.dtype)
            value[active] = column
            self.assign(warp, target, value, active)

    def _st(self, warp, instruction, active):
        operand, sources = instruction.operands
        if not active.any():
            return
        addresses, _ = self._memory(warp, instruction, operand, active)
        sources = sources if isinstance(sources, list) else [sources]
        values = [self.value(warp, x, instruction.kind)[active] for x in sources]
        data = np.stack(values, -1).view(np.uint8)
        if ".shared" in instruction.opcode:
            self._count(addresses)
            warp.block.write(addresses, data, warp.number)
        else:
            buffer, offsets = self._buffer(addresses)
            buffer[offsets] = data

    def _ldmatrix(self, warp, instruction, active):
        targets, operand = instruction.operands
        assert active.all()
        targets = targets if isinstance(targets, list) else [targets]
        rows = self.addresses(warp, operand)[: 8 * len(targets)]
        assert not (rows % 16).any(), "misaligned address"
        addresses = rows[:, None] + np.arange(16)
        self._count(addresses)
        data = warp.block.load(addresses).view(np.uint16)
        for target, matrix in zip(targets, data.reshape(-1, 8, 8), strict=True):
            matrix = matrix.T if ".trans" in instruction.opcode else matrix
            self.assign(warp, target, _fragment(matrix), active)

    def _stmatrix(self, warp, instruction, active):
        operand, sources = instruction.operands
        assert active.all()
        rows = self.addresses(warp, operand)
        assert not (rows % 16).any(), "misaligned address"
        for i, source in enumerate(sources):
            matrix = _matrix(self.value(warp, source, "b32"))
            matrix = matrix.T if ".trans" in instruction.opcode else matrix
            addresses = rows[8 * i : 8 * i + 8, None] + np.arange(16)
            self._count(addresses)
            data = np.ascontiguousarray(matrix).view(np.uint8)
            warp.block.write(addresses, data, warp.number)

    def _movmatrix(self, warp, instruction, active):
        target, source = instruction.operands
        matrix = _matrix(self.value(warp, source, "b32"))
        self.assign(warp, target, _fragment(matrix.T), active)

    def _shfl(self, warp, instruction, active):
        target, source, lane, clamp, members = instruction.operands
        target, *predicate = target if isinstance(target, list) else [target]
        assert active.all() and clamp == 31 and members == -1 and not predicate
        lane = self.value(warp, lane, "u32").astype(int)
        lane = lane & 31 if ".idx" in instruction.opcode else LANES ^ lane
        self.assign(warp, target, self.value(warp, source, "b32")[lane], active)

    def _elect(self, warp, instruction, active):
        (target, predicate), members = instruction.operands
        assert active.all() and members == -1
        self.assign(warp, target, np.zeros(32, np.uint32), active)
        self.assign(warp, predicate, LANES == 0, active)

    # Control

    def _bra(self, warp, instruction, active, here):
        (label,) = instruction.operands
        warp.at[here & ~active] += 1
        warp.at[active] = self.labels[label]

    def _ret(self, warp, instruction, active, here):
        assert active.all(), "threads of a warp end apart"
        assert not warp.copies[-1] and len(warp.copies) == 1
        for group in warp.stores:
            for store in group:
                store()
        warp.done = True

    def _bar(self, warp, instruction, active):
        assert active.all()
        number = self.uniform(warp, instruction.operands[0], active)
        count = self.launch.threads
        if len(instruction.operands) > 1:
            count = self.uniform(warp, instruction.operands[1], active)
        return _meet(warp, warp.block.waiting[number], count // 32)

    def _barrier(self, warp, instruction, active):
        if ".arrive" in instruction.opcode:
            return None
        warps = sum(len(block.warps) for block in warp.block.cluster)
        return _meet(warp, warp.block.cluster[0].waiting[-1], warps)

    def _fence(self, warp, instruction, active):
        if "proxy.async" in instruction.opcode:
            unfenced = warp.block.unfenced
            unfenced[unfenced == warp.number + 1] = 0

    def _nothing(self, warp, instruction, active):
        """An instruction without effect on values."""

    _setmaxnreg = _prefetch = _nothing

    def _mapa(self, warp, instruction, active):
        target, address, rank = instruction.operands
        rank = self.value(warp, rank, "u32") + 1
        address = self.value(warp, address, "u32")
        self.assign(warp, target, address | rank << CLUSTER_BITS, active)

    def _mbarrier(self, warp, instruction, active):
        opcode, operands = instruction.opcode, instruction.operands
        if not active.any():
            return None
        place = next(i for i, x in enumerate(operands) if isinstance(x, Address))
        addresses = self.addresses(warp, operands[place])
        if ".try_wait" in opcode:
            target, _, parity, *_ = operands
            assert ".parity" in opcode
            barrier = warp.block.barrier(self.uniform(warp, operands[1], active))
            parity = self.uniform(warp, parity, active)
            if barrier.phase % 2 == parity:
                return BLOCKED  # longer than it could on hardware, where it tries again
            self.assign(warp, target, np.full(32, True), active)
            return None
        if ".init" in opcode:
            count = self.uniform(warp, operands[1], active)
            address = self.uniform(warp, operands[0], active)
            warp.block.barriers[address] = Barrier(count, count)
            return None
        assert ".arrive" in opcode
        if ".noComplete" in opcode:
            (count,) = operands[place + 1 :]
            for address, many in zip(
                addresses[active], self.value(warp, count, "u32")[active], strict=True
            ):
                barrier = warp.block.barrier(int(address))
                assert barrier.pending > many, "an arrival that completes a phase"
                barrier.change(arrivals=int(many))
            return None
        expected = np.zeros(32, np.uint32)
        if ".expect_tx" in opcode:
            expected = self.value(warp, operands[place + 1], "u32")
        for address, count in zip(addresses[active], expected[active], strict=True):
            barrier = warp.block.barrier(int(address))
            barrier.change(arrivals=1, expected=int(count))

    # Copies

    def _cp(self, warp, instruction, active):
        opcode, operands = instruction.opcode, instruction.operands
        bulk = ".bulk" in opcode
        groups = warp.stores if bulk else warp.copies
        if ".commit_group" in opcode:
            groups.append([])
        elif ".wait_group" in opcode:
            assert not groups[-1], "copies that were not committed"
            while len(groups) > operands[0] + 1:
                for copy in groups.pop(0):
                    copy()
        elif not active.any():
            return
        elif ".global.shared::cta" in opcode:
            groups[-1].append(self._postponed(self._tma_store(warp, operands, active)))
        elif bulk:
            self._tma_load(warp, opcode, operands, active)
        else:
            groups[-1].append(self._postponed(self._async(warp, operands, active)))

    def _postponed(self, copy: Callable) -> Callable:
        """The copy, made now or when it is called."""
        if self.random.random() < 0.5:
            return copy
        copy()
        return lambda: None

    def _async(self, warp, operands, active) -> Callable:
        """`cp.async`, some bytes a thread."""
        target, source, size, *rest = operands
        targets = self.addresses(warp, target)[active]
        sources = self.addresses(warp, source)[active]
        assert not (targets % size).any() and not (sources % size).any(), "misaligned"
        assert not rest, "cp.async of fewer bytes than it writes"
        self._count(targets[:, None] + np.arange(size))

        def copy():
            buffer, offsets = self._buffer(sources[:, None] + np.arange(size))
            warp.block.write(targets[:, None] + np.arange(size), buffer[offsets])

        return copy

    def _tensor(self, warp, operand, active) -> tuple[Descriptor, list[int]]:
        """A descriptor, and where its box begins, outermost axis first."""
        address = self.uniform(warp, Address(operand.base), active)
        number, rest = divmod(address - PARAMETER_BASE, 128)
        assert rest == 0
        origin = [self.uniform(warp, x, active) for x in operand.coordinates]
        (descriptors,) = self.tensors.values()
        return descriptors[number], origin[::-1]

    def _tma_load(self, warp, opcode, operands, active):
        assert active.sum() == 1, "one thread copies by TMA"
        target, tensor, barrier, *mask = operands
        descriptor, origin = self._tensor(warp, tensor, active)
        target = self.uniform(warp, target, active)
        targets = box_in_shared_memory(descriptor, target)
        barrier = self.uniform(warp, barrier, active)
        blocks = [warp.block]
        if ".multicast" in opcode:
            mask = self.uniform(warp, mask[0], active)
            blocks = [x for x in warp.block.cluster if mask >> x.rank & 1]
        buffer = self.buffers[descriptor.buffer]
        offsets, inside = box_in_memory(descriptor, origin)
        data = np.zeros(offsets.size, np.uint8)
        data[inside] = buffer[offsets[inside]]

        def write(block):
            assert not all(warp.done for warp in block.warps), (
                "a copy to an ended block"
            )
            block.write(targets, data)

        def arrive(block):
            block.barriers[barrier].change(arrived=data.size)

        for block in blocks:
            if self.random.random() < 0.5:
                write(block)
                self.arriving.append(lambda block=block: arrive(block))
            else:
                self.arriving.append(lambda block=block: (write(block), arrive(block)))

    def _tma_store(self, warp, operands, active) -> Callable:
        assert active.sum() == 1, "one thread copies by TMA"
        tensor, source = operands
        descriptor, origin = self._tensor(warp, tensor, active)
        source = self.uniform(warp, source, active)
        sources = box_in_shared_memory(descriptor, source)
        offsets, inside = box_in_memory(descriptor, origin)
        block = warp.block
        assert not block.unfenced[block.offsets(sources)].any(), (
            "TMA reads shared memory for which a warp made no fence"
        )

        def copy():
            data = block.read(sources)
            self.buffers[descriptor.buffer][offsets[inside]] = data[inside]

        return copy

    # Products

    def _mma(self, warp, instruction, active):
        d, a, b, c, metadata, selector = instruction.operands
        assert active.all() and ".sp" in instruction.opcode
        kind = instruction.opcode.split(".")[-2]
        out = emulator.mma_sp(
            self._packed(warp, a, kind),
            self._packed(warp, b, kind),
            self._floats(warp, c),
            self.value(warp, metadata, "b32"),
            selector,
        )
        for name, column in zip(d, out.T, strict=True):
            self.assign(warp, name, column.astype(np.float32), active)

    def _packed(self, warp, operands, kind) -> np.ndarray:
        """16-bit elements, two a register: (32, elements)."""
        words = np.stack([self.value(warp, x, "b32") for x in operands], -1)
        return words.view(DTYPES[kind]).astype(np.float32)

    def _floats(self, warp, operands) -> np.ndarray:
        return np.stack([self.value(warp, x, "f32") for x in operands], -1)

    def _wgmma(self, warp, instruction, active):
        assert active.all()
        groups = warp.block.products[warp.number]
        if ".fence" in instruction.opcode:
            return None
        if ".commit_group" in instruction.opcode:
            groups.append([])
            return None
        if ".wait_group" in instruction.opcode:
            return self._wait_for_products(warp, instruction.operands[0])
        assert ".mma_async.sp" in instruction.opcode
        if not groups:
            groups.append([])
        groups[-1].append(instruction)
        return None

    def _wait_for_products(self, warp, left: int):
        """The first warp that waits makes the products of its whole warpgroup."""
        first = 4 * warp.warpgroup
        warps = warp.block.warps[first : first + 4]
        groups = [warp.block.products[x.number] for x in warps]
        committed = len(warp.block.products[warp.number]) - 1
        if committed <= left:
            return None  # another warp made them
        if any(len(x) - 1 < committed for x in groups):
            return BLOCKED  # some warp has not issued its part
        for other, pending in zip(warps, groups, strict=True):
            for _ in range(committed - left):
                for instruction in pending.pop(0):
                    self._product(other, instruction)
        return None

    def _product(self, warp, instruction):
        """A warp's 16 rows of `wgmma.mma_async.sp`."""
        d, a, b, metadata, selector, accumulate, *flags = instruction.operands
        *shape_and_types, _, kind = instruction.opcode.split(".")
        n = int(re.findall(r"n(\d+)k32", instruction.opcode)[0])
        assert warp.registers[accumulate].all() and flags[:2] == [1, 1]
        assert "f32" in shape_and_types
        *a_flag, b_flag = flags[2:]
        everyone = np.ones(32, bool)
        start = self.uniform(warp, b, everyone) & (1 << 64) - 1
        b = self.matrix(warp.block, start, n, 32, not b_flag, kind).T
        if isinstance(a, list):
            a = self._packed(warp, a, kind)
        else:
            start = self.uniform(warp, a, everyone) & (1 << 64) - 1
            a = self.matrix(warp.block, start, 64, 16, not a_flag[0], kind)
            rows = slice(16 * (warp.number % 4), 16 * (warp.number % 4) + 16)
            a = a[rows][emulator.a_positions()]
        words = self.value(warp, metadata, "b32")
        product = emulator.expand(a, words, selector) @ b
        rows, columns = emulator.c_positions()
        c = self._floats(warp, d).reshape(32, n // 8, 4)
        c = c + product.reshape(16, n // 8, 8)[rows, :, columns].transpose(0, 2, 1)
        c = c.reshape(32, n // 2).astype(np.float32)
        for name, column in zip(d, c.T, strict=True):
            self.assign(warp, name, column, everyone)

    def matrix(self, block, descriptor, rows, columns, k_major, kind) -> np.ndarray:
        """(rows, columns along k) of the matrix that a descriptor names.

        PTX ISA, "Asynchronous warpgroup level matrix shared memory layout": the fields
        of the descriptor, and `canonical_addresses`.
        """
        start, leading, stride = (
            (descriptor >> place & 0x3FFF) << 4 for place in (0, 16, 32)
        )
        width = {2: 128, 4: 64, 6: 32}[descriptor >> 61 & 7]
        addresses = canonical_addresses(
            rows, columns, leading, stride, width, k_major=k_major
        )
        addresses = swizzle(start + addresses, width)
        data = block.read(addresses[..., None] + np.arange(2))
        return data.view(DTYPES[kind])[..., 0].astype(np.float32)

    def _tcgen05(self, warp, instruction, active):
        tcgen05(self, warp, instruction, active)

    # Arithmetic

    def _elementwise(self, warp, instruction, active):
        target, *operands = instruction.operands
        name, *modifiers, kind = instruction.opcode.split(".")
        result = ELEMENTWISE[name](self, warp, modifiers, kind, operands)
        if isinstance(target, list):  # predicates, one for each element of a pair
            for one, column in zip(target, result.T, strict=True):
                self.assign(warp, one, column, active)
        else:
            if result.ndim == 2:
                result = result.view(f"u{2 * result.itemsize}")[:, 0]
            self.assign(warp, target, result, active)


def run_kernel(
    ptx: str,
    launch: Launch,
    operands: Sequence[np.ndarray],
    out: Sequence[Any],
    seed: int,
) -> tuple[Machine, list[np.ndarray]]:
    """Runs a kernel on arrays.

    Args:
      ptx: The kernel.
      launch: How it is started; buffers are the operands, then the results.
      operands: As they lie on a GPU.
      out: Shape and dtype of each result.
      seed: As the module says.

    Returns:
      The machine that ran, and the results.
    """
    results = [np.zeros(x.shape, x.dtype) for x in out]
    buffers = [*(x.copy() for x in operands), *results]
    machine = Machine(ptx, launch, [x.view(np.uint8).ravel() for x in buffers], seed)
    machine.run()
    return machine, results


def _meet(warp: Warp, counter: list[int], warps: int) -> str | None:
    """`counter`: how often a barrier has opened, and how many warps wait at it."""
    if warp.blocked_on is None:
        warp.blocked_on = (counter, counter[0])
        counter[1] += 1
        assert counter[1] <= warps, "more warps at a barrier than it counts"
        if counter[1] == warps:
            counter[:] = [counter[0] + 1, 0]
    _, opened = warp.blocked_on
    if counter[0] == opened:
        return BLOCKED
    warp.blocked_on = None
    return None


def _fragment(matrix: np.ndarray) -> np.ndarray:
    """8×8 elements of 16 bits as a register of each thread."""
    return np.ascontiguousarray(matrix).view(np.uint32).ravel()


def _matrix(register: np.ndarray) -> np.ndarray:
    """The inverse of `_fragment`."""
    return register.view(np.uint16).reshape(8, 8)

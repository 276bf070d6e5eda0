"""What Mosaic's host code gives a kernel, read from the LLVM that it is made of.

The host function has no branch: it loads the addresses of the operands and results,
has TMA descriptors made, stores the kernel's parameters, and launches. It is run here
line by line with addresses that are names.
"""

import dataclasses
import re
from typing import Any

_SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "bfloat": 2, "half": 2}
# Bits of an element by the number that Mosaic gives its type (_tma_dma_type).
_BITS = {8: 2, 1: 8, 2: 16, 3: 32, 4: 64, 5: 16, 6: 32, 7: 16}


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor (CUDA driver API, cuTensorMapEncodeTiled), outermost axis first.

    Attributes:
      buffer: Of which of the kernel's operands and results.
      shape: Of the tensor, in elements.
      strides: In elements.
      box: What one copy moves, in elements.
      swizzle: Bytes: 32, 64, 128, or 16 for none.
      bits: Of an element.
    """

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    bits: int

    def __post_init__(self):
        assert 1 <= len(self.shape) <= 5 and self.strides[-1] == 1
        assert not any(s * self.bits % 128 for s in self.strides[:-1]), self
        assert all(1 <= size <= 256 for size in self.box), self
        row = self.box[-1] * self.bits
        assert row % 128 == 0 and (self.swizzle == 16 or row <= 8 * self.swizzle), self


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a kernel is started with.

    Attributes:
      grid: Blocks along x, y, z.
      cluster: Blocks of a cluster along x, y, z.
      threads: Of a block.
      shared_memory: Bytes of a block.
      parameters: In order: the number of an operand or result whose address it is, or
        descriptors, 128 bytes each.
    """

    grid: tuple[int, ...]
    cluster: tuple[int, ...]
    threads: int
    shared_memory: int
    parameters: tuple[int | tuple[Descriptor, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Address:
    """Bytes from the beginning of something: ("buffer", i), or an allocation."""

    of: Any
    offset: int = 0

    def __add__(self, offset: int) -> "_Address":
        return _Address(self.of, self.offset + offset)


def read_launch(llvm: str) -> Launch:
    """Runs the host function of one kernel up to its launch."""
    arguments, body = re.findall(
        r"^define \w+ @(?!_mlir_ciface)\w+\((.*?)\).*?\{\n(.*?)^\}", llvm, re.M | re.S
    )[0]
    # The last argument is the array of the operands' and results' addresses.
    return _Host(arguments.split()[-1]).run(body)


class _Host:
    def __init__(self, buffers: str):
        self.values: dict[str, Any] = {buffers: _Address("buffers")}
        self.memory: dict[_Address, Any] = {}
        self.descriptors: dict[_Address, Descriptor] = {}

    def run(self, body: str) -> Launch:
        for line in body.splitlines():
            name, _, operation = line.strip().rpartition(" = ")
            opcode, _, rest = operation.removeprefix("tail ").partition(" ")
            if "@mosaic_gpu_launch_kernel" in rest:
                return self.launch(self.arguments(rest), parameters=-1)
            if "@mosaic_gpu_build_kernel_spec" in rest:  # since jax 0.12
                return self.launch(self.arguments(rest), parameters=-2)
            result = getattr(self, opcode)(name, rest)
            if name:
                self.values[name] = result
        raise ValueError("the host function launches nothing")

    def value(self, text: str) -> Any:
        """Of `type %name` or `type 5`."""
        word = text.split()[-1]
        return int(word) if re.fullmatch(r"-?\d+", word) else self.values.get(word)

    def arguments(self, call: str) -> list[Any]:
        return [self.value(x) for x in re.findall(r"\((.*)\)", call)[0].split(", ")]

    def load(self, name: str, rest: str) -> Any:
        address = self.value(rest.split(", ")[1])
        if address.of == "buffers":
            return _Address(("buffer", address.offset // 8))
        if rest.startswith("["):
            return self.all_descriptors(address)
        return self.memory[address]

    def store(self, name: str, rest: str) -> None:
        what, where, *_ = rest.split(", ")
        self.memory[self.value(where)] = self.value(what)

    def alloca(self, name: str, rest: str) -> _Address:
        return _Address(name)

    def getelementptr(self, name: str, rest: str) -> _Address:
        if rest.startswith("{"):  # the entries of a structure count as 8 bytes
            base, first, index = rest.rsplit(", ", 3)[1:]
            assert self.value(first) == 0
            return self.value(base) + 8 * self.value(index)
        rest = rest.removeprefix("inbounds ").removeprefix("nuw ")
        element, base, index = rest.split(", ")
        return self.value(base) + _SIZES[element] * self.value(index)

    def insertvalue(self, name: str, rest: str) -> dict:
        _, aggregate, what, path = re.findall(
            r"^(\{.*?\}) (\S+), (\w+ \S+), ([\d, ]+)$", rest
        )[0]
        return {**(self.values.get(aggregate) or {}), path: self.value(what)}

    def extractvalue(self, name: str, rest: str) -> Any:
        aggregate, path = re.findall(r"^\{.*?\} (\S+), ([\d, ]+)$", rest)[0]
        return self.values[aggregate][path]

    def ptrtoint(self, name: str, rest: str) -> Any:
        return self.value(rest.split(" to ")[0])

    inttoptr = ptrtoint

    def add(self, name: str, rest: str) -> Any:
        first, second = rest.split(", ")
        return self.value(first) + self.value(second)

    def mul(self, name: str, rest: str) -> Any:
        first, second = rest.split(", ")
        return self.value(first) * self.value(second)

    def call(self, name: str, rest: str) -> None:
        assert "@mosaic_gpu_init_tma_desc" in rest, rest
        place, base, dtype, rank, shape, strides, swizzle, box = self.arguments(rest)
        shape, strides, box = (
            tuple(self.memory[array + 8 * i] for i in range(rank))
            for array in (shape, strides, box)
        )
        kind, buffer = base.of
        assert kind == "buffer" and base.offset == 0
        self.descriptors[place] = Descriptor(
            buffer, shape, strides, box, swizzle, _BITS[dtype]
        )

    def launch(self, arguments: list[Any], *, parameters: int) -> Launch:
        """`parameters` is the place in the call of the array of their addresses."""
        grid, cluster, block = (tuple(arguments[i : i + 3]) for i in (1, 4, 7))
        assert block[1:] == (1, 1)
        array = arguments[parameters]
        count = sum(place.of == array.of for place in self.memory)
        places = [self.memory[array + 8 * i] for i in range(count)]
        return Launch(
            grid,
            tuple(max(1, size) for size in cluster),
            threads=block[0],
            shared_memory=arguments[10],
            parameters=tuple(self.parameter(place) for place in places),
        )

    def parameter(self, place: _Address) -> int | tuple[Descriptor, ...]:
        """What lies where a parameter's address says."""
        what = self.memory.get(place) or self.all_descriptors(place)
        return what.of[1] if isinstance(what, _Address) else what

    def all_descriptors(self, first: _Address) -> tuple[Descriptor, ...]:
        places = [place for place in self.descriptors if place.of == first.of]
        assert places == [first + 128 * i for i in range(len(places))]
        return tuple(self.descriptors[place] for place in places)

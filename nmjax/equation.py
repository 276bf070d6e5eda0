"""An einsum equation of activations and a kernel, and the GEMM that it is."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Equation:
    """`x,kernel->result`, a letter for each axis.

    Attributes:
      x: Letters of the activations; alone with the result it may have an ellipsis.
      kernel: Letters of the kernel.
      result: Letters of the result.
    """

    x: str
    kernel: str
    result: str

    @classmethod
    def read(cls, text: str) -> "Equation":
        """Reads an explicit equation of two operands, such as "...d,df->...f"."""
        operands, result = text.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        return cls(x, kernel, result)

    def for_ndim(self, ndim: int) -> "Equation":
        """The equation for activations of `ndim` axes, with letters for an ellipsis."""
        if "." not in self.x:
            return self
        used = self.x + self.kernel + self.result
        unused = (c for c in map(chr, range(0x100, 0x200)) if c not in used)
        letters = "".join(itertools.islice(unused, ndim - len(self.x) + 3))
        x, result = (side.replace("...", letters) for side in (self.x, self.result))
        return Equation(x, self.kernel, result)

    def is_gemm(self) -> bool:
        """Whether each letter is once in two of x, kernel and result, or in all three.

        An ellipsis counts as a letter, which the kernel must not have.
        """
        sides = [s.replace("...", ".") for s in (self.x, self.kernel, self.result)]
        counts = [sum(c in side for side in sides) for c in {*"".join(sides)}]
        twice = any(len(side) != len({*side}) for side in sides)
        return "." not in self.kernel and not twice and 1 not in counts

    @property
    def batch(self) -> str:
        """Letters of all three: a product for each of their values."""
        return "".join(c for c in self.x if c in self.kernel and c in self.result)

    @property
    def contracted(self) -> str:
        """Letters of the kernel that are summed over, in its order."""
        return "".join(c for c in dict.fromkeys(self.kernel) if c not in self.result)

    @property
    def rows(self) -> str:
        """Letters that the kernel has not."""
        return "".join(c for c in self.x if c not in self.kernel)

    @property
    def columns(self) -> str:
        """Letters of the kernel that the activations have not, in its order."""
        return "".join(c for c in self.kernel if c in self.result and c not in self.x)

    def axes(self, letters: str) -> tuple[int, ...]:
        """Where letters stand in the kernel, counted from the front."""
        return tuple(map(self.kernel.index, letters))

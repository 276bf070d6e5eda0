"""The N:M pattern: `n` weights kept of every `m` consecutive ones.

`NMPattern` is the form in which every part of nmjax passes a pattern on. Public
functions accept what its constructor accepts and call it once, at the boundary.
"""

import dataclasses
import operator
import re
from typing import SupportsIndex


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class NMPattern:
    """Keep `n` of every `m` consecutive weights along one axis, `0 < n <= m`.

    `NMPattern("2:4")`, `NMPattern(2, 4)` and `NMPattern(NMPattern("2:4"))` are
    equal. A pattern is frozen and hashable, so it can be a static argument of
    `jax.jit`, where equal patterns share one trace. `n == m` is the dense pattern.

    Attributes:
      n: How many weights of each group are kept.
      m: How many consecutive weights form a group.
    """

    n: int
    m: int

    def __init__(
        self, n: "str | NMPattern | SupportsIndex", m: SupportsIndex | None = None
    ):
        """Reads a pattern.

        Args:
          n: The pattern as a string such as `"2:4"` or as an `NMPattern`, or, with
            `m`, the number of weights kept of each group.
          m: The size of a group; only with an integer `n`.

        Raises:
          ValueError: If this is no pattern: a string of another form, a value that
            is not an integer (`bool` is refused too), or not `0 < n <= m`.
        """
        if m is None:
            given, pair = repr(n), _parse(n)
        else:
            given, pair = f"{n!r}, {m!r}", (_integer(n), _integer(m))
        kept, size = pair
        if kept is None or size is None or not 0 < kept <= size:
            raise ValueError(
                f"not an N:M pattern: {given}. Expected two integers with 0 < n <= m,"
                ' for example "2:4", which keeps 2 of every 4 weights'
            )
        object.__setattr__(self, "n", kept)
        object.__setattr__(self, "m", size)

    @property
    def density(self) -> float:
        """The fraction of weights that is kept, `n / m`."""
        return self.n / self.m

    def __str__(self) -> str:
        """The pattern as text, such as `2:4`; `NMPattern(str(p)) == p`."""
        return f"{self.n}:{self.m}"

    def __repr__(self) -> str:
        """The pattern as an expression that makes it again."""
        return f'NMPattern("{self}")'


def _parse(value: object) -> tuple[int | None, int | None]:
    """The (n, m) of a pattern or a string; `None`s if it has another form."""
    if isinstance(value, NMPattern):
        return value.n, value.m
    # At most nine digits: int() refuses thousands of them with a message of its own.
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", value):
        n, m = value.split(":")
        return int(n), int(m)
    return None, None


def _integer(value: object) -> int | None:
    """The value as a Python int, or `None` if it is not an integer."""
    if isinstance(value, bool):  # an int to Python; True:4 is a mistake
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None

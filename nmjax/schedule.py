"""When a recipe acts: dense start, sparse phase, frozen masks, dense finish.

A `Schedule` is plain data in a recipe and speaks in fractions of the run, so that one
value serves runs of any length:

    0 · dense · dense_until · sparse · freeze_from · frozen · dense_from · dense · 1

`nmjax.rules.phases` cuts a run at the borders of all its recipes. Inside a phase every
recipe is a constant, hence static: a training step compiles once for each phase and
never because a step number moved.
"""

import dataclasses
import math
from typing import Any

from nmjax.pattern import NMPattern


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The phases of one recipe, as fractions of the run from 0 to 1.

    Attributes:
      dense_until: The layer is dense before this (warm-up).
      freeze_from: From here on masks stay as they are.
      dense_from: From here on the layer is dense again: 2by4 (arXiv:2404.01847)
        trains its last sixth so, torchao its last 30 %.
      patterns: Gradual N: `((0.2, "3:4"), (0.4, "2:4"))` takes the pattern 3:4 from
        0.2 and 2:4 from 0.4 on, and the recipe's own before.
    """

    dense_until: float = 0.0
    freeze_from: float = 1.0
    dense_from: float = 1.0
    patterns: tuple[tuple[float, NMPattern], ...] = ()

    def __post_init__(self):
        """Refuses borders out of order.

        Raises:
          ValueError: A fraction is outside [0, 1], or phases overlap.
        """
        pairs = tuple((at, NMPattern(pattern)) for at, pattern in self.patterns)
        object.__setattr__(self, "patterns", pairs)
        borders = [self.dense_until, *(at for at, _ in pairs)]
        borders += [self.freeze_from, self.dense_from]
        for border in borders:
            number = isinstance(border, int | float) and not isinstance(border, bool)
            if not (number and math.isfinite(border) and 0 <= border <= 1):
                raise ValueError(
                    f"a schedule speaks in fractions of the run from 0 to 1, got "
                    f"{border!r}; for a step s of T write s / T"
                )
        if self.dense_until >= self.dense_from:
            raise ValueError(
                f"dense_until={self.dense_until} and dense_from={self.dense_from} "
                "leave no sparse phase"
            )
        freeze = self.freeze_from
        if min(freeze, self.dense_from) < max(borders[:-2]):
            raise ValueError(
                f"freeze_from={freeze} and dense_from={self.dense_from} must come "
                f"after dense_until and the last change of pattern, at "
                f"{max(borders[:-2])}"
            )
        times = [at for at, _ in pairs]
        if times != sorted(set(times)) or (times and times[0] <= self.dense_until):
            raise ValueError(
                f"patterns must change at increasing fractions above dense_until="
                f"{self.dense_until}, got {times}"
            )

    @property
    def borders(self) -> tuple[float, ...]:
        """Every fraction at which something changes, in order, 0 included."""
        times = {0.0, self.dense_until, self.freeze_from, self.dense_from}
        return tuple(sorted(t for t in times | {t for t, _ in self.patterns} if t < 1))

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON data; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields["patterns"] = [[at, str(pattern)] for at, pattern in self.patterns]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Schedule":
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: A field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            raise ValueError(f"not a schedule: {fields!r}, expected fields {known}")
        pairs = tuple((at, NMPattern(text)) for at, text in fields["patterns"])
        return cls(**{**fields, "patterns": pairs})

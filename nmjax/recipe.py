"""A recipe: what is sparse, how its mask is chosen, what dropped weights receive.

A layer is trained by three GEMMs,

    fprop  y = x · W        dgrad  dx = dy · Wᵀ        wgrad  dW = xᵀ · dy

and a recipe answers three questions about them: which operand of each GEMM is N:M
along the axis that the GEMM contracts, how the mask is chosen and when, and what
gradient the dropped weights receive. Every published method is a value of `Recipe`,
made by a function of `nmjax.recipes`; nothing else in the code knows a method's name.

A recipe is frozen, compared by value and hashable, so it may be static under `jit`.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from nmjax.masks import TileAlgorithm
from nmjax.masks.learned import Temperature
from nmjax.pattern import NMPattern
from nmjax.schedule import Schedule

Fprop = Literal["weight", "activation"]
Dgrad = Literal["weight", "weight-own-mask", "weight-masked-twice"]
Wgrad = Literal["activation", "activation-fixed", "gradient"]
Mask = Literal["magnitude", "transposable", "tile", "soft-threshold", "learned"]
Gradient = Literal["straight-through", "masked", "none"]
DecayIn = Literal["op", "optimizer"]

_WORDS: dict[str, tuple[str | None, ...]] = {
    "fprop": (None, *get_args(Fprop)),
    "dgrad": (None, *get_args(Dgrad)),
    "wgrad": (None, *get_args(Wgrad)),
    "mask": (None, *get_args(Mask)),
    "gradient": get_args(Gradient),
    "decay_in": get_args(DecayIn),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight is trained.

    Attributes:
      name: The method, for tables and messages; no code branches on it.
      pattern: n kept of every m; None for a dense layer.
      fprop: The operand of `y = x · W` that is N:M along the contracted axis:
        "weight"; or "activation": x by 4×4 tiles of the (tokens, features) matrix,
        whose gradient passes straight through.
      dgrad: The operand of `dx = dy · Wᵀ`: "weight" = fprop's masked weight, whose mask
        is N:M along the output axis too; "weight-own-mask" = W masked by magnitude
        along the output axis, `dx = dy · (E' ⊙ W)ᵀ`; "weight-masked-twice" = fprop's
        masked weight masked again so, `dx = dy · (E' ⊙ E ⊙ W)ᵀ`. None = no N:M operand
        (fprop's weight is still read: a mask along fprop's axis alone cannot speed
        dgrad up).
      wgrad: The operand of `dW = xᵀ · dy`: "activation" = fprop's masked x;
        "activation-fixed" = x at fixed tokens, and each token left out gives its dy to
        the kept one before it; "gradient" = dy, sampled to N:M along the tokens with
        minimum variance (needs a key). None = no N:M operand.
      mask: How the mask of W is chosen: by "magnitude"; "transposable", N:M along both
        axes with the largest magnitude; by "tile", greedily on 4×4 tiles;
        "soft-threshold", by magnitude, and kept weights shrink by the largest dropped
        magnitude; "learned", by logits. None = W is dense.
      tile: The algorithm of `nmjax.masks.tile_mask`, where a mask comes from tiles.
      refresh: Optimizer steps between two choices of the mask of W: 1 = from the weight
        wherever it is used, nothing stored; k > 1 = by `nmjax.refresh` at every k-th
        step, stored in between; None = once, by `nmjax.init_state`, and kept.
      reorder: Optimizer steps between two searches for the order of outputs in which
        groups of "weight-masked-twice" run: the one in which E' drops least, kept in
        the state; a multiple of `refresh`. None = as the weight is stored.
      gradient: "straight-through" = dropped weights receive the gradient of the masked
        weight; "masked" = they receive none; "none" = no weight receives any.
      multipliers: Factors (kept, dropped) on a straight-through gradient.
      decay: λ of SR-STE, added to the gradient as λ(1 − E)W; 0 = none.
      decay_in: Who adds it: "op" = the backward pass, once for each use of the
        weight; "optimizer" = `nmjax.add_decay`, once for each optimizer step.
      temperature: τ of learned masks by step, or None.
      schedule: When the recipe acts; read by `nmjax.rules.phases` and the trainer. A
        layer follows the recipe that it is given, as in the sparse phase.
    """

    name: str
    pattern: NMPattern | None = None
    fprop: Fprop | None = None
    dgrad: Dgrad | None = None
    wgrad: Wgrad | None = None
    mask: Mask | None = None
    tile: str | None = None
    refresh: int | None = 1
    reorder: int | None = None
    gradient: Gradient = "straight-through"
    multipliers: tuple[float, float] = (1.0, 1.0)
    decay: float = 0.0
    decay_in: DecayIn = "op"
    temperature: Temperature | None = None
    schedule: Schedule = Schedule()

    def __post_init__(self):
        """Refuses values that no method has."""
        for name in ("refresh", "reorder"):
            steps = getattr(self, name)
            if steps is not None and (type(steps) is not int or steps < 1):
                raise ValueError(
                    f"{name} must be a number of steps from 1 up, or None, got "
                    f"{steps!r}"
                )
        _require_number("decay", self.decay)
        for field, words in _WORDS.items():
            if getattr(self, field) not in words:
                raise ValueError(
                    f"{field} must be one of {words}, got {getattr(self, field)!r}"
                )
        factors = self.multipliers
        if not isinstance(factors, tuple) or len(factors) != 2:
            raise ValueError(f"multipliers must be (kept, dropped), got {factors!r}")
        for factor in factors:
            _require_number("multipliers", factor)
        if contradiction := self._contradiction():
            raise ValueError(contradiction)

    def _contradiction(self) -> str:
        """What two fields say that cannot both be, or ""."""
        operands = f"fprop={self.fprop}, dgrad={self.dgrad}, wgrad={self.wgrad}"
        if self.sparse != any((self.fprop, self.dgrad, self.wgrad)):
            return (
                f"pattern={self.pattern} and the operands {operands} contradict each "
                "other"
            )
        if (self.mask is not None) != (self.fprop == "weight"):
            return f"mask={self.mask} and the operands {operands} contradict each other"
        if self.dgrad == "weight" and self.mask not in ("transposable", "tile"):
            return (
                f'dgrad="weight" needs a mask that is N:M along both axes, '
                f'"transposable" or "tile", got mask={self.mask!r}'
            )
        if self.masks_dgrad and self.mask != "magnitude":
            return (
                f"dgrad={self.dgrad!r} masks by magnitude along the output axis, and "
                f'goes with mask="magnitude", got mask={self.mask!r}'
            )
        if self.reorder and self.dgrad != "weight-masked-twice":
            return (
                f'reorder={self.reorder} goes with dgrad="weight-masked-twice", got '
                f"dgrad={self.dgrad!r}"
            )
        if self.reorder and self.refresh and self.reorder % self.refresh:
            return (
                f"reorder={self.reorder} is not a multiple of refresh={self.refresh}: "
                "masks are chosen anew where the order changes"
            )
        if (self.wgrad in ("activation", "activation-fixed")) and (
            (self.wgrad == "activation") != (self.fprop == "activation")
        ):
            return (
                f"wgrad={self.wgrad!r} and fprop={self.fprop!r} contradict each other"
            )
        tiled = self.mask == "tile" or self.fprop == "activation"
        if tiled != (self.tile is not None):
            return f"tile={self.tile!r} and mask={self.mask!r}, {operands} contradict"
        if tiled and self.tile not in get_args(TileAlgorithm):
            return f"tile must be one of {get_args(TileAlgorithm)}, got {self.tile!r}"
        if not transposes(self.tile) and "weight" == self.dgrad:
            return f'tile={self.tile!r} is 2:4 along one axis, dgrad="weight" needs two'
        if not transposes(self.tile) and self.wgrad == "activation":
            return f'tile={self.tile!r} is 2:4 along one axis, wgrad="activation" two'
        if tiled and self.pattern != NMPattern(2, 4):
            return f"4×4 tiles hold 2:4 masks, got pattern {self.pattern}"
        if (self.mask == "learned") != (self.temperature is not None):
            return f"mask={self.mask!r} and temperature={self.temperature} contradict"
        if self.mask in ("learned", "soft-threshold") and self.refresh != 1:
            return f"mask={self.mask!r} is chosen at each use: refresh={self.refresh}"
        if self.gradient == "none" and self.mask != "learned":
            return f'gradient="none" goes with mask="learned", got {self.mask!r}'
        plain = self.gradient == "straight-through" and self.mask in (
            "magnitude",
            "transposable",
            "tile",
        )
        if self.multipliers != (1.0, 1.0) and not plain:
            return (
                f"multipliers={self.multipliers} have no effect with "
                f"gradient={self.gradient!r} and mask={self.mask!r}"
            )
        if self.decay and not plain:
            return (
                f"decay={self.decay} has no effect with gradient={self.gradient!r} "
                f"and mask={self.mask!r}"
            )
        patterns = [pattern for _, pattern in self.schedule.patterns]
        sizes = {pattern.m for pattern in (self.pattern, *patterns) if pattern}
        if patterns and (tiled or not self.sparse or len(sizes) > 1):
            return (
                f"the schedule's patterns {patterns} do not fit pattern {self.pattern}"
                f" and tile={self.tile!r}: all have one m, and tiles are 2:4"
            )
        if patterns and self.mask == "learned":
            return (
                f"the schedule's patterns {patterns} do not fit mask='learned': logits "
                "are of the combinations of one pattern"
            )
        if self.schedule.freeze_from < 1 and self.mask in (
            None,
            "soft-threshold",
            "learned",
        ):
            return f"freeze_from needs a mask that can be kept, mask={self.mask!r}"
        return ""

    @property
    def sparse(self) -> bool:
        """Whether any GEMM has an N:M operand."""
        return self.pattern is not None

    @property
    def masks_weight(self) -> bool:
        """Whether fprop reads a masked weight."""
        return self.mask is not None

    @property
    def mask_on_both_axes(self) -> bool:
        """Whether fprop's mask of W is N:M along the output axis too."""
        tiles = self.mask == "tile" and transposes(self.tile)
        return self.mask == "transposable" or tiles

    @property
    def on_both_axes(self) -> bool:
        """Whether groups of W run along the output axis too."""
        return self.dgrad is not None or self.mask_on_both_axes

    @property
    def masks_dgrad(self) -> bool:
        """Whether dgrad reads a weight under a mask that is not fprop's."""
        return self.dgrad in ("weight-own-mask", "weight-masked-twice")

    @property
    def needs_op(self) -> bool:
        """Whether it asks more of a layer than to read a masked weight."""
        return self.fprop == "activation" or self.masks_dgrad or self.wgrad is not None

    @property
    def state_names(self) -> tuple[str, ...]:
        """What its entry of the state holds for the forward pass."""
        if self.mask == "soft-threshold":
            return ("scale",)
        if self.mask == "learned":
            return ("temperature",)
        names = ("output_order",) if self.reorder else ()
        if self.mask is None or self.refresh == 1:
            return names
        return ("mask", "mask_dgrad", *names) if self.masks_dgrad else ("mask",)

    @property
    def entry_names(self) -> frozenset[str]:
        """What its entry may hold: masks that are prepared, and the flip rate, too."""
        names = {*self.state_names}
        if self.masks_weight:
            names |= {"mask", "mask_dgrad"} if self.masks_dgrad else {"mask"}
        if self.keeps_mask and self.refresh is not None:
            names.add("flip_rate")
        return frozenset(names)

    @property
    def needs_state(self) -> bool:
        """Whether a forward pass needs an entry from `nmjax.init_state`."""
        return bool(self.state_names)

    @property
    def keeps_mask(self) -> bool:
        """Whether the mask is in the state."""
        return "mask" in self.state_names

    @property
    def draws(self) -> bool:
        """Whether a training step needs random bits: a key."""
        return self.wgrad == "gradient" or self.mask == "learned"

    def at(self, progress: float) -> "Recipe":
        """The recipe that its schedule puts in force.

        Args:
          progress: The share of the run that is done, from 0 to below 1.

        Returns:
          The recipe of that phase: `dense()` outside the sparse ones; with the pattern
          of a gradual schedule; choosing its mask no more where masks are frozen.
        """
        when = self.schedule
        if not when.dense_until <= progress < when.dense_from:
            return Recipe("dense")
        changes: dict[str, Any] = {}
        for start, pattern in when.patterns:
            if start <= progress:
                changes["pattern"] = pattern
        if progress >= when.freeze_from:
            changes["refresh"] = None
        return dataclasses.replace(self, **changes)

    def during(self, *, dense_until: float, freeze_from: float) -> "Recipe":
        """The recipe with a longer dense start or an earlier freeze, as fractions.

        Raises:
          ValueError: Its schedule has no room for them.
        """
        when = self.schedule
        when = dataclasses.replace(
            when,
            dense_until=max(when.dense_until, dense_until),
            freeze_from=min(when.freeze_from, freeze_from),
        )
        return dataclasses.replace(self, schedule=when)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields["pattern"] = str(self.pattern) if self.pattern else None
        fields["multipliers"] = list(self.multipliers)
        fields["schedule"] = self.schedule.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Recipe":
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: A field is unknown or missing: written by another version.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            raise ValueError(
                f"not a recipe of this version of nmjax: {fields!r} should have "
                f"exactly the fields {sorted(known)}"
            )
        pattern, temperature = fields["pattern"], fields["temperature"]
        parsed = {
            "pattern": NMPattern(pattern) if pattern else None,
            "multipliers": tuple(fields["multipliers"]),
            "temperature": Temperature(**temperature) if temperature else None,
            "schedule": Schedule.from_dict(fields["schedule"]),
        }
        return cls(**{**fields, **parsed})


def transposes(tile: str | None) -> bool:
    """Whether a tile algorithm's mask is 2:4 along both axes of the matrix."""
    return tile is None or "notranspose" not in tile


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = (
            '; for a schedule use decay_in="optimizer" and '
            "nmjax.add_decay(plan, schedule)"
        )
        hint = hint if name == "decay" else ""
        raise ValueError(f"{name} must be a Python number, got {value!r}{hint}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")

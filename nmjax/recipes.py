"""Recipes: what is sparse, how its mask is chosen, what its dropped weights receive.

A layer is trained by three GEMMs,

    fprop  y = x · W        dgrad  dx = dy · Wᵀ        wgrad  dW = xᵀ · dy

and a recipe answers three questions about them: which operand of each GEMM is N:M
along the axis that the GEMM contracts, how the mask is chosen and when, and what
gradient the dropped weights receive. Every published method is a value of `Recipe`;
nothing else in the code knows a method's name.

A recipe is frozen, compared by value and hashable, so it may be static under `jit`.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from nmjax.pattern import NMPattern

Operand = Literal["weight"]
Gradient = Literal["straight-through", "masked"]
DecayIn = Literal["op", "optimizer"]

_WORDS: dict[str, tuple[str | None, ...]] = {
    "fprop": (None, *get_args(Operand)),
    "dgrad": (None, *get_args(Operand)),
    "wgrad": (None, *get_args(Operand)),
    "gradient": get_args(Gradient),
    "decay_in": get_args(DecayIn),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight is trained; made by the functions of this module.

    Attributes:
      name: The method, for tables and messages; no code branches on it.
      pattern: n kept of every m; None for a dense weight.
      fprop: The operand of `y = x · W` that is N:M along the contracted axis.
      dgrad: The same for `dx = dy · Wᵀ`; None = this GEMM has no N:M operand. (It
        still multiplies by the masked weight: a mask along fprop's axis cannot
        speed it up.)
      wgrad: The same for `dW = xᵀ · dy`.
      refresh: Optimizer steps between two choices of the mask: 1 = from the weight
        wherever it is used, nothing stored; k > 1 = by `nmjax.refresh` at every k-th
        step, stored in between; None = once, by `nmjax.init_state`, and kept.
      gradient: "straight-through" = dropped weights receive the gradient of the
        masked weight; "masked" = they receive none.
      decay: λ of SR-STE, added to the gradient as λ(1 − E)W; 0 = none.
      decay_in: Who adds it: "op" = the backward pass, once for each use of the
        weight; "optimizer" = `nmjax.add_decay`, once for each optimizer step.
    """

    name: str
    pattern: NMPattern | None = None
    fprop: Operand | None = None
    dgrad: Operand | None = None
    wgrad: Operand | None = None
    refresh: int | None = 1
    gradient: Gradient = "straight-through"
    decay: float = 0.0
    decay_in: DecayIn = "op"

    def __post_init__(self):
        """Refuses values that no method has."""
        refresh, decay = self.refresh, self.decay
        if refresh is not None and (type(refresh) is not int or refresh < 1):
            raise ValueError(
                f"refresh must be a number of steps from 1 up, or None, got {refresh!r}"
            )
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise ValueError(
                f"decay must be a number, got {decay!r}; for a schedule use "
                'decay_in="optimizer" and nmjax.add_decay(plan, schedule)'
            )
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"decay must be finite and at least 0, got {decay}")
        for field, words in _WORDS.items():
            if getattr(self, field) not in words:
                raise ValueError(
                    f"{field} must be one of {words}, got {getattr(self, field)!r}"
                )
        if self.sparse != any((self.fprop, self.dgrad, self.wgrad)):
            raise ValueError(
                f"pattern={self.pattern} and the operands fprop={self.fprop}, "
                f"dgrad={self.dgrad}, wgrad={self.wgrad} contradict each other"
            )
        if decay and self.gradient == "masked":
            raise ValueError(f'decay={decay} has no effect with gradient="masked"')

    @property
    def sparse(self) -> bool:
        """Whether any GEMM has an N:M operand."""
        return self.pattern is not None

    @property
    def needs_state(self) -> bool:
        """Whether a forward pass needs the mask from `nmjax.init_state`."""
        return self.sparse and self.refresh != 1

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields["pattern"] = str(self.pattern) if self.pattern else None
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
        pattern = fields["pattern"]
        return cls(**{**fields, "pattern": NMPattern(pattern) if pattern else None})


def dense() -> Recipe:
    """No sparsity: the plain layer."""
    return Recipe("dense")


def ste(pattern: str | NMPattern, *, refresh: int = 1) -> Recipe:
    """Magnitude masks with the straight-through gradient (arXiv:2102.04010).

    Args:
      pattern: n kept of every m.
      refresh: Optimizer steps between two choices of the mask.
    """
    return Recipe("ste", NMPattern(pattern), fprop="weight", refresh=refresh)


def sr_ste(
    pattern: str | NMPattern,
    *,
    decay: float = 2e-4,
    decay_in: DecayIn = "op",
    refresh: int = 1,
) -> Recipe:
    """Straight-through gradient plus λ(1 − E)W (SR-STE, arXiv:2102.04010).

    Args:
      pattern: n kept of every m.
      decay: λ; the paper uses 2e-4 for ImageNet. With 0 this is `ste`.
      decay_in: "op" adds the term once for each use of the weight, as the paper
        does; "optimizer" leaves the layer plain STE, and `nmjax.add_decay(plan)`
        adds the same term once for each optimizer step, whatever the number of
        devices and micro-batches and whatever the loss scale.
      refresh: Optimizer steps between two choices of the mask; above 1 the masks
        live in the state, and the training loop calls `nmjax.refresh`.
    """
    return Recipe(
        "sr_ste",
        NMPattern(pattern),
        fprop="weight",
        refresh=refresh,
        decay=decay,
        decay_in=decay_in,
    )


def one_shot(pattern: str | NMPattern) -> Recipe:
    """Prunes once by magnitude; dropped weights stay zero in the forward pass.

    The mask is chosen from the parameters given to `nmjax.init_state` and kept;
    the gradient reaches kept weights only, as in NVIDIA's ASP.
    """
    return Recipe(
        "one_shot",
        NMPattern(pattern),
        fprop="weight",
        refresh=None,
        gradient="masked",
    )


def frozen(
    pattern: str | NMPattern, *, decay: float = 0.0, decay_in: DecayIn = "op"
) -> Recipe:
    """A mask that `nmjax.init_state` chooses once, with SR-STE's gradient.

    The last phase of a training run: the mask no longer moves, dropped weights go on
    receiving the straight-through gradient, plus λ(1 − E)W where `decay` is set.
    """
    return Recipe(
        "frozen",
        NMPattern(pattern),
        fprop="weight",
        refresh=None,
        decay=decay,
        decay_in=decay_in,
    )


def as_recipe(recipe: "Recipe | str | NMPattern | None") -> Recipe:
    """A recipe as users may write it: None = dense, "2:4" = SR-STE of that pattern."""
    match recipe:
        case None:
            return dense()
        case Recipe():
            return recipe
        case str() | NMPattern():
            return sr_ste(recipe)
    raise ValueError(
        f"expected a recipe, a pattern such as '2:4', or None, got {recipe!r}; "
        "recipes are made by nmjax.recipes, for example nmjax.recipes.sr_ste('2:4')"
    )

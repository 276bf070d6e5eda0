"""The plan: which parameters are sparse, along which axis, and why the rest are not.

Plain data, hashable, and JSON in every checkpoint, so that a trained network can be
judged without the code of its model. `planning.py` makes it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator

from nmjax.masks import Ragged
from nmjax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What the plan says of one parameter.

    Attributes:
      path: Slash-joined path of the parameter, such as "block1/conv1/kernel".
      layer: Class name of the layer, such as "Conv", or "parameter".
      shape: Shape as stored.
      dtype: Name of the dtype as stored.
      axes: The axes that the GEMM contracts, counted from the end; groups run along
        the last of them.
      out_axes: The axes that dgrad contracts, counted from the end; groups of recipes
        that mask along the outputs too run along the last of them.
      stacked: The axes that scan or vmap stack, counted from the end.
      recipe: The recipe, or None: dense.
      ragged: As in `Rule`.
      reason: Why the parameter is dense; "" where it is sparse.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stacked: tuple[int, ...]
    recipe: Recipe | None
    ragged: Ragged | None
    reason: str

    def __post_init__(self):
        """Refuses a sparse parameter without an axis to run groups along."""
        rank = len(self.shape)
        if self.sparse and not (self.axes and -rank <= self.axes[-1] < 0):
            raise ValueError(f"{self.path}: axes {self.axes} of shape {self.shape}")
        if self.sparse and len(self.group_axes) > 1 and not self.out_axes:
            raise ValueError(f"{self.path}: no output axes for {self.recipe}")

    @property
    def sparse(self) -> bool:
        """Whether a recipe acts on the parameter."""
        return self.recipe is not None

    @property
    def axis(self) -> int:
        """The axis along which groups run, counted from the end."""
        return self.axes[-1]

    @property
    def masks_weight(self) -> bool:
        """Whether the GEMM reads a masked weight."""
        return self.recipe is not None and self.recipe.masks_weight

    @property
    def group_axes(self) -> tuple[int, ...]:
        """The axes along which masks of the weight run, counted from the end."""
        return group_axes_of(self.recipe, self.axes, self.out_axes)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One entry for each parameter that a rule may speak of; see `nmjax.plan`."""

    entries: tuple[PlanEntry, ...]

    def __iter__(self) -> Iterator[PlanEntry]:
        """Iterates over the entries in the order of the parameter tree."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of entries, sparse or not."""
        return len(self.entries)

    def __getitem__(self, path: str) -> PlanEntry:
        """The entry of a parameter.

        Raises:
          KeyError: No such path; the message lists those that exist.
        """
        for entry in self.entries:
            if entry.path == path:
                return entry
        raise KeyError(f"no {path!r} in the plan; it has {[e.path for e in self]}")

    @property
    def sparse(self) -> tuple[PlanEntry, ...]:
        """The entries on which a recipe acts."""
        return tuple(entry for entry in self.entries if entry.sparse)

    @property
    def masked(self) -> tuple[PlanEntry, ...]:
        """The sparse entries whose recipe masks the weight."""
        return tuple(entry for entry in self.entries if entry.masks_weight)

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back equal."""
        entries = []
        for entry in self.entries:
            fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
            fields["recipe"] = entry.recipe.to_dict() if entry.recipe else None
            entries.append(fields)
        return json.dumps({"format": 2, "entries": entries}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: The text is not a plan of this version.
        """
        names = {field.name for field in dataclasses.fields(PlanEntry)}
        try:
            data = json.loads(text)
            if data["format"] != 2:
                raise ValueError(f"format {data['format']!r}, this version reads 2")
            entries = []
            for fields in data["entries"]:
                if set(fields) != names:
                    raise ValueError(f"fields {sorted(fields)}, not {sorted(names)}")
                recipe = fields["recipe"]
                entry = {
                    **fields,
                    "shape": tuple(fields["shape"]),
                    "axes": tuple(fields["axes"]),
                    "out_axes": tuple(fields["out_axes"]),
                    "stacked": tuple(fields["stacked"]),
                    "recipe": Recipe.from_dict(recipe) if recipe else None,
                }
                entries.append(PlanEntry(**entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a plan that nmjax wrote: {error}") from error
        return cls(tuple(entries))


def group_axes_of(
    recipe: Recipe | None, axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> tuple[int, ...]:
    """The axes along which a recipe's masks of the weight run."""
    if recipe is None or not recipe.masks_weight:
        return ()
    return (axes[-1], *(out_axes[-1:] if recipe.on_both_axes else ()))

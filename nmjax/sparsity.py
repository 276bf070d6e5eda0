"""What one parameter's recipe makes of its weight: masks, masked weights, state.

Every use of a weight (by a layer, by `sparsify_params`, by the optimizer's decay, by
`check`) asks the same `Sparsity`, so all of them see the same mask.

What a recipe keeps for one weight is a dictionary of arrays, its *entry* of the state:

    mask         bool, the shape of the weight
    mask_dgrad   bool, the shape of the weight: dgrad's own mask
    output_order of the outputs, in which groups of mask_dgrad run: int32, with the
                 size of the weight along its output axis
    scale        β of a soft threshold, float32
    temperature  τ of a learned mask, float32
    flip_rate    share of the mask's bits that its last refresh changed, float32
    logits       of a learned mask (trained: a tree of its own, see `init_logits`)
    key          random bits of one call (never stored)

Numbers have the rank of the weight, with size 1 along every other axis but those that a
scan or vmap of the model stacks: such a transformation slices them as it slices the
weight.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from nmjax import estimators, masks
from nmjax.masks import Ragged, magnitude_mask
from nmjax.masks.learned import best_mask, init_logits, patterns, sample_mask
from nmjax.masks.magnitude import sharded_as
from nmjax.masks.output_order import mask_in_order, search_output_order
from nmjax.pattern import NMPattern
from nmjax.plans import PlanEntry, group_axes_of
from nmjax.recipe import Recipe

Entry = Mapping[str, jax.Array]
MASKS = ("mask", "mask_dgrad")
NUMBERS = ("output_order", "scale", "temperature")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The static facts of one sparse parameter.

    Attributes:
      path: Slash-joined path, for messages.
      recipe: Always sparse.
      axis: The axis along which groups run, counted from the end: fprop's.
      out_axis: The axis that dgrad contracts, counted from the end.
      ragged: As in `nmjax.Rule`.
      stacked: The axes that a scan or vmap stacks, counted from the end.
    """

    path: str
    recipe: Recipe
    axis: int
    out_axis: int = -1
    ragged: Ragged | None = None
    stacked: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: PlanEntry) -> "Sparsity":
        """The facts that a sparse entry of a plan holds.

        Raises:
          ValueError: The entry is dense.
        """
        if entry.recipe is None:
            raise ValueError(f"{entry.path} is dense in this plan: {entry.reason}")
        out_axis = entry.out_axes[-1] if entry.out_axes else -1
        return cls(
            entry.path,
            entry.recipe,
            entry.axis,
            out_axis,
            entry.ragged,
            entry.stacked,
        )

    def in_layer(self) -> "Sparsity":
        """The facts inside the layer, where scan and vmap have taken their axes."""
        return dataclasses.replace(self, stacked=())

    @property
    def pattern(self) -> NMPattern:
        """The recipe's pattern."""
        return cast(NMPattern, self.recipe.pattern)

    @property
    def group_axes(self) -> tuple[int, ...]:
        """The axes along which masks of the weight run, counted from the end."""
        return group_axes_of(self.recipe, (self.axis,), (self.out_axis,))

    def number_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a number kept for a weight of this shape."""
        rank = len(shape)
        return tuple(
            size if i - rank in self.stacked else 1 for i, size in enumerate(shape)
        )

    def own_axes(self, rank: int) -> tuple[int, ...]:
        """The axes that nothing stacks: over them, one number is kept."""
        return tuple(i for i in range(-rank, 0) if i not in self.stacked)

    def own_key(self, key: jax.Array) -> jax.Array:
        """The key from which this parameter draws in a call with `key`."""
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        return jax.random.fold_in(key, zlib.crc32(self.path.encode()))

    def init(
        self, w: jax.Array, order: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The entry that the recipe keeps for `w`, chosen anew.

        Args:
          w: Master weight as stored.
          order: The order of outputs in force; None = to be searched.
        """
        recipe, names = self.recipe, self.recipe.state_names
        entry: dict[str, jax.Array] = {}
        if "output_order" in names:
            if order is None:
                order = self.search_order(w, self._stored_order(w), 0)
            entry["output_order"] = order
        if recipe.keeps_mask:
            entry |= self.choose_masks(w, entry)
            if recipe.refresh is not None:
                entry["flip_rate"] = jnp.zeros(self.number_shape(w.shape), jnp.float32)
        if "scale" in names:
            mask, over = self.choose_mask(w), self.own_axes(w.ndim)
            entry["scale"] = estimators.soft_threshold_scale(
                w, mask, self.pattern, self.axis, over
            )
        if "temperature" in names:
            entry["temperature"] = self.temperature(0, w.shape)
        return entry

    def init_logits(self, w: jax.Array) -> jax.Array:
        """Logits of a learned mask, all patterns equally probable, cut as `w` is."""
        logits = init_logits(w.shape, self.pattern, axis=self.axis)
        traced = isinstance(w, Tracer)
        sharding = jax.typeof(w).sharding if traced else w.sharding
        if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
            return logits
        spec = [*sharding.spec, *[None] * (w.ndim - len(sharding.spec))]
        spec.insert(logits.ndim + self.axis, None)  # the patterns of a group
        spec = PartitionSpec(*spec)
        if traced:  # along Explicit axes; of the others its type knows nothing
            no_mesh = jax.sharding.get_abstract_mesh().empty
            return logits if no_mesh else jax.reshard(logits, spec)
        return jax.device_put(logits, NamedSharding(sharding.mesh, spec))

    def temperature(self, step: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """τ at a step, for a weight of this shape."""
        schedule = self.recipe.temperature
        if schedule is None:
            raise ValueError(f"{self.path}: {self.recipe.name!r} has no temperature")
        return jnp.full(self.number_shape(shape), schedule(step), jnp.float32)

    def choose_masks(self, w: jax.Array, entry: Entry) -> dict[str, jax.Array]:
        """Every mask that the GEMMs read of `w` as stored, by name.

        Raises:
          ValueError: The recipe keeps an order of outputs and `entry` has none.
        """
        chosen = {"mask": self.choose_mask(w)}
        if self.recipe.masks_dgrad:
            chosen["mask_dgrad"] = self._choose_mask_dgrad(w, chosen["mask"], entry)
        return chosen

    def _choose_mask_dgrad(
        self, w: jax.Array, mask: jax.Array, entry: Entry
    ) -> jax.Array:
        """The mask of dgrad alone, along the output axis."""
        if self.recipe.dgrad == "weight-own-mask":
            return magnitude_mask(w, self.pattern, axis=self.out_axis)
        if self.recipe.reorder and "output_order" not in entry:
            raise ValueError(self._missing("output_order"))
        order = entry.get("output_order", self._stored_order(w))
        choose = lambda w, e, order: mask_in_order(w, e, self.pattern, order)  # noqa: E731
        return self._by_output(choose, order, w, mask)

    def search_order(
        self, w: jax.Array, order: jax.Array, step: int | jax.Array
    ) -> jax.Array:
        """An order of outputs in which dgrad's mask drops less of `w`, or the same."""
        key = jax.random.fold_in(self.own_key(jax.random.key(0)), step)
        search = lambda mask, order: search_output_order(  # noqa: E731
            mask, self.pattern, order, key
        )
        return self._by_output(search, order, self.choose_mask(w))

    def _stored_order(self, w: jax.Array) -> jax.Array:
        """The outputs in the order in which the weight has them."""
        shape = list(self.number_shape(w.shape))
        shape[self.out_axis] = w.shape[self.out_axis]
        return jax.lax.broadcasted_iota(jnp.int32, shape, w.ndim + self.out_axis)

    def _by_output(
        self, function: Callable, order: jax.Array, *weights: jax.Array
    ) -> jax.Array:
        """`function` of weights `(…, outputs)` and an order, for all stacked."""
        stacked = len(self.stacked)
        axes, places = (*self.stacked, self.out_axis), (*range(stacked), -1)
        order, *moved = (jnp.moveaxis(a, axes, places) for a in (order, *weights))
        spec = jax.typeof(moved[0]).sharding.spec[:stacked]
        order = sharded_as(order, moved[0], spec)  # as vmap asks, and no output apart
        for _ in range(stacked):
            function = jax.vmap(function)
        made = function(*moved, order.reshape(*order.shape[:stacked], -1))
        made = made if made.ndim == order.ndim else made.reshape(order.shape)
        return jnp.moveaxis(made, places, axes)

    def choose_mask(self, w: jax.Array) -> jax.Array:
        """The mask that fprop reads of `w`: bool, its shape, True = kept.

        Raises:
          ValueError: A learned mask is not chosen from the weight.
        """
        match self.recipe.mask:
            case "magnitude" | "soft-threshold":
                axis, ragged = self.axis, self.ragged
                return magnitude_mask(w, self.pattern, axis=axis, ragged=ragged)
            case "transposable":
                axes = (self.axis, self.out_axis)
                pattern = self.pattern
                choose = lambda a: masks.transposable_mask(a, pattern)  # noqa: E731
                return _on_last_axes(choose, jnp.abs(w), axes)
            case "tile":
                # As (out, in), the matrix whose rows torchao's algorithms walk.
                axes = (self.out_axis, self.axis)
                algorithm = self.recipe.tile or ""
                choose = lambda w: masks.tile_mask(w, algorithm)  # noqa: E731
                return _on_last_axes(choose, w, axes)
            case "learned":
                raise ValueError(
                    f"{self.path}: recipe {self.recipe.name!r} reads its mask off "
                    "logits and none were given; make them with "
                    "nmjax.init_logits(params, plan) and pass logits=, or in linen "
                    'the collection "nm_logits"'
                )
        raise ValueError(f"{self.path}: recipe {self.recipe.name!r} masks no weight")

    def masks(self, w: jax.Array, entry: Entry) -> dict[str, jax.Array]:
        """The masks that act on `w`, without noise: those stored, else chosen.

        Raises:
          ValueError: The recipe keeps its mask in the state and there is none, or
            the stored one has another shape or is not bool.
        """
        stored = {name: entry[name] for name in MASKS if name in entry}
        for name, mask in stored.items():
            if mask.shape != w.shape or mask.dtype != jnp.bool_:
                raise ValueError(
                    f"{self.path}: the state holds a {name} of shape {mask.shape} for "
                    f"a weight of shape {w.shape}, of {mask.dtype} where bool is "
                    "expected; make it anew with nmjax.init_state"
                )
        if "mask" in stored:
            if self.recipe.masks_dgrad and "mask_dgrad" not in stored:
                raise ValueError(self._missing("mask_dgrad"))
            return stored
        if self.recipe.keeps_mask:
            raise ValueError(self._missing("mask"))
        if "logits" in entry and self.recipe.mask == "learned":
            logits = entry["logits"]
            return {"mask": best_mask(logits, self.pattern, axis=self.axis)}
        return self.choose_masks(w, entry)

    def mask(self, w: jax.Array, entry: Entry) -> jax.Array:
        """The mask that fprop reads of `w`; raises as `masks`."""
        if self._chooses(entry):
            return self.choose_mask(w)
        return self.masks(w, entry)["mask"]

    def _chooses(self, entry: Entry) -> bool:
        """Whether masks come from the weight, here and now."""
        kept = self.recipe.keeps_mask or self.recipe.mask == "learned"
        return not kept and "mask" not in entry

    def apply(self, w: jax.Array, entry: Entry) -> jax.Array:
        """The weight of fprop, with the gradient that the recipe prescribes.

        Args:
          w: Master weight as stored.
          entry: What the state holds for it.

        Returns:
          Shape and dtype of `w`; `w` itself where the recipe masks no weight.

        Raises:
          ValueError: As `masks`; or a learned mask comes from `nmjax.prepare`, so that
            its logits would get no gradient, and has random bits to train with, or the
            logits are differentiated.
        """
        recipe = self.recipe
        if not recipe.masks_weight:
            return w
        if recipe.mask != "learned":
            return self._apply_mask(w, entry)
        if "mask" not in entry:
            return self._apply_learned(w, entry)
        message = f"{self.path}: {PREPARED}"
        if "key" in entry:
            raise ValueError(message)
        w_s, logits = self._apply_mask(w, entry), entry.get("logits")
        # No forward mode (jvp): use nmjax.densify(model)
        return estimators.refuse_gradient(message, w_s, logits)

    def _apply_mask(self, w: jax.Array, entry: Entry) -> jax.Array:
        recipe, mask = self.recipe, self.mask(w, entry)
        if recipe.mask == "soft-threshold":
            if "scale" not in entry:
                raise ValueError(self._missing("scale"))
            scale, axis = entry["scale"], self.axis
            return estimators.soft_threshold(w, mask, scale, self.pattern, axis)
        if recipe.gradient == "none":
            w = jax.lax.stop_gradient(w)
        if recipe.gradient != "straight-through":
            return estimators.masked(w, mask)
        decay = recipe.decay if recipe.decay_in == "op" else 0
        return estimators.straight_through(w, mask, decay, recipe.multipliers)

    def apply_dgrad(self, w: jax.Array, entry: Entry) -> jax.Array | None:
        """The weight of dgrad where it is not fprop's: a constant, or None."""
        if not self.recipe.masks_dgrad:
            return None
        w = jax.lax.stop_gradient(w)
        return estimators.masked(w, self.masks(w, entry)["mask_dgrad"])

    def _apply_learned(self, w: jax.Array, entry: Entry) -> jax.Array:
        if self.recipe.gradient == "none":
            w = jax.lax.stop_gradient(w)
        if "logits" not in entry:
            self.choose_mask(w)  # says what is missing
        if "key" not in entry:
            message = f"{self.path}: {NO_KEY}"
            logits = entry["logits"]
            mask = best_mask(logits, self.pattern, axis=self.axis)
            w_s = estimators.masked(w, mask)
            # No forward mode (jvp): use nmjax.densify(model)
            return estimators.refuse_gradient(message, w_s, (w, logits))
        if "temperature" not in entry:
            raise ValueError(self._missing("temperature"))
        mask = sample_mask(
            entry["logits"],
            entry["key"].reshape(-1)[0],
            self.pattern,
            axis=self.axis,
            temperature=entry["temperature"].reshape(-1)[0],
        )
        return mask.astype(w.dtype) * w

    def _missing(self, name: str) -> str:
        return (
            f"{self.path}: recipe {self.recipe.name!r} keeps its {name} in the state "
            "and none was given; call state = nmjax.init_state(params, plan) and pass "
            'it: model.apply({"params": params, "nm": state}, ...)'
        )

    def flat_logits(self, logits: jax.Array) -> jax.Array:
        """Logits with the rank of the weight, for a box that a scan may slice."""
        at = logits.ndim + self.axis
        joined = logits.shape[at - 1] * logits.shape[at]
        shape = (*logits.shape[: at - 1], joined, *logits.shape[at + 1 :])
        return logits.reshape(shape)

    def unflat_logits(self, flat: jax.Array) -> jax.Array:
        """The inverse of `flat_logits`."""
        at = flat.ndim + self.axis
        number = len(patterns(self.pattern))
        shape = (*flat.shape[:at], -1, number, *flat.shape[at + 1 :])
        return flat.reshape(shape)


NO_KEY = (
    "training needs random bits and none were given; in linen pass a key, "
    'model.apply(..., rngs={"nm": key}), in nnx call nmjax.nnx.set_key(model, key) '
    "(of a model in training mode)"
)

PREPARED = (
    "masks from nmjax.prepare give logits no gradient; to train, pass the state itself "
    "(from nmjax.init_state), and to evaluate, no random bits"
)


def _on_last_axes(choose, w: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """`choose` of the matrices that two axes of `w` span."""
    if axes == (-2, -1):
        return choose(w)
    return jnp.moveaxis(choose(jnp.moveaxis(w, axes, (-2, -1))), (-2, -1), axes)

"""What a sparse nnx layer keeps, in its Variables: given, taken and judged.

A layer's entry of the state (`nmjax.sparsity`) lies in attributes of the layer,
`nm_mask` and so on; layers that share a weight share them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nmjax.nnx.recording import Weight
from nmjax.nnx.variables import NMFlipRate, NMKey, NMLogits, NMMask, NMNumber
from nmjax.paths import named_leaves
from nmjax.plans import Plan
from nmjax.sparse_kernel import keys_of
from nmjax.sparsity import MASKS, NUMBERS, Entry
from nmjax.state import entries_of, init_logits, init_state

_KEPT = (*MASKS, *NUMBERS, "logits")
_ENTRY = (*(f"nm_{name}" for name in _KEPT), "nm_flip_rate", "nm_key")
_SHARDING = ("out_sharding", "sharding_rules", "mesh")


def remove_entry(layer: Any) -> None:
    """Takes from a layer what its recipe had it keep."""
    if getattr(layer, "nm_mode", False):
        remove(layer, "nm_mode", "deterministic")
    remove(layer, *_ENTRY)


def remove(layer: Any, *names: str) -> None:
    """Takes attributes from a layer, where it has them."""
    for name in names:
        if name in vars(layer):
            delattr(layer, name)


def keeps_entry(layer: Any) -> bool:
    """Whether the layer's recipe keeps something in the state."""
    sparsity = getattr(layer, "nm_sparsity", None)
    return sparsity is not None and sparsity.recipe.needs_state


def kept_entry(layer: Any, path: str) -> dict[str, jax.Array]:
    """What a layer keeps: its entry of the state, and logits.

    Args:
      layer: The layer.
      path: For the message.

    Raises:
      ValueError: The recipe keeps something that is not there, or the layer has what is
        kept by another; a mask is not bool, or an order not an integer.
    """
    recipe = layer.nm_sparsity.recipe
    entry = {}
    kept = recipe.state_names
    strange = [
        name
        for name in (*MASKS, *NUMBERS)
        if name not in kept and getattr(layer, f"nm_{name}") is not None
    ]
    if strange:
        raise ValueError(
            f"{path}: the layer holds {strange} of another recipe, perhaps since "
            f"nnx.update, and {recipe.name!r} keeps {sorted(kept) or 'nothing'}: take "
            "the parameters alone, nnx.state(model, nnx.Param)"
        )
    for name in _KEPT:
        variable = getattr(layer, f"nm_{name}")
        if variable is not None:
            entry[name] = variable.get_value()
        elif name in recipe.state_names:
            raise ValueError(
                f"{path}: recipe {recipe.name!r} keeps its {name} in the state and "
                "none was given; call nmjax.nnx.set_state(model, "
                "nmjax.init_state(nmjax.nnx.params(model), plan))"
            )
    check_dtypes(path, entry)
    return entry


def check_dtypes(path: str, entry: Entry) -> None:
    """Refuses masks and orders that an average or a cast has made numbers.

    Args:
      path: For the message.
      entry: What is kept for a weight.

    Raises:
      ValueError: A mask is not bool, or an order of outputs not an integer.
    """
    masks = [(name, jnp.bool_, "bool") for name in MASKS]
    for name, kind, word in (*masks, ("output_order", jnp.integer, "an integer")):
        if name in entry and not jnp.issubdtype(entry[name].dtype, kind):
            raise ValueError(
                f"{path}: its {name} is {entry[name].dtype}, not {word}, perhaps since "
                "the whole state was averaged or cast: do that to the parameters "
                "alone, nnx.state(model, nnx.Param), and give masks back with "
                "nmjax.nnx.set_state(model, state)"
            )


def new_entries(params: Any, plan: Plan) -> dict[str, dict[str, jax.Array]]:
    """What recipes keep for each weight, and logits of learned masks, by path."""
    entries = entries_of(init_state(params, plan))
    for path, logits in named_leaves(init_logits(params, plan)).items():
        entries.setdefault(path, {})["logits"] = logits
    return entries


def store_entry(weight: Weight, entry: Entry) -> None:
    """Puts what is kept for a weight into the layers that read it.

    Args:
      weight: The weight.
      entry: Its entry of a state, "logits" among it or not: then they stay.
    """
    metadata = weight.param.get_metadata()
    sharding = {key: metadata[key] for key in _SHARDING if key in metadata}
    kinds: dict[str, Callable[..., nnx.Variable]] = {
        **dict.fromkeys(MASKS, functools.partial(NMMask, **sharding)),
        **dict.fromkeys(NUMBERS, NMNumber),
        "flip_rate": NMFlipRate,
        "logits": NMLogits,
    }
    for name, kind in kinds.items():
        if name in entry:
            x = entry[name]
            _put(weight, f"nm_{name}", functools.partial(kind, x), x)


def store_key(weight: Weight, key: jax.Array | None) -> None:
    """Puts random bits into the layers that read a weight; None takes them away."""
    if key is None:
        for layer in weight.layers:
            remove(layer, "nm_key")
        return
    sparsity = weight.layers[0].nm_sparsity
    path = weight.candidate.path
    keys = keys_of(
        key, dataclasses.replace(sparsity, path=path), weight.candidate.shape
    )
    _put(weight, "nm_key", lambda: NMKey(keys), keys)


def _put(
    weight: Weight, name: str, make: Callable[[], nnx.Variable], value: Any
) -> None:
    """Sets a Variable of all layers that share a weight; makes it where it is new."""
    variable = getattr(weight.layers[0], name)
    if variable is None:
        variable = make()
    else:
        variable.set_value(value)
    for layer in weight.layers:
        if getattr(layer, name) is not variable:
            setattr(layer, name, variable)

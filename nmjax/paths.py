"""Parameter trees addressed by slash-joined paths, such as "block1/conv1/kernel"."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import meta


def join(path: tuple[Any, ...]) -> str:
    """The slash-joined form of a key path of `jax.tree_util`."""
    return "/".join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    raise TypeError(f"a tree node with keys of type {type(entry).__name__} has no path")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf by its path; boxes of Flax's metadata are opened."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=meta.is_axis_metadata
    )
    return {join(path): meta.unbox(leaf) for path, leaf in leaves}


def map_named(
    function: Callable[[str, Any], Any], tree: Any, *, keep_boxes: bool = True
) -> Any:
    """Applies `function(path, leaf)` to every leaf.

    Args:
      function: Receives the path and the leaf, its metadata box opened.
      tree: Any pytree with named nodes.
      keep_boxes: Whether a leaf that came in a box of Flax's metadata, such as
        `nn.Partitioned`, goes back into one like it.
    """

    def apply(path, leaf):
        if not meta.is_axis_metadata(leaf):
            return function(join(path), leaf)
        new = function(join(path), meta.unbox(leaf))
        return meta.replace_boxed(leaf, new) if keep_boxes else new

    return jax.tree_util.tree_map_with_path(apply, tree, is_leaf=meta.is_axis_metadata)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain dictionaries from a mapping of paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree

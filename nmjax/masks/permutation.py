"""Channel permutations that let an N:M mask keep more magnitude.

The order of the channels between two layers is free: permute what a layer produces,
and what the next contracts, and the network computes the same function. But groups of m
consecutive channels compete for n places, so the order decides how much an N:M mask
keeps. `search_permutation` looks for a better order of one weight, `permute_chain`
applies orders to the layers of a network (as in NVIDIA's ASP; "Channel Permutations for
N:M Sparsity", NeurIPS 2021).

The search swaps channels of different groups. In a group whose n-th and (n+1)-th
largest magnitudes of a column are hi and lo, let channel c take the place of channel p:
the column then keeps what the others keep, plus max(t, |w_c|), where t = lo if p was
kept and hi if not. So

    T[p, c] = Σ_columns max(t_p, |w_c|)

holds the outcome of all swaps at once, and swapping p and q of two groups gains
T[p, q] − T[p, p] + T[q, p] − T[q, q].
"""

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.paths import map_named, named_leaves
from nmjax.pattern import NMPattern

# Additions that one round of swaps may take: about 0.2 s on a core. A weight that needs
# more has the swaps of a random part of its groups tried in each round.
_WORK_PER_ROUND = 2**31


@dataclasses.dataclass(frozen=True, eq=False)
class Permutation:
    """An order of the channels of a weight.

    Attributes:
      order: int, (channels,): channel `order[i]` comes to place i, as in
        `jnp.take(w, order, axis)`.
      before: Share of Σ|w| that the N:M mask keeps in the original order.
      after: The share that it keeps in this order; never less.
      seconds: Time that the search took so far.
      finished: Whether the search ended by itself, not by its time limit: only then do
        weight and seed alone decide the result.
    """

    order: np.ndarray
    before: float
    after: float
    seconds: float
    finished: bool


def search_permutation(
    w: Any,
    pattern: str | NMPattern,
    *,
    axis: int = -2,
    seed: int = 0,
    escapes: int = 8,
    max_seconds: float = 30.0,
    on_progress: Callable[[Permutation], None] | None = None,
) -> Permutation:
    """Looks for an order of the channels in which an N:M mask keeps more magnitude.

    Each round makes the best swaps of two channels, none in the same group, until no
    swap gains anything. Then some groups are shuffled and the search goes on from
    there: `escapes` times, each kept only if it ends better.

    Args:
      w: Weight of any rank and real dtype.
      pattern: n kept of every m.
      axis: The axis that groups run along, which holds the channels to permute.
      seed: Decides the shuffles.
      escapes: How many times to leave an order that no swap improves.
      max_seconds: Time limit, looked at after each round; the best order so far is
        the result.
      on_progress: Called after each round with the best order so far; may raise to
        stop.

    Returns:
      The best order found, at worst the original one.

    Raises:
      ValueError: m does not divide the axis, a weight is not finite, or an option is
        out of range.
    """
    start = time.monotonic()
    pattern, axis = NMPattern(pattern), operator.index(axis)
    a = _magnitudes(w, pattern, axis)
    if escapes < 0 or not max_seconds >= 0:
        raise ValueError(f"{escapes=} and {max_seconds=} must be at least 0")
    total = a.sum(dtype=np.float64)
    order = np.arange(len(a)).reshape(-1, pattern.m)
    original = best = _kept(a[order], pattern.n)

    def result(finished: bool) -> Permutation:
        return Permutation(
            order=order.ravel().copy(),
            before=float(original / total) if total else 1.0,
            after=float(best / total) if total else 1.0,
            seconds=time.monotonic() - start,
            finished=finished,
        )

    for kept, groups in _local_searches(a, order, pattern, seed, escapes):
        if kept > best:
            best, order = kept, groups.copy()
        if on_progress is not None:
            on_progress(result(False))
        if time.monotonic() - start >= max_seconds:
            return result(False)
    return result(True)


def _magnitudes(w: Any, pattern: NMPattern, axis: int) -> np.ndarray:
    """|w| as float32, (channels, everything else)."""
    w = np.asarray(w)
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis {axis} is out of range for a weight of shape {w.shape}")
    if w.shape[axis] % pattern.m:
        raise ValueError(
            f"axis {axis} of shape {w.shape} has size {w.shape[axis]}, not a multiple "
            f"of m = {pattern.m} (pattern {pattern}): it has no groups to permute"
        )
    a = np.moveaxis(np.abs(w.astype(np.float32)), axis, 0).reshape(w.shape[axis], -1)
    if not np.isfinite(a).all():
        raise ValueError("the weight holds NaN or infinity: no order keeps more of it")
    return a


def _kept(values: np.ndarray, n: int) -> float:
    """Σ of the n largest of axis 1 of (groups, m, columns), in float64."""
    first = values.shape[1] - n
    return np.partition(values, first, axis=1)[:, first:].sum(dtype=np.float64)


def _local_searches(
    a: np.ndarray, groups: np.ndarray, pattern: NMPattern, seed: int, escapes: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields what is kept and the groups, (groups, m), after each round of swaps."""
    n, m, number = pattern.n, pattern.m, len(groups)
    if n == m or number < 2:
        return
    rng = np.random.default_rng(seed)
    window = int(math.sqrt(_WORK_PER_ROUND / max(1, a.shape[1]))) // m
    window = min(max(2, window), number)
    # Windows without a gain in a row after which most pairs of groups have been tried.
    patience = 1 if window == number else 2 * math.ceil(number / window) ** 2
    best, best_groups = _kept(a[groups], n), groups
    for attempt in range(1 + escapes):
        groups = best_groups.copy()
        if attempt:
            _shuffle(groups, rng)
        kept, idle = _kept(a[groups], n), 0
        while idle < patience:
            part = np.sort(rng.permutation(number)[:window])
            gain = _swap(a, groups, part, n)
            kept, idle = kept + gain, 0 if gain > 0 else idle + 1
            yield kept, groups
        if kept > best:
            best, best_groups = kept, groups


def _shuffle(groups: np.ndarray, rng: np.random.Generator) -> None:
    """Deals out the channels of one group in 16, at least two, anew; in place."""
    chosen = rng.permutation(len(groups))[: max(2, len(groups) // 16)]
    groups[chosen] = rng.permutation(groups[chosen].ravel()).reshape(len(chosen), -1)


def _swap(a: np.ndarray, groups: np.ndarray, part: np.ndarray, n: int) -> float:
    """Makes the best swaps between the groups `part`, each in at most one; in place.

    Returns:
      What is kept more than before, in float64: 0.0 where no swap gains.
    """
    number, m = len(part), groups.shape[1]
    values = a[groups[part]]  # (part, m, columns)
    ascending = np.sort(values, axis=1)
    hi, lo = ascending[:, m - n, None], ascending[:, m - n - 1, None]
    others = np.where(values >= hi, lo, hi)  # t, (part, m, columns)
    flat = (number * m, -1)
    outcome = np.array(_max_sums(others.reshape(flat), values.reshape(flat)))
    outcome -= np.diag(outcome)[:, None].copy()
    gain = (outcome + outcome.T).reshape(number, m, number, m)
    gain = gain.transpose(0, 2, 1, 3).reshape(number, number, m * m)
    best, where = gain.max(-1), gain.argmax(-1)

    pairs = np.argwhere(np.triu(best > 0, 1))
    by_gain = np.argsort(-best[tuple(pairs.T)], kind="stable")
    free, total = np.ones(number, bool), 0.0
    for g, h in pairs[by_gain]:
        if not (free[g] and free[h]):
            continue
        i, j = divmod(int(where[g, h]), m)
        pair = groups[part[[g, h]]]
        before = _kept(a[pair], n)
        pair[0, i], pair[1, j] = pair[1, j], pair[0, i]
        exact = _kept(a[pair], n) - before
        if exact > 0:  # float32 may have seen a gain where there is none
            groups[part[[g, h]]] = pair
            free[[g, h]] = False
            total += exact
    return total


@jax.jit
def _max_sums(t: jax.Array, a: jax.Array) -> jax.Array:
    """T[p, c] = Σ_columns max(t_p, a_c); XLA fuses it, without the third axis."""
    return jnp.maximum(t[:, None], a[None]).sum(-1)


@dataclasses.dataclass(frozen=True)
class Link:
    """The channels between two layers of a chain: who makes them, who contracts them.

    Everything that has an entry for each of the channels must be named: permuting half
    of it changes the network.

    Attributes:
      producers: Paths of all arrays whose last axis is the channels: kernel and bias of
        the layer that makes them; scale, bias, mean and var of a batch norm behind it;
        depthwise kernels `(h, w, 1, channels)`.
      consumers: Paths of all kernels that contract them.
      axis: The axis of the consumers that is the channels.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    axis: int = -2

    def __post_init__(self):
        """Makes tuples of single paths and lists, and refuses empty ones."""
        for name in ("producers", "consumers"):
            value = getattr(self, name)
            paths = (value,) if isinstance(value, str) else tuple(value)
            if not paths:
                raise ValueError(f"a link needs {name}")
            object.__setattr__(self, name, paths)


def permute_chain(
    params: Any,
    links: Sequence[Link],
    pattern: str | NMPattern,
    *,
    seed: int = 0,
    escapes: int = 8,
    max_seconds: float = 30.0,
    on_progress: Callable[[Link, Permutation], None] | None = None,
    verify: Callable[[Any], Any] | None = None,
) -> tuple[Any, dict[Link, Permutation]]:
    """Permutes the channels between layers so that N:M masks keep more magnitude.

    A parameter tree does not tell how its layers are connected; the links do, and are
    taken at their word. Channels that go elsewhere too (a residual connection, a
    concatenation), and a group norm, which ties neighbouring channels, make a
    permutation impossible: `verify` finds that out.

    Args:
      params: Any tree of named arrays that holds all paths of the links: parameters, or
        all variables, such as `{"params": …, "batch_stats": …}`.
      links: The channels to permute.
      pattern: n kept of every m.
      seed, escapes: As in `search_permutation`.
      max_seconds: Time limit of all links together, shared evenly.
      on_progress: Called with the link and its best order so far.
      verify: Maps a tree like `params` to the network's outputs for some input:
        `lambda v: model.apply(v, x)`. The permuted network must give the same.

    Returns:
      The permuted tree, and for each link its permutation.

    Raises:
      ValueError: A path is missing or named twice, sizes differ, an array with the same
        channels beside a producer is not named, or `verify` finds another function; the
        links and paths at fault are named.
    """
    leaves, links = named_leaves(params), list(links)
    _check_links(leaves, links, NMPattern(pattern))
    start, found = time.monotonic(), {}
    for i, link in enumerate(links):
        weights = [np.asarray(leaves[path], np.float32) for path in link.consumers]
        rows = [np.moveaxis(w, link.axis, 0) for w in weights]
        left = max(0.0, max_seconds - (time.monotonic() - start))
        found[link] = search_permutation(
            np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1),
            pattern,
            seed=seed,
            escapes=escapes,
            max_seconds=left / (len(links) - i),
            on_progress=on_progress and functools.partial(on_progress, link),
        )
    permuted = _apply(params, leaves, found)
    if verify is not None:
        _verify(params, leaves, permuted, found, verify)
    return permuted, found


def _check_links(leaves: dict[str, Any], links: list[Link], pattern: NMPattern) -> None:
    """Raises where the links cannot be meant."""
    for role in ("producers", "consumers"):
        seen: dict[str, Link] = {}
        for link in links:
            for path in getattr(link, role):
                if path not in leaves:
                    raise ValueError(f"no {path!r} in the tree; it has {list(leaves)}")
                if path in seen:
                    raise ValueError(
                        f"{path!r} is named twice among the {role}, for "
                        f"{seen[path].consumers} and {link.consumers}: channels have "
                        "one order, so all that contract them belong in one link"
                    )
                seen[path] = link
    for link in links:
        _check_sizes(leaves, link, pattern)


def _check_sizes(leaves: dict[str, Any], link: Link, pattern: NMPattern) -> None:
    sizes = {p: leaves[p].shape[-1] if leaves[p].ndim else 0 for p in link.producers}
    for path in link.consumers:
        if not -leaves[path].ndim <= link.axis < 0:
            raise ValueError(
                f"{path!r} of shape {leaves[path].shape} has no axis {link.axis}: a "
                "link's axis counts from the end"
            )
        sizes[path] = leaves[path].shape[link.axis]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"these do not have the same channels: {sizes} (consumers along axis "
            f"{link.axis}, producers along the last). A grouped convolution, a flatten "
            "or a concatenation in between makes this permutation impossible"
        )
    (size,) = set(sizes.values())
    if size % pattern.m:
        raise ValueError(
            f"{link.consumers} contract {size} channels, not a multiple of m = "
            f"{pattern.m} (pattern {pattern}): they have no groups to permute"
        )
    for path, leaf in leaves.items():
        beside = any(_belongs(path, producer) for producer in link.producers)
        if beside and path not in link.producers and leaf.shape[-1:] == (size,):
            raise ValueError(
                f"{path!r} belongs to the layer of {link.producers} and has "
                f"{size} channels too: name it among the producers"
            )


def _belongs(path: str, producer: str) -> bool:
    """Whether an array is a bias or statistic of the layer that holds a producer."""
    *parent, name = path.split("/")
    layer = producer.split("/")[:-1]
    # The same layer in one collection, or in two, as "params" and "batch_stats".
    same = parent == layer or (len(layer) > 1 and parent[1:] == layer[1:])
    return same and name in ("bias", "scale", "mean", "var")


def _apply(params: Any, leaves: dict[str, Any], found: dict[Link, Permutation]) -> Any:
    new = dict(leaves)
    for link, permutation in found.items():
        for path in link.producers:
            new[path] = jnp.take(new[path], permutation.order, axis=-1)
        for path in link.consumers:
            new[path] = jnp.take(new[path], permutation.order, axis=link.axis)
    return map_named(lambda path, _: new[path], params)


def _verify(params, leaves, permuted, found, verify) -> None:
    """Raises, naming the links at fault, unless the function is the same."""
    expected = verify(params)
    if _close(verify(permuted), expected):
        return
    guilty = [
        link
        for link, permutation in found.items()
        if not _close(verify(_apply(params, leaves, {link: permutation})), expected)
    ]
    raise ValueError(
        "the permuted network computes another function. The channels of these links "
        "go elsewhere too, or a layer in between does not treat channels alike: "
        f"{guilty or list(found)}"
    )


def _close(actual: Any, expected: Any) -> bool:
    """Equal up to the rounding of sums in another order, 1e-3 of the largest output."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(
        np.allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max(initial=0))
        for a, b in pairs
    )

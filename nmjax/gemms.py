"""The products that a layer computes, as values: matrix product and convolution.

A GEMM is a function linear in `x` and in `w`: a frozen dataclass that holds the static
geometry and calls the lax primitive, so that `ops.three_gemms` treats matrix products
and convolutions alike. It also knows which axes of its operands are tokens, all that
it neither contracts nor has in common with w, which is where operands other than the
weight are sparse; for a convolution, batch and output positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.magnitude import explicit_sharding, shard_size
from nmjax.pattern import NMPattern
from nmjax.tokens import joined_rows, kept_rows, spread_rows

OnRows = Callable[[jax.Array], jax.Array]


class Gemm(Protocol):
    """A hashable function, linear in each of its two arguments."""

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product."""
        ...

    def on_rows(self, change: OnRows, dy: jax.Array, x: jax.Array) -> jax.Array:
        """`dy` after a change of its matrices `(…, tokens, out)`."""
        ...

    def restore(
        self, pattern: NMPattern, x: jax.Array, dy: jax.Array
    ) -> "tuple[Gemm, jax.Array, jax.Array]":
        """The GEMM, x and dy of wgrad at fixed tokens."""
        ...

    def matrices(
        self, x: jax.Array, w: jax.Array
    ) -> tuple[jax.Array, jax.Array] | None:
        """x and w as two matrices whose product this is, if it is that."""
        ...


@dataclasses.dataclass(frozen=True)
class Dot:
    """`lax.dot_general`, the fields its arguments."""

    dimension_numbers: Any
    precision: Any
    preferred_element_type: Any

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product."""
        return lax.dot_general(
            x,
            w,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def matrices(
        self, x: jax.Array, w: jax.Array
    ) -> tuple[jax.Array, jax.Array] | None:
        """x as (tokens, k), w as (k, out), where that is their order in memory."""
        (x_contracted, w_contracted), (batch, _) = self.dimension_numbers
        count = len(x_contracted)
        plain = (
            not batch
            and x_contracted == tuple(range(x.ndim - count, x.ndim))
            and w_contracted == tuple(range(count))
            and self.precision is None
            and self.preferred_element_type in (None, x.dtype)
        )
        if not plain:
            return None
        k = math.prod(w.shape[:count])
        return x.reshape(-1, k), w.reshape(k, -1)

    def on_tokens(self, change: OnRows, x: jax.Array) -> jax.Array:
        """`x` after a change of its matrices `(…, tokens, features)`."""
        order, batch, rows = self._order(x)
        moved = _on_matrices(change, jnp.transpose(x, order), batch, batch + rows)
        return jnp.transpose(moved, [order.index(axis) for axis in range(x.ndim)])

    def on_rows(self, change: OnRows, dy: jax.Array, x: jax.Array) -> jax.Array:
        """`dy` after a change of its matrices `(…, tokens, out)`."""
        _, batch, rows = self._order(x)
        return _on_matrices(change, dy, batch, batch + rows)

    def restore(
        self, pattern: NMPattern, x: jax.Array, dy: jax.Array
    ) -> tuple["Dot", jax.Array, jax.Array]:
        """The GEMM of the kept tokens alone, whose tokens are as in `_matrices`."""
        order, batch, rows = self._order(x)
        moved, end = jnp.transpose(x, order), batch + rows
        x = kept_rows(pattern, _matrices(moved, batch, end))
        x = x.reshape(*x.shape[:-1], *moved.shape[end:])
        columns = dy.shape[end:]
        dy = joined_rows(pattern, _matrices(dy, batch, end))
        (_, w_contracted), (_, w_batch) = self.dimension_numbers
        contracted = tuple(range(x.ndim - len(w_contracted), x.ndim))
        numbers = ((contracted, w_contracted), (tuple(range(batch)), w_batch))
        gemm = dataclasses.replace(self, dimension_numbers=numbers)
        return gemm, x, dy.reshape(*dy.shape[:-1], *columns)

    def _order(self, x: jax.Array) -> tuple[tuple[int, ...], int, int]:
        """Axes of x as batch, tokens, features; how many of the first two."""
        (contracted, _), (batch, _) = self.dimension_numbers
        known = {*contracted, *batch}
        free = [axis for axis in range(x.ndim) if axis not in known]
        return (*batch, *free, *contracted), len(batch), len(free)


def _matrices(x: jax.Array, start: int, end: int) -> jax.Array:
    """`(…, tokens, columns)`: the axes from start to end, and those from end on.

    Where explicit mesh axes cut a token axis, such as a sequence, those before it stay
    apart: joined, a device would hold no slice of them. `nmjax.tokens` asks for whole
    groups on every device, which are the same either way.

    Raises:
      ValueError: They cut another column axis than the first.
    """
    cut = [i for i in range(x.ndim) if shard_size(x, i) < x.shape[i]]
    if cut and cut[-1] > end:
        raise ValueError(
            f"axis {cut[-1]} of shape {x.shape} is sharded, and this recipe takes "
            f"axes {end} to {x.ndim - 1} as the columns of one matrix: shard axis "
            f"{end} in its place, or jax.reshard this array first"
        )
    first = max([start, *(i for i in cut if i < end)])
    shape = (*x.shape[:first], math.prod(x.shape[first:end]), math.prod(x.shape[end:]))
    names = (*jax.typeof(x).sharding.spec, None)
    spec = (*names[:first], names[first] if first < end else None, names[end])
    return x.reshape(shape, out_sharding=explicit_sharding(x, spec))


def _on_matrices(change: OnRows, x: jax.Array, start: int, end: int) -> jax.Array:
    """`x` after a change of its `_matrices`."""
    changed = change(_matrices(x, start, end))
    return changed.reshape(x.shape, out_sharding=explicit_sharding(x))


@dataclasses.dataclass(frozen=True)
class Conv:
    """`lax.conv_general_dilated`, the fields its arguments."""

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: Any
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The convolution."""
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            batch_group_count=self.batch_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def matrices(
        self, x: jax.Array, w: jax.Array
    ) -> tuple[jax.Array, jax.Array] | None:
        """x as (positions, channels), w as (channels, features), of a pointwise one.

        That is a window of one position that moves by one: 44 % of the operations of
        ResNet-50. There is no kernel of other convolutions.
        """
        count = x.ndim - 2
        numbers = lax.conv_dimension_numbers(x.shape, w.shape, self.dimension_numbers)
        last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # (batch, *space, channels)
        plain = (
            numbers.lhs_spec == numbers.out_spec == last
            and numbers.rhs_spec == (x.ndim - 1, x.ndim - 2, *range(count))
            and w.shape[:count] == self.strides == (1,) * count
            and (isinstance(self.padding, str) or {*sum(self.padding, ())} == {0})
            and self.lhs_dilation in (None, (1,) * count)
            and self.feature_group_count == self.batch_group_count == 1
            and self.precision is None
            and self.preferred_element_type in (None, x.dtype)
        )
        return (x.reshape(-1, x.shape[-1]), w.reshape(w.shape[-2:])) if plain else None

    def on_rows(self, change: OnRows, dy: jax.Array, x: jax.Array) -> jax.Array:
        """`dy` after a change of its matrix `(tokens, features)`."""
        del x
        # The layout of y alone: its rank is that of x and w.
        numbers = lax.conv_dimension_numbers(dy.shape, dy.shape, self.dimension_numbers)
        batch, features, *space = numbers.out_spec
        order = (batch, *space, features)
        moved = _on_matrices(change, jnp.transpose(dy, order), 0, dy.ndim - 1)
        return jnp.transpose(moved, [order.index(axis) for axis in range(dy.ndim)])

    def restore(
        self, pattern: NMPattern, x: jax.Array, dy: jax.Array
    ) -> tuple["Conv", jax.Array, jax.Array]:
        """The same convolution: without patches, a zero dy leaves a token out."""
        spread = functools.partial(spread_rows, pattern)
        return self, x, self.on_rows(spread, dy, x)

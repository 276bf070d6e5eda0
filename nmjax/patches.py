"""Patches of images: a convolution as `patches · matrix`."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def patches_of(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
) -> jax.Array:
    """What the window of a convolution sees at each of its positions.

    By slices, which move bits on every platform; a convolution with one-hot kernels
    would round them where its precision is low.

    Args:
      x: Images `(batch, *space, channels)`.
      window: Size of the window, for each axis of space.
      strides: As in `lax.conv_general_dilated`, as the rest.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: Input dilation.
      rhs_dilation: Kernel dilation.

    Returns:
      `(batch, *out, prod(window), channels)`, positions of the window row-major.
    """
    ones = (1,) * len(window)
    stretch, dilation = lhs_dilation or ones, rhs_dilation or ones
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    size = [
        (s - 1) * d + 1 if s else 0 for s, d in zip(x.shape[1:-1], stretch, strict=True)
    ]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(size, extent, strides, padding)
    pads = [(a, b, d - 1) for (a, b), d in zip(padding, stretch, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    out = [
        (s - e) // stride + 1
        for s, e, stride in zip(x.shape[1:-1], extent, strides, strict=True)
    ]
    parts = []
    for position in itertools.product(*map(range, window)):
        start = [p * d for p, d in zip(position, dilation, strict=True)]
        end = [
            s + (o - 1) * stride + 1
            for s, o, stride in zip(start, out, strides, strict=True)
        ]
        part = lax.slice(
            x, (0, *start, 0), (x.shape[0], *end, x.shape[-1]), (1, *strides, 1)
        )
        parts.append(part)
    return jnp.stack(parts, axis=-2)

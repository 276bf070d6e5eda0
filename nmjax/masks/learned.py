"""Learned N:M masks: one logit for each pattern of each group (arXiv:2411.00288).

An N:M mask of one group is one of the C(m, n) ways to keep n of m; for 2:4 there are 6.
Each group of a weight has a logit for each of them, and gradient descent learns the
logits. With Gumbel noise g (arXiv:1611.01144) and temperature τ,

    soft = softmax((logits + g) / τ)        hard = one-hot of the largest
    mask = (hard − stop(soft) + soft) · P   P: the table of patterns, C(m, n) × m

so the forward pass reads an exact N:M mask, drawn with the probabilities
softmax(logits), and the backward pass differentiates the soft one. Evaluation takes
the most probable pattern, without noise. The table is a constant.

Logits have the shape of the weight with the axis of size k split in two,
`(…, k / m, C(m, n), …)`: the axis counted from the end, such as -2, is in the logits
the axis of the patterns.
"""

import dataclasses
import itertools
import math
import operator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.pattern import NMPattern

MAX_PATTERNS = 1000
"""Largest C(m, n): 4:8 has 70, 3:12 has 220; 8:16 would take 804 logits a weight."""

Shape = Literal["constant", "linear", "exponential"]


def patterns(pattern: str | NMPattern) -> np.ndarray:
    """All masks of one group: bool, (C(m, n), m), in lexicographic order of what stays.

    For 2:4: 1100, 1010, 1001, 0110, 0101, 0011.

    Raises:
      ValueError: There are more than `MAX_PATTERNS`.
    """
    pattern = NMPattern(pattern)
    n, m = pattern.n, pattern.m
    number = math.comb(m, n)
    if number > MAX_PATTERNS:
        raise ValueError(
            f"{pattern} has {number} masks for each group, and a learned mask needs a "
            f"logit for each: at most {MAX_PATTERNS}; choose a smaller group, or a "
            "magnitude mask"
        )
    table = np.zeros((number, m), bool)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        table[row, list(kept)] = True
    return table


def init_logits(
    shape: tuple[int, ...],
    pattern: str | NMPattern,
    *,
    axis: int = -2,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Logits that give every pattern the same probability.

    Args:
      shape: Shape of the weight.
      pattern: n kept of every m.
      axis: The axis that groups run along.
      dtype: Floating dtype of the logits.

    Returns:
      Ones, as in the paper's code, `(…, k / m, C(m, n), …)`.

    Raises:
      ValueError: m does not divide the axis, or there are too many patterns.
    """
    pattern, axis = NMPattern(pattern), operator.index(axis)
    number = len(patterns(pattern))
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is out of range for a weight of shape {shape}")
    axis %= len(shape)
    if shape[axis] % pattern.m:
        raise ValueError(
            f"axis {axis} of shape {shape} has size {shape[axis]}, not a multiple of "
            f"m = {pattern.m} (pattern {pattern}): learn the mask along another axis, "
            "or leave this weight dense"
        )
    groups = shape[axis] // pattern.m
    return jnp.ones((*shape[:axis], groups, number, *shape[axis + 1 :]), dtype)


def sample_mask(
    logits: jax.Array,
    key: jax.Array,
    pattern: str | NMPattern,
    *,
    axis: int = -2,
    temperature: float | jax.Array = 1.0,
    hard: bool = True,
) -> jax.Array:
    """A random mask whose gradient reaches the logits.

    Args:
      logits: `(…, k / m, C(m, n), …)`, see `init_logits`.
      key: PRNG key of this draw.
      pattern: The pattern of the logits.
      axis: The axis of the weight that groups run along, counted from the end.
      temperature: τ > 0, a number or a traced scalar. The lower, the nearer is the soft
        mask to the hard one, and the larger is the variance of the gradient.
      hard: Whether the value is the N:M mask (exactly 0 and 1), or the soft mask, whose
        groups sum to n.

    Returns:
      The shape of the weight and dtype of the logits. Either way its gradient is that
      of the soft mask.

    Raises:
      ValueError: The logits are not of this pattern and axis, or τ is not above 0.
    """
    table = _table(logits, pattern, axis)
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    # In 16 bits the noise has ties, and no tail: other chances than the logits'.
    dtype = logits.dtype if logits.dtype.itemsize > 2 else jnp.float32
    noisy = logits.astype(dtype) + jax.random.gumbel(key, logits.shape, dtype)
    chances = jax.nn.softmax(noisy / jnp.asarray(temperature, dtype), axis=axis)
    if hard:
        chosen = _one_hot(noisy, axis).astype(dtype)
        # soft − stop(soft) is exactly zero, so the value is exactly the one-hot.
        chances = chosen + (chances - jax.lax.stop_gradient(chances))
    return _combine(chances, table.astype(dtype), axis).astype(logits.dtype)


def best_mask(
    logits: jax.Array, pattern: str | NMPattern, *, axis: int = -2
) -> jax.Array:
    """The most probable mask of every group, for evaluation and export.

    Args:
      logits: `(…, k / m, C(m, n), …)`.
      pattern: The pattern of the logits.
      axis: The axis of the weight that groups run along, counted from the end.

    Returns:
      Bool, the shape of the weight, True = kept; ties go to the earlier pattern of
      `patterns`, which keeps the lower indices.

    Raises:
      ValueError: The logits are not of this pattern and axis.
    """
    table = _table(logits, pattern, axis)
    chosen = _one_hot(logits, axis).astype(jnp.float32)
    return _combine(chosen, table.astype(np.float32), axis) != 0


def entropy(logits: jax.Array, *, axis: int = -2) -> jax.Array:
    """Entropy of softmax(logits) in nats: log C(m, n) when uniform, 0 when decided.

    Args:
      logits: `(…, k / m, C(m, n), …)`.
      axis: The axis of the weight that groups run along, counted from the end.

    Returns:
      One number for each group, `(…, k / m, …)`.
    """
    logs = jax.nn.log_softmax(logits, axis=axis)
    # exp(−inf) · −inf is NaN, and its limit 0.
    terms = jnp.where(jnp.isneginf(logs), jnp.zeros_like(logs), jnp.exp(logs) * logs)
    return -jnp.sum(terms, axis)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """The temperature as a function of the step, as plain data.

    Attributes:
      start: τ at step 0.
      end: τ from step `steps` on; None = `start`.
      steps: Length of the way from `start` to `end`.
      shape: "constant"; "linear"; or "exponential", by the same factor at each step.
    """

    start: float = 1.0
    end: float | None = None
    steps: int = 0
    shape: Shape = "constant"

    def __post_init__(self):
        """Refuses what is no schedule."""
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be in {get_args(Shape)}, got {self.shape!r}")
        for tau in (self.start, self.start if self.end is None else self.end):
            if not (math.isfinite(tau) and tau > 0):
                raise ValueError(f"a temperature must be finite and above 0, got {tau}")
        if (self.shape == "constant") != (self.end is None):
            raise ValueError(
                f"shape={self.shape!r} and end={self.end} contradict each other: a "
                "constant temperature has no end, the others have one"
            )
        if (self.shape == "constant") != (self.steps == 0) or self.steps < 0:
            raise ValueError(
                f"steps must be 0 for a constant temperature and else at least 1, got "
                f"{self.steps} for shape={self.shape!r}"
            )

    def __call__(self, step: int | jax.Array) -> jax.Array:
        """τ at a step, which may be traced; a float32 scalar."""
        start = jnp.asarray(self.start, jnp.float32)
        if self.end is None:
            return start
        end = jnp.asarray(self.end, jnp.float32)
        part = jnp.clip(jnp.asarray(step).astype(jnp.float32) / self.steps, 0, 1)
        if self.shape == "linear":
            return start + (end - start) * part
        return start * (end / start) ** part


def _table(logits: jax.Array, pattern: str | NMPattern, axis: int) -> np.ndarray:
    """The patterns, once the logits are known to be of them."""
    table = patterns(pattern)
    if not -logits.ndim < axis < 0 or logits.shape[axis] != len(table):
        raise ValueError(
            f"logits of shape {logits.shape} are not of {NMPattern(pattern)} along "
            f"axis {axis}: axis {axis}, counted from the end, must hold {len(table)} "
            "logits for each group, and the axis before it the groups; make them with "
            "init_logits"
        )
    return table


def _one_hot(scores: jax.Array, axis: int) -> jax.Array:
    """Bool: where the first of the largest scores is."""
    best = jnp.argmax(scores, axis, keepdims=True)
    return best == jax.lax.broadcasted_iota(
        best.dtype, scores.shape, scores.ndim + axis
    )


def _combine(weights: jax.Array, table: np.ndarray, axis: int) -> jax.Array:
    """Σ_c weights[…, c, …] · table[c], with group and position joined to one axis."""
    after = weights.shape[weights.ndim + axis + 1 :]
    before = weights.shape[: weights.ndim + axis - 1]
    moved = jnp.moveaxis(weights, axis, -1)  # (…, k / m, …, C(m, n))
    masks = jnp.matmul(moved, table, precision=jax.lax.Precision.HIGHEST)
    masks = jnp.moveaxis(masks, -1, axis)  # (…, k / m, m, …)
    return masks.reshape(*before, -1, *after)

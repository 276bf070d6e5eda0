"""Adam whose second moment stops when masks begin (STEP, arXiv:2302.01172)."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

LearningRate = Callable[[jax.Array], Any]


class TwoPhaseAdamState(NamedTuple):
    """What the optimizer keeps.

    Attributes:
      count: Updates done, int32.
      mu: First moment, as the parameters.
      nu: Second moment, as the parameters; fixed from the second phase on.
      change: The last window of mean changes of nu, float32, (window,); the last one
        alone where the moment of the change is fixed in advance.
      switched_at: Updates done when the second phase began, int32; -1 before.
    """

    count: jax.Array
    mu: Any
    nu: Any
    change: jax.Array
    switched_at: jax.Array


def two_phase_adam(
    learning_rate: float | LearningRate,
    *,
    earliest: int,
    latest: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    weight_decay: float = 0.0,
) -> Any:
    """Adam with two phases: the second keeps the second moment as it is.

    Phase 1, dense:   m = b1 m + (1 − b1) g,  v = b2 v + (1 − b2) g²
                      w −= lr m̂ / (√v̂ + eps),  hats: moments over 1 − b^t
    Phase 2, sparse:  m as before, v and its hat as they were at the change

    Straight-through gradients of masked weights make v unreliable, so it is taken from
    the dense phase. The change comes where Z, the mean of |v_t − v_{t−1}| over all
    weights, is below `eps` on average over a window of 1 / (1 − b2) updates; never
    before `earliest` updates and always at `latest`. The paper takes 10 % and 50 % of
    the run; `earliest=latest` fixes the moment in advance.

    The masks begin at the same step: switch from the dense to the sparse phase of
    `nmjax.recipes.step` when `switched(opt_state)`:

        phases = nmjax.phases(rules, steps)    # with step(dense_until=s / steps)
        tx = nmjax.two_phase_adam(1e-3, earliest=s, latest=s)

    Args:
      learning_rate: A number, or a schedule of the update count.
      earliest: Fewest updates of phase 1.
      latest: Most updates of phase 1.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the root, and the threshold of the change.
      mean: Over weights: "arithmetic" (the paper's option I), or "geometric" (II).
      weight_decay: Decoupled, as AdamW's: w −= lr · weight_decay · w.

    Returns:
      An `optax.GradientTransformation` that gives complete updates, learning rate
      included. Its state is a `TwoPhaseAdamState`.

    Raises:
      ValueError: A rate is outside [0, 1), or not 1 <= earliest <= latest.
    """
    import optax

    for name, rate in (("b1", b1), ("b2", b2)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    if not 1 <= earliest <= latest:
        raise ValueError(
            f"expected 1 <= earliest <= latest updates, got {earliest} and {latest}"
        )
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f'mean must be "arithmetic" or "geometric", got {mean!r}')
    fixed = earliest == latest
    window = 1 if fixed else max(1, math.floor(1 / (1 - b2) + 1e-6))

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return TwoPhaseAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(),
            nu=zeros(),
            change=jnp.full((window,), jnp.inf, jnp.float32),
            switched_at=jnp.full((), -1, jnp.int32),
        )

    def update(updates, state, params=None):
        if weight_decay and params is None:
            raise ValueError(
                "weight decay needs the parameters: tx.update(g, s, params)"
            )
        count, second = state.count + 1, state.switched_at >= 0
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(
            lambda v, g: jnp.where(second, v, b2 * v + (1 - b2) * jnp.square(g)),
            state.nu,
            updates,
        )
        change = state.change.at[state.count % window].set(_change(nu, state.nu, mean))
        ready = (jnp.mean(change) < eps) & (count >= earliest) | (count >= latest)
        switched_at = jnp.where(second | ~ready, state.switched_at, count)

        steps_of_nu = jnp.where(second, state.switched_at, count).astype(jnp.float32)
        mu_scale = 1 / (1 - b1 ** count.astype(jnp.float32))
        nu_scale = 1 / (1 - b2**steps_of_nu)
        lr = learning_rate
        rate = lr(state.count) if callable(lr) else lr

        def step(m, v, w):
            update = (m * mu_scale) / (jnp.sqrt(v * nu_scale) + eps)
            update = update + weight_decay * w if weight_decay else update
            return (-rate * update).astype(m.dtype)

        weights = params if weight_decay else mu
        new = TwoPhaseAdamState(count, mu, nu, change, switched_at)
        return jax.tree.map(step, mu, nu, weights), new

    return optax.GradientTransformation(init, update)


def switched(opt_state: Any) -> jax.Array:
    """Whether the second phase has begun: bool scalar.

    Args:
      opt_state: State of `two_phase_adam`, or of an optimizer around it: `optax.chain`,
        `optax.MultiSteps`, `nnx.Optimizer(...).opt_state`.

    Raises:
      ValueError: It does not hold exactly one `TwoPhaseAdamState`.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_own)
    found = [leaf for leaf in leaves if _is_own(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"expected one TwoPhaseAdamState in the optimizer's state, found "
            f"{len(found)} in {type(opt_state).__name__}: give the state of an "
            "optimizer with nmjax.two_phase_adam (of nnx optimizer.opt_state), and of "
            "several the part to ask"
        )
    (switched_at,) = jax.tree.leaves(found[0].switched_at)  # nnx: in a Variable
    return switched_at >= 0


def _is_own(state: Any) -> bool:
    return isinstance(state, TwoPhaseAdamState)


def _change(new: Any, old: Any, mean: str) -> jax.Array:
    """Z: the mean of |v_t − v_{t−1}| over all weights."""
    changes = [
        jnp.abs(a - b).astype(jnp.float32)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]
    size = sum(change.size for change in changes)
    if mean == "arithmetic":
        return sum(map(jnp.sum, changes), jnp.zeros((), jnp.float32)) / size
    logs = [jnp.sum(jnp.log(change)) for change in changes]
    return jnp.exp(sum(logs, jnp.zeros((), jnp.float32)) / size)

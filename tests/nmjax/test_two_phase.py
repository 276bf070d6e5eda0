"""STEP's optimizer against its equations in NumPy, and against optax in phase 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax

LR, B1, B2, EPS = 0.1, 0.9, 0.8, 1e-8


def gradients(steps):
    rng = np.random.default_rng(0)
    return [
        {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": np.float32(rng.normal())}
        for _ in range(steps)
    ]


def run(tx, grads, params):
    state = tx.init(params)
    step = jax.jit(tx.update)
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def reference(grads, params, switch, weight_decay=0.0):
    """The algorithm, with v and its bias correction fixed after `switch` updates."""
    w = {k: np.array(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for t, g in enumerate(grads, start=1):
        last = min(t, switch)
        for k in w:
            m[k] = B1 * m[k] + (1 - B1) * g[k]
            if t <= switch:
                v[k] = B2 * v[k] + (1 - B2) * g[k] ** 2
            hat_m, hat_v = m[k] / (1 - B1**t), v[k] / (1 - B2**last)
            w[k] = w[k] - LR * (hat_m / (np.sqrt(hat_v) + EPS) + weight_decay * w[k])
    return w


PARAMS = {"a": np.ones((3, 2), np.float32), "b": np.float32(2)}


def adam(**options):
    return nmjax.two_phase_adam(LR, b1=B1, b2=B2, eps=EPS, **options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_phases_are_the_algorithm(weight_decay):
    grads = gradients(12)
    tx = adam(earliest=5, latest=5, weight_decay=weight_decay)
    params, state = run(tx, grads, PARAMS)
    expected = reference(grads, PARAMS, 5, weight_decay)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5)
    assert int(state.switched_at) == 5
    assert nmjax.switched(state)


def test_the_first_phase_is_adam():
    grads = gradients(6)
    params, state = run(adam(earliest=100, latest=100), grads, PARAMS)
    expected, _ = run(optax.adam(LR, B1, B2, EPS), grads, PARAMS)
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
    assert not nmjax.switched(state)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_the_change_comes_when_the_second_moment_rests(mean):
    """Equal gradients: v tends to g², and Z = (1 − b2) b2^(t−1) g² after t updates."""
    eps, window = 1e-3, 5  # 1 / (1 - 0.8)
    tx = nmjax.two_phase_adam(
        LR, b1=B1, b2=B2, eps=eps, mean=mean, earliest=1, latest=1000
    )
    change = [(1 - B2) * B2 ** (t - 1) for t in range(1, 100)]
    expected = next(
        t for t in range(window, 100) if np.mean(change[t - window : t]) < eps
    )
    grads = [{"a": np.ones((2, 2), np.float32)}] * (expected + 2)
    _, state = run(tx, grads, {"a": np.zeros((2, 2), np.float32)})
    assert int(state.switched_at) == expected
    _, before = run(tx, grads[: expected - 1], {"a": np.zeros((2, 2), np.float32)})
    assert not nmjax.switched(before)


def test_the_bounds_hold():
    grads = [{"a": np.ones((2,), np.float32)}] * 30
    start = {"a": np.zeros((2,), np.float32)}
    late = nmjax.two_phase_adam(LR, b2=0.5, eps=10.0, earliest=20, latest=25)
    _, state = run(late, grads, start)
    assert int(state.switched_at) == 20  # Z is below eps long before
    never = nmjax.two_phase_adam(LR, b2=0.5, eps=0.0, earliest=20, latest=25)
    _, state = run(never, grads, start)
    assert int(state.switched_at) == 25  # Z never is


def test_a_schedule_counts_updates():
    schedule = lambda count: jnp.where(count < 2, 0.0, 0.1)  # noqa: E731
    tx = nmjax.two_phase_adam(schedule, earliest=9, latest=9)
    params, _ = run(tx, gradients(2), PARAMS)
    np.testing.assert_array_equal(params["a"], PARAMS["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"earliest": 0, "latest": 5}, "1 <= earliest <= latest updates, got 0 and 5"),
        ({"earliest": 6, "latest": 5}, "got 6 and 5"),
        ({"earliest": 1, "latest": 1, "b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"earliest": 1, "latest": 1, "mean": "median"}, "got 'median'"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nmjax.two_phase_adam(LR, **options)


def test_weight_decay_needs_the_parameters():
    tx = adam(earliest=1, latest=1, weight_decay=0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.multi_transform(
            {"ours": tx, "sgd": optax.sgd(0.1)}, {"a": "ours", "b": "sgd"}
        ),
        lambda tx: optax.inject_hyperparams(
            lambda lr: nmjax.two_phase_adam(lr, earliest=3, latest=3)
        )(lr=LR),
        lambda tx: optax.apply_if_finite(tx, 2),
    ],
    ids=["chain", "steps", "masked", "multi", "inject", "finite"],
)
def test_the_state_is_found_in_that_of_an_optimizer(around):
    tx, grads = around(adam(earliest=3, latest=3)), gradients(3)
    _, before = run(tx, grads[:2], PARAMS)
    _, after = run(tx, grads, PARAMS)
    assert not nmjax.switched(before)
    assert nmjax.switched(after)


def test_the_state_is_found_in_that_of_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip(1.0), adam(earliest=1, latest=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert not nmjax.switched(optimizer.opt_state)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert nmjax.switched(optimizer.opt_state)


@pytest.mark.parametrize("number", [0, 2])
def test_a_state_without_one_or_with_several_is_refused(number):
    tx = optax.chain(*[adam(earliest=3, latest=3)] * number, optax.clip(1.0))
    with pytest.raises(ValueError, match=rf"found {number} in tuple: .*two_phase_adam"):
        nmjax.switched(tx.init(PARAMS))

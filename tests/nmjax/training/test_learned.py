"""Learned masks (arXiv:2411.00288) in the trainer."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import nmjax
from nmjax.__main__ import main
from nmjax.masks.learned import patterns
from nmjax.training import evaluate, restore, steps, train
from nmjax.training.state import (
    jit_enter_phase,
    jit_new_train_state,
    make_phases,
    new_train_state,
)
from tests.nmjax.training.fakes import (
    Crash,
    FakeData,
    Net,
    config,
    crash_at,
    numpy_init,
)

DATA = FakeData()
LEARNED = nmjax.recipes.learned(
    "2:4", temperature=nmjax.Temperature(4.0, 0.5, steps=8, shape="linear")
)
RULES = [nmjax.Rule("stem|head", None), nmjax.Rule(".*", LEARNED)]
SETTINGS = config(epochs=2, lr=1.0, momentum=0.5, weight_decay=0.1)


class Mlp(nn.Module):
    """Four layers, of which `conv` and `fc` get learned masks: quick to compile."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        for name in ("stem", "conv", "fc"):
            x = nn.relu(nn.Dense(8, kernel_init=numpy_init, name=name)(x))
        return nn.Dense(10, kernel_init=numpy_init, name="head")(x)


def run(run_dir, data=None):
    data = data or FakeData()
    return train(Net(), RULES, data, SETTINGS, run_dir, progress=False)


def phases_of(settings, *, rules=RULES, devices=1):
    return make_phases(
        Mlp(),
        rules,
        settings,
        steps_per_epoch=4,
        image_shape=DATA.image_shape,
        mesh=steps.data_mesh(jax.devices()[:devices]),
    )


@functools.lru_cache
def variables():
    images = jnp.zeros((1, *DATA.image_shape))
    variables = jax.device_get(Mlp().init(jax.random.key(0), images, train=False))
    return {"batch_stats": {}, **variables}


def one_step(phase, state):
    batch = {"image": DATA.images[:16], "label": DATA.labels[:16]}
    return steps.jit_train_step(phase)(
        jax.device_put(jax.device_get(state), steps.replicated(phase.mesh)),
        steps.put_batch(batch, phase.mesh),
        jax.random.key(7),
    )


def bits(x):
    return np.asarray(x).view(np.uint32)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def most_probable(logits):
    """The mask of logits (groups, patterns, out), by its definition."""
    logits = np.asarray(logits)
    chosen = np.asarray(patterns(nmjax.NMPattern("2:4")))[np.argmax(logits, axis=-2)]
    mask = np.moveaxis(chosen, -1, -2)  # (groups, m, out)
    return mask.reshape(*mask.shape[:-3], -1, mask.shape[-1]).astype(bool)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    return run_dir, run(run_dir)


@pytest.mark.slow
def test_weights_under_learned_masks_keep_their_bits(whole):
    """Momentum and weight decay included; all other parameters and logits train."""
    state, images = whole[1].state, jnp.zeros((1, *DATA.image_shape))
    first = Net().init(jax.random.key(SETTINGS.seed), images, train=False)
    for layer in ("conv", "fc"):
        np.testing.assert_array_equal(
            bits(state.params[layer]["kernel"]), bits(first["params"][layer]["kernel"])
        )
        assert np.ptp(state.nm_logits[layer]["kernel"]) > 0  # all equal at first
        assert np.any(state.params[layer]["bias"] != first["params"][layer]["bias"])
    for layer in ("stem", "head"):
        moved = state.params[layer]["kernel"] != first["params"][layer]["kernel"]
        assert np.all(moved)
    moved = state.batch_stats["BatchNorm_0"]["mean"] != 0
    assert np.any(moved)


@pytest.mark.slow
def test_masks_are_the_most_probable_ones(whole):
    found = restore(whole[0])
    for layer in ("conv", "fc"):
        np.testing.assert_array_equal(
            found["masks"][layer]["kernel"]["mask"],
            most_probable(found["nm_logits"][layer]["kernel"]),
        )
    nmjax.check(found["params"], found["plan"], found["masks"])


@pytest.mark.slow
def test_evaluation_draws_nothing(whole):
    run_dir, result = whole
    found = restore(run_dir)
    first = evaluate(Net(), found["plan"], found, DATA, 16)
    assert first == evaluate(Net(), found["plan"], found, DATA, 16)
    np.testing.assert_allclose(first["loss"], result.test_loss, rtol=1e-6)
    logits = found["nm_logits"]
    baked = nmjax.bake(found["params"], found["plan"], found["nm"], logits=logits)
    dense = {"params": baked, "batch_stats": found["batch_stats"]}
    baked = evaluate(Net(), [], dense, DATA, 16)
    np.testing.assert_allclose(first["loss"], baked["loss"], rtol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, data=FakeData(at_step=crash_at(6)))
    assert restore(tmp_path)["step"] == 4
    resumed = run(tmp_path)
    assert_same(resumed.state, whole[1].state)
    items = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints/8/nm_logits")
    assert_same(items, whole[1].state.nm_logits)


def test_temperature_follows_the_step(whole):
    temperature = LEARNED.temperature
    for step in (4, 8):
        entry = restore(whole[0], step)["nm"]["fc"]["kernel"]
        np.testing.assert_allclose(entry["temperature"].item(), temperature(step))


def test_the_command_checks_masks_against_logits(whole, capsys, monkeypatch):
    assert main(["check", str(whole[0])]) == 0
    found = restore(whole[0])
    logits = found["nm_logits"]["fc"]["kernel"]
    found["nm_logits"]["fc"]["kernel"] = np.roll(logits, 1, axis=-2)
    monkeypatch.setattr("nmjax.training.restore", lambda *_: found)
    assert main(["check", str(whole[0])]) == 1
    assert "differ from the mask of the logits" in capsys.readouterr().out
    found["nm_logits"] = {}
    assert main(["check", str(whole[0])]) == 1
    assert "has no logits for it" in capsys.readouterr().out


def test_a_checkpoint_without_logits_is_refused(whole, tmp_path):
    run_dir = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints/8/nm_logits")
    with pytest.raises(nmjax.training.DamagedCheckpointError, match="nm_logits"):
        restore(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_reaches_neither_logits_nor_their_weights(optimizer):
    """A head of zeros: no gradient reaches the layers below, so nothing moves them."""
    settings = config(optimizer=optimizer, weight_decay=0.5, lr=0.1)
    (phase,) = phases_of(settings)
    given = jax.tree.map(np.array, variables())
    given["params"]["head"]["kernel"] *= 0
    given["params"]["fc"]["kernel"][:2] = -0.0
    state = jax.device_get(jit_new_train_state(phase)(given))
    rng = np.random.default_rng(0)
    logits = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), state.nm_logits
    )
    after, _ = one_step(phase, state.replace(nm_logits=logits))
    assert_same(after.nm_logits, logits)
    kernel = given["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(bits(after.params["fc"]["kernel"]), bits(kernel))
    assert np.any(after.params["stem"]["kernel"] != given["params"]["stem"]["kernel"])


@pytest.mark.slow
def test_devices_do_not_change_a_step():
    results = []
    for devices in (1, 4):
        (phase,) = phases_of(config(micro_batches=2), devices=devices)
        results.append(one_step(phase, jit_new_train_state(phase)(variables()))[0])
    a, b = (jax.device_get(state.nm_logits) for state in results)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.ptp(x) > 0
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.slow
def test_weights_may_train_too():
    recipe = nmjax.recipes.learned("2:4", train_weights=True)
    (phase,) = phases_of(config(), rules=[RULES[0], nmjax.Rule(".*", recipe)])
    after, _ = one_step(phase, jit_new_train_state(phase)(variables()))
    kernel = variables()["params"]["fc"]["kernel"]
    assert np.any(after.params["fc"]["kernel"] != kernel)


@pytest.mark.slow
def test_phases_of_another_rule_leave_logits_and_temperature():
    gradual = nmjax.recipes.sr_ste("2:4", schedule=nmjax.Schedule(freeze_from=0.5))
    rules = [RULES[0], nmjax.Rule("fc", gradual), nmjax.Rule(".*", LEARNED)]
    first, second = phases_of(config(), rules=rules)
    state = jax.device_get(jit_new_train_state(first)(variables()))
    state, _ = one_step(first, state)
    before = jax.device_get(state)
    after = jax.device_get(jit_enter_phase(first, second)(state))
    for name in ("params", "nm_logits", "opt_state", "logits_opt_state", "masks"):
        assert_same(getattr(after, name), getattr(before, name))
    assert_same(after.nm["conv"], before.nm["conv"])
    shapes = jax.eval_shape(functools.partial(new_train_state, second), variables())
    assert jax.tree.structure(shapes) == jax.tree.structure(after)


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        ({"dense_epochs": 1}, nmjax.Schedule()),
        ({"freeze_epochs": 1}, nmjax.Schedule()),
        ({}, nmjax.Schedule(dense_until=0.25)),
        ({}, nmjax.Schedule(dense_from=0.75)),
    ],
)
def test_phases_are_refused(changes, schedule):
    recipe = nmjax.recipes.learned("2:4", schedule=schedule)
    rules = [RULES[0], nmjax.Rule(".*", recipe)]
    with pytest.raises(ValueError, match="during the whole run: leave out"):
        phases_of(config(**changes), rules=rules)

"""STEP (arXiv:2302.01172) in the trainer: recipe `step`, optimizer "step_adam"."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import nmjax
from nmjax.training import restore, steps, train
from nmjax.training.checkpoint import read_item, read_meta
from nmjax.training.state import (
    jit_new_train_state,
    make_optimizer,
    make_phases,
    make_schedule,
)
from tests.nmjax.training.fakes import Crash, FakeData, config, crash_at, numpy_init

DATA = FakeData()
STEP = nmjax.recipes.step("2:4", dense_until=0.5)
RULES = [nmjax.Rule("head", None), nmjax.Rule(".*", STEP)]
SETTINGS = config(epochs=2, optimizer="step_adam", lr=0.01, checkpoint_every=1, keep=9)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(8, kernel_init=numpy_init, name="fc")(x))
        return nn.Dense(10, kernel_init=numpy_init, name="head")(x)


def run(run_dir, data=None):
    data = data or FakeData()
    return train(Mlp(), RULES, data, SETTINGS, run_dir, progress=False)


def phases_of(settings, rules=RULES):
    return make_phases(
        Mlp(),
        rules,
        settings,
        steps_per_epoch=4,
        image_shape=DATA.image_shape,
        mesh=steps.data_mesh(jax.devices()[:1]),
    )


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    return run_dir, run(run_dir)


def second_moment(run_dir, step):
    """`nu` of the checkpoint of a step, and the number of updates at its end."""
    folder = run_dir / "checkpoints" / str(step)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        read_item(folder, "opt_state", read_meta(folder))
    )
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
    }
    moment = [x for path, x in named.items() if "/nu/" in path]
    (switched,) = (x for path, x in named.items() if path.endswith("switched_at"))
    return moment, int(switched)


def test_the_second_moment_stops_where_masks_begin(whole):
    """Four dense steps, four sparse ones."""
    assert [restore(whole[0], s)["phase"] for s in (4, 5)] == ["dense", "sparse"]
    (third, none), (last, at), (end, still) = (
        second_moment(whole[0], step) for step in (3, 4, 8)
    )
    assert (none, at, still) == (-1, 4, 4)
    assert any(np.any(a != b) for a, b in zip(third, last, strict=True))
    assert len(end) == 4
    assert_same(last, end)


def test_masks_hold_at_the_end(whole):
    found = restore(whole[0])
    nmjax.check(found["params"], found["plan"], found["masks"])
    assert [e.path for e in found["plan"].sparse] == ["fc/kernel"]


@pytest.mark.parametrize("step", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, step):
    with pytest.raises(Crash):
        run(tmp_path, FakeData(at_step=crash_at(step)))
    assert restore(tmp_path)["step"] == step
    assert_same(run(tmp_path).state, whole[1].state)


def test_the_dense_start_is_adamw():
    settings = config(optimizer="step_adam", weight_decay=0.1, lr=0.01)
    dense = phases_of(settings)[0]
    images = jnp.zeros((1, *DATA.image_shape))
    params = jax.device_get(Mlp().init(jax.random.key(0), images, train=False))
    state = jit_new_train_state(dense)({"batch_stats": {}, **params})
    params = params["params"]
    ours = make_optimizer(dense)
    theirs = optax.adamw(make_schedule(settings, 4), weight_decay=0.1)
    a, b = state.opt_state, theirs.init(params)
    for factor in (1.0, -0.3):
        grads = jax.tree.map(lambda w, f=factor: f * np.cos(w), params)
        ups, a = jax.jit(ours.update)(grads, a, params, nm={})
        expected, b = jax.jit(theirs.update)(grads, b, params)
        for x, y in zip(jax.tree.leaves(ups), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("recipe", [None, nmjax.recipes.sr_ste("2:4")])
def test_a_run_without_a_dense_start_is_refused(recipe):
    with pytest.raises(ValueError, match="no layer of this run turns sparse after one"):
        phases_of(SETTINGS, [nmjax.Rule(".*", recipe)])


def test_dense_epochs_are_a_dense_start():
    settings = config(optimizer="step_adam", dense_epochs=1)
    phases = phases_of(settings, [nmjax.Rule(".*", nmjax.recipes.sr_ste("2:4"))])
    assert [(p.name, p.sparse_from) for p in phases] == [("dense", 4), ("sparse", 4)]

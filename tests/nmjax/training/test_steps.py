import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.training import steps
from nmjax.training.state import (
    jit_enter_phase,
    jit_new_train_state,
    make_optimizer,
    make_phases,
    make_schedule,
    new_train_state,
    phase_of_step,
)
from tests.nmjax.training.fakes import RULES, FakeData, Net, config

DATA = FakeData()


def phases_of(settings, *, devices=1, rules=RULES, model=None):
    return make_phases(
        model or Net(),
        rules,
        settings,
        steps_per_epoch=4,
        image_shape=DATA.image_shape,
        mesh=steps.data_mesh(jax.devices()[:devices]),
    )


@functools.lru_cache
def variables_of(model=None):
    images = jnp.zeros((1, *DATA.image_shape))
    variables = jax.jit(functools.partial((model or Net()).init, train=False))(
        jax.random.key(0), images
    )
    return jax.device_get({"batch_stats": {}, **variables})


def one_step(phase, state, batch):
    put = steps.put_batch(batch, phase.mesh)
    # By way of the host: the step donates its state, and tests use theirs again.
    put_state = jax.device_put(jax.device_get(state), steps.replicated(phase.mesh))
    return steps.jit_train_step(phase)(put_state, put, jax.random.key(7))


def batch_of(size=16):
    return {"image": DATA.images[:size], "label": DATA.labels[:size]}


def magnitude_mask(w):
    """2:4 along axis -2 by the definition: the two largest of every four."""
    w = np.moveaxis(np.abs(np.asarray(w)), -2, -1)
    groups = w.reshape(*w.shape[:-1], -1, 4)
    order = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros_like(groups, bool)
    np.put_along_axis(mask, order[..., :2], True, axis=-1)
    return np.moveaxis(mask.reshape(w.shape), -1, -2)


def split_phase(devices, micro_batches, loss_scale):
    """One step of a network without batch norm, whose statistics a split changes."""
    settings = config(
        momentum=0.0,
        weight_decay=0.0,
        lr=0.5,
        label_smoothing=0.1,
        micro_batches=micro_batches,
        loss_scale=loss_scale,
    )
    (phase,) = phases_of(settings, devices=devices, model=Net(batch_norm=False))
    return phase


SPLITS = [
    (1, 1, 1.0),
    (4, 4, 1024.0),
    pytest.param(4, 1, 1.0, marks=pytest.mark.slow),
    pytest.param(1, 4, 1.0, marks=pytest.mark.slow),
    pytest.param(1, 1, 1024.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("devices", "micro_batches", "loss_scale"), SPLITS)
def test_decay_of_a_weight_is_the_same_however_the_step_is_split(
    devices, micro_batches, loss_scale
):
    """It is lr * decay * (1 - mask) * w, once for each optimizer step."""
    phase = split_phase(devices, micro_batches, loss_scale)
    variables = copy.deepcopy(variables_of(Net(batch_norm=False)))
    # A head of zeros: the layers below receive no gradient but the decay.
    variables["params"]["head"]["kernel"] *= 0
    state = jit_new_train_state(phase)(variables)
    after, _ = one_step(phase, state, batch_of())
    for layer in ("conv", "fc"):
        w = variables["params"][layer]["kernel"]
        expected = w - 0.5 * 1e-2 * np.where(magnitude_mask(w), 0, w)
        np.testing.assert_allclose(after.params[layer]["kernel"], expected, rtol=1e-6)
    stem = variables["params"]["stem"]["kernel"]
    np.testing.assert_array_equal(after.params["stem"]["kernel"], stem)


@pytest.mark.parametrize(("devices", "micro_batches", "loss_scale"), SPLITS[1:])
def test_a_step_is_the_same_however_it_is_split(devices, micro_batches, loss_scale):
    results = []
    for split in [(1, 1, 1.0), (devices, micro_batches, loss_scale)]:
        phase = split_phase(*split)
        state = jit_new_train_state(phase)(variables_of(Net(batch_norm=False)))
        results.append(one_step(phase, state, batch_of()))
    (a, metrics_a), (b, metrics_b) = results
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5)


def test_loss_and_accuracy_are_those_of_the_masked_network():
    phase, model = split_phase(1, 1, 1.0), Net(batch_norm=False)
    variables = variables_of(model)
    state = jit_new_train_state(phase)(variables)
    _, metrics = one_step(phase, state, batch_of())

    params = dict(variables["params"])
    for layer in ("conv", "fc"):
        kernel = params[layer]["kernel"]
        kernel = np.where(magnitude_mask(kernel), kernel, 0)
        params[layer] = {**params[layer], "kernel": kernel}
    batch = batch_of()
    logits = model.apply({"params": params}, batch["image"], train=True)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(10)[batch["label"]] * 0.9 + 0.1 / 10
    ranks = (logits > logits[np.arange(16), batch["label"], None]).sum(-1)
    np.testing.assert_allclose(metrics["loss"], -(target * log_p).sum(-1).mean(), 1e-5)
    np.testing.assert_allclose(metrics["top1"], np.mean(ranks == 0))
    np.testing.assert_allclose(metrics["top5"], np.mean(ranks < 5))


def test_sad_counts_the_mask_bits_that_the_step_changed():
    phase, _ = phases_of(config(freeze_epochs=2, lr=1.0))
    variables = variables_of()
    state = jit_new_train_state(phase)(variables)
    state, metrics = one_step(phase, state, batch_of())
    changed = [
        np.sum(
            magnitude_mask(state.params[layer]["kernel"])
            != magnitude_mask(variables["params"][layer]["kernel"])
        )
        for layer in ("conv", "fc")
    ]
    assert sum(changed) > 0
    assert metrics["sad"] == sum(changed)
    assert metrics["layer_sad"].tolist() == changed
    for layer in ("conv", "fc"):
        np.testing.assert_array_equal(
            state.masks[layer]["kernel"]["mask"],
            magnitude_mask(state.params[layer]["kernel"]),
        )


def test_evaluation_ignores_the_padding():
    (phase,) = phases_of(config())
    variables = variables_of()
    state = jit_new_train_state(phase)(variables)
    step = steps.jit_eval_step(phase.model, phase.mesh)
    _, last = DATA.test_batches(16)  # 4 images, 12 of padding
    sums = step(
        state.params, state.batch_stats, state.masks, steps.put_batch(last, phase.mesh)
    )
    baked = nmjax.bake(variables["params"], phase.plan)
    logits = Net().apply({**variables, "params": baked}, last["image"][:4], train=False)
    log_p = jax.nn.log_softmax(logits)[np.arange(4), last["label"][:4]]
    assert sums["count"] == 4
    np.testing.assert_allclose(sums["loss"], -log_p.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        sums["top1"], np.sum(np.argmax(logits, -1) == last["label"][:4])
    )


def test_few_classes_have_no_top5():
    model = Net(num_classes=5)
    (phase,) = phases_of(config(), model=model)
    state = jax.eval_shape(
        functools.partial(new_train_state, phase), variables_of(model)
    )
    step = functools.partial(steps.train_step, phase)
    _, metrics = jax.eval_shape(step, state, batch_of(), jax.random.key(0))
    assert set(metrics) == {"loss", "top1", "sad", "layer_sad"}


def test_runs_that_differ_in_the_seed_share_a_compilation():
    (a,) = phases_of(config(seed=1))
    (b,) = phases_of(config(seed=2, keep=9, log_every=9, checkpoint_every=9))
    assert a == b
    assert steps.jit_train_step(a) is steps.jit_train_step(b)
    (c,) = phases_of(config(lr=0.1))
    assert steps.jit_train_step(c) is not steps.jit_train_step(a)


def test_phases_follow_each_other():
    names = [
        [(p.name, p.first_step) for p in phases_of(config(**changes))]
        for changes in (
            {},
            {"dense_epochs": 1},
            {"freeze_epochs": 1},
            {"dense_epochs": 1, "freeze_epochs": 2},
            {"dense_epochs": 2, "freeze_epochs": 2},
        )
    ]
    assert names == [
        [("sparse", 0)],
        [("dense", 0), ("sparse", 4)],
        [("sparse", 0), ("frozen", 12)],
        [("dense", 0), ("sparse", 4), ("frozen", 8)],
        [("dense", 0), ("frozen", 8)],
    ]
    phases = phases_of(config(dense_epochs=1, freeze_epochs=2))
    found = [phase_of_step(phases, step).name for step in (0, 3, 4, 7, 8, 15)]
    assert found == ["dense", "dense", "sparse", "sparse", "frozen", "frozen"]
    assert [len(phase.plan.sparse) for phase in phases] == [0, 2, 2]


def test_dense_rules_give_one_dense_phase():
    settings = config(dense_epochs=1, freeze_epochs=1)
    (phase,) = phases_of(settings, rules=[])
    assert (phase.name, phase.first_step, phase.plan.sparse) == ("dense", 0, ())


def test_frozen_masks_are_those_in_force_and_stay():
    sparse, frozen = phases_of(config(freeze_epochs=2, lr=1.0))
    state = jit_new_train_state(sparse)(variables_of())
    state, _ = one_step(sparse, state, batch_of())
    before = jax.device_get(state.masks)
    state = jit_enter_phase(sparse, frozen)(state)
    for _ in range(2):
        state, metrics = one_step(frozen, state, batch_of())
        assert metrics["sad"] == 0
    kernel = state.params["fc"]["kernel"]
    assert (magnitude_mask(kernel) != before["fc"]["kernel"]["mask"]).any()
    for tree in (state.masks, state.nm):
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(x, y)


def test_masks_with_an_interval_change_at_it_alone():
    rules = [RULES[0], nmjax.Rule(".*", nmjax.recipes.ste("2:4", refresh=2))]
    (phase,) = phases_of(config(lr=1.0), rules=rules)
    state = jit_new_train_state(phase)(variables_of())
    sads = []
    for _ in range(4):
        state, metrics = one_step(phase, state, batch_of())
        sads.append(float(metrics["sad"]))
    assert sads[0] == sads[2] == 0
    assert sads[1] > 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_its_equations(nesterov):
    """g + decay (1-E) w, clipped, + weight decay w; m = 0.9 m + g; w -= lr m."""
    settings = config(clip_norm=0.5, nesterov=nesterov, weight_decay=0.01)
    (phase,) = phases_of(settings)
    params = variables_of()["params"]
    grads = jax.tree.map(np.ones_like, params)
    state = jit_new_train_state(phase)(variables_of())
    update, opt_state = jax.jit(make_optimizer(phase).update), state.opt_state
    masks, w = state.masks, params
    moments = jax.tree.map(np.zeros_like, params)
    for step in range(2):
        total = dict(grads)
        for layer in ("conv", "fc"):
            kernel = np.asarray(w[layer]["kernel"])
            decay = 1e-2 * np.where(masks[layer]["kernel"]["mask"], 0, kernel)
            total[layer] = {**grads[layer], "kernel": 1 + decay}
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(total)))
        clip = 0.5 / norm
        g = jax.tree.map(lambda g, x, c=clip: g * c + 0.01 * x, total, w)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, g)
        if nesterov:
            moved = jax.tree.map(lambda m, g: 0.9 * m + g, moments, g)
        else:
            moved = moments
        lr = 0.05 * (1 + np.cos(np.pi * step / 16)) / 2
        expected = jax.tree.map(lambda x, m, lr=lr: x - lr * m, w, moved)

        updates, opt_state = update(grads, opt_state, w, nm=masks)
        w = jax.tree.map(np.add, w, jax.device_get(updates))
        for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_adamw_decays_weights_apart_from_the_moments():
    settings = config(optimizer="adamw", weight_decay=0.1, lr=0.01)
    (phase,) = phases_of(settings)
    params = variables_of()["params"]
    grads = jax.tree.map(np.ones_like, params)
    state = jit_new_train_state(phase)(variables_of())
    update = jax.jit(make_optimizer(phase).update)
    updates, _ = update(grads, state.opt_state, params, nm=state.masks)
    # The first step of Adam moves each weight by lr, whatever its gradient's size.
    for x, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(u, -0.01 * (1 + 0.1 * x), rtol=1e-4)


def test_cosine_schedule_with_warmup():
    schedule = make_schedule(config(warmup_epochs=0.5, lr=0.8), steps_per_epoch=4)
    expected = [0, 0.4] + [0.4 * (1 + np.cos(np.pi * s / 14)) for s in range(15)]
    np.testing.assert_allclose([schedule(s) for s in range(17)], expected, atol=1e-6)


def test_step_schedule_with_warmup():
    settings = config(
        epochs=5, schedule="step", step_epochs=(1, 3), step_factor=0.5, warmup_epochs=2
    )
    schedule = make_schedule(settings, steps_per_epoch=2)
    # Warm-up for 4 steps; the border at step 2 is past then, that at step 6 is not.
    expected = [0, 0.0125, 0.025, 0.0375, 0.025, 0.025, 0.0125, 0.0125]
    np.testing.assert_allclose([schedule(s) for s in range(8)], expected, atol=1e-7)


def test_the_state_is_donated():
    (phase,) = phases_of(config())
    state = jit_new_train_state(phase)(variables_of())
    lowered = steps.jit_train_step(phase).lower(
        state, steps.put_batch(batch_of(), phase.mesh), jax.random.key(0)
    )
    donated = jax.tree.leaves(
        jax.tree.map(lambda x: x.donated, lowered.args_info[0][0])
    )
    assert all(donated)
    assert not any(
        jax.tree.leaves(jax.tree.map(lambda x: x.donated, lowered.args_info[0][1]))
    )


def test_config_of_a_phase_keeps_what_shapes_a_step():
    (phase,) = phases_of(config(seed=5))
    assert phase.config == dataclasses.replace(
        config(), seed=0, keep=1, log_every=1, checkpoint_every=None
    )


def test_the_schedule_of_a_recipe_makes_phases():
    schedule = nmjax.Schedule(0.25, patterns=((0.5, "2:4"),), dense_from=0.75)
    recipe = nmjax.recipes.sr_ste("3:4", schedule=schedule)
    phases = phases_of(config(), rules=[RULES[0], nmjax.Rule(".*", recipe)])
    assert [(p.name, p.first_step, len(p.plan.sparse)) for p in phases] == [
        ("dense", 0, 0),
        ("sparse", 4, 2),
        ("sparse-2", 8, 2),
        ("finish", 12, 0),
    ]
    assert [str(p.plan.sparse[0].recipe.pattern) for p in phases[1:3]] == ["3:4", "2:4"]
    state = jit_new_train_state(phases[0])(variables_of())
    for before, phase in itertools.pairwise(phases):
        state = jit_enter_phase(before, phase)(state)
        if phase.plan.sparse:
            nmjax.check(state.params, phase.plan, state.masks)
    assert state.masks == {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("two_by_four", marks=pytest.mark.slow),
        "s_ste",
        pytest.param("fst", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_other_methods(name):
    recipe = getattr(nmjax.recipes, name)()
    rules = [RULES[0], nmjax.Rule(".*", recipe)]
    phase = phases_of(config(micro_batches=2), rules=rules)[0]
    state = jit_new_train_state(phase)(variables_of())
    after, metrics = one_step(phase, state, batch_of())
    again, _ = one_step(phase, state, batch_of())
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    nmjax.check(after.params, phase.plan, after.masks)

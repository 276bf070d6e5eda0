"""When recipes act: fractions of a run, its phases, and the state across borders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import NMPattern, Recipe, Rule, Schedule, recipes

WHOLE = Schedule(
    dense_until=0.1,
    patterns=((0.2, "3:4"), (0.4, "2:4")),
    freeze_from=0.6,
    dense_from=0.8,
)


def test_json_gives_an_equal_schedule():
    again = Schedule.from_dict(json.loads(json.dumps(WHOLE.to_dict())))
    assert again == WHOLE
    assert hash(again) == hash(WHOLE)
    assert WHOLE.patterns[1] == (0.4, NMPattern("2:4"))
    with pytest.raises(ValueError, match="not a schedule"):
        Schedule.from_dict({"dense_until": 0.1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_until": -0.1}, r"fractions of the run from 0 to 1, got -0.1"),
        ({"dense_from": 1000}, "got 1000; for a step s of T write s / T"),
        ({"freeze_from": float("nan")}, "got nan"),
        ({"dense_until": True}, "got True"),
        ({"dense_until": 0.5, "dense_from": 0.5}, "leave no sparse phase"),
        ({"dense_until": 0.5, "freeze_from": 0.4}, "freeze_from=0.4"),
        ({"patterns": ((0.5, "2:4"),), "freeze_from": 0.4}, "last change of pattern"),
        ({"patterns": ((0.5, "3:4"), (0.2, "2:4"))}, "increasing fractions"),
        ({"patterns": ((0.1, "2:4"),), "dense_until": 0.1}, "above dense_until=0.1"),
        ({"patterns": ((0.1, "5:4"),)}, "N:M pattern"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_a_recipe_at_each_part_of_the_run():
    recipe = recipes.ste("4:4", schedule=WHOLE)
    found = [recipe.at(progress) for progress in (0, 0.1, 0.2, 0.4, 0.6, 0.8)]
    assert [str(r.pattern) for r in found] == [
        "None",
        "4:4",
        "3:4",
        "2:4",
        "2:4",
        "None",
    ]
    assert [r.refresh for r in found] == [1, 1, 1, 1, None, 1]
    assert found[0] == found[5] == recipes.dense()
    assert recipes.ste("2:4").at(0.999) == recipes.ste("2:4")


def test_phases_of_a_run():
    rules = [Rule("a", recipes.ste("4:4", schedule=WHOLE)), Rule("b", None)]
    found = nmjax.phases(rules, 100)
    assert [(p.name, p.first_step) for p in found] == [
        ("dense", 0),
        ("sparse", 10),
        ("sparse-2", 20),
        ("sparse-3", 40),
        ("frozen", 60),
        ("finish", 80),
    ]
    assert found[0].rules == (Rule("a", None), Rule("b", None))
    assert found[3].rules[0].recipe.pattern == NMPattern("2:4")
    assert nmjax.phases("2:4", 7)[0].first_step == 0


def test_the_papers_schedules():
    two_by_four = nmjax.phases(recipes.two_by_four(), 600)
    assert [(p.name, p.first_step) for p in two_by_four] == [
        ("sparse", 0),
        ("finish", 500),
    ]
    torchao = recipes.semi_sparse_weight(schedule=Schedule(dense_from=0.7))
    assert [p.first_step for p in nmjax.phases(torchao, 10)] == [0, 7]
    step = nmjax.phases(recipes.step("2:4", dense_until=0.25), 8)
    assert [(p.name, p.first_step) for p in step] == [("dense", 0), ("sparse", 2)]


def test_rules_with_different_schedules_share_borders():
    early = recipes.ste("2:4", schedule=Schedule(freeze_from=0.25))
    late = recipes.sr_ste("2:4", schedule=Schedule(dense_until=0.5))
    found = nmjax.phases([Rule("a", early), Rule("b", late)], 8)
    kept = [[r.recipe and r.recipe.refresh for r in p.rules] for p in found]
    assert [p.first_step for p in found] == [0, 2, 4]
    assert kept == [[1, None], [None, None], [None, 1]]
    assert found[0].rules[1].recipe is None
    # The layers that are sparse at step 2 are frozen; at step 4 another begins.
    assert [p.name for p in found] == ["sparse", "frozen", "sparse-2"]


def test_borders_that_round_to_one_step_are_one():
    recipe = recipes.ste("2:4", schedule=Schedule(0.5, freeze_from=0.51))
    assert [(p.name, p.first_step) for p in nmjax.phases(recipe, 4)] == [
        ("dense", 0),
        ("frozen", 2),
    ]
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        nmjax.phases(recipe, 0)


def test_the_schedule_survives_in_the_plan():
    params = {"kernel": jnp.ones((8, 4))}
    recipe = recipes.ste("2:4", schedule=Schedule(freeze_from=0.5))
    (sparse, _) = nmjax.phases(recipe, 4)
    plan = nmjax.plan_params(params, sparse.rules)
    again = nmjax.Plan.from_json(plan.to_json())
    assert again == plan
    assert again["kernel"].recipe.schedule.freeze_from == 0.5


def test_a_schedule_that_a_recipe_cannot_follow_is_refused():
    freeze = Schedule(freeze_from=0.5)
    for recipe in (recipes.s_ste, recipes.learned):
        with pytest.raises(ValueError, match="freeze_from needs a mask"):
            recipe("2:4", schedule=freeze)
    for patterns in (((0.5, "2:8"),), ((0.2, "1:8"), (0.5, "2:4"))):
        with pytest.raises(ValueError, match="all have one m"):
            recipes.ste("2:4", schedule=Schedule(patterns=patterns))
    with pytest.raises(ValueError, match="logits are of the combinations of one"):
        recipes.learned("3:4", schedule=Schedule(patterns=((0.5, "2:4"),)))
    with pytest.raises(ValueError, match="do not fit pattern None"):
        Recipe("dense", schedule=Schedule(patterns=((0.5, "2:4"),)))
    with pytest.raises(ValueError, match="tiles are 2:4"):
        recipes.semi_sparse_weight(schedule=Schedule(patterns=((0.5, "1:4"),)))
    with pytest.raises(ValueError, match="leave no sparse phase"):
        recipes.two_by_four().during(dense_until=0.9, freeze_from=1.0)


# The state across a border


def weights(seed):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}


def across(recipe, first, second):
    """States at step 0 with `weights(0)` and, after the border, with `weights(1)`."""
    before = nmjax.plan_params(weights(0), [Rule(".*", recipe.at(first))])
    after = nmjax.plan_params(weights(1), [Rule(".*", recipe.at(second))])
    state = nmjax.init_state(weights(0), before)
    border = jax.jit(lambda p, s: nmjax.next_state(p, after, s, before))
    return state, border(weights(1), state), after


def test_masks_freeze_as_they_are():
    recipe = recipes.ste("2:4", refresh=10, schedule=Schedule(freeze_from=0.5))
    old, new, plan = across(recipe, 0, 0.5)
    np.testing.assert_array_equal(new["kernel"]["mask"], old["kernel"]["mask"])
    assert set(new["kernel"]) == {"mask"}
    later = nmjax.refresh(new, weights(2), plan, 10)
    np.testing.assert_array_equal(later["kernel"]["mask"], old["kernel"]["mask"])


def test_masks_that_were_not_stored_freeze_as_those_of_the_weights():
    recipe = recipes.ste("2:4", schedule=Schedule(freeze_from=0.5))
    old, new, _ = across(recipe, 0, 0.5)
    assert old == {}
    expected = nmjax.magnitude_mask(weights(1)["kernel"], "2:4")
    np.testing.assert_array_equal(new["kernel"]["mask"], expected)


def test_a_new_pattern_chooses_a_new_mask():
    recipe = recipes.one_shot("3:4", schedule=Schedule(patterns=((0.5, "2:4"),)))
    _, new, _ = across(recipe, 0, 0.5)
    expected = nmjax.magnitude_mask(weights(1)["kernel"], "2:4")
    np.testing.assert_array_equal(new["kernel"]["mask"], expected)


def test_a_scale_stays_across_borders_with_its_pattern():
    recipe = recipes.s_ste("2:4", schedule=Schedule(dense_from=0.9))
    renamed = dataclasses.replace(recipe, name="other")
    before = nmjax.plan_params(weights(0), recipe)
    after = nmjax.plan_params(weights(1), renamed)
    state = nmjax.init_state(weights(0), before)
    new = nmjax.next_state(weights(1), after, state, before)
    np.testing.assert_array_equal(new["kernel"]["scale"], state["kernel"]["scale"])


def test_a_dense_start_leaves_no_state():
    recipe = recipes.transposable("2:4", schedule=Schedule(dense_until=0.5))
    old, new, plan = across(recipe, 0, 0.5)
    assert old == {}
    nmjax.check(weights(1), plan, new)


def test_a_border_compiles_once():
    recipe = recipes.ste("2:4", schedule=Schedule(freeze_from=0.5))
    traces = []

    @jax.jit
    def loss(params, state, plan):
        traces.append(None)
        return sum(jnp.sum(w) for w in jax.tree.leaves(nmjax.bake(params, plan, state)))

    loss = jax.jit(loss.__wrapped__, static_argnums=2)
    plan, state = None, {}
    for step in range(6):
        phase = [p for p in nmjax.phases(recipe, 6) if p.first_step <= step][-1]
        new = nmjax.plan_params(weights(0), phase.rules)
        if plan is not None and new != plan:
            state = nmjax.next_state(weights(0), new, state, plan)
        plan = new
        loss(weights(step), state, plan)
    assert len(traces) == 2

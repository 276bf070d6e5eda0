"""check can fail, and says how; summary tells what is what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import CheckError, Plan, Rule, plan_params, recipes


@pytest.fixture
def params(rng):
    """Every axis divides by 4, so that a mask along the wrong one is possible."""
    shapes = {"conv": (3, 3, 8, 4), "dense": (8, 12), "head": (12, 4)}
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
        for name, shape in shapes.items()
    }


RULES = [Rule("head", None), Rule(".*", "2:4")]


@pytest.fixture
def plan(params):
    return plan_params(params, RULES)


@pytest.fixture
def masks(params, plan):
    """As a checkpoint gives them: NumPy arrays."""
    return jax.tree.map(np.asarray, nmjax.prepare(params, plan))


def problems(*args):
    with pytest.raises(CheckError) as error:
        nmjax.check(*args)
    for problem in error.value.problems:
        line = f"{problem.path}: [{problem.kind}] {problem.detail}"
        assert line in str(error.value)
    return {problem.path: problem.kind for problem in error.value.problems}, str(
        error.value
    )


def with_mask(masks, path, mask):
    return {**masks, path: {"kernel": {"mask": mask}}}


# What is fine


def test_good_masks_pass(params, plan, masks):
    assert nmjax.check(params, plan, masks) is None
    assert nmjax.check(params, plan) is None
    assert nmjax.check(params, plan, {}) is None


def test_nothing_sparse_passes(params):
    assert nmjax.check(params, plan_params(params, []), {}) is None


@pytest.mark.parametrize("ragged", ["dense-tail", "pad"])
def test_ragged_axes_pass(rng, ragged):
    params = {"w": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)}
    plan = plan_params(params, [Rule("w", "2:4", ragged=ragged)])
    nmjax.check(params, plan, nmjax.prepare(params, plan))


def test_kept_masks_need_not_be_those_of_the_weights(params):
    plan = plan_params(params, [Rule(".*", recipes.one_shot("2:4"))])
    state = nmjax.init_state(params, plan)
    moved = jax.tree.map(lambda w: -w[::-1], params)
    nmjax.check(moved, plan, nmjax.prepare(moved, plan, state))


def test_a_state_holds_the_masks_that_recipes_keep_and_no_other(params):
    kept, chosen = recipes.transposable("2:4"), recipes.sr_ste("2:4")
    plan = plan_params(params, [Rule("conv", kept), Rule(".*", chosen)])
    state = nmjax.init_state(params, plan)
    nmjax.check(params, plan, state)
    assert "no:" not in nmjax.summary(params, plan, state)
    state["conv"]["kernel"]["mask"] = ~state["conv"]["kernel"]["mask"].at[0].set(True)
    assert problems(params, plan, state)[0].keys() == {"conv/kernel"}
    # Of a set of all masks, those that the op used, none may lack.
    masks = nmjax.prepare(params, plan, nmjax.init_state(params, plan))
    del masks["head"]
    assert problems(params, plan, masks)[0].keys() == {"head/kernel"}


class OnSeveralHosts:
    """What check asks of a jax.Array that two processes share."""

    is_fully_addressable = False

    def __init__(self, array, is_fully_replicated):
        self.array, self.is_fully_replicated = array, is_fully_replicated
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        assert self.is_fully_replicated
        return np.asarray(self.array)


def test_arrays_of_several_hosts(params, plan, masks):
    def shared(tree, replicated):
        return jax.tree.map(lambda x: OnSeveralHosts(x, replicated), tree)

    nmjax.check(shared(params, True), plan, shared(masks, True))
    with pytest.raises(ValueError, match="lies on several hosts; gather it"):
        nmjax.check(shared(params, False), plan, masks)


def test_bfloat16_weights(params):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    plan = plan_params(params, RULES)
    nmjax.check(params, plan, nmjax.prepare(params, plan))


# What is not: each a kind of its own


def test_one_flipped_bit(params, plan, masks):
    mask = masks["dense"]["kernel"]["mask"].copy()
    mask[5, 7] ^= True
    found, message = problems(params, plan, with_mask(masks, "dense", mask))
    assert found == {"dense/kernel": "pattern"}
    assert "1 of 24 groups along axis -2 are not 2:4" in message
    kept = 2 + (1 if mask[5, 7] else -1)
    assert f"group 1 at (7,) keeps {kept} of 4" in message
    weights = [float(f"{float(w):.4g}") for w in params["dense"]["kernel"][4:8, 7]]
    assert f"weights {weights}" in message


def test_the_mask_along_another_axis(params, plan, masks):
    mask = np.asarray(nmjax.magnitude_mask(params["dense"]["kernel"], "2:4", axis=-1))
    found, message = problems(params, plan, with_mask(masks, "dense", mask))
    assert found == {"dense/kernel": "axis"}
    assert "is 2:4 along axis -1, but the GEMM contracts -2" in message


def with_axis(plan, path, axis):
    entries = tuple(
        dataclasses.replace(e, axes=(axis,)) if e.path == path else e for e in plan
    )
    return Plan(entries)


def test_the_plan_along_another_axis(params, plan, masks):
    found, message = problems(params, with_axis(plan, "conv/kernel", -1), masks)
    assert found == {"conv/kernel": "axis"}
    assert "is 2:4 along axis -2, but the GEMM contracts -1" in message


@pytest.mark.parametrize("given", [False, True])
def test_the_plan_along_an_axis_that_holds_no_groups(params, plan, masks, given):
    plan = with_axis(plan, "conv/kernel", -3)
    found, message = problems(params, plan, *([masks] if given else []))
    assert found == {"conv/kernel": "axis"}
    assert "axis -3 of (3, 3, 8, 4) does not hold groups of 4" in message


def test_a_dropped_mask(params, plan, masks):
    del masks["dense"]
    found, message = problems(params, plan, masks)
    assert found == {"dense/kernel": "missing"}
    assert "the state has no mask for it" in message


def test_a_dropped_layer(params, plan, masks):
    del params["conv"]
    found, message = problems(params, plan, masks)
    assert found == {"conv/kernel": "missing"}
    assert "is in the plan, not in the parameters" in message


def test_a_weight_changed_after_the_mask_was_made(params, plan, masks):
    kernel = params["dense"]["kernel"]
    row = int(np.argmin(masks["dense"]["kernel"]["mask"][:4, 0]))
    params["dense"]["kernel"] = kernel.at[row, 0].set(100.0)
    found, message = problems(params, plan, masks)
    assert found == {"dense/kernel": "weights"}
    assert "2 bits differ from the mask of the stored weights" in message


def test_a_mask_that_the_plan_does_not_know(params, plan, masks):
    masks["head"] = {"kernel": {"mask": np.ones((12, 4), bool)}}
    masks["body"] = {"kernel": {"mask": np.ones((4, 4), bool)}}
    found, _ = problems(params, plan, masks)
    assert found == {"head/kernel": "stranger", "body/kernel": "stranger"}


def test_masks_of_another_form_are_not_passed_over(params, plan, masks):
    masks = {name: {"kernel": tree["kernel"]["mask"]} for name, tree in masks.items()}
    found, _ = problems(params, plan, masks)
    assert found == {"conv": "stranger", "dense": "stranger"}


@pytest.mark.parametrize(
    "change", [lambda m: m.T, lambda m: m[:4], lambda m: m.astype(np.float32)]
)
def test_a_mask_of_another_shape_or_dtype(params, plan, masks, change):
    mask = change(masks["dense"]["kernel"]["mask"])
    found, message = problems(params, plan, with_mask(masks, "dense", mask))
    assert found == {"dense/kernel": "shape"}
    assert str(mask.shape) in message and str(mask.dtype) in message


def test_a_parameter_of_another_shape(params, plan, masks):
    params["dense"]["kernel"] = params["dense"]["kernel"][:4]
    found, message = problems(params, plan, masks)
    assert found == {"dense/kernel": "shape"}
    assert "plan (8, 12), parameter (4, 12)" in message


def test_a_kept_mask_that_is_not_there(params):
    plan = plan_params(params, [Rule(".*", recipes.frozen("2:4"))])
    found, _ = problems(params, plan)
    assert set(found.values()) == {"missing"}
    assert len(found) == 3


@pytest.mark.parametrize(("ragged", "good"), [("dense-tail", 3), ("pad", 2)])
def test_a_wrong_tail(rng, ragged, good):
    params = {"w": jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)}
    plan = plan_params(params, [Rule("w", "2:4", ragged=ragged)])
    mask = np.array(nmjax.prepare(params, plan)["w"]["mask"])
    assert mask[4:, 3].sum() == good
    mask[4:, 3] = [True, False, False]
    found, message = problems(params, plan, {"w": {"mask": mask}})
    assert found == {"w": "pattern"}
    assert "group 1 at (3,) keeps 1 of 3" in message


def test_every_offending_path_is_listed(params, plan, masks):
    mask = masks["dense"]["kernel"]["mask"].copy()
    mask[:] = True
    del params["conv"]
    found, message = problems(params, plan, with_mask(masks, "dense", mask))
    assert found == {"conv/kernel": "missing", "dense/kernel": "pattern"}
    assert message.startswith("2 parameter(s) fail the check")
    assert message.count("group ") == 3  # the first three of 24


# summary


def rows(text):
    """Cells by path: columns are two or more spaces apart."""
    lines = text.splitlines()
    table = [[c.strip() for c in line.split("  ") if c.strip()] for line in lines]
    return {cells[0]: cells[1:] for cells in table}, lines[-1]


def test_summary_says_what_is_what(params, plan, masks):
    params["head"]["bias"] = jnp.ones(4)
    table, total = rows(nmjax.summary(params, plan, masks))
    assert table["path"] == ["layer", "shape", "axes", "recipe", "density", "N:M"]
    expected = ["parameter", "3x3x8x4", "-2", "sr_ste 2:4", "0.500", "yes"]
    assert table["conv/kernel"] == expected
    assert table["dense/kernel"][-1] == "yes"
    expected = ["parameter", "12x4", "-2", "-", "1.000", "dense by rule"]
    assert table["head/kernel"] == expected
    sizes = 3 * 3 * 8 * 4 + 8 * 12, 12 * 4 + 4
    assert total == (
        f"2 of 3 weights sparse; {sizes[0]} of {sum(sizes)} parameters, "
        f"{sizes[0] // 2 + sizes[1]} kept"
    )


def test_summary_shows_what_check_refuses(params, plan, masks):
    mask = masks["dense"]["kernel"]["mask"].copy()
    mask[5, 7] ^= True
    table, _ = rows(nmjax.summary(params, plan, with_mask(masks, "dense", mask)))
    assert table["dense/kernel"][-1] == "no: pattern"
    assert table["conv/kernel"][-1] == "yes"
    del params["conv"]
    table, total = rows(nmjax.summary(params, plan, masks))
    assert table["conv/kernel"][-1] == "no: missing"
    assert "-" not in total


def test_summary_of_abstract_parameters(params, plan):
    abstract = jax.eval_shape(lambda: params)
    table, total = rows(nmjax.summary(abstract, plan))
    assert table["conv/kernel"][-2:] == ["0.500", "not judged"]
    assert rows(nmjax.summary(params, plan))[1] == total


@pytest.mark.parametrize("ragged", ["dense-tail", "pad"])
def test_summary_counts_the_tail(ragged):
    params = {"w": jnp.ones((7, 5))}
    plan = plan_params(params, [Rule("w", "2:4", ragged=ragged)])
    table, total = rows(nmjax.summary(params, plan))
    kept = int(nmjax.prepare(params, plan)["w"]["mask"].sum())
    assert table["w"][-2] == f"{kept / 35:.3f}"
    assert total.endswith(f"35 of 35 parameters, {kept} kept")

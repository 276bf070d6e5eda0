"""Rules and plans: what the user wants, what the model has, and every refusal."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import NMPattern, Plan, PlanError, Rule, plan_params, recipes
from nmjax.planning import check_sharding
from nmjax.rules import as_rules

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def shapes(**leaves):
    """A parameter tree of shapes from `block__conv__kernel=(…)`."""
    tree: dict = {}
    for name, shape in leaves.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


NET = shapes(
    stem__kernel=(3, 3, 3, 16),
    block__conv__kernel=(3, 3, 16, 16),
    block__conv__bias=(16,),
    block__norm__scale=(16,),
    head__kernel=(16, 10),
    head__bias=(10,),
)


class Net(nn.Module):
    """A stem with 3 channels, a depthwise convolution, an odd head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="stem")(x)
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        x = nn.Conv(16, (1, 1), name="pointwise")(x)
        x = nn.Dense(10, name="odd.1-hidden")(x.mean((1, 2)))
        return nn.Dense(10, name="head")(x)


def test_an_order_of_outputs_does_not_cross_feature_groups():
    layer, x = nn.Conv(16, (3, 3), feature_group_count=2), jnp.ones((1, 4, 4, 8))
    with pytest.raises(PlanError, match="stay in their 2 feature groups: reorder=None"):
        nmjax.plan(layer, [Rule(".*", recipes.bi_mask("2:4"))], x)
    plan = nmjax.plan(layer, [Rule(".*", recipes.bi_mask("2:4", reorder=None))], x)
    assert plan["kernel"].sparse


# Rules


def test_rules_are_values():
    assert Rule(".*", "2:4") == Rule(".*", recipes.sr_ste("2:4"))
    assert hash(Rule(".*", "2:4")) == hash(Rule(".*", NMPattern("2:4")))
    assert Rule(".*", "2:4") != Rule(".*", "1:4")
    assert Rule("head", None) == Rule("head", recipes.dense())
    replaced = dataclasses.replace(Rule("a", "2:4", ragged="pad"), path="b")
    assert replaced == Rule("b", "2:4", ragged="pad")


@pytest.mark.parametrize(
    ("path", "parameter", "matches"),
    [
        ("head", "head/kernel", True),
        ("head", "body/head/kernel", False),
        ("(.*/)?head", "body/head/kernel", True),
        ("hea", "head/kernel", False),
        ("head/kernel", "head/kernel", False),
        ("attn/w_q", "attn/w_q", True),
        (".*", "anything/at/all", True),
    ],
)
def test_a_rule_matches_the_whole_path_of_a_layer(path, parameter, matches):
    assert Rule(path, "2:4").matches(parameter) is matches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("(", "2:4"), "not a regular expression"),
        (lambda: Rule(None, "2:4"), "not a regular expression"),
        (lambda: Rule(".*", "2-4"), "N:M pattern"),
        (lambda: Rule(".*", 0.5), "expected a recipe"),
        (lambda: Rule(".*", "2:4", axis=1), "negative integer such as -2, got 1"),
        (lambda: Rule(".*", "2:4", axis=-2.0), "negative integer"),
        (lambda: Rule(".*", "2:4", ineligible="skip"), "got 'skip'"),
        (lambda: Rule(".*", "2:4", ragged="tail"), "got 'tail'"),
        (lambda: as_rules([(".*", "2:4")]), "expected nmjax.Rule"),
        (lambda: as_rules([".*"]), "expected nmjax.Rule"),
        (lambda: as_rules("all"), "N:M pattern"),
    ],
)
def test_malformed_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bare_pattern_makes_sparse_what_can_be():
    expected = (Rule(".*", "2:4", ineligible="dense"),)
    assert as_rules("2:4") == as_rules(NMPattern("2:4")) == expected
    assert as_rules(recipes.sr_ste("2:4")) == expected
    assert as_rules(expected[0]) == expected
    with pytest.raises(ValueError, match="expected nmjax.Rule"):
        as_rules([None])


# Plans


def test_first_match_wins():
    rules = [Rule("stem", None), Rule("block/.*", "1:4"), Rule(".*", "1:2")]
    plan = plan_params(NET, rules)
    found = {e.path: str(e.recipe.pattern) if e.recipe else e.reason for e in plan}
    assert found == {
        "stem/kernel": "dense by rule",
        "block/conv/kernel": "1:4",
        "head/kernel": "1:2",
    }


def test_what_no_rule_matches_stays_dense_and_says_so():
    plan = plan_params(NET, [Rule("block/.*", "2:4")])
    assert [e.path for e in plan.sparse] == ["block/conv/kernel"]
    assert plan["head/kernel"].reason == "no rule matches"
    assert plan["block/conv/kernel"].reason == ""
    assert not plan_params(NET, []).sparse


def test_a_rule_that_matches_nothing_lists_the_paths():
    rules = [Rule("head", None), Rule("blok/.*", "2:4"), Rule("heads?", "2:4")]
    with pytest.raises(PlanError) as error:
        plan_params(NET, rules)
    message = str(error.value)
    assert "'blok/.*', 'heads?' matches no layer" in message
    for path in ("stem", "block/conv", "head"):
        assert f"\n  {path}" in message
    assert "bias" not in message


def test_a_rule_on_a_tree_without_weights_says_so():
    with pytest.raises(PlanError, match=r"\(none\)"):
        plan_params(shapes(norm__scale=(16,)), [Rule(".*", "2:4")])


def test_all_ineligible_layers_are_listed_with_rules_to_paste():
    rules = [Rule(".*", "2:4")]
    with pytest.raises(PlanError) as error:
        nmjax.plan(Net(), rules, IMAGES)
    message = str(error.value)
    assert "3 parameter(s) cannot be sparse" in message
    for path in ("stem/kernel (3, 3, 3, 16)", "depthwise/kernel", "head/kernel"):
        assert path in message
    pasted = "\n".join(line for line in message.splitlines() if "nmjax.Rule" in line)
    extra = eval(f"[{pasted}]", {"nmjax": nmjax})
    assert len(extra) == 3
    plan = nmjax.plan(Net(), extra + rules, IMAGES)
    assert [e.path for e in plan.sparse] == ["odd.1-hidden/kernel", "pointwise/kernel"]


def test_rules_to_paste_escape_the_path():
    tree = {"w+1": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}, **NET}
    rules = [Rule("stem", None), Rule(".*", "2:4")]
    with pytest.raises(PlanError) as error:
        plan_params(tree, rules)
    lines = str(error.value).splitlines()
    extra = eval(
        "[" + "".join(x for x in lines if "nmjax.Rule" in x) + "]", {"nmjax": nmjax}
    )
    assert plan_params(tree, extra + rules)["w+1/kernel"].reason == "dense by rule"


def test_ineligible_dense_gives_the_reason():
    plan = nmjax.plan(Net(), "2:4", IMAGES)
    reasons = {entry.path: entry.reason for entry in plan if not entry.sparse}
    assert set(reasons) == {"stem/kernel", "depthwise/kernel", "head/kernel"}
    assert "size 3, not a multiple of 4" in reasons["stem/kernel"]
    assert "depthwise" in reasons["depthwise/kernel"]
    assert "size 10, not a multiple of 4" in reasons["head/kernel"]


@pytest.mark.parametrize("ragged", ["dense-tail", "pad"])
def test_ragged_makes_an_odd_size_eligible(ragged):
    plan = plan_params(NET, [Rule("stem", "2:4", ragged=ragged), Rule(".*", "2:4")])
    assert plan["stem/kernel"].sparse
    assert plan["stem/kernel"].ragged == ragged
    assert plan["head/kernel"].ragged is None


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_other_dtypes_cannot_be_sparse(dtype):
    tree = {"layer": {"kernel": jax.ShapeDtypeStruct((8, 4), dtype)}}
    with pytest.raises(PlanError, match=rf"{jnp.dtype(dtype).name} is not floating"):
        plan_params(tree, [Rule(".*", "2:4")])
    assert not plan_params(tree, "2:4").sparse


def test_a_plan_is_data():
    plan = plan_params(NET, [Rule("stem", None), Rule(".*", "2:4")])
    assert len(plan) == 3
    assert plan["head/kernel"] in plan.sparse
    assert plan["head/kernel"].shape == (16, 10)
    assert plan["head/kernel"].dtype == "float32"
    assert plan["head/kernel"].axis == -2
    assert plan["head/kernel"].size == 160
    assert hash(plan) == hash(plan_params(NET, [Rule("stem", None), Rule(".*", "2:4")]))
    with pytest.raises(KeyError, match="head/kernel"):
        plan["head"]


# Plans of bare trees


def test_plan_params_defaults():
    tree = shapes(
        conv__kernel=(3, 3, 8, 4),
        dense__kernel=(8, 4),
        table=(8, 16),
        conv__bias=(4,),
        stacked__bias=(2, 4),
        stacked__scale=(2, 4),
    )
    plan = plan_params(tree, [Rule(".*", "2:4")])
    assert {entry.path: entry.axes for entry in plan} == {
        "conv/kernel": (-2,),
        "dense/kernel": (-2,),
        "table": (-2,),
    }
    assert all(entry.layer == "parameter" for entry in plan)


def test_plan_params_asks_for_the_axis_where_rank_does_not_tell():
    tree = shapes(qkv__kernel=(16, 8, 12), patches=(2, 2, 3, 8), out__kernel=(8, 4))
    with pytest.raises(PlanError) as error:
        plan_params(tree, [Rule(".*", "2:4")])
    assert "qkv/kernel (16, 8, 12): rank 3" in str(error.value)
    assert "patches (2, 2, 3, 8): rank 4" in str(error.value)
    plan = plan_params(
        tree,
        [Rule("qkv", "2:4", axis=-3), Rule("patches", None), Rule(".*", "1:4")],
    )
    assert plan["qkv/kernel"].axis == -3
    assert plan["out/kernel"].axis == -2


@pytest.mark.parametrize("concrete", [False, True])
def test_an_axis_that_does_not_exist_is_an_error(concrete):
    leaf = jnp.ones((8, 4)) if concrete else jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with pytest.raises(PlanError, match=r"w \(8, 4\): axis -3 does not exist"):
        plan_params({"w": leaf}, [Rule("w", "2:4", axis=-3)])
    plan = plan_params({"w": leaf}, [Rule("w", "2:4", axis=-3, ineligible="dense")])
    assert "axis -3" in plan["w"].reason


def test_an_embedding_is_a_table():
    tree = shapes(tokens__embedding=(64, 8), out__kernel=(8, 4))
    with pytest.raises(PlanError, match="tokens/embedding .*a table, not a GEMM"):
        plan_params(tree, [Rule(".*", "2:4")])
    assert [e.path for e in plan_params(tree, "2:4").sparse] == ["out/kernel"]
    plan = plan_params(tree, [Rule("tokens/.*", "2:4", axis=-1)])
    assert plan["tokens/embedding"].axis == -1  # used as a GEMM: tied to the output


def test_plan_params_takes_any_pytree():
    tree = [{"w": jnp.ones((8, 4))}, (jnp.ones((4, 4)), np.ones((4, 8), np.float32))]
    plan = plan_params(tree, [Rule("0/.*", "2:4"), Rule("1/1", "1:4", axis=-1)])
    assert [entry.path for entry in plan] == ["0/w", "1/0", "1/1"]
    assert [entry.sparse for entry in plan] == [True, False, True]


def test_plan_params_opens_boxes():
    boxed = {"w": nn.Partitioned(jnp.ones((8, 4)), names=(None, "model"))}
    assert plan_params(boxed, "2:4") == plan_params({"w": jnp.ones((8, 4))}, "2:4")


# JSON


def test_json_gives_an_equal_plan():
    tree = {"qkv": jax.ShapeDtypeStruct((16, 8, 12), jnp.bfloat16), **NET}
    rules = [
        Rule("stem", "1:2", ragged="pad"),
        Rule("head", recipes.one_shot("2:4")),
        Rule("qkv", recipes.frozen("4:8"), axis=-3),
        Rule(".*", recipes.sr_ste("2:4", decay=1e-3, decay_in="optimizer")),
    ]
    for plan in (
        plan_params(tree, rules),
        nmjax.plan(Net(), "2:4", IMAGES),
        Plan(()),
    ):
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert hash(again) == hash(plan)


def damaged(change):
    data = json.loads(plan_params(NET, [Rule("block.*", "2:4")]).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '{"format": 2}',
        '{"entries": []}',
        plan_params(NET, [Rule("block.*", "2:4")]).to_json()[:-20],
        damaged(lambda data: data.update(format=1)),
        damaged(lambda data: data.update(entries=None)),
        damaged(lambda data: data.update(entries={"a": 1})),
        damaged(lambda data: data["entries"].append("stem")),
        damaged(lambda data: data["entries"][0].update(density=0.5)),
        damaged(lambda data: data["entries"][0].pop("axes")),
        damaged(lambda data: data["entries"][0].update(shape=3)),
        damaged(lambda data: data["entries"][0].update(axes=[])),
        damaged(lambda data: data["entries"][0].update(axes=[2])),
        damaged(lambda data: data["entries"][0].update(axes=[-5])),
        damaged(lambda data: data["entries"][0].update(recipe="sr_ste")),
        damaged(lambda data: data["entries"][0]["recipe"].update(pattern="4:2")),
        damaged(lambda data: data["entries"][0]["recipe"].update(logits=True)),
        damaged(lambda data: data["entries"][0]["recipe"].update(decay=-1)),
    ],
)
def test_damaged_json_is_refused(text):
    with pytest.raises(ValueError, match="not a plan that nmjax wrote"):
        Plan.from_json(text)


# Sharding


def mesh_of(axis_type):
    return jax.make_mesh((4,), ("model",), axis_types=(axis_type,))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharding_that_cuts_groups_is_refused(axis_type):
    mesh = mesh_of(axis_type)
    w = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("model")))
    with pytest.raises(PlanError) as error:
        plan_params({"layer": {"kernel": w}}, [Rule(".*", "2:4")])
    assert str(error.value).startswith(
        "layer/kernel: axis -2 of size 8 is sharded in parts of 2, which cuts groups "
        "of 4"
    )
    assert plan_params({"w": w}, [Rule(".*", "1:2")]).sparse  # parts of whole groups
    assert plan_params({"w": w}, [Rule(".*", "2:4", axis=-1)]).sparse
    assert not plan_params({"w": w}, [Rule(".*", None)]).sparse


def test_a_traced_weight_is_judged_under_explicit_axes():
    mesh = mesh_of(AxisType.Explicit)
    recipe = recipes.sr_ste("2:4")
    w = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("model")))

    @jax.jit
    def run(w):
        check_sharding("layer/kernel", w, -2, recipe)
        return w

    with jax.set_mesh(mesh):
        with pytest.raises(PlanError, match="parts of 2, which cuts groups of 4"):
            run(w)
        run(jax.device_put(w, NamedSharding(mesh, P(None, "model"))))


def test_a_traced_weight_passes_where_nothing_is_known():
    mesh = mesh_of(AxisType.Auto)
    w = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("model")))
    recipe = recipes.sr_ste("2:4")
    jax.jit(lambda w: check_sharding("w", w, -2, recipe))(w)
    jax.jit(lambda w: check_sharding("w", w, -2, recipe))(jnp.ones((8, 8)))


def test_two_mesh_axes_on_one_dimension_count_together():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    recipe = recipes.sr_ste("2:4")
    w = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P(("a", "b"))))
    check = lambda w: check_sharding("w", w, -2, recipe)  # noqa: E731
    with jax.set_mesh(mesh), pytest.raises(PlanError, match="parts of 2"):
        jax.jit(check)(w)
    with pytest.raises(PlanError, match="parts of 2"):
        check(w)
    check(jax.device_put(w, NamedSharding(mesh, P("a", "b"))))


def test_inside_shard_map_the_local_shape_counts():
    mesh = mesh_of(AxisType.Auto)
    run = jax.shard_map(
        lambda w: nmjax.ste(w, "2:4"),
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
    )
    with pytest.raises(ValueError, match="size 2, not a multiple of m = 4"):
        run(jnp.ones((8, 8)))
    assert run(jnp.ones((16, 8))).shape == (16, 8)


def test_a_sharding_that_cuts_groups_along_the_outputs_is_refused():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "model"))  # parts of 2 columns
    params = {"kernel": jax.device_put(jnp.ones((8, 8)), sharding)}
    assert plan_params(params, "2:4").sparse
    for recipe in (recipes.transposable("2:4"), recipes.semi_sparse_weight()):
        with pytest.raises(
            PlanError, match="axis -1 of size 8 is sharded in parts of 2"
        ):
            plan_params(params, recipe)

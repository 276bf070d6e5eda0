"""Recipes are values: equal, hashable, JSON, and impossible ones are refused."""

import dataclasses
import json

import jax
import pytest

from nmjax import NMPattern, Recipe, Schedule, recipes
from nmjax.masks.learned import Temperature

MAGNITUDE = [
    recipes.ste("2:4"),
    recipes.ste("1:4", refresh=40),
    recipes.sr_ste("2:4"),
    recipes.sr_ste("4:8", decay=1e-3, decay_in="optimizer", refresh=10),
    recipes.one_shot("2:4"),
    recipes.frozen("2:4"),
    recipes.frozen("2:4", decay=1e-4, decay_in="optimizer"),
]
NAMED = [
    recipes.dense(),
    *MAGNITUDE,
    recipes.ste("2:4", multipliers=(1.0, 0.5)),
    recipes.ste("2:4", schedule=Schedule(0.1, patterns=((0.2, "1:4"),))),
    recipes.transposable("4:8", decay=1e-4),
    recipes.bi_mask("2:4"),
    recipes.fst(),
    recipes.semi_sparse_weight(),
    recipes.semi_sparse_activation(),
    recipes.two_by_four(),
    recipes.s_ste("2:4"),
    recipes.step("2:4"),
    recipes.learned("2:4"),
    recipes.learned("1:4", temperature=Temperature(2.0, 0.5, 9, "linear")),
]


@pytest.mark.parametrize("recipe", NAMED, ids=lambda recipe: repr(recipe.name))
def test_json_gives_an_equal_recipe(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.pattern == recipe.pattern


def test_recipes_differ_where_a_field_differs():
    assert len(set(NAMED)) == len(NAMED)
    assert recipes.sr_ste("2:4") == recipes.sr_ste(NMPattern(2, 4))
    assert recipes.sr_ste("2:4", decay=1) == recipes.sr_ste("2:4", decay=1.0)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.ste("2:4").decay = 1.0


@pytest.mark.parametrize(
    ("recipe", "sparse", "needs_state"),
    [
        (recipes.dense(), False, False),
        (recipes.ste("2:4"), True, False),
        (recipes.ste("2:4", refresh=2), True, True),
        (recipes.sr_ste("2:4"), True, False),
        (recipes.sr_ste("2:4", refresh=40), True, True),
        (recipes.one_shot("2:4"), True, True),
        (recipes.frozen("2:4"), True, True),
        (recipes.transposable("2:4"), True, True),
        (recipes.bi_mask("2:4"), True, True),
        (recipes.bi_mask("2:4", reorder=None), True, False),
        (recipes.semi_sparse_activation(), True, False),
        (recipes.s_ste("2:4"), True, True),
        (recipes.learned("2:4"), True, True),
    ],
)
def test_which_recipes_keep_a_mask(recipe, sparse, needs_state):
    assert (recipe.sparse, recipe.needs_state) == (sparse, needs_state)


def test_what_the_named_recipes_say():
    """The rows of the design's table: operand of each GEMM, gradient, decay."""
    for recipe in MAGNITUDE:
        assert (recipe.fprop, recipe.dgrad, recipe.wgrad) == ("weight", None, None)
        assert recipe.mask == "magnitude"
    rows = {
        recipes.transposable("2:4"): ("weight", "weight", None, "transposable"),
        recipes.bi_mask("2:4"): ("weight", "weight-masked-twice", None, "magnitude"),
        recipes.fst(): (
            *("weight", "weight-own-mask", "activation-fixed", "magnitude"),
        ),
        recipes.semi_sparse_weight(): ("weight", "weight", None, "tile"),
        recipes.semi_sparse_activation(): ("activation", None, "activation", None),
        recipes.two_by_four(): ("weight", "weight", "gradient", "transposable"),
        recipes.s_ste("2:4"): ("weight", None, None, "soft-threshold"),
        recipes.step("2:4"): ("weight", None, None, "magnitude"),
        recipes.learned("2:4"): ("weight", None, None, "learned"),
    }
    for recipe, row in rows.items():
        assert (recipe.fprop, recipe.dgrad, recipe.wgrad, recipe.mask) == row
    two_by_four = recipes.two_by_four()
    assert (two_by_four.refresh, two_by_four.decay_in) == (40, "optimizer")
    assert two_by_four.schedule.dense_from == 5 / 6
    assert recipes.transposable("2:4").refresh == 40
    bi_mask = recipes.bi_mask("2:4")
    assert (bi_mask.decay, bi_mask.refresh, bi_mask.reorder) == (2e-4, 1, 100)
    assert recipes.learned("2:4").gradient == "none"
    assert recipes.semi_sparse_activation().tile == "largest_values_greedy"
    assert recipes.ste("2:4").gradient == "straight-through"
    assert recipes.ste("2:4").decay == 0
    assert recipes.sr_ste("2:4").decay == 2e-4
    assert recipes.sr_ste("2:4").decay_in == "op"
    assert recipes.one_shot("2:4").gradient == "masked"
    assert recipes.frozen("2:4").gradient == "straight-through"
    assert recipes.frozen("2:4").refresh is None


def test_equal_recipes_are_one_static_argument():
    traces = []

    def density(x, recipe):
        traces.append(None)
        return x * recipe.pattern.density

    jitted = jax.jit(density, static_argnums=1)
    assert jitted(2.0, recipes.sr_ste("2:4")) == 1
    assert jitted(2.0, recipes.sr_ste("2:4")) == 1
    assert len(traces) == 1


changed = dataclasses.replace


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.ste("4:2"), "N:M pattern"),
        (lambda: recipes.ste("2:4", refresh=0), "refresh must be .* got 0"),
        (lambda: recipes.ste("2:4", refresh=True), "refresh must be .* got True"),
        (lambda: recipes.ste("2:4", refresh=1.5), "refresh must be .* got 1.5"),
        (lambda: recipes.sr_ste("2:4", decay=-1e-4), "decay must be .* got -0.0001"),
        (lambda: recipes.sr_ste("2:4", decay=float("nan")), "decay must be .* got nan"),
        (lambda: recipes.sr_ste("2:4", decay=float("inf")), "decay must be .* got inf"),
        (lambda: recipes.sr_ste("2:4", decay="1e-4"), "decay must be a Python number"),
        (lambda: recipes.sr_ste("2:4", decay=lambda step: 1e-4), "add_decay"),
        (
            lambda: recipes.sr_ste("2:4", decay_in="loss"),
            "decay_in must be one of .*'loss'",
        ),
        (
            lambda: dataclasses.replace(recipes.one_shot("2:4"), decay=1e-4),
            "no effect",
        ),
        (lambda: Recipe("mine", NMPattern("2:4")), "contradict each other"),
        (lambda: Recipe("mine", fprop="weight"), "contradict each other"),
        (lambda: changed(recipes.ste("2:4"), mask=None), "contradict each other"),
        (lambda: changed(recipes.ste("2:4"), dgrad="weight"), "along both axes"),
        (
            lambda: changed(recipes.bi_mask("2:4"), mask="soft-threshold"),
            "goes with mask=\"magnitude\", got mask='soft-threshold'",
        ),
        (
            lambda: recipes.bi_mask("2:4", reorder=0),
            "reorder must be .* got 0",
        ),
        (
            lambda: recipes.bi_mask("2:4", refresh=40),
            "reorder=100 is not a multiple of refresh=40",
        ),
        (
            lambda: changed(recipes.fst(), reorder=100),
            'reorder=100 goes with dgrad="weight-masked-twice", got',
        ),
        (
            lambda: changed(recipes.ste("2:4"), wgrad="activation"),
            "wgrad='activation' and fprop='weight' contradict",
        ),
        (
            lambda: changed(recipes.semi_sparse_activation(), wgrad="activation-fixed"),
            "wgrad='activation-fixed' and fprop='activation' contradict",
        ),
        (lambda: changed(recipes.ste("2:4"), tile="causal1122"), "contradict"),
        (lambda: recipes.semi_sparse_weight(algorithm="best"), "tile must be .*'best'"),
        (
            lambda: changed(
                recipes.semi_sparse_weight(), tile="largest_abs_notranspose"
            ),
            "one axis",
        ),
        (
            lambda: changed(recipes.semi_sparse_weight(), pattern=NMPattern("1:4")),
            "4×4 tiles hold 2:4 masks, got pattern 1:4",
        ),
        (lambda: changed(recipes.learned("2:4"), temperature=None), "temperature"),
        (lambda: changed(recipes.s_ste("2:4"), refresh=40), "at each use: refresh=40"),
        (lambda: changed(recipes.s_ste("2:4"), decay=1e-4), "no effect"),
        (lambda: changed(recipes.ste("2:4"), gradient="none"), 'mask="learned"'),
        (lambda: recipes.ste("2:4", multipliers=(1.0,)), r"\(kept, dropped\), got"),
        (lambda: recipes.ste("2:4", multipliers=(1.0, -1.0)), "at least 0, got -1.0"),
        (
            lambda: changed(recipes.one_shot("2:4"), multipliers=(2.0, 1.0)),
            "no effect",
        ),
    ],
)
def test_impossible_recipes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "field", ["fprop", "dgrad", "wgrad", "mask", "gradient", "decay_in"]
)
def test_unknown_words_are_refused(field):
    """A recipe of another version must not turn into something silently dense."""
    fields = recipes.sr_ste("2:4").to_dict() | {field: "gradient-of-activations"}
    with pytest.raises(ValueError, match=field):
        Recipe.from_dict(fields)


@pytest.mark.parametrize("fields", [{}, {"name": "ste"}, None, [], "sr_ste"])
def test_what_is_no_recipe_is_refused(fields):
    with pytest.raises(ValueError, match="not a recipe of this version"):
        Recipe.from_dict(fields)


def test_missing_and_unknown_fields_are_refused():
    fields = recipes.sr_ste("2:4").to_dict()
    with pytest.raises(ValueError, match="exactly the fields"):
        Recipe.from_dict(fields | {"logits": True})
    fields.pop("refresh")
    with pytest.raises(ValueError, match="exactly the fields"):
        Recipe.from_dict(fields)


def test_short_forms():
    assert recipes.as_recipe(None) == recipes.dense()
    assert recipes.as_recipe("2:4") == recipes.sr_ste("2:4")
    assert recipes.as_recipe(NMPattern("1:4")) == recipes.sr_ste("1:4")
    assert recipes.as_recipe(NAMED[2]) is NAMED[2]
    for mistake in (0.5, {"n": 2, "m": 4}, ("2:4",), recipes.sr_ste):
        with pytest.raises(ValueError, match=r"nmjax.recipes"):
            recipes.as_recipe(mistake)

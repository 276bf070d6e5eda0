"""Recipes are values: equal, hashable, JSON, and impossible ones are refused."""

import dataclasses
import json

import jax
import pytest

from nmjax import NMPattern, Recipe, recipes

NAMED = [
    recipes.dense(),
    recipes.ste("2:4"),
    recipes.ste("1:4", refresh=40),
    recipes.sr_ste("2:4"),
    recipes.sr_ste("4:8", decay=1e-3, decay_in="optimizer", refresh=10),
    recipes.one_shot("2:4"),
    recipes.frozen("2:4"),
    recipes.frozen("2:4", decay=1e-4, decay_in="optimizer"),
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
    ],
)
def test_which_recipes_keep_a_mask(recipe, sparse, needs_state):
    assert (recipe.sparse, recipe.needs_state) == (sparse, needs_state)


def test_what_the_named_recipes_say():
    """The rows of the design's table: operand of each GEMM, gradient, decay."""
    for recipe in NAMED[1:]:
        assert (recipe.fprop, recipe.dgrad, recipe.wgrad) == ("weight", None, None)
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
        (lambda: recipes.sr_ste("2:4", decay="1e-4"), "decay must be a number"),
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
    ],
)
def test_impossible_recipes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("field", ["fprop", "dgrad", "wgrad", "gradient", "decay_in"])
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

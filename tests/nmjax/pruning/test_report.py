"""What is done with pruned parameters: they are checked, and run by the recipe."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

import nmjax
from nmjax import recipes
from nmjax.pruning import ada_prune, sparse_gpt

MAGNITUDE = {
    "sr_ste": recipes.sr_ste("2:4"),
    "one_shot": recipes.one_shot("2:4"),
    "frozen": recipes.frozen("2:4"),
    "bi_mask": recipes.bi_mask("2:4"),
    "fst": recipes.fst(),
}
OTHERS = {
    "transposable": recipes.transposable("2:4"),
    "two_by_four": recipes.two_by_four(),
    "semi_sparse_weight": recipes.semi_sparse_weight(),
}
ADA_PRUNE = functools.partial(ada_prune, steps=3)


@pytest.mark.parametrize(
    "prune, recipe",
    [pytest.param(sparse_gpt, r, id=f"sparse_gpt-{n}") for n, r in MAGNITUDE.items()]
    + [
        pytest.param(ADA_PRUNE, recipe, id=f"ada_prune-{name}", marks=pytest.mark.slow)
        for name, recipe in {**MAGNITUDE, **OTHERS}.items()
    ],
)
def test_the_check_takes_masks_where_the_recipe_keeps_them(rng, prune, recipe):
    model, x = nn.Dense(8), rng.normal(size=(32, 16)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    rules = [nmjax.Rule(".*", recipe)]
    pruned = prune(model, rules, [x], variables=variables)
    state = nmjax.init_state(pruned.params, pruned.plan)
    nmjax.check(pruned.params, pruned.plan, state)
    if recipe.needs_state:
        with pytest.raises(nmjax.CheckError, match="missing"):
            nmjax.check(pruned.params, pruned.plan)
    # Nothing is dropped that was not zero.
    baked = nmjax.bake(pruned.params, pruned.plan, state)
    jax.tree.map(np.testing.assert_array_equal, baked, pruned.params)

"""nmjax: N:M fine-grained structured sparsity for JAX and Flax.

    rules = [nmjax.Rule("(.*/)?head", None), nmjax.Rule(".*", "2:4")]
    model = nmjax.sparsify(model, rules)

Four objects: a recipe says what is sparse, a plan where, a state holds what must be
traced, and an op runs the three GEMMs. The README shows them at work.
"""

from typing import Any

from nmjax import linen as linen
from nmjax import recipes as recipes
from nmjax.audit import CheckError as CheckError
from nmjax.audit import check as check
from nmjax.audit import summary as summary
from nmjax.decay import add_decay as add_decay
from nmjax.decay import choose_decay as choose_decay
from nmjax.estimators import s_ste as s_ste
from nmjax.estimators import sr_ste as sr_ste
from nmjax.estimators import ste as ste
from nmjax.masks import magnitude_mask as magnitude_mask
from nmjax.masks import nm_mask as nm_mask
from nmjax.masks import sparsify_like as sparsify_like
from nmjax.masks import tile_mask as tile_mask
from nmjax.masks import transposable_mask as transposable_mask
from nmjax.masks.learned import Temperature as Temperature
from nmjax.pattern import NMPattern as NMPattern
from nmjax.planning import PlanError as PlanError
from nmjax.planning import plan_params as plan_params
from nmjax.plans import Plan as Plan
from nmjax.plans import PlanEntry as PlanEntry
from nmjax.recipe import Recipe as Recipe
from nmjax.rules import Rule as Rule
from nmjax.rules import phases as phases
from nmjax.sampling import mvue as mvue
from nmjax.schedule import Schedule as Schedule
from nmjax.state import bake as bake
from nmjax.state import init_logits as init_logits
from nmjax.state import init_state as init_state
from nmjax.state import next_state as next_state
from nmjax.state import prepare as prepare
from nmjax.state import refresh as refresh
from nmjax.state import sparsify_params as sparsify_params
from nmjax.swap import densify as densify
from nmjax.swap import plan as plan
from nmjax.swap import sparsify as sparsify
from nmjax.two_phase import switched as switched
from nmjax.two_phase import two_phase_adam as two_phase_adam

_ON_FIRST_USE = ("metrics", "models", "nnx", "pruning", "training")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        import importlib

        return importlib.import_module(f"nmjax.{name}")
    raise AttributeError(f"module 'nmjax' has no attribute {name!r}")

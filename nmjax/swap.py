"""Models made sparse without touching them: `sparsify`, `densify`, `plan`.

A linen model becomes an instance of a subclass of its own class: same fields, same
parameter tree, `apply` wrapped. For the length of a call the wrapped `apply` finds the
model's layers, puts each sparse kernel into a kernel box, and hooks the layers that
read one. An nnx model is cloned; see `nmjax.nnx`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import linen as nn
from flax.core import DenyList

from nmjax.linen import hook_boxed_layers
from nmjax.paths import named_leaves
from nmjax.planning import Candidate, check_entry_sharding, log_dense_layers, make_plan
from nmjax.plans import Plan
from nmjax.recording import find_candidates
from nmjax.rules import Rule, Rules, as_rules
from nmjax.sparse_kernel import box_kernels, open_boxes
from nmjax.state import init_logits, init_state, state_entries, state_logits

Model = TypeVar("Model")
_Base = nn.Module if TYPE_CHECKING else object


def plan(model: Any, rules: Rules, *args: Any, **kwargs: Any) -> Plan:
    """What the rules make of a model; nothing is computed.

    Args:
      model: A linen module, or an nnx module (which needs no example).
      rules: A sequence of `nmjax.Rule`, first match wins; or "2:4", short for
        `[Rule(".*", "2:4", ineligible="dense")]`.
      *args: Example arguments of the linen model, arrays or `jax.ShapeDtypeStruct`.
        As under `jax.jit`, a model may branch on values that are not jax's: Python's
        and NumPy's.
      **kwargs: Example keyword arguments, such as `train=False`.

    Returns:
      The plan.

    Raises:
      PlanError: A rule matches nothing, or a layer that it matches cannot be sparse;
        all of them are listed with a rule list to paste.
    """
    if not isinstance(model, nn.Module):
        return _nnx_of(model).plan(model, as_rules(rules))
    model = _dense(model)
    arrays, rebuild = _split_arrays((args, kwargs))

    def variables(*arrays):
        args, kwargs = rebuild(arrays)
        return model.init(jax.random.key(0), *args, **kwargs)

    candidates: list = []

    def record(*arrays):
        args, kwargs = rebuild(arrays)
        shapes = jax.eval_shape(variables, *arrays)
        call = {"mutable": DenyList("params"), "rngs": {"params": jax.random.key(0)}}
        candidates.extend(find_candidates(model, shapes, args, {**kwargs, **call}))

    jax.eval_shape(record, *arrays)
    return make_plan([_reached(c) for c in candidates], as_rules(rules))


def _reached(candidate: Candidate) -> Candidate:
    """In a whole model's plan, a parameter that the call did not reach is a finding."""
    if not candidate.ignored:
        return candidate
    reason = "the example arguments do not reach it"
    return dataclasses.replace(candidate, ignored=False, reason=reason)


def sparsify(model: Model, rules: Rules) -> Model:
    """The same model with N:M sparse weights where the rules say so.

    Linen: the result has the class name, fields and parameter tree of `model`; `init`
    gives the same parameters bit for bit. A model that is already sparse gets the new
    rules in place of the old.

    nnx: the result is a clone that shares the Variables of `model`.

    Args:
      model: A linen or nnx module.
      rules: A sequence of `nmjax.Rule`, first match wins; or a pattern such as "2:4",
        short for `[Rule(".*", "2:4", ineligible="dense")]`: whatever can be sparse
        is, and what stays dense is logged with the reason.

    Returns:
      A model of the same kind.

    Raises:
      PlanError: See `plan`; for a linen model by `init` and by every `apply`.
      TypeError: `model` is of neither kind.
    """
    rules = as_rules(rules)
    if not isinstance(model, nn.Module):
        return _nnx_of(model).sparsify(model, rules)
    dense = _dense(model)
    _refuse_parent(dense)
    return _sparse_class(type(dense), rules)(**_fields(dense), parent=None)


def densify(model: Model) -> Model:
    """The model without nmjax: the inverse of `sparsify`.

    Args:
      model: A linen or nnx module, sparse or not.

    Returns:
      For linen a model equal to the original; for nnx a clone with the same
      Variables.
    """
    if not isinstance(model, nn.Module):
        return _nnx_of(model).densify(model)
    return _dense(model, in_module=True)


def _dense(model: nn.Module, in_module: bool = False) -> Any:
    """The linen model without nmjax; `in_module`: part of the one that runs, if any."""
    if not isinstance(model, _SparseModel):
        return model
    parent = {} if in_module else {"parent": None}
    return type(model).nm_base(**_fields(model), **parent)


def _nnx_of(model: Any) -> Any:
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"expected a flax.linen or flax.nnx module, got {type(model).__name__}; "
            "for a parameter tree use nmjax.plan_params and nmjax.sparsify_params"
        )
    import nmjax.nnx

    return nmjax.nnx


def _fields(model: nn.Module) -> dict[str, Any]:
    names = (n for n, f in model.__dataclass_fields__.items() if f.init)
    return {name: getattr(model, name) for name in names if name != "parent"}


@functools.cache
def _sparse_class(base: type, rules: tuple[Rule, ...]) -> type:
    """One class for each (class, rules): equal models are equal and share traces."""
    attributes = {
        "nm_base": base,
        "nm_rules": rules,
        "nm_said": set(),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__annotations__": {},
    }
    return type(base.__name__, (_SparseModel, base), attributes)


def _rebuild(base: type, rules: tuple[Rule, ...], fields: dict[str, Any]) -> nn.Module:
    return sparsify(base(**fields, parent=None), rules)


def _refuse_parent(model: nn.Module) -> None:
    if model.parent is not None or model.scope is not None:
        raise ValueError(
            f"a sparsified {type(model).__name__} cannot be part of another model, "
            "nor be bound: its kernels would be read as dense. Sparsify the outer "
            "model with rules that begin with the inner one's name, or use "
            "apply(..., method=...)"
        )


class _SparseModel(_Base):
    """What the subclass made by `sparsify` puts before the model's own methods."""

    nm_base: type
    nm_rules: tuple[Rule, ...]
    nm_said: set[Plan]

    def __post_init__(self):
        super().__post_init__()
        _refuse_parent(self)

    def __reduce__(self):
        return _rebuild, (self.nm_base, self.nm_rules, _fields(self))

    @nn.nowrap
    def apply(self, variables, *args, **kwargs):
        """As the model's own `apply`, with more to read.

        Each call first traces the model for the layers that it reaches, so even outside
        `jax.jit` a model may not branch on the values of jax arrays.

        The collection "nm" is the state, "nm_logits" what `nmjax.init_logits` made; the
        key `rngs={"nm": key}` is for recipes that draw, in training.
        """
        dense = _dense(self)
        variables = dict(variables)
        nm = variables.pop("nm", {})
        logits = variables.pop("nm_logits", {})
        if "params" not in variables:
            return dense.apply(variables, *args, **kwargs)
        plan = _plan_of_call(self, dense, variables, args, kwargs)
        weights = named_leaves(variables["params"])
        for entry in plan.sparse:
            check_entry_sharding(entry, weights[entry.path])
        entries = state_entries(nm, plan) if nm else {}
        learned = state_logits(logits, plan) if logits else {}
        rngs = kwargs.get("rngs")
        key = rngs.get("nm") if isinstance(rngs, dict) else None
        boxed = box_kernels(variables["params"], plan, entries, learned, key)
        with nn.intercept_methods(hook_boxed_layers):
            result = dense.apply({**variables, "params": boxed}, *args, **kwargs)
        if kwargs.get("mutable", False) is False:
            return open_boxes(result)  # of gradients within the model
        output, mutated = result
        return open_boxes(output), open_boxes(mutated)

    @nn.nowrap
    def init(self, rngs, *args, **kwargs):
        """As the model's own `init`, bit for bit; the rules are checked."""
        variables = _dense(self).init(rngs, *args, **kwargs)
        self._plan_init(rngs, variables, args, kwargs)
        return variables

    @nn.nowrap
    def init_with_output(self, rngs, *args, **kwargs):
        """As `init`, with the output of the sparse model."""
        variables = _dense(self).init(rngs, *args, **kwargs)
        plan = self._plan_init(rngs, variables, args, kwargs)
        params = variables.get("params", {})
        nm = {
            "nm": init_state(params, plan),
            "nm_logits": init_logits(params, plan),
        }
        kwargs = {**kwargs, "mutable": True, "rngs": _rngs(rngs)}
        output, _ = self.apply({**variables, **nm}, *args, **kwargs)
        return output, variables

    def _plan_init(self, rngs, variables, args, kwargs):
        call = {**kwargs, "mutable": DenyList("params"), "rngs": _rngs(rngs)}
        return _plan_of_call(self, _dense(self), variables, args, call)

    @nn.nowrap
    def tabulate(self, *args, **kwargs):
        """The model's own table."""
        return _dense(self).tabulate(*args, **kwargs)

    @nn.nowrap
    def lazy_init(self, *args, **kwargs):
        """The model's own `lazy_init`."""
        return _dense(self).lazy_init(*args, **kwargs)

    @nn.nowrap
    def module_paths(self, *args, **kwargs):
        """The model's own module paths."""
        return _dense(self).module_paths(*args, **kwargs)


def _rngs(rngs: Any) -> Any:
    return rngs if isinstance(rngs, dict) else {"params": rngs}


def _split_arrays(tree: Any) -> tuple[list[Any], Any]:
    """The arrays of a tree, and a function that rebuilds the tree around others.

    NumPy's are values to a model, whose control flow may depend on them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(x, jax.Array | jax.ShapeDtypeStruct) for x in leaves]

    def rebuild(arrays):
        arrays = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        return treedef.unflatten([next(arrays) if a else x for x, a in pairs])

    return [x for x, a in zip(leaves, is_array, strict=True) if a], rebuild


def _plan_of_call(model, dense, variables, args, kwargs) -> Plan:
    """The plan that one call of a sparse model follows.

    Made anew at each call, eager ones too: which layers a call reaches may depend on
    more than its arguments show.
    """
    plan = make_plan(find_candidates(dense, variables, args, kwargs), model.nm_rules)
    said = type(model).nm_said
    if plan not in said:
        said.add(plan)
        log_dense_layers(plan)
    return plan

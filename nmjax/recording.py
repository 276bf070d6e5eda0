"""Which layers a linen model has, and which kernel axes each of them contracts.

The model runs once abstractly (`jax.eval_shape`) with every parameter in a box that
notes its path and the axes that scans and vmaps take off on the way to the layer. An
interceptor sees each Flax layer with its box and reads the geometry off the layer.
Rank alone would not do: the kernel of an attention's query projection `(d, heads,
head_dim)` contracts its first axis, the output projection's its first two, and a
scanned Dense kernel has the same rank as either.
"""

import contextvars
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from nmjax.equation import Equation
from nmjax.paths import map_named, named_leaves
from nmjax.planning import EMBEDDING, Candidate, PlanError, is_weight
from nmjax.sparse_kernel import OPS

# The Flax layers whose kernel can be sparse.
LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.Einsum)

OWN_PARAMETER = (
    "no hook: the model reads this parameter itself; leave it dense here and mask it "
    "with nmjax.sparsify_params"
)
BY_HAND = (
    "the model reads this parameter by hand, beside its layer or in place of it, and "
    "no mask would be there; leave it dense here and mask it with nmjax.sparsify_params"
)


def find_candidates(
    model: nn.Module, variables: Any, args: tuple, kwargs: dict[str, Any]
) -> list[Candidate]:
    """Runs `model.apply(variables, *args, **kwargs)` abstractly and notes its layers.

    Args:
      model: A linen module without nmjax's hooks.
      variables: Its variables, abstract or not.
      args: Arguments of `apply` after the variables.
      kwargs: Keyword arguments of `apply`, such as `method`, `rngs`, `mutable`.

    Returns:
      A candidate for every parameter that a GEMM might read, in tree order; those
      that the call did not come by are marked.

    Raises:
      PlanError: A layer's kernel is contracted along different axes at two uses, or
        the model wraps a layer in `nn.WeightNorm` or `nn.SpectralNorm`.
    """
    found: dict[str, dict[str, Any]] = {}
    recording = _RECORDING.set(True)
    token = _Recording()  # in every tag: a cached inner jit calls no interceptor

    def run(variables):
        stored: dict[str, Any] = {}  # gone with the trace: `jax.checking_leaks` looks

        def tagged(path, leaf):
            stored[path] = leaf
            return _Tag(leaf, (token, path, leaf.ndim, tuple(range(-leaf.ndim, 0))))

        def note(next_function, call_args, call_kwargs, context):
            layer = context.module
            if isinstance(layer, (nn.WeightNorm, nn.SpectralNorm)):
                raise PlanError(
                    f"{'/'.join(layer.path)}: {type(layer).__name__} rewrites the "
                    "weights of the layer inside it, which nmjax.sparsify cannot "
                    "follow; mask them with nmjax.plan_params and "
                    "nmjax.sparsify_params"
                )
            if context.method_name == "__call__" and layer.scope is not None:
                _note_layer(found, layer, call_args, call_kwargs, stored, token)
            result = next_function(*call_args, **call_kwargs)
            _note_own_parameters(found, layer, token)
            return result

        params = map_named(tagged, variables["params"], keep_boxes=False)
        with nn.intercept_methods(note):
            model.apply({**variables, "params": params}, *args, **kwargs)

    try:
        jax.eval_shape(run, variables)
    finally:
        _RECORDING.reset(recording)
    candidates = []
    for path, leaf in named_leaves(variables["params"]).items():
        facts = found.get(path, {"ignored": True})
        if path in token.by_hand:
            facts |= {"ignored": False, "reason": facts.get("reason") or BY_HAND}
        ndim = facts.pop("ndim", leaf.ndim)
        if is_weight(path, ndim):
            shape, dtype = tuple(leaf.shape), str(leaf.dtype)
            candidates.append(Candidate(path, shape, dtype, **facts))
    return candidates


_RECORDING: contextvars.ContextVar[bool] = contextvars.ContextVar("recording")


def is_recording() -> bool:
    """Whether a model runs for its geometry alone: its state may be missing."""
    return _RECORDING.get(False)


@dataclasses.dataclass(eq=False)
class _Recording:
    """One run of a model for its geometry.

    Attributes:
      by_hand: Paths of the parameters that it took from its variables itself.
    """

    by_hand: set[str] = dataclasses.field(default_factory=set)


@jax.tree_util.register_pytree_node_class
class _Tag(meta.AxisMetadata):
    """A parameter that remembers its path and which stored axes it still has.

    Flax opens it where a layer asks for its parameter. Whoever takes it from
    `variables` or `get_variable` finds what operators and jnp take for an array, and
    is noted. What `jax.tree` functions take out of it is not.
    """

    def __init__(self, value, static):
        self.value, self.static = value, static

    def tree_flatten(self):
        return (self.value,), self.static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(children[0], static)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return _Tag(val, self.static)

    def remove_axis(self, index, params):
        *static, axes = self.static
        index %= len(axes)
        return _Tag(self.value, (*static, axes[:index] + axes[index + 1 :]))

    def add_axis(self, index, params):
        return self  # only on the way out, where nobody looks

    def __jax_array__(self):
        recording, path, *_ = self.static
        recording.by_hand.add(path)
        return self.value

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("shape", "ndim", "size", "dtype"):
            return getattr(self.value, name)
        return getattr(self.__jax_array__(), name)


def _as_array(name: str) -> Callable[..., Any]:
    return lambda tag, *others: getattr(tag.__jax_array__(), name)(*others)


_BINARY = "add sub mul truediv floordiv mod matmul pow and or xor lshift rshift"
_OTHERS = "lt le gt ge neg pos abs invert getitem len iter"
for _name in _BINARY.split():
    setattr(_Tag, f"__{_name}__", _as_array(f"__{_name}__"))
    setattr(_Tag, f"__r{_name}__", _as_array(f"__r{_name}__"))
for _name in _OTHERS.split():
    setattr(_Tag, f"__{_name}__", _as_array(f"__{_name}__"))


def _is_tag(parameter: Any, token: object) -> bool:
    """Whether it is a tag of this recording: a model may apply another sparse one."""
    return isinstance(parameter, _Tag) and parameter.static[0] is token


def _note_layer(found, layer, args, kwargs, stored, token):
    """Notes the geometry of a Flax layer that has a kernel."""
    tag = layer.scope.get_variable("params", "kernel")
    if not _is_tag(tag, token):
        return
    _, path, rank, stored_axes = tag.static
    _refuse_another_weight(path, tag.value, stored[path])
    ndim = tag.value.ndim
    if ndim != len(stored_axes):
        raise PlanError(
            f"{path}: a layer reads {ndim} of its {len(stored_axes)} axes, of which a "
            "jax.lax.scan or jax.vmap within the model took the others: use nn.scan or "
            "nn.vmap, or mask it with nmjax.plan_params and nmjax.sparsify_params"
        )
    axes = contracted_axes(layer, ndim, args, kwargs)
    if axes is None:
        return
    outputs = output_axes(layer, ndim, args, kwargs)
    note = {
        "layer": type(layer).__name__,
        "axes": tuple(stored_axes[axis] for axis in axes),
        "out_axes": tuple(stored_axes[axis] for axis in outputs),
        "out_parts": getattr(layer, "feature_group_count", 1),
        "stacked": tuple(a for a in range(-rank, 0) if a not in stored_axes),
        "weight_only": isinstance(layer, nn.ConvTranspose),
        "reason": why_no_hook(layer, tag.value.shape),
        "recipe": getattr(layer, "nm_recipe", None),
        "ndim": tag.value.ndim,
    }
    known = found.get(path, note)["axes"]
    if known and known != note["axes"]:
        raise PlanError(
            f"{path} is contracted along axes {known} and {note['axes']} at two uses: "
            "no single mask serves both; leave it dense"
        )
    found[path] = note


def _refuse_another_weight(path, kernel, stored):
    """Refuses a layer whose kernel is computed from the one stored at its path.

    Where no scan, vmap, remat or jit is around the layer, what it reads is the stored
    array itself. Inside a scan, remat or jit it is an input of what is traced there,
    which no equation made; inside a vmap nothing is known. Steps that change no value
    may lie between.
    """
    while (step := getattr(kernel, "parent", None)) and step.primitive.name in _MOVES:
        kernel = step.in_tracers[[v is kernel.val for v in step.outvars].index(True)]
    if kernel is stored:
        return
    same_trace = getattr(kernel, "_trace", None) is stored._trace
    if same_trace or getattr(kernel, "parent", None) is not None:
        raise PlanError(
            f"{path}: the model transforms this layer's parameters (nn.map_variables, "
            "or weights that it computes from them), and masks are of parameters as "
            "stored; mask them with nmjax.plan_params and nmjax.sparsify_params"
        )


# Primitives whose results are their operands, one by one.
_MOVES = (
    *("copy", "device_put", "name", "optimization_barrier", "reshard"),
    *("sharding_constraint", "stop_gradient"),
)


def _note_own_parameters(found, module, token):
    """Notes parameters that a module reads without being a layer we know."""
    scope = module.scope
    if scope is None:
        return
    own = [  # arrays, or whole trees; the others are of modules within
        parameter
        for name, parameter in scope.variables().get("params", {}).items()
        if _is_tag(parameter, token) or "params" in scope.reservations.get(name, ())
    ]
    for tag in jax.tree.leaves(own, is_leaf=lambda node: isinstance(node, _Tag)):
        if not _is_tag(tag, token) or tag.static[1] in found:
            continue
        embedding = isinstance(module, nn.Embed)
        found[tag.static[1]] = {
            "layer": type(module).__name__,
            "reason": EMBEDDING if embedding else OWN_PARAMETER,
            "axes": (),
            "ndim": tag.value.ndim,
        }


def contracted_axes(
    layer: nn.Module, ndim: int, args: tuple, kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """The kernel axes that a linen layer's GEMM contracts.

    Args:
      layer: Any module.
      ndim: Rank of its kernel inside the layer.
      args: Arguments of its call.
      kwargs: Keyword arguments of its call.

    Returns:
      Positions counted from the front, or None for a layer that is not known.
    """
    match layer:
        case nn.Dense():
            return (0,)
        case nn.DenseGeneral():
            batch = _length(layer.batch_dims)
            return tuple(range(batch, batch + _length(layer.axis)))
        case nn.Conv() | nn.ConvLocal():
            return (ndim - 2,)
        case nn.ConvTranspose():
            return (ndim - 1 if layer.transpose_kernel else ndim - 2,)
        case nn.Einsum():
            return einsum_axes(equation_of(layer, args, kwargs))
    return None


def output_axes(
    layer: nn.Module, ndim: int, args: tuple, kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """The kernel axes that run over a linen layer's outputs: dgrad contracts them.

    Args:
      layer: A layer that `contracted_axes` knows.
      ndim: Rank of its kernel inside the layer.
      args: Arguments of its call.
      kwargs: Keyword arguments of its call.

    Returns:
      Positions counted from the front.
    """
    match layer:
        case nn.DenseGeneral():
            first = _length(layer.batch_dims) + _length(layer.axis)
            return tuple(range(first, ndim))
        case nn.ConvTranspose():
            return (ndim - 2 if layer.transpose_kernel else ndim - 1,)
        case nn.Einsum():
            return einsum_out_axes(equation_of(layer, args, kwargs))
    return (ndim - 1,)


def equation_of(layer: nn.Einsum, args: tuple, kwargs: dict[str, Any]) -> str:
    """The equation of one call of an Einsum layer."""
    return layer.einsum_str or kwargs.get("einsum_str") or args[1]


def _length(axes: Any) -> int:
    return 1 if isinstance(axes, int) else len(axes)


def einsum_axes(equation: str) -> tuple[int, ...] | None:
    """The axes of the second operand that an einsum equation contracts.

    Returns:
      Positions counted from the front, those absent from the result; None where the
      second operand has an ellipsis or nothing is contracted.
    """
    read = Equation.read(equation)
    return None if "." in read.kernel else read.axes(read.contracted) or None


def einsum_out_axes(equation: str) -> tuple[int, ...]:
    """The axes of the second operand that only the result has beside it.

    Returns:
      Positions counted from the front.
    """
    read = Equation.read(equation)
    return read.axes(read.columns)


def own_hook(layer: nn.Module) -> str:
    """Says which hook of a layer the user has taken, or ""."""
    for name in ("dot_general", "conv_general_dilated"):
        for hook in (name, f"{name}_cls"):
            value = getattr(layer, hook, None)
            if value is not None and not isinstance(value, OPS):
                return f"the layer has its own {hook}"
    return ""


def own_body(cls: type, layers: tuple[type, ...]) -> str:
    """Why a subclass of a Flax layer reads its kernel in a way of its own, or "".

    Args:
      cls: Class of the layer.
      layers: Flax's classes.
    """
    for base in cls.__mro__:
        if base in layers:
            return ""
        if "param" in vars(base):
            return f"no hook: {base.__name__} has its own param"
        if "__call__" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["__call__"]), "__code__", None)
            if code is None or "__call__" not in code.co_names:
                return f"no hook: {base.__name__}.__call__ does not call Flax's"
    return ""


def why_no_hook(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """Why a known layer cannot take a sparse kernel, or ""."""
    if taken := own_hook(layer):
        return taken
    if isinstance(layer, nn.ConvLocal):
        return "unshared weights: not one GEMM"
    if no_hook := own_body(type(layer), LAYERS):
        return no_hook
    if getattr(layer, "mask", None) is not None:
        return "the layer has its own mask"
    if isinstance(layer, nn.Conv) and layer.feature_group_count > 1 and shape[-2] == 1:
        return "depthwise: 1 input channel in each group"
    return ""

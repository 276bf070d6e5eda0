"""SparseGPT: layer by layer, what is dropped is made up for by what comes after it.

For a GEMM y = X W with calibration inputs X (samples, k), dropping weights costs
‖X W' − X W‖² = tr(ΔWᵀ H ΔW) / 2 with the Hessian

    H = 2 XᵀX + λI

Rows of W are dropped in order of their index (arXiv:2301.00774). With the upper
triangular U of H⁻¹ = UᵀU, row j of U belongs to the inverse Hessian of the rows from j
on: zeroing weight w_j costs w_j² / U_jj², and the best change of the later rows is
−(w_j / U_jj) U_j. So, for each group of m rows, keep the n of largest w_j² / U_jj²,
and for each row pass the error of what was dropped on to the later rows.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks import magnitude_mask, nm_mask
from nmjax.paths import named_leaves
from nmjax.pattern import NMPattern
from nmjax.plans import Plan
from nmjax.pruning.calibration import Batch, Calibration, with_leaves
from nmjax.pruning.layers import Layer, Matrices, why_not_a_gemm
from nmjax.pruning.report import LayerReport, Pruned
from nmjax.rules import Rules
from nmjax.sparsity import Sparsity

# Rows whose errors are passed on to the rows behind them in one GEMM.
_ROWS_PER_BLOCK = 128

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def sparse_gpt(
    model: Any,
    rules: Rules | Plan,
    batches: Iterable[Batch],
    *,
    variables: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    damping: float = 0.01,
    sequential: bool = True,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Pruned:
    """Prunes a trained model to N:M by second-order updates (arXiv:2301.00774).

    No training: each layer takes one pass over the calibration batches, a Cholesky
    factorisation of its k × k Hessian and about k² · out multiplications.

    Args:
      model: A linen or nnx model. It runs eagerly, layer by layer.
      rules: What to prune: rules, a pattern such as "2:4", or a plan.
      batches: Calibration inputs, each what the model takes: an array, or a tuple of
        positional arguments. A few hundred examples are usual.
      variables: Variables of a linen model, `{"params": …, "batch_stats": …}`.
      kwargs: Keyword arguments of the model's call, such as `{"train": False}`. An nnx
        model runs in evaluation mode.
      damping: λ as a share of the mean of the Hessian's diagonal.
      sequential: Whether a layer's calibration inputs come from the model whose
        earlier layers are pruned already, as in the paper; else from the dense model,
        in a single pass.
      on_layer: Called after each layer.

    Returns:
      Parameters, plan and the error of each layer.

    Raises:
      ValueError: A layer of the plan is no GEMM or convolution, its recipe's mask is
        not by magnitude, or its inputs cannot be had (see `nmjax.pruning.calibration`);
        `damping` is not above 0; a calibration input is not finite.
      PlanError: As `nmjax.plan`.
    """
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")
    masks = ("magnitude",)
    calibration = Calibration(model, rules, batches, variables, kwargs, masks)
    order = calibration.order()
    params, reports = calibration.params, []
    hessians = {} if sequential else _hessians(calibration, params, order)
    for path in order:
        if sequential:
            hessians = _hessians(calibration, params, [path])
        hessian, samples, matrices = hessians.pop(path)
        kernel = jnp.asarray(named_leaves(calibration.params)[path], jnp.float32)
        pruned, *errors = _prune_layer(
            path, kernel, matrices, hessian, calibration.sparsity(path), damping
        )
        report = LayerReport(path, samples, *errors)
        params = with_leaves(params, {path: pruned})
        reports.append(report)
        if on_layer is not None:
            on_layer(report)
    return Pruned(params, calibration.plan, tuple(reports))


def obs_prune(
    w: jax.Array,
    hessian: jax.Array,
    pattern: str | NMPattern,
    *,
    damping: float = 0.01,
) -> jax.Array:
    """Prunes one matrix to N:M, given the Hessian of its inputs.

    Args:
      w: (k, out), floating; m divides k.
      hessian: (k, k), symmetric, positive semi-definite: `2 XᵀX` for inputs X
        (samples, k), up to a factor. Inputs that are always zero have zero rows here:
        their weights are dropped first, the smallest of them before the others.
      pattern: n kept of every m along k.
      damping: λ as a share of the mean of the Hessian's diagonal.

    Returns:
      (k, out) in float32, exactly zero where dropped.

    Raises:
      ValueError: Shapes do not fit.
    """
    pattern = NMPattern(pattern)
    if w.ndim != 2 or hessian.shape != 2 * w.shape[:1] or w.shape[0] % pattern.m:
        raise ValueError(
            f"expected w (k, out) with k a multiple of {pattern.m} and a Hessian "
            f"(k, k), got {w.shape} and {hessian.shape}"
        )
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    whole = jnp.zeros(len(w), bool)
    return _obs_prune(w, hessian, whole, jnp.float32(damping), pattern)


def _hessians(
    calibration: Calibration, params: Any, paths: list[str]
) -> dict[str, tuple[jax.Array, int, Matrices]]:
    """2 XᵀX / samples of each layer, the number of samples, and its kernel's matrices.

    The first is (matrices, k, k).
    """
    sums: dict[str, Any] = {}
    counts = dict.fromkeys(paths, 0)
    views: dict[str, Matrices] = {}
    add: dict[str, Any] = {}
    for layer, x in calibration.inputs(params, paths):
        entry = calibration.plan[layer.path]
        if layer.path not in sums:
            if reason := why_not_a_gemm(layer):
                raise ValueError(
                    f"{layer.path}: sparse_gpt cannot prune it ({reason}): leave it "
                    "dense by a rule, or use ada_prune"
                )
            view = layer.matrices(len(entry.shape), entry.axes)
            kernel = jax.ShapeDtypeStruct(entry.shape, jnp.float32)
            count, k, _ = jax.eval_shape(view.of, kernel).shape
            sums[layer.path] = jnp.zeros((count, k, k), jnp.float32)
            views[layer.path] = view
            add[layer.path] = jax.jit(functools.partial(_add, layer, k))
        sums[layer.path], samples = add[layer.path](sums[layer.path], x)
        counts[layer.path] += int(samples)
    return {
        path: (2 / counts[path] * sums[path], counts[path], views[path])
        for path in paths
    }


def _add(layer: Layer, k: int, total: jax.Array, x: jax.Array):
    features = layer.features(x, k)  # (matrices, samples, k)
    return total + _dot(jnp.swapaxes(features, 1, 2), features), features.shape[1]


def _prune_layer(
    path: str,
    kernel: jax.Array,
    matrices: Matrices,
    hessian: jax.Array,
    sparsity: Sparsity,
    damping: float,
) -> tuple[jax.Array, float, float]:
    """The pruned kernel, and the relative errors of magnitude pruning and its own."""
    axis, pattern = matrices.rows[-1], sparsity.pattern
    size = kernel.shape[axis]
    # A ragged axis gets zero weights that no input reads; what is behind the last
    # whole group stays whole, or is one more group together with them.
    missing = -size % pattern.m
    window = hessian.shape[-1] // size
    widths = [(0, missing * (a == axis)) for a in range(kernel.ndim)]
    padded = jnp.pad(kernel, widths)
    whole = jnp.arange(size + missing) >= size - size % pattern.m
    whole = jnp.tile(whole & (sparsity.ragged == "dense-tail"), window)
    hessian = hessian.reshape(-1, window, size, window, size)
    hessian = jnp.pad(hessian, [(0, 0), (0, 0), (0, missing), (0, 0), (0, missing)])
    hessian = hessian.reshape(-1, len(whole), len(whole))
    # Of a mean that the zeros are part of.
    share = jnp.float32(damping * (size + missing) / size)

    w = matrices.of(padded)
    prune = functools.partial(_obs_prune, pattern=pattern)
    new = jax.vmap(prune, (0, 0, None, None))(w, hessian, whole, share)
    if not np.isfinite(new).all():
        raise ValueError(
            f"{path}: its Hessian has no Cholesky factor in float32: its calibration "
            f"inputs are not finite, or damping must be above {damping}"
        )
    dense, magnitude, error = map(float, _costs(w, new, hessian, whole, pattern))
    pruned = lax.slice_in_dim(matrices.kernel(new, padded.shape), 0, size, axis=axis)
    return pruned, magnitude / max(dense, 1e-30), error / max(dense, 1e-30)


@functools.partial(jax.jit, static_argnames="pattern")
def _costs(w, new, hessian, whole, pattern):
    """tr(Δᵀ H Δ) of dropping everything, of magnitude pruning and of `new`."""
    mask = magnitude_mask(w, pattern) | whole[:, None]
    plain = jnp.where(mask, w, 0)
    return [jnp.sum(d * _dot(hessian, d)) for d in (w, plain - w, new - w)]


@functools.partial(jax.jit, static_argnames="pattern")
def _obs_prune(
    w: jax.Array,
    hessian: jax.Array,
    whole: jax.Array,
    damping: jax.Array,
    pattern: NMPattern,
) -> jax.Array:
    """As `obs_prune`; rows of `whole`, (k,) bool, are kept."""
    k, out = w.shape
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    # A row that no input reads stands alone, with a Hessian of 1.
    added = damping * jnp.mean(diagonal) + dead.astype(jnp.float32)
    u = _inverse_factor(hessian + jnp.diag(added))

    rows = pattern.m * max(1, _ROWS_PER_BLOCK // pattern.m)
    blocks = -(-k // rows)
    missing = blocks * rows - k
    # Padding that nothing is passed on to: zero weights with a Hessian of 1.
    u = jnp.pad(u, ((0, missing), (0, missing)))
    u += jnp.diag((jnp.arange(len(u)) >= k).astype(jnp.float32))
    w = jnp.pad(w, ((0, missing), (0, 0)))
    dead, whole = (jnp.pad(rows_of, (0, missing)) for rows_of in (dead, whole))

    def prune_block(i, w):
        start = i * rows
        mine = lax.dynamic_slice(w, (start, 0), (rows, out))
        u_mine = lax.dynamic_slice(u, (start, 0), (rows, len(u)))
        u_block = lax.dynamic_slice(u_mine, (0, start), (rows, rows))
        dead_mine = lax.dynamic_slice(dead, (start,), (rows,))
        whole_mine = lax.dynamic_slice(whole, (start,), (rows,))
        mine, errors = _prune_rows(mine, u_block, dead_mine, whole_mine, pattern)
        later = jnp.arange(len(u)) >= start + rows
        w = w - _dot(jnp.where(later, u_mine, 0).T, errors)
        return lax.dynamic_update_slice(w, mine, (start, 0))

    return lax.fori_loop(0, blocks, prune_block, w)[:k]


def _inverse_factor(hessian: jax.Array) -> jax.Array:
    """The upper triangular U with H⁻¹ = UᵀU: the inverse of R with H = R Rᵀ."""
    # Cholesky from the last row up is that of the reversed matrix, reversed.
    r = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(r, identity, lower=False)


def _prune_rows(
    w: jax.Array, u: jax.Array, dead: jax.Array, whole: jax.Array, pattern: NMPattern
) -> tuple[jax.Array, jax.Array]:
    """Prunes some rows, group by group; also gives the errors w_j / U_jj dropped."""
    m, out = pattern.m, w.shape[1]
    scale = jnp.diagonal(u)

    def prune_group(g, carry):
        w, errors = carry
        group = lax.dynamic_slice(w, (g * m, 0), (m, out))
        spread = lax.dynamic_slice(scale, (g * m,), (m,))
        idle = lax.dynamic_slice(dead, (g * m,), (m,))
        size = jnp.abs(group)
        scores = size / spread[:, None]  # the root of what dropping the weight costs
        mask = nm_mask(jnp.where(idle[:, None], -1 / size, scores), pattern)
        mask |= lax.dynamic_slice(whole, (g * m,), (m,))[:, None]

        def prune_row(i, carry):
            w, errors = carry
            j = g * m + i
            row = lax.dynamic_slice(w, (j, 0), (1, out))
            kept = lax.dynamic_slice(mask, (i, 0), (1, out))
            error = jnp.where(kept, 0, row) / scale[j]
            w = w - lax.dynamic_slice(u, (j, 0), (1, len(u))).T * error
            w = lax.dynamic_update_slice(w, jnp.where(kept, row, 0), (j, 0))
            return w, lax.dynamic_update_slice(errors, error, (j, 0))

        return lax.fori_loop(0, m, prune_row, (w, errors))

    return lax.fori_loop(0, len(w) // m, prune_group, (w, jnp.zeros_like(w)))

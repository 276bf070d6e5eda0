"""What pruning after training gives back: parameters, and an error for each layer."""

import dataclasses
from typing import Any

from nmjax.plans import Plan


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How well a pruned layer still computes what the dense one does.

    Errors are Σ‖y' − y‖² / Σ‖y‖² over the calibration batches, y the output of the
    dense layer (without its bias for `sparse_gpt`) and y' that of the pruned one, both
    for the same inputs.

    Attributes:
      path: Path of the kernel.
      samples: Number of inputs (rows of the GEMM; for `ada_prune`, examples).
      magnitude_error: Error of the magnitude-pruned layer: of what the recipe makes of
        the dense weight, unchanged.
      error: Error of the result.
    """

    path: str
    samples: int
    magnitude_error: float
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """Parameters that are N:M without their model's being sparse.

    Attributes:
      params: The parameters, structure and dtypes as given; dropped weights are zero.
        For an nnx model, nested dictionaries: `nnx.update(model, params)`.
      plan: What was pruned, for fine-tuning and for
        `nmjax.check(params, plan, nmjax.init_state(params, plan))`: recipes that keep
        their masks have them in a state, and are not judged without.
      layers: One report for each pruned layer, in the order of the work.
    """

    params: Any
    plan: Plan
    layers: tuple[LayerReport, ...]

"""What one training run does: a frozen, validated, JSON-able value.

A config that exists is valid: every limit that does not depend on the data or
the machine is checked on construction, so that a wrong value is refused before
anything is loaded. What depends on them (does the batch divide over the
devices, is the data set as large as one batch) is checked by `train` before the
first step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

Optimizer = Literal["sgd", "adamw", "step_adam"]
LrSchedule = Literal["cosine", "step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of one run of `nmjax.training.train`.

    Attributes:
      epochs: Passes over the training set. An epoch is
        `num_train // batch_size` steps; the remainder is dropped and the next
        epoch is shuffled anew.
      batch_size: Images per optimizer step, over all devices and hosts. Also
        the batch size of evaluation.
      micro_batches: The step's batch is split into this many equal parts whose
        gradients are averaged; batch norm sees one part at a time.
      optimizer: "sgd" (momentum, weight decay added to the gradient before the
        momentum, as torch does), "adamw" (decoupled weight decay; b1 = 0.9,
        b2 = 0.999, eps = 1e-8), or "step_adam": the same with a second moment that
        stays as it is from the first sparse step on, as `nmjax.two_phase_adam`; the
        run must start dense (STEP, arXiv:2302.01172).
      lr: Learning rate at the end of the warm-up.
      momentum: Of SGD. 0 is plain SGD.
      nesterov: Nesterov's form of the momentum; SGD only.
      weight_decay: Acts on all parameters, pruned weights, biases and batch
        norm scales included, as torchvision's recipe does; not on logits of
        learned masks, nor on the weights under them, which stay as they are.
      schedule: "cosine" to 0 at the last step, or "step": times `step_factor`
        at the start of each epoch of `step_epochs`.
      warmup_epochs: Epochs of linear warm-up from 0, part of `epochs`; may be a
        fraction.
      step_epochs: Epochs at which "step" lowers the learning rate.
      step_factor: The factor of "step".
      label_smoothing: Share of the target spread over all classes; 0 is none.
      clip_norm: Largest global norm of the gradient (the sparse decay
        included, weight decay not); None does not clip.
      loss_scale: The loss is multiplied by this before differentiation and the
        gradient divided by it afterwards; a power of two changes no bit in
        float32.
      seed: Of the initial parameters, the data order and dropout.
      checkpoint_every: Steps between checkpoints; None saves at the end of
        each epoch. The last step is always saved.
      keep: Number of latest checkpoints to keep; the best one by test top-1 is
        kept beside them.
      log_every: Steps between rows of metrics.csv. The end of an epoch, with
        its evaluation, always gives a row.
      dense_epochs: First epochs in which no rule is applied.
      freeze_epochs: Last epochs in which the masks stay as they are.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    micro_batches: int = 1
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    schedule: LrSchedule = "cosine"
    warmup_epochs: float = 0
    step_epochs: tuple[float, ...] = (30, 60, 80)
    step_factor: float = 0.1
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    loss_scale: float = 1.0
    seed: int = 0
    checkpoint_every: int | None = None
    keep: int = 3
    log_every: int = 50
    dense_epochs: int = 0
    freeze_epochs: int = 0

    def __post_init__(self):
        object.__setattr__(self, "step_epochs", tuple(self.step_epochs))
        for name, allowed in (("optimizer", Optimizer), ("schedule", LrSchedule)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(allowed))}"
                )
        for name in ("epochs", "batch_size", "micro_batches", "keep", "log_every"):
            self._require_int(name, least=1)
        for name in ("dense_epochs", "freeze_epochs"):
            self._require_int(name, least=0)
        self._require_int("seed", least=0, most=2**31 - 1)
        if self.checkpoint_every is not None:
            self._require_int("checkpoint_every", least=1)
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov is {self.nesterov!r}, expected true or false")
        self._require_number("lr", above=0)
        self._require_number("loss_scale", above=0)
        self._require_number("step_factor", above=0, most=1)
        self._require_number("weight_decay", least=0)
        self._require_number("momentum", least=0, below=1)
        self._require_number("label_smoothing", least=0, below=1)
        self._require_number("warmup_epochs", least=0, below=self.epochs)
        if self.clip_norm is not None:
            self._require_number("clip_norm", above=0)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batches "
                f"{self.micro_batches}"
            )
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != 0.9):
            raise ValueError(
                "momentum and nesterov act on optimizer 'sgd' only; leave them out "
                f"with {self.optimizer!r} (b1 is 0.9)"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if list(self.step_epochs) != sorted(set(self.step_epochs)) or any(
            not math.isfinite(epoch) or epoch <= 0 for epoch in self.step_epochs
        ):
            raise ValueError(
                f"step_epochs is {self.step_epochs}, expected increasing epochs above 0"
            )
        phases = self.dense_epochs + self.freeze_epochs
        if phases > self.epochs or self.dense_epochs == self.epochs:
            raise ValueError(
                f"dense_epochs {self.dense_epochs} + freeze_epochs "
                f"{self.freeze_epochs} must fit into epochs {self.epochs} and leave "
                "a phase in which the network is sparse"
            )

    def _require_int(self, name: str, *, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
        if most is not None and value > most:
            raise ValueError(f"{name} is {value!r}, expected an integer <= {most}")

    def _require_number(
        self,
        name: str,
        *,
        above: float = -math.inf,
        least: float = -math.inf,
        below: float = math.inf,
        most: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN fails every comparison and infinity the strict ones with inf.
        if not (is_number and above < value < below and least <= value <= most):
            limits = [
                f"{sign} {limit}"
                for sign, limit in (
                    (">", above),
                    (">=", least),
                    ("<", below),
                    ("<=", most),
                )
                if math.isfinite(limit)
            ]
            raise ValueError(
                f"{name} is {value!r}, expected a number {' and '.join(limits)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "step_epochs": list(self.step_epochs)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the config that `to_dict` wrote.

        Raises:
          ValueError: A field is unknown or missing, or a value is out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(
                f"unknown fields {', '.join(unknown)}; known are {', '.join(known)}"
            )
        if missing := sorted(required - set(fields)):
            raise ValueError(f"missing fields {', '.join(missing)}")
        return cls(**fields)

"""The training loop: data in; steps, evaluation, metrics and checkpoints out."""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.paths import named_leaves
from nmjax.plans import Plan
from nmjax.state import state_leaves
from nmjax.training.checkpoint import CheckpointWriter, list_steps
from nmjax.training.config import TrainConfig
from nmjax.training.evaluation import run_evaluation
from nmjax.training.metrics import Interval, MetricsWriter, Progress, columns
from nmjax.training.resume import (
    Position,
    best_so_far,
    checkpoint_items,
    of_every_host,
    rank,
)
from nmjax.training.signals import StopRequested, StopSignals
from nmjax.training.state import (
    Phase,
    TrainState,
    jit_enter_phase,
    make_schedule,
    phase_of_step,
    replicated,
)
from nmjax.training.steps import (
    check_labels,
    jit_eval_step,
    jit_mask_metrics,
    jit_train_step,
    put_batch,
)


class TrainingDiverged(RuntimeError):  # noqa: N818 (the name says what happened)
    """The loss, or a number in the state, is NaN or infinite.

    Attributes:
      step: The step whose loss it is, or after which the state is.
      last_good: Folder of the last checkpoint, or None.
    """

    def __init__(self, what: str, step: int, lr: float, last_good: Path | None):
        """Says what is not finite, where, and what to do."""
        good = "there is none" if last_good is None else str(last_good)
        super().__init__(
            f"{what} at step {step}, learning rate {lr:.3g}. Last good checkpoint: "
            f"{good}. Try a lower lr, a longer warm-up, or clip_norm"
        )
        self.step, self.last_good = step, last_good


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
      state: The state after the last step, on the devices.
      plan: The plan of the last phase.
      test_loss: Mean cross entropy on the test set.
      test_top1: Share of test images whose label is the first choice.
      test_top5: Share whose label is among the first five; None with fewer than six
        classes.
      step_seconds: Median time of a step, without compilation, evaluation and
        checkpoints; None when too few ran to tell.
      metrics_file: metrics.csv.
      checkpoint: Folder of the last checkpoint.
      best: Folder that holds the best one by test top-1.
    """

    state: TrainState
    plan: Plan
    test_loss: float
    test_top1: float
    test_top5: float | None
    step_seconds: float | None
    metrics_file: Path
    checkpoint: Path | None
    best: Path


class Loop:
    """One run, from a position on."""

    def __init__(
        self,
        config: TrainConfig,
        data: Any,
        phases: Sequence[Phase],
        run_dir: Path,
        position: Position,
        *,
        progress: bool,
    ):
        """Takes up the position; `train` has checked that everything fits."""
        self._config, self._data, self._phases = config, data, phases
        self._run_dir = run_dir
        self._phase = next(p for p in phases if p.name == position.phase)
        self._mesh = self._phase.mesh
        self._steps_per_epoch = self._phase.steps_per_epoch
        self._total = config.epochs * self._steps_per_epoch
        self._schedule = make_schedule(config, self._steps_per_epoch)
        self._state = position.state
        make_key = jax.jit(jax.random.key, out_shardings=replicated(self._mesh))
        self._key = make_key(config.seed)
        self._step = int(position.state.step)

        hosts = {"num_hosts": jax.process_count(), "host": jax.process_index()}
        self._batches = data.train_batches(
            config.batch_size // jax.process_count(), seed=config.seed, **hosts
        )
        if not (
            hasattr(self._batches, "get_state") and hasattr(self._batches, "set_state")
        ):
            raise ValueError(
                f"train_batches of {data.name} must return an iterator with get_state "
                f"and set_state, got {type(self._batches).__name__}"
            )
        if position.data:
            self._batches.set_state(position.data[jax.process_index()])

        self._mask_sizes = _sizes(position.state.masks)
        self._interval = Interval(position.interval)
        self._pending: _Step | None = None
        self._last: _Step | None = None
        self._test: dict[str, float] | None = None
        self._saved_step = self._step if position.data else None
        self._best = best_so_far(run_dir)
        self._clock = _Clock()
        self._signals = StopSignals(every=config.log_every)
        self._checkpoints = CheckpointWriter(run_dir, keep=config.keep)
        masked = any(phase.plan.masked for phase in phases)
        names = columns(data.num_classes, sparse=masked)
        primary = jax.process_index() == 0
        self._metrics = MetricsWriter(run_dir, names, step=self._step, primary=primary)
        if self._metrics.last_step == self._step > 0:
            # This step's row was written, perhaps after its checkpoint: then the sums
            # of the row are still in it.
            self._interval.row(0)
            if self._at_end():
                self._interval.layers({})
        self._progress = Progress(
            total=self._total, step=self._step, shown=progress and primary
        )

    def run(self) -> TrainResult:
        """Does what is left of the run."""
        with self._signals:
            return self._run()

    def _run(self) -> TrainResult:
        if self._at_epoch_end() and self._metrics.last_step < self._step:
            # A signal came after the last step of an epoch, before its evaluation.
            self._end_step()
        while self._step < self._total:
            self._do_step()
            self._end_step()
        if self._test is None:  # the run was complete before
            self._test = self._evaluate()
        if self._test is None:
            self._stop()
        return TrainResult(
            state=self._state,
            plan=self._phase.plan,
            test_loss=self._test["loss"],
            test_top1=self._test["top1"],
            test_top5=self._test.get("top5"),
            step_seconds=self._clock.median(),
            metrics_file=self._metrics.file,
            checkpoint=self._last_checkpoint(),
            best=self._run_dir / "best",
        )

    def close(self) -> None:
        """Closes the files, after a failure too; waits for the last checkpoint."""
        self._progress.close()
        self._metrics.close()
        self._checkpoints.close()

    def _at_epoch_end(self) -> bool:
        return self._step > 0 and self._step % self._steps_per_epoch == 0

    def _at_phase_end(self) -> bool:
        done, after = (
            phase_of_step(self._phases, s) for s in (self._step - 1, self._step)
        )
        return done is not after

    def _at_end(self) -> bool:
        """Whether layers.csv has rows of this step."""
        return self._at_epoch_end() or self._at_phase_end()

    def _do_step(self) -> None:
        phase = phase_of_step(self._phases, self._step)
        if phase is not self._phase:
            self._state = jit_enter_phase(self._phase, phase)(self._state)
            self._phase = phase
            self._mask_sizes = _sizes(self._state.masks)
            self._clock.pause()
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError(
                f"train_batches of {self._data.name} ended after step {self._step}: it "
                "has to go on without end"
            )
        check_labels(batch, self._data)
        batch = put_batch(batch, self._mesh)
        self._state, metrics = jit_train_step(phase)(self._state, batch, self._key)
        # The metrics of the step before are fetched while the device works on this
        # one: it never waits for the host.
        self._collect()
        self._step += 1
        self._pending = _Step(phase, self._mask_sizes, metrics, self._measure())

    def _measure(self) -> Mapping[str, Mapping[str, jax.Array]]:
        """Begins to measure the masks of this step, if a row is to follow."""
        if self._mask_sizes and (
            self._at_end() or self._step % self._config.log_every == 0
        ):
            return jit_mask_metrics(self._phase)(self._state)
        return {}

    def _collect(self) -> None:
        """Fetches the metrics of step `_step`, if that has not been done."""
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        self._last = done
        metrics = jax.device_get(dict(done.metrics))
        by_mask = metrics.pop("layer_sad").tolist()
        metrics = {name: float(x) for name, x in metrics.items()}
        if not math.isfinite(metrics["loss"]):
            self._diverged(f"the loss is {metrics['loss']}")
        self._clock.tick()
        sad = dict(zip(done.sizes, by_mask, strict=True))
        self._interval.add(metrics, sad)
        self._progress.advance(loss=metrics["loss"], top1=metrics["top1"])
        due = self._step % self._config.log_every == 0 or self._at_phase_end()
        if due and not self._at_epoch_end():
            self._write_row(done, {})

    def _end_step(self) -> None:
        """Evaluates, saves and stops, where it is time to."""
        ended = self._at_epoch_end()
        every = self._config.checkpoint_every
        due = ended if every is None else self._step % every == 0
        due = due or self._step == self._total
        self._test, better = None, False
        if ended:
            self._collect()
            self._test = self._evaluate()
        if self._test is not None:
            test = {f"test_{name}": x for name, x in self._test.items()}
            # After a signal, the last step of the epoch was another process's.
            step = self._last or _Step(
                self._phase, self._mask_sizes, {}, self._measure()
            )
            self._write_row(step, test)
            better = rank(self._phase.name, self._test["top1"]) > self._best
        # An evaluation without a result was given up by all hosts together.
        stop = (ended and self._test is None) or self._signals.stop(self._step)
        if due or better or stop:
            self._save(latest=due or stop, best=better)
        if stop:
            self._stop()

    def _evaluate(self) -> dict[str, float] | None:
        """Test metrics, or None: a signal came."""
        state = self._state
        step = functools.partial(
            jit_eval_step(self._phase.model, self._mesh),
            state.params,
            state.batch_stats,
            state.masks,
        )
        self._clock.pause()
        try:
            test = run_evaluation(
                step,
                self._data,
                self._config.batch_size,
                self._mesh,
                before_batch=self._signals.raise_if_stopped,
            )
        except StopRequested:
            return None
        self._progress.note(test_top1=test["top1"])
        return test

    def _write_row(self, step: "_Step", test: Mapping[str, float]) -> None:
        masks = jax.device_get(dict(step.masks))
        masks = {n: {p: float(x) for p, x in v.items()} for n, v in masks.items()}
        row = {
            "step": self._step,
            "epoch": round(self._step / self._steps_per_epoch, 4),
            "phase": step.phase.name,
            "lr": self._lr(),
            **self._interval.row(sum(step.sizes.values())),
            **{name: by_path["total"] for name, by_path in masks.items()},
            "images_per_second": self._clock.rate(self._config.batch_size),
        }
        layers = {}
        if self._at_end():
            layers = self._interval.layers(step.sizes)
            for path, values in layers.items():
                values |= {n: v[path] for n, v in masks.items() if path in v}
        self._metrics.write({**row, **test}, layers)

    def _lr(self) -> float:
        """The learning rate of the last step done."""
        lr: Any = self._schedule(jnp.int32(max(0, self._step - 1)))
        return float(lr)

    def _save(self, *, latest: bool, best: bool) -> None:
        self._collect()
        items = checkpoint_items(self._state)
        for path, array in named_leaves(items).items():
            inexact = jnp.issubdtype(array.dtype, jnp.inexact)
            if inexact and not np.isfinite(array).all():
                self._diverged(f"{path} is not finite")
        data = of_every_host(self._batches.get_state())
        meta = {
            "step": self._step,
            "phase": self._phase.name,
            "plan": json.loads(self._phase.plan.to_json()),
            "config": self._config.to_dict(),
            "test": self._test,
            "interval": self._interval.sums,
        }
        if latest and self._saved_step != self._step:
            self._checkpoints.save(items, data, meta)
            self._saved_step = self._step
        if best and self._test:
            self._checkpoints.save_best(items, meta)
            self._best = rank(self._phase.name, self._test["top1"])
        self._clock.pause()

    def _last_checkpoint(self) -> Path | None:
        self._checkpoints.wait()
        steps = list_steps(self._run_dir / "checkpoints")
        return self._run_dir / "checkpoints" / str(steps[-1]) if steps else None

    def _diverged(self, what: str) -> NoReturn:
        raise TrainingDiverged(what, self._step, self._lr(), self._last_checkpoint())

    def _stop(self) -> NoReturn:
        self._progress.close()
        raise self._signals.interrupted(self._step, self._last_checkpoint())


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that was made.

    Attributes:
      phase: Its phase.
      sizes: Weights under each mask by path, in the order of the state.
      metrics: Of `train_step`, on the devices.
      masks: Of `nmjax.metrics.of_masks`, on the devices; `{}` where no row follows.
    """

    phase: Phase
    sizes: Mapping[str, int]
    metrics: Mapping[str, jax.Array]
    masks: Mapping[str, Mapping[str, jax.Array]]


def _sizes(masks: Any) -> dict[str, int]:
    """Weights under each mask by path."""
    return {path: mask.size for path, mask in state_leaves(masks, "mask").items()}


class _Clock:
    """Times between steps, those with a pause left out."""

    def __init__(self):
        self._last: float | None = None
        self._seconds: list[float] = []
        self._since_row = 0

    def pause(self) -> None:
        """The time until the next step says nothing about a step."""
        self._last = None

    def tick(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def median(self) -> float | None:
        """Of all steps."""
        return statistics.median(self._seconds) if self._seconds else None

    def rate(self, batch_size: int) -> float | None:
        """Images per second since the last call, or None."""
        recent = self._seconds[self._since_row :]
        self._since_row = len(self._seconds)
        return batch_size * len(recent) / sum(recent) if recent else None

"""Training a linen model on images: loop, checkpoints, metrics.

    from nmjax.training import (
        TrainConfig, train, evaluate, restore, check_network, load_plan
    )

    config = TrainConfig(epochs=15, batch_size=128, lr=0.1, weight_decay=1e-4)
    result = train(model, rules, data, config, "runs/digits")

The model is any linen module `(images, train: bool) -> logits` whose variables are
"params" and "batch_stats"; rules are those of `nmjax.sparsify`, `[]` is dense.

The data set is any object with `name`, `num_classes`, `image_shape` (height, width,
channels), `num_train`, `num_test` and

    train_batches(batch_size, *, seed, num_hosts=1, host=0)
        An iterator without end of {"image": float32 (B, H, W, C), "label": int32
        (B,)}, NumPy, with `get_state()`, JSON-able, and `set_state(state)`.
    test_batches(batch_size, *, num_hosts=1, host=0)
        An iterable of the same with "valid": float32 (B,), 0 where the last batch is
        padded. All hosts see the same number of batches.

`batch_size` is that of one host. A run folder holds

    config.json, versions.json, plan.json     what was asked, on what, sparse where
    options.json                              what else the caller asked, if anything
    metrics.csv, events.*                     one row for each interval and epoch
    layers.csv                                the masks of each layer, once an epoch
    checkpoints/STEP, best/STEP               see nmjax.training.checkpoint
    set_aside/                                damaged or abandoned checkpoints, if any
    lock                                      held while a process trains here

metrics.csv has the columns step, epoch, phase, lr, train_loss, train_top1, train_top5,
flip_rate, sad, density, retained_magnitude, transposable_gap, images_per_second,
test_loss, test_top1, test_top5. The train columns, and `flip_rate` (share of mask bits
that one step changes), are means over the steps since the last row, `sad` is the number
of mask bits changed in them; density, retained magnitude and the gap to the best
transposable masks are those of `nmjax.metrics` after the row's step. layers.csv and
TensorBoard have the same of every masked weight at the end of each epoch and phase.
Test columns are empty except at the end of an epoch. With fewer than six classes there
are no top-5 columns, in a run that masks no weight no mask columns and no layers.csv.
Accuracies are shares in [0, 1].

The same seed on the same devices gives the same run, and a resumed run equals an
uninterrupted one bit for bit, rows of metrics.csv included. SIGTERM and SIGINT write a
checkpoint and raise `TrainingInterrupted`, a SystemExit of code 143 or 130; a process
killed outright loses the steps since the last checkpoint.
"""

try:
    import optax as _optax  # noqa: F401
    import orbax.checkpoint as _orbax_checkpoint  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"nmjax.training needs {error.name}: pip install 'nmjax[train]'",
        name=error.name,
    ) from error

from nmjax.training.checking import check_network as check_network
from nmjax.training.checkpoint import CheckpointError as CheckpointError
from nmjax.training.checkpoint import DamagedCheckpointError as DamagedCheckpointError
from nmjax.training.config import TrainConfig as TrainConfig
from nmjax.training.evaluation import evaluate as evaluate
from nmjax.training.evaluation import reestimate_batch_stats as reestimate_batch_stats
from nmjax.training.loop import TrainingDiverged as TrainingDiverged
from nmjax.training.loop import TrainResult as TrainResult
from nmjax.training.restoring import load_plan as load_plan
from nmjax.training.restoring import restore as restore
from nmjax.training.signals import TrainingInterrupted as TrainingInterrupted
from nmjax.training.start import train as train
from nmjax.training.state import TrainState as TrainState

"""Training a linen model on images: loop, checkpoints, metrics.

    from nmjax.training import TrainConfig, train, evaluate, restore, load_plan

    config = TrainConfig(epochs=15, batch_size=128, lr=0.1, weight_decay=1e-4)
    result = train(model, rules, data, config, "runs/digits")

`train(model, rules, data, config, run_dir, *, resume=True, progress=True,
init_params=None, init_batch_stats=None, devices=None) -> TrainResult`
    Trains a plain linen model `(images, train: bool) -> logits`. `rules` as for
    `nmjax.sparsify`; `[]` is dense. `resume`: True continues from the latest
    intact checkpoint if there is one, a step number from exactly that one, False
    refuses a folder that holds checkpoints. Data parallel over `devices` (all of
    them by default). `TrainResult` has `state` (TrainState), `plan`, `test_top1`,
    `test_top5` (None with fewer than six classes), `test_loss`, `step_seconds`
    (median; None when no step ran), `metrics_file`, `checkpoint` (path of the
    last one), `best` (path of the best one).

    SIGTERM and SIGINT write a checkpoint and raise `TrainingInterrupted`, a
    SystemExit of code 143 or 130: an uncaught one ends the process with that
    code. A NaN or infinite loss raises `TrainingDiverged`. A damaged or foreign
    checkpoint raises `CheckpointError`, a ValueError.

`evaluate(model, rules, variables, data, batch_size, *, devices=None) -> dict`
    `rules` or a `Plan`; `variables` is `{"params", "batch_stats", "nm"}`, the
    last two optional (what `restore` returns will do). Returns `loss`, `top1`,
    `count` and, with six classes or more, `top5`; top-1 and top-5 are shares in
    [0, 1].

`reestimate_batch_stats(model, rules, variables, data, batch_size, *, batches,
seed=0) -> dict`
    The same variables with batch statistics of the network as it is now: needed
    after pruning a trained network.

`restore(path, step=None) -> dict`
    `params`, `batch_stats`, `nm`, `masks` (plain nested dicts of NumPy arrays),
    `plan` (Plan), `step`, `config` (TrainConfig), `phase` ("dense", "sparse" or
    "frozen"), `test` (dict or None). `path` is a run folder (its latest
    checkpoint), `RUN/best`, `RUN/checkpoints` or `RUN/checkpoints/STEP`.

`load_plan(path) -> Plan`
    The plan in the same places, without reading an array.

`metrics.csv` has one row every `log_every` steps and one at the end of each
epoch: `step, epoch, phase, lr, train_loss, train_top1, train_top5, flip_rate,
sad, density, images_per_second, test_loss, test_top1, test_top5`. The train
columns and `flip_rate` (share of mask bits that one step changes) are means over
the steps since the last row, `sad` is the number of mask bits changed in them;
test columns are empty except at the end of an epoch; the top-5 columns are absent
with fewer than six classes, the mask columns when no weight is sparse.
"""

try:
    import optax as _optax  # noqa: F401
    import orbax.checkpoint as _orbax_checkpoint  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"nmjax.training needs {error.name}: pip install 'nmjax[train]'",
        name=error.name,
    ) from error

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

import csv
import json
import logging
import resource
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments.data
import nmjax
from nmjax.training import (
    CheckpointError,
    DamagedCheckpointError,
    TrainingDiverged,
    TrainingInterrupted,
    evaluate,
    load_plan,
    reestimate_batch_stats,
    restore,
    run_folder,
    train,
)
from nmjax.training.checkpoint import list_steps
from nmjax.training.restoring import verify
from nmjax.training.steps import jit_train_step
from tests.nmjax.training.fakes import RULES, Crash, FakeData, Net, config, crash_at

TIMING = "images_per_second"
PHASES = {"dense_epochs": 1, "freeze_epochs": 1}


def signal_at(step, signum=signal.SIGTERM):
    def at_step(number):
        if number == step:
            signal.raise_signal(signum)

    return at_step


def run(run_dir, *, settings=None, data=None, model=None, rules=RULES, **options):
    options = {"progress": False, **options}
    data, model = data or FakeData(), model or Net()
    return train(model, rules, data, settings or config(), run_dir, **options)


def rows_of(run_dir):
    """Every row, without the one column that depends on the machine."""
    with (run_dir / "metrics.csv").open(newline="") as lines:
        return [
            {k: v for k, v in r.items() if k != TIMING} for r in csv.DictReader(lines)
        ]


def tables_of(run_dir):
    """Both tables of a run that was sparse, as far as they do not tell the machine."""
    return rows_of(run_dir), (run_dir / "layers.csv").read_text()


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of three phases, and the order in which it saw the images."""
    run_dir, data = tmp_path_factory.mktemp("run"), FakeData()
    result = run(run_dir, settings=config(**PHASES, keep=9), data=data)
    return run_dir, result, data.served


@pytest.fixture
def run_dir(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted[0], tmp_path / "run")


def test_a_run_leaves_what_it_says(uninterrupted):
    run_dir, result, _ = uninterrupted
    assert int(result.state.step) == 16
    assert result.test_top1 > 0.3  # chance is 0.1
    assert result.test_top5 >= result.test_top1
    assert result.metrics_file == run_dir / "metrics.csv"
    assert result.checkpoint == run_dir / "checkpoints/16"
    assert list_steps(run_dir / "checkpoints") == [4, 8, 12, 16]
    assert len(list_steps(result.best)) == 1
    for name in ("config.json", "versions.json", "plan.json"):
        assert json.loads((run_dir / name).read_text())
    assert list(run_dir.glob("events.*"))
    assert load_plan(run_dir)["fc/kernel"].recipe.name == "sr_ste"
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["device_count"] == jax.device_count()


def test_rows_come_at_the_interval_and_at_the_end_of_an_epoch(uninterrupted):
    rows = rows_of(uninterrupted[0])
    assert [int(r["step"]) for r in rows] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert [int(r["step"]) for r in rows if r["test_top1"]] == [4, 8, 12, 16]
    phases = ["dense"] * 2 + ["sparse"] * 4 + ["frozen"] * 2
    assert [r["phase"] for r in rows] == phases
    assert [r["flip_rate"] for r in rows[:2]] == ["", ""]
    assert [float(r["flip_rate"]) for r in rows[-2:]] == [0, 0]
    assert float(rows[2]["flip_rate"]) > 0
    losses = [float(r["train_loss"]) for r in rows]
    assert losses[-1] < losses[0]


def test_rows_tell_of_the_masks_in_total_and_by_layer(uninterrupted):
    run_dir = uninterrupted[0]
    rows = {int(r["step"]): r for r in rows_of(run_dir)}
    with (run_dir / "layers.csv").open(newline="") as lines:
        layers = list(csv.DictReader(lines))
    where = [(int(r["step"]), r["phase"], r["path"]) for r in layers]
    paths = ("conv/kernel", "fc/kernel")
    ends = ((8, "sparse"), (12, "sparse"), (16, "frozen"))
    assert where == [(*end, path) for end in ends for path in paths]

    found = restore(run_dir, 12)
    masks = nmjax.prepare(found["params"], found["plan"], found["nm"])
    measured = nmjax.metrics.of_masks(found["params"], found["plan"], masks)
    by_layer = {r["path"]: r for r in layers if r["step"] == "12"}
    for name, values in measured.items():
        for path in paths:
            assert float(by_layer[path][name]) == pytest.approx(float(values[path]))
        assert float(rows[12][name]) == pytest.approx(float(values["total"]))
    assert all(float(r["density"]) == 0.5 for r in layers)
    # An epoch of four steps has rows of three and of one, or of two and of two.
    for end in (8, 12, 16):
        total = sum(float(rows[s]["sad"]) for s in rows if end - 4 < s <= end)
        assert total == sum(float(r["sad"]) for r in layers if int(r["step"]) == end)
    assert any(float(r["flip_rate"]) > 0 for r in layers)
    assert rows[4]["density"] == ""  # dense so far


def test_each_phase_is_restored_with_its_masks(uninterrupted):
    run_dir = uninterrupted[0]
    for step, phase, recipes in (
        (4, "dense", {}),
        (8, "sparse", {"conv/kernel": "sr_ste", "fc/kernel": "sr_ste"}),
        (16, "frozen", {"conv/kernel": "sr_ste", "fc/kernel": "sr_ste"}),
    ):
        found = restore(run_dir, step)
        assert found["phase"] == phase
        assert {e.path: e.recipe.name for e in found["plan"].sparse} == recipes
        masks = nmjax.prepare(found["params"], found["plan"], found["nm"])
        assert_same(masks, found["masks"])
        assert all(e.recipe.keeps_mask == (step == 16) for e in found["plan"].sparse)
        if recipes:
            nmjax.check(found["params"], found["plan"], found["masks"])
    assert restore(run_dir / "best")["phase"] != "dense"  # however good it was


@pytest.mark.slow
def test_a_run_that_ends_dense(tmp_path):
    """2by4's schedule: sparse, with sampled gradients, then dense; and resumed."""
    schedule = nmjax.Schedule(dense_from=0.75)
    recipe = nmjax.recipes.two_by_four(refresh=2, schedule=schedule)
    rules = [RULES[0], nmjax.Rule(".*", recipe)]
    whole = run(tmp_path / "whole", rules=rules)
    rows = rows_of(tmp_path / "whole")
    assert [r["phase"] for r in rows] == ["sparse"] * 6 + ["finish"] * 2
    assert float(rows[0]["flip_rate"]) > 0
    assert rows[-1]["flip_rate"] == ""
    with pytest.raises(Crash):
        run(tmp_path / "cut", rules=rules, data=FakeData(at_step=crash_at(10)))
    resumed = run(tmp_path / "cut", rules=rules)
    assert_same(resumed.state, whole.state)
    found = restore(tmp_path / "cut", 8)
    assert found["phase"] == "sparse"
    assert found["plan"].sparse[0].recipe.schedule == schedule
    nmjax.check(found["params"], found["plan"], found["masks"])


def test_evaluate_agrees_with_the_run(uninterrupted):
    run_dir = uninterrupted[0]
    for path in (run_dir, run_dir / "best", run_dir / "checkpoints/4"):
        found = restore(path)
        for rules in (found["plan"], RULES if found["phase"] == "sparse" else None):
            if rules is not None:
                test = evaluate(Net(), rules, found, FakeData(), 16)
                assert test == found["test"]
    assert test["count"] == 20


def test_same_seed_same_run_and_another_seed_another(uninterrupted, tmp_path):
    again = run(tmp_path / "again", settings=config(**PHASES, keep=9))
    assert_same(again.state, uninterrupted[1].state)
    assert tables_of(tmp_path / "again") == tables_of(uninterrupted[0])
    compiled = jit_train_step.cache_info().misses
    other = run(tmp_path / "other", settings=config(**PHASES, keep=9, seed=1))
    assert jit_train_step.cache_info().misses == compiled  # once for all seeds
    kernel = other.state.params["fc"]["kernel"]
    assert (kernel != again.state.params["fc"]["kernel"]).any()


@pytest.mark.parametrize(
    "step",
    [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 6, 11, 13))],
)
def test_a_crash_and_a_resume_equal_the_uninterrupted_run(
    uninterrupted, tmp_path, step
):
    """In each phase, at and between checkpoints, rows and borders of epochs."""
    settings = config(**PHASES, keep=9, checkpoint_every=2)
    with pytest.raises(Crash):
        run(tmp_path, settings=settings, data=FakeData(at_step=crash_at(step)))
    data = FakeData()
    result = run(tmp_path, settings=settings, data=data)
    assert_same(result.state, uninterrupted[1].state)
    assert tables_of(tmp_path) == tables_of(uninterrupted[0])
    restored_step = step // 2 * 2
    assert data.served == uninterrupted[2][restored_step:]


@pytest.mark.parametrize(
    ("step", "signum"),
    [(4, signal.SIGTERM), pytest.param(6, signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_writes_a_checkpoint_and_ends(
    uninterrupted, tmp_path, capsys, step, signum
):
    """During step 5, the first of an epoch, and during step 7; no save was due."""
    before = signal.getsignal(signum)
    settings = config(**PHASES, keep=9)
    with pytest.raises(TrainingInterrupted) as end:
        run(tmp_path, settings=settings, data=FakeData(at_step=signal_at(step, signum)))
    assert end.value.code == 128 + signum
    assert end.value.checkpoint == tmp_path / f"checkpoints/{step + 1}"
    said = capsys.readouterr().err
    assert f"{signum.name}: stopped after step {step + 1}" in said
    assert str(end.value.checkpoint) in said
    assert signal.getsignal(signum) == before

    result = run(tmp_path, settings=settings)
    assert_same(result.state, uninterrupted[1].state)
    assert tables_of(tmp_path) == tables_of(uninterrupted[0])


@pytest.mark.slow
def test_a_signal_during_the_evaluation_does_not_wait_for_it(uninterrupted, tmp_path):
    class Data(FakeData):
        def test_batches(self, batch_size, **hosts):
            for batch in super().test_batches(batch_size, **hosts):
                yield batch
                signal.raise_signal(signal.SIGTERM)

    settings = config(**PHASES, keep=9)
    with pytest.raises(TrainingInterrupted) as end:
        run(tmp_path, settings=settings, data=Data())
    assert end.value.checkpoint == tmp_path / "checkpoints/4"
    assert restore(tmp_path)["test"] is None
    result = run(tmp_path, settings=settings)
    assert_same(result.state, uninterrupted[1].state)
    assert tables_of(tmp_path) == tables_of(uninterrupted[0])


def test_steps_of_a_row_that_was_written_are_not_counted_again(uninterrupted, tmp_path):
    """Signal in an evaluation, whose row the next process writes, then a crash."""

    class Slow(FakeData):
        def test_batches(self, batch_size, **hosts):
            if len(self.served) == 8:
                signal.raise_signal(signal.SIGTERM)
            return super().test_batches(batch_size, **hosts)

    settings = config(**PHASES, keep=9)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, settings=settings, data=Slow())
    assert list_steps(tmp_path / "checkpoints")[-1] == 8
    with pytest.raises(Crash):
        run(tmp_path, settings=settings, data=FakeData(at_step=crash_at(10)))
    run(tmp_path, settings=settings)
    assert tables_of(tmp_path) == tables_of(uninterrupted[0])


def test_a_run_without_its_metrics_continues(run_dir):
    (run_dir / "metrics.csv").unlink()
    result = run(run_dir, settings=config(**PHASES, keep=9))
    (row,) = rows_of(run_dir)
    assert float(row["test_top1"]) == pytest.approx(result.test_top1, abs=1e-6)
    assert row["train_loss"] == ""


def test_two_processes_do_not_train_in_one_folder(run_dir):
    with run_folder.locked(run_dir):
        before = tables_of(run_dir)
        with pytest.raises(CheckpointError, match="another process trains in"):
            run(run_dir, settings=config(**PHASES, keep=9, epochs=5))
        assert tables_of(run_dir) == before
    run(run_dir, settings=config(**PHASES, keep=9))


def test_options_are_those_of_the_last_command_that_was_accepted(run_dir):
    settings, written = config(**PHASES, keep=9), run_dir / "options.json"
    run(run_dir, settings=settings, options={"augment": "flip", "shift": [2, 2]})
    assert json.loads(written.read_text()) == {"augment": "flip", "shift": [2, 2]}
    with run_folder.locked(run_dir), pytest.raises(CheckpointError, match="another"):
        run(run_dir, settings=settings, options={"augment": "none"})
    with pytest.raises(ValueError, match="shorter than what is done"):
        run(run_dir, settings=config(**PHASES, epochs=3), options={"augment": "none"})
    assert json.loads(written.read_text())["augment"] == "flip"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file, write = tmp_path / "config.json", Path.write_text
    run_folder.write_whole(file, "old")

    def half(path, text):
        write(path, text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        run_folder.write_whole(file, "new")
    assert file.read_text() == "old\n"


def test_a_run_that_died_before_its_first_checkpoint_may_begin_otherwise(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, data=FakeData(at_step=crash_at(2)))
    run(tmp_path, settings=config(lr=0.01))


def test_a_phase_that_moves_with_the_length_is_said(run_dir, caplog):
    longer = config(dense_epochs=1, freeze_epochs=1, keep=9, epochs=5)
    run(run_dir, settings=longer)
    assert "step 16 was in phase 'frozen', which in a run of this" in caplog.text


def test_a_finished_run_is_evaluated_again_and_not_changed(uninterrupted, run_dir):
    result = run(run_dir, settings=config(**PHASES, keep=9))
    assert result.test_top1 == uninterrupted[1].test_top1
    assert result.step_seconds is None
    assert tables_of(run_dir) == tables_of(uninterrupted[0])


@pytest.mark.slow
def test_a_finished_run_can_be_prolonged(run_dir):
    result = run(run_dir, settings=config(**PHASES, keep=9, epochs=5))
    assert int(result.state.step) == 20
    with pytest.raises(ValueError, match="is shorter than what is done"):
        run(run_dir, settings=config(**PHASES, keep=9, epochs=4))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 1])
def test_resume_on_another_number_of_devices(uninterrupted, run_dir, devices):
    shutil.rmtree(run_dir / "checkpoints/16")
    result = run(
        run_dir,
        settings=config(**PHASES, keep=9),
        devices=jax.devices()[:devices],
    )
    assert int(result.state.step) == 16
    expected = uninterrupted[1].state.params
    for x, y in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-4)


# Orbax closes its event loop under the reads of the other arrays.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, run_dir, caplog):
    damaged = run_dir / "checkpoints/16/params/manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with caplog.at_level(logging.WARNING, logger="nmjax"):
        result = run(run_dir, settings=config(**PHASES, keep=9))
    assert "checkpoints/16/params is damaged" in caplog.text
    assert "trying the one before" in caplog.text
    assert (run_dir / "set_aside/checkpoints-16").is_dir()
    assert_same(result.state, uninterrupted[1].state)
    assert tables_of(run_dir) == tables_of(uninterrupted[0])
    assert restore(run_dir)["step"] == 16


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(run_dir):
    (run_dir / "checkpoints/12/meta/metadata").unlink()
    with pytest.raises(DamagedCheckpointError, match="Step 8 is intact"):
        run(run_dir, settings=config(**PHASES, keep=9), resume=12)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .*\[4, 8, 12"):
        run(run_dir, settings=config(**PHASES, keep=9), resume=5)
    assert not (run_dir / "set_aside").exists()


def test_resume_from_a_step_sets_later_ones_aside(uninterrupted, run_dir):
    result = run(run_dir, settings=config(**PHASES, keep=9), resume=8)
    assert_same(result.state, uninterrupted[1].state)
    assert list_steps(run_dir / "checkpoints") == [4, 8, 12, 16]
    best = list_steps(uninterrupted[0] / "best")
    assert list_steps(run_dir / "best") == best == [12]  # found again
    assert sorted(path.name for path in (run_dir / "set_aside").iterdir()) == [
        "best-12",
        "checkpoints-12",
        "checkpoints-16",
    ]


def test_without_an_intact_checkpoint_nothing_begins_anew(run_dir):
    for step in (4, 8, 12, 16):
        (run_dir / f"checkpoints/{step}/meta/metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the checkpoints .* is intact"):
        run(run_dir, settings=config(**PHASES, keep=9))
    assert list_steps(run_dir / "checkpoints") == [4, 8, 12, 16]


def test_resume_false_refuses_a_used_folder(run_dir):
    with pytest.raises(CheckpointError, match="holds checkpoints up to step 16"):
        run(run_dir, settings=config(**PHASES, keep=9), resume=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": config(**PHASES, keep=9, lr=0.1)}, "lr: 0.05 before, 0.1 now"),
        ({"model": Net(width=16)}, r"conv/kernel: Conv \(3, 3, 8, 8\) sr_ste 2:4"),
        (
            {"rules": [RULES[0], nmjax.Rule(".*", nmjax.recipes.sr_ste("1:4"))]},
            "conv/kernel: .* sr_ste 2:4 decay 0.01 before, .* sr_ste 1:4",
        ),
        ({"rules": []}, "is of a phase 'frozen', this run has dense"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(uninterrupted, changes, message):
    run_dir = uninterrupted[0]
    before = sorted(path.stat().st_mtime_ns for path in run_dir.rglob("*"))
    options = {"settings": config(**PHASES, keep=9), **changes}
    with pytest.raises(CheckpointError) as error:
        run(run_dir, **options)
    assert not isinstance(error.value, DamagedCheckpointError)
    error.match(message)
    after = sorted(p.stat().st_mtime_ns for p in run_dir.rglob("*") if p != run_dir)
    assert set(after) <= set(before), "a refused run changes nothing"


def test_a_model_that_differs_in_dense_layers_alone_is_refused(uninterrupted):
    with pytest.raises(CheckpointError, match="BatchNorm_0/scale"):
        run(
            uninterrupted[0],
            settings=config(**PHASES, keep=9),
            model=Net(batch_norm=False),
        )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    data = FakeData()

    def poison(step):
        if step == 6:
            data.images = np.full_like(data.images, np.nan)

    data.at_step = poison
    settings = config(**PHASES, keep=9)
    with pytest.raises(TrainingDiverged) as error:
        run(tmp_path, settings=settings, data=data)
    assert error.value.step == 7
    assert error.value.last_good == tmp_path / "checkpoints/4"
    assert "the loss is nan at step 7" in str(error.value)
    assert str(tmp_path / "checkpoints/4") in str(error.value)
    assert list_steps(tmp_path / "checkpoints") == [4]


def test_no_checkpoint_with_nan_is_written(tmp_path):
    """The loss of the step before is finite, the parameters after it are not."""
    data = FakeData()

    def poison(step):
        if step == 3:
            data.images = np.full_like(data.images, np.nan)

    data.at_step = poison
    settings = config(**PHASES, keep=9, checkpoint_every=1)
    with pytest.raises(TrainingDiverged) as error:
        run(tmp_path, settings=settings, data=data)
    assert error.value.last_good == tmp_path / "checkpoints/3"
    found = restore(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found["params"]))


class NoTest(FakeData):
    num_test = 0


class NoState(FakeData):
    def train_batches(self, batch_size, *, seed, num_hosts=1, host=0):
        return iter([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": config(batch_size=18)},
            "batch size 18 does not divide over 4 devices; the nearest .* is 16 or 20",
        ),
        (
            {"settings": config(batch_size=24, micro_batches=4)},
            "batch size 24 does not divide over 4 devices x 4 micro-batches; .* 16 or",
        ),
        (
            {"settings": config(batch_size=68)},
            "batch_size 68 is larger than the training set of fake, 64 images",
        ),
        ({"data": NoTest()}, "the test set of fake is empty"),
        ({"model": object()}, "train takes a linen model, got object"),
        (
            {"model": Net(num_classes=7)},
            r"shape \(1, 7\); fake has 10 classes, so it should be \(1, 10\)",
        ),
        (
            {"rules": [nmjax.Rule("cnov", "2:4")]},
            "'cnov' matches no layer",
        ),
        (
            {"init_params": {"conv": {"kernel": np.zeros((3, 3, 8, 9))}}},
            "init_params does not fit the model: .* is absent",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_the_folder_is_touched(
    tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_data_without_a_position_are_refused(tmp_path):
    with pytest.raises(ValueError, match="iterator with get_state and set_state, got"):
        run(tmp_path, data=NoState(), options={})
    assert not (tmp_path / "options.json").exists()


@pytest.mark.parametrize("kind", ["labels", "test_labels"])
def test_labels_that_are_no_classes_are_refused(tmp_path, kind):
    """One-hot they are zeros, and training goes on with the rest."""
    data = FakeData()
    getattr(data, kind)[7] = 10
    with pytest.raises(
        ValueError, match="fake has labels from .* to 10; its 10 classes"
    ):
        run(tmp_path, data=data)


def test_labels_of_padding_may_be_anything(tmp_path):
    class Data(FakeData):
        def test_batches(self, *args, **kwargs):
            for batch in super().test_batches(*args, **kwargs):
                batch["label"] = np.where(batch["valid"] > 0, batch["label"], -1)
                yield batch

    assert 20 % 16  # test images and the size of a batch
    result = run(tmp_path, data=Data(), settings=config(epochs=1))
    assert np.isfinite(result.test_loss)


def test_training_batches_that_end_are_an_error(tmp_path):
    def end(step):
        if step == 2:
            raise StopIteration

    with pytest.raises(ValueError, match="train_batches of fake ended after step 2"):
        run(tmp_path, data=FakeData(at_step=end))


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the run folder .*file/run"):
        run(tmp_path / "file/run")


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match="has 0 MiB free, and a checkpoint"):
        run(tmp_path / "run")


# When one array of several cannot be written, Orbax closes its event loop under the
# writes of the others, which then have nobody to report to.
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)
def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(uninterrupted, tmp_path):
    """A limit on the size of a file makes writing fail as a full disk does."""
    settings = config(**PHASES, keep=9, checkpoint_every=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = (uninterrupted[0] / "checkpoints/4").rglob("*")
    largest = max(file.stat().st_size for file in files if file.is_file())

    def fill_disk(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))

    try:
        with pytest.raises(CheckpointError) as error:
            run(tmp_path, settings=settings, data=FakeData(at_step=fill_disk))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert f"could not be written in {tmp_path}/checkpoints" in message
    assert "File too large" in message
    assert "Make room on the disk" in message
    # Step 3 was being written when the disk was full.
    last = list_steps(tmp_path / "checkpoints")[-1]
    assert last in (2, 3)
    assert f"the last complete one is step {last}" in message
    verify(tmp_path / f"checkpoints/{last}")

    result = run(tmp_path, settings=settings)
    assert_same(result.state, uninterrupted[1].state)


def test_init_params_are_where_training_begins(uninterrupted, tmp_path):
    trained = restore(uninterrupted[0])
    given = jax.tree.map(jax.numpy.asarray, trained["params"])
    result = run(
        tmp_path,
        settings=config(**PHASES, keep=9),
        init_params=given,
        init_batch_stats=trained["batch_stats"],
    )
    assert result.test_loss < uninterrupted[1].test_loss
    assert_same(given, trained["params"])  # they were not donated


def test_batch_statistics_are_those_of_the_network_as_it_is(uninterrupted):
    """With one and the same batch, they tend to the statistics of that batch."""

    class OneBatch(FakeData):
        def train_batches(self, batch_size, *, seed, num_hosts=1, host=0):
            batches = super().train_batches(batch_size, seed=seed)
            batch = next(batches)
            while True:
                yield batch

    found = restore(uninterrupted[0], 8)
    data = OneBatch()
    stats = reestimate_batch_stats(Net(), found["plan"], found, data, 16, batches=200)[
        "batch_stats"
    ]["BatchNorm_0"]
    image = next(data.train_batches(16, seed=0))["image"]
    kernel = found["params"]["stem"]["kernel"][0, 0]
    activations = image @ kernel + found["params"]["stem"]["bias"]
    np.testing.assert_allclose(stats["mean"], activations.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], activations.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.slow
def test_a_resume_continues_grain_at_the_next_batch(tmp_path):
    """The data set of the demo in place of the fake one."""
    digits = experiments.data.load("digits")

    class Crashing:
        def __init__(self, batches):
            self.batches, self.step = batches, 0
            self.get_state, self.set_state = batches.get_state, batches.set_state

        def __next__(self):
            self.step += 1
            if self.step == 15:
                raise Crash
            return next(self.batches)

    class Data:
        def __getattr__(self, name):
            return getattr(digits, name)

        def train_batches(self, batch_size, **options):
            return Crashing(digits.train_batches(batch_size, **options))

    settings = config(epochs=2, batch_size=128, checkpoint_every=4)
    whole = run(tmp_path / "whole", settings=settings, data=digits)
    with pytest.raises(Crash):
        run(tmp_path / "part", settings=settings, data=Data())
    assert list_steps(tmp_path / "part/checkpoints")[-1] == 12
    resumed = run(tmp_path / "part", settings=settings, data=digits)
    assert_same(resumed.state, whole.state)
    assert tables_of(tmp_path / "part") == tables_of(tmp_path / "whole")

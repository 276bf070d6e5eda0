import csv
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from nmjax.training.metrics import Interval, MetricsWriter, columns

NAMES = columns(10, sparse=True)


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write(run_dir, *, step, steps):
    writer = MetricsWriter(run_dir, NAMES, step=step)
    for number in steps:
        writer.write({"step": number, "train_loss": number / 3, "phase": "sparse"})
    writer.close()
    return writer


def test_columns_say_only_what_means_something():
    assert "train_top5" not in columns(5, sparse=True)
    assert "test_top5" in columns(6, sparse=True)
    assert "flip_rate" not in columns(10, sparse=False)


def test_an_interval_is_the_mean_over_its_steps_and_the_sum_of_sad():
    interval = Interval()
    interval.add({"loss": 3.0, "top1": 0.5, "sad": 4.0}, {"a": 4.0, "b": 0.0})
    interval = Interval(interval.sums)  # through a checkpoint
    interval.add({"loss": 1.0, "top1": 0.0, "sad": 2.0}, {"a": 1.0, "b": 1.0})
    assert interval.row(100) == {
        "train_loss": 2.0,
        "train_top1": 0.25,
        "sad": 6.0,
        "flip_rate": 6 / (2 * 100),
    }
    # The rows of the layers come more rarely: theirs begin anew on their own.
    interval.add({"loss": 1.0, "top1": 0.0, "sad": 3.0}, {"a": 3.0, "b": 0.0})
    assert interval.row(100)["sad"] == 3.0
    assert interval.layers({"a": 10, "b": 90}) == {
        "a": {"sad": 8.0, "flip_rate": 8 / (3 * 10)},
        "b": {"sad": 1.0, "flip_rate": 1 / (3 * 90)},
    }
    assert interval.sums == {}


def test_without_sparse_weights_there_is_no_flip_rate():
    interval = Interval()
    interval.add({"loss": 3.0, "sad": 0.0}, {})
    assert interval.row(0) == {"train_loss": 3.0}
    assert interval.layers({}) == {}


def test_layers_are_rows_by_path_and_tags_of_tensorboard(tmp_path):
    layers = {"a/kernel": {"sad": 2.0, "density": 0.5}, "b": {"sad": 0.0}}
    row = {"step": 5, "epoch": 1.0, "phase": "sparse", "sad": 7.0, "density": 0.25}
    writer = MetricsWriter(tmp_path, NAMES, step=0)
    writer.write(row, layers)
    writer.write({**row, "step": 8}, layers)
    writer.close()
    MetricsWriter(tmp_path, NAMES, step=5).close()  # drops the rows of step 8
    first, second = rows_of(tmp_path / "layers.csv")
    assert (first["path"], first["step"], first["phase"]) == ("a/kernel", "5", "sparse")
    assert (first["sad"], first["density"]) == ("2.0", "0.5")
    assert (second["path"], second["sad"], second["density"]) == ("b", "0.0", "")
    events = events_of(sorted(tmp_path.glob("events.*"))[0])
    values = {value.tag: value.simple_value for value in events[1].summary.value}
    assert values == {
        "sad": 7.0,
        "density": 0.25,
        "sad/a/kernel": 2.0,
        "density/a/kernel": 0.5,
        "sad/b": 0.0,
    }


def test_a_dense_run_has_no_rows_for_layers(tmp_path):
    MetricsWriter(tmp_path, columns(10, sparse=False), step=0).close()
    assert not (tmp_path / "layers.csv").exists()


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path, NAMES, step=0)
    writer.write({"step": 5, "lr": 0.1, "train_loss": 1 / 3, "not_a_column": 7})
    assert rows_of(writer.file)[0]["train_loss"] == repr(1 / 3)
    assert list(tmp_path.glob("events.*"))
    writer.close()


def test_a_resumed_run_drops_the_rows_after_its_step(tmp_path):
    write(tmp_path, step=0, steps=(3, 6, 9))
    writer = write(tmp_path, step=6, steps=(9, 12))
    assert [row["step"] for row in rows_of(writer.file)] == ["3", "6", "9", "12"]


@pytest.mark.parametrize("half", ["9,0.5,spar", "9" + "," * (len(NAMES) - 1) + "0.4"])
def test_half_a_line_left_by_a_kill_is_dropped(tmp_path, half):
    file = write(tmp_path, step=0, steps=(3, 6)).file
    with file.open("a") as stream:
        stream.write(half)
    write(tmp_path, step=9, steps=(12,))
    assert [row["step"] for row in rows_of(file)] == ["3", "6", "12"]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    write(tmp_path, step=0, steps=(3, 6))
    writer = write(tmp_path, step=0, steps=(3,))
    assert [row["step"] for row in rows_of(writer.file)] == ["3"]


def test_tensorboard_reads_the_same_values(tmp_path):
    """By the format of its records: length, checksum, event, checksum."""
    write(tmp_path, step=0, steps=(3, 6))
    write(tmp_path, step=3, steps=(6,))
    first, second = map(events_of, sorted(tmp_path.glob("events.*")))
    assert first[0].file_version == second[0].file_version == "brain.Event:2"
    for event, step in zip(first[1:], (3, 6), strict=True):
        (value,) = event.summary.value
        assert (event.step, value.tag) == (step, "train/loss")
        assert value.simple_value == np.float32(step / 3)
    # The second session starts after step 3: what the first wrote from there is void.
    assert (second[1].step, second[1].session_log.status) == (4, 1)
    assert second[2].step == 6


def events_of(file):
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return events


def test_a_full_disk_is_an_error_and_no_endless_wait(tmp_path):
    writer = MetricsWriter(tmp_path, NAMES, step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.file.stat().st_size, hard))
    try:
        with pytest.raises(OSError, match="a row of metrics could not be written"):
            writer.write({"step": 1, "train_loss": 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_columns_are_refused(tmp_path):
    write(tmp_path, step=0, steps=(3,))
    with pytest.raises(ValueError, match=r"has columns step, .*Use another run folder"):
        MetricsWriter(tmp_path, columns(3, sparse=False), step=3)

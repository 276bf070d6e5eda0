"""`python -m nmjax check` can fail, says how, and needs the checkpoint alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import nmjax
from nmjax.__main__ import main
from nmjax.plans import Plan
from nmjax.training import checkpoint, restoring, train
from tests.nmjax.training.fakes import RULES, FakeData, Net, config

ROOT = Path(__file__).parents[2]

# Orbax reads arrays in parallel; where one fails, others end after their event loop.
ignore_other_reads = pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two runs: one dense, one of a dense and a sparse epoch of four steps each."""
    folder = tmp_path_factory.mktemp("comparison")
    options = {"data": FakeData(), "progress": False}
    for name, rules, settings in (
        ("dense-seed0", [], config(epochs=1)),
        ("sr_ste-seed0", RULES, config(epochs=2, dense_epochs=1)),
    ):
        train(Net(), rules, config=settings, run_dir=folder / name, **options)
    (folder / "plots").mkdir()
    (folder / "table.json").write_text("{}")
    return folder


@pytest.fixture
def run(comparison, tmp_path):
    """The sparse run, to be tampered with."""
    return shutil.copytree(comparison / "sr_ste-seed0", tmp_path / "run")


def rewrite(run, change):
    """Writes the last checkpoint anew, checksums and all: training that went wrong."""
    step_dir = restoring.find_step(run)
    meta = checkpoint.read_meta(step_dir)
    names = checkpoint.EVALUATION_ITEMS
    items = {name: checkpoint.read_item(step_dir, name, meta) for name in names}
    data = checkpoint.read_data_state(step_dir, meta)
    change(items, meta)
    shutil.rmtree(step_dir)
    own = ("format", "arrays", "crc32", "data_crc32")
    meta = {name: value for name, value in meta.items() if name not in own}
    writer = checkpoint.CheckpointWriter(run, keep=9)
    writer.save(items, data, meta)
    writer.close()


def mask_of(items, layer):
    return items["masks"][layer]["kernel"]["mask"]


def flip_one_bit(items, meta):
    mask_of(items, "fc")[5, 7] ^= True


def swap_the_axis(items, meta):
    kernel = items["params"]["fc"]["kernel"]
    mask = nmjax.magnitude_mask(kernel, "2:4", axis=-1)
    items["masks"]["fc"]["kernel"]["mask"] = np.asarray(mask)


def swap_the_axis_of_the_plan(items, meta):
    entry = next(e for e in meta["plan"]["entries"] if e["path"] == "fc/kernel")
    entry["axes"] = [-1]


def drop_a_mask(items, meta):
    del items["masks"]["fc"]


def drop_all_masks(items, meta):
    items["masks"] = {}


def drop_a_layer(items, meta):
    del items["params"]["fc"]


def change_a_weight(items, meta):
    row = int(np.argmin(mask_of(items, "fc")[:4, 0]))
    items["params"]["fc"]["kernel"][row, 0] = 100


def forget_a_layer(items, meta):
    entry = next(e for e in meta["plan"]["entries"] if e["path"] == "fc/kernel")
    entry.update(recipe=None, ragged=None, reason="no rule matches")


def damage(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest_file(folder):
    return max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


# check


def test_a_sparse_run_is_fine(run, capsys):
    assert main(["check", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"{run}, step 8: ok, 2 of 4 weights are 2:4" in out
    assert (
        f"N:M holds in 1 of 1 sparse networks. Next: python -m nmjax summary {run}"
        in out
    )
    assert not err


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/8"])
def test_every_place_of_a_checkpoint(run, capsys, below):
    assert main(["check", str(run / below)]) == 0
    assert "ok, 2 of 4 weights are 2:4" in capsys.readouterr().out


def test_a_run_whose_activations_are_sparse(tmp_path, capsys):
    rule = nmjax.Rule("fc", nmjax.recipes.semi_sparse_activation())
    settings = {"config": config(epochs=1), "progress": False}
    train(Net(), [rule], FakeData(), run_dir=tmp_path, **settings)
    assert main(["check", str(tmp_path)]) == 0
    said = "ok, weights are dense, activations of 1 layers are 2:4 along the axis"
    assert said in capsys.readouterr().out


def test_the_best_checkpoint_of_a_run(comparison, capsys):
    assert main(["check", str(comparison / "dense-seed0" / "best")]) == 0
    assert "step 4: dense, no weight is sparse" in capsys.readouterr().out


def test_a_dense_phase_is_reported_as_dense(run, capsys):
    for arguments in ([str(run), "--step", "4"], [str(run / "checkpoints" / "4")]):
        assert main(["check", *arguments]) == 0
        out = capsys.readouterr().out
        assert "step 4: dense, this phase of the run is dense" in out
        assert "No network here is sparse" in out


def test_a_comparison_is_a_line_for_each_run(comparison, capsys):
    assert main(["check", str(comparison)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{comparison}/dense-seed0, step 4: dense, no weight is sparse"
    assert lines[1].startswith(f"{comparison}/sr_ste-seed0, step 8: ok, 2 of 4 weights")
    assert lines[-1].startswith("N:M holds in 1 of 1 sparse networks; 1 dense. Next:")


def test_runs_may_be_named_by_numbers(run, tmp_path, capsys):
    run.rename(tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    assert main(["check", str(tmp_path)]) == 0
    assert "N:M holds in 2 of 2 sparse networks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            flip_one_bit,
            r"fc/kernel: [pattern] 1 of 128 groups along axis -2 are not 2:4",
        ),
        (
            swap_the_axis,
            "fc/kernel: [axis] is 2:4 along axis -1, but the GEMM contracts",
        ),
        (swap_the_axis_of_the_plan, "fc/kernel: [axis] is 2:4 along axis -2, but the"),
        (drop_a_mask, "fc/kernel: [missing] the checkpoint has no mask for it"),
        (drop_all_masks, "fc/kernel: [missing] the checkpoint has no mask for it"),
        (drop_a_layer, "fc/kernel: [missing] is in the plan, not in the parameters"),
        (change_a_weight, "fc/kernel: [weights] 2 bits differ from the mask of the"),
        (forget_a_layer, "fc/kernel: [stranger] has a mask, but the plan does not"),
    ],
)
def test_each_fault_has_a_message_of_its_own(run, capsys, change, finding):
    rewrite(run, change)
    assert main(["check", str(run)]) == 1
    out, err = capsys.readouterr()
    assert f"{run}, step 8: FAILED" in out
    assert finding in out
    assert "FAILED: 1 of 1 sparse networks fail the check. Next:" in out
    assert not err


def test_every_problem_is_printed(run, capsys):
    def change(items, meta):
        swap_the_axis(items, meta)
        mask_of(items, "conv")[:] = True

    rewrite(run, change)
    assert main(["check", str(run)]) == 1
    out = capsys.readouterr().out
    assert "fc/kernel: [axis]" in out and "conv/kernel: [pattern]" in out


def test_an_earlier_step_may_be_fine(run, capsys):
    rewrite(run, flip_one_bit)
    assert main(["check", str(run)]) == 1
    assert main(["check", str(run), "--step", "4"]) == 0


@ignore_other_reads
def test_one_failure_fails_a_comparison(comparison, run, capsys):
    rewrite(run, flip_one_bit)
    shutil.copytree(comparison / "dense-seed0", run.parent / "dense")
    damage(largest_file(run.parent / "dense" / "checkpoints" / "4" / "params"))
    assert main(["check", str(run.parent)]) == 1
    out, err = capsys.readouterr()
    assert "FAILED: 1 of 1 sparse networks" in out
    assert "1 of 2 could not be read" in out
    assert err.startswith("error: ") and err.count("\n") == 1


# summary


def test_summary_lists_every_weight(comparison, capsys):
    assert main(["summary", str(comparison)]) == 0
    out = capsys.readouterr().out
    assert f"{comparison}/dense-seed0, step 4, dense phase:" in out
    assert f"{comparison}/sr_ste-seed0, step 8, sparse phase:" in out
    tables = out.split("\n\n")
    assert "0 of 4 weights sparse" in tables[0]
    assert "2 of 4 weights sparse" in tables[1]
    cells = {line.split()[0]: line.split() for line in tables[1].splitlines()[2:]}
    expected = ["Conv", "3x3x8x8", "-2", "sr_ste", "2:4", "0.500", "yes"]
    assert cells["conv/kernel"][1:] == expected
    assert tables[1].splitlines()[-2].split()[-3:] == ["dense", "by", "rule"]


def test_summary_shows_a_fault(run, capsys):
    rewrite(run, swap_the_axis)
    assert main(["summary", str(run)]) == 0
    assert "no: axis" in capsys.readouterr().out


# What cannot be read


def refused(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize("command", ["check", "summary"])
def test_paths_that_are_no_runs(tmp_path, capsys, command):
    assert "is not a folder" in refused(capsys, command, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(capsys, command, tmp_path / "file")
    assert "holds no run" in refused(capsys, command, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "no checkpoint in" in refused(capsys, command, tmp_path)


def test_a_step_that_does_not_exist_names_those_that_do(run, capsys):
    message = refused(capsys, "check", run, "--step", 5)
    assert "no checkpoint of step 5" in message and "[4, 8]" in message


@ignore_other_reads
@pytest.mark.parametrize("item", ["params", "masks", "meta"])
@pytest.mark.parametrize("command", ["check", "summary"])
def test_truncated_files(run, capsys, command, item):
    damage(largest_file(run / "checkpoints" / "8" / item))
    message = refused(capsys, command, run)
    assert f"8/{item} is damaged" in message
    assert "Step 4 is intact" in message


def test_a_missing_item(run, capsys):
    shutil.rmtree(run / "checkpoints" / "8" / "masks")
    assert "8/masks is damaged" in refused(capsys, "check", run)


def test_a_bit_flipped_behind_the_checksums(run, capsys):
    """With plain Orbax, which notices nothing."""
    folder = run / "checkpoints" / "8" / "masks"
    with ocp.StandardCheckpointer() as checkpointer:
        masks = checkpointer.restore(folder)
        mask = np.array(masks["fc"]["kernel"]["mask"])
        mask[5, 7] ^= True
        masks["fc"]["kernel"]["mask"] = mask
        shutil.rmtree(folder)
        checkpointer.save(folder, masks)
    message = refused(capsys, "check", run)
    assert "array fc/kernel/mask is not the one that was written" in message


def test_a_damaged_plan_file_beside_a_dense_phase(run, capsys):
    (run / "plan.json").write_text("{")
    assert "not a plan" in refused(capsys, "check", run, "--step", 4)
    assert main(["check", str(run)]) == 0  # the checkpoint has its own


@pytest.mark.parametrize(
    "arguments", [[], ["check"], ["prune", "x"], ["check", "x", "--step", "last"]]
)
def test_bad_usage(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m nmjax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["check", "summary", "no model code is needed"]),
        (
            ["check", "--help"],
            ["RUN", "--step", "exit code: 0 =", "example: python -m"],
        ),
        (["summary", "--help"], ["RUN", "density", "example: python -m nmjax summary"]),
    ],
)
def test_help_teaches(capsys, arguments, words):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    out = capsys.readouterr().out
    assert all(word in out for word in words)


# As a command


def command(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", *code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_as_a_command(run):
    done = command(["-m", "nmjax"], "check", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok, 2 of 4 weights are 2:4" in done.stdout


@pytest.mark.slow
def test_a_truncated_file_is_one_line_on_standard_error(run):
    damage(largest_file(run / "checkpoints" / "8" / "params"))
    done = command(["-m", "nmjax"], "check", run)
    assert (done.returncode, done.stdout.strip()) == (2, "1 of 1 could not be read")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_without_the_training_extra(run):
    code = """if True:
        import sys
        sys.modules["orbax"] = sys.modules["orbax.checkpoint"] = None
        from nmjax.__main__ import main
        sys.exit(main(sys.argv[1:]))"""
    done = command(["-c", code], "check", run)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nmjax.training needs orbax")
    assert "pip install 'nmjax[train]'" in done.stderr


def test_the_masks_in_a_checkpoint_are_those_of_its_weights(run):
    """What `check` judges is what plain Orbax reads."""
    folder = run / "checkpoints" / "8"
    with ocp.StandardCheckpointer() as checkpointer:
        params, masks = (checkpointer.restore(folder / i) for i in ("params", "masks"))
    plan = Plan.from_json((run / "plan.json").read_text())
    expected = nmjax.prepare(params, plan)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)

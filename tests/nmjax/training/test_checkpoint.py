import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.training import CheckpointError, DamagedCheckpointError, load_plan, restore
from nmjax.training.checkpoint import (
    CheckpointWriter,
    list_steps,
    read_data_state,
    read_item,
    read_meta,
)
from nmjax.training.restoring import find_step, verify
from tests.nmjax.training.fakes import config

# When one array of several cannot be read, Orbax closes its event loop under the reads
# of the others, which then have nobody to report to.
ignore_other_reads = pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)

PARAMS = {
    "conv": {"kernel": np.random.default_rng(0).normal(size=(64, 32)), "bias": {}},
    "scalar": np.float32(3).reshape(()),
    "half": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
}
MASKS = {"conv": {"kernel": {"mask": PARAMS["conv"]["kernel"] > 0}}}
ITEMS = {"params": PARAMS, "masks": MASKS, "nm": {}, "opt_state": {"m": np.ones(3)}}
PLAN = nmjax.plan_params({"conv": {"kernel": np.zeros((64, 32), np.float32)}}, "2:4")
DATA = [{"next": 7}]


def meta_of(step):
    plan = json.loads(PLAN.to_json())
    test = {"top1": 0.5}
    return {
        "step": step,
        "phase": "sparse",
        "plan": plan,
        "config": config().to_dict(),
        "test": test,
        "interval": {},
    }


def write(run_dir, steps, *, keep=2, best=()):
    writer = CheckpointWriter(run_dir, keep=keep)
    for step in steps:
        writer.save(ITEMS, DATA, meta_of(step))
        if step in best:
            writer.save_best(ITEMS, meta_of(step))
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, (1, 2, 3), best=(1, 2))
    return run_dir


@pytest.fixture
def run_dir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_the_latest_steps_and_one_best_are_kept(written):
    assert list_steps(written / "checkpoints") == [2, 3]
    assert list_steps(written / "best") == [2]


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/3"])
def test_restore_gives_back_every_bit(written, path):
    restored = restore(written / path)
    assert_same(restored["params"], PARAMS)
    assert_same(restored["masks"], MASKS)
    assert restored["nm"] == restored["batch_stats"] == {}
    assert (restored["step"], restored["phase"]) == (3, "sparse")
    assert (restored["plan"], restored["config"]) == (PLAN, config())
    assert restored["test"] == {"top1": 0.5}


def test_restore_of_another_step_and_of_the_best(written):
    assert restore(written, step=2)["step"] == 2
    assert restore(written / "best")["step"] == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .*\[2, 3\]"):
        restore(written, step=1)
    with pytest.raises(CheckpointError, match="is one checkpoint, and not of step 2"):
        restore(written / "checkpoints/3", step=2)


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        restore(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore(tmp_path / "missing")


def test_what_the_caller_changes_after_save_is_not_saved(tmp_path):
    """Arrays and JSON are written while training goes on."""
    writer = CheckpointWriter(tmp_path, keep=1)
    items = {"params": {"kernel": np.ones((256, 256))}}
    data, meta = [{"next": 7}], meta_of(1)
    meta["interval"] = {"loss": 1.0}
    writer.save(items, data, meta)
    items["params"]["kernel"][:] = 2
    data[0]["next"] = meta["interval"]["loss"] = 2.0
    writer.close()
    step_dir = tmp_path / "checkpoints/1"
    assert verify(step_dir)["interval"] == {"loss": 1.0}
    assert read_data_state(step_dir, read_meta(step_dir)) == [{"next": 7}]
    assert (restore(tmp_path)["params"]["kernel"] == 1).all()


def test_the_plan_is_read_without_arrays(run_dir):
    shutil.rmtree(run_dir / "checkpoints/3/params")
    assert load_plan(run_dir) == PLAN
    assert load_plan(run_dir / "best") == PLAN


def test_best_may_go_back_to_an_earlier_step(run_dir):
    """A run that fell back to an earlier checkpoint finds its best again."""
    writer = CheckpointWriter(run_dir, keep=2)
    writer.save_best(ITEMS, meta_of(1))
    writer.close()
    assert list_steps(run_dir / "best") == [1]


def test_a_target_gives_its_own_structure(written):
    step_dir = written / "checkpoints/3"
    meta = read_meta(step_dir)
    target = jax.eval_shape(lambda: {"m": jnp.zeros(3, jnp.float32)})
    with pytest.raises(CheckpointError, match=r"m: .*float64.*, .*float32"):
        read_item(step_dir, "opt_state", meta, target)
    target = {"m": np.zeros(3)}
    assert_same(read_item(step_dir, "opt_state", meta, target), ITEMS["opt_state"])
    assert read_item(step_dir, "batch_stats", meta, {}) == {}


def test_arrays_of_another_model_are_named(written):
    step_dir = written / "checkpoints/3"
    target = {"conv": {"kernel": np.zeros((8, 8)), "bias": {}}, "stem": np.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        read_item(step_dir, "params", read_meta(step_dir), target)
    assert not isinstance(error.value, DamagedCheckpointError)
    for part in ("conv/kernel", "[64, 32]", "[8, 8]", "stem: absent", "scalar"):
        assert part in str(error.value)


def damages(step_dir):
    """Every way in which a file of a checkpoint can be lost, cut or altered."""
    for file in sorted(path for path in step_dir.rglob("*") if path.is_file()):
        content = file.read_bytes()
        file.unlink()
        yield f"{file} deleted"
        if content:
            file.write_bytes(content[: len(content) // 2])
            yield f"{file} cut"
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 16])
            file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
            yield f"{file} altered"
        file.write_bytes(content)


@pytest.mark.slow
@ignore_other_reads
def test_no_damage_goes_unnoticed(run_dir):
    step_dir = run_dir / "checkpoints/3"
    noticed = []
    for damage in damages(step_dir):
        try:
            restored = restore(run_dir)
            verify(step_dir)
        except DamagedCheckpointError as error:
            assert str(step_dir) in str(error), damage
            noticed.append(damage)
        else:  # a file that Orbax keeps but does not need
            assert_same(restored["params"], PARAMS)
            assert_same(restored["masks"], MASKS)
            assert restored["plan"] == PLAN
    for name in ("params", "masks", "meta", "data", "opt_state"):
        assert any(f"/3/{name}/" in damage for damage in noticed), name


@ignore_other_reads
@pytest.mark.parametrize("item", ["params", "masks"])
def test_a_damaged_checkpoint_says_which_step_is_intact(run_dir, item):
    for file in (run_dir / "checkpoints/3" / item).rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError) as error:
        restore(run_dir)
    assert f"checkpoints/3/{item} is damaged" in str(error.value)
    assert "Step 2 is intact" in str(error.value)
    assert restore(run_dir, step=2)["step"] == 2


def test_a_damaged_checkpoint_without_an_intact_one(run_dir):
    for step in (2, 3):
        (run_dir / f"checkpoints/{step}/meta/metadata").write_text("{")
    with pytest.raises(DamagedCheckpointError, match="No earlier checkpoint .* intact"):
        restore(run_dir)


def test_another_format_is_refused(run_dir, monkeypatch):
    monkeypatch.setattr("nmjax.training.checkpoint.FORMAT", 2)
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        restore(run_dir)


def test_an_unfinished_step_is_no_step(run_dir):
    """What a killed process leaves is ignored, and removed by the next."""
    left = run_dir / "checkpoints/4.orbax-checkpoint-tmp"
    shutil.copytree(run_dir / "checkpoints/3", left)
    assert find_step(run_dir).name == "3"
    write(run_dir, (4,))
    assert not left.exists()
    assert list_steps(run_dir / "checkpoints") == [3, 4]


@pytest.mark.slow
def test_plain_orbax_opens_a_checkpoint_on_other_devices(written):
    """The lines of the module's docstring, in a process that has no nmjax."""
    program = f"""
import sys
sys.modules["nmjax"] = None  # importing it would raise
import orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore("{written}/checkpoints/3/params")
    masks = checkpointer.restore("{written}/checkpoints/3/masks")
with ocp.CheckpointManager("{written}/checkpoints") as manager:
    step = manager.latest_step()
    items = ocp.args.Composite(
        opt_state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )
    found = manager.restore(step, args=items)
print(step, found.meta["step"], found.opt_state["m"].sum(), masks["conv"]["kernel"]
      ["mask"].sum(), repr(float(params["conv"]["kernel"].sum())))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd="/",
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    kernel = PARAMS["conv"]["kernel"]
    expected = f"3 3 3.0 {(kernel > 0).sum()} {float(kernel.sum())!r}\n"
    assert done.stdout == expected

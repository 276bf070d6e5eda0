"""What happens to a run whose process is killed or terminated."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nmjax.training import restore, train
from nmjax.training.checkpoint import list_steps
from nmjax.training.restoring import verify
from tests.nmjax.training.fakes import RULES, FakeData, Net, config

ROOT = Path(__file__).parents[3]
SETTINGS = config(checkpoint_every=1, keep=2)
PROGRAM = """
import sys, time
from nmjax.training import train
from tests.nmjax.training.fakes import RULES, FakeData, Net
from tests.nmjax.training.test_faults import SETTINGS
data = FakeData(at_step=lambda step: time.sleep(0.2))
train(Net(), RULES, data, SETTINGS, sys.argv[1], progress=False)
"""


def start(run_dir):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, run_dir, step):
    """Waits until a checkpoint of this step or a later one is complete."""
    while not any(found >= step for found in list_steps(run_dir / "checkpoints")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    return train(Net(), RULES, FakeData(), SETTINGS, run_dir, progress=False)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_the_steps_since_the_last_save(
    uninterrupted, tmp_path
):
    """Killed while it writes a checkpoint at every step."""
    for step, delay in ((3, 0.05), (8, 0.12)):
        process = start(tmp_path)
        wait_for_step(process, tmp_path, step)
        time.sleep(delay)
        complete = list_steps(tmp_path / "checkpoints")[-1]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert restore(tmp_path)["step"] >= complete
        verify(tmp_path / f"checkpoints/{list_steps(tmp_path / 'checkpoints')[-1]}")
    result = train(Net(), RULES, FakeData(), SETTINGS, tmp_path, progress=False)
    assert_same(result.state, uninterrupted.state)


@pytest.mark.slow
def test_a_terminated_process_says_where_it_stopped(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 2)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143
    last = list_steps(tmp_path / "checkpoints")[-1]
    assert said == (
        f"SIGTERM: stopped after step {last}; checkpoint "
        f"{tmp_path}/checkpoints/{last}. The same command continues from there\n"
    )
    result = train(Net(), RULES, FakeData(), SETTINGS, tmp_path, progress=False)
    assert_same(result.state, uninterrupted.state)

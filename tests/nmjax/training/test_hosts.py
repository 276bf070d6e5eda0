"""Two processes of two devices each, which see one half of each batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nmjax.training import restore, train
from tests.nmjax.training.fakes import RULES, FakeData, Net, config

ROOT = Path(__file__).parents[3]
SETTINGS = config(freeze_epochs=1)
PROGRAM = """
import signal, sys
import jax
host, run_dir, port, stop_at, stop_in = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, host)
from nmjax.training import train
from tests.nmjax.training.fakes import RULES, Net
from tests.nmjax.training.test_hosts import SETTINGS, HostData

class Data(HostData):
    evaluations = 0

    def test_batches(self, *args, **kwargs):
        self.evaluations += 1
        for batch in super().test_batches(*args, **kwargs):
            if host == 1 and self.evaluations == int(stop_in):
                signal.raise_signal(signal.SIGTERM)
            yield batch

def at_step(step):
    if host == 1 and step == int(stop_at):
        signal.raise_signal(signal.SIGTERM)

result = train(Net(), RULES, Data(at_step), SETTINGS, run_dir, progress=False)
print(result.test_top1, result.test_loss)
"""


class HostData(FakeData):
    """Every host takes its share of the batches of `FakeData`."""

    def __init__(self, at_step):
        super().__init__(at_step=at_step)

    def train_batches(self, batch_size, *, seed, num_hosts, host):
        batches = super().train_batches(batch_size * num_hosts, seed=seed)
        return HostBatches(batches, num_hosts, host)

    def test_batches(self, batch_size, *, num_hosts, host):
        for batch in super().test_batches(batch_size * num_hosts):
            yield {name: x[host::num_hosts] for name, x in batch.items()}


class HostBatches:
    def __init__(self, batches, num_hosts, host):
        self.batches, self.num_hosts, self.host = batches, num_hosts, host
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self.batches)
        return {name: x[self.host :: self.num_hosts] for name, x in batch.items()}


def run_two(run_dir, *, stop_at=-1, stop_in=-1):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    stop = stop_at, stop_in
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (host, run_dir, port, *stop))],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_hosts_train_stop_and_resume_as_one(tmp_path):
    codes, said = run_two(tmp_path / "two", stop_at=5)
    assert codes == [143, 143], said
    # A host alone was told to stop; all did, at the next step at which they ask.
    assert restore(tmp_path / "two")["step"] == 6
    codes, said = run_two(tmp_path / "two")
    assert codes == [0, 0], said
    results = [[float(x) for x in out.splitlines()[-1].split()] for out, _ in said]
    assert results[0] == results[1]

    assert jax.device_count() == 4
    one = train(Net(), RULES, FakeData(), SETTINGS, tmp_path / "one", progress=False)
    assert results[0] == pytest.approx([one.test_top1, one.test_loss], rel=1e-4)


@pytest.mark.slow
def test_two_hosts_give_up_an_evaluation_together_and_lose_none_of_its_rows(tmp_path):
    """One is told to stop in the first evaluation, at a step at which none is asked."""
    assert 4 % SETTINGS.log_every
    codes, said = run_two(tmp_path / "two", stop_in=1)
    assert codes == [143, 143], said
    assert restore(tmp_path / "two")["step"] == 4
    codes, said = run_two(tmp_path / "two")
    assert codes == [0, 0], said
    rows = (tmp_path / "two" / "metrics.csv").read_text().splitlines()[1:]
    assert {4, 8, 12, 16} <= {int(row.split(",")[0]) for row in rows}

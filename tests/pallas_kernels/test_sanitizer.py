"""The kernels under compute-sanitizer: accesses out of bounds, races, barriers."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas_kernels import ahead_of_time

ROOT = Path(__file__).parent.parent.parent
TOOLKIT = Path("/usr/local/cuda/bin")
FOUND_ERRORS = 86  # an exit status that the program itself never has

# Every kernel's `name=` begins so; all else in the process is left alone.
OURS = "kernel_substring=nm_"


def find_sanitizer() -> str | None:
    in_toolkit = TOOLKIT / "compute-sanitizer"
    on_path = ahead_of_time.find_binary("compute-sanitizer")
    return on_path or (str(in_toolkit) if in_toolkit.is_file() else None)


def sanitize(binary: str, tool: str, *, platforms: str) -> subprocess.CompletedProcess:
    """Runs `smallest_products` in a process of its own under a tool."""
    environment = os.environ | {
        "JAX_PLATFORMS": platforms,
        # The tool needs memory too, and finds no error inside one large allocation.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "PYTHONPATH": str(ROOT),
    }
    command = [binary, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    # What the driver refuses to XLA, which then asks otherwise, is not ours.
    command += ["--kernel-name", OURS, "--report-api-errors", "no"]
    command += [sys.executable, "-m", "tests.pallas_kernels.smallest_products"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    find_sanitizer() is None,
    reason="needs compute-sanitizer, of the CUDA toolkit, on PATH",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_smallest_products_are_clean(tool):
    done = sanitize(str(find_sanitizer()), tool, platforms="cuda,cpu")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert ": ran" in done.stdout


@pytest.mark.slow
def test_what_runs_nothing_or_finds_errors_does_not_pass(tmp_path):
    # Without a GPU a stand-in shows that the tool's and the program's verdicts count.
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text('#!/bin/sh\nshift 8\nexec "$@"\n')
    stand_in.chmod(0o755)
    done = sanitize(str(stand_in), "memcheck", platforms="cpu")
    assert done.returncode == 1, done.stderr
    assert "nothing ran on cpu" in done.stdout
    assert "not run: needs" in done.stdout
    stand_in.write_text('#!/bin/sh\necho "$@"\nexit $4\n')
    done = sanitize(str(stand_in), "memcheck", platforms="cpu")
    assert done.returncode == FOUND_ERRORS
    assert (
        f"--kernel-name {OURS} --report-api-errors no {sys.executable}" in done.stdout
    )


def test_every_kernel_has_a_name_that_the_filter_finds():
    """One that it misses would pass unchecked."""
    checked = 0
    for path in (ROOT / "pallas_kernels").glob("*.py"):
        text = path.read_text()
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "ptx.kernel":
                (name,) = (k.value for k in call.keywords if k.arg == "name")
                where = f"{path.name}:{call.lineno}"
                if isinstance(name, ast.Name):  # chosen from names in the same file
                    assert re.search(rf'\b{name.id} = .*"nm_', text), where
                else:
                    assert re.match(r"f?'nm_", ast.unparse(name)), where
                checked += 1
    assert checked

"""The kernels under compute-sanitizer: accesses out of bounds, races, barriers."""

import ast
import os
import re
import subprocess

import pytest

from tests.pallas_kernels import sanitizer


def sanitize(binary: str, tool: str, *, platforms: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        sanitizer.command(binary, tool),
        cwd=sanitizer.ROOT,
        env=os.environ | sanitizer.ENVIRONMENT | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    sanitizer.find() is None,
    reason="needs compute-sanitizer, of the CUDA toolkit, on PATH",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_smallest_products_are_clean(tool):
    done = sanitize(str(sanitizer.find()), tool, platforms="cuda,cpu")
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
    assert done.returncode == sanitizer.FOUND_ERRORS
    assert f"--kernel-name {sanitizer.OURS} --report-api-errors no" in done.stdout


def test_every_kernel_has_a_name_that_the_filter_finds():
    """One that it misses would pass unchecked."""
    checked = 0
    for path in (sanitizer.ROOT / "pallas_kernels").glob("*.py"):
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

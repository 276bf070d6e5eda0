"""compute-sanitizer over this package's kernels, on their smallest problems.

    python -m tests.pallas_kernels.sanitizer memcheck      also: racecheck, synccheck

What it finds is said at once, so that a run that is cut short has said it.
"""

import os
import sys
from pathlib import Path

from tests.pallas_kernels import ahead_of_time

ROOT = Path(__file__).parent.parent.parent
TOOLKIT = Path("/usr/local/cuda/bin")
FOUND_ERRORS = 86  # an exit status that the program itself never has

# Every kernel's `name=` begins so; all else in the process is left alone.
OURS = "kernel_substring=nm_"

ENVIRONMENT = {
    # The tool needs memory too, and finds no error inside one large allocation.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "PYTHONPATH": str(ROOT),
}


def find() -> str | None:
    """The binary: on PATH or in the CUDA toolkit; None where it is not there."""
    in_toolkit = TOOLKIT / "compute-sanitizer"
    on_path = ahead_of_time.find_binary("compute-sanitizer")
    return on_path or (str(in_toolkit) if in_toolkit.is_file() else None)


def command(binary: str, tool: str) -> list[str]:
    """The command line that runs `smallest_products` under a tool."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    # What the driver refuses to XLA, which then asks otherwise, is not ours.
    options += ["--kernel-name", OURS, "--report-api-errors", "no"]
    program = [sys.executable, "-u", "-m", "tests.pallas_kernels.smallest_products"]
    return [binary, *options, *program]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = find() or sys.exit("compute-sanitizer is not on PATH")
    os.chdir(ROOT)
    os.execve(found, command(found, sys.argv[1]), os.environ | ENVIRONMENT)

"""Times `import nmjax` against `import flax.linen`, each in a fresh interpreter.

python benchmarks/import_time.py
"""

import subprocess
import sys
import time

import numpy as np
from report import write

ROUNDS = 11


def seconds(module):
    """Wall time of a Python process that imports the module and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main():
    """Measures in turn and writes the table."""
    modules = "flax.linen", "nmjax"
    for module in modules:
        seconds(module)
    times = np.array([[seconds(module) for module in modules] for _ in range(ROUNDS)])
    low, ratio, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
    row = {
        "flax.linen s": round(float(np.median(times[:, 0])), 2),
        "nmjax s": round(float(np.median(times[:, 1])), 2),
        "ratio": round(float(ratio), 3),
        "quartiles": [round(float(low), 3), round(float(high), 3)],
    }
    print(row)
    write("import_time", "import nmjax over import flax.linen", [row])


if __name__ == "__main__":
    main()

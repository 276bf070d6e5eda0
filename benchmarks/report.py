"""What every benchmark of this folder reports: the machine, a table, the numbers."""

import datetime
import json
import os
import pathlib
import platform

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def machine():
    """What the numbers depend on."""
    cpu = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [s for s in cpuinfo.read_text().splitlines() if "model name" in s]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "load average": [round(load, 1) for load in os.getloadavg()],
    }


def write(name, title, rows, folder=RESULTS):
    """Prints a Markdown table of the rows and writes it, with the details as JSON.

    Args:
      name: Of the files: `results/NAME-pythonVERSION-jaxVERSION.md` and `.json`; where
        jax has another device than the CPU, that is in the name too.
      title: What the table shows.
      rows: Dictionaries with the same keys.
      folder: In place of `results`.
    """
    environment, keys = machine(), list(rows[0])
    lines = [title, "", ", ".join(f"{k} {v}" for k, v in environment.items()), ""]
    lines += ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(str(row[k]) for k in keys) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    folder.mkdir(exist_ok=True, parents=True)
    python = ".".join(platform.python_version_tuple()[:2])
    stem = f"{name}-python{python}-jax{jax.__version__}"
    if jax.default_backend() != "cpu":
        stem += "-" + environment["device"].replace(" ", "_")
    path = folder / stem
    pathlib.Path(f"{path}.md").write_text(text)
    record = {"machine": environment, "rows": rows}
    pathlib.Path(f"{path}.json").write_text(json.dumps(record, indent=1) + "\n")

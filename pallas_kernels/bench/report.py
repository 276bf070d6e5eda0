"""What a run leaves: a Markdown table, the numbers as JSON, a plot, the machine."""

import dataclasses
import datetime
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.products import Product
from pallas_kernels.devices import DataSheet

NO_GPU = "No GPU measurement: "

# Of nvidia-smi.
_STATE = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("power.draw", "power.limit", "temperature.gpu"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One product's race, or why there was none.

    Attributes:
      product: The product.
      dtype: Of operands and result.
      implementation: What raced against the dense product.
      status: "ok", "WRONG: ...", "FAILED: ..." or "cannot run: ...".
      dense_us: Median time of the dense product in µs, 0 where none counts.
      sparse_us: Median time of the sparse product in µs.
      ratio: Quartiles of dense over sparse time within a round.
      compressing: The same where A is compressed on the way; None where it is not.
      rivals_us: Median times in µs of others, by name.
      rivals_ratio: Quartiles of their time over the sparse time, by name.
      notes: Why a rival, or the time with compression, is not there.
    """

    product: Product
    dtype: str
    implementation: str
    status: str = "ok"
    dense_us: float = 0.0
    sparse_us: float = 0.0
    ratio: tuple[float, float, float] = (0.0, 0.0, 0.0)
    compressing: tuple[float, float, float] | None = None
    rivals_us: dict[str, float] = dataclasses.field(default_factory=dict)
    rivals_ratio: dict[str, tuple] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether a result was not the oracle's, or is not there, of ours."""
        said = (self.status, *self.notes)
        return any(text.startswith(("WRONG", "FAILED")) for text in said)

    @property
    def tflops(self) -> float:
        """Of the dense product's operations, in the sparse product's time."""
        return self.product.flops / self.sparse_us / 1e6 if self.sparse_us else 0.0

    @property
    def gb_per_s(self) -> float:
        """Of the bytes that the sparse product must move, in its time."""
        if not self.sparse_us:
            return 0.0
        return self.product.sparse_bytes() / self.sparse_us / 1e3


@dataclasses.dataclass(frozen=True)
class CompressionRow:
    """One pass of mask and compression against a copy of its input.

    Attributes:
      name: What was done.
      shape: Of the dense matrix.
      dtype: Of the dense matrix; the values are 16 bits.
      status: As of `Row`.
      moved: Bytes that it has to read and write.
      copy_us: Median time of the copy in µs.
      us: Median time of the pass in µs.
      ratio: Quartiles of its time over the copy's within a round.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    status: str = "ok"
    moved: int = 0
    copy_us: float = 0.0
    us: float = 0.0
    ratio: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def bad(self) -> bool:
        """As of `Row`."""
        return self.status.startswith(("WRONG", "FAILED"))


def machine() -> dict[str, Any]:
    """What the numbers depend on; of the GPU's state, what nvidia-smi says now."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    smi = shutil.which("nvidia-smi")
    if device.platform in ("gpu", "cuda") and smi:
        command = [smi, f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            values = map(str.strip, answer.stdout.splitlines()[0].split(","))
            found |= dict(zip(("driver", *_STATE[1:]), values, strict=True))
    return found


def product_table(rows: Sequence[Row], sheet: DataSheet | None) -> str:
    """The races of products in Markdown; shares of a peak need the data sheet."""
    rivals = sorted({name for row in rows for name in row.rivals_us})
    names = ["layer", "use", "m", "n", "k", "dense µs", "sparse µs", "TFLOP/s"]
    names += ["of dense peak", "of bandwidth"] if sheet else []
    names += ["over dense", "quartiles", "with compression"]
    for rival in rivals:
        names += [f"{rival} µs", f"over {rival}"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        p = row.product
        cells = [p.layer, p.use.name, str(p.m), str(p.n), str(p.k)]
        if row.status != "ok":
            cells += [" ".join(row.status.split())] + [""] * (
                len(names) - len(cells) - 1
            )
        else:
            cells += [
                f"{row.dense_us:.1f}",
                f"{row.sparse_us:.1f}",
                f"{row.tflops:.4g}",
            ]
            if sheet:
                cells.append(f"{row.tflops / sheet.tflops:.0%}")
                cells.append(f"{row.gb_per_s / sheet.gb_per_s:.0%}")
            low, median, high = row.ratio
            cells += [f"{median:.2f}x", f"{low:.2f}–{high:.2f}"]
            cells.append(f"{row.compressing[1]:.2f}x" if row.compressing else "")
            for rival in rivals:
                found = rival in row.rivals_us
                cells += (
                    [
                        f"{row.rivals_us[rival]:.1f}",
                        f"{row.rivals_ratio[rival][1]:.2f}x",
                    ]
                    if found
                    else ["", ""]
                )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compression_table(rows: Sequence[CompressionRow], sheet: DataSheet | None) -> str:
    """The races of compression in Markdown."""
    names = ["what", "matrix", "dtype", "copy µs", "µs", "GB/s"]
    names += ["of bandwidth"] if sheet else []
    names += ["time over copy", "quartiles"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row.name, f"{row.shape[0]}x{row.shape[1]}", row.dtype]
        if row.status != "ok":
            cells += [" ".join(row.status.split())] + [""] * (
                len(names) - len(cells) - 1
            )
        else:
            speed = row.moved / row.us / 1e3
            cells += [f"{row.copy_us:.1f}", f"{row.us:.1f}", f"{speed:.4g}"]
            cells += [f"{speed / sheet.gb_per_s:.0%}"] if sheet else []
            low, median, high = row.ratio
            cells += [f"{median:.2f}x", f"{low:.2f}–{high:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def missing_plot() -> str | None:
    """Why no plot can be drawn; None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot without matplotlib: pip install 'nmjax[train]'"
    return None


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the speed over dense by tokens as PNG: a panel a model, a line a layer."""
    figure_module: Any = importlib.import_module("matplotlib.figure")
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row.product.tokens):
        if row.status == "ok":
            model, _, layer = row.product.layer.partition(" ")
            name = f"{layer} {row.product.use.name}".strip()
            panels.setdefault(model, {}).setdefault(name, []).append(row)
    columns = max(1, min(2, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = figure_module.Figure((6.5 * columns, 4 * lines), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (model, series) in zip(grid, panels.items(), strict=False):
        for name, members in series.items():
            tokens = [row.product.tokens for row in members]
            low, median, high = zip(*(row.ratio for row in members), strict=True)
            errors = [
                [m - q for m, q in zip(median, low, strict=True)],
                [q - m for m, q in zip(median, high, strict=True)],
            ]
            axes.errorbar(tokens, median, errors, marker="o", markersize=3, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(title=model, xlabel="tokens", ylabel="speed over the dense product")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def write(
    folder: Path,
    title: str,
    text: str,
    rows: Sequence[Row],
    compression: Sequence[CompressionRow],
    about: dict[str, Any],
) -> list[Path]:
    """Writes bench.md and bench.json."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.md", folder / "bench.json"]
    paths[0].write_text(text)
    record = {
        "title": title,
        "machine": about,
        "products": [_as_record(row) for row in rows],
        "compression": [dataclasses.asdict(row) for row in compression],
    }
    paths[1].write_text(json.dumps(record, indent=1) + "\n")
    return paths


def _as_record(row: Row) -> dict[str, Any]:
    p = row.product
    where = {"layer": p.layer, "use": p.use.name, "tokens": p.tokens}
    where |= {"m": p.m, "n": p.n, "k": p.k}
    rest = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name != "product"
    }
    return where | rest | {"tflops": row.tflops, "gb_per_s": row.gb_per_s}

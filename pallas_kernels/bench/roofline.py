"""What no kernel can beat on a device, from its data sheet alone."""

import dataclasses

from pallas_kernels.bench.products import Product
from pallas_kernels.config import heuristic_sm90
from pallas_kernels.devices import DataSheet


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bounds of the time of a product, in µs.

    Attributes:
      dense_us: Of the dense product.
      sparse_us: Of the sparse product.
      limit: What decides the sparse time: "arithmetic" or "memory".
    """

    dense_us: float
    sparse_us: float
    limit: str

    @property
    def ratio(self) -> float:
        """How much faster the sparse product can be at the very most."""
        return self.dense_us / self.sparse_us


def bound(product: Product, sheet: DataSheet) -> Bound:
    """Arithmetic at the peak, or each byte once at full bandwidth: the longer."""
    dense = product.flops / sheet.tflops / 1e6
    dense_memory = product.dense_bytes() / sheet.gb_per_s / 1e3
    sparse_memory = product.sparse_bytes() / sheet.gb_per_s / 1e3
    return Bound(
        max(dense, dense_memory),
        max(dense / 2, sparse_memory),
        "arithmetic" if dense / 2 > sparse_memory else "memory",
    )


def table(products: list[Product], sheet: DataSheet) -> str:
    """The bounds of products as a Markdown table, with their source."""
    on_hopper = sheet.kernel == "sm90"
    names = ["layer", "use", "m", "n", "k", "dense µs", "sparse µs", "at most", "limit"]
    names += ["shared memory"] * on_hopper
    lines = [
        f"Bounds for {sheet.name}: {sheet.tflops:g} TFLOP/s dense with float32 "
        f"accumulation, twice that 2:4, {sheet.gb_per_s:g} GB/s ({sheet.source}). "
        "Nothing here was measured.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    for p in products:
        b = bound(p, sheet)
        cells = [p.layer, p.use.name, p.m, p.n, p.k]
        cells += [f"{b.dense_us:.1f}", f"{b.sparse_us:.1f}", f"{b.ratio:.2f}x", b.limit]
        if on_hopper:
            cells.append(f"{heuristic_sm90(p.m, p.n, p.k).speed_bound:.2f}x")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if on_hopper:
        lines += [
            "",
            "shared memory: at most this over the dense peak, with the tile that "
            "`heuristic_sm90` chooses, by `SM90Config.speed_bound`.",
        ]
    return "\n".join(lines) + "\n"

"""The options of `python -m pallas_kernels.bench`, checked before any work starts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.bench.products import FPROP, SUITES, TOKENS, USES
from pallas_kernels.devices import DATA_SHEETS, DataSheet, data_sheet

# Of --tune --quick: on Hopper those that may come to 1.24 times the dense product's
# speed or more.
QUICK_CONFIGS = 21

_DESCRIPTION = """\
Times 2:4 sparse products against the dense ones on this GPU.

Every row is one product D = A24 · B. The dense product multiplies the same matrices
with zeros in them, with jnp.dot, laid out as in a Flax layer. A result is compared with
its own before it may race; then both take turns, round by round. "over dense" is the
median over rounds of dense time / sparse time: above 1x the sparse product is faster;
"with compression" is the same for a layer, which compresses A before each product.
TFLOP/s count the operations of the dense product. Operands are random normal numbers,
in more sets than L2 can hold, used in rotation.

Without a GPU it says what it would measure, prints what a data sheet allows, and ends.
"""

_EPILOG = f"""\
examples (each after python -m pallas_kernels.bench):
  (nothing)                   everything; --quick for a few sizes and rounds
  --suite vit_l uses          some of: {" ".join(SUITES)}
                              compression
  --shape 4096,16384,4096     M,N,K: for x · W features out, tokens, features in
  --tune --suite llama3_8b    finds the fastest Config for each product and writes
                              tuned/DEVICE.json, which nm_matmul reads: commit it
  --device h200               no measurement: the bounds of a data sheet
  --implementation reference --shape 64,128,64
                              the whole pipeline on a CPU; not a GPU's figures

exit status: 0, or 1 if a result was wrong or nothing could run that was asked for (a
kernel by name, --tune), or 2 for bad options
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; ends the process where they cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        choices=[*SUITES, "compression"],
        help="products by name; all of them by default",
    )
    what.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="M,N,K",
        help="a product of these sizes, in place of the suites; repeatable",
    )
    what.add_argument(
        "--use",
        choices=[use.name for use in USES],
        metavar="NAME",
        help=f"the use of --shape: {', '.join(use.name for use in USES)} "
        f"(default: {FPROP.name})",
    )
    what.add_argument(
        "--tokens",
        nargs="+",
        type=_positive,
        metavar="N",
        help=f"tokens of the models' layers (default: {' '.join(map(str, TOKENS))})",
    )
    what.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        default="bfloat16",
        help="of operands and results (default: bfloat16)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--implementation",
        choices=["sm80", "sm90", "sm100", "reference"],
        help="the kernel to race (default: the one for this GPU)",
    )
    how.add_argument(
        "--rounds", type=_positive, metavar="N", help="turns of each (default: 21)"
    )
    how.add_argument(
        "--milliseconds",
        type=_positive,
        default=20,
        metavar="T",
        help="of one turn, about (default: 20)",
    )
    how.add_argument(
        "--quick",
        action="store_true",
        help="7 rounds, two sizes of each layer, kernels alone in compression; "
        f"with --tune, at most {QUICK_CONFIGS} Configs",
    )
    how.add_argument(
        "--tune",
        action="store_true",
        help="race every Config of this GPU's kernel and write the winners",
    )
    how.add_argument(
        "--device",
        type=_device,
        metavar="NAME",
        help=f"print bounds from a data sheet and end: {', '.join(DATA_SHEETS)}",
    )
    how.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="for bench.md, bench.json, bench.png (default: runs/bench); with --tune, "
        "for DEVICE.json (default: the package's own folder, tuned)",
    )
    options = parser.parse_args(arguments)
    if options.tune and options.implementation == "reference":
        parser.error("--tune needs a kernel: the reference has no Config")
    if options.shape and (options.suite or options.tokens):
        parser.error("--shape replaces --suite and --tokens: give one or the other")
    if options.device and options.suite == ["compression"]:
        parser.error("--device has bounds of products, --suite compression has none")
    if options.use and not options.shape:
        parser.error("--use goes with --shape: the suites have uses of their own")
    options.use = options.use or FPROP.name
    options.rounds = options.rounds or (7 if options.quick else 21)
    return options


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected M,N,K such as 64,128,64")
    m, n, k = map(int, parts)
    if k % 4:
        raise argparse.ArgumentTypeError(f"{text!r}: K = {k} is no multiple of 4")
    return m, n, k


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return int(text)


def _device(text: str) -> DataSheet:
    sheet = data_sheet(text)
    if sheet is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(DATA_SHEETS)}"
        )
    return sheet

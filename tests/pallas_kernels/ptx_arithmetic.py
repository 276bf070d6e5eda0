"""The PTX instructions that compute a register of each thread from its registers.

`ELEMENTWISE[name](machine, warp, modifiers, kind, operands)` gives a value a thread;
modifiers and kind are the words of the opcode after its name, the kind being the last.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.pallas_kernels import emulator

DTYPES: dict[str, np.dtype] = {
    kind: np.dtype(dtype)
    for kind, dtype in {
        **{kind + "16": np.uint16 for kind in "bu"},
        **{kind + "32": np.uint32 for kind in "bu"},
        **{kind + "64": np.uint64 for kind in "bu"},
        "s16": np.int16,
        "s32": np.int32,
        "s64": np.int64,
        "f16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "f32": np.float32,
        "pred": np.bool_,
    }.items()
}

# There are no registers of 8 bits: the low byte of a wider one.
BYTES = {"s8": np.int8, "u8": np.uint8}


def _plain(function: Callable) -> Callable:
    """An instruction whose operands and result have one type."""

    def run(machine, warp, modifiers, kind, operands):
        del modifiers
        values = [machine.value(warp, x, kind) for x in operands]
        return np.asarray(function(*values)).astype(DTYPES[kind.removesuffix("x2")])

    return run


def _extreme(number: Callable, nan: Callable) -> Callable:
    def run(machine, warp, modifiers, kind, operands):
        function = nan if "NaN" in modifiers else number
        return _plain(function)(machine, warp, modifiers, kind, operands)

    return run


def _setp(machine, warp, modifiers, kind, operands):
    comparison, *combined = modifiers
    a, b = (machine.value(warp, x, kind) for x in operands[:2])
    unordered = np.zeros(a.shape, bool)
    if "f" in kind:
        unordered = np.isnan(a) | np.isnan(b)
    result = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }[comparison[:2]](a, b)
    result = result | unordered if comparison.endswith("u") else result & ~unordered
    if combined:
        predicate = operands[2]
        also = warp.registers[predicate.lstrip("!")] ^ predicate.startswith("!")
        result = {"and": np.logical_and, "or": np.logical_or}[combined[0]](result, also)
    return result


def _selp(machine, warp, modifiers, kind, operands):
    first, second, predicate = operands
    return np.where(
        warp.registers[predicate],
        machine.value(warp, first, kind),
        machine.value(warp, second, kind),
    )


def _shift(machine, warp, modifiers, kind, operands, left: bool):
    value = machine.value(warp, operands[0], kind)
    bits = 8 * value.itemsize
    amount = np.minimum(machine.value(warp, operands[1], "u32"), bits)
    most = np.minimum(amount, bits - 1).astype(value.dtype)
    shifted = value << most if left else value >> most
    signed = value.dtype.kind == "i" and not left
    return shifted if signed else np.where(amount == bits, 0, shifted)


def _mul(machine, warp, modifiers, kind, operands):
    a, b = (machine.value(warp, x, kind) for x in operands)
    if kind[0] in "us" and "lo" not in modifiers:
        wide = a.astype(object) * b.astype(object)
        if "wide" in modifiers:
            return wide.astype(f"{a.dtype.kind}{2 * a.itemsize}")
        return (wide >> 8 * a.itemsize).astype(a.dtype)
    return a * b


def _mad(machine, warp, modifiers, kind, operands):
    product = _mul(machine, warp, modifiers, kind, operands[:2])
    return product + machine.value(warp, operands[2], f"b{8 * product.itemsize}").view(
        product.dtype
    )


def _bfe(machine, warp, modifiers, kind, operands):
    value, position, length = operands
    value = machine.value(warp, value, kind)
    assert isinstance(position, int) and isinstance(length, int)
    bits = 8 * value.itemsize
    unsigned = value.view(f"u{value.itemsize}")
    top = unsigned << value.dtype.type(bits - position - length).view(unsigned.dtype)
    return top.view(value.dtype) >> value.dtype.type(bits - length)


def _cvt(machine, warp, modifiers, kind, operands):
    if modifiers[-1] in ("bf16x2", "f16x2"):
        high, low = (machine.value(warp, x, kind) for x in operands)
        pair = np.stack([low, high], -1).astype(DTYPES[modifiers[-1][:-2]])
        return pair.view(np.uint32)[:, 0]
    if kind in BYTES:
        source = warp.registers[operands[0]].astype(BYTES[kind])
    else:
        source = machine.value(warp, operands[0], kind)
    if modifiers[-1] in BYTES:  # extended to its register
        byte = modifiers[-1]
        return source.astype(BYTES[byte]).astype(DTYPES[byte.replace("8", "16")])
    return source.astype(DTYPES[modifiers[-1]])


def _prmt(machine, warp, modifiers, kind, operands):
    assert not modifiers
    return emulator.prmt(*(machine.value(warp, x, kind) for x in operands))


def _logic(function: Callable, of_predicates: Callable) -> Callable:
    def run(machine, warp, modifiers, kind, operands):
        values = [machine.value(warp, x, kind) for x in operands]
        return (of_predicates if kind == "pred" else function)(*values)

    return run


ELEMENTWISE: dict[str, Callable] = {
    "abs": _plain(np.abs),
    "add": _plain(np.add),
    "and": _logic(np.bitwise_and, np.logical_and),
    "bfe": _bfe,
    "copysign": _plain(lambda sign, x: np.copysign(x, sign)),
    "cvt": _cvt,
    "ex2": _plain(np.exp2),
    "fma": _plain(lambda a, b, c: a.astype(float) * b + c),
    "mad": _mad,
    "max": _extreme(np.fmax, np.maximum),
    "min": _extreme(np.fmin, np.minimum),
    "mul": _mul,
    "neg": _plain(np.negative),
    "not": _logic(np.invert, np.logical_not),
    "or": _logic(np.bitwise_or, np.logical_or),
    "prmt": _prmt,
    "rcp": _plain(lambda x: 1 / x),
    "selp": _selp,
    "setp": _setp,
    "shl": lambda *arguments: _shift(*arguments, left=True),
    "shr": lambda *arguments: _shift(*arguments, left=False),
    "sub": _plain(np.subtract),
    "tanh": _plain(np.tanh),
    "xor": _logic(np.bitwise_xor, np.logical_xor),
}

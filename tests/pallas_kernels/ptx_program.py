"""The text of a kernel's PTX as instructions (PTX ISA, "Syntax")."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor."""

    base: Any
    offset: int = 0
    coordinates: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;` A register is a string, an immediate an integer."""

    opcode: str
    operands: tuple
    guard: str | None
    negated: bool

    @functools.cached_property
    def name(self) -> str:
        """The first word of the opcode."""
        return self.opcode.split(".", 1)[0]

    @functools.cached_property
    def kind(self) -> str:
        """The last type in the opcode."""
        return self.opcode.rsplit(".", 1)[1]


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of the only kernel, and where its labels are."""
    (body,) = re.findall(r"^\.visible \.entry.*?^\{(.*)^\}", ptx, re.M | re.S)
    body = re.sub(r"//.*|^\s*\.loc\b.*|^\s*\.(?:reg|shared)\b.*;", "", body, flags=re.M)
    instructions, labels = [], {}
    scopes, names = [""], itertools.count()
    for statement in _statements(body):
        if statement == "{":
            scopes.append(f"{next(names)}:")
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            labels[_scoped(statement[:-1], scopes[-1])] = len(instructions)
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, scopes[-1]))
    return instructions, labels


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolon, labels with their colon, braces of blocks."""
    start = 0
    for match in re.finditer(r"[{};:]", body):
        char, end = match[0], match.end()
        begun = body[start : match.start()].strip()
        if char in "{}" and not begun:
            yield char
        elif char == ";":
            if begun:
                yield begun
        elif char == ":" and re.fullmatch(r"[\w$]+", begun) and body[end] != ":":
            yield begun + ":"
        else:
            continue  # within a statement
        start = end


def _scoped(name: str, scope: str) -> str:
    """Names of a block of inline assembly are its own."""
    return name if name.startswith(("%", "$")) else scope + name


def _instruction(text: str, scope: str) -> Instruction:
    guard, negated = None, False
    if match := re.match(r"@(!?)([%\w$]+)\s+", text):
        negated, guard = bool(match[1]), _scoped(match[2], scope)
        text = text[match.end() :]
    opcode, *rest = text.split(None, 1)
    operands = tuple(_operand(x, scope) for x in _split(rest[0])) if rest else ()
    return Instruction(opcode, operands, guard, negated)


def _split(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _operand(text: str, scope: str) -> Any:
    if text.startswith("{"):
        return [_operand(x, scope) for x in _split(text[1:-1])]
    if text.startswith("["):
        base, *coordinates = _split(text[1:-1])
        if coordinates:
            return Address(_operand(base, scope), 0, _operand(coordinates[0], scope))
        base, _, offset = base.partition("+")
        return Address(_operand(base.strip(), scope), int(offset or 0))
    if "|" in text:
        return [_operand(x, scope) for x in text.split("|")]
    if text.startswith("0f"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", text):
        return int(text.rstrip("U"), 0)
    return _scoped(text, scope)

"""The README's Python blocks, word for word."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_python_block_runs(number, capsys):
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {})
    assert capsys.readouterr().out


def test_loops_fit_on_a_screen():
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        body = block[block.index("recipe =") :] if "recipe =" in block else block
        lines = [line for line in body.splitlines() if line.strip()]
        assert len(lines) <= 30

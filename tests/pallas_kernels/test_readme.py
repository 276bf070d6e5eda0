"""The README of the package: its Python block runs, its links lead somewhere."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "pallas_kernels" / "README.md"


def test_the_example_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    exec(compile(block, README.name, "exec"), {})
    out = capsys.readouterr().out
    assert "(512, 4096) 0.5625 of the dense bytes" in out
    assert "NVIDIA H200: " in out


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    missing = [link for link in links if not (README.parent / link).is_file()]
    assert links and not missing

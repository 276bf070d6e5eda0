"""The Python blocks of the README and of docs/, word for word, and where links lead."""

import operator
import re
from pathlib import Path

import pytest

import nmjax

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
    )
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def is_slow(page: str, block: str) -> bool:
    """Those that train, and one a method."""
    return "methods/" in page or "for _ in range" in block


@pytest.mark.parametrize(
    "page, number",
    [
        pytest.param(page, i, marks=[pytest.mark.slow] * is_slow(page, block))
        for page in PAGES
        for i, block in enumerate(blocks(page))
    ],
)
def test_a_python_block_runs(page, number, capsys):
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), {})
    assert "False" not in capsys.readouterr().out.splitlines()


def test_loops_fit_on_a_screen():
    assert len(blocks("README.md")) >= 3
    for block in blocks("README.md"):
        body = block[block.index("recipe =") :] if "recipe =" in block else block
        lines = [line for line in body.splitlines() if line.strip()]
        assert len(lines) <= 30


def test_every_recipe_has_a_page():
    import inspect

    from nmjax import recipes

    methods = "".join(text for page, text in PAGES.items() if "methods" in page)
    names = [
        name
        for name, function in vars(recipes).items()
        if inspect.isfunction(function)
        and function.__module__ == recipes.__name__
        and name not in ("dense", "as_recipe")
    ]
    assert len(names) >= 13
    assert [name for name in names if f"recipes.{name}" not in methods] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "methods" in page])
def test_a_method_says_when_to_use_it_what_it_costs_and_where_it_is_from(page):
    assert re.search(r"^    .* = ", PAGES[page], re.M), "its equation"
    for what in ("When", "Cost", "Source"):
        assert len(re.findall(rf"^- \*\*{what}\.\*\* ", PAGES[page], re.M)) == 1, what
    assert blocks(page)


@pytest.mark.parametrize("page", PAGES)
def test_names_are_there(page):
    """Whoever has imported nmjax may write what a page calls nmjax.x.y."""
    names = set(re.findall(r"\bnmjax(?:\.[A-Za-z_]\w*)+", PAGES[page]))
    for name in names - {"nmjax.recipes.NAME"}:
        operator.attrgetter(name.removeprefix("nmjax."))(nmjax)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    folder = (ROOT / page).parent
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (folder / link).exists()] == []

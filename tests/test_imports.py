"""Dependencies point one way, optional packages load late, names do not collide."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A unit is a module or folder directly under nmjax/, or one of the other packages. It
# imports units of the rows above its own, never of its own row or below: not even
# inside a function.
LAYERS = [
    {
        "pallas_kernels",
        "nmjax.equation",
        "nmjax.paths",
        "nmjax.patches",
        "nmjax.pattern",
        "nmjax.models",
    },
    {"nmjax.masks", "nmjax.schedule"},
    {"nmjax.estimators", "nmjax.recipe", "nmjax.sampling"},
    {"nmjax.tokens"},
    {"nmjax.gemms", "nmjax.recipes", "nmjax.sparse_products"},
    {"nmjax.ops"},
    {"nmjax.plans", "nmjax.rules"},
    {"nmjax.planning"},
    {"nmjax.sparsity"},
    {"nmjax.sparse_kernel"},
    {"nmjax.recording", "nmjax.state"},
    {"nmjax.decay", "nmjax.two_phase"},
    {"nmjax.linen", "nmjax.nnx", "nmjax.metrics", "nmjax.audit"},
    {"nmjax.swap"},
    {"nmjax.pruning"},
    {"nmjax"},  # the public names, as nmjax/__init__.py lists them
    {"nmjax.training"},
    {"nmjax.__main__"},
    {"experiments"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Units that promise to need no more than this besides the standard library.
THIRD_PARTY = {
    "pallas_kernels": {"absl", "jax", "jax_triton", "jaxlib", "numpy", "triton"},
    "nmjax.equation": set(),
    "nmjax.gemms": {"jax", "numpy"},
    "nmjax.pattern": set(),
    "nmjax.recipe": set(),
    "nmjax.recipes": set(),
    "nmjax.sampling": {"jax", "numpy"},
    "nmjax.schedule": set(),
    "nmjax.masks": {"jax", "numpy"},
    "nmjax.estimators": {"jax", "numpy"},
    "nmjax.ops": {"jax", "numpy"},
    "nmjax.models": {"flax", "jax", "numpy"},
}


def test_dependencies_point_one_way():
    offences = []
    for path in source_files("nmjax", "pallas_kernels", "experiments"):
        importer = unit_of(module_name(path))
        for imported in imported_modules(path):
            unit = unit_of(imported)
            if unit in LEVEL and unit != importer and LEVEL[unit] >= LEVEL[importer]:
                offences.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not offences


def test_every_module_has_a_place_in_the_layers():
    units = {unit_of(module_name(path)) for path in source_files("nmjax")}
    assert units <= set(LEVEL), "add the new module to LAYERS"


def test_ptx_and_private_names_of_jax_are_in_one_place():
    place = ROOT / "pallas_kernels" / "ptx"
    private = ("jax._src", "jaxlib.mlir")
    knowing = set()
    for path in source_files("nmjax", "pallas_kernels", "experiments"):
        imports = any(name.startswith(private) for name in imported_modules(path))
        if imports or "inline_asm" in path.read_text():
            knowing.add(path.parent)
    assert knowing == {place}


def test_low_units_need_no_other_package():
    offences = []
    for path in source_files("nmjax", "pallas_kernels"):
        unit = unit_of(module_name(path))
        for imported in imported_modules(path):
            root = imported.partition(".")[0]
            if (
                unit in THIRD_PARTY
                and unit_of(imported) not in LEVEL
                and root not in THIRD_PARTY[unit] | set(sys.stdlib_module_names)
            ):
                offences.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not offences


def test_import_brings_in_jax_and_flax_linen_alone():
    program = """
import json, sys
import flax.linen
before = set(sys.modules)
import nmjax
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    ours = {"nmjax", "pallas_kernels", "jax", "jaxlib", "flax"}
    allowed = ours | set(sys.stdlib_module_names)
    assert "nmjax" in loaded
    assert [name for name in loaded if name.partition(".")[0] not in allowed] == []
    # flax.nnx, which loads optax and Orbax, comes with nmjax.nnx.
    assert not {"flax.nnx", "nmjax.nnx", "nmjax.training"} & set(loaded)


@pytest.mark.parametrize("package", ["nmjax", "pallas_kernels"])
def test_no_public_name_is_also_a_submodule(package):
    # Importing a submodule binds its name in the package: a function of the same name
    # would be there or not, depending on what was imported last.
    collisions = []
    for init in (ROOT / package).rglob("__init__.py"):
        submodules = {p.stem for p in init.parent.glob("*.py")} - {"__init__"}
        submodules |= {p.parent.name for p in init.parent.glob("*/__init__.py")}
        for name in bound_names(init) & submodules:
            collisions.append(f"{module_name(init)}.{name}")
    assert not collisions


def source_files(*packages: str) -> list[Path]:
    return sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    """nmjax/masks/magnitude.py -> nmjax.masks.magnitude."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """nmjax.masks.magnitude -> nmjax.masks; experiments.data -> experiments."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "nmjax" else 1])


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if is_module(member) else node.module


def bound_names(init: Path) -> set[str]:
    """What the file's top level binds, less its own submodules."""
    package = module_name(init)
    names = set()
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module != package:
            names |= {alias.asname or alias.name for alias in node.names}
    return names

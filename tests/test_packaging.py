"""What ships, what is pinned, and what no committed file may hold."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("nmjax", "pallas_kernels")
EXTRAS = ("train", "test", "dev")


def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    # The build backend itself, so neither pip nor a network is needed.
    build = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert build.returncode == 0, build.stdout
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_constraints_pin_every_dependency():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            pinned.setdefault(canonicalize_name(requirement.name), []).append(
                requirement
            )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [text for extra in EXTRAS for text in extras[extra]]
    for text in [*project["dependencies"], *optional]:
        wanted = Requirement(text)
        if wanted.name == "nmjax":
            continue
        pins = pinned[canonicalize_name(wanted.name)]
        for python in ("3.11", "3.12"):
            (pin,) = [
                pin
                for pin in pins
                if pin.marker is None or pin.marker.evaluate({"python_version": python})
            ]
            (version,) = [spec.version for spec in pin.specifier]
            assert wanted.specifier.contains(version), f"{wanted} is pinned to {pin}"


def test_no_tracked_file_names_a_machine_or_a_registry():
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so nothing says which files are tracked")
    # Written so that no pattern matches its own text.
    forbidden = re.compile(
        rb"/(?:root|tmp|opt|work|home|farm)/"
        rb"|py[p]i\.org|python[h]osted\.org|npm[j]s\.org|debian[.]org"
        rb"|index[-]url|find[-]links|trusted[-]host"
    )
    offences = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            found = forbidden.findall(path.read_bytes())
            offences += [f"{name}: {match.decode()}" for match in found]
    assert not offences

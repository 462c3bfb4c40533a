"""The built wheel, installed elsewhere, is complete and works without the repository."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import llmkit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: the source distribution first, then the wheel from that."""
    folder = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (found,) = folder.glob("*.whl")
    assert found.name == f"llmkit-{llmkit.__version__}-py3-none-any.whl"
    return found


def sources() -> set[str]:
    """Every source file, as it is called in the wheel."""
    bases = [(ROOT, ROOT / "llmkit"), (ROOT / "plugins", ROOT / "plugins" / "llmkit_plugins")]
    found = {
        path.relative_to(base).as_posix() for base, folder in bases for path in folder.rglob("*") if path.is_file()
    }
    return {name for name in found if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))}


def test_wheel_has_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert {"llmkit/py.typed", "llmkit_plugins/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_has_every_entry_point(wheel: Path, project: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(name).decode()
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read_string(text)
    found = {section: dict(parser[section]) for section in parser.sections()}
    assert found == {"console_scripts": {"llmkit": "llmkit.main:main"}, **project["entry-points"]}


def test_installed_wheel_lists_its_own_plugins(wheel: Path, tmp_path: Path, project: dict[str, Any]) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    line = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr

    script = target / "bin" / "llmkit" if os.name != "nt" else target / "bin" / "llmkit.exe"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    answer = subprocess.run(
        [script, "plugins", "--json"], capture_output=True, text=True, check=False, cwd=elsewhere, env=environment
    )
    assert answer.returncode == 0, answer.stderr
    found = [item for item in json.loads(answer.stdout) if item["distribution"] == "llmkit"]
    listed = {(item["family"], item["name"]) for item in found}
    groups = project["entry-points"].items()
    assert listed == {(group.removeprefix("llmkit."), name) for group, points in groups for name in points}
    for item in found:
        assert item["error"] is None
        assert item["description"]
        assert Path(item["file"]).is_relative_to(target.resolve()), item


def test_entry_points_are_installed_as_they_are_written(project: dict[str, Any]) -> None:
    from llmkit.registry import DEFAULTS, entries

    written = {group.removeprefix("llmkit."): points for group, points in project["entry-points"].items()}
    assert written.keys() == DEFAULTS.keys()
    installed = {
        family: {name: entry.target for name, entry in entries(family).items() if entry.distribution == "llmkit"}
        for family in DEFAULTS
    }
    assert installed == written, "pyproject.toml has changed since it was installed: make install"


def test_constraints_pin_every_requirement(project: dict[str, Any]) -> None:
    requirement = pytest.importorskip("packaging.requirements").Requirement
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    optional = [text for extra in project["optional-dependencies"].values() for text in extra]
    for text in [*project["dependencies"], *optional]:
        wanted = requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_tells_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    line = ["make", "-C", str(ROOT), "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert answer.stderr.startswith(f"llmkit needs Python 3.11 or newer; '{old}' is not.")
    assert not (tmp_path / "venv").exists()

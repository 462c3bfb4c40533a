"""What ``llmkit plugins`` reads from the source of plugins, against what importing them shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import registry
from llmkit.commands.plugins import listing, reading
from llmkit.registry import Entry

ENTRIES = [entry for family in registry.DEFAULTS for entry in registry.entries(family).values()]
SOUND = '''
"""A plugin."""

import math as m
from typing import TypeVar

from llmkit.contracts import {contract}

T = TypeVar("T")
LIMIT: int = 3


class Plugin({contract}):
    """A sound one.

    With details.
    """

    def forward(self, x):
        return x
'''
NORM = SOUND.format(contract="Norm")
BY_MODULE = NORM.replace("from llmkit.contracts import Norm", "import llmkit.contracts").replace(
    "(Norm)", "(llmkit.contracts.Norm)"
)
ABSTRACT = NORM.replace(
    "LIMIT: int = 3", "from abc import abstractmethod\nclass A:\n  @abstractmethod\n  def a(self): ..."
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of modules to be written, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    reading.forget()
    folder = tmp_path / f"package_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


def read(package: Path, **modules: str) -> reading.Found | None:
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    return reading.read(Entry("norm", "some", f"{package.name}.main:Plugin", "some"))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.family}-{entry.name}")
def test_reading_shows_what_importing_shows(entry: Entry) -> None:
    found, imported = reading.read(entry), listing._imported(entry)
    assert found is not None
    assert (found.doc, found.line) == (imported.doc, imported.line)
    assert found.file is not None and imported.file is not None and found.file.samefile(imported.file)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom llmkit.main import main\nassert main(['plugins']) == 0\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'lightning'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize(
    "modules",
    [
        {"main": NORM},
        {"main": BY_MODULE},
        {"main": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nothing\n" + NORM},
        {"main": NORM.replace("from llmkit.contracts", "from llmkit")},
        {"main": "from .other import Plugin\n", "other": NORM},
        {"main": "from . import other\nclass Plugin(other.Plugin):\n    '''A sound one.'''\n", "other": NORM},
        {"main": "from .other import Plugin as Above\nclass Plugin(Above):\n    '''A sound one.'''\n", "other": NORM},
    ],
)
def test_sound(package: Path, modules: dict[str, str]) -> None:
    found = read(package, **modules)
    assert found is not None and found.doc.strip().startswith("A sound one.")


@pytest.mark.parametrize(
    "modules",
    [
        {},  # no module
        {"main": "class Plugin(:\n"},
        {"main": NORM.replace("class Plugin", "class Other")},
        {"main": NORM + "\nprint('hello')\n"},
        {"main": NORM + "\nif LIMIT:\n    1 / 0\n"},
        {"main": "import no_such_package_at_all\n" + NORM},
        {"main": "from .missing import nothing\n" + NORM},
        {"main": "from .other import Plugin\n", "other": NORM + "\nraise ValueError\n"},
        {"main": "from . import other\n" + NORM, "other": "1 / 0"},
        {"main": NORM, "__init__": "1 / 0"},
        {"main": NORM.replace("class Plugin", "@dear\nclass Plugin")},
        {"main": NORM.replace("(Norm)", "")},
        {"main": NORM.replace("(Norm)", "(make())")},
        {"main": "from json import JSONDecoder as Plugin\n"},
        {"main": SOUND.format(contract="Position")},
        {"main": ABSTRACT.replace("(Norm)", "(A, Norm)")},
    ],
)
def test_left_to_importing(package: Path, modules: dict[str, str]) -> None:
    assert read(package, **modules) is None


def test_names_are_looked_up_as_python_does(package: Path) -> None:
    both = '''
from abc import abstractmethod
from llmkit.contracts import Norm
class Root(Norm):
    @abstractmethod
    def one(self): ...
    @abstractmethod
    def two(self): ...
    def forward(self, x): ...
class Left(Root):
    def one(self): ...
class Right(Root):
    two = None
class Plugin(Left, Right):
    """Both."""
'''
    assert read(package, main=both) is not None
    reading.forget()
    assert read(package, main=both.replace("two = None", "two: int")) is None

"""What ``llmkit plugins`` reads from the source of plugins, against what importing them shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import registry
from llmkit.commands.plugins import listing
from llmkit.errors import UserError
from llmkit.registry import Entry

ENTRIES = [entry for family in registry.DEFAULTS for entry in registry.entries(family).values()]
NORM = '''
"""A plugin."""

from llmkit.contracts import Norm


class Plugin(Norm):
    """A sound one.

    With details.
    """

    def forward(self, x):
        return x
'''
HEAVY = "raise SystemExit('this module was imported')\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of modules to be written, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / f"package_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


def entry(package: Path, **modules: str) -> Entry:
    for name, code in modules.items():
        file = package / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    return Entry("norm", "some", f"{package.name}.main:Plugin", "some")


def read(package: Path, **modules: str) -> listing.Definition | None:
    return from_source(entry(package, **modules))


def from_source(entry: Entry) -> listing.Definition | None:
    module, name = entry.target.split(":")
    return listing.from_source(module, name)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.family}-{entry.name}")
def test_the_source_shows_what_importing_shows(entry: Entry) -> None:
    found, imported = from_source(entry), listing.from_import(entry)
    assert found is not None
    assert (found.doc.partition("\n")[0], found.line) == (imported.doc.partition("\n")[0], imported.line)
    assert found.file is not None and imported.file is not None and found.file.samefile(imported.file)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom llmkit.main import main\nassert main(['plugins']) == 0\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'lightning'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("modules", "file"),
    [
        ({"main": NORM + HEAVY}, "main.py"),
        ({"main": NORM, "__init__": HEAVY}, "main.py"),  # nor is the package
        ({"main": "import no_such_package_at_all\n" + NORM}, "main.py"),  # said when it is used
        ({"main": "from .other import Plugin\n", "other": NORM + HEAVY}, "other.py"),
        ({"main": "from .other import More as Plugin\n", "other": NORM.replace("Plugin", "More")}, "other.py"),
        ({"main__in____init__": "from .other import Plugin\n" + HEAVY, "main__in__other": NORM}, "main/other.py"),
    ],
)
def test_read_without_importing(package: Path, modules: dict[str, str], file: str) -> None:
    found = read(package, **modules)
    assert found is not None and found.doc.startswith("A sound one.\n")
    assert found.file == package / file
    assert (
        found.line
        == found.file.read_text()
        .splitlines()
        .index(next(line for line in found.file.read_text().splitlines() if line.startswith("class ")))
        + 1
    )


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        ({}, "No module named"),
        ({"main": "class Plugin(:\n"}, "SyntaxError"),
        ({"main": NORM.replace("class Plugin", "class Other")}, "has no attribute 'Plugin'"),
        ({"main": "from .missing import Plugin\n"}, "No module named"),
        ({"main": "from ...missing import Plugin\n"}, "ImportError"),  # above the top package
        ({"main": "from .other import Plugin\n", "other": "raise ValueError('not today')\n"}, "ValueError: not today"),
        ({"main": "from .other import Plugin\n", "other": "from .main import Plugin\n"}, "ImportError"),  # a circle
        ({"main": "from json.decoder import JSONDecodeError\nPlugin = JSONDecodeError\n"}, "does not derive from"),
        ({"main": "Plugin = 3\n"}, "does not derive from"),
        ({"main": "1 / 0\n"}, "ZeroDivisionError"),
    ],
)
def test_what_the_source_does_not_define_is_imported_which_says_what_is_wrong(
    package: Path, modules: dict[str, str], error: str
) -> None:
    broken = entry(package, **modules)
    assert read(package) is None
    with pytest.raises(UserError, match=error):
        listing.from_import(broken)
    assert error in listing.describe(broken)["error"]


def test_an_assigned_class_is_imported(package: Path) -> None:
    found = listing.describe(entry(package, main=NORM.replace("Plugin", "Base") + "\nPlugin = Base\n"))
    assert (found["error"], found["description"]) == (None, "A sound one.")
    assert Path(found["file"]).name == "main.py"

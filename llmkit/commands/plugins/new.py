"""``llmkit plugins new``: write a small working plugin to start from, with its test and a config that trains it."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from llmkit.commands import Parser
from llmkit.errors import UserError
from llmkit.registry import DEFAULTS, check_family, entries

TEMPLATES = Path(__file__).parent / "templates"
"""One module per family, with a class ``Template`` registered as ``template``."""

TEST = '''\
"""Every property that a {family} plugin guarantees, one test each."""

from llmkit.testing import examination

from {module} import {cls}

test_{name} = examination("{family}", {cls})
'''

CONFIG = """\
# A small model with {name}. It trains within seconds on the source of Python's own standard library.
{imports}data:
  train: ${{STDLIB}}/*.py          # ${{STDLIB}}: the folder of the standard library
{rows}  validation_share: 0.05
  tokenizer: {tokenizer}
  batch_size: 8
model:
{model}  dim: 64
  num_layers: 2
  context: 64
trainer:
  max_steps: 100
  limit_val_batches: 20
"""

ROWS = """\
  # Does a line open a block? For your own rows, use a CSV file with columns text and label, and drop the pattern.
  pattern: '(?P<text>.*?)(?P<label>:?)'
"""

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "llmkit-{name}"
version = "0.1.0"
description = "The {family} plugin {name} for llmkit."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["llmkit"]

# llmkit finds the plugin by this entry point: group llmkit.<family>, name = "module:Class".
[project.entry-points."llmkit.{family}"]
{name} = "{module}:{cls}"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
dev-mode-dirs = ["."]  # makes an editable install a plain path, which type checkers can follow

[tool.ruff]
line-length = 120
"""

README = """\
# llmkit-{name}

The {family} plugin `{name}` for llmkit. In this folder:

```
pip install -e .
llmkit plugins check {family}/{name}
python -m pytest tests
llmkit fit --config {name}.yaml
```

- `{module}/__init__.py`: the class, `{cls}`.
- `pyproject.toml`: the entry point in `llmkit.{family}` by which llmkit finds it.
- `tests/test_{name}.py`: tests every property that a {family} plugin guarantees.
- `{name}.yaml`: a small model to try it with.
"""


def run(command: str, argv: list[str]) -> int:
    """Write a new plugin and print the next commands; returns the exit code."""
    parser = Parser(command, "Write a small working plugin to start from, with a test and a config.")
    parser.add_argument("family", help=f"one of {', '.join(DEFAULTS)}")
    parser.add_argument("name", help="its name: lower-case letters, digits and underscores")
    parser.add_argument("--package", action="store_true", help="write an installable distribution, not a single file")
    parser.add_argument("--folder", default=".", metavar="DIR", help="where to write it; default: the current folder")
    options = parser.parse(argv)
    family, name, folder = options.family, options.name, Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder {folder} is a file, not a folder")
    check_family(family)
    check_name(family, name)
    plugin = New(family, name, f"llmkit_{name}" if options.package else name)
    files, commands = plugin.package(folder / name) if options.package else plugin.local(folder)
    write(files, plugin.module)
    print("Written:", *files, sep="\n  ")
    print("Next:", *commands, sep="\n  ")
    return 0


def check_name(family: str, name: str) -> None:
    """Raise UserError unless a new plugin of the family can have this name."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"'{name}' is not a valid plugin name. Allowed: lower-case letters, digits and underscores, starting with "
            "a letter; not a Python keyword."
        )
    known = entries(family)
    if name in known:
        raise UserError(f"{family} '{name}' already exists: {known[name].target} of {known[name].distribution}")


def write(files: dict[Path, str], module: str) -> None:
    """Write all files or none. Raises UserError if one exists, or if the module would shadow another one."""
    for path in files:
        if path.exists():
            raise UserError(f"{path} already exists: choose another name or --folder")
    found = importlib.util.find_spec(module)
    if found is not None and found.origin is not None:  # a mere folder of that name shadows nothing
        raise UserError(f"a module '{module}' already exists ({found.origin}): choose another name")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True)
class New:
    """A plugin to write: its family, its registered name, and its module."""

    family: str
    name: str
    module: str

    @property
    def cls(self) -> str:
        """The name of its class: ``my_norm`` gives ``MyNorm``."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    def local(self, folder: Path) -> tuple[dict[Path, str], list[str]]:
        """Return the files of a single-module plugin, and the next commands."""
        file, test, config = (
            folder / name for name in (f"{self.name}.py", f"test_{self.name}.py", f"{self.name}.yaml")
        )
        files = {file: self.source(), test: self.fill(TEST), config: self.config(f"imports: {file.name}\n")}
        return files, [
            f"llmkit plugins check {file}:{self.cls}",
            f"python -m pytest {test}",
            f"llmkit fit --config {config}",
        ]

    def package(self, folder: Path) -> tuple[dict[Path, str], list[str]]:
        """Return the files of a distribution, and the next commands."""
        test, config = folder / "tests" / f"test_{self.name}.py", folder / f"{self.name}.yaml"
        files = {
            folder / "pyproject.toml": self.fill(PYPROJECT),
            folder / "README.md": self.fill(README),
            folder / self.module / "__init__.py": self.source(registered=False),
            folder / self.module / "py.typed": "",
            test: self.fill(TEST),
            config: self.config(),
        }
        return files, [
            f"pip install -e {folder}",
            f"llmkit plugins check {self.family}/{self.name}",
            f"python -m pytest {test}",
            f"llmkit fit --config {config}",
        ]

    def source(self, registered: bool = True) -> str:
        """Return the module's source; without ``@register`` if an entry point registers it.

        Raises UserError if the class would have the name of one that it uses.
        """
        text = (TEMPLATES / f"{self.family}.py").read_text(encoding="utf-8")
        if self.cls in {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}:
            raise UserError(f"'{self.name}' would be class {self.cls}, a name that its code uses: choose another name")
        if not registered:
            text = "".join(line for line in text.splitlines(keepends=True) if "register" not in line)
        return re.sub(
            "template", lambda found: self.name if found[0].islower() else self.cls, text, flags=re.IGNORECASE
        )

    def config(self, imports: str = "") -> str:
        """Return a config that trains a small model with the plugin."""
        is_tokenizer = self.family == "tokenizer"
        return self.fill(
            CONFIG,
            imports=imports,
            rows=ROWS if self.family == "head" else "",
            tokenizer=self.name if is_tokenizer else "byte",
            model="" if is_tokenizer else f"  {self.family}: {self.name}\n",
        )

    def fill(self, text: str, **values: str) -> str:
        """Fill in the plugin's names."""
        return text.format(family=self.family, name=self.name, module=self.module, cls=self.cls, **values)

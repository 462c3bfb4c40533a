"""``llmkit plugins new``: write a small working plugin to start from, with its test and a config that trains it."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
from pathlib import Path

from llmkit.commands import Parser
from llmkit.errors import UserError
from llmkit.registry import DEFAULTS, check_family, entries

TEMPLATES = Path(__file__).parent / "templates"
"""One module per family, with a class ``Template`` registered as ``template``; and as text the files around it."""

FILES = """\
  train: ${STDLIB}/*.py          # ${STDLIB}: the folder of the standard library
"""
ROWS = """\
  # Does a line open a block? For your own rows, use a CSV file with columns text and label, and drop the pattern.
  pattern: '(?P<text>.*?)(?P<label>:?)'
"""
SHARE = "  validation_share: 0.05\n"
OWN_ROWS = """\
  train: {name: NAME}
  validation: {}                 # what is other than in train: nothing
"""
MODEL = {"tokenizer": "", "compression": "", "dataset": "  head: probe\n"}
"""What the config says about the model, of families that are no part of one."""


def run(command: str, argv: list[str]) -> int:
    """Write a new plugin and print the next commands; returns the exit code."""
    parser = Parser(command, "Write a small working plugin to start from, with a test and a config.")
    parser.add_argument("family", help=f"one of {', '.join(DEFAULTS)}")
    parser.add_argument("name", help="lower-case letters, digits and underscores")
    parser.add_argument("--package", action="store_true", help="write an installable package, not a single file")
    parser.add_argument("--folder", default=".", metavar="DIR", help="where to write it; default: the current folder")
    options = parser.parse(argv)
    family, name, folder = options.family, options.name, Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder {folder} is a file, not a folder")
    check_family(family)
    check_name(family, name)
    module = f"llmkit_{name}" if options.package else name
    cls = "".join(part.capitalize() for part in name.split("_"))  # my_norm: MyNorm
    code = source(family, name, cls, registered=not options.package)
    values = {
        **{"family": family, "name": name, "module": module, "cls": cls},
        "imports": "" if options.package else f"imports: {name}.py\n",
        "data": {"head": FILES + ROWS + SHARE, "dataset": OWN_ROWS.replace("NAME", name)}.get(family, FILES + SHARE),
        "tokenizer": {"tokenizer": name, "dataset": "word"}.get(family, "byte"),
        "model": MODEL.get(family, f"  {family}: {name}\n"),
    }

    def fill(template: str) -> str:
        return (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8").format(**values)

    if options.package:
        folder = folder / name
        test, config = folder / "tests" / f"test_{name}.py", folder / f"{name}.yaml"
        files = {
            folder / "pyproject.toml": fill("pyproject"),
            folder / "README.md": fill("readme"),
            folder / module / "__init__.py": code,
            folder / module / "py.typed": "",
        }
        commands = [f"pip install -e {folder}", f"llmkit plugins check {family}/{name}"]
    else:
        file, test, config = folder / f"{name}.py", folder / f"test_{name}.py", folder / f"{name}.yaml"
        files = {file: code}
        commands = [f"llmkit plugins check {file}:{cls}"]
    files |= {test: fill("test"), config: fill("config")}
    write(files, module)
    print("Written:", *files, sep="\n  ")
    commands += [f"python -m pytest {test}", f"llmkit fit --config {config}"]
    if family == "compression":
        found = "" if options.package else f" --imports {file}"
        commands.append(f"llmkit compress runs/{name} --to {name} --output {name}_small{found}")
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


def source(family: str, name: str, cls: str, registered: bool) -> str:
    """Return the module of a plugin; without ``@register`` if an entry point registers it.

    Raises UserError if the class would have the name of one that it uses.
    """
    text = (TEMPLATES / f"{family}.py").read_text(encoding="utf-8")
    if cls in {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}:
        raise UserError(f"'{name}' would be class {cls}, a name that its code uses: choose another name")
    lines = (line for line in text.splitlines(keepends=True) if registered or "register" not in line)
    return "".join(lines).replace("template", name).replace("Template", cls)


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

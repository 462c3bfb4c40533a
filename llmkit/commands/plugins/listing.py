"""``llmkit plugins``: every registered plugin, where it is defined, and which distribution provides it."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.commands import Parser, columns, imported
from llmkit.errors import UserError
from llmkit.registry import DEFAULTS, Entry, check_family, entries


class Definition(NamedTuple):
    """A class's docstring and where it is defined; file and line are None for a class without source code."""

    doc: str
    file: Path | None = None
    line: int | None = None


def run(command: str, argv: list[str]) -> int:
    """List the plugins of one family or of all. A plugin that cannot be imported is listed with its error."""
    parser = Parser(
        command,
        "List every plugin, where it is defined and which distribution provides it. See also 'llmkit plugins show' "
        "(describe one), 'check' (test one) and 'new' (write one to start from).",
    )
    parser.add_argument("family", nargs="?", help=f"list only this family: {', '.join(DEFAULTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_imports()
    options = parser.parse(argv)
    if options.family is not None:
        check_family(options.family)
    with imported(options.imports):
        families = DEFAULTS if options.family is None else [options.family]
        found = [describe(entry) for family in families for entry in entries(family).values()]
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else table(found))
    return 0


def describe(entry: Entry) -> dict[str, Any]:
    """Return the facts about a plugin as JSON-able data; ``error`` is None unless its class cannot be found."""
    answer: dict[str, Any] = {
        "family": entry.family,
        "name": entry.name,
        "description": "",
        "file": None,
        "line": None,
        "distribution": entry.distribution,
        "default": DEFAULTS[entry.family] == entry.name,
        "error": None,
    }
    try:
        module, _, name = entry.target.partition(":")
        found = (None if module in sys.modules else from_source(module, name)) or from_import(entry)
    except UserError as error:
        answer["error"] = " ".join(str(error).split())
        return answer
    answer["description"] = found.doc.strip().partition("\n")[0]
    if found.file is not None:
        path, here = found.file.resolve(), Path.cwd().resolve()
        answer["file"] = str(path.relative_to(here) if path.is_relative_to(here) else path)
        answer["line"] = found.line
    return answer


def from_source(module: str, name: str, reexported: bool = False) -> Definition | None:
    """Return a class's definition as its file has it: importing torch to print a list would take seconds.

    A name that a package imports from one of its modules is followed there. None if there is no such file, or it does
    not define the class: ``from_import`` then finds it, or says why not. Any other error shows when the plugin is used.
    """
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
        for part in rest:  # find_spec("a.b") would import a, and a may import torch
            spec = PathFinder.find_spec(part, (spec and spec.submodule_search_locations) or [])
        if spec is None or spec.origin is None:
            return None
        package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
        for node in ast.parse(Path(spec.origin).read_bytes()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return Definition(ast.get_docstring(node) or "", Path(spec.origin), node.lineno)
            if isinstance(node, ast.ImportFrom) and not reexported:
                source = resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return from_source(source, alias.name, reexported=True)
    except (ImportError, OSError, SyntaxError, ValueError):
        return None
    return None


def from_import(entry: Entry) -> Definition:
    """Return an imported class's definition. Raises UserError if it cannot be imported or breaks its contract."""
    cls = entry.load()
    found = Definition(cls.__doc__ or "")
    with contextlib.suppress(OSError, TypeError):  # no source: compiled, or defined interactively
        file = Path(inspect.getsourcefile(cls) or inspect.getfile(cls))
        found = Definition(found.doc, file, inspect.getsourcelines(cls)[1])
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the plugins as aligned columns, one per line; the default of each family has a star."""
    rows = [("FAMILY", "NAME", "WHERE", "DISTRIBUTION", "DESCRIPTION")]
    for item in found:
        where = f"{item['file']}:{item['line']}" if item["line"] else item["file"] or "?"
        text = f"ERROR: {item['error']}" if item["error"] else item["description"]
        rows.append((item["family"], item["name"] + " *" * item["default"], where, item["distribution"], text))
    return "\n".join([*columns(rows), "", "* the default of its family"])

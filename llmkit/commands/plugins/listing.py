"""``llmkit plugins``: what is registered, what it is, where it is defined, and which distribution brought it."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from llmkit.commands import Parser
from llmkit.commands.plugins.reading import Found, forget, read
from llmkit.errors import UserError
from llmkit.registry import DEFAULTS, Entry, check_family, entries


def run(command: str, argv: list[str]) -> int:
    """List the plugins of one family or of all. A plugin that cannot be imported is listed with its error."""
    parser = Parser(
        command,
        "List every plugin, where it is defined and which distribution brought it. "
        "'llmkit plugins show' tells more of one, 'check' examines one, 'new' writes one to start from.",
    )
    parser.add_argument("family", nargs="?", help=f"list one family only: {', '.join(DEFAULTS)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects instead of a table")
    parser.add_argument(
        "--imports",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE_OR_MODULE",
        help="import these first; they may register plugins",
    )
    options = parser.parse(argv)
    if options.family is not None:
        check_family(options.family)
    forget()
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints while it is imported is not our answer
        if options.imports:
            from llmkit.imports import import_modules

            import_modules(options.imports, Path.cwd())
        families = DEFAULTS if options.family is None else [options.family]
        found = [describe(entry) for family in families for entry in entries(family).values()]
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(table(found))
    return 0


def describe(entry: Entry) -> dict[str, Any]:
    """Return what is known of a plugin, as JSON-able data; ``error`` is None when it can be imported.

    It is imported only where its source leaves a doubt of that.
    """
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
        found = _imported(entry) if entry.target.partition(":")[0] in sys.modules else read(entry) or _imported(entry)
    except UserError as error:
        answer["error"] = " ".join(str(error).split())
        return answer
    answer["description"] = found.doc.strip().partition("\n")[0]
    if found.file is not None:
        path, here = found.file.resolve(), Path.cwd().resolve()
        answer["file"] = str(path.relative_to(here) if path.is_relative_to(here) else path)
        answer["line"] = found.line
    return answer


def _imported(entry: Entry) -> Found:
    """Return what importing shows. Raises UserError when that fails or the class breaks its contract."""
    cls = entry.load()
    doc, file, line = cls.__doc__ or "", None, None
    with contextlib.suppress(OSError, TypeError):  # a class without a source file (compiled, typed in)
        file = Path(inspect.getsourcefile(cls) or inspect.getfile(cls))
        line = inspect.getsourcelines(cls)[1]
    return Found(doc, file, line)


def table(found: list[dict[str, Any]]) -> str:
    """Return the plugins as aligned columns, one line each; the default of a family has a star."""
    rows = [("FAMILY", "NAME", "WHERE", "DISTRIBUTION", "DESCRIPTION")]
    for item in found:
        where = f"{item['file']}:{item['line']}" if item["line"] else item["file"] or "?"
        text = f"ERROR: {item['error']}" if item["error"] else item["description"]
        rows.append((item["family"], item["name"] + " *" * item["default"], where, item["distribution"], text))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "* the default of its family"])

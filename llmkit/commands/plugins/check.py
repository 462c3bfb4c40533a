"""``llmkit plugins check``: test a plugin against its family's contract."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from llmkit import registry, testing
from llmkit.commands import Parser, imported
from llmkit.commands.plugins.target import NoContract, add_target, find, init_args, locate
from llmkit.errors import UserError, note
from llmkit.testing import Report
from llmkit.testing.facts import differences
from llmkit.testing.usage import CONTEXT


def run(command: str, argv: list[str]) -> int:
    """Print the report on a plugin; returns 1 if a property fails."""
    arguments, argv = init_args(argv)
    parser = Parser(command, "Check every property that the plugin's family guarantees, and explain each failure.")
    add_target(parser)
    add = parser.add_argument
    add("--dim", type=int, metavar="N", help="width of the plugin; default: the first common width that it accepts")
    add("--seed", type=int, default=0, metavar="N", help="seed of weights and inputs; default: 0")
    add("--only", nargs="+", metavar="PROPERTY", help="check only these properties")
    text = "a slow equivalent of an attention variant: (module, x_BTD, seq, memory) -> (B, T, D)"
    add("--reference", metavar="FILE:FUNCTION", help=text)
    add("--rows", metavar="FILE", help="rows for a head with fields of its own: a JSON file, {field: [value, ...]}")
    add("--no_compile", action="store_true", help="skip torch.compile, which takes most of the time")
    parser.add_imports()
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse(argv)
    with imported(options.imports):
        report = _report(options, arguments)
    if options.json:
        results = [dataclasses.asdict(result) for result in report.results]
        print(json.dumps({"title": report.title, "results": results}, indent=2, ensure_ascii=False))
    else:
        print(report)
    return 1 if report.failed else 0


def _report(options: argparse.Namespace, arguments: dict[str, Any]) -> Report:
    only = options.only
    factory: registry.Factory
    plugin: functools.partial[Any] | None = None
    try:
        entry = locate(options.target)
        family = entry.family
        factory = plugin = registry.factory_of({"class_path": entry.class_path, "init_args": arguments}, family)
    except NoContract:
        from torch import nn

        from llmkit.testing.attention import plain

        cls = find("class", options.target)
        if not issubclass(cls, nn.Module):
            raise
        family, factory, only = "attention", plain.adapt(cls, arguments), only or list(plain.PROPERTIES)
        note(
            f"{cls.__name__} derives from no contract of llmkit. It is checked as an attention variant by forward(x) "
            "alone: without padding, packed documents and decoding. To make it a plugin, see docs/plugins.md."
        )
    given: dict[str, Any] = {"seed": options.seed}
    if options.dim is not None:
        given["dim"] = options.dim
    if options.no_compile and family == "attention":
        given["compile_backend"] = None
    if options.reference:
        given["reference"] = find("function", options.reference)
    if options.rows:
        given["rows"] = _rows(options.rows)
    report = testing.check(family, factory, only=only, **given)
    apart = differences(family, plugin, options.dim or 256, CONTEXT) if plugin else []
    if apart:
        note(f"differs from the default {family}, {registry.default(family)}: {'; '.join(apart)}")
    return report


def _rows(file: str) -> Any:
    """Return the rows of a JSON file, column by column."""
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--rows {file}: {error}") from error
    if not isinstance(rows, dict) or not all(isinstance(column, list) and column for column in rows.values()):
        raise UserError(f"--rows {file}: expected {{field: [value, ...]}}")
    return rows

"""``llmkit plugins check``: test a plugin against its family's contract."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from llmkit import registry, testing
from llmkit.commands import Parser, import_local, imported
from llmkit.commands.plugins.target import NoContract, init_args, locate
from llmkit.errors import UserError, note
from llmkit.testing import Report


def run(command: str, argv: list[str]) -> int:
    """Print the report on a plugin; returns 1 if a property fails."""
    arguments, argv = init_args(argv)
    parser = Parser(command, "Check every property that the plugin's family guarantees, and explain each failure.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="family/name, file.py:Class or package.module:Class")
    add("--init.ARGUMENT", metavar="VALUE", help="an argument of the plugin, such as --init.num_heads 4")
    add("--dim", type=int, help="width of the plugin; default: the first common width that it accepts")
    add("--seed", type=int, default=0, help="seed of weights and inputs")
    add("--only", nargs="+", metavar="PROPERTY", help="check only these properties")
    add("--reference", metavar="FILE:FUNCTION", help="a slow equivalent, (module, x_BTD, seq, memory) -> (B, T, D)")
    add("--rows", metavar="FILE", help="for a head with its own fields: a JSON file, {field: [value, ...]}")
    add("--no_compile", action="store_true", help="skip torch.compile, which takes most of the time")
    parser.add_imports()
    add("--json", action="store_true", help="print a JSON object instead of a table")
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
    given: dict[str, Any] = {"seed": options.seed}
    try:
        entry = locate(options.target)
        family = entry.family
        factory = registry.factory_of({"class_path": entry.class_path, "init_args": arguments}, family)
    except NoContract as error:
        family = "attention"
        factory, properties = _adapted(error, arguments)
        only = only or properties
    if options.dim is not None:
        given["dim"] = options.dim
    if options.no_compile and family == "attention":
        given["compile_backend"] = None
    if options.reference:
        given["reference"] = _function(options.reference)
    if options.rows:
        given["rows"] = _rows(options.rows)
    return testing.check(family, factory, only=only, **given)


def _rows(file: str) -> Any:
    """Return the rows of a JSON file, column by column."""
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--rows {file}: {error}") from error
    if not isinstance(rows, dict) or not all(isinstance(column, list) and column for column in rows.values()):
        raise UserError(f"--rows {file}: expected {{field: [value, ...]}}")
    return rows


def _adapted(error: NoContract, arguments: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return a plain torch module as an attention variant, and the properties that it can be checked for.

    Raises the error for any other class.
    """
    from torch import nn

    from llmkit.testing.attention import plain

    if not issubclass(error.cls, nn.Module):
        raise error
    factory = plain.adapt(error.cls, arguments)
    note(
        f"{error.cls.__name__} derives from no contract of llmkit. It is checked as an attention variant by forward(x) "
        "alone: without padding, packed documents and decoding. To make it a plugin, see docs/plugins.md."
    )
    return factory, list(plain.PROPERTIES)


def _function(text: str) -> Any:
    """Return the function that ``file.py:function`` or ``module:function`` names."""
    where, _, name = text.rpartition(":")
    if not where:
        raise UserError(f"--reference {text}: expected file.py:function")
    import_local([where])
    module = importlib.import_module(Path(where).stem if where.endswith(".py") else where)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reference {text}: {where} has no function '{name}'")
    return function

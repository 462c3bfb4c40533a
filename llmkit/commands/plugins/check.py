"""``llmkit plugins check``: examine a plugin for everything it owes its users."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.commands import Parser
from llmkit.commands.plugins.target import NoContract, init_args, locate
from llmkit.errors import UserError, note


def run(command: str, argv: list[str]) -> int:
    """Print the report on a plugin; returns 1 when a property does not hold."""
    arguments, words = init_args(argv)
    parser = Parser(command, "Examine a plugin: every property it owes its users, and what a failure means.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="family/name, file.py:Class or package.module:Class")
    add("--init.ARGUMENT", metavar="VALUE", help="an argument of the plugin, such as --init.num_heads 4")
    add("--dim", type=int, help="the width it is built with; default: the first usual one that fits")
    add("--seed", type=int, default=0, help="seed of weights and inputs")
    add("--only", nargs="+", metavar="PROPERTY", help="examine these properties only")
    add("--reference", metavar="FILE:FUNCTION", help="a slow form of it, (module, x_BTD, seq, memory) -> (B, T, D)")
    add("--rows", metavar="FILE", help="for a head with fields of its own: a JSON file, {field: [value, ...]}")
    add("--no_compile", action="store_true", help="leave torch.compile out, which takes the most time")
    add("--imports", nargs="+", action="extend", default=[], metavar="FILE_OR_MODULE", help="import these first")
    add("--json", action="store_true", help="print a JSON object instead of a table")
    options = parser.parse(words)
    if options.imports:
        from llmkit.imports import import_modules

        import_modules(options.imports)
    try:
        entry = locate(options.target)
        family, factory = entry.family, registry.factory_of(_spec(entry.class_path, arguments), entry.family)
    except NoContract as error:
        family, factory = "attention", _plain(error, arguments, options)
    from llmkit import testing

    given: dict[str, Any] = {"seed": options.seed}
    if options.dim is not None:
        given["dim"] = options.dim
    if options.no_compile and family == "attention":
        given["compile_backend"] = None
    if options.reference:
        given["reference"] = _function(options.reference)
    if options.rows:
        given["rows"] = _rows(options.rows)
    report = testing.check(family, factory, only=options.only, **given)
    if options.json:
        found = {"title": report.title, "results": [dataclasses.asdict(result) for result in report.results]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(report)
    return 1 if report.failed else 0


def _rows(file: str) -> Any:
    """Return the rows of a JSON file, column by column."""
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--rows {file}: {error}") from error
    if not isinstance(rows, dict) or not all(isinstance(column, list) and column for column in rows.values()):
        raise UserError(f"--rows {file}: expected {{field: [value, ...]}}")
    return rows


def _spec(class_path: str, arguments: dict[str, Any]) -> registry.Spec:
    return {"class_path": class_path, "init_args": arguments}


def _plain(error: NoContract, arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    """Return a torch module that is no plugin as an attention variant; anything else stays an error."""
    from torch import nn

    from llmkit.testing.attention import plain

    if not issubclass(error.cls, nn.Module):
        raise error
    factory = plain.adapt(error.cls, arguments)
    note(
        f"{error.cls.__name__} derives from no contract of llmkit. It is examined as what mixes positions, forward(x) "
        "alone: without padding, packed documents and decoding. docs/plugins.md says how it becomes a plugin."
    )
    options.only = options.only or list(plain.PROPERTIES)
    return factory


def _function(text: str) -> Any:
    from llmkit.imports import import_modules

    where, _, name = text.rpartition(":")
    if not where:
        raise UserError(f"--reference {text}: write file.py:function")
    import_modules([where])
    module = importlib.import_module(Path(where).stem if where.endswith(".py") else where)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reference {text}: {where} has no function '{name}'")
    return function

"""The plugin that a command names: ``name``, ``family/name``, ``file.py:Class`` or ``package.module:Class``."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.check import settled
from llmkit.commands import Parser
from llmkit.config.argv import raw
from llmkit.errors import UserError, nearest, unknown
from llmkit.imports import import_modules
from llmkit.registry import Entry


class NoContract(UserError):  # noqa: N818
    """The named class derives from no contract."""


def add_target(parser: Parser) -> None:
    """Add the plugin and its arguments: ``locate`` finds the one, ``init_args`` reads the others."""
    parser.add_argument("target", metavar="TARGET", help="name, family/name, file.py:Class or package.module:Class")
    text = "an argument of the plugin, such as --init.num_heads 4; may be repeated"
    parser.add_argument("--init.ARGUMENT", metavar="VALUE", help=text)


def locate(text: str) -> Entry:
    """Return the plugin that ``text`` names, with its family.

    Raises:
        UserError: there is no such name, file, module or class, or the class is abstract.
        NoContract: the class is not a plugin.
    """
    if ":" not in text:
        family, slash, name = text.partition("/")
        if slash:
            return registry.find(family, name)
        names = {f"{family}/{name}": name for family in registry.DEFAULTS for name in registry.entries(family)}
        found = [key for key, name in names.items() if name == text]
        if len(found) == 1:
            return registry.find(*found[0].split("/"))
        raise UserError(
            f"'{text}' {'names ' + ' and '.join(found) if found else 'does not name a plugin'}. Expected family/name "
            f"(attention/multi_head), file.py:Class or module:Class.{'' if found else nearest(text, names.values())}"
        )
    cls = find("class", text)
    if not isinstance(cls, type):
        raise UserError(f"{text} is not a class")
    for family in registry.DEFAULTS:
        if issubclass(cls, registry.contract(family)):
            registry.check_contract(family, cls.__name__, cls)
            return Entry(family, cls.__name__, f"{cls.__module__}:{cls.__qualname__}", "(local)")
    contracts = ", ".join(registry.CONTRACTS[family].partition(":")[2] for family in registry.DEFAULTS)
    raise NoContract(f"{text} derives from no contract of llmkit.contracts; a plugin is one of: {contracts}")


def find(kind: str, text: str) -> Any:
    """Return the class or function (``kind``) that ``file.py:name`` or ``package.module:name`` names.

    Raises UserError if there is none.
    """
    where, _, name = text.rpartition(":")
    if not where:
        raise UserError(f"{text}: expected file.py:{kind} or module:{kind}")
    try:
        import_modules(where)
    except UserError as error:
        raise UserError(f"{text}: {error.problems[0].text}") from error
    module = sys.modules[Path(where).stem if where.endswith(".py") else where]
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{where}: {unknown(kind, name, own)}") from error


def init_args(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of ``--init.KEY VALUE`` and ``--init.KEY=VALUE``, read as YAML, and the remaining arguments."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--init."):
            rest.append(word)
            continue
        option, equals, value = word.partition("=")
        given = value if equals else next(words, None)
        if given is None:
            raise UserError(f"{option} needs a value")
        found[option.removeprefix("--init.")] = settled(raw(given))
    return found, rest

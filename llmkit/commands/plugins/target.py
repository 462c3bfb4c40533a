"""Finding the plugin that a command names: ``family/name``, ``file.py:Class`` or ``package.module:Class``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from llmkit import registry
from llmkit.errors import UserError, unknown
from llmkit.registry import Entry


class NoContract(UserError):  # noqa: N818
    """A class that derives from no contract.

    Attributes:
        cls: the class.
    """

    def __init__(self, message: str, cls: type) -> None:
        super().__init__(message)
        self.cls = cls


def locate(text: str) -> Entry:
    """Return the plugin that ``text`` names, with its family.

    Raises:
        UserError: no such name, file, module or class.
        NoContract: a class that is no plugin.
    """
    if ":" not in text:
        family, slash, name = text.partition("/")
        if not slash:
            raise UserError(
                f"'{text}' names no plugin. Write family/name (attention/multi_head), file.py:Class or module:Class."
            )
        return registry.find(family, name)
    where, _, name = text.rpartition(":")
    if where.endswith(".py"):
        from llmkit.imports import import_modules

        import_modules([where], Path.cwd())
        where = Path(where).stem
    entry = Entry("class", name, f"{where}:{name}", "(local)")
    found = _class(entry)
    families = [family for family in registry.DEFAULTS if issubclass(found, registry.contract(family))]
    if not families:
        contracts = ", ".join(registry.CONTRACTS[family].partition(":")[2] for family in registry.DEFAULTS)
        raise NoContract(f"{text} derives from no contract of llmkit.contracts; a plugin is one of: {contracts}", found)
    entry = Entry(families[0], name, entry.target, entry.distribution)
    entry.load()  # an abstract one is told here
    return entry


def _class(entry: Entry) -> type:
    module, _, name = entry.target.partition(":")
    try:
        found = entry.find()
    except UserError as error:
        if isinstance(error.__cause__, AttributeError):
            classes = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
            own = [key for key in classes if vars(sys.modules[module])[key].__module__ == module]
            raise UserError(f"in {module}: {unknown('class', name, own)}") from error
        raise
    if not isinstance(found, type):
        raise UserError(f"{entry.target} is no class")
    return found


def init_args(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split ``--init.KEY VALUE`` (or ``--init.KEY=VALUE``) from other words; values are read as YAML."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    iterator = iter(words)
    for word in iterator:
        if not word.startswith("--init."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--init.").partition("=")
        given = value if equals else next(iterator, None)
        if given is None:
            raise UserError(f"--init.{key} needs a value")
        try:
            found[key] = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UserError(f"--init.{key}: '{given}' is no YAML value") from error
    return found, rest

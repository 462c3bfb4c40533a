"""Checks of plugins: the properties that users of each family rely on, as a report or as tests.

In a plugin's own repository::

    from llmkit.testing import examination
    from my_package import MyAttention

    test_my_attention = examination("attention", MyAttention)

gives one test for each property. ``llmkit plugins check`` prints the same results as a table.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from llmkit import registry
from llmkit.errors import UserError, unknown
from llmkit.testing.report import NotApplicable, Property, Report, Result, Violation

__all__ = ["NotApplicable", "Property", "Report", "Result", "Violation", "check", "examination", "properties"]

_MODULES = {
    "attention": ("attention", "PROPERTIES"),
    "tokenizer": ("tokenizer", "PROPERTIES"),
    "head": ("head", "PROPERTIES"),
    "position": ("parts", "POSITION"),
    "feedforward": ("parts", "FEEDFORWARD"),
    "norm": ("parts", "NORM"),
    "dataset": ("dataset", "PROPERTIES"),
    "compression": ("compression", "PROPERTIES"),
}


def properties(family: str) -> list[Property[Any]]:
    """Return the properties that plugins of a family are checked for. Raises UserError for an unknown family."""
    registry.check_family(family)
    module, name = _MODULES[family]
    found: list[Property[Any]] = getattr(importlib.import_module(f"llmkit.testing.{module}"), name).all
    return found


def check(family: str, plugin: Any, *, only: list[str] | None = None, **options: Any) -> Report:
    """Check a plugin and return the report.

    Args:
        family: attention, tokenizer, head, position, feedforward, norm, dataset or compression.
        plugin: its registered name, its class, or ``llmkit.plugin(family, name, argument=...)``.
        only: names of the properties to check; None: all.
        options: ``seed``; all but tokenizers and data sets: ``dim``; attention: ``reference``, a slow form
            ``(module, x_BTD, seq, memory) -> (B, T, D)`` that it has to equal, and ``compile_backend`` of
            torch.compile (None skips that property); head: ``rows``, a few rows by field, and ``reference``.

    Raises:
        UserError: the plugin is not found, breaks its contract, or lacks an argument; a property or option is unknown.
    """
    subject, title = _subject(family, plugin, options)
    known = {found.name for found in properties(family)}
    for name in only or ():
        if name not in known:
            raise UserError(unknown(f"property of {family}", name, known))
    collected = getattr(importlib.import_module(f"llmkit.testing.{_MODULES[family][0]}"), _MODULES[family][1])
    report: Report = collected.examine(title, subject, only)
    return report


def examination(family: str, plugin: Any, **options: Any) -> Callable[..., None]:
    """Return a pytest function with one case for each property; see ``check`` for the arguments.

    Properties that do not apply to the plugin pass, so that a suite has no skipped tests.
    """
    import pytest

    @pytest.mark.parametrize("property", [found.name for found in properties(family)])
    def test(property: str) -> None:
        report = check(family, plugin, only=[property], **options)
        if report.failed:
            pytest.fail(report.failed[0].summary(), pytrace=False)

    return test


def _subject(family: str, plugin: Any, options: dict[str, Any]) -> tuple[Any, str]:
    registry.check_family(family)
    factory = registry.resolve(family, plugin)
    cls = registry.target_of(factory)
    if isinstance(cls, type):
        registry.check_contract(family, cls.__name__, cls)
    if not isinstance(factory, functools.partial):
        factory = functools.partial(factory)
    missing = registry.missing_arguments(factory)
    if missing:
        raise UserError(f"{cls.__name__} needs the argument{'s' * (len(missing) > 1)} {', '.join(missing)}")
    arguments = ", ".join(f"{key}={value!r}" for key, value in factory.keywords.items())
    module = importlib.import_module(f"llmkit.testing.{_MODULES[family][0]}")
    title = f"{family}: {cls.__module__}.{cls.__qualname__}({arguments})"
    known = [name for name in inspect.signature(module.subject).parameters if name != "factory"]
    for name in options:
        if name not in known:
            raise UserError(f"the checks of family '{family}' have no option '{name}'; available: {', '.join(known)}")
    return module.subject(factory, **options), title

"""Packages of others that are imported by others and not used: their code runs when a name of theirs is asked for.

Lightning imports torchmetrics, which imports each of its metrics, and with them transformers, scipy and pyplot wherever
they are installed: as long as torch itself takes. llmkit uses the class ``Metric`` and a few more.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any


def _at(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


PACKAGES: dict[str, dict[str, Callable[[], Any]]] = {
    "torchmetrics": {
        "Metric": _at("torchmetrics.metric", "Metric"),
        "MetricCollection": _at("torchmetrics.collections", "MetricCollection"),
        "__version__": _at("torchmetrics.__about__", "__version__"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
    "torchmetrics.functional": {},
    "matplotlib.pyplot": {
        "Figure": _at("matplotlib.figure", "Figure"),
        "style": lambda: importlib.import_module("matplotlib.style"),
    },
}
"""Modules to defer, and those of their names that can be had without running their code."""
FIRST = {"torchmetrics": "torchmetrics.utilities"}
"""The submodule that a module's code imports before others, where these depend on the order."""

_lock = threading.RLock()


class Deferred(ModuleType):
    """A module that has been found but not run. Its submodules can be imported; any other name of it runs it."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that is not there yet."""
        if make := PACKAGES.get(self.__name__, {}).get(name):
            found = make()
            setattr(self, name, found)
            return found
        if name.startswith("__") and name != "__all__":  # what inspect and others look for in every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self._run()
        return getattr(self, name)

    def _run(self) -> None:
        """Run the module's code, as its import would have done."""
        with _lock:
            if type(self) is Deferred:
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__class__ = ModuleType  # type: ignore[assignment]
                try:
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self.__class__ = Deferred
                    raise


class _Loader(importlib.abc.Loader):
    """Makes a module of ``PACKAGES`` without running it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        if module.__name__ in FIRST:
            importlib.import_module(FIRST[module.__name__])


class _Watched(importlib.abc.Loader):
    """Runs a module within a context."""

    def __init__(self, loader: importlib.abc.Loader, context: AbstractContextManager[Any]) -> None:
        self.loader, self.context = loader, context

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        with self.context:
            self.loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as any finder would, defers those of ``PACKAGES``, and watches some others."""

    def __init__(self, watch: Mapping[str, AbstractContextManager[Any]]) -> None:
        self.watch = watch

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if target is not None or (name not in PACKAGES and name not in self.watch):  # a target: it is reloaded
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            deferred = name in PACKAGES
            spec.loader = _Loader(spec.loader) if deferred else _Watched(spec.loader, self.watch[name])
        return spec


def defer(watch: Mapping[str, AbstractContextManager[Any]]) -> None:
    """Defer the modules of ``PACKAGES`` in this process, those apart that have been imported already.

    ``watch``: modules and a context for each that it is imported in.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(watch))

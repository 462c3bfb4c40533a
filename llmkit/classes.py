"""Classes that a config names where a type is expected; Lightning's callbacks, loggers and profilers by short names.

Case and underscores do not matter: ``early_stopping`` is ``EarlyStopping``; loggers and profilers need no suffix:
``wandb`` is ``WandbLogger``, ``simple`` is ``SimpleProfiler``.
"""

from __future__ import annotations

import collections.abc
import datetime
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from llmkit.errors import UserError, unknown
from llmkit.imports import is_importable

NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    collections.abc.Iterable: "a list",
    dict: "a mapping",
    collections.abc.Mapping: "a mapping",
}
"""Types as people call them."""

PLAIN = {
    *NAMES,
    *(Any, complex, bytes, type(None), set, object, Path, PurePath, os.PathLike, datetime.timedelta),
}
"""Types whose values are not classes."""

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""A dotted name, as in ``package.module.Class``."""

SUFFIXES = {"Callback": "", "Logger": "Logger", "Profiler": "Profiler"}
"""Lightning's classes that a config names by short names, and the suffix that a name may leave out."""
ELSEWHERE = {"Logger": {"AimLogger": "aim.pytorch_lightning.AimLogger"}}
"""Classes of other packages that have a short name too."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "AimLogger": ("aim",),
    "CometLogger": ("comet_ml",),
    "LitLogger": ("litlogger",),
    "MLFlowLogger": ("mlflow",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "RichModelSummary": ("rich",),
    "RichProgressBar": ("rich",),
    "XLAProfiler": ("torch_xla",),
}
"""The packages, one of which a class needs; ``pip install`` knows them by the same names."""

BASES = ("BaseFinetuning", "BasePredictionWriter", "Checkpoint", "LambdaCallback", "ProgressBar", "LitLogger")
"""Classes without a short name: what others derive from, or what takes Python functions."""
REFUSED = {
    "BackboneFinetuning": "it changes the optimizer's parameters in the middle of a run, so that the schedule and a "
    "resumed run would not be exact: train with model.freeze first, then another run from its checkpoint (init_from)",
    "BatchSizeFinder": "a batch size that no config holds could not be resumed exactly: set data.batch_size "
    "(llmkit inspect says what memory it takes)",
    "LearningRateFinder": "a learning rate that no config holds could not be resumed exactly: search "
    "model.optimizer.lr with llmkit tune",
    "ThroughputMonitor": "metrics.csv has tokens_per_second, mfu and memory_gib already",
}
"""Lightning's callbacks that do not fit llmkit, and why."""


def base_of(kind: Any) -> type | None:
    """Return the class of ``SUFFIXES`` that a type allows; None where it allows none."""
    if typing.get_args(kind):
        return next(filter(None, map(base_of, typing.get_args(kind))), None)
    named = isinstance(kind, type) and kind.__name__ in SUFFIXES and kind.__module__.startswith("lightning.")
    return kind if named else None


def spelled_out(kind: Any, value: Any) -> Any:
    """Return the value of such a type as ``{class_path, init_args}``; one of another form or type as it is.

    ``{name: wandb, project: x}`` and ``{class_path: wandb, project: x}`` are WandbLogger with that project.
    Raises UserError for a name that no class has, and where the package that the class needs is not installed.
    """
    base = base_of(kind)
    if base is None:
        return value
    if isinstance(value, str):
        return value if is_file(value) or not value else {"class_path": _path(base, value)}
    key = next((key for key in ("class_path", "name") if isinstance(value, Mapping) and key in value), None)
    if key is None or not isinstance(value[key], str):
        return value
    inner = value.get("init_args") or {}
    if not isinstance(inner, Mapping) or is_file(value[key]):
        return value
    rest = {name: item for name, item in value.items() if name not in (key, "init_args", "dict_kwargs")}
    spec = {"class_path": _path(base, value[key])}
    given = {**inner, **rest}
    return {**spec, **({"init_args": given} if given else {}), **{k: value[k] for k in ("dict_kwargs",) if k in value}}


def _path(base: type, name: str) -> str:
    paths, short = _paths(base)
    path = name if "." in name else paths.get(name) or short.get(_folded(name))
    if path is None:
        raise UserError(unknown(base.__name__.lower(), name, {*paths, *_shown(base)}))
    cls = path.rpartition(".")[2]
    if path.startswith(("lightning.", "pytorch_lightning.")) and cls in REFUSED:
        raise UserError(f"{cls}: {REFUSED[cls]}")
    if not any(importlib.util.find_spec(package) for package in PACKAGES.get(cls, ("lightning",))):
        raise UserError(f"{cls} needs a package that is not installed: pip install {PACKAGES[cls][0]}")
    return path


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _shown(base: type) -> Iterator[str]:
    """Yield the names without suffix, in the way people write them."""
    suffix = SUFFIXES[base.__name__]
    yield from (name.removesuffix(suffix).lower() for name in _paths(base)[0] if suffix)


@functools.cache
def _paths(base: type) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the paths of the classes by their names, and by their short names."""
    package, suffix = base.__module__.rpartition(".")[0], SUFFIXES[base.__name__]
    own = {name: f"{package}.{name}" for name in known_classes(base) if name not in BASES}
    paths = own | ELSEWHERE.get(base.__name__, {})
    short = {_folded(name): path for name, path in paths.items()}
    return paths, short | {_folded(name.removesuffix(suffix)): path for name, path in paths.items() if suffix}


def named_class(kind: Any, value: Any) -> str:
    """Return the class, or the file with one, that a value names where a type is expected; empty: it names none."""
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        return str(value["class_path"])
    if not isinstance(value, str):
        return ""
    if kind in (Any, inspect.Parameter.empty):  # no type is known: what can be imported is taken for a class
        return value if CLASS_PATH.fullmatch(value) and is_importable(value.partition(".")[0]) else ""
    if not takes_class(kind):
        return ""
    named = CLASS_PATH.fullmatch(value) is not None or is_file(value) or bool(known_classes(kind))
    return value if named else ""


def takes_class(kind: Any) -> bool:
    """Return whether a value of this type may be given as the path of a class or a function."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return False
    if origin in (collections.abc.Callable, type) or kind in (collections.abc.Callable, type):
        return True
    if typing.get_args(kind):
        return any(takes_class(item) for item in typing.get_args(kind))
    return isinstance(kind, type) and kind not in PLAIN


@functools.cache
def known_classes(kind: Any) -> Mapping[str, type]:
    """Return the classes by name that a library has for a type: the callbacks next to Lightning's ``Callback``, say."""
    if typing.get_args(kind):
        items = [item for item in typing.get_args(kind) if not isinstance(item, list)]  # arguments of a Callable
        return {name: cls for item in items for name, cls in known_classes(item).items()}
    if not takes_class(kind) or not isinstance(kind, type) or not kind.__module__.startswith("lightning."):
        return {}
    package = importlib.import_module(kind.__module__.rpartition(".")[0])
    classes = {name: cls for name, cls in vars(package).items() if isinstance(cls, type)}
    return {name: cls for name, cls in classes.items() if issubclass(cls, kind) and cls is not kind}


def load(path: str) -> Any:
    """Return what is at a dotted path; None where it cannot be imported."""
    try:
        return pkgutil.resolve_name(path)
    except Exception:  # whatever the module raises is reported where the value is checked against its type
        return None


def is_file(text: str) -> bool:
    """Return whether text is the path of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False

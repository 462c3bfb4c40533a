"""Classes of Lightning by name, as ``trainer.callbacks``, ``trainer.logger``, ``trainer.profiler``, ... may give them.

Case and underscores do not matter: ``early_stopping`` is ``EarlyStopping``. Loggers and profilers need no suffix:
``wandb`` is ``WandbLogger``, ``simple`` is ``SimpleProfiler``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from llmkit.check import Raw, settled
from llmkit.errors import Problem, UserError, nearest

Tree = dict[str, Any]

CLASSES = {
    "callbacks": ("lightning.pytorch.callbacks", ""),
    "logger": ("lightning.pytorch.loggers", "Logger"),
    "profiler": ("lightning.pytorch.profilers", "Profiler"),
    "strategy": ("lightning.pytorch.strategies", "Strategy"),
    "accelerator": ("lightning.pytorch.accelerators", "Accelerator"),
    "plugins": ("lightning.pytorch.plugins", ""),
}
"""Keys of the trainer: the package with their classes, and the suffix that a name may leave out."""
WORDS = ("strategy", "accelerator", "plugins")
"""Keys where Lightning has words of its own, ``ddp``: only the whole name of a class is one there."""
ELSEWHERE = {"logger": {"AimLogger": "aim.pytorch_lightning.AimLogger"}}
"""Classes of other packages that have a name too."""
NEEDS: dict[str, tuple[str, ...]] = {
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
BASES = ("BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "LambdaCallback", "Logger", "ProgressBar")
"""Classes that a config cannot name: what others derive from, or what takes Python functions."""
REFUSED = {
    "BackboneFinetuning": "it changes the optimizer's parameters in the middle of a run, so that the schedule and a "
    "resumed run would not be exact: train with model.freeze first, then another run from its checkpoint (init_from)",
    "BatchSizeFinder": "a batch size that no config holds could not be resumed exactly: set data.batch_size "
    "(llmkit inspect says what memory it takes)",
    "LearningRateFinder": "a learning rate that no config holds could not be resumed exactly: try them with "
    "llmkit fit --find_lr, or search model.optimizer.lr with llmkit tune",
    "ThroughputMonitor": "metrics.csv has tokens_per_second, mfu and memory_gib already",
}
"""Lightning's callbacks that do not fit llmkit, and why."""
COPYING = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")
"""Callbacks that copy the model, which a profiler with hooks in its modules prevents."""

IN_ANY_CASE = object()
"""The logger ``csv`` without arguments: ``metrics.csv`` of the run folder."""


def spelled_out(trainer: Mapping[str, Any]) -> tuple[Tree, list[Problem]]:
    """Return the settings of a trainer with its classes as ``{class_path, init_args}``, and what is wrong with names.

    ``{name: wandb, project: x}`` becomes ``{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project:
    x}}``. A value with a wrong name becomes None; what is wrong in other ways stays for the check to report.
    """
    tree, problems = dict(trainer), []
    for key in [key for key in CLASSES if key in tree]:
        value = _plain(tree[key])
        found = []
        for item in value if isinstance(value, list) else [value]:
            try:
                found.append(_spelled_out(key, _plain(item)))
            except UserError as error:
                problems.append(Problem(f"trainer.{key}", str(error)))
        kept = [item for item in found if item is not IN_ANY_CASE]
        tree[key] = kept if isinstance(value, list) else next(iter(kept), None)
    copies = [name for name in map(_class_name, listed(tree.get("callbacks"))) if name in COPYING]
    hooks = _class_name(tree.get("profiler")) == "PyTorchProfiler" and tree["profiler"].get("init_args", {})
    if copies and hooks is not False and settled(hooks.get("record_module_names", True)):
        text = f"{copies[0]} copies the model, which has hooks of PyTorchProfiler: set record_module_names: false"
        problems.append(Problem("trainer.profiler", text))
    return tree, problems


def listed(value: Any) -> list[Any]:
    """Return the loggers or callbacks that a config names: none, one, or several."""
    return value if isinstance(value, list) else [] if value in (None, True, False) else [value]


def _class_name(spec: Any) -> str:
    return str(spec["class_path"]).rpartition(".")[2] if isinstance(spec, dict) and "class_path" in spec else ""


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Raw) else value


def _spelled_out(key: str, value: Any) -> Any:
    if isinstance(value, str) and (key not in WORDS or names(key).get(value, "").endswith(f".{value}")):
        value = {"class_path": value}
    part = next((part for part in ("class_path", "name") if isinstance(value, dict) and part in value), None)
    if isinstance(value, dict) and part is None:
        raise UserError(f"expected a name, or {{name: ..., arguments}}, got {settled(value)}")
    if part is None or not isinstance(value[part], str) or not isinstance(value.get("init_args") or {}, dict):
        return value
    path = _path(key, value[part])
    flat = {name: item for name, item in value.items() if name not in (part, "init_args", "dict_kwargs")}
    given = {**(value.get("init_args") or {}), **flat}
    if path == names("logger")["csv"] and not given:
        return IN_ANY_CASE
    if path in (names("logger")["csv"], names("logger")["tensorboard"]):
        given = {"save_dir": "", **given}  # the run decides
    more = {"dict_kwargs": value["dict_kwargs"]} if "dict_kwargs" in value else {}
    return {"class_path": path, **({"init_args": given} if given else {}), **more}


def _path(key: str, name: str) -> str:
    known, suffix = names(key), CLASSES[key][1]
    path = name if "." in name else known.get(name) or known.get(name.replace("_", "").replace("-", "").lower())
    if path is None:
        full = [cls for cls in known if not cls.islower()]
        short = sorted(cls.removesuffix(suffix).lower() for cls in full) if suffix else sorted(full)
        hint, kind = nearest(name, [*short, *full]), suffix.lower() or key.removesuffix("s")
        raise UserError(f"unknown {kind} '{name}'.{hint} Allowed: {', '.join(short)}.")
    cls = path.rpartition(".")[2]
    if path in known.values() and cls in REFUSED:
        raise UserError(f"{cls}: {REFUSED[cls]}")
    if path in known.values() and not any(map(importlib.util.find_spec, NEEDS.get(cls, ("lightning",)))):
        raise UserError(f"{cls} needs a package that is not installed: pip install {NEEDS[cls][0]}")
    return path


@functools.cache
def names(key: str) -> Mapping[str, str]:
    """Return the paths of the classes of a key by their names, and by their short names in lower case."""
    package, suffix = CLASSES[key]
    named = [name for name in importlib.import_module(package).__all__ if name[0].isupper()]
    own = {name: f"{package}.{name}" for name in named if name not in (*BASES, suffix)}
    paths = {**own, **ELSEWHERE.get(key, {})}
    short = {name.removesuffix(suffix).lower(): path for name, path in paths.items()}
    return {**short, **{name.lower(): path for name, path in paths.items()}, **paths}

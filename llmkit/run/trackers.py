"""Experiment trackers: what identifies a run to them, what they are sent besides metrics, how a resumed run continues.

A logger is given what its constructor has arguments for and the config leaves open: TensorBoard the run folder, Weights
& Biases and Aim a group, a name and an id, MLflow an experiment.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from llmkit.errors import Problem, UserError, note

Spec = dict[str, Any]

GROUPS = ("group", "experiment_name", "experiment")
"""Arguments of loggers for what runs have in common."""
IDS = ("id", "run_id", "run_hash")
"""Arguments for what a tracker knows a run by; of the last two it makes its own for a new run."""
TAKES = {"WandbLogger": {"group", "tags", "name", "id", "project", "save_dir"}}
"""What a logger is given if that is not what its constructor names: it passes some on, or means something else."""
FOLDERS = ("TensorBoardLogger", "CSVLogger")
"""Loggers whose ``name`` and ``version`` are folders: each run has its own."""
SENT = ("TensorBoardLogger", "WandbLogger", "MLFlowLogger", "AimLogger")
"""Loggers that are sent pictures and texts."""


class Identity(NamedTuple):
    """What identifies a run to a tracker."""

    group: str
    """What it has in common with other runs: the name of a study, or of an experiment."""
    name: str
    """Its name within the group."""
    name_alone: str
    """Its name for a logger that has no groups."""
    tags: Mapping[str, Any]
    id: str
    """What stays the same when the run is resumed."""
    version: str
    """The same for a logger that has no groups."""


def filled(spec: Spec, run: Identity, more: Mapping[str, Any] | None = None) -> Spec:
    """Return the description of a logger with what identifies a run; what it sets itself stays.

    Args:
        spec: ``{class_path, init_args, dict_kwargs}``; arguments that the constructor passes on are ``dict_kwargs``.
        run: what identifies the run.
        more: further arguments, for a logger that takes them.
    """
    package, _, name = spec["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(package or "lightning.pytorch.loggers"), name)
    parameters = inspect.signature(cls).parameters
    takes = TAKES.get(name, parameters.keys())
    in_group = not takes.isdisjoint(GROUPS)
    as_mapping = "dict" in str(getattr(parameters.get("tags"), "annotation", "")).lower()
    values: dict[str, Any] = {
        **dict.fromkeys(GROUPS, run.group),
        **dict.fromkeys(("name", "run_name"), run.name if in_group else run.name_alone),
        "tags": run.tags if as_mapping else [str(tag) for tag in run.tags.values()],
        "id" if "id" in takes else "version": run.id if in_group else run.version,
        **(more or {}),
    }
    values = {key: value for key, value in values.items() if key in takes} | spec.get("init_args", {})
    init = {key: value for key, value in values.items() if key in parameters}
    rest = {key: value for key, value in values.items() if key not in parameters} | spec.get("dict_kwargs", {})
    return {**spec, "init_args": init, **({"dict_kwargs": rest} if rest else {})}


def build(
    specs: Iterable[Spec], folder: Path, name: str, tags: Mapping[str, Any], known: Mapping[str, str]
) -> list[Any]:
    """Return the loggers of a config for the run in a folder.

    Args:
        specs: their descriptions; an empty ``save_dir`` is one that the config leaves open.
        folder: of the run, OUTPUT/NAME/version_N.
        name: NAME.
        tags: what else identifies the run.
        known: what trackers know the run by that this one resumes, by class.

    Raises UserError, under ``trainer.logger``, for what a constructor refuses.
    """
    output = folder.parents[len(Path(name).parts)]
    run = Identity(name, f"{name}/{folder.name}", name, tags, secrets.token_hex(4), folder.name)
    defaults: dict[str, dict[str, Any]] = {
        "CSVLogger": {"save_dir": str(folder / "csv")},
        "TensorBoardLogger": {"save_dir": str(output)},
        "WandbLogger": {"save_dir": str(folder), "project": os.environ.get("WANDB_PROJECT", "llmkit")},
        "MLFlowLogger": {
            "tracking_uri": f"sqlite:///{output.absolute()}/mlflow.db",
            "artifact_location": (output / "mlflow").absolute().as_uri(),
        },
        "AimLogger": {"repo": str(output)},
    }
    if "MLFLOW_TRACKING_URI" in os.environ:
        defaults["MLFlowLogger"] = {"tracking_uri": os.environ["MLFLOW_TRACKING_URI"]}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--logger", type=Logger)
    logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)  # it warns of each run that is continued
    loggers = []
    for spec in specs:
        cls = spec["class_path"].rpartition(".")[2]
        with _reaching(cls):
            same = {**dict.fromkeys(IDS, known[cls]), "name": None, "run_name": None} if cls in known else {}
            given = {key: value for key, value in spec.get("init_args", {}).items() if (key, value) != ("save_dir", "")}
            own = {} if "tracking_uri" in given else defaults.get(cls, {})
            spec = filled({**spec, "init_args": given}, run, {**own, **same})
            loggers.append(parser.instantiate_classes(parser.parse_object({"logger": spec})).logger)
    return loggers


def ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """Return what trackers know this run by, for a checkpoint: the run that resumes it continues there."""
    if getattr(rank_zero_only, "rank", 0):
        return {}
    found = {type(logger).__name__: logger.version for logger in loggers if _is(logger, *SENT)}
    return {name: str(value) for name, value in found.items() if value and name not in FOLDERS}


@contextmanager
def running(loggers: Iterable[Logger]) -> Iterator[None]:
    """Begin a run in each tracker, and end it with the block. Raises UserError for one that cannot be reached."""
    loggers, failed = list(loggers), True
    try:
        for logger in loggers:
            with _reaching(type(logger).__name__):
                getattr(logger, "experiment", None)
        yield
        failed = False
    finally:
        end(loggers, failed)


def describe(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Send the settings of a run to its loggers. Raises UserError for a tracker that cannot be reached."""
    for logger in loggers:
        with _reaching(type(logger).__name__):
            known = {}
            if _is(logger, "MLFlowLogger"):  # where they cannot be changed when a run is resumed
                known = logger.experiment.get_run(logger.version).data.params  # type: ignore[attr-defined]
            logger.log_hyperparams({name: value for name, value in settings.items() if name not in known})


def end(loggers: Iterable[Logger], failed: bool) -> None:
    """End the runs of trackers that would continue in the next run of this process."""
    if any(_is(logger, "WandbLogger") for logger in loggers):
        importlib.import_module("wandb").finish(exit_code=int(failed))


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = f"{name} cannot begin: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(Problem("trainer.logger", text)) from error


def _is(logger: Logger, *names: str) -> bool:
    return not {cls.__name__ for cls in type(logger).__mro__}.isdisjoint(names)


def send(loggers: Iterable[Logger], step: int, pictures: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Send PNG files and texts to the trackers that show them, after the last metrics of a run.

    A tracker that fails now has all else: there is a note.
    """
    for logger in loggers:
        if _is(logger, *SENT):
            try:
                _send(logger, step, pictures, texts)
            except Exception as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                note(f"{type(logger).__name__} did not take {', '.join([*pictures, *texts])}: {what}")


def _send(logger: Any, step: int, pictures: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    for name, file in pictures.items():
        if _is(logger, "TensorBoardLogger"):
            from matplotlib.image import imread

            logger.experiment.add_image(name, imread(file)[..., :3], step, dataformats="HWC")
        elif _is(logger, "WandbLogger"):
            logger.log_image(name, [str(file)], step)
        elif _is(logger, "MLFlowLogger"):
            logger.experiment.log_artifact(logger.version, str(file))
        else:
            logger.experiment.track(importlib.import_module("aim").Image(str(file)), name=name, step=step)
    for name, text in texts.items():
        if _is(logger, "TensorBoardLogger"):
            logger.experiment.add_text(name, f"```\n{text}\n```", step)
        elif _is(logger, "WandbLogger"):
            logger.log_text(name, ["text"], [[text]], step=step)
        elif _is(logger, "MLFlowLogger"):
            logger.experiment.log_text(logger.version, text, f"{name}.txt")
        else:
            logger.experiment.track(importlib.import_module("aim").Text(text), name=name, step=step)
    logger.finalize("success")

"""``llmkit.fit`` and the other commands that run a model on data: they return the run folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng

from llmkit.api.result import Run
from llmkit.api.settings import Config, Given, read
from llmkit.commands.fit import finished, start
from llmkit.config.plan import plan
from llmkit.errors import Problem, Stopped, UserError, in_notebook, note
from llmkit.lightning import is_debug_run, was_interrupted
from llmkit.run.cli import CLI
from llmkit.run.folder import run_folder


def fit(config: Config | None = None, overrides: Mapping[str, Any] | None = None, **settings: Any) -> Run:
    """Train a model as ``llmkit fit`` does, by the same code, and return the run.

    ::

        run = llmkit.fit("experiment.yaml", {"model.attention": "lstm", "trainer.max_steps": 100})
        run = llmkit.fit(data={"train": "notes.txt"}, model={"dim": 64}, seed=1)
        run = llmkit.fit(model=llmkit.LanguageModel(dim=64), data=llmkit.DataModule(train="notes.txt"))

    Args:
        config: a YAML file, a list of them (later ones win), or a mapping of the same keys; None: defaults.
        overrides: keys to values, above the config, as options are on the command line: ``{"model.dim": 64}``.
        settings: the same as keywords, above ``overrides``: ``model``, ``data``, ``trainer`` and ``checkpoint`` take
            mappings, which are merged with what is below them; ``name``, ``output``, ``seed``, ``ckpt_path`` and
            ``imports`` take values. ``model`` may be a ``LanguageModel`` and ``data`` a ``DataModule``: they are
            trained and used as they are. A plugin may be given as its class, and callbacks, loggers, a strategy or a
            profiler of the trainer as objects.

    Raises:
        UserError: every mistake in the settings, each with its place, as the command prints them.
        KeyboardInterrupt: Ctrl-C ended the run, once ``last.ckpt`` was written; ``ckpt_path="last"`` resumes it.
    """
    return _run("fit", config, overrides, settings)


def validate(config: Config | None = None, overrides: Mapping[str, Any] | None = None, **settings: Any) -> Run:
    """Evaluate the checkpoint ``ckpt_path`` on validation data, as ``llmkit validate`` does: see ``fit``."""
    return _run("validate", config, overrides, settings)


def test(config: Config | None = None, overrides: Mapping[str, Any] | None = None, **settings: Any) -> Run:
    """Evaluate the checkpoint ``ckpt_path`` on test data, as ``llmkit test`` does: see ``fit``."""
    return _run("test", config, overrides, settings)


def predict(config: Config | None = None, overrides: Mapping[str, Any] | None = None, **settings: Any) -> Run:
    """Predict the rows of ``data.predict`` with the checkpoint ``ckpt_path``, as ``llmkit predict`` does: see ``fit``.

    The answers are ``predictions`` of the run that is returned.
    """
    return _run("predict", config, overrides, settings)


def _run(command: str, config: Config | None, overrides: Mapping[str, Any] | None, settings: dict[str, Any]) -> Run:
    with _raising(), isolate_rng(include_cuda=False):
        given = read(config, overrides or {}, settings)
        planned = plan(command, given.words, f"llmkit.{command}")
        if command == "fit" and (folder := finished(planned)) is not None:
            return Run(folder)
        cli = start(planned, _with_objects(given), examines=command == "fit")
    return Run(run_folder(cli.trainer), kept=not is_debug_run(cli.trainer))


def _with_objects(given: Given) -> type[CLI]:
    """Return a CLI that takes objects in the place of what it built from their description."""

    class Handed(CLI):
        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            self.model, self.datamodule = given.model or self.model, given.data or self.datamodule
            trainer = self.config_init["trainer"]
            for name, objects in given.trainer.items():
                names = ", ".join(type(item).__name__ for item in objects)
                note(f"trainer.{name}: config.yaml does not have {names}, which was given as an object")
                listed = trainer[name] if isinstance(trainer[name], list) else []
                trainer[name] = [*listed, *objects] if name in ("callbacks", "plugins") else objects[-1]
            built = super().instantiate_trainer(**kwargs)
            if in_notebook() and built.world_size > 1:
                text = f"a notebook trains in one process, not in {built.world_size}: use 1, or the command"
                raise UserError(Problem("trainer.devices", text))
            return built

        def loggers(self) -> list[Logger]:
            return [*super().loggers(), *given.trainer.get("logger", ())]

    return Handed


@contextmanager
def _raising() -> Iterator[None]:
    """Raise what ends the process of a command: KeyboardInterrupt for Ctrl-C, other signals for who handles them."""
    try:
        yield
    except Stopped as stop:
        number = stop.code - 128
        if number == signal.SIGINT:
            raise KeyboardInterrupt(str(stop)) from stop
        signal.raise_signal(number)
        raise
    except SystemExit as exit:
        if not was_interrupted(exit):
            raise
        raise KeyboardInterrupt from exit

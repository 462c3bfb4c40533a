"""What is searched and how: a YAML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config.layers import COMMAND_LINE
from llmkit.config.plan import plan
from llmkit.config.stored import is_below
from llmkit.errors import Problem, UserError, unknown
from llmkit.study.spec import Study, opened, refuse, words

SAMPLERS = ("tpe", "random", "qmc", "gp")
RESERVED = ("name", "output", "ckpt_path", "seed", "seed_everything", "config", "imports")
"""Keys that the study sets itself, or that change nothing in a result."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, whole ones where both ends are; ``log``: evenly by their logarithm."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def samples(self) -> list[Any]:
        """Return the values that are checked before anything runs: both ends, and a fraction between them."""
        between = self.low + (self.high - self.low) / math.pi
        return [self.low, self.high] if self.whole else [self.low, self.high, float(f"{between:.4g}")]

    def __str__(self) -> str:
        kind = " (whole)" if self.whole else ""
        return f"{self.low:g} to {self.high:g}{kind}{', by logarithm' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of several values, which have no order; each is known by its label, its JSON."""

    values: dict[str, Any]

    def samples(self) -> list[Any]:
        """Return the values that are checked before anything runs: all."""
        return list(self.values.values())

    def __str__(self) -> str:
        return ", ".join(self.values)


Space = dict[str, Range | Choice]


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        name: of the study; its folder is ``output/name``.
        output: the folder for studies.
        base: the words of ``llmkit fit`` that all trials share.
        space: key -> its values.
        trials: how many there are.
        sampler: what suggests them.
        seed: of the sampler.
        round: how many trials are suggested at once, from the results of all earlier rounds.
        metric: what ``results.json`` calls it; None: that which decides on the best checkpoint.
        workers: cells that run at once; None: one for each device.
        threads: CPU threads of a cell.
        cells_per_gpu: how many cells share a GPU.
        executor: where cells run.
    """

    name: str
    output: str
    base: tuple[str, ...]
    space: Space
    trials: int
    sampler: str
    seed: int
    round: int
    metric: str | None
    workers: int | None
    threads: int
    cells_per_gpu: int
    executor: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of the study is."""
        return Path(self.output, self.name)

    def as_study(self, name: str, keys: dict[str, Any]) -> Study:
        """Return a comparison whose one variant sets ``keys``."""
        return Study(
            name=self.name,
            output=self.output,
            base=self.base,
            variants={name: keys},
            baseline=name,
            match="none",
            also=None,
            tune=None,
            seeds=1,
            metric=self.metric,
            margin=None,
            workers=self.workers,
            threads=self.threads,
            cells_per_gpu=self.cells_per_gpu,
            executor=self.executor,
        )


DEFAULTS: dict[str, Any] = {
    **{"name": None, "output": "runs", "base": None, "overrides": None, "space": None},
    **{"trials": 20, "sampler": "tpe", "seed": 0, "round": 4, "metric": None},
    **{"workers": None, "threads": 1, "cells_per_gpu": 1, "executor": "local"},
}


def read(file: str | None, given: Mapping[str, Any], rest: list[str]) -> Search:
    """Return the search of a YAML file, the base config and the ends of each key checked as ``llmkit fit`` would.

    Args:
        file: its path.
        given: options of the command by the name of the study's key; they take the place of the file's values.
        rest: further words of ``llmkit fit`` for all trials.

    Raises:
        UserError: everything that is wrong, with its place.
    """
    if not file:
        raise UserError("tune needs a study: --config FILE, a YAML file with 'base' and 'space'")
    problems: list[Problem] = []
    layer, values = opened(file, DEFAULTS, given, rest, problems)
    values["space"] = _space(values["space"], problems)
    _check(values, problems)
    if not problems:
        plan("fit", [*values["base"]], "tune")  # raises with the places in the config itself
        problems += _refused(values["base"], values["space"])
    refuse(problems, layer, given)
    return Search(**values)


def _space(value: Any, problems: list[Problem]) -> Space:
    if not isinstance(value, dict) or not value:
        text = "expected keys and their values, such as model.optimizer.lr: {low: 1e-4, high: 1e-1, log: true}"
        problems.append(Problem("space", text))
        return {}
    found: Space = {}
    for key, given in value.items():
        where = f"space.{key}"
        try:
            if key in RESERVED:
                raise ValueError(f"{key} is set by the study, and not searched")
            found[key] = _choice(given) if isinstance(given, list) else _range(given)
        except ValueError as error:
            problems.append(Problem(where, str(error)))
    return found


def _choice(given: list[Any]) -> Choice:
    values = {item if isinstance(item, str) else json.dumps(item): item for item in given}
    if len(values) < 2 or len(values) < len(given):
        raise ValueError("expected at least two values, all different")
    return Choice(values)


def _range(given: Any) -> Range:
    """Return a range. Raises ValueError, in words, for what is none."""
    if not isinstance(given, dict):
        raise ValueError(f"expected a list of values, or {{low: NUMBER, high: NUMBER, log: true}}, got {given}")
    allowed = ("low", "high", "log")
    for name in [name for name in given if name not in allowed]:
        raise ValueError(unknown("key", name, allowed))
    low: Any = given.get("low")
    high: Any = given.get("high")
    log: Any = given.get("log", False)
    for name, item in (("low", low), ("high", high)):
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise ValueError(f"expected a number for {name}, got {item}")
    if not isinstance(log, bool):
        raise ValueError(f"expected true or false for log, got {log}")
    if low >= high:
        raise ValueError(f"expected low below high, got {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError(f"expected low above 0 with log: true, got {low:g}")
    return Range(low, high, log)


def _refused(base: tuple[str, ...], space: Space) -> list[Problem]:
    """Return what ``llmkit fit`` would refuse in the values of each key, one key at a time, over the base config."""
    problems = []
    for key, values in space.items():
        for value in values.samples():
            try:
                plan("fit", [*base, *words({key: value})], "tune")
            except UserError as error:
                text = str(error.problems[0]).removeprefix(f"{COMMAND_LINE}: ").removeprefix(f"{key}: ")
                problems.append(Problem(f"space.{key}", text))
                break
    return problems


def _check(values: dict[str, Any], problems: list[Problem]) -> None:
    for key in ("trials", "round", "workers", "threads", "cells_per_gpu", "seed"):
        least = 0 if key == "seed" else 1
        whole = isinstance(values[key], int) and not isinstance(values[key], bool)
        if not (whole and values[key] >= least) and not (key == "workers" and values[key] is None):
            problems.append(Problem(key, f"expected a whole number of at least {least}, got {values[key]}"))
    if values["sampler"] not in SAMPLERS:
        problems.append(Problem("sampler", unknown("sampler", str(values["sampler"]), SAMPLERS)))
    for key in ("name", "output", "metric"):
        if not isinstance(values[key], str) and not (key == "metric" and values[key] is None):
            problems.append(Problem(key, f"expected text, got {values[key]}"))
    if isinstance(values["name"], str) and not is_below(values["name"]):
        problems.append(Problem("name", f"expected a relative path without '..', got '{values['name']}'"))

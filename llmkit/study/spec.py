"""What a study compares and how: a YAML file, or options next to the config of an experiment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llmkit.check import settled
from llmkit.config.argv import raw
from llmkit.config.files import read_yaml
from llmkit.config.layers import COMMAND_LINE, Layer
from llmkit.config.stored import is_below
from llmkit.errors import Problem, UserError, unknown

Match = Literal["params", "flops", "time", "none"]
MOST_VARIANTS = 50
EXECUTORS: dict[str, tuple[str, ...] | None] = {"local": (), "slurm": None, "ray": ("address",)}
"""Executors, and the settings of each; None: whatever it accepts."""


@dataclass(frozen=True)
class Tune:
    """A key that is tuned for each variant: ``points`` values around that of the base config, each ``factor`` apart."""

    key: str
    points: int = 5
    factor: float = 2.0
    seeds: int = 1


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: of the study; its folder is ``output/name``.
        output: the folder for studies.
        base: the words of ``llmkit fit`` that all variants share.
        variants: name -> key -> value.
        baseline: the variant that the others are compared with.
        match: what all variants are made equal in: ``params`` and ``flops`` by the width of the feedforward, ``time``
            by the number of steps.
        also: what they are made equal in for a second verdict; None: there is none.
        tune: what is tuned for each variant.
        seeds: number of final runs for each variant.
        metric: what ``results.json`` calls it; None: that which decides on the best checkpoint.
        margin: a difference that would not matter; None: no verdict can be "equivalent".
        workers: cells that run at once; None: one for each device, or as many as a cluster has room for.
        threads: CPU threads of a cell.
        cells_per_gpu: how many cells share a GPU.
        executor: where cells run: ``name``, and its settings.
    """

    name: str
    output: str
    base: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    baseline: str
    match: Match
    also: Match | None
    tune: Tune | None
    seeds: int
    metric: str | None
    margin: float | None
    workers: int | None
    threads: int
    cells_per_gpu: int
    executor: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of the study is."""
        return Path(self.output, self.name)


DEFAULTS: dict[str, Any] = {
    "name": "compare",
    "output": "runs",
    "base": None,
    "overrides": None,
    "variants": None,
    "baseline": None,
    "match": "params",
    "also": None,
    "tune": None,
    "seeds": 6,
    "metric": None,
    "margin": None,
    "workers": None,
    "threads": 1,
    "cells_per_gpu": 1,
    "executor": "local",
}


def words(values: Mapping[str, Any]) -> list[str]:
    """Return keys and values as the words of a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def read(file: str | None, vary: str | None, given: Mapping[str, Any], rest: list[str]) -> Study:
    """Return the study that a command line describes.

    Args:
        file: a study (a YAML file with ``variants``), or the config of an experiment.
        vary: ``KEY=VALUE,VALUE,...``: a variant a value, the first one the baseline.
        given: options of the command by the name of the study's key; they take the place of the file's values.
        rest: further words of ``llmkit fit`` for all variants.

    Raises:
        UserError: everything that is wrong, with its place.
    """
    layer = read_yaml(file) if file else Layer({}, COMMAND_LINE)
    is_study = bool({"variants", "base"} & layer.tree.keys())
    if is_study and vary:
        raise UserError(f"{file} names its variants: --vary is for the config of an experiment")
    problems: list[Problem] = []
    tree = settled(layer.tree) if is_study else {}
    for key in [key for key in tree if key not in DEFAULTS]:
        problems.append(Problem(key, unknown("key", key, DEFAULTS)))
        del tree[key]
    if not is_study:
        if vary is None:
            raise UserError("compare needs a study (a YAML file with 'variants'), or --config FILE and --vary KEY=A,B")
        tree = {"base": file, "variants": _varied(vary)}
    values = {**DEFAULTS, "name": Path(file).stem if is_study and file else "compare", **tree, **given}
    folder = Path(file or "").parent if is_study else Path()
    values["base"] = (*base_words(values["base"], folder, problems), *_shared(values, problems), *rest)
    values["variants"] = _variants(values["variants"], problems)
    values["tune"] = _tune(values["tune"], problems)
    values["executor"] = executor_settings(values["executor"], problems)
    _check(values, problems)
    refuse(problems, layer, given)
    return Study(**values)


def opened(
    file: str, defaults: Mapping[str, Any], given: Mapping[str, Any], rest: list[str], problems: list[Problem]
) -> tuple[Layer, dict[str, Any]]:
    """Return a study's file, and the value of each of its keys, the config files and overrides as words in ``base``.

    Args:
        file: its path.
        defaults: key -> value.
        given: options of the command by the name of the study's key; they take the place of the file's values.
        rest: further words of ``llmkit fit`` for all runs.
        problems: is extended by what is wrong.
    """
    layer = read_yaml(file)
    tree = settled(layer.tree)
    for key in [key for key in tree if key not in defaults]:
        problems.append(Problem(key, unknown("key", key, defaults)))
        del tree[key]
    values = {**defaults, "name": Path(file).stem, **tree, **given}
    values["base"] = (*base_words(values["base"], Path(file).parent, problems), *_shared(values, problems), *rest)
    values["executor"] = executor_settings(values["executor"], problems)
    return layer, values


def _shared(values: dict[str, Any], problems: list[Problem]) -> list[str]:
    """Take ``overrides`` out of the values; returns them as words."""
    shared = values.pop("overrides") or {}
    if not isinstance(shared, dict):
        problems.append(Problem("overrides", "expected keys and their values, such as data.batch_size: 16"))
        return []
    return words(shared)


def refuse(problems: list[Problem], layer: Layer, given: Mapping[str, Any]) -> None:
    """Raise UserError with every problem of a study and its place; none: do nothing."""
    if problems:
        places = {**layer.places, **dict.fromkeys(given, COMMAND_LINE)}
        raise UserError(*(f"{places.get(one.place_of or one.key, layer.source)}: {one}" for one in problems))


def _varied(vary: str) -> dict[str, dict[str, Any]]:
    key, equals, listed = vary.partition("=")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not equals or len(names) < 2:
        raise UserError(f"--vary {vary}: expected KEY=VALUE,VALUE,..., as in model.attention=multi_head,lstm")
    return {name: {key.removeprefix("--"): settled(raw(name))} for name in names}


def base_words(value: Any, folder: Path, problems: list[Problem]) -> list[str]:
    """Return the config files as words; a path is relative to the study's file, or else to the current folder."""
    files = value if isinstance(value, list) else [value]
    if not files or not all(isinstance(file, str) for file in files):
        problems.append(Problem("base", "expected the config of an experiment, or a list of configs"))
        return []
    found = [folder / file if (folder / file).is_file() else Path(file) for file in files]
    return [f"--config={file}" for file in found]


def _variants(value: Any, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not 2 <= len(value) <= MOST_VARIANTS:
        text = f"expected 2 to {MOST_VARIANTS} variants, each a name and the keys it sets"
        problems.append(Problem("variants", text))
        return {}
    found = {}
    for name, keys in value.items():
        key = f"variants.{name}"
        if not is_below(name) or "/" in name:
            problems.append(Problem(key, "the name becomes a folder: expected one without slashes"))
        if not isinstance(keys, dict | None):
            problems.append(Problem(key, "expected the keys that it sets, such as model.attention: lstm"))
        found[name] = dict(keys or {}) if isinstance(keys, dict | None) else {}
    return found


def _tune(value: Any, problems: list[Problem]) -> Tune | None:
    if value is None:
        return None
    allowed = [field.name for field in dataclasses.fields(Tune)][1:]
    if not isinstance(value, dict) or len(value) != 1:
        text = "expected one key and how it is tuned, such as model.optimizer.lr: {points: 5, factor: 2}"
        problems.append(Problem("tune", text))
        return None
    ((key, how),) = value.items()
    where = f"tune.{key}"
    if not isinstance(how, dict | None) or (how and not all(isinstance(item, int | float) for item in how.values())):
        problems.append(Problem(where, f"expected numbers for {', '.join(allowed)}"))
        return None
    for name in [name for name in how or {} if name not in allowed]:
        problems.append(Problem(where, unknown("key", name, allowed)))
        return None
    tune = Tune(key, **(how or {}))
    if tune.points < 3 or tune.factor <= 1 or tune.seeds < 1 or tune.points != int(tune.points):
        problems.append(Problem(where, "expected at least 3 points, a factor above 1 and at least 1 seed"))
    return tune


def executor_settings(value: Any, problems: list[Problem]) -> dict[str, Any]:
    """Return the name and settings of an executor, which may be given as its name; ``problems`` gets what is wrong."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or "name" not in spec:
        text = f"expected {', '.join(EXECUTORS)}, or a name and settings, such as {{name: slurm, partition: gpu}}"
        problems.append(Problem("executor", text))
        return {}
    if spec["name"] not in EXECUTORS:
        problems.append(Problem("executor", unknown("executor", str(spec["name"]), EXECUTORS)))
        return {}
    allowed = EXECUTORS[spec["name"]]
    for name in [name for name in spec if name != "name" and allowed is not None and name not in allowed]:
        problems.append(Problem(f"executor.{name}", unknown("key", name, ("name", *(allowed or ()))), "executor"))
    return spec


def _check(values: dict[str, Any], problems: list[Problem]) -> None:
    """Check single values, and fill in the baseline."""
    names = list(values["variants"])
    if values["baseline"] is None and names:
        values["baseline"] = names[0]
    elif names and values["baseline"] not in names:
        problems.append(Problem("baseline", unknown("variant", str(values["baseline"]), names)))
    others = tuple(match for match in get_args(Match) if match != values["match"])
    for key, allowed in (("match", get_args(Match)), ("also", others)):
        if values[key] not in allowed and not (key == "also" and values[key] is None):
            problems.append(Problem(key, unknown("match", str(values[key]), allowed)))
    for key in ("seeds", "workers", "threads", "cells_per_gpu"):
        if key == "workers" and values[key] is None:
            continue
        if not isinstance(values[key], int) or values[key] < 1:
            problems.append(Problem(key, f"expected a whole number of at least 1, got {values[key]}"))
    margin = values["margin"]
    if margin is not None and not (isinstance(margin, int | float) and margin > 0):
        problems.append(Problem("margin", f"expected a number above 0, got {margin}"))
    for key in ("name", "output", "metric"):
        if not isinstance(values[key], str) and not (key == "metric" and values[key] is None):
            problems.append(Problem(key, f"expected text, got {values[key]}"))
    if isinstance(values["name"], str) and not is_below(values["name"]):
        problems.append(Problem("name", f"expected a relative path without '..', got '{values['name']}'"))

"""A study of sizes: which models, how long each is trained, and what is predicted before it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmkit.config.stored import is_below
from llmkit.errors import Problem, UserError, unknown
from llmkit.study.spec import Tune, opened, refuse

LR = "model.optimizer.lr"


class Power(NamedTuple):
    """A learning rate of (size's width / ``width``) ^ ``exponent`` times that of the config."""

    width: float
    exponent: float = -0.5


@dataclass(frozen=True)
class ScaleStudy:
    """A study of sizes.

    Attributes:
        name: of the study; its folder is ``output/name``.
        output: the folder for studies.
        base: the words of ``llmkit fit`` that all runs share.
        variants: name -> key -> value; one surface each.
        widths: ``model.dim`` of each size.
        head_width: width of an attention head; None: the number of heads is that of the config.
        depth: layers of all sizes, or ``per_width``: one for so many units of width; None: that of the config.
        budgets: FLOPs of each isoFLOP curve; None: ``tokens_per_param`` is given.
        tokens_per_param: how many tokens a parameter each size is trained on.
        ratio: tokens a parameter outside of which a size is not trained for a budget.
        hold_out: budgets that are predicted, and then run.
        learning_rate: None: that of the config for all sizes; or how it follows from the width, or is tuned.
        schedule: whether each run has one of its own, or those of a size share a trunk and have a decay each.
        warmup: share of the steps, of the shortest run's on a trunk; None: as in the config.
        repeat: whether runs may see tokens more than once.
        seeds: runs of each point.
        metric: the loss that is fitted.
        noise: standard deviation of a run that ``--plan`` assumes, relative to the loss.
        workers: cells that run at once; None: one for each device.
        threads: CPU threads of a cell.
        cells_per_gpu: how many cells share a GPU.
        executor: where cells run.
    """

    name: str
    output: str
    base: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    widths: tuple[int, ...]
    head_width: int | None
    depth: int | dict[str, float] | None
    budgets: tuple[float, ...] | None
    tokens_per_param: tuple[float, ...] | None
    ratio: tuple[float, float]
    hold_out: tuple[float, ...]
    learning_rate: Power | Tune | None
    schedule: Literal["run", "trunk"]
    warmup: float | None
    repeat: bool
    seeds: int
    metric: str
    noise: float
    workers: int | None
    threads: int
    cells_per_gpu: int
    executor: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of the study is."""
        return Path(self.output, self.name)

    def layers(self, width: int) -> int | None:
        """Return the layers of a size; None: as in the config."""
        return _layers(self.depth, width)


def _layers(depth: int | Mapping[str, float] | None, width: int) -> int | None:
    return max(1, round(width / depth["per_width"])) if isinstance(depth, Mapping) else depth


DEFAULTS: dict[str, Any] = {
    **{"name": None, "output": "runs", "base": None, "overrides": None, "variants": None},
    **{"widths": None, "params": None, "head_width": None, "depth": None},
    **{"budgets": None, "tokens_per_param": None, "ratio": [1, 1000], "hold_out": []},
    **{"learning_rate": "fixed", "schedule": "run", "warmup": 0.1, "repeat": False},
    **{"seeds": 1, "metric": "val_loss", "noise": 0.005},
    **{"workers": None, "threads": 1, "cells_per_gpu": 1, "executor": "local"},
}


def read(file: str | None, given: Mapping[str, Any], rest: list[str]) -> ScaleStudy:
    """Return the study of a YAML file.

    Args:
        file: its path.
        given: options of the command by the name of the study's key; they take the place of the file's values.
        rest: further words of ``llmkit fit`` for all runs.

    Raises:
        UserError: everything that is wrong, with its place.
    """
    if not file:
        raise UserError("scale needs a study: --config FILE, or a table of runs: llmkit scale fit FILE")
    problems: list[Problem] = []
    layer, values = opened(file, DEFAULTS, given, rest, problems)
    values["variants"] = _variants(values["variants"], problems)
    values["learning_rate"] = _learning_rate(values["learning_rate"], problems)
    _check(values, problems)
    if not problems:
        values["widths"] = _widths(values, values.pop("params"), problems)
    refuse(problems, layer, given)
    return ScaleStudy(**values)


def _variants(value: Any, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    value = {"model": {}} if value is None else value
    if not isinstance(value, dict) or not value or not all(isinstance(keys, dict | None) for keys in value.values()):
        text = "expected names, each with the keys it sets, such as lstm: {model.attention: lstm}"
        problems.append(Problem("variants", text))
        return {}
    for name, keys in value.items():
        if not is_below(name) or "/" in name:
            problems.append(Problem(f"variants.{name}", "the name becomes a folder: expected one without slashes"))
        for key in keys or {}:
            if (key.startswith("data.") and key != "data.batch_size") or key == "model.context":
                text = f"{key} would change the tokens or the validation text: losses could not be compared"
                problems.append(Problem(f"variants.{name}", text))
    return {name: dict(keys or {}) for name, keys in value.items()}


def _learning_rate(value: Any, problems: list[Problem]) -> Power | Tune | None:
    rules: dict[str, tuple[str, ...]] = {"fixed": (), "power": Power._fields, "tune": ("points", "factor", "seeds")}
    given = {"rule": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get("rule") not in rules:
        problems.append(Problem("learning_rate", f"expected a rule: {', '.join(rules)}, or a mapping with it"))
        return None
    settings = {key: item for key, item in given.items() if key != "rule"}
    allowed = rules[given["rule"]]
    for key in [key for key in settings if key not in allowed]:
        problems.append(Problem("learning_rate", unknown("key", key, ("rule", *allowed))))
        return None
    if not all(_is_number(item) for item in settings.values()):
        problems.append(Problem("learning_rate", f"expected numbers for {', '.join(allowed)}"))
        return None
    if given["rule"] == "power":
        if settings.get("width", 0) <= 0:
            problems.append(Problem("learning_rate", "power needs the width of the config's learning rate"))
            return None
        return Power(**settings)
    if given["rule"] == "tune":
        tune = Tune(LR, **settings)
        if tune.points < 3 or tune.factor <= 1 or tune.seeds < 1:
            text = "expected at least 3 points, a factor above 1 and at least 1 seed"
            problems.append(Problem("learning_rate", text))
        return tune
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(values: dict[str, Any], problems: list[Problem]) -> None:
    """Check single values, and turn lists into tuples."""
    for key in ("widths", "params", "budgets", "tokens_per_param", "hold_out"):
        if values[key] is None:
            continue
        found = values[key] if isinstance(values[key], list | tuple) else [values[key]]
        if not all(_is_number(item) and item > 0 for item in found):
            problems.append(Problem(key, f"expected numbers above 0, got {values[key]}"))
            continue
        values[key] = tuple(sorted(dict.fromkeys(found)))
    pairs = (("widths", "params", "the sizes"), ("budgets", "tokens_per_param", "how long each is trained"))
    for one, other, what in pairs:
        if bool(values[one]) == bool(values[other]):
            problems.append(Problem(one, f"expected {one} or {other}, one of the two: {what}"))
    if values["params"] and values["depth"] is None:
        problems.append(Problem("params", "sizes by parameters need a depth: a number of layers, or {per_width: 64}"))
    depth = values["depth"]
    per_width = isinstance(depth, dict) and [*depth] == ["per_width"] and _is_number(depth["per_width"])
    if depth is not None and not (_is_count(depth) or (per_width and depth["per_width"] > 0)):
        problems.append(Problem("depth", f"expected a number of layers or {{per_width: NUMBER}}, got {depth}"))
    for key in ("seeds", "threads", "cells_per_gpu", "workers", "head_width"):
        if not _is_count(values[key]) and not (key in ("workers", "head_width") and values[key] is None):
            problems.append(Problem(key, f"expected a whole number of at least 1, got {values[key]}"))
    ratio = values["ratio"]
    two = isinstance(ratio, list | tuple) and len(ratio) == 2 and all(map(_is_number, ratio))
    if not two or not 0 < ratio[0] < ratio[1]:
        text = f"expected the fewest and the most tokens a parameter, such as [1, 1000], got {ratio}"
        problems.append(Problem("ratio", text))
    else:
        values["ratio"] = tuple(ratio)
    if values["warmup"] is not None and not (_is_number(values["warmup"]) and 0 <= values["warmup"] < 1):
        problems.append(Problem("warmup", f"expected a share of the steps from 0 to 1, got {values['warmup']}"))
    if values["schedule"] not in ("run", "trunk"):
        text = f"expected run (each run has its own) or trunk (runs of a size share one), got {values['schedule']}"
        problems.append(Problem("schedule", text))
    if not (_is_number(values["noise"]) and values["noise"] > 0):
        problems.append(Problem("noise", f"expected a number above 0, got {values['noise']}"))
    if not isinstance(values["repeat"], bool):
        problems.append(Problem("repeat", f"expected true or false, got {values['repeat']}"))
    for key in ("name", "output", "metric"):
        if not isinstance(values[key], str):
            problems.append(Problem(key, f"expected text, got {values[key]}"))
    if isinstance(values["name"], str) and not is_below(values["name"]):
        problems.append(Problem("name", f"expected a relative path without '..', got '{values['name']}'"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _widths(values: Mapping[str, Any], params: tuple[float, ...] | None, problems: list[Problem]) -> tuple[int, ...]:
    """Return the widths, those nearest to the asked parameters by 12 x layers x width^2."""
    unit = values["head_width"] or 8
    if params:
        steps = [unit * n for n in range(1, 4096)]
        sizes = {width: 12 * (_layers(values["depth"], width) or 1) * width**2 for width in steps}
        return tuple(sorted({min(sizes, key=lambda width: abs(math.log(sizes[width] / N))) for N in params}))
    for width in values["widths"]:
        if not _is_count(width) or (values["head_width"] and width % values["head_width"]):
            by = f" that head_width {values['head_width']} divides" if values["head_width"] else ""
            problems.append(Problem("widths", f"expected whole numbers{by}, got {width}"))
    return tuple(values["widths"])

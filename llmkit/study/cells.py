"""The runs of a study: which there are, given the results so far."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.data.sources import files_of
from llmkit.errors import UserError
from llmkit.study.match import Variant, better_side
from llmkit.study.outcomes import Cell, Outcome, outcome_of
from llmkit.study.spec import Study, Tune, words
from llmkit.study.trackers import logger_words

TUNING_SEED = 1000
"""The first seed of tuning runs: the final ones begin at 0, and a seed that chose a value does not judge it."""
ROUNDS = 3
"""How often the values of a tuned key are extended at most, where the best one is at an edge."""


class StudyPlan:
    """All cells of a study, as far as the results so far determine them.

    Args:
        study: what is compared.
        variants: its variants, matched.
    """

    def __init__(self, study: Study, variants: Mapping[str, Variant]) -> None:
        self.study, self.variants = study, variants
        first = variants[study.baseline].facts
        self.metric = study.metric or first["metric"]
        self.better = better_side(self.metric, first["sides"])
        self.steps = first["steps"]
        self.root = study.folder / "cells"
        self._made: dict[tuple[str, str, int, float | None], Cell] = {}

    def outcome(self, cell: Cell) -> Outcome | None:
        """Return what became of a cell; None: it has not ended yet."""
        return outcome_of(self.root / cell.name, self.metric)

    def cells(self) -> list[Cell]:
        """Return the cells, those that tune first. There are more of them once these have ended."""
        found = [cell for name in self.variants for cell in self.tuning(name)]
        if all(self.outcome(cell) is not None for cell in found):
            for name in self.variants:
                for setting in self.settings():
                    found += self.final(name, setting).values()
        return list(dict.fromkeys(found))

    def settings(self) -> list[str]:
        """Return the columns of the results: the second cost has the name of what is made equal there."""
        return ["base", *["tuned"] * (self.study.tune is not None), *filter(None, [self.study.also])]

    def final(self, name: str, setting: str) -> dict[int, Cell]:
        """Return the runs of a variant that the verdict is about, by seed.

        With the second cost they have the value that was tuned with the first.
        """
        variant, phase = self.variants[name], "final"
        if setting == self.study.also and variant.also is not None and variant.also.tree != variant.tree:
            variant, phase = variant.also, f"final_{setting}"
        value = None if setting == "base" else self.chosen(name)[0]
        return {seed: self._cell(phase, name, seed, value, variant) for seed in range(self.study.seeds)}

    def trunk(self, name: str) -> dict[int, Cell]:
        """Return the runs of a variant that others begin from, by seed."""
        return {seed: self._cell("trunk", name, seed, None) for seed in range(self.study.seeds)}

    def trial(self, name: str) -> Cell:
        """Return the run of a variant that is a trial of a search: its seed is one that tunes."""
        return self._cell("trial", name, TUNING_SEED, None)

    def modules(self) -> list[str]:
        """Return the modules of all variants' plugins."""
        return sorted(set().union(*(plugin_modules(variant.tree) for variant in self.variants.values())))

    # Tuning

    def values(self, name: str) -> list[float]:
        """Return the values tried for a variant so far, ascending: those planned, and two further past an edge."""
        tune = self.study.tune
        if tune is None:
            return []
        start = base_value(self.variants[name], tune)
        half = int(tune.points) // 2
        powers = list(range(-half, int(tune.points) - half))
        for _ in range(ROUNDS):
            values = [start * tune.factor**power for power in powers]
            best = self._best(name, tune, values)
            if best is None or 0 < best < len(values) - 1:
                break
            powers = [powers[0] - 2, powers[0] - 1, *powers] if best == 0 else [*powers, powers[-1] + 1, powers[-1] + 2]
        return [start * tune.factor**power for power in powers]

    def tuning(self, name: str) -> list[Cell]:
        """Return the tuning runs of a variant so far."""
        return [
            self._cell("tune", name, seed, value)
            for value in self.values(name)
            for seed in tuning_seeds(self.study.tune)
        ]

    def tried(self, name: str, value: float) -> list[float | None]:
        """Return the results of a value, one for each tuning seed that has ended."""
        cells = [cell for cell in self.tuning(name) if cell.value == value]
        return [outcome.value for outcome in map(self.outcome, cells) if outcome is not None]

    def chosen(self, name: str) -> tuple[float | None, bool]:
        """Return the best value of a variant, and whether it is the first or last that was tried."""
        tune = self.study.tune
        values = self.values(name)
        best = self._best(name, tune, values) if tune else None
        return (None, False) if best is None else (values[best], best in (0, len(values) - 1))

    def _best(self, name: str, tune: Tune, values: list[float]) -> int | None:
        """Return the place of the best value, of equally good ones of that nearest to the base config's.

        None while one has not ended, or when all diverged.
        """
        scores, start = [], base_value(self.variants[name], tune)
        for value in values:
            outcomes = [self.outcome(self._cell("tune", name, seed, value)) for seed in tuning_seeds(tune)]
            if None in outcomes:
                return None
            results = [outcome.value for outcome in outcomes if outcome is not None]
            bad = None in results
            mean = math.inf if bad else sum(result for result in results if result is not None) / len(results)
            scores.append((mean if bad or self.better == "min" else -mean, abs(math.log(value / start))))
        best = min(scores)
        return None if best[0] == math.inf else scores.index(best)

    def _cell(self, phase: str, name: str, seed: int, value: float | None, variant: Variant | None = None) -> Cell:
        """Return a cell, whose name ends in a digest of all that its result depends on."""
        key = (phase, name, seed, value)
        if key not in self._made:
            variant, tune = variant or self.variants[name], self.study.tune
            own = {tune.key: value} if tune is not None and value is not None else {}
            digest = _digest(variant.tree, [sorted(own.items()), seed])
            label = f"{value:.4g}-" if phase == "tune" else ""
            full = f"{phase}/{name}/{label}seed{seed}-{digest}"
            tags = {"phase": phase, "variant": name, "seed": seed, **own}
            trackers = logger_words(variant.tree, self.study.name, full, tags)
            argv = (*variant.words, *words(own), f"--seed={seed}", *trackers)
            self._made[key] = Cell(full, argv, name, seed, value)
        return self._made[key]


def tuning_seeds(tune: Tune | None) -> range:
    """Return the seeds of tuning runs."""
    return range(TUNING_SEED, TUNING_SEED + int(tune.seeds if tune else 0))


def base_value(variant: Variant, tune: Tune) -> float:
    """Return the value of the tuned key in a variant's config. Raises UserError unless it is a number above 0."""
    found: Any = variant.tree
    for part in tune.key.split("."):
        found = found.get(part, found.get("init_args", {}).get(part)) if isinstance(found, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
        raise UserError(f"tune: {tune.key} of variant {variant.name} is {found}, expected a number above 0")
    return float(found)


def _digest(tree: Mapping[str, Any], own: Any) -> str:
    """Return eight hex digits of a config, its data and the code: what is equal in them gives equal results.

    Args:
        tree: the config.
        own: what a cell sets in it.
    """
    kept = {name: value for name, value in tree.items() if name not in ("name", "output", "ckpt_path", "weights_only")}
    data = {name: kept["data"].get(name) for name in ("train", "validation", "test")}
    parts = [json.dumps([kept, own], sort_keys=True, default=str), *_data(json.dumps(data))]
    parts += [_code(name) for name in sorted({"llmkit", *(name.partition(".")[0] for name in plugin_modules(tree))})]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


@cache
def _data(data: str) -> list[str]:
    """Return the digest of each file that the splits name."""
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in _files(json.loads(data))]


def _files(value: Any) -> Iterator[str]:
    if isinstance(value, str | list) and value:
        yield from files_of("data", value)
    elif isinstance(value, dict) and "class_path" not in value:
        for item in value.values():
            yield from _files(item)


def plugin_modules(tree: Mapping[str, Any]) -> set[str]:
    """Return the modules of a config's plugins."""
    keys = registry.plugins_in(tree)
    specs = [tree.get(group, {}).get(name) for group, _, name in (key.partition(".") for key in keys)]
    return {spec["class_path"].rpartition(".")[0] for spec in specs if isinstance(spec, dict) and "class_path" in spec}


@cache
def _code(name: str) -> str:
    """Return the digest of the code of a package, or of a module that is in none."""
    module = sys.modules.get(name)
    file = Path(getattr(module, "__file__", None) or os.devnull)
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()

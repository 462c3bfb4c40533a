"""Suggestions by Optuna, in memory: the same results in the same order always give the same suggestions.

Optuna keeps nothing on disk: its study is rebuilt from the results of the trials' folders. (Its journal file as a queue
of trials loses those that a killed process had begun.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmkit.errors import UserError
from llmkit.study.search.spec import Range, Space

DIGITS = 4
"""Significant digits of a number that is tried: a difference in rounding between machines changes no trial."""
FEWEST = 4
"""Importance is estimated from so many trials or more."""


def optuna_part() -> Any:
    """Return the package optuna. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs the package optuna: pip install 'llmkit[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Optuna's warnings that a sampler is experimental, within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Suggester:
    """Suggests trials from the results of all earlier rounds.

    Args:
        space: key -> its values.
        sampler: ``tpe`` (Bergstra et al. 2011), ``random``, ``qmc`` (a scrambled Sobol sequence) or ``gp`` (a Gaussian
            process).
        seed: of the sampler.
        better: ``min`` or ``max``.
    """

    def __init__(self, space: Space, sampler: str, seed: int, better: str) -> None:
        samplers = optuna_part().samplers
        with _quiet():
            made = {
                # Trials of one round count as bad for each other, so that they are not all at the same place.
                "tpe": lambda: samplers.TPESampler(seed=seed, constant_liar=True),
                "random": lambda: samplers.RandomSampler(seed=seed),
                "qmc": lambda: samplers.QMCSampler(seed=seed, scramble=True),
                "gp": lambda: samplers.GPSampler(seed=seed),
            }[sampler]()
        self.space, self._worst = space, math.inf if better == "min" else -math.inf
        self._study = _study(better, made)
        self._distributions = distributions(space)
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return ``count`` trials, each the value of every key."""
        with _quiet():
            self._asked = [self._study.ask(self._distributions) for _ in range(count)]
        return [{key: _value(self.space[key], item) for key, item in trial.params.items()} for trial in self._asked]

    def tell(self, results: Sequence[float | None]) -> None:
        """Take the results of the trials asked for last, in their order; None counts as the worst."""
        for trial, result in zip(self._asked, results, strict=True):
            self._study.tell(trial, self._worst if result is None else result)


def _study(better: str, sampler: Any = None) -> Any:
    return optuna_part().create_study(direction="minimize" if better == "min" else "maximize", sampler=sampler)


def distributions(space: Space) -> dict[str, Any]:
    """Return the space as Optuna has it; a choice by its labels."""
    kinds = optuna_part().distributions
    found = {}
    for key, values in space.items():
        if isinstance(values, Range):
            kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
            found[key] = kind(values.low, values.high, log=values.log)
        else:
            found[key] = kinds.CategoricalDistribution(list(values.values))
    return found


def _value(values: Any, item: Any) -> Any:
    if not isinstance(values, Range):
        return values.values[item]
    return item if values.whole else min(max(float(f"{item:.{DIGITS}g}"), values.low), values.high)


def importances(space: Space, better: str, trials: Sequence[tuple[dict[str, Any], float | None]]) -> dict[str, float]:
    """Return the share of each key in what makes trials good, by PED-ANOVA (Watanabe et al. 2023); empty if unknown.

    Args:
        space: key -> its values.
        better: ``min`` or ``max``.
        trials: value of every key, and result; None counts as the worst.
    """
    results = [result for _, result in trials if result is not None]
    if len(results) < FEWEST or len(set(results)) == 1:
        return {}
    optuna = optuna_part()
    study, kinds = _study(better), distributions(space)
    worst = max(results) if better == "min" else min(results)
    for values, result in trials:
        params = {key: _label(space[key], value) for key, value in values.items()}
        value = worst if result is None else result
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=value))
    with _quiet():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items() if math.isfinite(share)}


def _label(values: Any, item: Any) -> Any:
    return item if isinstance(values, Range) else next(label for label, value in values.values.items() if value == item)

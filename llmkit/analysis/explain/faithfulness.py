"""Whether relevances say what the model really uses: deletion, insertion, and a model with random weights.

Deletion and insertion curves: Samek et al. 2017, arXiv:1509.06321, and Petsiuk et al. 2018, arXiv:1806.07421. The area
under them gives comprehensiveness and sufficiency too (DeYoung et al. 2020, arXiv:1911.03429): the probability of the
whole text minus the area. A method that shows the same for a model with random weights explains the text, not the
model (Adebayo et al. 2018, arXiv:1810.03292).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmkit.analysis.explain.attribution import integrated_gradients, jacobian, occlusion
from llmkit.analysis.explain.rollout import rollout, shares
from llmkit.analysis.explain.scored import ScoredRow
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import evaluating
from llmkit.study.statistics import correlation

FRACTIONS = tuple(step / 10 for step in range(11))
"""Shares of the tokens that have been deleted, or inserted, at the points of a curve."""
RANDOM_ORDERS = 10
"""Of which the mean curve is what a method is compared with."""
LEAST_TOKENS = 3
"""Texts with fewer tokens have no order to speak of, and are left out."""
RESAMPLES = 2000

Method = Callable[[ScoredRow], Tensor]
"""Returns a relevance for each token of a row, (P,)."""


class Mean(NamedTuple):
    """A mean over texts with its 95 % interval (percentiles of 2,000 bootstrap samples of the texts)."""

    value: float
    low: float
    high: float


class Faithfulness(NamedTuple):
    """The figures of one method."""

    texts: int
    whole: Mean
    """The probability of the answer to the whole text. Minus ``deletion`` it is comprehensiveness, minus ``insertion``
    sufficiency."""
    deletion: Mean
    """Area under the probability as the most relevant tokens go first: small is good."""
    deletion_gain: Mean
    """By how much that is below the area of random orders."""
    insertion: Mean
    """Area under the probability as the most relevant tokens come first: large is good."""
    insertion_gain: Mean
    """By how much that is above the area of random orders."""
    randomised: Mean | None
    """Rank correlation of the relevances with those of the same network with random weights: near 0 is good."""

    def facts(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {name: list(value) if isinstance(value, Mean) else value for name, value in self._asdict().items()}


def bootstrap(values: Sequence[float], seed: int = 0) -> Mean:
    """Return the mean of values with its interval."""
    array = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return Mean(float(array.mean()), float(low), float(high))


def areas(row: ScoredRow, orders: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return the areas under the curves of deletion and of insertion for each order of the free tokens.

    The share of deleted tokens goes from 0 to 1 in tenths; deleted tokens are replaced by the baseline.
    """
    total = len(row.free)
    counts = [round(fraction * total) for fraction in FRACTIONS]
    # What k inserted tokens leave out are those that come later in the order.
    asked = [tuple(sorted(part)) for order in orders for k in counts for part in (order[:k], order[k:])]
    distinct = sorted(set(asked))
    found: dict[tuple[int, ...], float] = {}
    for first in range(0, len(distinct), 128):
        group = distinct[first : first + 128]
        found |= zip(group, row.probability(row.with_baseline(group)).tolist(), strict=True)
    points = iter(asked)
    result = []
    for _ in orders:
        curve = np.array([[found[next(points)], found[next(points)]] for _ in counts])
        area = ((curve[1:] + curve[:-1]) / 2).mean(0)
        result.append((float(area[0]), float(area[1])))
    return result


def measure(
    model: LanguageModel,
    rows: Sequence[str | Mapping[str, Any]],
    methods: Mapping[str, Method],
    seed: int = 0,
    at: int | None = None,
) -> dict[str, Faithfulness]:
    """Return the figures of each method over rows.

    Args:
        model: the model.
        rows: texts, or rows with the head's fields.
        methods: what gives relevances, by name.
        seed: of the random orders, and of the random weights.
        at: see ``ScoredRow``.

    Raises:
        UserError: no row has ``LEAST_TOKENS`` tokens.
    """
    random_model = randomised(model, seed)
    draw = np.random.default_rng(seed)
    rest: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    with evaluating(model), evaluating(random_model):
        for given in rows:
            row = ScoredRow(model, given, at)
            if len(row.free) < LEAST_TOKENS:
                continue
            orders = [draw.permutation(row.free).tolist() for _ in range(RANDOM_ORDERS)]
            relevances = {name: method(row)[row.free].cpu() for name, method in methods.items()}
            orders += [
                [row.free[place] for place in values.argsort(descending=True, stable=True).tolist()]
                for values in relevances.values()
            ]
            found = np.array(areas(row, orders))
            chance, whole = found[:RANDOM_ORDERS].mean(0), float(row.probability(row.x_RTD[None]))
            other = row.of(random_model)
            for (name, values), (deletion, insertion) in zip(relevances.items(), found[RANDOM_ORDERS:], strict=True):
                same = correlation(ranks(values), ranks(methods[name](other)[row.free].cpu()))
                same = float("nan") if same is None else same
                rest[name].append((whole, deletion, chance[0] - deletion, insertion, insertion - chance[1], same))
    if not next(iter(rest.values())):
        raise UserError(f"faithfulness needs texts of at least {LEAST_TOKENS} tokens, and there are none")
    return {name: _figures(values) for name, values in rest.items()}


def _figures(values: list[tuple[float, ...]]) -> Faithfulness:
    whole, deletion, deletion_gain, insertion, insertion_gain, same = zip(*values, strict=True)
    known = [value for value in same if not math.isnan(value)]
    return Faithfulness(
        len(values),
        bootstrap(whole),
        bootstrap(deletion),
        bootstrap(deletion_gain),
        bootstrap(insertion),
        bootstrap(insertion_gain),
        bootstrap(known) if known else None,
    )


def ranks(values_P: Tensor) -> list[float]:
    """Return the rank of each value; equal values share the mean of their ranks."""
    below = (values_P[None] < values_P[:, None]).sum(1)
    equal = (values_P[None] == values_P[:, None]).sum(1)
    found: list[float] = (below + (equal - 1) / 2).tolist()
    return found


def randomised(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Return a copy of a model with new random weights, of the network and of the head."""
    other = copy.deepcopy(model)
    assert other.tokenizer is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vocab_size = other.parts.vocab_size(other.tokenizer)
        other.net = other.parts.backbone(other.head.topology, vocab_size).to(model.device).eval()
        other.head.build(other.spec["dim"], vocab_size)
    other.head.to(model.device).eval()
    return other


def read(row: ScoredRow) -> Tensor:
    """Return how much the head reads of each position of the last layer, (P,): the norm of the score's gradient."""
    norms_P = jacobian(row, row.layers[-1])
    return norms_P / norms_P.sum().clamp(min=1e-30)


METHODS: dict[str, Method] = {
    "map": lambda row: read(row).cpu() @ shares(row.maps()[-1]),
    "rollout": lambda row: read(row).cpu() @ rollout(row.maps()),
    "integrated gradients": lambda row: integrated_gradients(row).values_P,
    "occlusion": occlusion,
    "jacobian": jacobian,
}
"""The map of the last layer (weights, implicit weights, or norms of its Jacobian) and the rollout of all maps, at the
positions that the head reads; integrated gradients; occlusion; the norm of the gradient (the Jacobian of the score)."""

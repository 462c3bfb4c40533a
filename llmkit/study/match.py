"""What each variant costs, and the width of its feedforward, or the steps, that make it cost what the baseline does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torchmetrics import Metric

from llmkit import registry
from llmkit.config.plan import plan
from llmkit.contracts import Head
from llmkit.errors import Problem, UserError, unknown
from llmkit.model.backbone import Backbone
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import CLI
from llmkit.sequence import Sequence
from llmkit.study.calibrate import Calibration
from llmkit.study.spec import Match, Study, words
from llmkit.testing.invariance import build

BuildAndDo = Callable[[Callable[[CLI], int], list[str]], int]
"""Builds everything that ``fit`` would build from these words, and calls a function with it."""

WIDTH, STEPS = "model.feedforward.hidden_multiple", "trainer.max_steps"
CLOSE = 0.01
"""Largest relative difference of matched sizes."""


@dataclass
class Variant:
    """A variant with everything that is known before it runs.

    Attributes:
        words: of ``llmkit fit``, for this variant.
        tree: its effective config.
        matched: what was set to match its cost.
        left: relative difference to the baseline's cost after that.
        costs: ``params`` (without embedding tables), ``total_params``, ``flops`` for training on a token at the
            context, ``cache``, the bytes of one sequence's decoding state at the context in fp32, and ``time``, the
            seconds of a training step, where they were measured.
        facts: of the model and data: ``metric``, ``sides``, ``steps``, ``tokens_per_step``.
        notes: what a reader should know.
        also: the same variant, matched by the study's second cost.
    """

    name: str
    words: list[str]
    tree: dict[str, Any]
    matched: dict[str, float] = field(default_factory=dict)
    left: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    also: Variant | None = None


def variants(study: Study, build_and_do: BuildAndDo) -> dict[str, Variant]:
    """Return all variants, checked, built once, and matched.

    Raises UserError for what is wrong in any of them, and for one that cannot be matched.
    """
    found: dict[str, Variant] = {}
    problems: list[str] = []
    for name, keys in study.variants.items():
        argv = [*study.base, *words(keys)]
        try:
            found[name] = Variant(name, argv, copy.deepcopy(plan("fit", argv, "compare").config.tree))
        except UserError as error:
            problems += [f"variant {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    order = [study.baseline, *(name for name in study.variants if name != study.baseline)]
    goals: dict[Match, float] = {}
    calibration = Calibration(study.folder, study.threads)
    for name in order:
        variant = found[name]
        if study.also is not None:
            variant.also = Variant(name, variant.words, variant.tree)
        build_and_do(partial(_look, study, variant, goals, calibration), variant.words)
    return found


def _look(study: Study, variant: Variant, goals: dict[Match, float], calibration: Calibration, cli: CLI) -> int:
    """Fill in costs and facts of a variant that is built, and match it to the ``goals`` of the baseline, the first."""
    model = cli.model
    build(model, cli.datamodule)
    first = not goals
    loader = cli.datamodule.train_dataloader()
    batch = next(iter(loader))
    positions = sum(batch[key].numel() for key in ("ids", "source") if key in batch)
    metric, better = model.head.monitor
    variant.facts = {
        "metric": f"val_{metric}",
        "sides": {"train_loss": "min", **_sides(model), f"val_{metric}": better},
        "steps": cli.trainer.max_steps if cli.trainer.max_steps > 0 else None,
        "tokens_per_step": positions * cli.trainer.accumulate_grad_batches * cli.trainer.world_size,
        "epoch_tokens": positions * length if (length := _length(loader)) else None,
        "context": model.context,
        "precision": str(cli.trainer.precision),
        "has_validation": bool(cli.datamodule.val_dataloader()),
    }
    timing = None
    if "time" in (study.match, study.also):
        if variant.facts["steps"] is None:
            raise UserError("match: time sets the number of steps: give trainer.max_steps")
        timing = calibration.of(cli, variant.tree)  # the last look at the model, which it trains a little
    for each, match in ((variant, study.match), (variant.also, study.also)):
        if each is None or match is None:
            continue
        if match == "time":
            assert timing is not None
            size = float(variant.facts["steps"])
            if not first:
                _match_steps(each, size, timing.ratio)
        else:
            size = _cost(model, _network(model, None), match)
            if not first and match != "none" and size != goals[match]:
                _match(each, model, goals[match], match)
        goals.setdefault(match, size)
        each.costs = _costs(model, each.matched.get(WIDTH))
        if timing is not None:
            each.costs["time"] = timing.seconds
    return 0


def _length(loader: Any) -> int | None:
    """Return the batches of an epoch; None: a stream does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _sides(model: LanguageModel) -> dict[str, str | None]:
    """Return the better side of each validation metric, as far as the metric says it; of labelled ones for all."""
    sides = {True: "max", False: "min", None: None}
    return {
        f"val_{name}{'_*' if hasattr(metric, 'labels') else ''}": sides[metric.higher_is_better]
        for name, metric in model.head.metrics("validation").items()
        if isinstance(metric, Metric)
    }


def better_side(metric: str, sides: Mapping[str, str | None]) -> str:
    """Return ``min`` or ``max``. Raises UserError for a metric that there is not, or whose better side nobody says."""
    name = next((name for name in sides if fnmatchcase(metric, name)), None)
    if name is None:
        raise UserError(Problem("metric", unknown("metric", metric, sides)))
    side = sides[name]
    if side is None:
        raise UserError(Problem("metric", f"the head does not say whether more or less of {metric} is better"))
    return side


def _match_steps(variant: Variant, steps: float, ratio: float) -> None:
    """Set the number of steps so that training takes as long as ``steps`` of the baseline."""
    count = max(1, round(steps / ratio))
    variant.left = count * ratio / steps - 1
    if abs(variant.left) > CLOSE:
        raise UserError(
            f"variant {variant.name}: cannot be matched in time: {count} steps take {variant.left:+.1%} of what the "
            "baseline's take; give trainer.max_steps more steps"
        )
    _set(variant, {STEPS: count})


def _set(variant: Variant, matched: dict[str, float]) -> None:
    variant.matched = matched
    variant.words = [*variant.words, *words(matched)]
    variant.tree = copy.deepcopy(plan("fit", variant.words, "compare").config.tree)


def _network(model: LanguageModel, multiple: float | None) -> Backbone:
    """Return the network without memory, with another width of its feedforward."""
    if multiple is None:
        return model.meta_network()
    spec = copy.deepcopy(model.parts.spec["feedforward"])
    spec["init_args"]["hidden_multiple"] = multiple
    factories = model.parts.factories
    before = factories["feedforward"]
    try:
        factories["feedforward"] = registry.resolve("feedforward", spec)
        return model.meta_network()
    finally:
        factories["feedforward"] = before


def _cost(model: LanguageModel, net: Backbone, match: Match) -> float:
    if match == "flops":
        return 3 * model.head.passes * net.flops_per_position(model.context, model.head.scored_share)
    return float(net.num_parameters()["non_embedding"] + _num_parameters(model.head))


def _num_parameters(head: Head) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def _match(variant: Variant, model: LanguageModel, goal: float, match: Match) -> None:
    """Set the feedforward's width so that the cost comes as close to ``goal`` as it can."""
    cls = registry.target_of(model.parts.factories["feedforward"])
    if "hidden_multiple" not in inspect.signature(cls).parameters:
        raise UserError(
            f"variant {variant.name}: {match} cannot be matched, because {cls.__name__} has no hidden_multiple; "
            "set match: none"
        )
    dim = model.spec["dim"]

    def size(hidden: int) -> float:
        return _cost(model, _network(model, hidden / dim), match)

    low, high = 1, 64 * dim  # the hidden width, which the size grows with
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= goal else (low, middle)
    # A width that is rounded up, SwiGLU's, takes the nearest of the sizes that there are.
    best = min((low, high), key=lambda hidden: abs(size(hidden) - goal))
    variant.left = size(best) / goal - 1
    if abs(variant.left) > CLOSE:
        raise UserError(
            f"variant {variant.name}: cannot be matched in {match}: even at a feedforward of width {best} it has "
            f"{variant.left:+.1%} of the baseline's; change its other keys, or set match: none"
        )
    if not 1 <= best / dim <= 8:
        variant.notes.append(f"its feedforward is {best / dim:.2g} times the width: outside the usual 1 to 8")
    _set(variant, {WIDTH: best / dim})


def _costs(model: LanguageModel, multiple: float | None) -> dict[str, float]:
    net = _network(model, multiple)
    costs = {
        "params": _cost(model, net, "params"),
        "total_params": float(net.num_parameters()["total"] + _num_parameters(model.head)),
        "flops": _cost(model, net, "flops"),
    }
    if net.topology != "encoder":
        costs["cache"] = _cache(net, model.context)
    return costs


@torch.no_grad()
def _cache(net: Backbone, context: int) -> float:
    """Return the bytes of what one sequence of full length keeps while it is decoded, in fp32."""
    with torch.device("meta"):
        ids = torch.zeros(1, context, dtype=torch.long)
        memory = net.encode(ids, Sequence.of(ids)) if net.topology == "encoder_decoder" else None
        states = net.init_state(1, context)
        if states is None:
            return 0.0
        net.decode(ids, Sequence.of(ids), memory=memory, state=states)
    return float(sum(4 * value.numel() for state in states for value in state.values() if value.is_floating_point()))

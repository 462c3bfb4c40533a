"""The runs of a study of sizes: what each size costs, how many steps each budget gives it, and its learning rate."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmkit.config.plan import plan
from llmkit.errors import Problem, UserError, note
from llmkit.model.optim import WarmupStableDecay
from llmkit.study.calibrate import stepper
from llmkit.study.cells import StudyPlan, base_value
from llmkit.study.match import STEPS, BuildAndDo, Variant, variants
from llmkit.study.scaling.spec import LR, Power, ScaleStudy
from llmkit.study.spec import Study, Tune, words
from llmkit.testing import invariance

Rule = Callable[[float], float]
"""The learning rate of a number of parameters."""
DECAY = "model.scheduler.decay_share"
FEWEST = 10
"""A run has at least so many steps."""


@dataclass(eq=False)
class Size:
    """A size of a variant.

    Attributes:
        variant: the name of the variant.
        width: its ``model.dim``.
        built: its config, costs and facts.
        seconds: of a training step, where it was timed.
        shortest: steps of its shortest run.
    """

    variant: str
    width: int
    built: Variant
    seconds: float | None = None
    shortest: int = 0

    @property
    def params(self) -> float:
        """Parameters without embedding tables."""
        return self.built.costs["params"]

    @property
    def decay_share(self) -> float | None:
        """Share of the steps in which the rate decays by the schedule ``wsd``; None: the schedule is another one."""
        scheduler = self.built.tree["model"].get("scheduler") or {}
        ours = str(scheduler.get("class_path")).rpartition(".")[2] == WarmupStableDecay.__name__
        return float(scheduler["init_args"]["decay_share"]) if ours else None

    def steps(self, tokens: float) -> int:
        """Return the steps that come closest to a number of tokens."""
        return round(tokens / float(self.built.facts["tokens_per_step"]))


@dataclass(frozen=True)
class Point:
    """Runs of a size on a number of tokens, one for each seed."""

    size: Size
    steps: int
    target: float
    """The budget in FLOPs, or the tokens a parameter, as it was asked for."""

    @property
    def name(self) -> str:
        """Variant, width and target."""
        return f"{self.size.variant}-d{self.size.width}-{self.target:.3g}"

    @property
    def tokens(self) -> float:
        """Training tokens."""
        return float(self.steps * self.size.built.facts["tokens_per_step"])

    @property
    def flops(self) -> float:
        """Training FLOPs, counted."""
        return self.tokens * self.size.built.costs["flops"]

    @property
    def epochs(self) -> float | None:
        """How often the tokens of the data are seen; None: a stream does not say."""
        whole = self.size.built.facts["epoch_tokens"]
        return self.tokens / whole if whole else None


def as_study(study: ScaleStudy, names: Mapping[str, dict[str, Any]], tune: Tune | None = None) -> Study:
    """Return runs as the variants of a comparison that nothing is matched in."""
    return Study(
        name=study.name,
        output=study.output,
        base=study.base,
        variants=dict(names),
        baseline=next(iter(names)),
        match="none",
        also=None,
        tune=tune,
        seeds=study.seeds,
        metric=study.metric,
        margin=None,
        workers=study.workers,
        threads=study.threads,
        cells_per_gpu=study.cells_per_gpu,
        executor=study.executor,
    )


def sizes(study: ScaleStudy, build: BuildAndDo) -> list[Size]:
    """Return all sizes of all variants, each built once. Raises UserError for what is wrong in any of them."""
    keys: dict[str, dict[str, Any]] = {}
    where: dict[str, tuple[str, int]] = {}
    for name, own in study.variants.items():
        heads = _has_heads([*study.base, *words(own)])
        for width in study.widths:
            label = f"{name}-d{width}"
            keys[label] = {**own, "model.dim": width}
            if (layers := study.layers(width)) is not None:
                keys[label]["model.num_layers"] = layers
            if heads and study.head_width:
                keys[label]["model.attention.num_heads"] = width // study.head_width
            where[label] = name, width
    built = variants(as_study(study, keys), build)
    return [Size(*where[label], built[label]) for label in keys]


def _has_heads(argv: list[str]) -> bool:
    attention = plan("fit", argv, "scale").config.tree["model"]["attention"]
    return "num_heads" in attention.get("init_args", {})


def timed(found: Iterable[Size], build: BuildAndDo) -> None:
    """Fill in the seconds of a training step of each size: the faster of two, after one that is not timed."""

    def look(size: Size, cli: Any) -> int:
        invariance.build(cli.model, cli.datamodule)
        step, seconds = stepper(cli), []
        for _ in range(3):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        size.seconds = min(seconds[1:])
        return 0

    for size in found:
        build(partial(look, size), size.built.words)


def points(study: ScaleStudy, found: list[Size]) -> list[Point]:
    """Return the runs that the surface is fitted to.

    Raises UserError for budgets that no size fits, and for tokens that would be repeated without ``repeat``.
    """
    if study.budgets is not None:
        return _allowed(study, [*_at_budgets(study, found, study.budgets, "budgets")])
    assert study.tokens_per_param is not None
    grid = [Point(size, size.steps(ratio * size.params), ratio) for ratio in study.tokens_per_param for size in found]
    if short := [point for point in grid if point.steps < FEWEST]:
        text = f"{short[0].target:g} tokens a parameter are {short[0].steps} steps of width {short[0].size.width}"
        raise UserError(Problem("tokens_per_param", f"{text}; a run has at least {FEWEST}"))
    return _allowed(study, grid)


def held_out(study: ScaleStudy, found: list[Size]) -> list[Point]:
    """Return the runs that are predicted. Raises UserError as ``points``."""
    return _allowed(study, [*_at_budgets(study, found, study.hold_out, "hold_out")])


def _at_budgets(study: ScaleStudy, found: list[Size], budgets: Iterable[float], key: str) -> Iterable[Point]:
    low, high = study.ratio
    for C in budgets:
        grid = [Point(size, size.steps(C / size.built.costs["flops"]), C) for size in found]
        long = [point for point in grid if point.steps >= FEWEST]
        if not long:
            text = f"{C:.3g} FLOPs are less than {FEWEST} steps of every size; the smallest makes {grid[0].steps}"
            raise UserError(Problem(key, text))
        fitting = [point for point in long if low <= point.tokens / point.size.params <= high]
        if not fitting:
            ratios = [point.tokens / point.size.params for point in long]
            text = f"{C:.3g} FLOPs give {min(ratios):.3g} to {max(ratios):.3g} tokens a parameter"
            raise UserError(Problem(key, f"{text}, and ratio allows {low:g} to {high:g}: no size fits"))
        yield from fitting


def _allowed(study: ScaleStudy, grid: list[Point]) -> list[Point]:
    most = max((point for point in grid if point.epochs), key=lambda point: point.epochs or 0, default=None)
    if most is not None and (most.epochs or 0) > 1:
        text = f"{most.name} sees its tokens {most.epochs:.3g} times"
        if not study.repeat:
            fewer = "give more data or smaller budgets, or set repeat: true"
            raise UserError(Problem("repeat", f"{text}; repeated tokens are worth less than new ones: {fewer}"))
        note(f"{text}; repeated tokens are worth less than new ones, but count as much in D")
    for point in grid:
        point.size.shortest = min(point.size.shortest or point.steps, point.steps)
    return grid


def tuning_points(study: ScaleStudy, grid: list[Point]) -> dict[str, list[Point]]:
    """Return, for each variant, the smallest and the largest size at the middle one of their budgets."""
    found: dict[str, list[Point]] = {}
    for name in study.variants:
        own = [point for point in grid if point.size.variant == name]
        for width in (min(p.size.width for p in own), max(p.size.width for p in own)):
            at = sorted((p for p in own if p.size.width == width), key=lambda p: p.steps)
            found.setdefault(name, []).append(at[(len(at) - 1) // 2])
    return {name: list(dict.fromkeys(points)) for name, points in found.items()}


def with_keys(
    study: ScaleStudy, name: str, size: Size, steps: int, rates: Mapping[str, Rule], decays: bool = True
) -> Variant:
    """Return the config of a run as a variant: its steps, warmup and learning rate, and whether it decays."""
    built = size.built
    keys: dict[str, Any] = {STEPS: steps}
    if study.schedule == "trunk":  # given for all: a run would take it from its trunk's checkpoint
        keys[DECAY] = size.decay_share if decays else 0
    if (warmup := warmup_steps(study, size, steps)) is not None:
        keys["model.scheduler.warmup_steps"] = warmup
    if (rate := _rate(study, size, rates)) is not None:
        keys[LR] = rate
    argv = [*built.words, *words(keys)]
    tree = copy.deepcopy(plan("fit", argv, "scale").config.tree)
    return Variant(name, argv, tree, keys, costs=built.costs, facts={**built.facts, "steps": steps})


def warmup_steps(study: ScaleStudy, size: Size, steps: int) -> int | None:
    """Return the warmup of a run; None: as in the config. Runs that share a trunk have that of the shortest one."""
    scheduler = size.built.tree["model"].get("scheduler") or {}
    if study.warmup is None or "warmup_steps" not in scheduler.get("init_args", {}):
        return None
    return round(study.warmup * (size.shortest if study.schedule == "trunk" else steps))


def _rate(study: ScaleStudy, size: Size, rates: Mapping[str, Rule]) -> float | None:
    rule = study.learning_rate
    if isinstance(rule, Power):
        return float(base_value(size.built, Tune(LR)) * (size.width / rule.width) ** rule.exponent)
    if size.variant not in rates:
        return None
    return float(f"{rates[size.variant](size.params):.6g}")


def interpolated(tuned: Mapping[float, float]) -> Rule:
    """Return the learning rate of a size from those of two sizes: a power law through both."""
    x, y = np.log(list(tuned)), np.log(list(tuned.values()))
    slope, offset = np.polyfit(x, y, 1) if len(x) > 1 else (0.0, y[0])
    return lambda params: math.exp(slope * math.log(params) + offset)


def planned(study: ScaleStudy, grid: list[Point], rates: Mapping[str, Rule], tune: Tune | None = None) -> StudyPlan:
    """Return the cells of points."""
    found = {point.name: with_keys(study, point.name, point.size, point.steps, rates) for point in grid}
    return StudyPlan(as_study(study, {name: variant.matched for name, variant in found.items()}, tune), found)

"""One trunk for each size: runs of all budgets share it at a constant rate, and leave it where their decay begins.

The trunk is a chain of cells. Each begins from the last checkpoint of the one before and ends where a decay begins, so
a run of so many steps with the schedule ``wsd`` is the trunk up to there and its decay, to the bit. A study trains the
steps of the longest run of each size and the decays of the others (Hägele et al. 2024, arXiv:2405.18392).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmkit.errors import Problem, UserError
from llmkit.model.optim import WarmupStableDecay
from llmkit.study.cells import StudyPlan
from llmkit.study.outcomes import Cell
from llmkit.study.scaling.grid import DECAY, Point, Rule, Size, as_study, warmup_steps, with_keys
from llmkit.study.scaling.spec import ScaleStudy


class Segment(NamedTuple):
    """The trunk of a size up to a step, from where the one before ends."""

    size: Size
    steps: int

    @property
    def name(self) -> str:
        """Variant, width and step."""
        return f"{self.size.variant}-d{self.size.width}-step{self.steps}"


def check(study: ScaleStudy, points: Sequence[Point]) -> None:
    """Raise UserError for runs whose schedule has no decay, or one that begins within the warmup."""
    for point in points:
        scheduler = point.size.built.tree["model"]["scheduler"]
        if not point.size.decay_share:
            name = str(scheduler["class_path"]).rpartition(".")[2]
            what = f"{DECAY} is 0" if point.size.decay_share == 0 else f"the schedule is {name}"
            text = f"trunk needs model.scheduler: wsd with a decay, but {what}; set it in overrides, or schedule: run"
            raise UserError(Problem("schedule", text))
        own = warmup_steps(study, point.size, point.steps)
        warmup = scheduler["init_args"]["warmup_steps"] if own is None else own
        if start(point) < max(1, warmup):
            text = f"the decay of {point.name} begins at step {start(point)}, within the warmup of {warmup} steps"
            raise UserError(Problem("warmup", text))


def start(point: Point) -> int:
    """Return the step of the trunk at which the decay of a run begins."""
    return point.steps - WarmupStableDecay.decay_steps(point.size.decay_share or 0.0, point.steps)


def parts(points: Sequence[Point]) -> list[Point]:
    """Return what is trained for these runs: the trunk of each size, once, and the decays."""
    ends: dict[Size, int] = {}
    for point in points:
        ends[point.size] = max(ends.get(point.size, 0), start(point))
    trunks = [Point(size, steps, 0.0) for size, steps in ends.items()]
    return trunks + [Point(point.size, point.steps - start(point), point.target) for point in points]


class Trunks:
    """The trunks of a study.

    Args:
        study: the study.
        points: all of its runs, those that are held out too.
        rates: the learning rates of its variants.
    """

    def __init__(self, study: ScaleStudy, points: Sequence[Point], rates: Mapping[str, Rule]) -> None:
        chains: dict[Size, set[int]] = {}
        for point in points:
            chains.setdefault(point.size, set()).add(start(point))
        self.chains = {size: [Segment(size, steps) for steps in sorted(ends)] for size, ends in chains.items()}
        found = {
            segment.name: with_keys(study, segment.name, segment.size, segment.steps, rates, decays=False)
            for chain in self.chains.values()
            for segment in chain
        }
        self.plan = StudyPlan(as_study(study, {name: variant.matched for name, variant in found.items()}), found)
        self.seeds = range(study.seeds)

    def waves(self, points: Sequence[Point], plan: StudyPlan) -> list[list[Cell]]:
        """Return the cells of points and the trunks that they need, in groups: each needs those before it only."""
        waves: list[list[Cell]] = []
        for size, chain in self.chains.items():
            own = [point for point in points if point.size is size]
            for place, segment in enumerate(chain):
                if not any(start(point) >= segment.steps for point in own):
                    break
                while len(waves) < place + 2:
                    waves.append([])
                before = self.plan.trunk(chain[place - 1].name) if place else {}
                trunk = self.plan.trunk(segment.name)
                waves[place] += [_from(trunk[seed], before.get(seed)) for seed in self.seeds]
                for point in own:
                    if start(point) == segment.steps:
                        final = plan.final(point.name, "base")
                        waves[place + 1] += [_from(final[seed], trunk[seed]) for seed in self.seeds]
        return waves

    def usable(self, cell: Cell) -> str | None:
        """Return why a cell cannot begin: its trunk has ``diverged`` or ``failed``; None: it can."""
        if cell.begins is None:
            return None
        outcome: Any = self.plan.outcome(dataclasses.replace(cell, name=cell.begins))
        return "failed" if outcome is None else "diverged" if outcome.value is None else None


def _from(cell: Cell, trunk: Cell | None) -> Cell:
    return cell if trunk is None else dataclasses.replace(cell, begins=trunk.name)

"""Peak memory of training: llmkit beside other libraries, with a vocabulary of 8,192 and of 50,304.

    python benchmarks/memory.py

Each contestant trains in a process of its own, after a first step of a tiny model that has everything imported. What
counts is the process's largest resident memory less what it had then: weights, gradients, moments, activations and
whatever else a step takes.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from kit import OURS, Report, arguments
from peers import PEERS, Shape
from train import batches, ours
from turns import Outcome, Seat, plain, step_of, take_turns

SHAPES = [Shape(6, 384, 6, 256, 12, vocab) for vocab in (8192, 50304)]
TINY = Shape(1, 16, 2, 8, 2, 65)
STEPS = 1


def trained_by_us(seat: Seat, shape: Shape) -> None:
    """Train by ``llmkit fit``: first the tiny model, then the real one."""
    first = Seat(_Nobody(), seat.device)  # type: ignore[arg-type]
    ours(first, TINY, 1, {})
    seat.begin()
    ours(seat, shape, STEPS, {})


def trained_by(seat: Seat, peer: str, shape: Shape) -> None:
    """Train by a plain loop: first the tiny model, then the real one."""
    step_of(*PEERS[peer](TINY), batches(TINY))()
    seat.begin()
    plain(seat, step_of(*PEERS[peer](shape), batches(shape, 2)), STEPS)


class _Nobody:
    """Who calls the turns of a run that nobody waits for: there are none."""

    def send(self, said: object) -> None:
        """Hear nothing."""

    def recv(self) -> str:
        """Have the run end."""
        return "stop"


def measured(shape: Shape) -> dict[str, Outcome]:
    """Let each contestant take its step."""
    contestants = {
        OURS: functools.partial(trained_by_us, shape=shape),
        **{peer: functools.partial(trained_by, peer=peer, shape=shape) for peer in PEERS},
    }
    return take_turns(contestants, cycles=1, warm=0)


def main() -> None:
    """Measure both vocabularies."""
    args = arguments(__doc__)
    report = Report("memory", args.json)
    peaks: dict[str, list[int]] = {}
    parameters = []
    with ThreadPoolExecutor() as both:  # nothing is timed
        outcomes = list(both.map(measured, SHAPES))
    for shape, found in zip(SHAPES, outcomes, strict=True):
        parameters.append(found[OURS].facts["parameters"])
        own = found[OURS].facts["peak"]
        for name, outcome in found.items():
            if outcome.missing:
                report.add(str(shape), name, None, "MiB", note=f"missing: {outcome.missing}")
                continue
            peak = outcome.facts["peak"]
            peaks.setdefault(name, []).append(peak)
            rest = {} if name == OURS else {"ratio": round(peak / own, 3)}
            if name == "litgpt" and shape.vocab == 8192:
                rest |= {"goal": "at least 1.25 (20 % less)", "met": peak >= 1.25 * own}
            if name == OURS:
                stored = 16 * parameters[-1]  # weight, gradient and two moments of four bytes
                rest |= {"limit": round(stored / peak, 3), "note": "limit: weights, gradients and moments alone"}
            report.add(str(shape), name, round(peak / 2**20, 1), "MiB", **rest)
    added = parameters[1] - parameters[0]
    for name, (small, large) in peaks.items():
        rest = {"goal": "near 16: weight, gradient, two moments"} if name == OURS else {}
        report.add("from 8192 to 50304", name, round((large - small) / added, 1), "bytes an added weight", **rest)
    report.close()


if __name__ == "__main__":
    main()

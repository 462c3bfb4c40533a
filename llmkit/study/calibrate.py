"""How much longer a training step of one variant takes than one of another: measured once, by turns, and kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from llmkit.run.cli import CLI
from llmkit.run.saving import write_text
from llmkit.sequence import on_device

FILE = "calibration.json"
ROUNDS = 9
"""How often both are timed, one directly after the other, the order changing each time."""
WARMUP, BLOCK = 3, 0.1
"""Steps of each that are not timed, and the seconds that the baseline's steps of a round take at least."""

Step = Callable[[], None]


class Timing(NamedTuple):
    """How long a training step takes."""

    ratio: float
    """Of its time to that of a step of the baseline: the median over the rounds."""
    seconds: float
    """The baseline's median, times the ratio."""


def stepper(cli: CLI) -> Step:
    """Return what makes one optimizer step of a model that is built: always on the same batches."""
    model, trainer = cli.model, cli.trainer
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    precision.convert_module(model.to(device)).train()
    optimizer = model.parts.optimizer(model.groups())
    loader = cli.datamodule.train_dataloader()
    batches = [on_device(batch, device) for batch in islice(loader, trainer.accumulate_grad_batches)]

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            with precision.forward_context():
                loss = model.head.loss(model.network, batch)
            (loss.total / loss.count.clamp(min=1) / len(batches)).backward()
        if trainer.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clip_val)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def compared(base: Step, other: Step, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Return how long ``other`` takes next to ``base``; what slows the machine down for a while slows down both."""

    def timed(step: Step, count: int) -> float:
        begin = clock()
        for _ in range(count):
            step()
        return (clock() - begin) / count

    for _ in range(WARMUP):
        base()
        other()
    count = max(1, math.ceil(BLOCK / max(timed(base, 1), 1e-6)))
    pairs = []
    for number in range(ROUNDS):
        order = [base, other] if number % 2 else [other, base]
        seconds = {step: timed(step, count) for step in order}
        pairs.append((seconds[base], seconds[other]))
    ratio = median(b / a for a, b in pairs)
    return Timing(ratio, ratio * median(a for a, _ in pairs))


class Calibration:
    """The timings of a study, kept in its folder: the same plan and report come of them whenever it is resumed.

    Args:
        folder: the study's.
        threads: CPU threads of a run.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.file, self.threads = folder / FILE, threads
        self._base: Step | None = None
        self._first: tuple[CLI, Mapping[str, Any]] | None = None

    def of(self, cli: CLI, tree: Mapping[str, Any]) -> Timing:
        """Return the timing of a variant, the first of which is the baseline; measured unless it is known."""
        self._first = self._first or (cli, tree)
        base, base_tree = self._first
        device = cli.trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        trees = [{group: each[group] for group in ("model", "data", "trainer")} for each in (base_tree, tree)]
        text = json.dumps([trees, name, self.threads], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        if key not in known:
            with _threads(self.threads):
                self._base = self._base or stepper(base)
                known[key] = compared(self._base, self._base if cli is base else stepper(cli))._asdict()
            write_text(self.file, json.dumps(known, indent=1) + "\n")
        return Timing(**known[key])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

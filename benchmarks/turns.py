"""Training runs that take turns, each in a process of its own, so that none profits from what another one set up.

A contestant is a function that is given a ``Seat``. It builds what it needs and then does a block of steps at each of
its turns; but for the warm-up only one process works at a time, and each reads its own clock.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PEER_MODULES = ("litgpt", "x_transformers", "transformers.models.gpt2.modeling_gpt2", "joeynmt.model")
CONTEXT = multiprocessing.get_context("forkserver")
"""Imports once what its contestants need; peers that are not installed are passed over."""
CONTEXT.set_forkserver_preload(["kit", "lightning.pytorch", "llmkit.main", *PEER_MODULES])
if Path(getattr(sys.modules["__main__"], "__file__", "")).parent.name == "benchmarks":
    forkserver.ensure_running()  # a script begins, not a test or a contestant: its own imports run meanwhile

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from kit import clock, quiet, silent  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from llmkit import LanguageModel, main  # noqa: E402

Step = Callable[[], Any]
"""Does one training step."""


class Seat:
    """A contestant's end of the line to the others.

    Args:
        pipe: to who calls the turns.
        device: where it works.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.facts: dict[str, Any] = {}
        """What the contestant knows of itself, as its number of parameters; told at the end."""
        self.begin()

    def begin(self) -> None:
        """Have the memory that the process has now count for nothing."""
        self._before = _resident()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def turns(self) -> Iterator[None]:
        """Yield at each turn; the work until the next one is asked for is clocked."""
        self.pipe.send("ready")
        while self.pipe.recv() == "go":
            start, wall = clock(self.device), time.perf_counter()
            yield
            self.pipe.send((clock(self.device) - start, time.perf_counter() - wall))
        self.facts["peak"] = self._peak() - self._before
        self.pipe.send(self.facts)

    def _peak(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclasses.dataclass
class Outcome:
    """What came of a contestant: seconds of each turn by its own clock and by the wall, and its facts."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""


def take_turns(
    contestants: Mapping[str, Callable[[Seat], None]], cycles: int = 5, warm: int = 1, device: str = "cpu"
) -> dict[str, Outcome]:
    """Let each have its turn, ``cycles`` times after ``warm`` that do not count; every other cycle goes backwards.

    Raises:
        RuntimeError: when a contestant fails otherwise than by a missing package.
    """
    outcomes = {name: Outcome() for name in contestants}
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, run in contestants.items():
            pipes[name], theirs = CONTEXT.Pipe()
            processes.append(CONTEXT.Process(target=_sit, args=(theirs, run, device), daemon=True))
            processes[-1].start()
            theirs.close()
        for name in contestants:
            said = _hear(pipes[name], name)
            if said != "ready":
                outcomes[name].missing = f"not installed ({said})"
                pipes.pop(name).close()
        for _ in range(warm):  # side by side
            for pipe in pipes.values():
                pipe.send("go")
            for name, pipe in pipes.items():
                _hear(pipe, name)
        for cycle in range(cycles):
            for name in list(pipes)[:: 1 if cycle % 2 else -1]:
                pipes[name].send("go")
                seconds, wall = _hear(pipes[name], name)
                outcomes[name].seconds.append(seconds)
                outcomes[name].wall.append(wall)
        for name, pipe in pipes.items():
            pipe.send("stop")
            outcomes[name].facts = _hear(pipe, name)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return outcomes


def _hear(pipe: Connection, name: str) -> Any:
    said = pipe.recv()
    if isinstance(said, BaseException):
        raise RuntimeError(f"{name} failed: {said}")
    return said


def _sit(pipe: Connection, run: Callable[[Seat], None], device: str) -> None:
    """Be a contestant."""
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with silent():
            run(Seat(pipe, device))
    except ImportError as error:
        pipe.send(str(error))
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))


def _resident() -> int:
    """Return the bytes of memory that the process has now; elsewhere than on Linux 0."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


class Turns(Callback):
    """Has a training run wait for its turn after each block of steps."""

    seat: Seat
    block: int

    def __init__(self) -> None:
        self._steps = 0
        self._turns = Turns.seat.turns()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the turn when the block is full; the first block comes before all turns, and their end ends the run."""
        self._steps += 1
        if self._steps % Turns.block == 0 and next(self._turns, "over") == "over":
            trainer.should_stop = True
        if self._steps == 1 and isinstance(pl_module, LanguageModel):
            network = pl_module.network
            Turns.seat.facts["parameters"] = network.num_parameters()["total"]
            Turns.seat.facts["flops"] = 3 * network.flops_per_position(network.max_length)


def fit(seat: Seat, words: Sequence[str], block: int) -> None:
    """Be a contestant by ``llmkit fit``.

    Args:
        seat: the contestant's.
        words: what follows ``llmkit fit``; the length of the run, the output folder and the turns are added.
        block: steps a turn.
    """
    Turns.seat, Turns.block = seat, block
    with tempfile.TemporaryDirectory() as folder:
        ends = ["--trainer.max_steps", "10000", "--trainer.val_check_interval", "10000", "--output", folder]
        ends += ["--trainer.limit_val_batches", "1"]  # the validation after the last turn is nobody's
        code = main.main(["fit", *words, *ends, "--imports", "turns", "--trainer.callbacks+=turns.Turns"])
    if code:
        raise RuntimeError(f"llmkit fit {' '.join(words)}: exit code {code}")


def plain(seat: Seat, step: Step, block: int) -> None:
    """Be a contestant by a plain loop.

    Args:
        seat: the contestant's.
        step: one training step.
        block: steps a turn.
    """
    for _ in seat.turns():
        for _ in range(block):
            step()


def step_of(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Sequence[tuple[Any, ...]],
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Return a plain loop's step: loss, gradient, norm clipped at 1, AdamW in its fused form.

    Args:
        model: whose parameters are trained.
        loss: of a batch.
        batches: taken in turn, ready on the device.
        optimizer: None: ``torch.optim.AdamW`` with the settings llmkit has.
        dtype: below float32 the loss is computed under autocast.
    """
    adam = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    count = 0
    device = batches[0][0].device.type

    def step() -> None:
        nonlocal count
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss(*batches[count % len(batches)])
        count += 1
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def text_of(vocab: int, positions: int, folder: Path) -> Path:
    """Write a text of so many different characters, for models whose vocabulary has to be of a certain size."""
    generator = torch.Generator().manual_seed(0)
    letters = [chr(code) for code in range(0x4E00, 0x20000) if not 0xD800 <= code < 0xE000][:vocab]  # no surrogates
    ids = torch.randint(vocab, (positions,), generator=generator).tolist()
    path = folder / "text.txt"
    path.write_text("".join(letters) + "".join(letters[number] for number in ids), encoding="utf-8")
    return path

"""Check that a run that is killed and resumed equals the undisturbed run, to the last bit.

    verdict = resume.check(["--config", "x.yaml"], Path("runs"), steps=40, kills=6, seed=0)
    assert not verdict.differences, verdict.differences

``llmkit verify resume --config FILE`` prints the same as text.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmkit.checkpoint.content import read
from llmkit.errors import UserError
from llmkit.lightning import batches_begun
from llmkit.model.language_model import LanguageModel
from llmkit.run.saving import PART

MOMENTS = ("step", "validation", "writing")
"""When a run is killed: at a training step, during a validation, or while a checkpoint is being written."""


class RunFailed(UserError):  # noqa: N818
    """A run that failed on its own, with what it wrote to stderr."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(message)
        self.stderr = stderr


@dataclass
class Kill:
    """One SIGKILL."""

    moment: str
    """The one of ``MOMENTS`` that was aimed at."""
    batch: int
    """Number of batches that the run had trained on."""
    resumed_at: int = 0
    """Optimizer step at which the next process resumed; 0: there was no checkpoint yet."""


@dataclass
class Verdict:
    """The kills, how much was compared, and what differs."""

    kills: list[Kill] = field(default_factory=list)
    batches: int = 0
    validations: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)


def check(
    argv: list[str], folder: Path, steps: int, kills: int, seed: int, log: Callable[[str], None] = lambda line: None
) -> Verdict:
    """Run a config once undisturbed and once killed and resumed, and compare the two runs.

    Args:
        argv: the arguments after ``llmkit fit``.
        folder: where both runs are written.
        steps: optimizer steps of a run, unless ``argv`` sets them.
        kills: how often the second run is killed.
        seed: seed for the moments of the kills.
        log: called with a line of text on each event.

    Raises:
        RunFailed: a run fails on its own.
    """
    own = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": max(1, steps // 4),
        "trainer.limit_val_batches": 4,
        "trainer.deterministic": "warn",
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": 3,
    }
    given = {word.split("=", 1)[0] for word in argv}
    argv = [*argv, *(f"--{key}={value}" for key, value in own.items() if f"--{key}" not in given)]
    log(f"undisturbed run: {steps} steps; the killed run that follows begins {kills + 1} times and takes longer")
    begun = time.time()
    whole = Process(argv, folder / "whole")
    if whole.wait() != 0:
        raise RunFailed("the run fails on its own, without a kill", whole.stderr())
    ended, lines = time.time(), whole.lines()
    first = min((line["time"] for line in lines), default=ended)
    seconds = (ended - first) + (kills + 1) * (first - begun)
    log(f"it took {ended - begun:.0f} s; the killed run takes about {seconds:.0f} s")
    numbers = [line["at"] for line in lines if line["event"] == "batch"]
    verdict = Verdict(batches=len(numbers), validations=sum(line["event"] == "validation" for line in lines))
    rng = random.Random(seed)
    processes: list[Process] = []
    for number in range(kills + 1):
        process = Process([*argv, *(["--ckpt_path", "last"] if processes else [])], folder / "killed")
        processes.append(process)
        if number < kills:
            # Each kill has its own part of the run, and a random place in it. With 90 batches and 2 kills: one kill
            # in batches 1 to 30, one in 31 to 60; the last third runs to the end.
            aim = 1 + int((number + rng.random()) * len(numbers) / (kills + 1))
            moment = MOMENTS[number % len(MOMENTS)]
            batch = process.kill_at(moment, aim, rng.random())
            if batch is not None:
                verdict.kills.append(Kill(moment, batch))
                log(f"kill {len(verdict.kills)}: at batch {batch} of {len(numbers)} ({moment})")
        code = process.wait()
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RunFailed(f"a resumed run fails after {len(verdict.kills)} kill(s)", process.stderr())
    log("comparing both runs")
    for kill, process in zip(verdict.kills, processes[1:], strict=False):
        kill.resumed_at = next((line["at"] for line in process.lines() if line["event"] == "start"), 0)
    verdict.differences = [*lines_differ(lines, [line for process in processes for line in process.lines()])]
    files = [*files_of(folder / "whole")], [*files_of(folder / "killed")]
    for (name, one), (_, two) in zip(*files, strict=True):
        verdict.tensors += differ(one, two, name, verdict.differences)
    return verdict


class Trace(Callback):
    """Writes each loss and each validation metric as exact hexadecimal, a JSON line per event.

    Args:
        folder: gets one file per process, ``PID.jsonl``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file and write the step at which training starts or resumes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{os.getpid()}.jsonl"
        self._file = path.open("w", encoding="utf-8", buffering=1)  # line buffered: a SIGKILL loses no line
        self._write(event="start", at=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the loss of a batch (of the step so far, if batches are accumulated)."""
        assert isinstance(pl_module, LanguageModel)
        loss = float(pl_module.last_loss).hex()
        self._write(event="batch", at=batches_begun(trainer), step=trainer.global_step, loss=loss)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write that a validation begins; ``Process.kill_at`` waits for it."""
        if trainer.state.fn == "fit":
            self._write(event="validation begins", at=batches_begun(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics of a validation."""
        if trainer.state.fn == "fit":
            metrics = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            self._write(event="validation", at=batches_begun(trainer), step=trainer.global_step, **metrics)

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps({**line, "time": time.time()}) + "\n")


TRACE = f"{Trace.__module__}.{Trace.__qualname__}"
"""Class path of the callback, for the command line of the child process."""


class Process:
    """A training process with a trace of what it computes.

    Args:
        argv: the arguments after ``llmkit fit``.
        output: the folder for its runs and its trace.
    """

    def __init__(self, argv: list[str], output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        folder = output / "trace"
        trace = {"class_path": TRACE, "init_args": {"folder": str(folder)}}
        command = [sys.executable, "-m", "llmkit", "fit", *argv, f"--output={output}", "--name=run"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, f"--trainer.callbacks+={json.dumps(trace)}"],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            # The child must find llmkit and plugins where this process does.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.trace = folder / f"{self.process.pid}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """Return the complete lines of the trace so far."""
        text = self.trace.read_text() if self.trace.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self) -> int:
        """Wait for the end; returns the exit code, which is negative for a signal."""
        return self.process.wait()

    def stderr(self) -> str:
        """Return what it wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def kill_at(self, moment: str, batch: int, delay: float) -> int | None:
        """Kill the process at the first ``moment`` after it has trained on ``batch`` batches.

        Args:
            moment: one of ``MOMENTS``.
            batch: number of batches to train on first.
            delay: how long to wait before the kill, as a share of the time between two lines of the trace.

        Returns:
            How many batches it had trained on, or None if it ended first.
        """
        seen, size, lines = 0, 0, list[dict[str, Any]]()
        while self.process.poll() is None:
            if not self.trace.exists():  # it is still importing torch
                time.sleep(0.05)
                continue
            if size != (size := self.trace.stat().st_size):
                lines = self.lines()
                seen = max((line["at"] for line in lines if line["event"] == "batch"), default=0)
            now = {
                "step": True,
                "validation": bool(lines) and lines[-1]["event"] == "validation begins",
                "writing": moment == "writing" and any(self.output.glob(f"run/version_*/checkpoints/*{PART}")),
            }
            if seen >= batch and now[moment]:
                if moment != "writing":
                    time.sleep(delay * max(0.0, lines[-1]["time"] - lines[-2]["time"]))
                self.process.kill()
                return seen
            time.sleep(0.001)
        return None


def lines_differ(whole: list[dict[str, Any]], killed: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each difference between the trace of the whole run and those of the killed run's processes."""

    def keyed(line: dict[str, Any]) -> tuple[Any, Any]:
        return line["event"], line["at"]

    expected = {keyed(line): line for line in whole if line["event"] in ("batch", "validation")}
    seen = set()
    for line in killed:
        if line["event"] not in ("batch", "validation"):
            continue
        seen.add(keyed(line))
        original = expected.get(keyed(line))
        if original is None:
            yield f"{line['event']} {line['at']}: only in the resumed run"
            continue
        for name in sorted((original.keys() | line.keys()) - {"time"}):
            if original.get(name) != line.get(name):
                values = [float.fromhex(v) if isinstance(v, str) else v for v in (original.get(name), line.get(name))]
                yield f"{line['event']} {line['at']}: {name} is {values[0]!r}, after resuming {values[1]!r}"
    yield from (f"{event} {at}: missing in the resumed run" for event, at in expected.keys() - seen)


def files_of(output: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and content of the files to compare: last and best checkpoint (without folder names), and results."""
    run = max(output.glob("run/version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    for name in ("last", "best"):
        path = run / "checkpoints" / f"{name}.ckpt"
        content = read(path) if path.exists() else {}
        content.pop("callbacks", None)
        for key in ("config", "model"):  # a resumed run may spell out what was a default
            content.get("llmkit", {}).pop(key, None)
        yield f"{name}.ckpt", content
    results = json.loads((run / "results.json").read_text())
    results.pop("provenance")  # a commit may be made in the meantime
    yield "results.json", results


def differ(one: Any, two: Any, name: str, differences: list[str]) -> int:
    """Compare nested data bit by bit. Append each difference to ``differences``; return the number of tensors."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        same = same and one.contiguous().view(-1).view(torch.uint8).equal(two.contiguous().view(-1).view(torch.uint8))
        if not same:
            differences.append(f"{name} differs")
        return 1
    if isinstance(one, dict) and isinstance(two, dict):
        differences += [f"{name}: only one run has {key}" for key in one.keys() ^ two.keys()]
        return sum(differ(one[key], two[key], f"{name}: {key}", differences) for key in one if key in two)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return sum(differ(a, b, f"{name}[{i}]", differences) for i, (a, b) in pairs)
    if one != two and not (one != one and two != two):
        differences.append(f"{name}: {one!r}, after resuming {two!r}")
    return 0

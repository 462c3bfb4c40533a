"""``llmkit verify resume``: is a run that is killed and resumed the run that was left alone, to the last bit?"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.content import read
from llmkit.commands import Parser
from llmkit.errors import UserError
from llmkit.run.saving import PART

DESCRIPTION = (
    "Run the first steps of a config once, and once more with SIGKILL at random moments (within steps, validations and "
    "the writing of checkpoints), resumed each time with --ckpt_path last; compare every loss, metric, weight, "
    "optimizer and scheduler state bit by bit. All further options are those of fit. Exit code 0: identical, 1: not."
)
TRACE = "llmkit.commands.verify.trace.Trace"
MOMENTS = ("step", "validation", "writing")


@dataclass
class Kill:
    """One SIGKILL."""

    moment: str
    """``step``, ``validation`` or ``writing`` (a checkpoint), as aimed at."""
    batch: int
    """Batches that the run had been trained on."""
    resumed_at: int = 0
    """Optimizer step from which the next process went on; 0: no checkpoint had been written."""


@dataclass
class Verdict:
    """What ``verify`` found."""

    kills: list[Kill] = field(default_factory=list)
    batches: int = 0
    validations: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("verify resume", DESCRIPTION)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (default 40)")
    parser.add_argument("--kills", type=int, default=6, help="how often the second run is killed (default 6)")
    parser.add_argument("--kill_seed", type=int, default=0, help="seed of the moments (default 0)")
    options, rest = parser.parse_known_args(argv)
    if options.steps < 4 or options.kills < 1:
        raise UserError("verify resume: --steps must be at least 4, and --kills at least 1")
    folder = Path(tempfile.mkdtemp(prefix="llmkit_verify_"))
    try:
        verdict = verify(rest, folder, options.steps, options.kills, options.kill_seed, tell=_tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if verdict.differences:
        print(f"\nNOT IDENTICAL: {len(verdict.differences)} difference(s), the first:\n  {verdict.differences[0]}")
        return 1
    print(
        f"\nIdentical after {len(verdict.kills)} kill(s): {verdict.batches} losses, {verdict.validations} validations, "
        f"{verdict.tensors} tensors of weights and states, and the results."
    )
    return 0


def _tell(text: str) -> None:
    print(text, flush=True)


def verify(
    argv: list[str], folder: Path, steps: int, kills: int, seed: int, tell: Callable[[str], None] = lambda text: None
) -> Verdict:
    """Run a config whole, and killed and resumed, and return how the two differ.

    Args:
        argv: the words behind ``llmkit fit``.
        folder: where both runs go.
        steps: optimizer steps of a run.
        kills: how often the second run is killed.
        seed: of the moments.
        tell: is called with a line on what happens.

    Raises:
        UserError: a run that fails by itself; its own message is on stderr.
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
    words = [*argv, *(f"--{key}={value}" for key, value in own.items() if f"--{key}" not in given)]
    tell(f"whole run: {steps} steps")
    whole = Process(words, folder / "whole")
    if whole.wait() != 0:
        raise UserError("verify resume: the run fails by itself, see above")
    lines = whole.lines()
    numbers = [line["at"] for line in lines if line["event"] == "batch"]
    verdict = Verdict(batches=len(numbers), validations=sum(line["event"] == "validation" for line in lines))
    rng = random.Random(seed)
    processes: list[Process] = []
    for number in range(kills + 1):
        resume = ["--ckpt_path", "last"] if processes else []
        process = Process([*words, *resume], folder / "killed")
        processes.append(process)
        if number < kills:
            # The kills follow each other through the run, each at a random place of its part.
            aim = 1 + int((number + rng.random()) * len(numbers) / (kills + 1))
            batch = process.kill_at(MOMENTS[number % len(MOMENTS)], aim, rng.random())
            if batch is not None:
                verdict.kills.append(Kill(MOMENTS[number % len(MOMENTS)], batch))
                tell(f"kill {len(verdict.kills)}: at batch {batch} of {len(numbers)} ({verdict.kills[-1].moment})")
        if process.wait() not in (0, -signal.SIGKILL):
            raise UserError(f"verify resume: a resumed run fails after {len(verdict.kills)} kill(s), see above")
        if process.wait() == 0:
            break
    for kill, process in zip(verdict.kills, processes[1:], strict=False):
        kill.resumed_at = next((line["at"] for line in process.lines() if line["event"] == "start"), 0)
    verdict.differences = [*lines_differ(lines, [line for process in processes for line in process.lines()])]
    files = [*files_of(folder / "whole")], [*files_of(folder / "killed")]
    for (name, one), (_, two) in zip(*files, strict=True):
        verdict.tensors += differ(one, two, name, verdict.differences)
    return verdict


class Process:
    """A training process, and the trace that it writes."""

    def __init__(self, words: list[str], output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        folder = output / "trace"
        trace = {"class_path": TRACE, "init_args": {"folder": str(folder)}}
        command = [sys.executable, "-m", "llmkit", "fit", *words, f"--output={output}", "--name=run"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, f"--trainer.callbacks+={json.dumps(trace)}"],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            # As this process finds llmkit and plugins, so does that one.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.trace = folder / f"{self.process.pid}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """Return what has been traced."""
        text = self.trace.read_text() if self.trace.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        code = self.process.wait()
        if code not in (0, -signal.SIGKILL):
            self._errors.seek(0)
            sys.stderr.write(self._errors.read().decode(errors="replace"))
        return code

    def kill_at(self, moment: str, batch: int, delay: float) -> int | None:
        """Kill the process at the first moment of a kind after it has trained on a batch.

        Args:
            moment: one of ``MOMENTS``.
            batch: number of the batch.
            delay: share of the time between two lines of the trace to wait before the kill.

        Returns:
            How many batches it had trained on; None: it came to its end before.
        """
        seen = 0
        while self.process.poll() is None:
            lines = self.lines()
            seen = max((line["at"] for line in lines if line["event"] == "batch"), default=0)
            now = {
                "step": True,
                "validation": bool(lines) and lines[-1]["event"] == "validation begins",
                "writing": any(self.output.glob(f"run/version_*/checkpoints/*{PART}")),
            }
            if seen >= batch and now[moment]:
                if moment != "writing":
                    time.sleep(delay * max(0.0, lines[-1]["time"] - lines[-2]["time"]))
                self.process.kill()
                return seen
            time.sleep(0.001)
        return None


def lines_differ(whole: list[dict[str, Any]], killed: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what the killed run's processes traced otherwise than the whole run, or not at all."""

    def keyed(line: dict[str, Any]) -> tuple[Any, Any]:
        return line["event"], line["at"]

    expected = {keyed(line): line for line in whole if line["event"] in ("batch", "validation")}
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for line in killed:
        if line["event"] not in ("batch", "validation"):
            continue
        found[keyed(line)] = line
        wanted = expected.get(keyed(line))
        if wanted is None:
            yield f"{line['event']} {line['at']}: only in the resumed run"
            continue
        for name in sorted(wanted.keys() | line.keys() - {"time"}):
            if name != "time" and wanted.get(name) != line.get(name):
                values = [float.fromhex(v) if isinstance(v, str) else v for v in (wanted.get(name), line.get(name))]
                yield f"{line['event']} {line['at']}: {name} is {values[0]!r}, after resuming {values[1]!r}"
    yield from (f"{event} {at}: missing in the resumed run" for event, at in expected.keys() - found.keys())


def files_of(output: Path) -> Iterator[tuple[str, Any]]:
    """Yield what the last process of a run left: its checkpoints, without what names its folder, and its results."""
    run = max(output.glob("run/version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    for name in ("last", "best"):
        path = run / "checkpoints" / f"{name}.ckpt"
        content = read(path) if path.exists() else {}
        content.pop("callbacks", None)
        for told in ("config", "model"):  # a resumed run may spell out what was a default
            content.get("llmkit", {}).pop(told, None)
        yield f"{name}.ckpt", content
    yield "results.json", json.loads((run / "results.json").read_text())


def differ(one: Any, two: Any, name: str, differences: list[str]) -> int:
    """Compare plain data with tensors in it, bit by bit; add what differs, and return the number of tensors."""
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

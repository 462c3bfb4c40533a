"""How cells run: one of them in this process, and many on this machine.

On this machine each is a fork of a server that has imported everything, so that it starts in half a second. Nothing is
kept but the folders of the cells. A cell that is lost begins again from its last checkpoint, and the same command
resumes a study that was killed at any moment. ``slurm`` and ``ray`` run cells on other machines.
"""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from llmkit.errors import Problem, Stopped, UserError
from llmkit.study.outcomes import OUTCOME, Cell, failure
from llmkit.study.progress import Progress

TRIES = 5
"""How often a cell whose process was lost is begun again without having ended."""
BUSY, LOST = 75, (255, 128 + signal.SIGTERM)
"""Exit codes: another process still runs the cell; the process or the fork server was killed."""

Run = Callable[[Path, Cell, int], int]
"""Runs a cell in its folder with so many threads, in a process of its own; returns the exit code."""


class Executor(Protocol):
    """Runs cells somewhere; ``failed`` holds the message of each cell that failed."""

    failed: dict[str, str]

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        """Run cells until each has ended or failed.

        Args:
            cells: what is left to run.
            total: number of all cells, for the progress line.

        Raises:
            Stopped: a signal asked to stop.
        """


def needed(package: str, executor: str) -> Any:
    """Return the package of an executor. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        text = f"{executor} needs {package}: pip install 'llmkit[{executor}]'"
        raise UserError(Problem("executor", text)) from error


def run_logged(run: Run, root: Path, cell: Cell, threads: int) -> int:
    """Run a cell in this process, its output going to ``log.txt`` in its folder; returns the exit code."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_"))]:
        del os.environ[name]  # Lightning would take each cell for one process of the job that the study runs in
    folder = root / cell.name
    try:
        with locked(folder):
            if (folder / OUTCOME).exists():
                return 0
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = run(folder, cell, threads)
            sys.stdout.flush()
            return code
    except BlockingIOError:
        return BUSY


def run_elsewhere(run: Run, root: Path, cell: Cell, threads: int) -> int:
    """Run a cell on a machine of a cluster; waits while a process that the cluster thinks is lost still runs it."""
    while (code := run_logged(run, root, cell, threads)) == BUSY:
        time.sleep(5)
    return code


def in_process(run: Run, root: Path, cell: Cell, threads: int, device: str | None) -> None:
    """Run a cell in this process and exit with its code. The cell stops, saved, when the parent is gone."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which then asks each cell to stop
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.exit(run_logged(run, root, cell, threads))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with its process. Raises BlockingIOError while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def stopping(progress: Progress, text: str, end: str) -> Iterator[list[int]]:
    """Collect the signals that ask to stop, SIGINT and SIGTERM, in a list; the first one prints ``text``.

    Raises Stopped, and prints ``end``, after a block in which there was one.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if not asked:
            progress.say(f"{signal.Signals(number).name}: {text}")
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        progress.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        progress.say(end)
        raise Stopped(asked[0])


class Local:
    """Runs cells on this machine.

    Args:
        root: the folder of the cells.
        workers: how many at once; None: as many as the devices hold, or one.
        threads: CPU threads of each.
        run: runs one cell.
        preload: the modules that the fork server imports.
        devices: what CUDA_VISIBLE_DEVICES calls each accelerator; a cell gets one of them.
        share: how many cells share a device.

    Raises:
        UserError: there are more workers than the devices hold.
    """

    def __init__(
        self,
        root: Path,
        workers: int | None,
        threads: int,
        run: Run,
        preload: Sequence[str],
        devices: Sequence[str] = (),
        share: int = 1,
    ) -> None:
        room = len(devices) * share
        if workers is not None and 0 < room < workers:
            text = f"{workers} cells at once, but {len(devices)} GPU(s) hold {room}: see cells_per_gpu"
            raise UserError(Problem("workers", text))
        self.root, self.threads, self.run, self.devices = root, threads, run, devices
        self.workers = workers or room or 1
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self.failed: dict[str, str] = {}

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        """Run cells until each has ended or failed. Raises Stopped after a signal, when each cell has saved."""
        left = [cell for cell in cells if cell.name not in self.failed]
        running: dict[Any, tuple[Any, Cell, str | None]] = {}
        tries: dict[str, int] = {}
        passed_on: Counter[int] = Counter()
        progress = Progress(total, total - len(cells))
        with stopping(progress, "cells stop after their step, saved", "stopped; the same command resumes") as asked:
            while running or (left and not asked):
                while left and len(running) < self.workers and not asked:
                    used = Counter(device for _, _, device in running.values())
                    device = min(self.devices, key=lambda name: used[name], default=None)
                    process = self._start(left[0], device)
                    if process is not None:
                        running[process.sentinel] = process, left.pop(0), device
                progress.show(len(running), len(self.failed))
                for sentinel in wait(list(running), timeout=0.5):
                    process, cell, _ = running.pop(sentinel)
                    process.join()
                    if self._again(process.exitcode, cell, tries, progress, bool(asked)):
                        left.append(cell)
                    elif (self.root / cell.name / OUTCOME).exists():
                        progress.done += 1
                for process, _, _ in running.values():
                    if passed_on[process.pid] < len(asked):  # a second signal stops a cell at once, unsaved
                        passed_on[process.pid] = len(asked)
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGTERM)

    def _start(self, cell: Cell, device: str | None) -> Any:
        """Return the started process of a cell; None where the fork server has just died: the next start makes one."""
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # a fork is safe only while the server has one thread
        try:
            process = self._context.Process(target=in_process, args=(self.run, self.root, cell, self.threads, device))
            process.start()
            return process
        except (OSError, EOFError):
            time.sleep(0.1)
            return None
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def _again(self, code: int, cell: Cell, tries: dict[str, int], progress: Progress, asked: bool) -> bool:
        """Return whether a cell has to be begun again; remember why it failed."""
        if code == 0 or (self.root / cell.name / OUTCOME).exists():
            return False
        if code == BUSY:  # the process of a study that was killed ends its step
            time.sleep(0.2)
            return True
        if asked:
            return False
        tries[cell.name] = tries.get(cell.name, 0) + 1
        if (code < 0 or code in LOST) and tries[cell.name] < TRIES:
            return True
        self.failed[cell.name] = failure(self.root / cell.name)
        progress.say(f"{cell.name} failed: {self.failed[cell.name]}")
        return False

"""Cells on this machine: each in a fork of a server that has imported everything, so that it starts in half a second.

Nothing is kept but the folders of the cells. A cell that is lost begins again from its last checkpoint, and the same
command resumes a study that was killed at any moment.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from llmkit.errors import Stopped
from llmkit.study.outcomes import OUTCOME, Cell, failure
from llmkit.study.progress import Progress

TRIES = 5
"""How often a cell whose process was lost is begun again without having ended."""
BUSY, LOST = 75, (255, 128 + signal.SIGTERM)
"""Exit codes: another process still runs the cell; the process or the fork server was killed."""

Run = Callable[[Path, Cell, int], int]
"""Runs a cell in its folder with so many threads, in a process of its own; returns the exit code."""


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


def in_process(run: Run, root: Path, cell: Cell, threads: int) -> None:
    """Run a cell in this process and exit with its code. The cell stops, saved, when the parent is gone."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which then asks each cell to stop
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


class Local:
    """Runs cells on this machine.

    Args:
        root: the folder of the cells.
        workers: how many at once.
        threads: CPU threads of each.
        run: runs one cell.
        preload: the modules that the fork server imports.
    """

    def __init__(self, root: Path, workers: int, threads: int, run: Run, preload: Sequence[str]) -> None:
        self.root, self.workers, self.threads, self.run = root, workers, threads, run
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self.failed: dict[str, str] = {}
        self._asked = 0
        self._progress = Progress(0, 0)

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        """Run cells until each has ended or failed; ``failed`` then says why.

        Args:
            cells: what is left to run.
            total: number of all cells, for the progress line.

        Raises:
            Stopped: a signal asked to stop, and each cell has saved.
        """
        left = [cell for cell in cells if cell.name not in self.failed]
        running: dict[Any, tuple[Any, Cell]] = {}
        tries: dict[str, int] = {}
        progress = self._progress = Progress(total, total - len(cells))
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while running or (left and not self._asked):
                while left and len(running) < self.workers and not self._asked:
                    process = self._start(left[0])
                    if process is not None:
                        running[process.sentinel] = process, left.pop(0)
                progress.show(len(running), len(self.failed))
                for sentinel in wait(list(running), timeout=0.5):
                    process, cell = running.pop(sentinel)
                    process.join()
                    if self._again(process.exitcode, cell, tries):
                        left.append(cell)
                    elif (self.root / cell.name / OUTCOME).exists():
                        progress.done += 1
                if self._asked:
                    for process, _ in running.values():
                        os.kill(process.pid, signal.SIGTERM)
                    wait(list(running), timeout=2)
        finally:
            progress.end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked:
            self._progress.say("stopped; the same command resumes")
            raise Stopped(self._asked)

    def _ask(self, number: int, frame: Any) -> None:
        if not self._asked:
            self._progress.say(f"{signal.Signals(number).name}: cells stop after their step, saved")
        self._asked = number

    def _start(self, cell: Cell) -> Any:
        """Return the started process of a cell; None where the fork server has just died: the next start makes one."""
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # a fork is safe only while the server has one thread
        try:
            process = self._context.Process(target=in_process, args=(self.run, self.root, cell, self.threads))
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

    def _again(self, code: int, cell: Cell, tries: dict[str, int]) -> bool:
        """Return whether a cell has to be begun again; remember why it failed."""
        if code == 0 or (self.root / cell.name / OUTCOME).exists():
            return False
        if code == BUSY:  # the process of a study that was killed ends its step
            time.sleep(0.2)
            return True
        if self._asked:
            return False
        tries[cell.name] = tries.get(cell.name, 0) + 1
        if (code < 0 or code in LOST) and tries[cell.name] < TRIES:
            return True
        self.failed[cell.name] = failure(self.root / cell.name)
        self._progress.say(f"{cell.name} failed: {self.failed[cell.name]}")
        return False

"""Cells as tasks of a Ray cluster, which starts a task again whose process or node was lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import Problem, UserError
from llmkit.study.execute import TRIES, Run, needed, run_elsewhere, stopping
from llmkit.study.outcomes import OUTCOME, Cell, failure
from llmkit.study.progress import Progress

PASSED_ON = ("LLMKIT_", "HF_", "PYTHONPATH")
"""Environment variables that the processes of the cluster get from this one."""


def work(run: Run, root: Path, cell: Cell, threads: int, here: Path) -> int:
    """Run a cell in a process of the cluster; returns its exit code."""
    os.chdir(here)  # paths in a config are relative to the folder of the command
    return run_elsewhere(run, root, cell, threads)


class Ray:
    """Runs cells as Ray tasks. This process has to live while they run: with it they end, and the same command resumes.

    Args:
        root: the folder of the cells.
        workers: how many run at once; None: as many as the cluster has room for.
        threads: CPUs of each.
        run: runs one cell.
        address: of the cluster; "auto": that of RAY_ADDRESS, or the one this machine belongs to.
        share: how many cells share a GPU.

    Raises:
        UserError: ray is not installed, or there is no cluster.
    """

    def __init__(self, root: Path, workers: int | None, threads: int, run: Run, address: str, share: int = 1) -> None:
        self.root, self.workers, self.threads, self.run = root.absolute(), workers, threads, run
        self.failed: dict[str, str] = {}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = needed("ray", "ray")
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        try:
            environment = {"env_vars": passed_on}
            self._ray.init(address, log_to_driver=False, logging_level="WARNING", runtime_env=environment)
        except ConnectionError as error:
            text = f"ray: no cluster at {address}: start one by 'ray start --head', or set executor.address"
            raise UserError(Problem("executor", text)) from error
        gpus = 1 / share if self._ray.cluster_resources().get("GPU") else 0
        # A process runs one cell and ends, because what a cell leaves behind in it is not for the next one.
        how = {"num_cpus": threads, "num_gpus": gpus, "max_retries": TRIES - 1, "max_calls": 1}
        self._work: Any = self._ray.remote(**how)(work)

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        """Run cells until each has ended or failed. Raises Stopped after a signal, when each cell has saved."""
        left = [cell for cell in cells if cell.name not in self.failed]
        running: dict[Any, Cell] = {}
        passed_on = 0
        progress = Progress(total, total - len(cells))
        with stopping(progress, "cells stop after their step, saved", "stopped; the same command resumes") as asked:
            while running or (left and not asked):
                while left and not asked and len(running) < (self.workers or len(cells)):
                    cell = left.pop(0)
                    running[self._work.remote(self.run, self.root, cell, self.threads, Path.cwd())] = cell
                progress.show(len(running), len(self.failed))
                ended, _ = self._ray.wait(list(running), timeout=0.5)
                for task in ended:
                    cell = running.pop(task)
                    error = self._error(task)
                    if (self.root / cell.name / OUTCOME).exists():
                        progress.done += 1
                    elif not asked:
                        self.failed[cell.name] = error or failure(self.root / cell.name)
                        progress.say(f"{cell.name} failed: {self.failed[cell.name]}")
                if passed_on < len(asked):  # like Ctrl-C in each of them; a second one stops them at once
                    passed_on = len(asked)
                    for task in running:
                        self._ray.cancel(task)

    def _error(self, task: Any) -> str:
        """Return why Ray could not run a task; empty: it ran."""
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return ""

"""Cells as jobs of a Slurm cluster, one array for all that are left, submitted by submitit.

Slurm keeps the queue, and starts a job again that was preempted, ran out of time or lost its node. The command only
waits: killed and repeated, it finds its jobs in the queue. Whether a cell has ended is read from its folder alone,
which all machines share.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import Problem, UserError
from llmkit.study.execute import TRIES, Run, needed, run_elsewhere, stopping
from llmkit.study.outcomes import OUTCOME, Cell, failure
from llmkit.study.progress import Progress

ARRAY = 1000
"""Jobs in an array at most: Slurm's default limit is 1001."""
PAUSE = 10.0
"""Longest time between two looks at the queue, in seconds."""
TEARDOWN = (
    "code=$?",
    "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}",
    # 143: it was asked to stop, and has saved. 128 and more: it was killed, for want of memory, say.
    f"if [ $code -eq 143 ] || {{ [ $code -ge 128 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {TRIES - 1} ]; }}; then",
    '  scontrol requeue "$job" && sleep 60',
    "fi",
    "exit $code",
)
"""The end of the batch script, after ``srun``: Slurm itself requeues no job whose process was stopped or killed."""


@dataclass(frozen=True)
class Job:
    """A cell as the process of a job runs it. It is pickled, so it holds plain data only."""

    run: Run
    root: Path
    cell: Cell
    threads: int

    def __call__(self) -> None:
        """Run the cell; the process ends with its exit code, which the batch script reads."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; while it trains, a cell saves and stops
        signal.signal(signal.SIGUSR2, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        code = run_elsewhere(self.run, self.root, self.cell, self.threads)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Slurm:
    """Runs cells as Slurm jobs.

    Args:
        root: the folder of the cells; submitit's files and the numbers of the jobs go into ``slurm`` next to it.
        workers: how many run at once; None: as many as the cluster has room for.
        threads: CPUs of each.
        run: runs one cell.
        options: of ``sbatch``, by their long names; ``setup`` is a list of shell commands to run first.

    Raises:
        UserError: submitit is not installed, or Slurm is not.
    """

    def __init__(self, root: Path, workers: int | None, threads: int, run: Run, options: Mapping[str, Any]) -> None:
        self.root, self.workers, self.threads, self.run = root.absolute(), workers, threads, run
        self.folder = self.root.parent / "slurm"
        self.failed: dict[str, str] = {}
        self._submitit = needed("submitit", "slurm")
        try:
            self._executor = self._submitit.SlurmExecutor(self.folder / "jobs")
        except RuntimeError as error:
            raise UserError(Problem("executor", "slurm: this machine has no srun")) from error
        sbatch = {**options, "requeue": True}
        self._settings = {
            "setup": sbatch.pop("setup", None),
            "job_name": self.root.parent.name,
            "time": None,  # the partition's default: a cell that runs out of it is requeued
            "cpus_per_task": threads,
            "teardown": list(TEARDOWN),
            "additional_parameters": sbatch,
        }

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        """Wait until each cell has ended or failed. Raises Stopped after a signal; the jobs stay in the queue."""
        left = {cell.name: cell for cell in cells if cell.name not in self.failed}
        progress = Progress(total, total - len(cells))
        stays = "the jobs stay in the queue; the same command waits for them again"
        with stopping(progress, "no longer waiting", stays) as asked:
            jobs, queue = self._jobs(), _queue()
            if queue is None:
                raise UserError(Problem("executor", "slurm: squeue does not answer"))
            missing = [cell for cell in left.values() if jobs.get(cell.name) not in queue]
            jobs |= self._submit(missing)
            pause, gone = 0.5, set[str]()
            while left and not asked:
                time.sleep(pause)
                pause = min(1.2 * pause, PAUSE)
                queue = _queue()
                for name in list(left):
                    if (self.root / name / OUTCOME).exists():
                        del left[name]
                        progress.done += 1
                    elif queue is None or jobs[name] in queue:
                        gone.discard(name)
                    elif name not in gone:  # look once more: a shared file system may be late
                        gone.add(name)
                    else:
                        del left[name]
                        self._fail(name, jobs[name], progress)
                running = sum((queue or {}).get(jobs[name]) == "RUNNING" for name in left)
                progress.show(running, len(self.failed))

    def _fail(self, name: str, job: str, progress: Progress) -> None:
        self.failed[name] = failure(self.root / name)
        progress.say(f"{name} failed: {self.failed[name]} (job {job}, see {self.folder / 'jobs'})")

    def _jobs(self) -> dict[str, str]:
        """Return the number of each cell's last job."""
        try:
            found: dict[str, str] = json.loads((self.folder / "jobs.json").read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            return {}

    def _submit(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Submit cells; returns and writes down the number of each one's job."""
        jobs = self._jobs()
        for first in range(0, len(cells), ARRAY):
            part = cells[first : first + ARRAY]
            self._executor.update_parameters(array_parallelism=self.workers or len(part), **self._settings)
            try:
                with self._executor.batch():
                    found = [self._executor.submit(Job(self.run, self.root, cell, self.threads)) for cell in part]
            except (RuntimeError, OSError) as error:  # what sbatch says, FailedJobError
                raise UserError(Problem("executor", f"slurm: {' '.join(str(error).split())[-300:]}")) from error
            jobs |= {cell.name: str(job.job_id) for cell, job in zip(part, found, strict=True)}
            unfinished = self.folder / "jobs.json.part"
            unfinished.write_text(json.dumps(jobs), encoding="utf-8")
            unfinished.replace(self.folder / "jobs.json")
        return jobs


def _queue() -> dict[str, str] | None:
    """Return the state of each of the user's jobs in the queue; None while Slurm does not answer."""
    line = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    return dict(row.split() for row in answer.stdout.splitlines()) if answer.returncode == 0 else None

"""A cell that trains nothing and imports nothing: it counts in a file, as slowly as it is asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from llmkit.study.execute import Local, locked
from llmkit.study.outcomes import OUTCOME, Cell

STEPS = 12
ALLOWED = "allowed.txt"
"""A file in the folder of a study that says how many steps all its cells may take; without it, any number."""


def count(folder: Path, cell: Cell, threads: int, pause: float = 0.01) -> int:
    """Append a line for each step, resuming where the last process stopped; the result depends on nothing else.

    ``begun.txt`` gets a line from each process: its number, that of its parent, and its Slurm node.
    """
    with (folder / "begun.txt").open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {os.environ.get('SLURMD_NODENAME', '-')}\n")
    log = folder / "steps.txt"
    if cell.variant == "broken":
        print("llmkit: error: nothing to count")
        return 2
    begun = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(begun, STEPS):
        while not _allowed(folder.parents[2]):
            time.sleep(pause)
        with log.open("a") as file:
            file.write(f"{step}\n")
        time.sleep(pause)
    run = folder / "version_0"
    run.mkdir(exist_ok=True)
    (run / "metrics.csv").write_text(f"step,val_loss\n{STEPS - 1},{cell.seed + len(cell.variant) / 10}\n")
    part = folder / "part"
    part.write_text(json.dumps({"diverged": cell.variant == "bad", "run": "version_0", "metrics": ["val_loss"]}))
    part.replace(folder / OUTCOME)
    return 0


def _allowed(root: Path) -> bool:
    try:
        allowed = float((root / ALLOWED).read_text())
    except FileNotFoundError:
        return True
    return sum(len(path.read_text().splitlines()) for path in root.rglob("steps.txt")) < allowed


def patient(folder: Path, cell: Cell, threads: int) -> int:
    """Take a while to stop, like a cell with a long step, and write how often it was asked to."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (folder / "begun.txt").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(cell.seed)
    (folder / "asked.txt").write_text(str(len(asked)))
    return 128 + signal.SIGTERM


def where(folder: Path, cell: Cell, threads: int, together: int) -> int:
    """Write which device the cell has, its threads, and when it ran; none ends before so many have begun."""
    begin = time.monotonic()
    (folder / "begun.txt").touch()
    while len(list(folder.parents[2].rglob("begun.txt"))) < together:
        time.sleep(0.01)
    row = {"device": os.environ["CUDA_VISIBLE_DEVICES"], "threads": threads, "begin": begin, "end": time.monotonic()}
    (folder / "where.json").write_text(json.dumps(row))
    return 0


def cells(*variants: str, seeds: int = 4) -> list[Cell]:
    """Return cells by the names of their variants."""
    return [Cell(f"final/{name}/seed{seed}-0", (), name, seed) for name in variants for seed in range(seeds)]


def everything(root: Path) -> dict[str, bytes]:
    """Return the files that a study's cells have left, by their path."""
    kept = ("metrics.csv", OUTCOME, "steps.txt")
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.name in kept}


def begun(folder: Path) -> list[tuple[int, int, str]]:
    """Return the process, its parent and the node of each time a cell was begun."""
    file = folder / "begun.txt"
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(int(pid), int(parent), node) for pid, parent, node in rows]


def descendants(pid: int) -> list[int]:
    """Return the processes below one, the nearest first."""
    found, rows = [pid], subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    for child, parent in sorted(zip(map(int, rows[::2]), map(int, rows[1::2]), strict=True)):
        if parent in found:
            found.append(child)
    return found[1:]


def study(root: Path) -> dict[str, str]:
    """Run all cells that have not ended, as the command does; returns the messages of those that failed."""
    local = Local(root, workers=3, threads=1, run=partial(count, pause=0.02), preload=["study_fakes"])
    wanted = cells("a", "bb", "ccc")
    with locked(root):
        local([cell for cell in wanted if not (root / cell.name / OUTCOME).exists()], len(wanted))
    return local.failed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import study_fakes

    print(study_fakes.study(Path(sys.argv[1])))

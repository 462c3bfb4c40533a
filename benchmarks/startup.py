"""Start-up: CPU time of ``llmkit --help``, ``llmkit plugins``, ``llmkit fit`` and a cell until its first step is done.

    python benchmarks/startup.py

Every turn is a new process, whose CPU time is taken as the system counts it, the interpreter's own start included. The
fit is configs/quickstart.yaml with a model of 2 layers, 64 wide, on one file of 100 kB and with an empty cache, so
that a tokenizer is trained and the text encoded too; a callback ends it after its first step. Its first line is
measured too, until it can be read. It stands beside ``import torch, lightning.pytorch`` alone, ended in the same way.
These import transformers, scipy and others where they are installed, which llmkit defers: what is installed counts.
litgpt is asked for its help once. A cell, one run of a study, is the same fit as a fork of a process that has imported
everything; its own CPU time counts.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from kit import OURS, ROOT, Report, arguments

from llmkit.commands.cell import fit_cell
from llmkit.study.outcomes import Cell

HELP, PLUGINS, FIT, CELL, LINE = 0.3, 0.6, 2.5, 1.0, 2.5
"""The goals: CPU seconds of two commands, of a cell and of a fit's first line, at most; a fit's as a multiple of the
bare imports."""
ENDING = """\
import os
import resource
from pathlib import Path
import lightning.pytorch as pl

class Ending(pl.Callback):
    def on_train_batch_end(self, *args):
        used = resource.getrusage(resource.RUSAGE_SELF)
        Path(__file__).with_name("seconds.txt").write_text(str(used.ru_utime + used.ru_stime))
        os._exit(0)
"""
PEER = "litgpt"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["llmkit.commands.cell", *(f"llmkit_plugins.{name}" for name in ("attention.softmax", "head.generation"))]
)


def seconds(words: list[str], folder: Path, **environment: str) -> float:
    """Run Python with these arguments; returns the CPU seconds of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def words(folder: Path) -> list[str]:
    """Return the options of a small fit that ends after its first step."""
    (folder / "ending.py").write_text(ENDING)
    settings = {
        "config": ROOT / "configs" / "quickstart.yaml",
        "imports": folder / "ending.py",
        "data.train": inspect.getsourcefile(argparse),
        "trainer.callbacks": "ending.Ending",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "model.num_layers": 2,
        "model.dim": 64,
        "output": folder,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def fit(folder: Path) -> float:
    """Run ``llmkit fit`` until its first step is done."""
    with tempfile.TemporaryDirectory() as cache:
        return seconds(["-m", "llmkit", "fit", *words(folder)], folder, LLMKIT_CACHE=cache)


def first_line(folder: Path) -> float:
    """Run ``llmkit fit`` until it prints something; returns the CPU seconds of the process."""
    line = [sys.executable, "-m", "llmkit", "fit", *words(folder)]
    process = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0  # it has been waited for
    process.stdout.close()
    return used.ru_utime + used.ru_stime


def cell(folder: Path) -> float:
    """Run a cell until its first step is done."""
    with tempfile.TemporaryDirectory() as cache:
        argv = (*words(folder), f"--data.cache_dir={cache}")
        work = (folder / "cell", Cell("cell", argv, "", 0), 1)
        process = FORKS.Process(target=fit_cell, args=work)
        process.start()
        process.join()
    return float((folder / "seconds.txt").read_text())


def take_turns(runs: Mapping[str, Callable[[], float]], cycles: int) -> dict[str, list[float]]:
    """Run each in turn; every other cycle goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for cycle in range(cycles):
        for name in list(runs) if cycle % 2 else list(runs)[::-1]:
            found[name].append(runs[name]())
    return found


def main() -> None:
    """Measure every command."""
    args = arguments(__doc__)
    report = Report("startup", args.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = functools.partial(functools.partial, seconds, folder=folder)
        times = take_turns(
            {
                "--help": run(["-m", "llmkit", "--help"]),
                "plugins": run(["-m", "llmkit", "plugins"]),
                "fit": functools.partial(fit, folder),
                "line": functools.partial(first_line, folder),
                "cell": functools.partial(cell, folder),
                "imports": run(["-c", "import os, torch, lightning.pytorch; os._exit(0)"]),
                "python": run(["-c", ""]),
            },
            args.cycles,
        )
        report.compare("--help", {OURS: times["--help"], "python alone": times["python"]}, "s")
        if importlib.util.find_spec(PEER) is None:
            report.add("--help", f"{PEER} --help", None, "s", note="missing: not installed")
        else:
            value = seconds(["-m", PEER, "--help"], folder)
            ratio = round(value / statistics.median(times["--help"]), 1)
            report.add("--help", f"{PEER} --help", round(value, 3), "s", ratio=ratio)
    for command, most in {"--help": HELP, "plugins": PLUGINS, "cell": CELL, "line": LINE}.items():
        value = statistics.median(times[command])
        command = {"cell": "cell, first step", "line": "fit, first line"}.get(command, command)
        report.add(command, OURS, round(value, 3), "s", goal=f"under {most:g} s", met=value < most)
    bare = "import torch, lightning"
    report.compare("fit, first step", {OURS: times["fit"], bare: times["imports"]}, "s", goals={bare: 1 / FIT})
    report.close()


if __name__ == "__main__":
    main()

"""Kill a real study with SIGKILL at random moments, start it again, and compare its report with one left alone.

    python docs/reliability/kill_study.py                 # 12 kills, a few minutes on an idle machine
    python docs/reliability/kill_study.py --command scale --kills 8

The victims are the command, the fork server and the cells. The study is one of ``llmkit compare``, and another one runs
in the same output folder at the same time; or it is one of ``llmkit scale``, in which runs decay from a trunk. Writes
``kill_study.json`` or ``kill_scale.json`` next to this file, from which ``table.py`` makes a sentence of
``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from llmkit.study.outcomes import Outcome, outcome_of

HERE = Path(__file__).resolve().parent
WORDS = ("river", "stone", "house", "green", "walk", "small", "light", "water", "seven", "bright", "corner")
STUDY = """\
base: experiment.yaml
variants: {multi_head: {}, min_gru: {model.attention: min_gru}}
seeds: 4
margin: 0.05
workers: 2
"""
SCALE = """\
base: experiment.yaml
widths: [8, 16, 24]
head_width: 8
budgets: [6.0e+7, 1.2e+8, 2.4e+8]
hold_out: 4.8e+8
ratio: [0.01, 10000]
repeat: true
schedule: trunk
overrides: {model.scheduler: wsd, checkpoint.every_n_steps: 20, trainer.val_check_interval: 1000, data.batch_size: 2}
workers: 2
"""
EXPERIMENT = """\
data: {train: text.txt, validation_share: 0.1, tokenizer: char, batch_size: 8}
model: {dim: 32, num_layers: 1, context: 32, attention: {name: multi_head, num_heads: 4}, dropout: 0.1}
trainer: {max_steps: 120, val_check_interval: 40, accelerator: cpu, enable_progress_bar: false}
checkpoint: {every_n_steps: 5}
"""


def start(folder: Path, command: str, output: str, name: str = "study") -> subprocess.Popen[bytes]:
    """Start a study."""
    line = [sys.executable, "-m", "llmkit", command, "--config", "study.yaml", "--output", output, "--name", name]
    log = (folder / f"{output}.{name}.log").open("ab")
    return subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)


def processes(parent: int) -> dict[str, list[int]]:
    """Return the processes of a study."""
    children: dict[int, list[int]] = {}
    for number in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        with suppress(OSError):
            above = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(above, []).append(number)
    servers = [
        number
        for number in children.get(parent, [])
        if b"forkserver" in Path(f"/proc/{number}/cmdline").read_bytes() and number in children
    ]
    return {"command": [parent], "fork server": servers, "cell": [cell for name in servers for cell in children[name]]}


def report_of(folder: Path) -> dict[str, bytes]:
    """Return all files of a study but those of its cells."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "cells" not in path.parts}


def curves(folder: Path) -> dict[str, Outcome | None]:
    """Return what became of each cell."""
    cells = [path.parent for path in folder.glob("cells/*/*/*/outcome.json")]
    return {cell.name: outcome_of(cell, "val_loss") for cell in cells}


def saved_since(folder: Path, moment: float) -> bool:
    """Return whether a cell has written a checkpoint since."""
    with suppress(FileNotFoundError):  # one is just being replaced
        return any(path.stat().st_mtime > moment for path in folder.glob("cells/*/*/*/version_*/checkpoints/last.ckpt"))
    return False


def main() -> None:
    """Run the study left alone, and the one that is killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--command", choices=("compare", "scale"), default="compare")
    options = parser.parse_args()
    compares = options.command == "compare"
    chance = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="llmkit_kill_study_"))
    (folder / "text.txt").write_text("\n".join(" ".join(chance.choices(WORDS, k=7)) for _ in range(600)) + "\n")
    (folder / "study.yaml").write_text(STUDY if compares else SCALE)
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    os.environ["LLMKIT_CACHE"] = str(folder / "cache")
    if start(folder, options.command, "alone").wait() != 0:
        raise SystemExit(f"the study failed: see {folder}")
    other = start(folder, options.command, "killed", "other") if compares else None
    killed: Counter[str] = Counter()
    process, began = start(folder, options.command, "killed"), time.monotonic()
    while process.poll() != 0:
        if process.poll() is not None:
            process = start(folder, options.command, "killed")
        if killed.total() >= options.kills:
            process.wait()
            continue
        kind = chance.choice(("command", "fork server", "cell", "cell"))
        last = time.time()
        while process.poll() is None and not saved_since(folder / "killed" / "study", last):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.5))
        victims = processes(process.pid)[kind] if process.poll() is None else []
        if victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
            killed[kind] += 1
            print(f"{time.monotonic() - began:5.1f} s: {kind}", flush=True)
            if kind == "command":
                process.wait()
    if other is not None and other.wait() != 0:
        raise SystemExit(f"the other study failed: see {folder}")
    alone, again = report_of(folder / "alone" / "study"), report_of(folder / "killed" / "study")
    results = curves(folder / "alone" / "study")
    others = curves(folder / "killed" / ("other" if compares else "study"))
    found = {
        "kills": dict(killed),
        "runs": len(results),
        "resumed": sum(len(list(path.glob("version_*"))) > 1 for path in folder.glob("killed/study/cells/*/*/*")),
        "files": len(alone),
        "differences": sorted(name for name in alone.keys() | again.keys() if alone.get(name) != again.get(name)),
        "other": sorted(name for name, text in results.items() if others.get(name) != text),
    }
    print(json.dumps(found))
    (HERE / f"kill_{'study' if compares else 'scale'}.json").write_text(json.dumps(found, indent=1) + "\n")
    if not found["differences"] and not found["other"]:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

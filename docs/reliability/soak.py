"""Train for a long time with a checkpoint every 50 steps, and watch memory, open files and disk.

    python docs/reliability/soak.py --hours 2 --output /tmp/soak
    python docs/reliability/soak.py --hours 1 --output /tmp/soak --config configs/translation/multi30k.yaml

The second one has batches of many shapes. Options that this script does not know go to ``llmkit fit``.

Prints one line a minute and writes ``soak.json`` (``soak_CONFIG.json`` for another config) next to this file: medians
of the second half of the time against the first, without the first tenth and the time before the first checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/generation/tinyshakespeare.yaml"
OPTIONS = (
    *("--checkpoint.every_n_steps=50", "--checkpoint.keep=3"),
    *("--trainer.max_steps=100000000", "--trainer.max_epochs=-1"),
)


def sample(pid: int, run: Path) -> dict[str, float]:
    """Return resident memory in MiB, open files, and the size and number of the checkpoints' files in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = [path.stat() for path in run.glob("version_*/checkpoints/*")]
    inodes = {info.st_ino: info.st_size for info in files}
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "disk": sum(inodes.values()) / 2**20,
        "checkpoints": len(files),
    }


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two samples")
    parser.add_argument("--config", default=CONFIG)
    options, further = parser.parse_known_args()
    command = [
        sys.executable,
        "-m",
        "llmkit",
        "fit",
        "--config",
        options.config,
        "--name=soak",
        f"--output={options.output}",
    ]
    process = subprocess.Popen([*command, *OPTIONS, *further])
    started, rows = time.monotonic(), []
    while time.monotonic() - started < options.hours * 3600 and process.poll() is None:
        time.sleep(options.every)
        try:
            row = {"minutes": (time.monotonic() - started) / 60, **sample(process.pid, options.output / "soak")}
        except FileNotFoundError:  # a file was pruned while it was counted
            continue
        rows.append(row)
        print("  ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    rest = [row for row in rows[len(rows) // 10 :] if row["checkpoints"]]
    if len(rest) < 2:
        raise SystemExit("soak: too short: two samples after the first checkpoint are needed")
    half = len(rest) // 2
    growth = {
        name: statistics.median(row[name] for row in rest[half:]) / statistics.median(row[name] for row in rest[:half])
        for name in ("memory", "open_files", "disk", "checkpoints")
    }
    newest = max((options.output / "soak").glob("version_*"), key=lambda folder: folder.stat().st_ctime)
    metrics = (newest / "metrics.csv").read_text().splitlines()
    steps = int(metrics[-1].split(",")[metrics[0].split(",").index("step")])
    result = {"exit_code": code, "steps": steps, "saved": steps // 50, "second_half_to_first": growth, "last": rows[-1]}
    result["memory_peak_to_start"] = max(row["memory"] for row in rest) / rest[0]["memory"]
    name = "soak" if options.config == CONFIG else f"soak_{Path(options.config).stem}"
    (Path(__file__).parent / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What the benchmarks share: runs side by side, the machine's limits, and the table that comes out.

All contestants take turns within one process, so that whatever else the machine does meets all of them. On a CPU the
clock is the process's CPU time and torch has one thread; on an accelerator it is wall time between synchronisations.
A ratio is the median over the cycles of (peer's time / llmkit's time) within a cycle: above 1, llmkit is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# For processes that contestants run in.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
warnings.filterwarnings("ignore")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LLMKIT_DATA", ROOT.parent / "shared" / "data"))
OURS = "llmkit"


@dataclasses.dataclass(frozen=True)
class Line:
    """One contestant of one case: what a script prints, and what the tables of docs/performance.md are made of.

    Args:
        bench: name of the script.
        case: what was run.
        name: the contestant, or the quantity.
        value: its median, in ``unit``.
        unit: of the value, as ``ms a step``.
        ratio: how many times faster (or smaller) llmkit is; None: this is llmkit, or nothing to compare.
        spread: the lowest and highest ratio of a cycle.
        limit: the share of the machine's limit that is reached, 0 to 1.
        goal: what the value or the ratio should be, in words.
        met: whether it is; None: no goal, or the peer is missing.
        note: what a reader has to know.
    """

    bench: str
    case: str
    name: str
    value: float | None
    unit: str
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    limit: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


class Report:
    """Collects a script's lines, prints each as it comes and all as a table, and writes them to a file.

    Args:
        bench: name of the script.
        file: where the lines go as JSON; None: nowhere.
    """

    def __init__(self, bench: str, file: str | None) -> None:
        self.bench, self.file = bench, file
        self.lines: list[Line] = []

    def add(self, case: str, name: str, value: float | None, unit: str, **rest: Any) -> Line:
        """Add a line and print it as JSON."""
        line = Line(self.bench, case, name, value, unit, **rest)
        self.lines.append(line)
        print(json.dumps({key: item for key, item in dataclasses.asdict(line).items() if item not in (None, "")}))
        sys.stdout.flush()
        return line

    def compare(
        self,
        case: str,
        times: Mapping[str, Sequence[float]],
        unit: str,
        scale: float = 1.0,
        goals: Mapping[str, float] | None = None,
        limits: Mapping[str, float] | None = None,
        missing: Mapping[str, str] | None = None,
        ours: str = OURS,
        note: str = "",
    ) -> None:
        """Add a line for each contestant of a case.

        Args:
            case: what was run.
            times: seconds of each cycle by contestant, llmkit's among them.
            unit: of the values that are shown.
            scale: what seconds are multiplied by to get them.
            goals: the least ratio wanted, by peer.
            limits: seconds that the machine's limit would take, by contestant.
            missing: why a peer is not there, by peer.
            ours: llmkit's name in ``times``.
            note: what a reader has to know of the case.
        """
        for name, seconds in times.items():
            rest: dict[str, Any] = {"note": note if name == ours else ""}
            if limits and name in limits:
                rest["limit"] = round(limits[name] / statistics.median(seconds), 3)
            if name != ours:
                ratios = [theirs / own for theirs, own in zip(seconds, times[ours], strict=True)]
                rest |= {"ratio": round(statistics.median(ratios), 3)}
                rest |= {"spread": (round(min(ratios), 3), round(max(ratios), 3))}
                if goals and name in goals:
                    rest |= {"goal": f"at least {goals[name]:g}", "met": statistics.median(ratios) >= goals[name]}
            self.add(case, name, round(statistics.median(seconds) * scale, 4), unit, **rest)
        for name, why in (missing or {}).items():
            self.add(case, name, None, unit, note=f"missing: {why}")

    def close(self) -> None:
        """Print the table and write the file."""
        print()
        print(table(self.lines))
        if self.file:
            rows = [dataclasses.asdict(line) for line in self.lines]
            Path(self.file).write_text(json.dumps({"machine": machine(), "lines": rows}, indent=1) + "\n")


def table(lines: Sequence[Line]) -> str:
    """Return lines as a Markdown table."""
    head = ("case", "", "median", "llmkit is faster by", "of the limit", "goal")
    rows = [head, tuple("---" for _ in head)]
    for line in lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        if line.spread is not None:
            ratio += f" ({line.spread[0]:.2f} to {line.spread[1]:.2f})"
        goal = line.goal + ("" if line.met is None else ", reached" if line.met else ", **missed**")
        value = line.note if line.value is None else f"{line.value:,.4g} {line.unit}"
        rows.append((line.case, line.name, value, ratio, "" if line.limit is None else f"{line.limit:.2f}", goal))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def arguments(description: str | None, **extra: Any) -> argparse.Namespace:
    """Return a script's arguments: ``--json``, ``--cycles``, ``--device`` and its own (name: default)."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", help="write the lines to this file")
    parser.add_argument("--cycles", type=int, default=5, help="how often each contestant has its turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    return args


def quiet() -> None:
    """Keep the peers and Lightning from talking between the lines."""
    logging.disable(logging.WARNING)


def clock(device: str = "cpu") -> float:
    """Return seconds: of CPU time, or of wall time once the device has finished its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds that a call takes."""
    start = clock(device)
    run()
    return clock(device) - start


def interleave(
    runs: Mapping[str, Callable[[], Any]], cycles: int = 5, warm: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Run each in turn, ``cycles`` times after ``warm`` unmeasured rounds; returns the seconds of each cycle.

    Every other cycle goes backwards, so that nobody always comes after the same one.
    """
    for _ in range(warm):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for cycle in range(cycles):
        for name in list(runs) if cycle % 2 == 0 else list(runs)[::-1]:
            times[name].append(timed(runs[name], device))
    return times


class Gemm:
    """The machine's matrix product by the fastest kernel known here, the limit of arithmetic: it has turns of its own.

    Args:
        device: where.
        dtype: of the matrices.
        size: of the square matrices.
        repeats: products a turn.
    """

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 0, repeats: int = 0
    ) -> None:
        self.size = size or (1024 if device == "cpu" else 8192)
        self.repeats = repeats or (20 if device == "cpu" else 30)
        self.left = torch.randn(self.size, self.size, device=device, dtype=dtype)
        self.right = torch.randn(self.size, self.size, device=device, dtype=dtype)

    def __call__(self) -> None:
        """Multiply."""
        for _ in range(self.repeats):
            self.left @ self.right.T

    def seconds(self, flops: float, times: Sequence[float]) -> float:
        """Return how long ``flops`` operations take at the rate of these turns (the fastest of them)."""
        return flops / (2.0 * self.size**3 * self.repeats / min(times))


class Bandwidth:
    """Reading memory, as the sum of a large matrix does: the limit of generating one row.

    Args:
        device: where.
        mebibytes: of the matrix; larger than the caches.
    """

    def __init__(self, device: str = "cpu", mebibytes: int = 256) -> None:
        self.bytes = mebibytes * 2**20
        self.matrix = torch.randn(self.bytes // 4 // 1024, 1024, device=device)

    def __call__(self) -> None:
        """Read the matrix once."""
        self.matrix.sum()

    def seconds(self, size: float, times: Sequence[float]) -> float:
        """Return how long reading ``size`` bytes takes at the rate of these turns (the fastest of them)."""
        return size / (self.bytes / min(times))


def find(builders: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the peers that could be built, and why the others could not (they are not installed)."""
    found, missing = {}, {}
    for name, build in builders.items():
        try:
            with silent():
                found[name] = build()
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return found, missing


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Drop what is printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def machine() -> dict[str, str]:
    """Return what the figures were measured with."""
    names = ("torch", "lightning", "litgpt", "transformers", "x-transformers", "joeynmt", "tokenizers", "tiktoken")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = found[0] if found else cpu
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": f"{cpu}, {os.cpu_count()} cores", **gpu, "python": platform.python_version(), **versions}

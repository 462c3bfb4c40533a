"""Time of a batch from the loader, 12 x 256 tokens, and memory against the size of the corpus.

    python benchmarks/loader.py

``llmkit`` is the loader that ``llmkit fit`` trains from, over a token file of 40 MB: shuffled blocks, each token once
an epoch, with its place in the epoch kept for resumption. ``memmap, random crops`` is nanoGPT's way: independent random
places of a mapped file, a tensor made of each and stacked, which keeps no order and repeats and misses tokens.
``DataLoader, a block at a time`` is torch's loader with a data set of single blocks of that file, shuffled and
collated by torch. Memory is that of a process of its own, which draws 3,000 batches from a file of 1 GB, less the same
with 16 MB: the private memory at its end, and the resident set at its highest, which counts what is mapped of the file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kit import OURS, Report, arguments, interleave
from torch.utils.data import DataLoader, Dataset

from llmkit import DataModule, plugin
from llmkit.data.tokens import Blocks, Tokens
from llmkit_plugins.tokenizer import Byte

BATCH, CONTEXT, VOCAB = 12, 256, 8192
BATCHES = 2000
"""A turn."""
MILLISECONDS, MEBIBYTES = 0.15, 32
"""The goals: of a batch, and of memory beyond that with a small file, at most."""


def token_file(path: Path, size: int) -> Path:
    """Write ``size`` random tokens of two bytes."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, size, 2**24):
            file.write(rng.integers(0, VOCAB, min(2**24, size - start), np.uint16).tobytes())
    return path


def llmkit(path: Path) -> Iterator[Any]:
    """Yield batches of the data module's training loader, for ever; the token file stands for a prepared split."""
    data = DataModule(str(path), batch_size=BATCH, validation_share=0, seed=0)
    data.bind(plugin("head", "generation")(), CONTEXT, Byte())
    size = path.stat().st_size // 2
    data._splits["train", BATCH, None] = Blocks(Tokens(path, "uint16", size, 4.0 * size), CONTEXT, BATCH, 0)
    loader = data.train_dataloader()
    while True:
        yield from loader


def crops(path: Path) -> Iterator[Any]:
    """Yield blocks from random places of the mapped file."""
    tokens = np.memmap(path, np.uint16, "r")
    while True:
        places = torch.randint(len(tokens) - CONTEXT, (BATCH,)).tolist()
        ids = torch.stack([torch.from_numpy(tokens[at : at + CONTEXT].astype(np.int64)) for at in places])
        targets = torch.stack([torch.from_numpy(tokens[at + 1 : at + 1 + CONTEXT].astype(np.int64)) for at in places])
        yield ids, targets


class Single(Dataset[Any]):
    """Blocks one by one."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // CONTEXT

    def __getitem__(self, index: int) -> Any:
        block = torch.from_numpy(self.tokens[index * CONTEXT : (index + 1) * CONTEXT + 1].astype(np.int64))
        return {"ids": block[:-1], "targets": block[1:]}


def singles(path: Path) -> Iterator[Any]:
    """Yield batches of torch's loader."""
    loader = DataLoader(Single(path), BATCH, shuffle=True)
    while True:
        yield from loader


WAYS: dict[str, Callable[[Path], Iterator[Any]]] = {
    OURS: llmkit, "memmap, random crops": crops, "DataLoader, a block at a time": singles,
}  # fmt: skip


def drawn(batches: Iterator[Any]) -> Callable[[], None]:
    """Return a turn: so many batches of an endless iterator."""

    def turn() -> None:
        for _ in islice(batches, BATCHES):
            pass

    return turn


def memory(way: str, path: Path) -> tuple[float, float]:
    """Return the private and the highest resident memory of a process that draws batches, in MiB."""
    code = f"import loader; loader.draw({way!r}, {str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    private, highest = done.stdout.split()[-2:]
    return float(private), float(highest)


def draw(way: str, path: str) -> None:
    """Draw batches and print this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that the imports made
    batches = WAYS[way](Path(path))
    for _ in islice(batches, 3000):
        pass
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(*(int(status[name].split()[0]) / 1024 for name in ("RssAnon", "VmHWM")))


def main() -> None:
    """Measure time, then memory."""
    args = arguments(__doc__)
    report = Report("loader", args.json)
    case = f"a batch of {BATCH} x {CONTEXT}"
    with tempfile.TemporaryDirectory() as folder:
        path = token_file(Path(folder) / "tokens.bin", 20_000_000)
        times = interleave({name: drawn(way(path)) for name, way in WAYS.items()}, args.cycles)
        report.compare(case, times, "ms a batch", 1e3 / BATCHES)
        value = sorted(times[OURS])[len(times[OURS]) // 2] / BATCHES * 1e3
        goal = {"goal": f"under {MILLISECONDS} ms", "met": value < MILLISECONDS}
        report.add(case, OURS, round(value, 4), "ms a batch", **goal)
        if not Path("/proc/self/clear_refs").exists():
            report.add("memory", OURS, None, "MiB", note="missing: is read from /proc, which this system lacks")
            return report.close()
        small, large = path, Path(folder) / "large.bin"
        token_file(small, 8_000_000)
        token_file(large, 500_000_000)
        with ThreadPoolExecutor(2) as pool:  # nothing is timed
            sizes = list(pool.map(memory, (way for way in WAYS for _ in range(2)), (large, small) * len(WAYS)))
        for name, of_large, of_small in zip(WAYS, sizes[::2], sizes[1::2], strict=True):
            found = zip(("private", "resident"), of_large, of_small, strict=True)
            for kind, much, little in found:
                more = round(much - little, 1)
                wanted = {"goal": f"under {MEBIBYTES} MiB", "met": more < MEBIBYTES} if name == OURS else {}
                report.add(f"{kind} memory, 1 GB against 16 MB", name, more, "MiB more", **wanted)
    report.close()


if __name__ == "__main__":
    main()

"""Damaged files through the doors that users have, in watched processes: what ``docs/reliability/fuzz.py`` counts.

A file must load or be refused with a UserError within ten seconds of CPU time and a minute in all. Whatever else
happens is a failure: another exception, a hang, a crash of the process, and code that runs. The last is told by
Python's audit events: a process, a socket, a file opened for writing elsewhere, an unpickled global, a call in
evaluated text, an import of what is not installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


import mutations

import llmkit
from llmkit import UserError, main, plugin, registry

KINDS = ("checkpoint",) * 4 + ("tokenizer",) * 2 + ("data",) * 4
"""What is damaged, by the number of the file: the shares of the three."""
LIMIT = 10.0
"""Seconds of CPU time that a file may take: other work on the machine is not the file's fault."""
PATIENCE = 60.0
"""Seconds that a file may take, for one that waits for something."""
MEMORY = 2**30
"""Bytes that a worker may take beside what it has at the start."""
TEXT = "the fox 狐狸 <unk>\n jumps"
READERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": ("generation", "x.txt", {}),
    "csv": ("classification", "x.csv", {}),
    "tsv": ("translation", "x.tsv", {}),
    "jsonl": ("classification", "x.jsonl", {}),
    "json": ("classification", "x.json", {}),
    "lines": ("classification", "x.txt", {"format": "lines", "pattern": "(?P<label>\\S+) (?P<text>.*)"}),
    "conll": ("token_classification", "x.conll", {"format": "conll"}),
    "squad": ("question_answering", "x.json", {"format": "squad"}),
    "parallel": ("translation", "", {}),
    "parquet": ("classification", "x.parquet", {}),
}
"""For each format: the head that reads it, the file's name, options."""


class Result(NamedTuple):
    """What came of one file."""

    number: int
    kind: str
    """What was damaged: ``checkpoint``, ``tokenizer`` or ``data``."""
    what: str
    """Which, and how."""
    outcome: str
    """``loaded``, ``refused``, or the kind of failure."""
    detail: str
    seconds: float


class Watch:
    """Python's audit events that tell of code that runs; one for a process, for it cannot be taken away again.

    Args:
        folder: where files may be written.
    """

    SPAWNS = ("subprocess", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.")
    OTHERS = ("socket.", "ctypes.", "webbrowser.", "code.__new__", "pickle.find_class")
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on = False
        self.seen: list[str] = []
        self.tops = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) - {"antigravity"}
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "subprocess.Popen" and [*args[1]][:2] == ["git", "status"]:  # what a run records of itself
            return
        bad = event.startswith((*self.SPAWNS, *self.OTHERS))
        if event == "open" and isinstance(args[2], int):
            bad = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) and self._outside(args[0])
        elif event.startswith(self.CHANGES):
            bad = self._outside(args[0])
        elif event == "exec":
            text = args[0].co_filename.startswith("<") and not args[0].co_filename.startswith("<frozen")
            # Annotations are evaluated, which calls nothing.
            bad = text and any(step.opname.startswith("CALL") for step in dis.get_instructions(args[0]))
        elif event == "import":
            bad = str(args[0]).partition(".")[0] not in self.tops
        if bad:
            self.seen.append(f"{event} {str(args)[:200]}")

    def _outside(self, path: Any) -> bool:
        if isinstance(path, int):  # a file that is open already
            return False
        return not os.fsdecode(path).startswith((self.folder, os.devnull))


class Fuzz:
    """The files to damage, and what is done with them.

    Args:
        folder: where files are written.
        seed: of the damage: file ``n`` of a seed is always the same.
        heads: whose checkpoints there are; None: all.
    """

    def __init__(self, folder: Path, seed: int, heads: list[str] | None = None) -> None:
        self.folder, self.seed = folder, seed
        trained = mutations.checkpoints(folder, heads or list(mutations.MODELS))
        self.checkpoints = {head: path.read_bytes() for head, path in trained.items()}
        self.tokenizers = mutations.tokenizers()
        self.data = mutations.data_files()

    def run(self, number: int, folder: Path, watch: Watch | None = None) -> Result:
        """Make and load one file; without a watch its failure is raised."""
        rng = random.Random(f"{self.seed}-{number}")
        kind = KINDS[number % len(KINDS)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        what, door = getattr(self, f"_{kind}")(rng, folder)
        start = time.monotonic()
        try:
            if watch:
                watch.seen, watch.on = [], True
            outcome, detail = "loaded", ""
            door()
        except UserError as error:
            outcome, detail = "refused", str(error)
            if watch is None:
                traceback.print_exc()
        except BaseException as error:
            if watch is None or isinstance(error, KeyboardInterrupt):
                raise
            outcome = f"raised {type(error).__name__}"
            detail = "".join(traceback.format_exception(error)[-4:])
        finally:
            if watch:
                watch.on = False
        if watch and watch.seen:
            outcome, detail = "ran code", "; ".join(watch.seen[:3])
        return Result(number, kind, what, outcome, detail, time.monotonic() - start)

    def _checkpoint(self, rng: random.Random, folder: Path) -> tuple[str, Any]:
        head = rng.choice(list(self.checkpoints))
        how, content = mutations.checkpoint(self.checkpoints[head], rng)
        path = folder / "x.ckpt"
        path.write_bytes(content)

        def predict() -> None:
            model = llmkit.load(path)
            options = dataclasses.replace(model.head.decoding, max_new_tokens=3)
            answers = model.predict([dict.fromkeys(model.head.inputs, TEXT)], options)
            json.dumps(answers)

        def begin() -> None:
            llmkit.LanguageModel(init_from=str(path), dim=16, num_layers=1, context=16)

        def resume() -> None:
            words = ["fit", "--ckpt_path", str(path), "--output", str(folder), "--trainer.max_steps", "2"]
            code = main.main([*words, "--data.cache_dir", str(folder / "cache")])
            if code:
                raise UserError("(the command says so)") if code == 2 else RuntimeError(f"exit code {code}")

        kind = rng.random()
        if kind < (0.3 if how == "training state" else 0.02):
            return f"{head}: {how}, resumed", resume
        return f"{head}: {how}", begin if kind > 0.9 else predict

    def _tokenizer(self, rng: random.Random, folder: Path) -> tuple[str, Any]:
        name = rng.choice(list(self.tokenizers))
        how, content = mutations.several(self.tokenizers[name], rng, mutations.text)
        state = ""
        if "/" in name or name == "folder":
            tokenizer = plugin("tokenizer", "pretrained", path=str(_written(content, folder, "tokenizer.json")))()
        else:
            tokenizer = registry.factory_of({"class_path": name}, "tokenizer")()
            state = content.decode("utf-8", "surrogateescape")

        def use() -> None:
            if state:
                tokenizer.from_state(state)
            assert all(0 <= number < tokenizer.vocab_size for number in tokenizer.encode(TEXT))
            tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.pad_id, tokenizer.sep_id])
            again = type(tokenizer)(**({"path": "."} if "path" in vars(tokenizer) else {}))
            again.from_state(tokenizer.to_state())
            assert again.encode(TEXT) == tokenizer.encode(TEXT)

        return f"{name}: {how}", use

    def _data(self, rng: random.Random, folder: Path) -> tuple[str, Any]:
        format = rng.choice(list(self.data))
        how, content = mutations.several(self.data[format], rng, mutations.text)
        head, name, options = READERS[format]
        path = _written(content, folder, name)
        train: Any = str(path) if path.is_file() else {item.name: str(item) for item in path.iterdir()}
        policy: Any = rng.choice(["error", "skip"])

        def read() -> None:
            data = llmkit.DataModule(
                train=train, tokenizer=plugin("tokenizer", "byte"), validation_share=0.0, batch_size=8, seed=0,
                on_bad_row=policy, cache_dir=str(folder / "cache"), **options,
            )  # fmt: skip
            data.bind(plugin("head", head)(), 64)
            data.setup("fit")
            for _ in data.train_dataloader():
                pass

        return f"{format}: {how}, {policy}", read


def _written(content: mutations.Saved, folder: Path, name: str) -> Path:
    """Write a file, or several into a folder; returns its path, or the folder's."""
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
        return folder / name
    inner = folder / "several"
    inner.mkdir()
    for part, data in content.items():
        (inner / part).write_bytes(data)
    return inner


def _work(fuzz: Fuzz, folder: Path, pipe: Connection) -> None:
    """Run the files whose numbers come through a pipe; results go back through it."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    watch = Watch(folder.parent)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(fuzz.run(pipe.recv(), folder, watch))


class Worker:
    """A process that loads files one after the other, and the file it has now."""

    def __init__(self, fuzz: Fuzz, folder: Path) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        # A fork has all that is imported already, so that a new one after a crash costs nothing.
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(fuzz, folder, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.number, self.since, self.used = -1, 0.0, 0.0

    def give(self, number: int) -> None:
        """Let it begin with a file."""
        self.number, self.since, self.used = number, time.monotonic(), self._cpu()
        self.pipe.send(number)

    def late(self) -> bool:
        """Return whether the file that it has now took too long."""
        with contextlib.suppress(OSError):  # it has died, which its pipe will say
            if time.monotonic() - self.since > PATIENCE and self._stat()[0] != "R":  # R: it waits for a busy machine
                return True
            return self._cpu() - self.used > LIMIT
        return False

    def _cpu(self) -> float:
        """Return the seconds of CPU time the process has used."""
        fields = self._stat()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _stat(self) -> list[str]:
        """Return the fields of /proc/PID/stat from the state on."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()

    def stop(self) -> None:
        """End it."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def results(fuzz: Fuzz, files: int, workers: int = 2) -> Iterator[Result]:
    """Yield what came of each file, in the order in which they are done."""
    left = iter(range(files))
    folders = [fuzz.folder / "work" / str(n) for n in range(min(workers, files))]
    crew = {folder: Worker(fuzz, folder) for folder in folders}
    try:
        yield from _all(fuzz, left, crew)
    finally:
        for worker in crew.values():
            worker.stop()


def _all(fuzz: Fuzz, left: Iterator[int], crew: dict[Path, Worker]) -> Iterator[Result]:
    for worker in list(crew.values()):
        worker.give(next(left))
    while crew:
        ready = wait([worker.pipe for worker in crew.values()], timeout=0.5)
        for folder, worker in list(crew.items()):
            try:
                if worker.pipe in ready:
                    yield worker.pipe.recv()
                elif worker.late():
                    raise TimeoutError
                else:
                    continue
            except (EOFError, ConnectionError, TimeoutError) as error:
                worker.process.join(1)
                outcome = "hung" if isinstance(error, TimeoutError) else f"crashed ({worker.process.exitcode})"
                worker.stop()
                yield Result(
                    worker.number, KINDS[worker.number % len(KINDS)], "?", outcome, "", time.monotonic() - worker.since
                )
                worker = crew[folder] = Worker(fuzz, folder)
            number = next(left, None)
            if number is None:
                crew.pop(folder).stop()
            else:
                worker.give(number)

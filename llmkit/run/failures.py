"""Reports for failed runs that no setting explains: a plugin that raises, a full disk, a failed compilation."""

from __future__ import annotations

import errno
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import llmkit
from llmkit import imports, registry
from llmkit.errors import Problem

CORE = Path(llmkit.__file__).resolve().parent
HELPERS = (CORE / "contracts.py", CORE / "sequence.py", CORE / "ops")
"""Modules that plugins call: an error raised there is reported as one of the calling plugin."""
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What the system says of a file or folder that the user named and that cannot be written or read."""
REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, ImportError)
REFUSED_BY = {
    "/torch/optim/lr_scheduler": "model.scheduler",
    "/torch/optim/": "model.optimizer",
    "/lightning/pytorch/core/optimizer": "model.scheduler",
    "/lightning/pytorch/callbacks/": "trainer.callbacks",
    "/lightning/pytorch/tuner/": "trainer.callbacks",
    "/lightning/pytorch/loggers/": "trainer.logger",
    "/lightning/pytorch/profilers/": "trainer.profiler",
    "/lightning/pytorch/strategies/": "trainer.strategy",
}
"""Part of a file's path, and the config key that decides what runs there; the first that fits counts."""
LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


class Frame(NamedTuple):
    """One call of a traceback: its file and line, its text in a traceback, and the object whose method it is."""

    file: Path
    line: int
    text: str
    owner: Any = None


class Failure(NamedTuple):
    """The text for stderr, and the exit code."""

    text: str
    code: int


def explain(error: BaseException) -> Failure | None:
    """Return the report of an error; None for a bug of llmkit, which needs its whole traceback."""
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full" if cause.errno == errno.ENOSPC else "the disk quota is used up"
            file = f", while writing {cause.filename}" if cause.filename else ""
            return Failure(f"llmkit: error: {what}{file}. Checkpoints that were written before are intact.", 2)
        if type(cause).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            text = " ".join(str(cause).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:300]
            return Failure(f"llmkit: error: model.compile: torch.compile failed: {text}. Training works without it.", 2)
    for cause in causes:
        report = _plugin_report(_frames(cause), f"{type(cause).__name__}: {cause}")
        report = report or _plugin_report(*_quoted_frames(str(cause)))
        if report:
            return Failure(report, 1)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in UNUSABLE and cause.filename:
            return Failure(f"llmkit: error: {cause.filename} cannot be used: {cause.strerror}", 2)
    return None


def refusal(error: BaseException) -> Problem | None:
    """Return what Lightning or an optimizer of torch refuses while a run is under way, under the key it is about.

    A refusal is Lightning's MisconfigurationException, or an error raised by a statement in a file of ``REFUSED_BY``.
    One that a mistake of ours causes in there is not.
    """
    last = traceback.extract_tb(error.__traceback__)[-1:]
    file = Path(last[0].filename).as_posix() if last else ""
    raised = bool(last) and (last[0].line or "").lstrip().startswith("raise ")
    key = next((key for part, key in REFUSED_BY.items() if part in file), "")
    text = " ".join(str(error).split())[:400]
    if isinstance(error, MisconfigurationException):
        return Problem(key, text if key else f"Lightning: {text}")
    return Problem(key, text) if key and raised and isinstance(error, REFUSALS) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or the machine is out of memory."""
    texts = ("can't allocate memory", "out of memory")  # RuntimeErrors of torch
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, ..."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _frames(error: BaseException) -> list[Frame]:
    """Return the frames of an error; the last one raised it."""
    shown = traceback.extract_tb(error.__traceback__)
    live = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [
        Frame(Path(item.filename), item.lineno or 0, traceback.format_list([item])[0], frame.f_locals.get("self"))
        for item, frame in zip(shown, live, strict=False)  # tracebacklimit may cut the first
    ]


def _quoted_frames(message: str) -> tuple[list[Frame], str]:
    """Return the frames and the error of a traceback within a message: how torch passes on an error of a worker."""
    trace = message.rpartition("Traceback (most recent call last):\n")[2]
    found = list(re.finditer(r'  File "(.+)", line (\d+), in .*\n(?:    .*\n)*', trace))
    frames = [Frame(Path(match[1]), int(match[2]), match[0]) for match in found]
    return frames, trace[found[-1].end() :] if found else trace


def _plugin_report(frames: list[Frame], message: str) -> str | None:
    """Return the message and the frames of a plugin; None when it was not a plugin that raised.

    It was a plugin if the last frame that is neither of a library nor of ``HELPERS`` is in one. Example, with what is
    shown marked by *: ``cli.py, trainer.py, mine.py *, torch/linear.py, mine.py *, ops/losses.py *, torch/nn.py``.
    """
    roots = plugin_roots()
    kinds = [_kind(frame.file, roots) for frame in frames]
    last = next((i for i in reversed(range(len(frames))) if kinds[i] in ("plugin", "core")), None)
    if last is None or kinds[last] == "core":
        return None
    raised = frames[last]
    first = next(i for i, frame in enumerate(frames) if frame.file == raised.file)
    who = _name([frame for frame in frames[first : last + 1] if frame.file == raised.file])
    shown = [frames[i].text for i in range(first, len(frames)) if kinds[i] in ("plugin", "own")]
    head = f"{who} (file {raised.file.name}, line {raised.line}) raised {' '.join(message.split())}"
    if re.search(r"same device|expected device|device.* meta", message):
        head = head.rstrip("!.") + ". Make new tensors where the input is: torch.arange(n, device=x.device)"
    return f"llmkit: error: {head}\n{''.join(shown)}".rstrip("\n")


def plugin_roots() -> list[Path]:
    """Return the files and package folders of plugins: the installed ones, and the user's own modules."""
    names = {entry.target.partition(".")[0].partition(":")[0] for entry in _entries()}
    modules = [sys.modules.get(name) for name in {*names, *imports.imported}]
    paths = [getattr(module, "__path__", None) or [getattr(module, "__file__", None)] for module in modules]
    return [Path(path).resolve() for path in chain.from_iterable(paths) if path]


def _entries() -> list[registry.Entry]:
    return [entry for family in registry.DEFAULTS for entry in registry.entries(family).values()]


def _kind(file: Path, roots: list[Path]) -> str:
    """Return ``plugin``, ``core``, ``library``, or ``own`` for other code that is shown with a plugin's frames."""
    file = file.resolve()
    if any(map(file.is_relative_to, roots)):
        return "plugin"
    if file.is_relative_to(CORE):
        return "own" if any(map(file.is_relative_to, HELPERS)) else "core"
    return "library" if file.name.startswith("<") or any(map(file.is_relative_to, LIBRARIES)) else "own"


def _name(frames: list[Frame]) -> str:
    """Return family and name of the plugin that the frames belong to: by its object, else by the lines of its class."""
    entries = {entry.target: entry for entry in _entries()}
    owners = [type(frame.owner) for frame in reversed(frames) if frame.owner is not None]
    found = [entries[target] for cls in owners if (target := f"{cls.__module__}:{cls.__qualname__}") in entries]
    found = found or [entry for entry in entries.values() if _holds(entry, frames[-1])]
    if found:
        return f"{found[0].family} {found[0].name}"
    return f"plugin {owners[0].__name__}" if owners else "plugin"


def _holds(entry: registry.Entry, frame: Frame) -> bool:
    """Return whether a frame is inside the class of a plugin."""
    module, _, name = entry.target.partition(":")
    cls = getattr(sys.modules.get(module), name, None)
    try:
        lines, start = inspect.getsourcelines(cls)  # type: ignore[arg-type]
        return Path(inspect.getfile(cls)).samefile(frame.file) and start <= frame.line < start + len(lines)  # type: ignore[arg-type]
    except (OSError, TypeError):  # not imported, or without a source
        return False

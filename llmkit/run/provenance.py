"""What made a run: code, packages, machine, and how far it went. ``provenance.json`` and ``code/`` in its folder."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import llmkit
from llmkit import registry
from llmkit.checkpoint.content import Stored
from llmkit.checkpoint.sources import class_paths, packages, sources
from llmkit.data.identity import file_of
from llmkit.errors import Stopped, note
from llmkit.lightning import global_seed, is_debug_run
from llmkit.model.language_model import LanguageModel
from llmkit.run.folder import run_folder
from llmkit.run.record import OF_THE_TRY, PROVENANCE
from llmkit.run.saving import PART
from llmkit.run.throughput import Throughput

PACKAGES = (
    *("torch", "lightning", "jsonargparse", "numpy", "tokenizers", "torchmetrics"),
    *("datasets", "transformers", "triton", "peft"),
)
"""The distributions whose versions are recorded where they are installed, next to those with the run's plugins."""
CODE = "code"
"""The folder, in that of the run, with copies of local plugin files."""
PATIENCE = 1.0
"""Seconds that git may take; in a repository so large that this does not do, nothing of it is recorded."""


class Provenance(pl.Callback):
    """Writes ``provenance.json`` when training starts, so that a killed run has it, and completes it at the end.

    Nothing here makes a run fail, and only the first process writes.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        stored: the checkpoint that the command starts from.
    """

    def __init__(self, command: str, stored: Stored | None = None) -> None:
        self.command, self.stored = command, stored
        self._began = time.time()
        self._facts: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is known before the first step."""
        self.write(trainer, "running")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Complete the record of a fit that ends early."""
        if self._facts is not None:
            kind = "" if isinstance(exception, Stopped) else f"{type(exception).__name__}: "
            self.write(trainer, f"{kind}{' '.join(str(exception).split())[:200]}".removesuffix(": "))

    def write(self, trainer: pl.Trainer, status: str = "finished") -> dict[str, Any]:
        """Write the record as of now; returns the part of it that equal runs have in common."""
        if not trainer.is_global_zero or is_debug_run(trainer):
            return {}
        folder, first = run_folder(trainer), self._facts is None
        if self._facts is None:
            assert isinstance(trainer.lightning_module, LanguageModel)
            self._facts = _facts(trainer, trainer.lightning_module)
        started = datetime.datetime.fromtimestamp(self._began).astimezone()
        seconds = round(time.time() - self._began, 1)
        checkpoint = None if self.stored is None else str(self.stored.path)
        tried = (self.command, status, started.isoformat(timespec="seconds"), seconds, checkpoint)
        facts = {**self._facts, **self._progress(trainer)}
        record = {**dict(zip(OF_THE_TRY, tried, strict=True)), **facts}
        try:
            part = folder / f"{PROVENANCE}{PART}"  # not flushed to the disk, which takes longer than all the rest
            part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(part, folder / PROVENANCE)
            if first:
                _copy_local(facts["sources"], folder / CODE)
        except OSError as error:
            note(f"what made this run is not recorded: {error}")
        return facts

    def _progress(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return how far the weights have been trained: optimizer steps, and tokens where they were counted."""
        if self.command == "fit":
            counter = next((item for item in trainer.callbacks if isinstance(item, Throughput)), None)  # type: ignore[attr-defined]
            return {"step": trainer.global_step, "tokens": counter and counter.tokens()}
        content = self.stored.content if self.stored else {}
        counted = content.get("callbacks", {}).get("Throughput")
        return {"step": content.get("global_step"), "tokens": counted and counted.get("tokens")}


def _facts(trainer: pl.Trainer, model: LanguageModel) -> dict[str, Any]:
    """Return what is known of a run before its first step."""
    imported = [Path(name).stem if name.endswith(".py") else name for name in model.config.get("imports") or ()]
    used = (path.rpartition(".")[0] for path in class_paths([model.config, model.spec]))
    code = sources([*imported, *used])
    brought = {packages().get(module.partition(".")[0], "llmkit") for module in code}
    name, mode = model.head.monitor
    device = trainer.strategy.root_device
    return {
        "llmkit": llmkit.__version__,
        **{family: _short_name(family, model.spec[family]["class_path"]) for family in ("head", "attention")},
        "parameters": model.network.num_parameters()["total"],
        "metric": f"val_{name}",
        "better": mode,
        "seed": global_seed(),
        "device": device.type,
        "processes": trainer.world_size,
        "machine": _machine(device),
        "git": _git(),
        "packages": _versions((*PACKAGES, *sorted(brought))),
        "sources": code,
    }


def _short_name(family: str, class_path: str) -> str:
    names = {entry.class_path: name for name, entry in registry.entries(family).items()}
    return names.get(class_path, class_path.rpartition(".")[2])


@functools.cache
def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, llmkit's own apart."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {name: number for name, number in found.items() if name != "llmkit"}


def _machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, without its name."""
    on_gpu = device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _cpu() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return platform.machine()


def _git() -> dict[str, Any]:
    """Return the commit of the working directory, its branch, and whether tracked files differ; None: not known."""
    words = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    unlocked = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a commit that is being made elsewhere is not disturbed
    text = ""
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=True, env=unlocked
        )
        text = answer.stdout.decode("utf-8", "replace")
    lines = text.splitlines()
    head = dict(line[len("# branch.") :].partition(" ")[::2] for line in lines if line.startswith("# branch."))
    commit, branch = (value if (value := head.get(key, "(")).find("(") else None for key in ("oid", "head"))
    return {"commit": commit, "branch": branch, "dirty": any(line[:1] != "#" for line in lines) if lines else None}


def _copy_local(modules: dict[str, str], folder: Path) -> None:
    """Copy those modules that come with no installed package. Raises OSError where that cannot be done."""
    installed = packages()
    for name in modules:
        file = None if name.partition(".")[0] in installed else file_of(name)
        if file is not None:
            place = folder.joinpath(*name.split("."), *(["__init__"] if file.name == "__init__.py" else []))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place.with_name(f"{place.name}.py"))

"""``llmkit cell``: one run of a study in this process, for whatever starts processes on other machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmkit.commands import Parser, at_least, fit
from llmkit.errors import Stopped, UserError
from llmkit.run.saving import write_text
from llmkit.study.execute import run_logged
from llmkit.study.outcomes import CELLS, OUTCOME, Cell

DESCRIPTION = (
    "Run one cell of a study that 'llmkit compare --cells' has listed, unless it has ended. It resumes where an "
    "earlier process stopped, so a cluster may start it again at any time. Its output is in log.txt of its folder."
)
VISIBLE = "CUDA_VISIBLE_DEVICES"


def run(command: str, argv: list[str]) -> int:
    """Run a cell; returns the exit code of its fit, or 75 while another process runs it."""
    parser = Parser(command, DESCRIPTION)
    parser.add_argument("study", metavar="FOLDER", help="the study's folder")
    parser.add_argument("index", metavar="INDEX", type=at_least(0), help="the cell's number, from 0")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads; default 1")
    options = parser.parse(argv)
    root = Path(options.study)
    try:
        listed = [Cell(**cell) for cell in json.loads((root / CELLS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cell: {root} has no {CELLS}: 'llmkit compare --cells' writes it") from error
    if options.index >= len(listed):
        raise UserError(f"cell: {root} has {len(listed)} cells, numbered from 0; got {options.index}")
    return run_logged(fit_cell, root / "cells", listed[options.index], options.threads)


def devices() -> list[str]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    given = os.environ.get(VISIBLE)
    return [str(n) for n in range(torch.cuda.device_count())] if given is None else list(filter(None, given.split(",")))


@contextmanager
def one_device() -> Iterator[None]:
    """Hide all GPUs but the first within the block, for Lightning would take them all."""
    found, given = devices(), os.environ.get(VISIBLE)
    if len(found) > 1:
        os.environ[VISIBLE] = found[0]
    try:
        yield
    finally:
        if given is not None:
            os.environ[VISIBLE] = given
        else:
            os.environ.pop(VISIBLE, None)


def fit_cell(folder: Path, cell: Cell, threads: int) -> int:
    """Train a cell on one device: exactly what ``llmkit fit`` does with its words. Returns the exit code."""
    with one_device():
        return _fit(folder, cell, threads)


def _begin(folder: Path, cell: Cell) -> str:
    """Return the checkpoint that a cell begins from: its own last one, or at first that of the cell it continues."""
    if cell.begins is None or any(folder.glob("version_*/checkpoints/*.ckpt")):
        return "last"
    before = Path(str(folder).removesuffix(cell.name), cell.begins)
    run = json.loads((before / OUTCOME).read_text(encoding="utf-8"))["run"]
    return str(before / run / "checkpoints" / "last.ckpt")


def _fit(folder: Path, cell: Cell, threads: int) -> int:
    torch.set_num_threads(threads)
    own = [f"--output={folder.parent}", f"--name={folder.name}", f"--ckpt_path={_begin(folder, cell)}"]
    code, diverged = 0, False
    try:
        code = fit.run("fit", [*cell.words, *own])
    except Stopped as stop:
        return stop.code
    except UserError as error:
        print(f"llmkit: error: {' '.join(str(error).split())}", file=sys.stderr)
        code, diverged = 2, "NaN or infinite" in str(error)
    if code == 0 or diverged:
        runs = sorted(folder.glob("version_*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        metrics = list(json.loads(runs[-1].read_text(encoding="utf-8"))) if runs else []
        outcome = {"diverged": diverged, "run": runs[-1].parent.name if runs else "", "metrics": metrics}
        write_text(folder / OUTCOME, json.dumps(outcome) + "\n")
    return code

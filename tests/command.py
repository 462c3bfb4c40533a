"""The command line in-process: importing torch and lightning anew for each command would cost seconds."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from llmkit import main
from llmkit.run import figures, throughput

_peak_flops = functools.cache(throughput.peak_flops)
_curves = figures.comparison_curves
_drawn: dict[str, bytes] = {}


def _draw_once(curves: Mapping[str, figures.Curve], png_file: Path, ylabel: str = "loss (nats)") -> None:
    """Draw curves, unless others of the same labels and steps (and as finite) were drawn: a fourth of a small fit."""
    shape = [(name, [(step, math.isfinite(value)) for step, value in points]) for name, points in curves.items()]
    key = repr((shape, ylabel))
    if key not in _drawn:
        _curves(curves, png_file, ylabel)
        _drawn[key] = png_file.read_bytes()
    png_file.write_bytes(_drawn[key])


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that the closing report of a fit recommends."""
        found = re.search(r"llmkit infer (\S+)", self.out)
        assert found, self
        return Path(found[1])

    @property
    def folder(self) -> Path:
        """The run folder of a fit."""
        return self.checkpoint.parent.parent


def llmkit(*words: object) -> Result:
    """Run a command and return its exit code and what it printed. A bug leaves as the exception it is.

    The speed of the machine is measured once a process, and loss curves that differ in values only are drawn once.
    """
    out, err = io.StringIO(), io.StringIO()
    once = mock.patch.object(throughput, "peak_flops", _peak_flops)
    picture = mock.patch.object(figures, "comparison_curves", _draw_once)
    with once, picture, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def done(*words: object) -> Result:
    """Run a command that has to succeed."""
    result = llmkit(*words)
    assert result.code == 0, f"{result.out[-3000:]}\n{result.err}"
    return result


TINY = (
    *("--model.dim", "16", "--model.num_layers", "1", "--model.context", "16", "--model.decoding.max_new_tokens", "4"),
    *("--data.tokenizer", "char", "--data.batch_size", "2"),
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
)
"""Options of a fit that takes less than a second."""

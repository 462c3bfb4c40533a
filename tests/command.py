"""The command line in-process: importing torch and lightning anew for each command would cost seconds."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lightning.pytorch.trainer.connectors import callback_connector

from llmkit import main
from llmkit.run import figures, throughput
from llmkit.run.cli import CLI

_peak_flops = functools.cache(throughput.peak_flops)
_external_callbacks = functools.cache(callback_connector._load_external_callbacks)  # type: ignore[attr-defined]
_parsers: dict[str, Any] = {}
_build_parser = CLI.setup_parser
_curves = figures.comparison_curves
_matrix = figures.confusion_matrix
_drawn: dict[tuple[object, ...], list[bytes]] = {}


def _draw_once(curves: Mapping[str, figures.Curve], png_file: Path, ylabel: str) -> None:
    """Draw curves, unless others of these labels (as finite, and as short) were drawn: a fourth of a small fit."""
    few = [min(len(points), 2) + (len(points) >= figures.LONG) for points in curves.values()]
    finite = [all(math.isfinite(value) for _, value in points) for points in curves.values()]
    _once((*curves, ylabel, *few, *finite), png_file, lambda: _curves(curves, png_file, ylabel))


def _matrix_once(counts: list[list[int]], labels: list[str], png_file: Path) -> None:
    """Draw a confusion matrix, unless one of these labels was drawn."""
    _once((*labels, len(counts)), png_file, lambda: _matrix(counts, labels, png_file))


def _once(key: tuple[object, ...], png_file: Path, draw: Callable[[], None]) -> None:
    files = (png_file, png_file.with_suffix(".pdf"))
    if key not in _drawn:
        draw()
        _drawn[key] = [file.read_bytes() for file in files]
    for file, content in zip(files, _drawn[key], strict=True):
        file.write_bytes(content)


def parser_once(cli: CLI, *settings: Any) -> None:
    """Build the parser of a command from the signatures of model, data and trainer: a fourth of a small fit."""
    if cli.command not in _parsers:
        _build_parser(cli, *settings)
        _parsers[cli.command] = {"parser": cli.parser, "command_keys": cli.command_keys}
    vars(cli).update(_parsers[cli.command])


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


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Do some things once a process.

    These are measuring the speed of the machine, building the parser of a command, looking for packages that bring
    callbacks, and drawing loss curves and confusion matrices that differ in values only.
    """
    places: tuple[tuple[Any, str, Any], ...] = (
        (throughput, "peak_flops", _peak_flops),
        (callback_connector, "_load_external_callbacks", _external_callbacks),
        (figures, "comparison_curves", _draw_once),
        (figures, "confusion_matrix", _matrix_once),
        (CLI, "setup_parser", parser_once),
    )
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(*place))
        yield


def draw_a_curve(folder: Path) -> None:
    """Draw the loss curve of a small fit, so that the copies of this process need not."""
    curve = [(1, 1.0), (2, 1.0)]
    for label in ("loss", "loss (nats per token)"):
        _draw_once({"training": curve, "validation": curve}, folder / "loss.png", label)


def save_empty(figure: object, path: Path) -> None:
    """Write empty files, in place of ``drawing.save`` where another test looks at the figures."""
    for kind in (".png", ".pdf"):
        path.with_suffix(kind).touch()


@contextlib.contextmanager
def cheap() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Catch what is printed to stdout and stderr in the block, and do what ``once`` does."""
    out, err = io.StringIO(), io.StringIO()
    with once(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def llmkit(*words: object) -> Result:
    """Run a command and return its exit code and what it printed. A bug leaves as the exception it is."""
    with cheap() as (out, err):
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

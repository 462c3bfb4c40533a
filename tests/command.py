"""The command line in-process: importing torch and lightning anew for each command would cost seconds."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

from llmkit import main


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
    """Run a command and return its exit code and what it printed. A bug leaves as the exception it is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def done(*words: object) -> Result:
    """Run a command that has to succeed."""
    result = llmkit(*words)
    assert result.code == 0, result.err
    return result


TINY = (
    *("--model.dim", "16", "--model.num_layers", "1", "--model.context", "16", "--model.decoding.max_new_tokens", "4"),
    *("--data.tokenizer", "char", "--data.batch_size", "2"),
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
)
"""Options of a fit that takes less than a second."""

"""The ``llmkit`` command: a table of commands, each imported only when it runs, so that help is instant."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from llmkit import __version__, lazy
from llmkit.errors import Stopped, UserError, unknown

COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("llmkit.commands.start:run", "train the model of a config"),
    "validate": ("llmkit.commands.start:run", "evaluate a checkpoint on the validation data"),
    "test": ("llmkit.commands.start:run", "evaluate a checkpoint on the test data"),
    "predict": ("llmkit.commands.start:run", "write a checkpoint's predictions for a data set"),
    "infer": ("llmkit.commands.infer:run", "run a checkpoint on text: generate, classify, translate, ..."),
    "explain": ("llmkit.commands:run_verb", "show what each answer of a checkpoint rests on"),
    "eval": ("llmkit.commands.eval:run", "judge a language model by minimal pairs (BLiMP)"),
    "serve": ("llmkit.commands.serve:run", "serve a checkpoint over HTTP, in the shape of OpenAI's API"),
    "chat": ("llmkit.commands.chat:run", "talk to a checkpoint in a terminal"),
    "import": ("llmkit.commands.import_model:run", "turn a model of Hugging Face into a checkpoint"),
    "export": ("llmkit.commands.export:run", "write a checkpoint as a folder of Hugging Face"),
    "compress": ("llmkit.commands.compress:run", "make a checkpoint smaller, and report what that costs"),
    "compare": ("llmkit.commands.compare:run", "train variants at equal cost, and report which differences are real"),
    "scale": (
        "llmkit.commands:run_verb",
        "fit how the loss depends on size and tokens",
    ),
    "tune": ("llmkit.commands.tune:run", "search settings by trials, and write the best config"),
    "runs": ("llmkit.commands.runs:run", "list runs with their figures, sort and filter them, open a folder"),
    "cell": ("llmkit.commands.cell:run", "run one cell of a comparison in this process, for clusters"),
    "plugins": ("llmkit.commands:run_verb", "list, describe, check or create plugins"),
    "inspect": ("llmkit.commands.inspect:run", "describe the model of a config: parameters, FLOPs, memory"),
    "config": ("llmkit.commands:run_verb", "print a config in full, compare two, or print their schema"),
    "verify": ("llmkit.commands:run_verb", "check on your config that resuming and batching are exact, or muP"),
}
"""Command -> where its ``run(command, argv) -> exit code`` is, and one line of help."""

USAGE = """\
usage: llmkit COMMAND [options] [--debug]

Language model experiments: one YAML file, every part a plugin.

commands:
{commands}

options:
  -h, --help  print this text; 'llmkit COMMAND --help' prints the options of a command
  --version   print the version
  --debug     print the traceback of an error; works with every command

examples:
  llmkit fit --config configs/quickstart.yaml
  llmkit fit --config configs/quickstart.yaml --model.attention lstm
  llmkit plugins attention
"""


def usage() -> str:
    """Return the text of ``llmkit --help``."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return USAGE.format(commands="\n".join(rows))


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    It is 2 for a user's mistake, reported on stderr with one line for each problem, and 1 for a plugin that raised,
    reported with the frames of its own code. Any other exception is a bug of ours and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        with _any_character():
            code = _dispatch([argument for argument in argv if argument != "--debug"])
            sys.stdout.flush()  # here, so that a closed pipe is noticed here too
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        for problem in map(str, error.problems):
            # What a worker process raised comes from torch as the text of a whole traceback.
            problem = problem.rpartition("UserError: ")[2] if "\nOriginal Traceback" in problem else problem
            print(f"llmkit: error: {' '.join(problem.split())}", file=sys.stderr)
        return 2
    except Stopped as stop:
        return stop.code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("llmkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`llmkit plugins | head -1`). Python flushes once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from llmkit.run.failures import explain

        failure = explain(error)
        if failure is None:
            raise
        if debug:
            traceback.print_exc()
        print(failure.text, file=sys.stderr)
        return failure.code


@contextlib.contextmanager
def _any_character() -> Iterator[None]:
    """Let stdout write characters that its encoding lacks as escapes (``\\u4f60``), as stderr does anyway."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


class _Loading:
    """A context in which a terminal shows what is being loaded, once that has taken a second."""

    def __init__(self, package: str) -> None:
        self.text = f"llmkit: loading {package} ..."

    def __enter__(self) -> None:
        """Start the clock."""
        self.timer = threading.Timer(1.0, self._show)
        self.timer.daemon = True
        self.shown = False
        if sys.stderr.isatty():
            self.timer.start()

    def _show(self) -> None:
        self.shown = True
        print(self.text, end="", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        """Remove the line."""
        self.timer.cancel()
        if self.shown:
            print(f"\r{' ' * len(self.text)}\r", end="", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    command, *rest = argv
    if command == "--version":
        print(f"llmkit {__version__}")
        return 0
    if command.startswith("-"):
        raise UserError(f"the command comes first, before '{command}'. Allowed: {', '.join(COMMANDS)}.")
    if command not in COMMANDS:
        raise UserError(unknown("command", command, COMMANDS))
    lazy.defer({name: _Loading(title) for name, title in (("torch", "PyTorch"), ("lightning", "Lightning"))})
    module, _, function = COMMANDS[command][0].partition(":")
    code: int = getattr(importlib.import_module(module), function)(command, rest)
    return code

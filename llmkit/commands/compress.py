"""``llmkit compress``: write compressed forms of a checkpoint, and what each costs and loses."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, at_least, columns
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.run.cli import CLI

DESCRIPTION = (
    "Compress a checkpoint in several ways: a checkpoint for each, which infer, test, predict and eval take like any "
    "other, and one table and picture of bytes, memory, time and loss on the test rows (else the validation rows) of "
    "its data. Options of fit may change the data: --data.test FILE."
)


def run(command: str, argv: list[str]) -> int:
    """Write the folder and print the table; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, or a run folder: its best one")
    text = "methods with commas between them, or chains: int8,int4,svd50+int8; see 'llmkit plugins compression'"
    add("--to", metavar="METHODS", required=True, help=text)
    text = "other checkpoints of the same tokenizer and head to measure in the same table, say a distilled student"
    add("--more", metavar="NAME=CHECKPOINT,...", default="", help=text)
    add("--output", metavar="FOLDER", required=True, help="the folder to write, which must not exist or be empty")
    add("--rows", type=at_least(2), default=256, metavar="N", help="rows that losses are compared on; default: 256")
    text = "training rows for methods that calibrate; default: 256"
    add("--calibration", type=at_least(1), default=256, metavar="N", help=text)
    add("--rounds", type=at_least(2), default=7, metavar="N", help="rounds in which times are measured; default: 7")
    add("--no_memory", action="store_true", help="measure no memory, for which a process is started for each model")
    options, argv = parser.parse_known_args(argv)
    from llmkit.checkpoint.archive import file_of
    from llmkit.commands import fit
    from llmkit.run.cli import CLI

    path, folder = file_of(options.checkpoint, "best.ckpt", "last.ckpt"), Path(options.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"compress: --output {folder} exists already, and is not an empty folder")
    if find_spec("scipy") is None:  # said before minutes of measuring
        raise UserError("compress needs scipy for its intervals: pip install 'llmkit[study]'")

    class Compressing(CLI):
        def execute(self) -> None:
            _compress(self, path, folder, options)

    return fit.run("fit", ["--ckpt_path", str(path), "--trainer.logger", "false", *argv], Compressing, command)


def _compress(cli: CLI, path: Path, folder: Path, options: Namespace) -> None:
    import torch

    from llmkit.analysis.compress import frontier, report
    from llmkit.analysis.compress.chain import parse
    from llmkit.model.language_model import LanguageModel

    names, others = _parts(options.to), dict(one.partition("=")[::2] for one in _parts(options.more))
    if not names:
        raise UserError("compress: --to names no method")
    chains = {_file_name(name): parse(name) for name in dict.fromkeys(names)}
    for name, file in others.items():
        if not file or "/" in name or name in ("original", *chains):
            raise UserError(f"compress: --more takes NAME=CHECKPOINT, with a name of its own, got '{name}={file}'")
    model, data = LanguageModel.load(path), cli.datamodule
    more = {name: LanguageModel.load(file) for name, file in others.items()}
    data.bind(model.head, model.context, model.tokenizer, True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s: {line}", file=sys.stderr, flush=True)

    imports: Any = cli.config_init.get("imports") or []
    results = frontier.frontier(
        model,
        chains,
        more,
        data,
        folder,
        rows=options.rows,
        calibration=options.calibration,
        rounds=options.rounds,
        memory=not options.no_memory,
        imports=[imports] if isinstance(imports, str) else imports,
        log=log,
    )
    results = {"checkpoint": str(path), "threads": torch.get_num_threads(), **results}
    report.write(results, folder)
    print("\n".join(columns(report.rows(results))), "", report.verdict(results), f"{folder}/report.html", sep="\n")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _file_name(name: str) -> str:
    """Return what the checkpoint of a chain is called: a colon cannot stand in a file name everywhere."""
    return name.replace(":", "-").replace("/", "-")

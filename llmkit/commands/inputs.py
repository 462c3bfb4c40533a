"""Texts and rows that commands are given: as arguments, in files, from standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least
from llmkit.errors import UserError


def add_rows(parser: Parser, limit: int) -> None:
    """Add the arguments of a command that reads a checkpoint and rows; ``limit`` is the default of ``--limit``."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("texts", metavar="TEXT", nargs="*", help="a text; a JSON object with the fields of a row")
    add("--input", metavar="FILE", help="a file with a text or JSON object a line, or .csv, .jsonl, ...; -: stdin")
    add("--limit", type=at_least(1), default=limit, metavar="N", help=f"the first N rows; default: {limit}")


def row_of(command: str, text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """Return the JSON object in a text as a row for a head that reads several fields."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict) and all(isinstance(row.get(field), str) and row[field] for field in fields):
        return row
    shape = json.dumps(dict.fromkeys(fields, "..."))
    raise UserError(f"{command}: this checkpoint reads {' and '.join(fields)}: expected '{shape}', got {text[:60]!r}")


def device_of(command: str, name: str) -> Any:
    import torch

    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{command}: --device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def lines_of(command: str, source: str | None) -> list[str]:
    """Return the lines of a file in UTF-8, whatever the locale; blank ones are empty."""
    if source is None:
        return []
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{command}: --input {source}: {error}") from error
    if not lines[-1]:  # what follows the last line end is not a line
        lines.pop()
    return [line.removesuffix("\r") if line.strip() else "" for line in lines]

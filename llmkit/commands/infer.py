"""``llmkit infer``: ask a checkpoint, without any config file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.commands import Parser
from llmkit.errors import UserError


def parser() -> Parser:
    """Return the parser of ``llmkit infer``."""
    options = Parser("infer", "Ask a checkpoint: generate, classify or translate text, tag it or answer from it.")
    add = options.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of a run")
    add("texts", metavar="TEXT", nargs="*", help="texts; JSON objects for a head that reads several fields")
    add("--input", metavar="FILE", help="a file with one text (or JSON object) a line; - for standard input")
    add("--json", action="store_true", help="one JSON object a line")
    add("--max_new_tokens", type=int, help="most tokens to generate")
    add("--temperature", type=float, help="sampling temperature; 0 is greedy")
    add("--greedy", action="store_true", help="always take the best token")
    add("--top_k", type=int, help="sample among the k best tokens")
    add("--top_p", type=float, help="sample among the fewest tokens that reach this probability")
    add("--num_beams", type=int, help="width of the beam search; 1 is off")
    add("--length_penalty", type=float, help="exponent of the beam search's length normalisation")
    add("--seed", type=int, help="seed of the sampling")
    add("--device", default="cpu", help="cpu, cuda, mps, ...")
    add("--batch_size", type=int, default=32, help="texts answered at once")
    add("--imports", action="append", default=[], metavar="MODULE", help="local module or .py file with plugins")
    return options


def run(command: str, argv: list[str]) -> int:
    """Answer each text; returns the exit code."""
    args = parser().parse(argv)
    texts = list(args.texts) + list(_lines(args.input))
    if not texts:
        raise UserError("infer: no text given: name it on the command line or with --input FILE (- for standard input)")
    if args.batch_size < 1:
        raise UserError(f"infer: --batch_size must be at least 1, got {args.batch_size}")
    from llmkit.imports import import_modules
    from llmkit.model.language_model import load

    import_modules(args.imports)
    model = load(args.checkpoint, _device(args.device))
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(model.head.decoding)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.greedy:
        given |= {"temperature": 0.0, "num_beams": 1}
    try:
        options = dataclasses.replace(model.head.decoding, **given)
    except ValueError as error:
        raise UserError(f"infer: {error}") from error
    for text in texts:
        if not text:
            raise UserError("infer: the text is empty: a prompt needs at least one token")
    rows: list[Any] = texts if len(model.head.inputs) == 1 else [_row(text, model.head.inputs) for text in texts]
    streams = "on_token" in inspect.signature(model.head.predict).parameters and options.num_beams == 1
    streaming = streams and sys.stdout.isatty() and not args.json
    step = 1 if streaming else args.batch_size
    for start in range(0, len(rows), step):
        extra: dict[str, Any] = {}
        if streaming:
            print(texts[start], end="", flush=True)
            extra["on_token"] = _Printer(model.tokenizer)
        for answer in model.predict(rows[start : start + step], options, **extra):
            if streaming:
                print()
            else:
                print(json.dumps(answer, ensure_ascii=False) if args.json else model.head.show(answer), flush=True)
    return 0


def _row(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """Return the row of a head that reads several fields, from a JSON object."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict) and all(isinstance(row.get(field), str) and row[field] for field in fields):
        return row
    shape = json.dumps(dict.fromkeys(fields, "..."))
    raise UserError(f"infer: this checkpoint reads {' and '.join(fields)}: expected '{shape}', got {text[:60]!r}")


def _device(name: str) -> Any:
    import torch

    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"infer: --device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def _lines(source: str | None) -> Iterator[str]:
    if source is None:
        return
    try:
        content = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"infer: --input {source}: {error}") from error
    yield from (line for line in content.split("\n") if line.strip())


class _Printer:
    """Prints text as its tokens come; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

"""``llmkit infer``: get answers from a checkpoint, without a config file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least, imported
from llmkit.errors import UserError


def run(command: str, argv: list[str]) -> int:
    """Answer each text; returns the exit code."""
    parser = Parser(command, "Run a checkpoint on texts: generate, classify, translate or tag them.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, or a run folder: its best one")
    add("texts", metavar="TEXT", nargs="*", help="a text; a JSON object if the head reads several fields")
    add("--input", metavar="FILE", help="a file with one text (or JSON object) per line; -: standard input")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--max_new_tokens", type=int, metavar="N", help="maximum number of tokens to generate")
    add("--temperature", type=float, metavar="X", help="sampling temperature; 0: greedy")
    add("--greedy", action="store_true", help="always take the most probable token")
    add("--top_k", type=int, metavar="N", help="sample from the k most probable tokens")
    add("--top_p", type=float, metavar="X", help="sample from the smallest set of tokens with this probability")
    add("--num_beams", type=int, metavar="N", help="beam width; 1: no beam search")
    add("--length_penalty", type=float, metavar="X", help="exponent of the length normalisation in beam search")
    add("--seed", type=int, metavar="N", help="seed for sampling")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--batch_size", type=at_least(1), default=32, metavar="N", help="texts per batch; default: 32")
    parser.add_imports()
    args = parser.parse(argv)
    texts = [*args.texts, *_lines(args.input)]
    if not texts:
        raise UserError("infer: no text given: add it to the command line, or use --input FILE (- for standard input)")
    from llmkit.model.language_model import load

    with imported(args.imports):
        model = load(args.checkpoint, _device(args.device))
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(model.head.decoding)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.greedy:
        given |= {"temperature": 0.0, "num_beams": 1}
    try:
        options = dataclasses.replace(model.head.decoding, **given)
    except ValueError as error:
        raise UserError(f"infer: {error}") from error
    if "" in texts:
        raise UserError("infer: the text is empty, but a prompt needs at least one token")
    rows: list[Any] = texts if len(model.head.inputs) == 1 else [_row(text, model.head.inputs) for text in texts]
    streams = "on_token" in inspect.signature(model.head.predict).parameters and options.num_beams == 1
    streaming = streams and sys.stdout.isatty() and not args.json
    if streaming:
        for text, row in zip(texts, rows, strict=True):
            print(text, end="", flush=True)
            model.predict([row], options, on_token=_Printer(model.tokenizer))
            print()
        return 0
    for start in range(0, len(rows), args.batch_size):
        for answer in model.predict(rows[start : start + args.batch_size], options):
            print(json.dumps(answer, ensure_ascii=False) if args.json else model.head.show(answer), flush=True)
    return 0


def _row(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """Return the JSON object in a text as a row for a head that reads several fields."""
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


def _lines(source: str | None) -> list[str]:
    try:
        content = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8") if source else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"infer: --input {source}: {error}") from error
    return [line for line in content.split("\n") if line.strip()]


class _Printer:
    """Prints text token by token; a character is printed once all its bytes have been generated."""

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

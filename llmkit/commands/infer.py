"""``llmkit infer``: get answers from a checkpoint, without a config file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, at_least, imported
from llmkit.commands.inputs import device_of, lines_of, row_of
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.sequence import DecodingOptions


def run(command: str, argv: list[str]) -> int:
    """Answer each text; returns the exit code."""
    parser = Parser(command, "Run a checkpoint on texts: generate, classify, translate or tag them.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("texts", metavar="TEXT", nargs="*", help="a text; a JSON object if the head reads several fields")
    add("--input", metavar="FILE", help="a file with one text (or JSON object) per line; -: standard input")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--score", action="store_true", help="print how probable the model finds each text, and generate nothing")
    add("--max_new_tokens", type=int, metavar="N", help="maximum number of tokens to generate")
    add("--min_new_tokens", type=int, metavar="N", help="minimum number of tokens to generate")
    add("--temperature", type=float, metavar="X", help="sampling temperature; 0: greedy")
    add("--greedy", action="store_true", help="always take the most probable token")
    add("--top_k", type=int, metavar="N", help="sample from the k most probable tokens")
    add("--top_p", type=float, metavar="X", help="sample from the smallest set of tokens with this probability")
    add("--num_beams", type=int, metavar="N", help="beam width; 1: no beam search")
    add("--length_penalty", type=float, metavar="X", help="exponent of the length normalisation in beam search")
    add("--num_return_sequences", type=int, metavar="N", help="how many of the beams to print, with their scores")
    add("--repetition_penalty", type=float, metavar="X", help="penalty on tokens that are in the text; 1: off")
    add("--no_repeat_ngram_size", type=int, metavar="N", help="no N tokens in a row come twice in a text; 0: off")
    add("--stop_strings", action="append", metavar="TEXT", help="end a text before this string; may be repeated")
    add("--seed", type=int, metavar="N", help="seed for sampling")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--batch_size", type=at_least(1), default=32, metavar="N", help="texts per batch; default: 32")
    parser.add_imports()
    args = parser.parse(argv)
    texts = [*args.texts, *lines_of("infer", args.input)]
    if not texts:
        raise UserError("infer: no text given: add it to the command line, or use --input FILE (- for standard input)")
    from llmkit.model.language_model import load

    with imported(args.imports):
        model = load(args.checkpoint, device_of("infer", args.device))
    head = model.head
    options = _options(args, head.decoding)
    if "" in args.texts:
        raise UserError("infer: the text is empty, but a prompt needs at least one token")
    fields = (*head.inputs, *head.targets) if args.score else head.inputs
    given = [text for text in texts if text]
    rows: list[Any] = given if len(fields) == 1 else [row_of("infer", text, fields) for text in given]
    streams = "on_text" in inspect.signature(head.predict).parameters and options.num_beams == 1
    streaming = streams and sys.stdout.isatty() and not (args.json or args.score)

    def answers() -> Iterator[dict[str, Any]]:
        size = 1 if streaming else args.batch_size
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            extra = {"on_text": _print_piece} if streaming else {}
            yield from model.score(batch) if args.score else model.predict(batch, options, first, **extra)

    answered = answers()
    for text in texts:
        answer = next(answered) if text else {}  # line n of the answers is that of line n of the input
        if args.json:
            line = _json(answer)
        elif streaming or not answer:
            line = ""
        else:
            line = _score(answer) if args.score else head.show(answer)
        print(line, flush=True)
    return 0


def _options(args: Namespace, default: DecodingOptions) -> DecodingOptions:
    """Return how text is generated. Raises UserError for options out of range, and for those that would do nothing."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(default)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.score and (given or args.greedy):
        raise UserError(f"infer: --score generates nothing: leave out --{next(iter(given), 'greedy')}")
    if args.greedy:
        given |= {"temperature": 0.0, "num_beams": 1, "num_return_sequences": 1}
    try:
        options = dataclasses.replace(default, **given)
    except ValueError as error:
        raise UserError(f"infer: {error}") from error
    for name, off in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("seed", None)):
        if options.num_beams > 1 and given.get(name, off) != off:
            raise UserError(f"infer: --{name} is for sampling, and num_beams is {options.num_beams}: add --num_beams 1")
    if options.num_beams == 1 and "length_penalty" in given:
        raise UserError("infer: --length_penalty is for beam search: add --num_beams N")
    return options


def _json(answer: dict[str, Any]) -> str:
    """Return an answer as JSON that the encoding of stdout can hold."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(answer)
    return line


def _score(answer: dict[str, Any]) -> str:
    """Return a score as a person reads it."""
    perplexity = "" if answer["perplexity"] is None else f", perplexity {answer['perplexity']:.4f}"
    return f"log probability {answer['log_probability']:.4f}, {answer['tokens']} tokens{perplexity}"


def _print_piece(row: int, piece: str) -> None:
    print(piece, end="", flush=True)

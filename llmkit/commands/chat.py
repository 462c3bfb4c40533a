"""``llmkit chat``: talk to a checkpoint in a terminal."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, at_least, imported
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.sequence import DecodingOptions
    from llmkit.serving.engine import Texts

NEW = "/new"


def run(command: str, argv: list[str]) -> int:
    """Answer each line of standard input until it ends; returns the exit code."""
    parser = Parser(command, "Talk to a language model: a conversation if it has a chat template, else a text a line.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("--system", metavar="TEXT", help="what the system says first, in a conversation")
    add("--max_new_tokens", type=at_least(1), metavar="N", help="maximum number of tokens to generate")
    add("--temperature", type=float, metavar="X", help="sampling temperature; 0: greedy")
    add("--seed", type=int, metavar="N", help="seed for sampling; default: another one for each answer")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.model.language_model import load
    from llmkit.serving.engine import Texts, chats, plain_options, writes_text

    with imported(args.imports):
        model = load(args.checkpoint, args.device)
    if not writes_text(model):
        raise UserError(f"chat: {type(model.head).__name__} is not a language model: use llmkit infer")
    template = chats(model)
    if args.system is not None and not template:
        raise UserError("chat: --system is for models that have a chat template")
    given = {name: getattr(args, name) for name in ("max_new_tokens", "temperature")}
    given = {name: value for name, value in given.items() if value is not None}
    options = plain_options(model.head.decoding)
    try:
        options = dataclasses.replace(options, **given)
    except ValueError as error:
        raise UserError(f"chat: {error}") from error
    engine = Texts(model)
    first = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(first)
    for turn, line in enumerate(_lines(f"{NEW}: another conversation. " if template else "")):
        if template and line == NEW:
            messages = list(first)
            continue
        messages.append({"role": "user", "content": line})
        prompt = engine.conversation(messages) if template else engine.prompt(line)
        seed = secrets.randbits(62) if args.seed is None else args.seed + turn
        answer = _write(engine, prompt, dataclasses.replace(options, seed=seed))
        messages.append({"role": "assistant", "content": answer})
    engine.close()
    return 0


def _lines(hint: str) -> Iterator[str]:
    """Yield the lines of standard input that are not blank, without their ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{hint}Ctrl-C: stop an answer. Ctrl-D: the end.")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _write(engine: Texts, prompt: list[int], options: DecodingOptions) -> str:
    """Print what follows a prompt while it is written, and return it; Ctrl-C ends it early."""
    from llmkit.serving.engine import Part, TextJob

    parts: SimpleQueue[Any] = SimpleQueue()
    job = TextJob(parts.put, prompt=prompt, options=options)
    engine.submit([job])
    text = ""
    try:
        while True:
            part = parts.get()
            if not isinstance(part, Part):
                raise part
            print(part.text, end="", flush=True)
            text += part.text
            if part.finish is not None:
                break
    except KeyboardInterrupt:
        job.cancelled = True
    print(flush=True)
    return text

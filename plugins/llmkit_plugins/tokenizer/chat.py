"""Chat templates of published tokenizers: messages to ids, and which of them the assistant wrote."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from llmkit.errors import UserError

from .base import hidden, line, valid

BEGIN, END, BREAK = "\ufdd0", "\ufdd1", "\ufffe"
"""Not characters: around what the assistant writes, and in the names of special tokens that a message spells."""
LONGEST = 2**18
"""Characters of a template."""

Messages = list[dict[str, str]]


def encode(
    hf: HFTokenizer, template: str, messages: Messages, names: Mapping[str, str], reply: bool
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them the assistant wrote.

    They are those of transformers' ``apply_chat_template``; but a message that spells the name of a special token has
    no such token. What the assistant wrote is what the template has in a ``generation`` block or, without such blocks,
    what a turn adds to the conversation before it, up to the token that ends it.

    Args:
        hf: the tokenizer; the names of its special tokens are hidden.
        template: the source of the template, in Jinja.
        messages: ``role`` and ``content`` of each.
        names: the names of special tokens by role (``bos_token``), which a template may use.
        reply: whether the conversation ends where the assistant begins to write.

    Raises UserError when the template is broken, refuses the messages, or rewrites earlier turns.
    """
    added = hf.get_added_tokens_decoder().values()
    special = [token.content.removesuffix(hidden("")) for token in added if token.special]
    name = re.compile("|".join(re.escape(one) for one in sorted(special, key=len, reverse=True)) or "(?!)")
    safe = [{**message, "content": _broken(message["content"], name)} for message in messages]
    text = _render(template, safe, names, reply)
    if BEGIN not in text and not reply:
        text = _marked(text, template, safe, names, names.get("eos_token", ""))
    whole, spans = "", []
    for number, part in enumerate(re.split(f"[{BEGIN}{END}]", text)):
        part = name.sub(lambda found: hidden(found[0]), part).replace(BREAK, "")
        spans += [(len(whole), len(whole) + len(part))] if number % 2 else []
        whole += part
    hf.encode_special_tokens = False  # the names are those that the template wrote
    encoding = hf.encode(whole, add_special_tokens=False)
    hf.encode_special_tokens = True
    return encoding.ids, [any(a <= start < b for a, b in spans) for start, _ in encoding.offsets]


def _broken(content: str, name: re.Pattern[str]) -> str:
    """Return a message that spells no special token, and has none of the characters that mean something here."""
    plain = re.sub(f"[{BEGIN}{END}{BREAK}\uffff]", "\ufffd", valid(content))
    return name.sub(lambda found: f"{found[0][0]}{BREAK}{found[0][1:]}", plain)


def _marked(text: str, template: str, messages: Messages, names: Mapping[str, str], end: str) -> str:
    """Return a conversation with marks around what the assistant's turns add to it."""
    places: list[tuple[int, str]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(template, messages[:number], names, reply=True)
        through = _render(template, messages[: number + 1], names, reply=False)
        if not (through.startswith(before) and text.startswith(through)):
            raise UserError("messages: the chat template rewrites earlier turns, so no part is the assistant's alone")
        added = through[len(before) :]
        length = added.find(end) + len(end) if end and end in added else len(added)
        places += [(len(before), BEGIN), (len(before) + length, END)]
    for place, mark in reversed(places):
        text = f"{text[:place]}{mark}{text[place:]}"
    return text


def _render(template: str, messages: Iterable[Mapping[str, str]], names: Mapping[str, str], reply: bool) -> str:
    from jinja2 import TemplateError

    try:
        found: str = _compiled(template).render(messages=[*messages], add_generation_prompt=reply, **names)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"messages: the chat template refuses them: {line(error)}") from error
    return found


@functools.lru_cache(4)
def _compiled(template: str) -> Any:
    """Return a template that runs no code but its own."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block ``generation``, which is around what the assistant writes."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> nodes.Node:
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(number)

        def mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(text: str) -> None:
        raise TemplateError(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)

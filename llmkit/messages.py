"""From jsonargparse's nested messages to one line that names key, value and what is allowed."""

from __future__ import annotations

import re

from llmkit.errors import nearest


def gist(message: str) -> str:
    """Return key, value, what is allowed and the nearest valid value out of jsonargparse's nested message."""
    keys = [key for key in re.findall(r'(?:Parser key|Key) "([^"]+)"', message) if key != "config"]
    inner = re.search(r"([\w.]+: expected [^\n]+?, got '[^\n]*?'\.(?: Did you mean '[^']*'\?)?)(?=\n|$| - )", message)
    if inner:  # the parser of a nested class has spoken already
        return ".".join([*keys[:1], inner.group(1)]).removeprefix("config.")
    missing = re.search(r"the following arguments are required: ([\w., ]+)", message)
    if keys and missing:
        return f"{keys[0]}: {missing.group(1)} must be given"
    got = re.findall(r"(?:Got value|Given value): ([^\n]+?)(?=$|\n|\. | - )", message)
    literals = [item for group in re.findall(r"Literal\[([^\]]*)\]", message) for item in group.split(", ")]
    kinds = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(?:typing\.|collections\.abc\.)?(\w+)\[[^\n]*)", message)
    names = [KINDS.get(kind.rpartition(".")[2], kind.rpartition(".")[2]) for pair in kinds for kind in pair if kind]
    allowed = list(dict.fromkeys([*(item.strip("'") for item in literals), *(name for name in names if name)]))
    if not (keys and got and allowed):
        return " ".join(message.split())[:400]
    value = got[0].strip().strip("'\"")
    return f"{'.'.join(dict.fromkeys(keys))}: expected {' or '.join(allowed)}, got '{value}'.{nearest(value, allowed)}"


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "keys with values",
    "Iterable": "a list",
    "Literal": "",
    "NoneType": "",
}
"""What jsonargparse calls a type, as people call it."""

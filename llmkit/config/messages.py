"""From jsonargparse's nested messages to one line that names key, value and what is allowed."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from llmkit.errors import nearest

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "Iterable": "a list",
    "dict": "keys with values",
    "Literal": "",
    "NoneType": "",
    "Tensor": "",
}
"""What jsonargparse calls a type, as people call it."""


def gist(message: str) -> str:
    """Return key, value, what is allowed and the nearest valid value out of jsonargparse's nested message."""
    message = message.removeprefix('Parser key "config": ')
    keys = [key for key in re.findall(r'(?:Parser key|Key) "([^"]+)"', message) if key != "config"]
    inner = re.search(r"([\w.]+: expected [^\n]+?, got '[^\n]*?'\.(?: Did you mean '[^']*'\?)?)(?=\n|$| - )", message)
    if inner:  # the parser of a nested class has spoken already
        return ".".join([*keys[:1], inner.group(1)]).removeprefix("config.")
    if not keys:
        return " ".join(message.split())[:400]
    key = ".".join(dict.fromkeys(keys))
    types = " ".join(re.findall(r"Subtypes: \[(.*)\]", message))
    said = re.sub(r"Subtypes: \[.*\]", "", message)  # more than the value's own type may allow
    missing = re.search(r"the following arguments are required: ([\w., ]+)", said)
    if missing:
        return f"{key}: {missing.group(1)} must be given"
    return _stranger(key, said, types) or _wrong_type(key, said)


def null(parameter: inspect.Parameter) -> str:
    """Return the sentence for a null where a parameter takes none, or an empty string where it does."""
    annotation = parameter.annotation
    if parameter.default is None or re.search(r"None|Optional|Any|_empty", str(annotation)):
        return ""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return f"expected {KINDS.get(name.partition('[')[0]) or 'a value'}, got null"


def _wrong_type(key: str, said: str) -> str:
    got = re.findall(r"(?:Got value|Given value): ([^\n]+?)(?=$|\n|\. | - )", said)
    literals = [item for group in re.findall(r"Literal\[([^\]]*)\]", said) for item in group.split(", ")]
    found = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(?:typing\.|collections\.abc\.)?(\w+)\[[^\n]*)", said)
    kinds = [name.rpartition(".")[2] for pair in found for name in pair if name]
    names = [KINDS.get(name, name) for name in kinds]
    allowed = list(dict.fromkeys(name for name in [*(item.strip("'") for item in literals), *names] if name))
    if not (got and allowed):
        return f"{key}: a value of another kind is needed{f', got {got[0].strip()[:200]}' if got else ''}"
    value = got[0].strip().strip("'\"")
    return f"{key}: expected {' or '.join(allowed)}, got '{value}'.{nearest(value, allowed)}"


def _stranger(key: str, said: str, types: str) -> str:
    """Return the sentence for a class that is not found, or an argument that a class does not take."""
    option = re.search(r"Option '([\w.]+)' is not accepted", said)
    path = re.search(r"'class_path': '([\w.]+)'", said)
    if option and path:
        cls = _load(path[1])
        parameters = list(inspect.signature(cls).parameters) if isinstance(cls, type) else []
        name, takes = path[1].rpartition(".")[2], ", ".join(parameters)
        return f"{key}: {name} has no argument '{option[1]}'.{nearest(option[1], parameters)} It takes: {takes}."
    if option:
        return f"{key}: its class has no argument '{option[1]}'"
    name = re.search(r"Expected a dot import path string: ([^\n]+)|Problem with given class_path '([^']+)'", said)
    bases = [found for base in re.findall(r"lightning[\w.]+", types) if isinstance(found := _load(base), type)]
    known = {other for base in bases for other in _classes(base)}
    if not name or not known:
        return ""
    given = (name[1] or name[2]).strip()
    hint = nearest(given.rpartition(".")[2], known)
    return f"{key}: no class '{given}'.{hint} Allowed: a class path, or one of {', '.join(sorted(known))}."


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def _classes(base: type) -> list[str]:
    """Return the classes that a library has beside a base class of its own."""
    package = importlib.import_module(base.__module__.rpartition(".")[0] or base.__module__)
    classes = {name: cls for name, cls in vars(package).items() if isinstance(cls, type)}
    return [name for name, cls in classes.items() if issubclass(cls, base) and cls is not base]

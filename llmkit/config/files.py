"""Config files: YAML with the line of every key, and variables filled in."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmkit.check import Raw
from llmkit.config.layers import Layer, plain
from llmkit.errors import Problem, UserError, nearest

DEFAULT_VARIABLES = {"LLMKIT_DATA": "../shared/data", "STDLIB": sysconfig.get_path("stdlib")}
"""``${NAME}`` in a config is the environment variable; these have a value even when it is not set."""


NUMBERS = {
    "int": r"[-+]?(0[xX][\da-fA-F_]+|0[bB][01_]+|\d[\d_]*)",
    "float": r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""What is read as a number. YAML 1.1 would read 010 as 8, 12:30 as 750 and 1e3 as text."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 and 010 are numbers, a date and 12:30 are text, and a key given twice is an error.

    A number or a truth value keeps its text, because it may be meant as text: ``name: 010``, ``columns: {label: no}``.
    A key is always text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", *NUMBERS)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        return Raw(node.value, value) if isinstance(value, bool | int | float) else value


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "").lower()
    base = 16 if "0x" in text else 2 if "0b" in text else 10
    return int(text, base)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
        if key.value in keys:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
        keys.add(key.value)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


for _kind, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^({_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, in which numbers and truth values are ``Raw``. Raises yaml.YAMLError.

    The command line means the same by it.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> Layer:
    """Return a config file as a layer that knows the line of every key.

    Raises UserError with file and line when it is missing or not valid YAML.
    """
    file = Path(path)
    if not file.is_file():
        where = "is a folder" if file.is_dir() else "does not exist"
        hint = "" if file.is_dir() else nearest(file.name, [path.name for path in file.parent.glob("*.yaml")])
        raise UserError(f"--config {file} {where}.{hint}")
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply") from error
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from error
    if content is not None and not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(content, list) else repr(content)
        raise UserError(f"{file}: expected a mapping at the top, got {found}")
    return Layer(content or {}, str(file), dict(_places(node, "", file)) if node else {})


def _places(node: yaml.Node, prefix: str, file: Path) -> Iterator[tuple[str, str]]:
    """Yield the place of every key below a node."""
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{key_node.value.removesuffix('+')}"
        yield plain(key), f"{file}:{key_node.start_mark.line + 1}"
        yield from _places(value_node, f"{key}.", file)


def fill_variables(value: Any, key: str, problems: list[Problem]) -> Any:
    """Return a value with each ``${NAME}`` in it filled in; one that is not set is added to ``problems``."""
    if isinstance(value, dict):
        return {name: fill_variables(item, f"{key}.{name}" if key else name, problems) for name, item in value.items()}
    if isinstance(value, list):
        return [fill_variables(item, key, problems) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ and name not in DEFAULT_VARIABLES:
            text = f"${{{name}}}: the environment variable {name} is not set.{nearest(name, DEFAULT_VARIABLES)}"
            problems.append(Problem(key, text))
        return os.environ.get(name) or DEFAULT_VARIABLES.get(name, "")

    return re.sub(r"\$\{(\w+)\}", fill, value)

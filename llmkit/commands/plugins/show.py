"""``llmkit plugins show``: what one plugin is, what it takes, what it can do and what it costs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from torch import Tensor

from llmkit import registry
from llmkit.commands import Parser
from llmkit.commands.plugins import formula, listing
from llmkit.commands.plugins.target import init_args, locate
from llmkit.contracts import Attention, Head, Position, Role
from llmkit.errors import UserError
from llmkit.registry import Entry, Factory
from llmkit.sequence import Sequence, State

Facts = dict[str, Any]
Build = Callable[[int, int], Any]  # (dim, length) -> module
Measure = Callable[[Any, int], Any]  # (module, length) -> what is measured

ROLES: tuple[Role, ...] = ("causal", "bidirectional", "cross")
WAYS = ("add", "rotate", "bias")


def run(command: str, argv: list[str]) -> int:
    """Describe the plugin that the first word names; returns the exit code."""
    arguments, words = init_args(argv)
    parser = Parser(command, "Tell what a plugin is, what it takes, what it can do and what it costs.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="family/name, file.py:Class or package.module:Class")
    add("--init.ARGUMENT", metavar="VALUE", help="an argument of the plugin, such as --init.num_heads 4")
    add("--dim", type=int, default=256, help="the width D that numbers are given for; default: 256")
    add("--context", type=int, default=256, help="the length T that numbers are given for; default: 256")
    add("--imports", nargs="+", action="extend", default=[], metavar="FILE_OR_MODULE", help="import these first")
    add("--json", action="store_true", help="print a JSON object instead of text")
    options = parser.parse(words)
    for name in ("dim", "context"):
        if getattr(options, name) < 1:
            raise UserError(f"{command}: --{name} must be at least 1, got {getattr(options, name)}")
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is not our answer
        if options.imports:
            from llmkit.imports import import_modules

            import_modules(options.imports, Path.cwd())
        facts = describe(locate(options.target), arguments, options.dim, options.context)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else text(facts))
    return 0


def describe(entry: Entry, arguments: Facts, dim: int, length: int) -> Facts:
    """Return what is known of a plugin, as JSON-able data.

    Args:
        entry: the plugin.
        arguments: what it is built with.
        dim: the width that numbers are given for.
        length: the length that they are given for.

    Raises:
        UserError: it cannot be imported, or has no such argument.
    """
    cls = entry.load()
    factory = registry.factory_of({"class_path": entry.class_path, "init_args": arguments}, entry.family)
    doc = docstring_parser.parse(inspect.cleandoc(cls.__doc__ or ""), docstring_parser.DocstringStyle.GOOGLE)
    facts = {
        **{key: value for key, value in listing.describe(entry).items() if key != "error"},
        "details": doc.long_description or "",
        "class": entry.class_path,
        "version": _version(entry.distribution),
        "papers": papers(cls.__doc__ or ""),
        "arguments": _arguments(cls, {found.arg_name: found.description or "" for found in doc.params}),
        "dim": dim,
        "length": length,
        "supports": {},
        "limits": [f"the argument {name} must be given" for name in registry.missing_arguments(factory)],
        "cost": [],
    }
    if not facts["limits"]:
        with _refusals(facts):
            FAMILIES[entry.family](factory, dim, length, facts)
    return facts


def papers(text: str) -> list[str]:
    """Return the links of the arXiv numbers and DOIs in a text, in their order."""
    found = re.findall(r"\barXiv:\s?(\d{4}\.\d{4,5}|[\w.-]+/\d{7})|\bdoi:\s?(10\.\d+/\S+)", text, re.IGNORECASE)
    links = [f"https://arxiv.org/abs/{a}" if a else f"https://doi.org/{b.rstrip('.,;:)')}" for a, b in found]
    return list(dict.fromkeys(links))


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _arguments(cls: type, described: dict[str, str]) -> list[Facts]:
    """Return what a config may set."""
    found = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in registry.PASSED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        annotation = "" if parameter.annotation is parameter.empty else parameter.annotation
        found.append(
            {
                "name": parameter.name,
                "type": annotation if isinstance(annotation, str) else inspect.formatannotation(annotation),
                "required": required,
                "default": None if required else json.loads(json.dumps(parameter.default, default=str)),
                "description": " ".join(described.get(parameter.name, "").split()),
            }
        )
    return found


# What each family can do and costs


def _attention(factory: Factory, dim: int, length: int, facts: Facts) -> None:
    roles = [role for role in ROLES if role in registry.target_of(factory).roles]
    facts["supports"] = {"roles": roles}
    for width in (dim, _odd(dim)):
        for role in roles:
            with _refusals(facts):
                factory(width, role)
    for role in roles:
        build = _of_role(factory, role)
        with _refusals(facts):
            facts["cost"].append({"role": role, **_cost(build, dim, length)})
            if role != "cross" and "positions" not in facts["supports"]:
                facts["supports"]["positions"] = _measured(build, _positions, dim, 2)
            if role == "causal":
                facts["supports"]["decoding_state"] = _state(build, dim, length)


def _of_role(factory: Factory, role: Role) -> Build:
    return lambda dim, length: factory(dim, role)


def _positions(module: Any, length: int) -> list[str]:
    """Return which of the ways of position plugins have an effect on a variant."""
    listener = _Listener(module.dim, length)
    _feed(module, length, None, listener)
    return ["add", *(way for way in WAYS if way in listener.heard)]


class _Listener(Position):
    """Does nothing and notes what it was asked for."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.heard: set[str] = set()

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        self.heard.add("rotate")
        return x_BHTE

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        self.heard.add("bias")
        return None


def _state(build: Build, dim: int, length: int) -> Facts | None:
    """Return the size of a row's decoding state and whether it grows, or None when there is no state."""
    if _measured(build, lambda module, length: module.init_state(1, length, torch.empty(1, dim)), dim, length) is None:
        return None
    size = _quantity(build, _state_size, dim, length)
    return {**size, "grows": _measured(build, _state_size, dim, 2 * length) > size["number"]}


def _state_size(module: Any, length: int) -> int:
    """Return how many numbers the decoding state of one row holds after ``length`` columns."""

    def after(columns: int) -> int:
        state = module.init_state(1, length, torch.empty(1, module.dim))
        if columns:
            _feed(module, columns, state)
        return sum(value.numel() for value in state.values())

    # A state that has its room from the start need not be filled to be measured.
    room = after(0)
    return room if after(1) == room else after(length)


def _feed(module: Any, length: int, state: State | None, position: Position | None = None) -> None:
    x_BTD = torch.empty(1, length, module.dim)
    seq = Sequence.dense(length, x_BTD.device)
    seq.position = position
    with torch.no_grad():
        module(x_BTD, seq, state=state)


def _position(factory: Factory, dim: int, length: int, facts: Facts) -> None:
    cls: Any = registry.target_of(factory)
    facts["supports"] = {"positions": [way for way in WAYS if getattr(cls, way) is not getattr(Position, way)]}
    for width in (dim, _odd(dim)):
        with _refusals(facts):
            position, seq = factory(width, length), Sequence.dense(1)
            position.add(torch.zeros(1, 1, width), seq.positions_BT)
            position.rotate(torch.zeros(1, 1, 1, width), seq)
    facts["cost"].append(_cost(factory, dim, length, flops=False))


def _by_width(factory: Factory, dim: int, length: int, facts: Facts, flops: bool) -> None:
    for width in (dim, _odd(dim)):
        with _refusals(facts):
            factory(width)
    facts["cost"].append(_cost(lambda dim, length: factory(dim), dim, length, flops))


def _tokenizer(factory: Factory, dim: int, length: int, facts: Facts) -> None:
    tokenizer = factory()
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("pad", "bos", "eos", "unk", "mask", "sep")}
    facts["supports"] = {
        "trained": tokenizer.trained,
        "vocab_size": tokenizer.vocab_size if tokenizer.trained else None,
        "lossless": tokenizer.lossless,
        "special_ids": {name: number for name, number in ids.items() if number is not None},
    }


def _head(factory: Factory, dim: int, length: int, facts: Facts) -> None:
    head = factory()
    facts["supports"] = {
        **{name: getattr(head, name) for name in ("topology", "layout")},
        **{name: list(getattr(head, name)) for name in ("inputs", "targets", "texts", "monitor")},
        "metrics": _metrics(head),
    }


def _metrics(head: Head) -> list[str] | None:
    """Return the names of the metrics on test data, or None where the head must know more of the data for that."""
    for columns in ({}, {field: ["a", "b"] for field in head.targets}):
        with contextlib.suppress(Exception):  # labels may have to be of another kind
            if columns:
                head.learn(columns)
            return list(head.metrics("test"))
    return None


# Counting


def _cost(build: Build, dim: int, length: int, flops: bool = True) -> Facts:
    found = {"parameters": _quantity(build, _parameters, dim, length)}
    return {**found, "flops_per_token": _quantity(build, _flops, dim, length)} if flops else found


def _parameters(module: Any, length: int) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module: Any, length: int) -> float:
    """Return forward FLOPs a position: two a weight of every matrix, and the mixing."""
    weights: int = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)
    return 2.0 * weights + (module.mixing_flops(length) if isinstance(module, Attention) else 0.0)


def _quantity(build: Build, measure: Measure, dim: int, length: int) -> Facts:
    """Return a number and, where there is one, its formula and the widths that the formula is for."""

    def count(dim: int, length: int) -> float:
        with torch.device("meta"):
            return float(measure(build(dim, length), length))

    number, found = _measured(build, measure, dim, length), None
    with contextlib.suppress(Exception):  # other widths may be refused, or the meta device be no place for it
        found = formula.find(count, dim, length)
    return {
        "number": int(number) if float(number).is_integer() else number,
        "formula": None if found is None else str(found),
        "only_multiples_of": None if found is None or found.step == dim else found.step,
    }


def _measured(build: Build, measure: Measure, dim: int, length: int) -> Any:
    """Return what is measured on a module without memory, or with memory where that is not possible.

    Raises UserError when the plugin cannot be run.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return measure(build(dim, length), length)
        except UserError:
            raise
        except Exception as error:
            failure = error
    told = " ".join(str(failure).split())[:200]
    raise UserError(f"it raises {type(failure).__name__}: {told}; 'llmkit plugins check' tells more") from failure


@contextlib.contextmanager
def _refusals(facts: Facts) -> Iterator[None]:
    """Add what a UserError says to the limits of a plugin."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        if line not in facts["limits"]:
            facts["limits"].append(line)


def _odd(dim: int) -> int:
    """Return another width that is odd."""
    return dim + 1 + dim % 2


FAMILIES: dict[str, Callable[[Factory, int, int, Facts], None]] = {
    "tokenizer": _tokenizer,
    "attention": _attention,
    "position": _position,
    "feedforward": functools.partial(_by_width, flops=True),
    "norm": functools.partial(_by_width, flops=False),
    "head": _head,
}


# Text


def text(facts: Facts) -> str:
    """Return the facts as a person reads them."""
    brought = " ".join(filter(None, [facts["distribution"], facts["version"]]))
    lines = [f"{facts['family']} {facts['name']}, from {brought}", *_paragraphs(facts["description"])]
    if facts["details"]:
        lines += ["", *_paragraphs(facts["details"])]
    where = f"{facts['file']}:{facts['line']}" if facts["line"] else facts["file"] or "?"
    lines += _section("where", [[where], [facts["class"]]])
    lines += _section("papers", [[link] for link in facts["papers"]])
    lines += _section("arguments", [_argument(item) for item in facts["arguments"]])
    supports = [[name.replace("_", " "), _told(name, value)] for name, value in facts["supports"].items()]
    lines += _section("supports", supports)
    lines += _section("limits", [[limit] for limit in facts["limits"]])
    if facts["cost"]:
        columns = [name for name in facts["cost"][0] if name != "role"]
        rows = [["", *(TITLES[name] for name in columns)]]
        rows += [[cost.get("role", ""), *(_shown(cost[name]) for name in columns)] for cost in facts["cost"]]
        lines += _section(f"cost, at width D = {facts['dim']:,} and length T = {facts['length']:,}", rows)
    return "\n".join(lines)


TITLES = {"parameters": "parameters", "flops_per_token": "forward FLOPs a token"}


def _section(title: str, rows: list[list[str]]) -> list[str]:
    """Return a title and rows below it in aligned columns; nothing when there are no rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return ["", title, *(f"  {line}".rstrip() for line in cells)]


def _paragraphs(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _argument(item: Facts) -> list[str]:
    default = item["default"]
    shown = "(must be given)" if item["required"] else default if isinstance(default, str) else json.dumps(default)
    return [item["name"], item["type"], shown, item["description"]]


def _told(name: str, value: Any) -> str:
    """Return what a plugin can, in words."""
    if name == "decoding_state":
        if value is None:
            return "none: each new token costs a full pass"
        grows = "it grows with the length" if value["grows"] else "whatever the length"
        return f"{_shown(value)} numbers a row; {grows}"
    if value is None:
        return "known after training" if name == "vocab_size" else "known with the data"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{key} {item}" for key, item in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shown(quantity: Facts) -> str:
    """Return a number behind its formula: ``8 D^2 + 8 D = 526,336``."""
    number, found = quantity["number"], quantity["formula"]
    number = f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"
    if found is None or found == number:
        return number
    if quantity["only_multiples_of"]:
        return f"{number} ({found} where D is a multiple of {quantity['only_multiples_of']:,})"
    return f"{found} = {number}"

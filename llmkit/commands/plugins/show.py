"""``llmkit plugins show``: one plugin's arguments, abilities, limits and cost."""

from __future__ import annotations

import functools
import json
from typing import Any

from llmkit import registry
from llmkit.commands import Parser, at_least, columns, imported
from llmkit.commands.plugins import listing
from llmkit.commands.plugins.target import add_target, init_args, locate
from llmkit.testing.facts import Facts, describe


def run(command: str, argv: list[str]) -> int:
    """Describe one plugin; returns the exit code."""
    arguments, argv = init_args(argv)
    parser = Parser(command, "Describe a plugin: its arguments, abilities, limits and cost.")
    add_target(parser)
    add_size = functools.partial(parser.add_argument, type=at_least(1), default=256, metavar="N")
    add_size("--dim", help="the width D to measure at (and at twice that); default: 256")
    add_size("--context", help="the length T to measure at; default: 256")
    parser.add_imports()
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse(argv)
    with imported(options.imports):
        entry = locate(options.target)
        facts = describe(entry, arguments, options.dim, options.context)
        facts = {**{key: value for key, value in listing.describe(entry).items() if key != "error"}, **facts}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else text(facts))
    return 0


TITLES = {"parameters": "parameters", "flops_per_token": "forward FLOPs per token"}


def text(facts: Facts) -> str:
    """Return the facts as text for people."""
    source = " ".join(filter(None, [facts["distribution"], facts["version"]]))
    lines = [f"{facts['family']} {facts['name']}, from {source}", *_indented(facts["description"])]
    if facts["details"]:
        lines += ["", *_indented(facts["details"])]
    twice = f"D = {2 * facts['dim']:,}"
    where = f"{facts['file']}:{facts['line']}" if facts["line"] else facts["file"] or "?"
    lines += _section("where", [[where], [facts["class"]]])
    lines += _section("papers", [[link] for link in facts["papers"]])
    lines += _section("arguments", [_argument(item) for item in facts["arguments"]])
    supports = facts["supports"].items()
    title = "first row" if facts["family"] == "dataset" else "supports"
    lines += _section(title, [[name.replace("_", " "), _ability(name, value, twice)] for name, value in supports])
    lines += _section("limits", [[limit] for limit in facts["limits"]])
    apart = [["; ".join(facts["differences"])]] if facts["differences"] else []
    lines += _section(f"differs from the default, {registry.default(facts['family'])}", apart)
    if facts["cost"]:
        quantities = [name for name in facts["cost"][0] if name != "role"]
        rows = [["", *(title for name in quantities for title in (TITLES[name], f"at {twice}"))]]
        for cost in facts["cost"]:
            numbers = [number for name in quantities for number in cost[name].values()]
            rows.append([cost.get("role", ""), *map(_number, numbers)])
        lines += _section(f"cost, at width D = {facts['dim']:,} and length T = {facts['length']:,}", rows)
    return "\n".join(lines)


def _section(title: str, rows: list[list[str]]) -> list[str]:
    """Return a title and rows below it in aligned columns; nothing when there are no rows."""
    return ["", title, *(f"  {line}".rstrip() for line in columns(rows))] if rows else []


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _argument(item: Facts) -> list[str]:
    default = item["default"]
    shown = "(required)" if item["required"] else default if isinstance(default, str) else json.dumps(default)
    return [item["name"], item["type"], shown, item["description"]]


def _ability(name: str, value: Any, twice: str) -> str:
    """Return one entry of ``supports`` in words."""
    if name == "decoding_state":
        if value is None:
            return "none: each new token costs a full pass"
        grows = "grows with the length" if value["grows"] else "same at any length"
        return f"{_number(value['at_dim'])} numbers per row ({_number(value['at_twice_dim'])} at {twice}); {grows}"
    if value is None:
        return "known after training" if name == "vocab_size" else "depends on the data"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{key} {item}" for key, item in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"

"""``llmkit config show``: the config that a run would have, and where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmkit.commands import Parser
from llmkit.commands.config.tree import Tree, flat, inline, plugin_key, shortened
from llmkit.config.layers import DEFAULT, Stack
from llmkit.config.plan import plan
from llmkit.run.cli import filled_in

DESCRIPTION = (
    "Print the config that 'llmkit fit' would run with, and where each value comes from. The output is a config "
    "itself. Nothing is built and no data is read."
)

OPEN = {
    "model.scheduler.total_steps": "computed: the run's number of steps",
    "model.cross_attention": "linked: model.attention if it can, else the default one",
    "data.tokenizer": "linked: the tokenizer of model.init_from",
    "data.seed": "linked: seed_everything",
}
"""Where the values of these keys come from when they are null."""

COMPUTED = {"precision": "computed: what this machine does fast", "max_epochs": "default of llmkit"}


def run(command: str, argv: list[str]) -> int:
    """Print the effective config of the options in ``argv``; returns the exit code."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    parser.add_argument("--all", action="store_true", help="print the defaults of Lightning's trainer too")
    text = "print JSON instead: for each key its value and its origin"
    parser.add_argument("--json", action="store_true", help=text)
    options, argv = parser.parse_known_args(argv)
    config = plan("fit", argv, command).config
    tree = _tree(config, options.all)
    if options.json:
        found = {key: {"value": value, "origin": _origin(key, value, config)} for key, value in flat(tree).items()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    print(_as_text(tree, config))
    return 0


def effective(argv: list[str], command: str) -> str:
    """Return the effective config of the options in ``argv`` as YAML, the origin of each value in a comment."""
    config = plan("fit", argv, command).config
    return _as_text(_tree(config, False), config)


def _tree(config: Stack, everything: bool) -> Tree:
    for key, value in filled_in(config.tree["trainer"]).items():
        config.put(f"trainer.{key}", value, COMPUTED[key])
    tree = {key: value for key, value in config.tree.items() if value is not None}
    if not everything:
        given = {key: item for key, item in tree["trainer"].items() if _is_set(f"trainer.{key}", item, config)}
        tree["trainer"] = given
    return shortened(tree)


def _as_text(tree: Tree, config: Stack) -> str:
    lines = list(_lines(tree, config))
    width = min(max(len(text) for text, _ in lines), 50)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)


def _is_set(key: str, value: Any, config: Stack) -> bool:
    """Return whether the user or llmkit set a value, or a part of it."""
    return any(config.of(part) != DEFAULT for part in flat({key: value}))


def _origin(key: str, value: Any, config: Stack) -> str:
    place = config.of(key)
    return OPEN[key] if value is None and place == DEFAULT and key in OPEN else place


def _lines(tree: Tree, config: Stack, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the lines of a config, each with the origin of its value."""
    for name, value in tree.items():
        key, indent = f"{prefix}{name}", "  " * depth
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _lines(value, config, f"{key}.", depth + 1)
        else:
            yield f"{indent}{name}: {inline(value)}", _origin(plugin_key(key), value, config)

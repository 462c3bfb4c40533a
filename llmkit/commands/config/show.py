"""``llmkit config show``: the config that a run would have, and where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmkit.commands.config.tree import Tree, flat, inline, plugin_key, shortened
from llmkit.config.layers import DEFAULT, Stack
from llmkit.config.plan import plan
from llmkit.run.cli import filled_in

USAGE = """\
usage: llmkit config show --config FILE [options of fit] [--all] [--json]

Print the config that 'llmkit fit' would run with, and where each value comes from. It is a config itself.
Nothing is built and no data is read.

options:
  --config FILE, --ckpt_path FILE, --model.dim 64, ...  as for fit
  --all   the trainer's defaults too, which are Lightning's
  --json  a JSON object instead: for each key its value and its origin
"""

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
    if {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0
    tree, origins = effective([word for word in argv if word not in ("--all", "--json")], command)
    trainer = _trainer(tree.pop("trainer"), origins, "--all" in argv)
    tree = shortened({**{key: value for key, value in tree.items() if value is not None}, "trainer": trainer})
    if "--json" in argv:
        found = {key: {"value": value, "origin": _origin(key, value, origins)} for key, value in flat(tree).items()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    lines = list(_lines(tree, origins))
    width = min(max(len(text) for text, _ in lines), 50)
    for text, origin in lines:
        print(f"{text:<{width}}  # {origin}" if origin else text)
    return 0


def effective(argv: list[str], asked: str) -> tuple[Tree, Stack]:
    """Return the config that ``llmkit fit`` would run with, and where its values come from.

    Args:
        argv: the options of ``fit``.
        asked: the command's name in messages.

    Raises:
        UserError: all mistakes that can be seen before anything is built.
    """
    config = plan("fit", argv, asked).config
    return config.tree, config


def _trainer(given: Tree, origins: Stack, everything: bool) -> Tree:
    """Return the trainer's settings that the user or llmkit made; their places are added to ``origins``."""
    computed = filled_in(given)
    for key, value in computed.items():
        origins.put(f"trainer.{key}", value, COMPUTED[key])
    shown = {**given, **computed}
    return {key: value for key, value in shown.items() if everything or _is_set(f"trainer.{key}", value, origins)}


def _is_set(key: str, value: Any, origins: Stack) -> bool:
    keys = flat(value, f"{key}.") if isinstance(value, dict) else [key]
    return any(origins.of(one) != DEFAULT for one in keys)


def _origin(key: str, value: Any, origins: Stack) -> str:
    place = origins.of(key)
    return OPEN[key] if value is None and place == DEFAULT and key in OPEN else place


def _lines(tree: Tree, origins: Stack, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the lines of a config, each with the origin of its value."""
    for name, value in tree.items():
        key, indent = f"{prefix}{name}", "  " * depth
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _lines(value, origins, f"{key}.", depth + 1)
        else:
            yield f"{indent}{name}: {inline(value)}", _origin(plugin_key(key), value, origins)

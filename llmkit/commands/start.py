"""``llmkit fit | validate | test | predict`` up to the import of torch and Lightning, which takes seconds."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from llmkit.config import argv as command_line
from llmkit.config.files import read_yaml
from llmkit.config.layers import Layer

HEAVY = "lightning.pytorch"
FACTS = {
    **{"model.head": "{}", "model.attention": "{}", "model.dim": "dim {}", "model.num_layers": "{} layers"},
    **{"trainer.max_epochs": "{} epochs", "trainer.max_steps": "{} steps", "ckpt_path": "checkpoint {}"},
}
"""What the first line says of a run, where it is set."""


def run(command: str, argv: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises UserError at once where a config file cannot be read, or a word of the command line belongs to no option.
    """
    if HEAVY not in sys.modules and not {"-h", "--help"} & set(argv):
        words = command_line.read([word for word in argv if word != "--find_lr"])
        layers = [*map(read_yaml, words.files), *words.layers]
        if os.environ.get("LOCAL_RANK", "0") == os.environ.get("SLURM_PROCID", "0") == "0":
            print(first_line(command, words.files, layers), file=sys.stderr, flush=True)
    code: int = importlib.import_module("llmkit.commands.fit").run(command, argv)
    return code


def first_line(command: str, files: list[str], layers: list[Layer]) -> str:
    """Return what a run is, as far as its files and options say: ``llmkit: fit a.yaml: generation, 4 layers``."""
    facts = []
    for key, text in FACTS.items():
        found = [value for layer in layers if (value := _at(layer.tree, key)) is not None]
        if found:
            facts.append(text.format(found[-1]))
    return ": ".join(filter(None, ["llmkit", " ".join([command, *files]), ", ".join(facts)]))


def _at(tree: Any, key: str) -> str | None:
    """Return the value at a dotted key, of a plugin its name; None where it is not set."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree = tree.get("name") or str(tree.get("class_path") or "").rpartition(".")[2]
    return str(tree) if isinstance(tree, str) and tree else None

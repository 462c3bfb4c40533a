"""From argv, config files and a checkpoint to one checked tree: what a command will run with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from llmkit import imports, registry
from llmkit.check import Walk, settled
from llmkit.checkpoint.content import Stored
from llmkit.config import argv as command_line
from llmkit.config import published
from llmkit.config.files import fill_variables, read_yaml
from llmkit.config.layers import COMMAND_LINE, DEFAULT, Layer, Stack, Tree
from llmkit.config.stored import find, is_below, layer_of
from llmkit.data.sources import with_arguments_of_train
from llmkit.errors import Problem, UserError, located, note, unknown
from llmkit.ops.sampling import unused
from llmkit.run.class_names import spelled_out
from llmkit.run.cli import GROUPS, TOP, TRAINER_DEFAULTS
from llmkit.sequence import DecodingOptions

TOP_KEYS = (*TOP, *GROUPS)
"""The keys at the top of a config."""


@dataclass(frozen=True)
class Plan:
    """What a command will run with, every mistake that can be found without building anything already reported.

    Attributes:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: the merged tree with every default filled in, and where each value came from.
        stored: the checkpoint that the command starts from.
        passed_on: options that LightningCLI answers itself, ``--print_config``, say.
    """

    command: str
    config: Stack
    stored: Stored | None
    passed_on: list[str]

    @property
    def args(self) -> Tree | list[str]:
        """What LightningCLI parses: the tree, as a word where there are others."""
        tree = {key: value for key, value in self.config.tree.items() if value is not None}
        return [f"--config={json.dumps(tree, default=str)}", *self.passed_on] if self.passed_on else tree

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Put the place of its value in front of each mistake that is raised inside."""
        try:
            yield
        except UserError as error:
            raise UserError(*map(self.config.placed, error.problems)) from error


def plan(command: str, argv: list[str] | command_line.CommandLine, asked: str = "") -> Plan:
    """Return what a command would do. Nothing is built, but the modules that the config imports are imported.

    A value is taken from the command line, else the config files (later ones first), else the checkpoint, else the
    default.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: the words after it, or what they say.
        asked: the command's name in messages.

    Raises:
        UserError: all mistakes that can be found before anything is built, together.
    """
    words = argv if isinstance(argv, command_line.CommandLine) else command_line.read(argv)
    layers: list[Layer] = []
    imported: list[str] = []
    problems: list[Problem] = []
    for layer in [*map(read_yaml, words.files), *words.layers]:
        folder = Path() if layer.source == COMMAND_LINE else Path(layer.source).parent
        with located(layer.at("imports")):
            imported += imports.import_modules(layer.tree.get("imports"), folder)
            imports.check_distinct(imported)
        layers.append(layer._replace(tree=_with_groups(fill_variables(layer.tree, "", problems), layer, problems)))
    named = Path(words.files[0]).stem if words.files else "run"
    given = Stack(*layers)
    stored = find(command, given, named, bool(words.files), asked or command)
    begins_with = published.layer_of(given) if stored is None else layer_of(stored, command, alone=not words.files)
    own = Layer({"trainer": dict(TRAINER_DEFAULTS)}, "default of llmkit")
    stack = Stack(own, _defaults(named), *filter(None, [begins_with]), *layers)
    for text in stack.notes:
        note(text)
    stack.tree.pop("ckpt_path", None)  # last or best, say; perhaps before there is one
    if stored is not None:
        stack.put("ckpt_path", str(stored.path), COMMAND_LINE)
    if imported:
        stack.put("imports", list(dict.fromkeys(imported)), stack.of("imports"))
    if settled(stack.tree["model"].get("init_from")) is not None and stack.of("data.tokenizer") == DEFAULT:
        stack.tree["data"]["tokenizer"] = None
    problems += _check(stack)
    if begins_with is not None and stored is None and not problems:
        problems += published.conflicts(stack, begins_with)
    if problems:
        raise UserError(*dict.fromkeys(map(stack.placed, problems)))
    data = stack.tree["data"]
    is_cut = command == "test" and (data["test_share"] or data["folds"])
    if command in ("test", "predict") and not (data[command] or data["source"] or is_cut):
        raise UserError(f"data.{command} is not set: give --data.{command} FILE")
    return Plan(command, stack, stored, words.passed_on)


def _with_groups(tree: Tree, layer: Layer, problems: list[Problem]) -> Tree:
    """Return a layer's tree without the groups that are not mappings, which are reported unless they are empty."""
    wrong = {key: tree[key] for key in tree if key.rstrip("+") in GROUPS and not isinstance(tree[key], dict)}
    for key, value in wrong.items():
        if value is not None:
            problems.append(Problem("", f"{layer.at(key)}: {key}: expected a mapping, got '{value}'"))
    return {key: value for key, value in tree.items() if key not in wrong}


def _defaults(name: str) -> Layer:
    """Return the layer at the bottom: the default plugin of every key that must have one."""
    tree: Tree = {"name": name, **{group: {} for group in GROUPS}}
    for key, family in registry.FAMILY_OF.items():
        group, _, leaf = key.partition(".")
        if key != "model.cross_attention":
            tree[group][leaf] = registry.default(family)
    return Layer(tree, DEFAULT)


def _check(stack: Stack) -> list[Problem]:
    """Check the merged tree, fill in what is left open, and return everything that is wrong."""
    tree = stack.tree
    given = tree["data"]
    tree["data"] = with_arguments_of_train(given)
    inherit = [split for split, value in tree["data"].items() if value is not given[split]]
    for split in inherit:
        stack.give_places(f"data.{split}", "data.train")
    if settled(tree["model"].get("decoding")) is None:
        tree["model"]["decoding"] = {}
    tree["trainer"], wrong = spelled_out(tree["trainer"])
    walk = Walk(command_line.SHORT)
    for name in [name for name in tree if name not in TOP_KEYS]:
        walk.unknown("", name, TOP_KEYS)
        del tree[name]
    for group, cls in GROUPS.items():
        tree[group] = walk.group(cls, tree[group], group)
    for name, (kind, default, _) in TOP.items():
        tree[name] = walk.value(kind, tree.get(name, default), name)
    problems = wrong + walk.problems()
    for split in inherit:  # what it has from data.train is reported there
        of_train = {one: Problem(*(text.replace(f"data.{split}", "data.train") for text in one)) for one in problems}
        problems = [one for one in problems if of_train[one] == one or of_train[one] not in of_train]
    if problems:
        return problems
    head: Any = registry.target_of(registry.resolve("head", tree["model"]["head"]))
    for name, value in dataclasses.asdict(head.decoding).items():
        if stack.of(f"model.decoding.{name}") == DEFAULT:
            stack.put(f"model.decoding.{name}", value, f"{DEFAULT} of {head.__name__}")
    return [*_check_values(tree)]


def _check_values(tree: Tree) -> Iterator[Problem]:
    """Yield what is wrong with values of the right type."""
    if not is_below(tree["name"]):
        text = f"expected a relative path without '..' (it becomes a folder below output), got '{tree['name']}'"
        yield Problem("name", text)
    seed = tree["seed_everything"]
    if not 0 <= seed < 2**32:
        yield Problem("seed_everything", f"expected 0 or more and below 2**32, got {seed}")
    try:
        yield from unused(DecodingOptions(**(tree["model"]["decoding"] or {})))
    except ValueError as error:
        name, _, text = str(error).partition(" ")
        yield Problem(f"model.decoding.{name}", text)
    trainer = tree["trainer"]
    for key in ("accumulate_grad_batches", "val_check_interval", "log_every_n_steps"):
        if isinstance(trainer[key], int | float) and trainer[key] <= 0:
            share = ", or above 0 as a share of an epoch" if key == "val_check_interval" else ""
            yield Problem(f"trainer.{key}", f"must be at least 1{share}, got {trainer[key]}")
    if (trainer["gradient_clip_val"] or 0) < 0:
        yield Problem("trainer.gradient_clip_val", f"must be 0 or more, got {trainer['gradient_clip_val']}")
    choices: dict[str, list[str]] = {
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "gradient_clip_algorithm": ["norm", "value"],
    }
    for key, allowed in choices.items():
        value = trainer[key]
        if isinstance(value, str) and value.lower() not in allowed:
            yield Problem(f"trainer.{key}", unknown(key.rpartition("_")[2], value, allowed))

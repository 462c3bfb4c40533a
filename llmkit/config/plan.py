"""From argv, config files and a checkpoint to one checked tree: what a command will run with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from llmkit import imports, registry
from llmkit.check import check_arguments, check_value, settled, unknown_key, with_arguments_of_train, without_repetition
from llmkit.checkpoint.content import Stored
from llmkit.config import argv as command_line
from llmkit.config import published
from llmkit.config.files import fill_variables, read_yaml
from llmkit.config.layers import COMMAND_LINE, DEFAULT, Layer, Stack, Tree
from llmkit.config.stored import find, is_below, layer_of
from llmkit.errors import Problem, UserError, unknown
from llmkit.ops.sampling import unused
from llmkit.run.cli import GROUPS, TOP, TRAINER_DEFAULTS
from llmkit.run.trackers import with_folders
from llmkit.sequence import DecodingOptions

TOP_KEYS = (*TOP, *GROUPS)
"""The keys at the top of a config."""
PASSED_ON = re.compile(r"--(print_config|\S+\.help)\b")
"""Options that LightningCLI answers itself."""


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


def plan(command: str, argv: list[str], asked: str = "") -> Plan:
    """Return what a command would do. Nothing is built, but the modules that the config imports are imported.

    A value is taken from the command line, else the config files (later ones first), else the checkpoint, else the
    default.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: the words after it.
        asked: the command's name in messages.

    Raises:
        UserError: all mistakes that can be found before anything is built, together.
    """
    options = command_line.split(argv)
    files = [value for key, value in options if key in ("--config", "-c") and value]
    layers = [read_yaml(file) for file in files]
    imported: list[str] = []
    for file, layer in zip(files, layers, strict=True):
        imported += _import(layer.tree.pop("imports", None), layer, Path(file).parent)
    names = [name for key, value in options if key == "--imports" for name in command_line.listed(value or "")]
    imported += _import(names, Layer({}, COMMAND_LINE), Path())
    imports.check_distinct(imported)
    problems: list[Problem] = []
    config_options = [
        (key, value)
        for key, value in options
        if key not in ("--config", "-c", "--imports") and not PASSED_ON.match(key)
    ]
    layers += command_line.layers(config_options, problems)
    named = Path(files[0]).stem if files else "run"
    stored = find(command, layers, named, bool(files), asked or command)
    if stored is not None:
        layers.insert(0, layer_of(stored, command, alone=not files))
    for number, layer in enumerate(layers):
        content = {str(key): value for key, value in layer.tree.items() if not (key in GROUPS and value is None)}
        layers[number] = layer._replace(tree=fill_variables(content, "", problems))
    begins_with = published.layer_of(layers) if stored is None else None
    stack = Stack()
    stack.add(Layer({"trainer": dict(TRAINER_DEFAULTS)}, "default of llmkit"))
    stack.add(_defaults(named))
    for layer in filter(None, [begins_with, *layers]):
        stack.add(layer)
    if stored is not None:
        stack.put("ckpt_path", str(stored.path), COMMAND_LINE)
    else:
        stack.tree.pop("ckpt_path", None)
    if imported:
        place = COMMAND_LINE if names else stack.of("imports")
        stack.put("imports", list(dict.fromkeys(imported)), place)
    if _tokenizer_comes_along(stack):
        stack.tree["data"]["tokenizer"] = None
    trainer = stack.tree["trainer"]
    if isinstance(trainer, dict) and "logger" in trainer:
        trainer["logger"] = with_folders(settled(trainer["logger"]), stack.tree.get("output", "runs"))
    problems += _check(stack)
    if begins_with is not None and not problems:
        problems += published.conflicts(stack, begins_with)
    if problems:
        raise UserError(*dict.fromkeys(map(stack.placed, problems)))
    data = stack.tree["data"]
    is_cut = command == "test" and (data["test_share"] or data["folds"])
    if command in ("test", "predict") and not (data[command] or data["source"] or is_cut):
        raise UserError(f"data.{command} is not set: give --data.{command} FILE")
    passed_on = [key if value is None else f"{key}={value}" for key, value in options if PASSED_ON.match(key)]
    return Plan(command, stack, stored, passed_on)


def _import(names: Any, layer: Layer, folder: Path) -> list[str]:
    """Import the local modules that a layer names; an error says where they are named."""
    try:
        return imports.import_modules(names, folder)
    except UserError as error:
        place = layer.places.get("imports", layer.source)
        raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from error


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
    problems = []

    def elsewhere(name: str) -> str:
        owners = (owner for owner, cls in _owners(tree) if name in inspect.signature(cls).parameters)
        return next((f"{owner}.{name}" for owner in owners), "")

    for name in [name for name in tree if name not in TOP_KEYS]:
        meant = command_line.SHORT.get(f"--{name}") or elsewhere(name)
        problems.append(unknown_key("", name, TOP_KEYS, meant))
        del tree[name]
    head = _class(tree, "model.head")
    if head is not None:
        given = tree["model"].get("decoding")
        if isinstance(given, dict | None):
            for name, value in dataclasses.asdict(head.decoding).items():
                if name not in (given or {}):
                    stack.put(f"model.decoding.{name}", value, f"{DEFAULT} of {head.__name__}")
    inherit: list[str] = []
    if isinstance(tree["data"], dict):
        given = tree["data"]
        tree["data"] = with_arguments_of_train(given)
        inherit = [split for split, value in tree["data"].items() if value is not given[split]]
    for split in inherit:
        stack.give_places(f"data.{split}", "data.train")
    for group, cls in GROUPS.items():
        if isinstance(tree[group], dict):
            problems += check_arguments(cls, tree[group], group, elsewhere)
        else:
            problems.append(Problem(group, f"expected a mapping, got '{tree[group]}'"))
    for name, (kind, default, _) in TOP.items():
        tree[name], wrong = check_value(kind, tree.get(name, default), name)
        problems += wrong
    return without_repetition(problems, inherit) or [*_check_values(tree)]


def _owners(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield every part of a config that has keys below it, and the class that takes them."""
    yield from GROUPS.items()
    yield "model.decoding", DecodingOptions
    for key in registry.plugins_in(tree):
        cls = _class(tree, key)
        if cls is not None:
            yield key, cls


def _class(tree: Tree, key: str) -> Any:
    """Return the class that a plugin's key names; None where it names none that may be imported."""
    group, _, leaf = key.partition(".")
    spec = tree[group].get(leaf) if isinstance(tree.get(group), dict) else None
    if not isinstance(spec, dict) or imports.refusal(str(spec.get("class_path"))):
        return None
    try:
        return registry.class_of(spec["class_path"], registry.plugins_in(tree)[key])
    except (UserError, KeyError):  # the check reports it
        return None


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
    for key, least in {"accumulate_grad_batches": 1, "val_check_interval": 0.0, "log_every_n_steps": 1}.items():
        value = trainer[key]
        if isinstance(value, int | float) and (value < least or value == 0):
            share = "" if least else ", or above 0 as a share of an epoch"
            yield Problem(f"trainer.{key}", f"must be at least 1{share}, got {value}")
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


def _tokenizer_comes_along(stack: Stack) -> bool:
    """Return whether the tokenizer is that of ``model.init_from``: no other one is asked for."""
    model = stack.tree["model"]
    begins = isinstance(model, dict) and model.get("init_from") not in (None, "null")
    return begins and isinstance(stack.tree["data"], dict) and stack.of("data.tokenizer") == DEFAULT

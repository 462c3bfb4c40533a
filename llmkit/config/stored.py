"""The checkpoint as a layer of a config: which file is meant, and what of its own settings a command starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.choice import choose
from llmkit.checkpoint.content import Stored, check_classes
from llmkit.config.layers import Layer, Stack, Tree
from llmkit.errors import UserError, located, note

WRITERS = ("callbacks", "logger", "plugins", "profiler", "default_root_dir")
"""Keys of ``trainer`` that run code of their own during the training, or say where files are written."""


def find(command: str, given: Stack, named: str, with_file: bool, asked: str) -> Stored | None:
    """Return the checkpoint that a command starts from, read; None: it starts without one.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        given: config files and command line.
        named: the name of the run where they do not say.
        with_file: whether there is a config file.
        asked: the command's name in messages.

    Raises:
        UserError: the checkpoint is missing or damaged, the command needs one, or there is nothing to train on.
    """
    output = Path(str(given.tree.get("output", "runs")))
    if output.exists() and not output.is_dir():
        raise UserError(f"{given.at('output')}: output: {output} is a file, not a folder")
    if asked_for := given.tree.get("ckpt_path"):
        with located(given.at("ckpt_path")):
            return choose(str(asked_for), output / str(given.tree.get("name", named)), command)
    if command != "fit":
        raise UserError(f"{command} needs --ckpt_path FILE (or 'best' or 'last' of the newest run)")
    if not with_file and {"train", "source"}.isdisjoint(given.tree.get("data", ())):
        raise UserError(f"{asked} needs --config FILE (or --data.train FILE and options)")
    return None


def layer_of(stored: Stored, command: str, alone: bool) -> Layer:
    """Return the settings of a checkpoint that a command starts from.

    A checkpoint decides neither where files are written nor what runs next to the model, and its local modules are not
    imported: naming code to run is up to the user. A run goes next to the one that the checkpoint lies in.

    Args:
        stored: the checkpoint.
        command: ``fit`` takes the settings of the trainer too.
        alone: whether no config file is given, so that a note says what is left out.
    """
    where = f"checkpoint {stored.path}"
    check_classes(stored.part, where)
    own = stored.part["config"]
    given = (own.get(group) for group in ("data", "trainer", "checkpoint"))
    data, trainer, saving = (part if isinstance(part, dict) else {} for part in given)
    # A model trained from Python has no config, but every checkpoint describes its model and tokenizer.
    tree: Tree = {"model": stored.part["model"], "data": {**data, "tokenizer": stored.part["tokenizer"]}}
    tree["data"].pop("cache_dir", None)
    if type(own.get("seed_everything")) in (int, bool):
        tree["seed_everything"] = own["seed_everything"]
    if command == "fit":
        tree["trainer"] = {
            key: value
            for key, value in trainer.items()
            if (isinstance(value, bool | None) if key in WRITERS else _is_plain(value))
        }
        tree["checkpoint"] = {key: value for key, value in saving.items() if _is_plain(value)}
        left = [f"trainer.{key}" for key in trainer if key not in tree["trainer"]]
        if left and alone:
            note(f"a checkpoint alone does not bring {', '.join(left)}: give --config to have what it was trained with")
    folders = [folder for folder in stored.path.absolute().parents if folder.name]
    if len(folders) > 3 and folders[0].name == "checkpoints" and re.fullmatch(r"version_\d+", folders[1].name):
        tree |= {"output": str(folders[3]), "name": folders[2].name}
    elif is_below(own.get("name")):
        tree["name"] = own["name"]
    return Layer(json.loads(json.dumps(tree, default=str)), where)


def is_below(path: Any) -> bool:
    """Return whether a path stays below the folder that it is put in."""
    parts = Path(path).parts if isinstance(path, str) else ()
    return bool(parts) and not Path(path).is_absolute() and {"..", "~"}.isdisjoint(parts)


def _is_plain(value: Any) -> bool:
    """Return whether a setting is a number, a switch or a plain word, or some of them."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or not ("." in value or Path(value).is_file())

"""The checkpoint as a layer of a config: which file is meant, and what of its own settings a command starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.checkpoint.archive import file_of
from llmkit.checkpoint.content import Stored, check_classes, read
from llmkit.config.layers import Layer, Tree
from llmkit.errors import UserError, note

WRITERS = ("callbacks", "logger", "plugins", "profiler", "default_root_dir")
"""Keys of ``trainer`` that run code of their own during the training, or say where files are written."""


def find(command: str, layers: Sequence[Layer], named: str, with_file: bool, asked: str) -> Stored | None:
    """Return the checkpoint that a command starts from, read; None: it starts without one.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        layers: config files and command line.
        named: the name of the run where they do not say.
        with_file: whether there is a config file.
        asked: the command's name in messages.

    Raises:
        UserError: the checkpoint is missing or damaged, the command needs one, or there is nothing to train on.
    """
    settings: Tree = {"name": named, "output": "runs"}
    source: dict[str, str] = {}
    for layer in layers:
        for key in {"name", "output", "ckpt_path"} & layer.tree.keys():
            settings[key], source[key] = layer.tree[key], layer.places.get(key, layer.source)
    output = Path(str(settings["output"]))
    if output.exists() and not output.is_dir():
        raise UserError(f"{source['output']}: output: {output} is a file, not a folder")
    wanted = settings.get("ckpt_path")
    if not wanted:
        if command != "fit":
            raise UserError(f"{command} needs --ckpt_path FILE (or 'best' or 'last' of the newest run)")
        data = [layer.tree["data"] for layer in layers if isinstance(layer.tree.get("data"), dict)]
        if not with_file and not any({"train", "source"} & part.keys() for part in data):
            raise UserError(f"{asked} needs --config FILE (or --data.train FILE and options)")
        return None
    folder = output / str(settings["name"])
    try:
        stored = choose(str(wanted), folder, command)
    except UserError as error:
        raise UserError(f"{source['ckpt_path']}: {error}") from error
    if stored is None:
        if command != "fit":
            raise UserError(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint")
        note(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint yet: training begins at the start")
    return stored


def choose(wanted: str, folder: Path, command: str) -> Stored | None:
    """Return the checkpoint that is meant, read; None for ``last`` where there is none below ``folder`` yet.

    ``last`` is the newest checkpoint of the newest run, ``best`` the newest best one. One that cannot be read is
    skipped, with a note. A run folder means its last checkpoint to ``fit``, else its best one.

    Raises UserError when none can be read.
    """
    if wanted not in ("best", "last"):
        names = ("best.ckpt", "last.ckpt")
        path = file_of(wanted, *(reversed(names) if command == "fit" else names))
        return Stored(path, read(path))
    pattern = "best.ckpt" if wanted == "best" else "*.ckpt"
    found = sorted(
        folder.glob(f"version_*/checkpoints/{pattern}"),
        key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"),
        reverse=True,
    )
    damaged: list[str] = []
    for path in found:
        try:
            stored = Stored(path, read(path))
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            step = stored.content.get("global_step", "(unknown)")
            note(
                f"--ckpt_path {wanted}: {'; '.join(damaged)}. The last good one is used instead: {path}, of step {step}"
            )
        return stored
    if damaged:
        raise UserError(f"--ckpt_path {wanted}: no checkpoint below {folder} can be read; the newest: {damaged[0]}")
    if wanted == "best":
        raise UserError(f"--ckpt_path best: no run below {folder} has a checkpoint called best.ckpt")
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
    data, trainer, saving = (_mapping(own.get(group)) for group in ("data", "trainer", "checkpoint"))
    # A model trained from Python has no config, but every checkpoint describes its model and tokenizer.
    tree: Tree = {
        "model": stored.part["model"],
        "data": {
            **{key: value for key, value in data.items() if key != "cache_dir"},
            "tokenizer": stored.part["tokenizer"],
        },
    }
    if type(own.get("seed_everything")) in (int, bool):
        tree["seed_everything"] = own["seed_everything"]
    if command == "fit":
        kept = {key: value for key, value in trainer.items() if key not in WRITERS and _is_plain(value)}
        switched_off = {key: trainer[key] for key in WRITERS if isinstance(trainer.get(key), bool | None)}
        tree["trainer"] = {**kept, **{key: value for key, value in switched_off.items() if key in trainer}}
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
    return (
        isinstance(path, str)
        and bool(Path(path).parts)
        and not Path(path).is_absolute()
        and not {"..", "~"} & set(Path(path).parts)
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_plain(value: Any) -> bool:
    """Return whether a setting is a number, a switch or a plain word, or some of them."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or not ("." in value or Path(value).is_file())

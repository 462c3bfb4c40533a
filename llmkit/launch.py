"""``llmkit fit | validate | test | predict | inspect``: from words, config files and a checkpoint to a run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from llmkit import checkpoint, config, registry
from llmkit.cli import CLI
from llmkit.contracts import DecodingOptions
from llmkit.data import DataModule
from llmkit.errors import UserError, nearest, note
from llmkit.module import LanguageModel

Words = list[tuple[str, str | None]]
TOP_KEYS = ("name", "output", "imports", "seed_everything", "model", "data", "trainer", "ckpt_path", "weights_only")
GROUPS: dict[str, type] = {"model": LanguageModel, "data": DataModule, "trainer": pl.Trainer}


def run(command: str, argv: list[str], cli: type[CLI] = CLI, asked: str = "") -> int:
    """Run one of Lightning's commands; returns the exit code.

    A value is taken from the command line, else the config files (later ones first), else the checkpoint, else the
    default. All mistakes that can be seen before anything is built are told together.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: the words behind it.
        cli: what is built and run.
        asked: the command's name in messages.
    """
    if {"-h", "--help"} & set(argv):
        cli(command, [command, "--help"], None)
        return 0
    words = _split(argv)
    files = _values(words, "--config", "-c")
    trees = [(file, _read(file)) for file in files]
    imports = [name for _, content in trees for name in content.pop("imports", None) or []]
    imports += config.import_modules([name for value in _values(words, "--imports") for name in _list(value)])
    named = {"name": Path(files[0]).stem} if files else {}
    settings = {**named, **{key: value for _, content in trees for key, value in content.items()}}
    settings |= {key.removeprefix("--"): value for key, value in words if value is not None}
    output = Path(str(settings.get("output", "runs")))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, not a folder")
    stored: checkpoint.Stored | None = None
    if settings.get("ckpt_path"):
        path = find_checkpoint(str(settings["ckpt_path"]), output / str(settings.get("name", "run")))
        stored = checkpoint.Stored(path, checkpoint.read(path))
        trees.insert(0, (f"checkpoint {path}", _stored_config(stored, command)))
        words = [word for word in words if word[0] != "--ckpt_path"] + [("--ckpt_path", str(path))]
    elif command != "fit":
        raise UserError(f"{command} needs --ckpt_path FILE (or 'best' or 'last' of the newest run)")
    elif not files and not {"data.train", "data.source"} & set(settings):
        raise UserError(f"{asked or command} needs --config FILE (or --data.train FILE and options)")
    problems: list[str] = []
    tree = config.merge(config.defaults(), named)
    for where, content in trees:
        problems += unknown_keys(content, where)
        tree = config.merge(tree, config.prepare(content, where, problems))
    args = _typed_words(words, tree, problems)
    if problems:
        raise UserError(" | ".join(dict.fromkeys(problems)))
    for stage in {"test", "predict"} & {command}:
        data = tree.get("data", {})
        if not (data.get(stage) or data.get("source") or _values(words, f"--data.{stage}", "--data.source")):
            raise UserError(f"data.{stage} is not set: give --data.{stage} FILE")
    tree.pop("ckpt_path", None)
    if _tokenizer_comes_along(words, trees, tree):
        tree["data"]["tokenizer"] = None
    if imports:
        tree["imports"] = list(dict.fromkeys(imports))
    _quiet()
    cli(command, [command, f"--config={json.dumps(tree)}", *args], stored)
    return 0


def find_checkpoint(wanted: str, folder: Path) -> Path:
    """Return the checkpoint file; ``best`` and ``last`` mean the newest run below ``folder`` that has one."""
    if wanted not in ("best", "last"):
        return Path(wanted)
    found = sorted(folder.glob(f"version_*/checkpoints/{wanted}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint called {wanted}.ckpt")
    return found[-1]


def unknown_keys(tree: dict[Any, Any], where: str) -> list[str]:
    """Return one sentence for each key that does not exist, with the nearest one that does."""
    problems = [_no_key(where, str(key), "", TOP_KEYS) for key in tree if key not in TOP_KEYS]
    for group, cls in GROUPS.items():
        part = tree.get(group)
        if part is None:
            continue
        if not isinstance(part, dict):
            problems.append(f"{where}: {group}: expected keys with values, got {part!r}")
            continue
        allowed = list(inspect.signature(cls).parameters)
        problems += [_no_key(where, str(key), f"{group}.", allowed) for key in part if key not in allowed]
        decoding = part.get("decoding")
        if group == "model" and isinstance(decoding, dict):
            fields = [field.name for field in dataclasses.fields(DecodingOptions)]
            problems += [_no_key(where, str(key), "model.decoding.", fields) for key in decoding if key not in fields]
    return problems


def _no_key(where: str, key: str, prefix: str, allowed: Any) -> str:
    return f"{where}: unknown key '{prefix}{key}'.{nearest(key, allowed)} Allowed: {', '.join(sorted(allowed))}."


def _read(file: str) -> dict[str, Any]:
    """Return a config file's tree, without empty groups, its local modules imported."""
    content = config.read_yaml(file)
    tree = {key: value for key, value in content.items() if not (key in GROUPS and value is None)}
    tree["imports"] = config.import_modules(content.get("imports"), Path(file).parent, f"{file}: ")
    return tree


def _stored_config(stored: checkpoint.Stored, command: str) -> dict[str, Any]:
    """Return the part of a checkpoint's config that a command starts from.

    Its local modules are not imported: naming code to run is up to the user.
    """
    keys = ("model", "data", "name", "output", "seed_everything", *(("trainer",) if command == "fit" else ()))
    own = stored.part["config"]
    tree: dict[str, Any] = json.loads(json.dumps({key: own[key] for key in keys if own.get(key) is not None}))
    # A model trained from Python has no config, but every checkpoint describes its model and tokenizer.
    data = {**tree.get("data", {}), "tokenizer": stored.part["tokenizer"]}
    return {**tree, "model": stored.part["model"], "data": data}


def _split(argv: list[str]) -> Words:
    """Return the command line as (option, value) pairs. Raises UserError for a word that belongs to no option."""
    words: Words = []
    for word in argv:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            key, equals, value = word.partition("=")
            words.append((key, value if equals else None))
        elif words and words[-1][1] is None:
            words[-1] = (words[-1][0], word)
        else:
            raise UserError(f"unexpected '{word}' on the command line: options are --key value")
    for key, given in words:
        if given is None and key in ("--config", "-c", "--imports", "--ckpt_path", "--name", "--output"):
            raise UserError(f"{key} needs a value")
    return words


def _values(words: Words, *keys: str) -> list[str]:
    return [value for key, value in words if key in keys and value is not None]


def _list(text: str) -> list[str]:
    value = yaml.safe_load(text)
    return [str(item) for item in value] if isinstance(value, list) else [text]


def _tokenizer_comes_along(words: Words, trees: list[tuple[str, dict[str, Any]]], tree: dict[str, Any]) -> bool:
    """Return whether the tokenizer is that of ``model.init_from``: no other one is asked for."""
    files = _values(words, "--model.init_from") or [tree["model"].get("init_from")]
    asked = [content.get("data", {}).get("tokenizer") for _, content in trees]
    asked += [key for key, _ in words if key.startswith("--data.tokenizer")]
    return files[-1] not in (None, "null") and not any(asked)


def _typed_words(words: Words, tree: dict[str, Any], problems: list[str]) -> list[str]:
    """Return the options for the typed parser, short names written out; mistakes are added to ``problems``."""
    where = "command line"
    args: list[str] = []
    current = {key: _class_path(tree, key) for key in config.SPEC_KEYS}
    decoding: dict[str, Any] = {}
    for key, value in words:
        name = key.removeprefix("--")
        if key in ("--config", "-c", "--imports"):
            continue
        if name.startswith("print_config") or name.endswith(".help"):
            args.append(key if value is None else f"{key}={value}")
            continue
        group, _, rest = name.partition(".")
        leaf, _, inner = rest.partition(".")
        leaf = leaf.rstrip("+")
        argument = inner.removeprefix("init_args.").partition(".")[0]
        spec_key = f"{group}.{leaf}"
        shape = {group: {leaf: {argument: None} if spec_key == "model.decoding" and argument else None}}
        problems += unknown_keys(shape if rest else {group: None}, where)
        try:
            if spec_key in current and argument not in ("", "class_path"):
                spec = {"class_path": current[spec_key], "init_args": {argument: value}}
                config.check_plugin(spec_key, spec, where, complete=False)
            if value is not None and name in config.SPEC_KEYS:
                value, chosen = config.expand_argument(name, value)
                if chosen != current[name]:
                    _note_dropped(tree, name, chosen)
                current[name] = chosen
        except UserError as error:
            problems.append(str(error))
        if spec_key == "model.decoding" and argument and value is not None:
            decoding[argument] = yaml.safe_load(value)
        args.append(key if value is None else f"{key}={value}")
    _check_decoding(tree, current["model.head"], decoding, problems)
    return args


def _check_decoding(tree: dict[str, Any], head: str, given: dict[str, Any], problems: list[str]) -> None:
    """Put the head's own decoding options below what is given, and check that all are in range."""
    if problems:
        return
    own = tree["model"].get("decoding") or {}
    factory = registry.factory_of({"class_path": head}, "head")
    options = {**dataclasses.asdict(registry.target_of(factory).decoding), **own}
    try:
        DecodingOptions(**{**options, **given})
    except ValueError as error:
        problems.append(f"model.decoding: {error}")
    except TypeError:
        pass  # not a number: the typed parser says so
    tree["model"]["decoding"] = options


def _note_dropped(tree: dict[str, Any], key: str, chosen: str) -> None:
    """Tell which arguments of the config's class do not apply to the one chosen on the command line."""
    group, _, leaf = key.partition(".")
    spec = tree[group].get(leaf)
    given = spec.get("init_args", {}) if isinstance(spec, dict) else {}
    parameters = config.parameters_of(key, chosen) if chosen else []
    dropped = [f"{name}: {value}" for name, value in given.items() if name not in parameters]
    if dropped:
        note(f"{key} is {chosen.rpartition('.')[2]} now; {', '.join(dropped)} of the config does not apply")


def _class_path(tree: dict[str, Any], key: str) -> str:
    group, _, leaf = key.partition(".")
    part = tree.get(group)
    spec = part.get(leaf) if isinstance(part, dict) else None
    return str(spec.get("class_path", "") if isinstance(spec, dict) else spec or "")


def _quiet() -> None:
    """Keep Lightning's hints out of the way; warnings that a user can act on stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*sync_dist=True.. when logging on epoch level.*",  # the metrics are summed over processes already
        ".*Total length of `list` across ranks is zero.*",
        ".*The dirpath has changed from.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*lr_scheduler.step.. before `optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", text)

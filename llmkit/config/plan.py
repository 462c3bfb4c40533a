"""``llmkit fit | validate | test | predict | inspect``: from words, config files and a checkpoint to a run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from llmkit.checkpoint import content as checkpoint
from llmkit.config import files as config
from llmkit.config import trust
from llmkit.config.argv import Words, listed, parsed, split, typed, values
from llmkit.config.keys import GROUPS as GROUPS
from llmkit.config.keys import TOP_KEYS as TOP_KEYS
from llmkit.config.keys import at_fault, is_key, nearest_name, unknown_keys
from llmkit.config.origins import COMMAND_LINE, DEFAULT, Origins, Problem, drop, plain
from llmkit.errors import UserError, note
from llmkit.run.cli import CLI


@dataclass(frozen=True)
class Plan:
    """What one of Lightning's commands is about to do, every mistake that can be seen before it told already.

    Attributes:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        tree: the merged config: defaults, checkpoint, files; every plugin as ``{class_path, init_args}``.
        args: the options of the command line, which are above it.
        stored: the checkpoint that is begun with.
        imports: the local modules that files and command line name.
        origins: where every value came from, the command line included.
        class_paths: the class of each plugin's key; empty where it is left to the model.
    """

    command: str
    tree: dict[str, Any]
    args: list[str]
    stored: checkpoint.Stored | None
    imports: list[str]
    origins: Origins
    class_paths: dict[str, str]

    @property
    def words(self) -> list[str]:
        """What the typed parser reads."""
        return [self.command, f"--config={json.dumps(self.tree, default=str)}", *self.args]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Put the place of its value in front of each mistake told inside, and tell those of the parser together."""
        try:
            yield
        except UserError as error:
            problems = [problem.text for problem in typed_problems(self)]
            raise UserError(*(problems or [self._with_key(text, error) for text in error.problems])) from error

    def placed(self, text: str) -> str:
        """Return a sentence that begins with a key behind the place of that key's value."""
        text = re.sub(r"^[a-z]+\.\w+: (?=(data|model|trainer)\.\w)", "", text)  # the second key is the one to change
        key = re.match(r"\w+(\.\w+)*", text)
        place = self.origins.near(key[0]) if key else None
        return f"{place or DEFAULT}: {text}" if key and (place or is_key(key[0])) else text

    def _with_key(self, text: str, error: UserError) -> str:
        text = text.partition("\nException raised from")[0]  # where torch tells its own source code
        placed = self.placed(text)
        key = at_fault(error, text, self.class_paths, self.origins) if placed == text else ""
        return f"{self.origins.at(key)}: {key}: {text}{nearest_name(key, text)}" if key else placed


def run(command: str, argv: list[str], cli: type[CLI] = CLI, asked: str = "") -> int:
    """Run one of Lightning's commands; returns the exit code.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: the words behind it.
        cli: what is built and run.
        asked: the command's name in messages.
    """
    if {"-h", "--help"} & set(argv):
        cli(command, [command, "--help"], None)
        return 0
    planned = plan(command, argv, asked)
    _quiet()
    with planned.told():
        cli(command, planned.words, planned.stored)
    return 0


def plan(command: str, argv: list[str], asked: str = "") -> Plan:
    """Return what a command would do. Nothing is built, but the modules that the config imports are.

    A value is taken from the command line, else the config files (later ones first), else the checkpoint, else the
    default. The arguments are those of ``run``.

    Raises:
        UserError: all mistakes that can be seen before anything is built, together.
    """
    words = split(argv)
    files = values(words, "--config", "-c")
    parts = [config.read_yaml(file) for file in files]
    imports: list[str] = []
    for file, (content, places) in zip(files, parts, strict=True):
        imports += config.import_modules(content.pop("imports", None), Path(file).parent, places.at("imports"))
    imports += config.import_modules([name for value in values(words, "--imports") for name in listed(value)])
    named = {"name": Path(files[0]).stem} if files else {}
    settings = {**named, **{key: value for content, _ in parts for key, value in content.items()}}
    settings |= {key.removeprefix("--"): value for key, value in words if value is not None}
    output = Path(str(settings.get("output", "runs")))
    if output.exists() and not output.is_dir():
        raise UserError(f"{_place('output', words, parts)}: output: {output} is a file, not a folder")
    stored: checkpoint.Stored | None = None
    wanted = settings.get("ckpt_path")
    if wanted:
        folder = output / str(settings.get("name", "run"))
        try:
            stored = find_checkpoint(str(wanted), folder)
        except UserError as error:
            raise UserError(f"{_place('ckpt_path', words, parts)}: {error}") from error
        words = [word for word in words if word[0] != "--ckpt_path"]
    if stored is not None:
        part, places = _stored_config(stored, command, alone=not files), Origins(f"checkpoint {stored.path}")
        places.put("", part)
        parts.insert(0, (part, places))
        words.append(("--ckpt_path", str(stored.path)))
    elif wanted and command != "fit":
        raise UserError(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint")
    elif command != "fit":
        raise UserError(f"{command} needs --ckpt_path FILE (or 'best' or 'last' of the newest run)")
    elif not files and not {"data.train", "data.source"} & set(settings):
        raise UserError(f"{asked or command} needs --config FILE (or --data.train FILE and options)")
    if wanted and stored is None:
        note(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint yet: training begins at the start")
    refused = [problem.text for content, places in parts for problem in trust.problems(content, places)]
    if refused:
        raise UserError(*refused)  # before anything that they name is imported
    problems: list[Problem] = []
    tree = config.merge(config.defaults(), named)
    origins = Origins()
    origins.put("", tree)
    for content, places in parts:
        problems += unknown_keys(content, places)
        known = [key for key in TOP_KEYS if key in content and (key not in GROUPS or isinstance(content[key], dict))]
        content = {key: content[key] for key in known}
        tree = config.merge(tree, config.prepare(content, places, problems))
        origins.update(places)
    tree.pop("ckpt_path", None)
    if imports:
        tree["imports"] = list(dict.fromkeys(imports))
    origins.keep(tree)
    if values(words, "--imports"):
        origins.put("imports", None, COMMAND_LINE)
    args, class_paths = typed(words, tree, origins, problems)
    if _tokenizer_comes_along(words, parts, tree):
        tree["data"]["tokenizer"] = None
    name = str((values(words, "--name") or [tree.get("name", "run")])[-1])
    if not trust.is_below(name):
        text = f"name: expected a relative path without '..' (it becomes a folder below output), got '{name}'"
        problems.append(Problem("name", f"{origins.at('name')}: {text}"))
    seed = parsed((values(words, "--seed_everything") or [str(tree.get("seed_everything", 0))])[-1])
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        text = f"seed_everything: expected 0 or more and below 2**32, got {seed}"
        problems.append(Problem("seed_everything", f"{origins.at('seed_everything')}: {text}"))
    planned = Plan(command, tree, args, stored, imports, origins, class_paths)
    if problems:
        problems += typed_problems(planned, {problem.key for problem in problems})
        raise UserError(*dict.fromkeys(problem.text for problem in problems))
    for stage in {"test", "predict"} & {command}:
        data = tree.get("data", {})
        if not (data.get(stage) or data.get("source") or values(words, f"--data.{stage}", "--data.source")):
            raise UserError(f"data.{stage} is not set: give --data.{stage} FILE")
    return planned


def _place(key: str, words: Words, parts: list[tuple[dict[str, Any], Origins]]) -> str:
    """Return where the value of a key at the top comes from, before all places are put together."""
    found = [places.at(key) for content, places in parts if key in content]
    return [DEFAULT, *found, *[COMMAND_LINE for word, _ in words if word == f"--{key}"]][-1]


def typed_problems(plan: Plan, known: Iterable[str] = ()) -> list[Problem]:
    """Return every value of a wrong type. The typed parser stops at the first: each is taken out in its turn.

    Args:
        plan: what is parsed.
        known: keys that are wrong otherwise: they are left out.
    """
    tree = copy.deepcopy(plan.tree)
    args = [word for word in plan.args if not re.match(r"--(print_config|\S+\.help)\b", word)]  # these end the program
    for key in known:
        _take_out(tree, args, key)
    found: dict[str, Problem] = {}
    for _ in range(50):
        try:
            _parser(plan.command).parse_args(dataclasses.replace(plan, tree=tree, args=args).words)
            break
        except UserError as error:
            text = str(error)
            key = plain(text.partition(":")[0])
            if any(f"{other}.".startswith(f"{key}.") for other in found):
                break  # it is missing only because it was taken out
            found[key] = Problem(key, plan.placed(text))
            if not _take_out(tree, args, key):
                break
    return list(found.values())


@functools.cache
def _parser(command: str) -> LightningArgumentParser:
    """Return the typed parser of a command."""
    made: list[LightningArgumentParser] = []

    class Stop(CLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> NoReturn:
            made.append(parser)
            raise UserError

    with contextlib.suppress(UserError):
        Stop(command, [], None)
    return made[0]


def _take_out(tree: dict[str, Any], args: list[str], key: str) -> bool:
    """Take a value out of what the typed parser reads, or else the nearest one above it; False: there is none."""
    options = [plain(word.partition("=")[0][2:]).rstrip("+") for word in args]
    below = f"{key}."
    while key:
        gone = {option for option in options if option == key or option.startswith(below)}
        if drop(tree, key) or gone:
            args[:] = [word for word, option in zip(args, options, strict=True) if option not in gone]
            return True
        key = key.rpartition(".")[0] if key.count(".") > 1 else ""
    return False


def find_checkpoint(wanted: str, folder: Path) -> checkpoint.Stored | None:
    """Return the checkpoint that is meant, read; None when ``last`` is wanted and there is none below ``folder`` yet.

    ``last`` is the newest checkpoint of the newest run, ``best`` the newest best one. One that cannot be read is passed
    over, with a note. Raises UserError when no checkpoint can be read.
    """
    if wanted not in ("best", "last"):
        return checkpoint.Stored(Path(wanted), checkpoint.read(wanted))
    pattern = "best.ckpt" if wanted == "best" else "*.ckpt"
    found = sorted(
        folder.glob(f"version_*/checkpoints/{pattern}"),
        key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"),
        reverse=True,
    )
    damaged: list[str] = []
    for path in found:
        try:
            stored = checkpoint.Stored(path, checkpoint.read(path))
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


def _stored_config(stored: checkpoint.Stored, command: str, alone: bool) -> dict[str, Any]:
    """Return the part of a checkpoint's config that a command starts from.

    Its local modules are not imported: naming code to run is up to the user. A run goes beside the one that the
    checkpoint lies in, wherever the checkpoint says it was written.
    """
    checkpoint.check_classes(stored.part, f"checkpoint {stored.path}")
    tree = trust.stored_part(stored.part["config"], command == "fit", alone)
    folders = [folder for folder in stored.path.absolute().parents if folder.name]
    if len(folders) > 3 and folders[0].name == "checkpoints" and re.fullmatch(r"version_\d+", folders[1].name):
        tree |= {"output": str(folders[3]), "name": folders[2].name}
    # A model trained from Python has no config, but every checkpoint describes its model and tokenizer.
    data = {**tree["data"], "tokenizer": stored.part["tokenizer"]}
    described: dict[str, Any] = json.loads(
        json.dumps({**tree, "model": stored.part["model"], "data": data}, default=str)
    )
    return described


def _tokenizer_comes_along(words: Words, parts: list[tuple[dict[str, Any], Origins]], tree: dict[str, Any]) -> bool:
    """Return whether the tokenizer is that of ``model.init_from``: no other one is asked for."""
    files = values(words, "--model.init_from") or [tree["model"].get("init_from")]
    groups = [content.get("data") for content, _ in parts]
    asked: list[Any] = [group.get("tokenizer") for group in groups if isinstance(group, dict)]
    asked += [key for key, _ in words if key.startswith("--data.tokenizer")]
    return files[-1] not in (None, "null") and not any(asked)


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

"""``llmkit fit | validate | test | predict``: LightningCLI over expanded configs."""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

from llmkit import checkpoint, config
from llmkit.callbacks import DEFAULT_VAL_INTERVAL, Progress, RunReport, run_folder
from llmkit.data import DataModule
from llmkit.errors import UserError, nearest, note
from llmkit.module import LanguageModel
from llmkit.optim import fast_bf16

TOP_KEYS = ("name", "output", "imports", "seed_everything", "model", "data", "trainer", "ckpt_path", "weights_only")
TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module shards batches itself
    "check_val_every_n_epoch": None,  # val_check_interval counts steps, whatever an epoch is
    "val_check_interval": DEFAULT_VAL_INTERVAL,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class Parser(LightningArgumentParser):
    """A parser that takes no abbreviations and answers a mistake with one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with the gist of jsonargparse's message."""
        raise UserError(_gist(message)) from ex


def _gist(message: str) -> str:
    """Return key, value, what is allowed and the nearest valid value out of jsonargparse's nested message."""
    keys = re.findall(r'(?:Parser key|Key) "([^"]+)"', message)
    inner = re.search(r"([\w.]+: expected [^\n]+?, got '[^']*'\.[^\n]*)", message)
    if keys and inner:  # the parser of a nested class has spoken already
        return f"{keys[0]}.{inner.group(1)}"
    missing = re.search(r"the following arguments are required: ([\w., ]+)", message)
    if keys and missing:
        return f"{keys[0]}: {missing.group(1)} must be given"
    got = re.findall(r"(?:Got value|Given value): ([^\n]+?)(?=$|\n|\. | - )", message)
    literals = [item for group in re.findall(r"Literal\[([^\]]*)\]", message) for item in group.split(", ")]
    kinds = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(?:typing\.|collections\.abc\.)?(\w+)\[[^\n]*)", message)
    names = [KINDS.get(kind.rpartition(".")[2], kind.rpartition(".")[2]) for pair in kinds for kind in pair if kind]
    allowed = list(dict.fromkeys([*(item.strip("'") for item in literals), *(name for name in names if name)]))
    if not (keys and got and allowed):
        return " ".join(message.split())[:400]
    value = got[0].strip().strip("'\"")
    return f"{'.'.join(dict.fromkeys(keys))}: expected {' or '.join(allowed)}, got '{value}'.{nearest(value, allowed)}"


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "keys with values",
    "Iterable": "a list",
    "Literal": "",
    "NoneType": "",
}
"""What jsonargparse calls a type, as people call it."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder of a fit; other commands leave the folder's config alone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the effective config at the start of a fit."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI for one command, with llmkit's logger, callbacks and closing report."""

    def __init__(self, command: str, args: list[str], stored: dict[str, Any] | None) -> None:
        self.command = command
        self.stored = stored
        super().__init__(
            LanguageModel,
            DataModule,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one command that runs, so that only its parser is built."""
        skip = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule", "return_predictions"}
        return {self.command: skip}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add llmkit's own top-level keys."""
        parser.add_argument(
            "--name", type=str, default="run", help="Name of the experiment; default: the config's name."
        )
        parser.add_argument("--output", type=str, default="runs", help="Run folders are OUTPUT/NAME/version_N.")
        parser.add_argument(
            "--imports", type=list[str] | str | None, default=None, help="Local modules or .py files with plugins."
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # llmkit prints the results itself
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the expanded words."""
        # Which init_args survive a change of class is told below, in one line of our own.
        logging.getLogger("jsonargparse").setLevel(logging.ERROR)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """The checkpoint's config is below the files and the command line already (see ``run``)."""

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, and give the model what the checkpoint carries."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException) as error:
            # Nothing has run yet: what fails here are the values of the config.
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
        self._dump_config()
        drop = ("config", "ckpt_path", "weights_only", "verbose")
        self.model.config = {key: value for key, value in self.config_dump.items() if key not in drop}
        if self.stored is not None:
            own = self.model.config
            checkpoint.restore(self.model, self.stored)
            self.model.config = own

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with llmkit's logger, callbacks and precision where the config left them open."""
        given = self._get(self.config_init, "trainer")
        output = self._get(self.config_init, "output")
        loggers = given.get("logger")
        folder_logger = CSVLogger(save_dir=output, name=self._get(self.config_init, "name"))
        if loggers in (None, True):
            kwargs["logger"] = [folder_logger]
        elif isinstance(loggers, (list, Logger)):
            kwargs["logger"] = [folder_logger, *(loggers if isinstance(loggers, list) else [loggers])]
        callbacks = given.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        self.report = RunReport()
        own: list[pl.Callback] = [self.report]
        if given.get("enable_progress_bar") is not False:
            own.append(Progress())
        saves = self.command == "fit" and given.get("enable_checkpointing") is not False
        if saves and not given.get("fast_dev_run") and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            name, mode = self.model.head.monitor
            own.append(
                ModelCheckpoint(
                    filename="best", monitor=f"val_{name}", mode=mode, save_last=True, enable_version_counter=False
                )
            )
        kwargs["callbacks"] = [*callbacks, *own]
        if given.get("precision") is None:
            kwargs["precision"] = fast_precision(given.get("accelerator", "auto"))
        if given.get("default_root_dir") is None:
            kwargs["default_root_dir"] = output
        if given.get("max_epochs") is None and given.get("max_steps") in (None, -1) and given.get("max_time") is None:
            kwargs["max_epochs"] = 10
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Measure the best checkpoint and print the closing report."""
        trainer, model = self.trainer, self.model
        if trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        saver = trainer.checkpoint_callback
        best = saver.best_model_path if isinstance(saver, ModelCheckpoint) else ""
        if isinstance(saver, ModelCheckpoint) and not best:
            # The run was shorter than one validation interval.
            trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt")
        trainer.validate(model, self.datamodule, ckpt_path=best or None, verbose=False)
        self.report.finish_fit(trainer, model)

    def after_validate(self) -> None:
        """Write and show the validation results."""
        self.report.finish(self.trainer, self.model, "val")

    def after_test(self) -> None:
        """Write and show the test results."""
        self.report.finish(self.trainer, self.model, "test")

    def predict(self, model: LanguageModel, datamodule: DataModule, **kwargs: Any) -> None:
        """Write one JSON line an example to ``predictions.jsonl`` in the run folder."""
        batches = self.trainer.predict(model, datamodule, **kwargs) or []
        if self.trainer.is_global_zero:
            path = run_folder(self.trainer) / "predictions.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as handle:
                for answers in batches:
                    for answer in answers:
                        handle.write(json.dumps(answer, ensure_ascii=False) + "\n")
            print(f"predictions: {path}")


def fast_precision(accelerator: str) -> str:
    """Return the precision that the hardware does fast: bf16 mixed where it multiplies bf16 natively, else fp32."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        return "32-true"
    return "bf16-mixed" if fast_bf16(torch.device("cuda" if gpu else "cpu")) else "32-true"


def run(command: str, argv: list[str], cli: type[CLI] = CLI) -> int:
    """Run one of Lightning's commands; returns the exit code.

    A value is taken from the command line, else the config files (later ones first), else the checkpoint, else the
    default.
    """
    if {"-h", "--help"} & set(argv):
        cli(command, [command, "--help"], None)
        return 0
    words = _split_words(argv)
    files = [value for key, value in words if key in ("--config", "-c") and value is not None]
    trees = []
    tree: dict[str, Any] = {}
    for file in files:
        content = config.read_yaml(file)
        content["imports"] = config.import_modules(content.get("imports"), Path(file).parent)
        trees.append((str(file), content))
        tree.setdefault("name", Path(file).stem)
    imported = [value for key, value in words if key == "--imports" and value is not None]
    imports = config.import_modules([name for value in imported for name in _list(value)])
    stored: dict[str, Any] | None = None
    wanted = _last(words, "--ckpt_path") or next((t["ckpt_path"] for _, t in trees if "ckpt_path" in t), None)
    if wanted:
        name = _last(words, "--name") or next((t["name"] for _, t in reversed(trees) if "name" in t), tree.get("name"))
        output = _last(words, "--output") or next((t["output"] for _, t in reversed(trees) if "output" in t), "runs")
        path = find_checkpoint(str(wanted), Path(output) / str(name or "run"))
        stored = checkpoint.read(path)["llmkit"]
        trees.insert(0, (f"checkpoint {path}", _stored_config(stored, command)))
        words = [word for word in words if word[0] != "--ckpt_path"] + [("--ckpt_path", str(path))]
    elif command != "fit":
        raise UserError(f"{command} needs --ckpt_path FILE (or 'best' or 'last' of the newest run)")
    elif not files and not _last(words, "--data.train") and not _last(words, "--data.source"):
        raise UserError("fit needs --config FILE (or --data.train FILE and options)")
    problems: list[str] = []
    for where, content in trees:
        problems += unknown_keys(content, where)
        if not problems:
            content = config.prepare(content, where)
            imports = [*(content.pop("imports", None) or []), *imports]
            tree = config.merge(tree, content)
    if problems:
        raise UserError(" | ".join(problems))
    tree = config.merge(config.defaults(), tree)
    args = _expanded_words(words, tree)
    if imports:
        tree["imports"] = list(dict.fromkeys(imports))
    tree.pop("ckpt_path", None)
    _quiet()
    try:
        cli(command, [command, f"--config={json.dumps(tree)}", *args], stored)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return 0


def find_checkpoint(wanted: str, folder: Path) -> Path:
    """Return the checkpoint file; ``best`` and ``last`` mean the newest run below ``folder`` that has one."""
    if wanted not in ("best", "last"):
        return Path(wanted)
    found = sorted(folder.glob(f"version_*/checkpoints/{wanted}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--ckpt_path {wanted}: no run below {folder} has a checkpoint called {wanted}.ckpt")
    return found[-1]


def _stored_config(stored: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the part of a checkpoint's config that a command starts from."""
    keys = ("model", "data", "name", "output", "seed_everything", *(("trainer",) if command == "fit" else ()))
    tree = {key: stored["config"][key] for key in keys if stored["config"].get(key) is not None}
    # Local modules of the writer are not imported for it: naming code is up to whoever runs it.
    return json.loads(json.dumps(tree))  # type: ignore[no-any-return]


def unknown_keys(tree: dict[str, Any], where: str) -> list[str]:
    """Return one sentence for each key that does not exist, with the nearest one that does."""
    problems = [_no_key(where, key, "", TOP_KEYS) for key in tree if key not in TOP_KEYS]
    for group, cls in {"model": LanguageModel, "data": DataModule, "trainer": pl.Trainer}.items():
        part = tree.get(group)
        if part is None:
            continue
        if not isinstance(part, dict):
            problems.append(f"{where}: {group}: expected keys with values, got {part!r}")
            continue
        allowed = list(inspect.signature(cls).parameters)
        problems += [_no_key(where, str(key), f"{group}.", allowed) for key in part if key not in allowed]
    return problems


def _no_key(where: str, key: str, prefix: str, allowed: Any) -> str:
    return f"{where}: unknown key '{prefix}{key}'.{nearest(key, allowed)} Allowed: {', '.join(sorted(allowed))}."


def _split_words(argv: list[str]) -> list[tuple[str, str | None]]:
    """Return the command line as (option, value) pairs. Raises UserError for a word that belongs to no option."""
    words: list[tuple[str, str | None]] = []
    for word in argv:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            key, equals, value = word.partition("=")
            words.append((key, value if equals else None))
        elif words and words[-1][1] is None:
            words[-1] = (words[-1][0], word)
        else:
            raise UserError(f"unexpected '{word}' on the command line: options are --key value")
    return words


def _last(words: list[tuple[str, str | None]], key: str) -> str | None:
    return next((value for name, value in reversed(words) if name == key and value is not None), None)


def _list(text: str) -> list[str]:
    value = yaml.safe_load(text)
    return [str(item) for item in value] if isinstance(value, list) else [text]


def _expanded_words(words: list[tuple[str, str | None]], tree: dict[str, Any]) -> list[str]:
    """Return the options for the typed parser, keys checked and short names written out.

    Raises UserError for all unknown keys together.
    """
    args, problems = [], []
    current = {key: _class_path(tree, key) for key in config.SPEC_KEYS}
    for key, value in words:
        name = key.removeprefix("--")
        if key in ("--config", "-c", "--imports"):
            continue
        if not name.startswith("print_config") and not name.endswith(".help"):
            group, _, rest = name.partition(".")
            leaf = rest.partition(".")[0].rstrip("+")
            problems += unknown_keys({group: {leaf: None}} if rest else {group: None}, "command line")
            spec_key = f"{group}.{leaf}"
            argument = rest.partition(".")[2].removeprefix("init_args.").partition(".")[0]
            if spec_key in current and argument not in ("", "class_path"):
                config.check_plugin(
                    spec_key, {"class_path": current[spec_key], "init_args": {argument: value}}, "command line"
                )
        if value is not None and name in config.SPEC_KEYS:
            value, chosen = config.expand_argument(name, value)
            if chosen != current[name]:
                _note_dropped(tree, name, chosen)
            current[name] = chosen
        args.append(key if value is None else f"{key}={value}")
    if problems:
        raise UserError(" | ".join(problems))
    return args


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
    spec = tree.get(group, {}).get(leaf)
    return str(spec["class_path"] if isinstance(spec, dict) else spec)


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
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*lr_scheduler.step.. before `optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", text)

"""LightningCLI as the executor of a checked config, and which keys a config has."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from llmkit.checkpoint.content import Stored
from llmkit.checkpoint.sources import note_changed
from llmkit.checkpoint.weights import check_fits
from llmkit.data import DataModule
from llmkit.errors import Problem, UserError, note
from llmkit.lightning import is_debug_run, raised_while_resuming, requeue_checkpoint
from llmkit.model.compressed import check_trainable
from llmkit.model.language_model import LanguageModel
from llmkit.model.optim import fast_bf16
from llmkit.run import trackers
from llmkit.run.class_names import listed
from llmkit.run.compilation import Compilation
from llmkit.run.failures import explain, is_out_of_memory, refusal
from llmkit.run.folder import RunFolder, RunLogger, run_folder, unlogged
from llmkit.run.memory import ReturnMemory, bound_kernels
from llmkit.run.progress import Progress
from llmkit.run.provenance import Provenance
from llmkit.run.report import Predictions, report_evaluation, report_fit
from llmkit.run.saving import Checkpoints, use_whole_files
from llmkit.run.shutdown import GracefulShutdown
from llmkit.run.throughput import Throughput
from llmkit.run.validation import DEFAULT_INTERVAL, Validations

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module shards batches itself
    "check_val_every_n_epoch": None,  # val_check_interval counts batches, whatever an epoch is
    "val_check_interval": DEFAULT_INTERVAL,  # Validations lowers it
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}

GROUPS: dict[str, type] = {"model": LanguageModel, "data": DataModule, "trainer": pl.Trainer, "checkpoint": Checkpoints}
"""The groups of a config, and the class whose arguments each has."""

TOP: dict[str, tuple[Any, Any, str]] = {
    "name": (str, "run", "Name of the experiment; default: the config file's name."),
    "output": (str, "runs", "Run folders are OUTPUT/NAME/version_N; default: runs."),
    "imports": (list[str] | str | None, None, "Local modules or .py files with plugins."),
    "seed_everything": (bool | int, 0, "Seed of weights, dropout and the order of the data; default: 0."),
    "examine": (bool, True, "Whether fit examines plugins that are not llmkit's own when they are first used."),
    "ckpt_path": (str | None, None, "A checkpoint to resume from: a file, or best or last of the newest run."),
    "weights_only": (bool | None, None, "How Lightning reads the checkpoint; true: plain data only."),
}
"""The other keys of a config: type, default and description."""

OF_THE_CHECKPOINT = ("ckpt_path", "weights_only")
"""Those that say where a run starts, which the checkpoints that it writes do not carry."""


class Parser(LightningArgumentParser):
    """The parser of a tree that is checked already: to check it once more would take as long as two training steps."""

    def validate(self, *args: Any, **options: Any) -> None:
        """Do nothing."""


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml``; Lightning's own checks the whole config once more, which takes as long as a short fit."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it into the run's folder; called on the first process alone, where nothing may wait for the others."""
        assert isinstance(pl_module, LanguageModel)
        tree = {**pl_module.config, **{key: self.config[key] for key in OF_THE_CHECKPOINT if key in self.config}}
        header = "".join(f"# {line}\n" for line in self.parser.dump_header or [])
        text = header + yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        (run_folder(trainer) / self.config_filename).write_text(text, encoding="utf-8")


class CLI(LightningCLI):
    """LightningCLI for one command, with llmkit's logger, callbacks and closing report.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        args: the checked tree, or words of a command line that hold it.
        stored: the checkpoint that the command starts from.

    Raises:
        UserError: the config cannot be built, memory does not suffice, or the checkpoint's training state is damaged.
    """

    def __init__(self, command: str, args: dict[str, Any] | list[str], stored: Stored | None = None) -> None:
        self.command = command
        self.stored = stored
        self.logger: Any = None
        """The value of ``trainer.logger``: its loggers are built when the run has a folder."""
        self.identity = hashlib.sha256(json.dumps([command, args], default=str).encode()).hexdigest()[:8]
        self.provenance = Provenance(command, stored)
        bound_kernels()
        purpose = " ".join((getattr(pl.Trainer, command).__doc__ or "").split()).partition(".")[0]
        super().__init__(
            LanguageModel,
            DataModule,
            save_config_callback=SavedConfig if command == "fit" else None,
            save_config_kwargs={"save_to_log_dir": False},  # SavedConfig does
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"exit_on_error": False, "prog": f"llmkit {command}", "description": purpose},
            args=args,
            run=False,  # the one command needs no parser below another, which would take twice as long
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        self.execute()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add llmkit's own top-level keys, and those that Lightning's command has."""
        for name in ("name", "output", "imports", "examine"):
            kind, default, text = TOP[name]
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.add_class_arguments(Checkpoints, "checkpoint")
        if self.command == "fit":  # for the help: the command has taken it out
            text = "Try learning rates in a short run, suggest one, draw the curve, and stop."
            parser.add_argument("--find_lr", action="store_true", help=text)
        skip: set[str | int] = {*self.subcommands()[self.command], "return_predictions", "verbose"}
        self.command_keys = parser.add_method_arguments(pl.Trainer, self.command, skip=skip)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the checked tree. Raises UserError for an option of jsonargparse's own, ``--model.x.help``, say."""
        try:
            if isinstance(args, list):
                self.config = parser.parse_args(args)
            else:  # it has every default: to look for them would take as long again
                own = ("name", "output", "imports", "examine", "checkpoint", *self.command_keys)
                tree = {key: args.get(key) for key in ("seed_everything", "trainer", "model", "data", *own)}
                self.logger = tree["trainer"]["logger"]
                tree["trainer"] = {**tree["trainer"], "logger": None}
                self.config = parser.parse_object(tree, defaults=False)
        except ArgumentError as error:
            raise UserError(" ".join(str(error).split())[:400]) from error

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, and give the model what the checkpoint carries."""
        if self.stored is not None:  # its weights replace those that its training began with
            self.config.model.init_from = None
            self.config.model.adapter = None
            self.config.model.word_vectors = None
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException) as error:
            # Nothing has run yet: what fails here are the values of the config, or the code of a plugin.
            if isinstance(error, UserError) or (not isinstance(error, ValueError) and explain(error)):
                raise
            raise UserError(str(error)) from error
        if self.stored is None:
            self.model.check_tokenizer(self.datamodule.tokenizer_class)
        else:
            check_fits(self.model.spec, self.stored, self.datamodule.tokenizer_class)
            note_changed(self.stored.part, f"checkpoint {self.stored.path}")
            self.model.restore(self.stored)
        self.config.trainer.logger = self.logger
        try:
            content = json.loads(json.dumps(self.config.as_dict()))
        except TypeError:  # a path, say: the parser makes text of it, and takes as long as for parsing
            content = json.loads(self.parser.dump(self.config, "json", False, skip_validation=True))  # False: nulls too
        self.model.config = {key: value for key, value in content.items() if key not in ("config", *OF_THE_CHECKPOINT)}

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with llmkit's logger, callbacks and precision where the config left them open."""
        given = self.config_init["trainer"]
        check_fp8(str(given.get("precision")))
        kwargs |= filled_in(given)
        output = self.config_init["output"]
        kwargs["logger"] = self.loggers()
        callbacks = listed(given.get("callbacks"))
        throughput = Throughput()
        own: list[pl.Callback] = [Validations(), throughput, ReturnMemory()]
        if self.command == "predict":
            own.append(Predictions())
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            own.append(Progress(throughput))
        own += [Compilation(), GracefulShutdown()]  # after those that log
        saves = self.command == "fit" and given.get("enable_checkpointing") is not False
        savers = [item for item in callbacks if isinstance(item, Checkpoint)]
        first: list[pl.Callback] = [RunFolder()]
        if saves and not given.get("fast_dev_run") and all(isinstance(item, OnExceptionCheckpoint) for item in savers):
            first.append(self.config_init["checkpoint"])
        kwargs["callbacks"] = [*first, *callbacks, *own, self.provenance]  # the last, which counts all tokens
        if given.get("profiler") is not None:  # without a name of its file, it would print
            given["profiler"].filename = given["profiler"].filename or "profile"
        if given.get("default_root_dir") is None:
            # A requeued SLURM job looks here for its checkpoint, so no other run may write here: neither one of another
            # job nor another command of this one.
            job = os.environ.get("SLURM_JOB_ID")
            kwargs["default_root_dir"] = f"{output}/slurm_{job}/{self.identity}" if job else output
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(Problem("trainer", str(error))) from error
        use_whole_files(trainer)
        return trainer

    def loggers(self) -> list[Logger]:
        """Return the logger of the run folder, and those of the config, which are given what identifies the run."""
        name = self.config_init["name"]
        own = RunLogger(self.config_init["output"], name, self.logger is not False)
        specs = listed(self.logger)
        if not specs or self.command == "predict" or self.config_init["trainer"].get("fast_dev_run"):
            return [own]
        tags = {key: self.model.spec[key]["class_path"].rpartition(".")[2] for key in ("head", "attention")}
        states: Any = (self.stored.content.get("callbacks") if self.stored is not None else None) or {}
        known = states.get("RunFolder", {}).get("trackers", {})
        try:
            return [own, *trackers.build(specs, Path(own.log_dir), name, tags, known)]
        except UserError:
            own.release()
            raise

    def execute(self) -> None:
        """Run the command."""
        try:
            if self.command == "fit":
                self.before_fit()
            given = {key: self.config_init[key] for key in self.command_keys}
            with trackers.running(item for item in self.trainer.loggers if not isinstance(item, RunLogger)):
                getattr(self, self.command)(model=self.model, datamodule=self.datamodule, **given)
        except UserError:
            self.release_folder()
            raise
        except Exception as error:
            self.release_folder()
            step = self.trainer.global_step if self.command == "fit" else -1
            if self.stored is not None and not explain(error) and is_damaged_state(self.stored, error, step):
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise UserError(f"checkpoint {self.stored.path}: its training state is damaged ({text})") from error
            refused = refusal(error)
            if refused is not None:
                raise UserError(refused) from error
            if not is_out_of_memory(error):
                raise
            model, data = self.model, self.datamodule
            batch = "data.batch_tokens" if data.batch_tokens else "data.batch_size"
            spec = ", ".join(f"model.{key} {model.spec[key]}" for key in ("dim", "num_layers", "context"))
            raise UserError(
                f"out of memory ({' '.join(str(error).split())[:160]}). It depends on {batch} "
                f"{data.batch_tokens or data.batch_size}{model._step.batch_shape}, {spec}{model.size}, precision "
                f"{self.trainer.precision}. Lower {batch} first (trainer.accumulate_grad_batches makes up for it), "
                f"then model.context or model.dim"
            ) from error

    def release_folder(self) -> None:
        """Remove the run's folder if nothing is in it: the run has failed."""
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.release()

    def before_fit(self) -> None:
        """Refuse a compressed checkpoint that cannot be trained, load the teacher, note what a SLURM job resumes."""
        if self.stored is not None:
            check_trainable(self.model.compression, "ckpt_path", self.stored.path)
        self.model.load_teacher()
        requeued = requeue_checkpoint(self.trainer) if self.stored is None else None
        if requeued is not None and self.trainer.is_global_zero:
            note(f"this SLURM job saved {requeued} before it was requeued: training resumes there")

    def fit(self, model: LanguageModel, **kwargs: Any) -> None:
        """Train, measure the best checkpoint and print the closing report."""
        trainer = self.trainer
        trainer.fit(model, **kwargs)
        if is_debug_run(trainer) or trainer.interrupted:
            return
        saver = trainer.checkpoint_callback
        # The best step may be the last one, which has just been measured. The validation makes a sharded network whole
        # again, for the sample.
        measured = isinstance(saver, Checkpoints) and saver.best_step == trainer.global_step and model.results
        if not measured or model.device_mesh is not None:
            best = getattr(saver, "best_model_path", "")
            with unlogged(trainer):  # the values of the best step do not belong to the last one
                trainer.validate(model, self.datamodule, ckpt_path=best or None, verbose=False)
        report_fit(trainer, model)

    def validate(self, model: LanguageModel, **kwargs: Any) -> None:
        """Write and print the validation results."""
        self.trainer.validate(model, verbose=False, **kwargs)
        report_evaluation(self.trainer, model, "val")

    def test(self, model: LanguageModel, **kwargs: Any) -> None:
        """Write and print the test results."""
        self.trainer.test(model, verbose=False, **kwargs)
        report_evaluation(self.trainer, model, "test")

    def predict(self, model: LanguageModel, **kwargs: Any) -> None:
        """Write one JSON line per example to ``predictions.jsonl`` in the run folder."""
        self.trainer.predict(model, return_predictions=False, **kwargs)


def filled_in(given: Any) -> dict[str, Any]:
    """Return the trainer settings that llmkit chooses where a config leaves them open."""
    filled: dict[str, Any] = {}
    if given.get("precision") is None:
        filled["precision"] = fast_precision(given.get("accelerator", "auto"))
    if given.get("max_epochs") is None and given.get("max_steps") in (None, -1) and given.get("max_time") is None:
        filled["max_epochs"] = 10
    return filled


def fast_precision(accelerator: str) -> str:
    """Return the precision that the hardware does fast: bf16 mixed where it multiplies bf16 natively, else fp32."""
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        return "32-true"
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if fast_bf16(torch.device("cuda" if gpu else "cpu")) else "32-true"


def check_fp8(precision: str) -> None:
    """Raise UserError where Lightning's precision ``transformer-engine`` cannot run: package or hardware is missing."""
    if not precision.startswith("transformer-engine"):
        return
    missing = [] if importlib.util.find_spec("transformer_engine") else ["the package is not installed"]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        missing.append("the GPU is not there or too old")
    if missing:
        text = (
            f"{precision} multiplies in fp8, which needs a GPU of compute capability 8.9 or later and "
            f"pip install 'transformer_engine[pytorch]'; here {' and '.join(missing)}"
        )
        raise UserError(Problem("trainer.precision", text))


def is_damaged_state(stored: Stored, error: Exception, step: int) -> bool:
    """Return whether an error comes from the training state in a checkpoint.

    It does if it was raised while Lightning restored that state, or by a value in the first step after that.

    Args:
        stored: the checkpoint that a command began with.
        error: what was raised, and not by a plugin.
        step: the optimizer step that it was raised in; -1: the command does not train.
    """
    begun = stored.content.get("global_step")
    first = isinstance(begun, int) and 0 <= step <= begun + 1
    in_first = first and isinstance(error, TypeError | ValueError | LookupError | AttributeError)
    return in_first or raised_while_resuming(error)

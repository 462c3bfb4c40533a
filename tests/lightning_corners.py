"""Trains tiny models and checks each answer of ``llmkit.lightning`` against plain counting. Prints Lightning's version.

A script, so that test_lightning.py can run it with any Lightning on the path: ``lightning_corners.py FOLDER``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import lightning.pytorch as pl
import torch
from command import TINY, done, llmkit
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers.csv_logs import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from llmkit import lightning as corners

EPOCH, ACCUMULATE, INTERVAL, VALIDATION, LOGGED = 7, 2, 3, 3, 2
"""Batches of an epoch, of a step, between validations and of a validation; every second step is logged."""
STEPS = 4
"""Of an epoch: 2 + 2 + 2 + 1 batches."""


class Tiny(pl.LightningModule):
    """One weight; writes down what is answered in each training step."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.fail = fail
        self.seen: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        corners.align_logged_step(self.trainer)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("restore")
        trainer = self.trainer
        self.log("loss", 1.0)
        self.seen.append(("in a batch", corners.batches_begun(trainer), corners.batches_done(trainer)))
        self.seen.append(("step", corners.ends_step(trainer), corners.logs_this_step(trainer)))
        return (self.weight * batch[0]).sum()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.seen.append(("validation batch", batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(Callback):
    """Writes down the answers at the end of batches; may change the interval, and stop in a validation."""

    def __init__(self, interval: int | None = None, stop_after: int | None = None, file: Path = Path()) -> None:
        self.interval, self.stop_after, self.file = interval, stop_after, file
        self.validating = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.interval is not None:
            corners.set_validation_interval(trainer, self.interval)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        counts = (corners.batches_begun(trainer), corners.batches_done(trainer))
        pl_module.seen.append(("batch", *counts, corners.can_resume_here(trainer)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validating = True
        pl_module.seen.append(("validation",))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        if batch_idx == 1 and corners.batches_done(trainer) == self.stop_after:
            trainer.save_checkpoint(self.file)
            raise InterruptedError

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validating = False

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.validating:
            corners.restart_validation(checkpoint)


class End(Callback):
    """Has the last batch validated, and saves in that validation and after it; writes each step's metrics early."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        corners.write_step_metrics(trainer)
        if trainer.global_step == 2 * STEPS:
            corners.validate_now(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "end.ckpt")


class Rows(CSVLogger):
    """Keeps the steps whose metrics are written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "loss" in metrics and step is not None:
            self.steps.append(step)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "default_root_dir": folder, "logger": False, "max_epochs": 2,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "accumulate_grad_batches": ACCUMULATE, "check_val_every_n_epoch": None, "val_check_interval": INTERVAL,
        "num_sanity_val_steps": 0, "log_every_n_steps": LOGGED, "callbacks": list(callbacks),
    }  # fmt: skip
    return pl.Trainer(**{**settings, **options})


def fit(trainer: pl.Trainer, model: Tiny, checkpoint: Path | None = None) -> list[Any]:
    training, validation = (DataLoader(TensorDataset(torch.ones(count, 1))) for count in (EPOCH, VALIDATION))
    trainer.fit(model, training, validation, ckpt_path=checkpoint)
    return model.seen


def expected(interval: int = INTERVAL) -> list[Any]:
    """Return what has to be seen, by counting."""
    seen: list[Any] = []
    for number in range(1, 2 * EPOCH + 1):
        epoch, batch = divmod(number - 1, EPOCH)
        step = epoch * STEPS + batch // ACCUMULATE + 1
        last = batch + 1 == EPOCH
        seen.append(("in a batch", number, number - 1))
        seen.append(("step", last or (batch + 1) % ACCUMULATE == 0, step % LOGGED == 0))
        seen.append(("batch", number, number, not last and number % interval != 0))
        if number % interval == 0:
            seen += [("validation",), *(("validation batch", i) for i in range(VALIDATION))]
    return seen


def check_counts(folder: Path) -> None:
    """Training, validation and logging are counted as they happen."""
    rows = Rows(folder)
    assert fit(trainer(folder, Watch(), logger=rows), Tiny()) == expected()
    assert rows.steps == [step - 1 for step in range(1, 2 * STEPS + 1) if step % LOGGED == 0]
    assert fit(trainer(folder, Watch(interval=4)), Tiny()) == expected(4)
    seen = fit(trainer(folder, Watch(), limit_val_batches=0), Tiny())
    assert all(can == (number % EPOCH != 0) for name, number, *_, can in seen if name == "batch")


def check_resume(folder: Path) -> None:
    """A validation that was cut short is repeated whole; the counts continue."""
    file, model = folder / "stopped.ckpt", Tiny()
    with contextlib.suppress(InterruptedError):
        fit(trainer(folder, Watch(stop_after=2 * INTERVAL, file=file)), model)
    whole = expected()
    begun = len(model.seen) - 3  # the validation and two of its batches
    assert model.seen == whole[: begun + 3]
    assert fit(trainer(folder, Watch()), Tiny(), file) == whole[begun:]
    content = torch.load(file, weights_only=True)
    content["optimizer_states"] = [{"state": {}, "param_groups": []}]
    torch.save(content, file)
    for model, resume, answer in ((Tiny(), file, True), (Tiny(fail=True), None, False)):
        try:
            fit(trainer(folder), model, resume)
        except Exception as error:
            assert corners.raised_while_resuming(error) == answer, error
        else:
            raise AssertionError("nothing was raised")
    handler = signal.getsignal(signal.SIGINT)
    try:
        fit(trainer(folder, LambdaCallback(on_train_start=interrupt)), Tiny())
    except SystemExit as exit:
        assert corners.was_interrupted(exit) and not corners.was_interrupted(SystemExit(1))
    else:
        raise AssertionError("nothing was raised")
    signal.signal(signal.SIGINT, handler)


def interrupt(*given: Any) -> None:
    raise KeyboardInterrupt


def check_end(folder: Path) -> None:
    """The last batch is validated in whatever interval, metrics are written when asked, and the end is noticed."""
    for every, interval in ((None, 5), (1, 5), (3, 1.0)):
        rows = Rows(folder)
        options: dict[str, Any] = {"check_val_every_n_epoch": every, "val_check_interval": interval, "logger": rows}
        seen = fit(trainer(folder, Watch(), End(folder), **options), Tiny())
        assert seen[-1 - VALIDATION :] == [("validation",), *(("validation batch", i) for i in range(VALIDATION))]
        steps = [step - 1 for step in range(1, 2 * STEPS + 1) if step % LOGGED == 0]
        assert rows.steps == [step for step in steps for _ in range(2)]
        for name, ended in (("3", False), (str(2 * STEPS), True), ("end", True)):
            if (folder / f"{name}.ckpt").exists():
                content = torch.load(folder / f"{name}.ckpt", weights_only=True)
                for limits in ((-1, 2), (2 * STEPS, None), (2 * STEPS, -1), (2 * STEPS, 9)):
                    assert corners.has_ended(content, *limits) == ended, (name, limits)
                for limits in ((-1, 3), (2 * STEPS + 1, None), (-1, -1)):
                    assert not corners.has_ended(content, *limits), (name, limits)


def check_settings(folder: Path) -> None:
    """Seed, debug runs, the logging interval, and SLURM's signal."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    assert corners.global_seed() == 0
    pl.seed_everything(5, verbose=False)
    assert corners.global_seed() == 5
    assert corners.log_interval(trainer(folder)) == LOGGED
    assert corners.log_interval(trainer(folder, log_every_n_steps=0)) == 1
    assert [corners.is_debug_run(trainer(folder, fast_dev_run=debug)) for debug in (False, True, 2)] == [0, 1, 1]
    assert corners.requeue_signal(trainer(folder)) is None
    job = trainer(folder)
    for newest in (None, folder / "hpc_ckpt_1.ckpt", folder / "hpc_ckpt_2.ckpt"):
        if newest:
            newest.touch()
        assert corners.requeue_checkpoint(job) is None
        with mock.patch.object(SLURMEnvironment, "detect", return_value=True):
            assert corners.requeue_checkpoint(job) == newest
    for requeue, answer in ((True, signal.SIGUSR2), (False, None)):
        slurm = SLURMEnvironment(auto_requeue=requeue, requeue_signal=signal.SIGUSR2)
        assert corners.requeue_signal(trainer(folder, plugins=[slurm])) == answer


def check_llmkit(folder: Path) -> None:
    """A fit that is stopped in a validation and resumed ends as one that was left alone."""
    (folder / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    sizes = {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 3, "accumulate_grad_batches": 2}
    words = ["fit", "--data.train", folder / "text.txt", *TINY, "--imports", "faults", "--output", folder / "runs"]
    words += [f"--trainer.{key}={value}" for key, value in sizes.items()]
    whole = done(*words, "--name", "whole")
    for step in (4, 8):  # 8: no step is left for the run that resumes
        sender = {"class_path": "faults.Sender", "init_args": {"number": 15, "step": step, "validation_batch": 1}}
        stopped = llmkit(*words, "--name", f"parts{step}", "--trainer.callbacks", json.dumps(sender))
        assert stopped.code == 128 + 15, stopped
        resumed = done(*words, "--name", f"parts{step}", "--ckpt_path", "last")
        for name in ("results.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
            one, two = (run.folder / name for run in (whole, resumed))
            if name.endswith(".json"):
                assert one.read_text() == two.read_text()
                continue
            weights = [torch.load(path, weights_only=True)["state_dict"] for path in (one, two)]
            assert weights[0].keys() == weights[1].keys()
            assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def check_build_first(folder: Path) -> None:
    """A callback finds the layers that the model makes in ``configure_model`` when it is set up."""
    seen: list[list[str]] = []

    class Late(Tiny):
        def configure_callbacks(self) -> Any:
            corners.build_first(self.trainer)
            return []

        def configure_model(self) -> None:
            self.late = getattr(self, "late", None) or torch.nn.Linear(1, 1)

    class Look(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            seen.append([name for name, _ in pl_module.named_parameters()])

    fit(trainer(folder, Look(), max_epochs=1), Late())
    assert seen == [["weight", "late.weight", "late.bias"]]


def check_all(parent: Path) -> None:
    """Run the checks, each in a folder of its own."""
    for check in (check_counts, check_resume, check_end, check_settings, check_build_first, check_llmkit):
        folder = parent / check.__name__
        folder.mkdir()
        check(folder)


if __name__ == "__main__":
    check_all(Path(sys.argv[1]))
    print(lightning.__version__)

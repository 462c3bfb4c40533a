"""Checkpoint files: whole or not there at all, the right ones kept, the best one taken along when a run resumes."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import TINY, Result, done, llmkit

import llmkit as llmkit_package
from llmkit.run.folder import claim
from llmkit.run.saving import WholeFileIO, sweep, write_whole


def in_a_child(work: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("old")

    def write(part: Path) -> None:
        part.write_text("half of the n")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lambda: write_whole(path, write)) == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = [file for file in tmp_path.iterdir() if file != path]
    assert not left.name.endswith(".ckpt")  # nobody takes it for a checkpoint

    def write_all(part: Path) -> None:
        part.write_text("new")

    write_whole(path, write_all)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_text() == "new"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The limit on a file's size fails as a full disk does: in the middle of a write."""
    path = tmp_path / "last.ckpt"
    WholeFileIO().save_checkpoint({"weights": torch.zeros(10)}, path)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            WholeFileIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
        except OSError as error:
            os._exit(7 if error.filename == str(path) else 8)

    assert in_a_child(save) == 7
    assert read(path)["weights"].shape == (10,)
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "version_3" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("last.ckpt.part", "best.ckpt.part", "last.ckpt"):
        (folder / name).write_text("x")
        os.utime(folder / name, (0, 0))
    now = time.time()
    os.utime(folder / "best.ckpt.part", (now, now))  # being written
    sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt.part", "last.ckpt"]


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    """Eight of them look for the next number at the same time, four times over."""
    parent = tmp_path / "runs" / "name"
    (parent / "version_7").mkdir(parents=True)
    together = threading.Barrier(8)

    def begin(_: int) -> int:
        together.wait()
        return claim(parent)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(begin, range(32))) == list(range(8, 40))
    assert len(list(parent.iterdir())) == 33


WORSE = (
    "--model.optimizer",
    "{name: SGD, lr: 0.1, maximize: true}",
    "--model.scheduler",
    "{name: ConstantLR, factor: 1.0}",
)
"""Up the gradient: the loss gets worse with each step, so that the best checkpoint is an early one."""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A fit that saves every third step and validates every fourth."""
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    own = ("--checkpoint.every_n_steps", "3", "--checkpoint.keep", "2", "--trainer.val_check_interval", "4")
    return ["fit", "--data.train", str(tmp_path / "text.txt"), *TINY, *own, "--output", str(tmp_path / "runs")]


def steps_of(result: Result) -> dict[str, int]:
    folder = result.folder / "checkpoints"
    return {path.name: read(path)["global_step"] for path in folder.iterdir()}


def rows(result: Result, name: str) -> list[tuple[int, float]]:
    """Return what a run logged under a name, with the number of steps until then."""
    lines = (result.folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    cells = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    return [(int(cell["step"]) + 1, float(cell[name])) for cell in cells if cell[name]]


def scores(result: Result) -> dict[int, float]:
    found = rows(result, "val_loss")
    assert len(dict(found)) == len(found)  # one a step
    return dict(found)


def test_which_checkpoints_there_are(words: list[str]) -> None:
    """After 10 steps: saved at 3, 4 (validation), 6, 8, 9 and 10; the two newest and the best one stay."""
    result = done(*words, "--trainer.max_steps", "10", *WORSE)
    values = scores(result)
    best = min(values, key=lambda step: values[step])
    assert best < 8  # else this test shows nothing
    assert steps_of(result) == {"last.ckpt": 10, "best.ckpt": best, "step_9.ckpt": 9, "step_10.ckpt": 10}
    folder = result.folder / "checkpoints"
    assert (folder / "last.ckpt").samefile(folder / "step_10.ckpt")  # the newest is written once


def test_a_resumed_run_has_the_best_checkpoint_of_before(words: list[str], tmp_path: Path) -> None:
    """It lies in the run's own folder, and decides what the closing report measures, as without the interruption."""
    schedule = (*words, *WORSE)
    own = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    schedule += ("--trainer.log_every_n_steps", "2", "--trainer.logger", json.dumps(own))
    whole = done(*schedule, "--trainer.max_steps", "12", "--name", "whole")
    (second,) = (tmp_path / "logs").rglob("metrics.csv")
    assert second.read_text().splitlines() == (whole.folder / "metrics.csv").read_text().splitlines()
    logged_config = yaml.safe_load(second.with_name("hparams.yaml").read_text())
    for key, value in {"model.dim": 16, "model.optimizer": "SGD", "model.optimizer.lr": 0.1, "name": "whole"}.items():
        assert logged_config[key] == value
    assert not any(isinstance(value, dict | list) for value in logged_config.values())
    done(*schedule, "--trainer.max_steps", "9", "--name", "parts")
    resumed = done(*schedule, "--trainer.max_steps", "12", "--name", "parts", "--ckpt_path", "last")
    assert resumed.folder.name == "version_1"
    assert steps_of(resumed)["best.ckpt"] == steps_of(whole)["best.ckpt"] < 9
    results = [json.loads((run.folder / "results.json").read_text()) for run in (whole, resumed)]
    assert results[0] == results[1]
    curves = [scores(run) for run in (whole, resumed)]
    assert curves[0].keys() == {4, 8, 12}  # and not the best value at the last step
    assert curves[1] == {**curves[0], 9: curves[1][9]}  # the first part was validated at its end
    logged = [rows(run, "train_loss") for run in (whole, resumed)]
    assert logged[0] == logged[1]
    end = ("--ckpt_path", whole.folder / "checkpoints" / "last.ckpt", "--trainer.limit_val_batches", "1")
    last = done("validate", *end)
    assert f"loss                 {curves[0][12]:.4f}" in last.out


@pytest.mark.parametrize(
    ("interval", "steps", "validated", "noted"),
    [(4, 10, {4, 8, 10}, "warmup_steps 100 is more than the 10 steps"), (20, 3, {3}, "val_check_interval 20 is more")],
)
def test_the_last_step_is_validated(
    interval: int, steps: int, validated: set[int], noted: str, words: list[str]
) -> None:
    result = done(*words, "--trainer.val_check_interval", interval, "--trainer.max_steps", steps)
    assert scores(result).keys() == validated
    assert noted in result.err
    assert "best.ckpt" in steps_of(result)


def test_weights_that_are_not_finite_are_not_saved(words: list[str], tmp_path: Path) -> None:
    spoil = '{"class_path": "faults.Spoil", "init_args": {"step": 4}}'
    own = ("--imports", "faults", "--trainer.callbacks", spoil, "--trainer.max_steps", "9")
    result = llmkit(*words, *own, "--model.max_bad_steps", "100", "--trainer.val_check_interval", "1000")
    assert result.code == 2
    assert "step 6: the weights are not finite" in result.err
    (last,) = (tmp_path / "runs").rglob("last.ckpt")
    assert read(last)["global_step"] == 3


def test_without_a_logger_a_run_has_a_folder_too(words: list[str], tmp_path: Path) -> None:
    """All is in it, but no metrics; neither the second run nor a validation writes over it."""
    checkpoint = ""
    for number in range(2):
        checkpoint = str(done(*words, "--trainer.logger", "false").checkpoint)
        folder = tmp_path / "runs" / "run" / f"version_{number}"
        records = {"provenance.json", "results.json"}
        assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.yaml", *records}
    done("validate", "--ckpt_path", checkpoint, "--trainer.logger", "false")
    debugged = done("validate", "--ckpt_path", checkpoint, "--trainer.fast_dev_run", "true")
    assert "loss" in debugged.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    written = sorted(path.parent.name for path in (tmp_path / "runs").rglob("results.json"))
    assert written == ["version_0", "version_1", "version_2"]


def test_early_stopping(words: list[str]) -> None:
    """It counts validations without a better one, over a resume too."""
    own = (
        *words,
        *WORSE,
        "--trainer.val_check_interval",
        "2",
        "--trainer.max_steps",
        "40",
        "--checkpoint.patience",
        "3",
    )
    whole = done(*own, "--name", "whole")
    values = scores(whole)
    best = min(values, key=lambda step: values[step])
    since = [step for step in sorted(values) if step > best]
    assert len(since) == 3
    assert f"step {since[-1]}: training stops, 3 validation(s) in a row" in whole.err
    assert steps_of(whole)["last.ckpt"] == since[-1] < 40
    done(*own, "--name", "parts", "--trainer.max_steps", since[1])
    resumed = done(*own, "--name", "parts", "--ckpt_path", "last")
    assert scores(resumed) == values
    again = done(*own, "--name", "parts", "--ckpt_path", "last")
    assert "training stops" in again.err
    for run in (resumed, again):
        assert [steps_of(run)[name] for name in ("last.ckpt", "best.ckpt")] == [since[-1], best]


@pytest.mark.parametrize(("key", "value"), [("every_n_steps", "0"), ("keep", "-1"), ("patience", "0")])
def test_numbers_out_of_range(key: str, value: str, words: list[str]) -> None:
    result = llmkit(*words, f"--checkpoint.{key}", value)
    assert result.code == 2
    assert f"checkpoint.{key}: must be" in result.err


def test_from_python(tmp_path: Path) -> None:
    """The callback is all that is needed: it brings the safe way of writing along."""
    (tmp_path / "text.txt").write_text("once upon a time there was a note\n" * 20)
    data = llmkit_package.DataModule(
        train=str(tmp_path / "text.txt"), tokenizer=llmkit_package.plugin("tokenizer", "char"), batch_size=2
    )
    model = llmkit_package.LanguageModel(dim=16, num_layers=1, context=16)
    saver = llmkit_package.Checkpoints(every_n_steps=2)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=3, accelerator="cpu", callbacks=[saver], enable_progress_bar=False
    )
    trainer.fit(model, data)
    assert isinstance(trainer.strategy.checkpoint_io, WholeFileIO)
    assert read(saver.folder / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("more", [(), ("--trainer.limit_val_batches", "0")], ids=["validated", "not validated"])
def test_a_finished_run_that_is_resumed_says_so(words: list[str], more: tuple[str, ...], tmp_path: Path) -> None:
    """It reports what it reported, and trains, measures and writes nothing; one that was not reported yet is."""
    command = (*words, "--trainer.max_steps", "8", *WORSE, *more)
    first = done(*command)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = done(*command, "--ckpt_path", "last")
    assert "finished: " in again.out
    assert "of step 8" in again.out
    assert again.out[again.out.index("\nRun folder") :] == first.out[first.out.index("\nRun folder") :]
    for line in first.out.partition("\nValidation:\n")[2].partition("\n\n")[0].splitlines():
        assert line in again.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    results = (first.folder / "results.json").read_text()
    (first.folder / "results.json").unlink()
    reported = done(*command, "--ckpt_path", "last")
    assert reported.folder != first.folder
    assert reported.checkpoint.name == first.checkpoint.name
    names = {"last.ckpt"} if more else {"last.ckpt", "best.ckpt"}
    for name in names:
        one, two = (read(run.folder / "checkpoints" / name) for run in (first, reported))
        assert one["global_step"] == two["global_step"]
    assert {path.name for path in (reported.folder / "checkpoints").iterdir()} == names
    assert (reported.folder / "results.json").read_text() == results
    if not more:
        assert scores(reported) == scores(first)

"""A run that dies at any moment and is resumed is the run that was left alone, for every head and kind of loader."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from command import done, llmkit
from faults import PowerCut

from llmkit.commands.verify import resume as command
from llmkit.errors import UserError
from llmkit.testing import resume
from llmkit.testing.resume import Verdict, differ, files_of, lines_differ

ROOT = Path(__file__).resolve().parent.parent


def campaign() -> Any:
    """Return the script of the long campaign: its configurations are those of this test."""
    spec = importlib.util.spec_from_file_location("kill", ROOT / "docs" / "reliability" / "kill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KILL = campaign()
LIKE_OTHERS = ("generation", "classification", "streaming, workers", "translation, workers")
"""Configurations of the campaign that without worker processes are like another one, or are in the tests below."""
NAMES = [name for name in KILL.configs(Path("data")) if name not in LIKE_OTHERS]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the campaign's data."""
    path = tmp_path_factory.mktemp("resume")
    KILL.write_data(path)
    return path


def fit_words(folder: Path, name: str, output: Path) -> list[str]:
    config = copy.deepcopy(KILL.configs(folder)[name])
    config["model"] |= {"dim": 16, "num_layers": 1}
    config["data"]["num_workers"] = 0  # processes of their own are in the tests below
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    accumulate = config["trainer"]["accumulate_grad_batches"]
    interval = 5 * accumulate - (accumulate > 1)  # in the middle of a step
    own = {"max_steps": STEPS, "val_check_interval": interval, "limit_val_batches": 2, "enable_progress_bar": "false"}
    options = [f"--trainer.{key}={value}" for key, value in own.items()]
    every = "--checkpoint.every_n_steps=3"
    return ["fit", "--config", str(output / "config.yaml"), *options, every, "--name=run"]


def traced(output: Path, dying: tuple[int, str] | None) -> list[str]:
    trace = {"class_path": resume.TRACE, "init_args": {"folder": str(output / "trace")}}
    callbacks: list[dict[str, Any]] = [trace]
    if dying is not None:
        callbacks.append({"class_path": "faults.Dying", "init_args": {"batch": dying[0], "moment": dying[1]}})
    words = [f"--output={output}", f"--trainer.callbacks={json.dumps(callbacks)}"]
    return [*words, "--imports=faults"]


def lines(output: Path) -> list[dict[str, Any]]:
    (path,) = (output / "trace").iterdir()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_dies_twice(name: str, folder: Path, tmp_path: Path) -> None:
    """Within a step, and within a validation or a checkpoint; nothing is tidied up, as with SIGKILL."""
    words = fit_words(folder, name, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done(*words, *traced(whole, None))
    expected = lines(whole)
    batches = sum(line["event"] == "batch" for line in expected)
    found = []
    later = ("validation", "writing")[NAMES.index(name) % 2]
    for number, dying in enumerate([(batches // 3, "backward"), (batches * 2 // 3, later), None]):
        again = ["--ckpt_path=last"] if number else []
        if dying is None:
            done(*words, *traced(parts, None), *again)
        else:
            with pytest.raises(PowerCut):
                llmkit(*words, *traced(parts, dying), *again)
        found += lines(parts)
    differences = list(lines_differ(expected, found))
    tensors = 0
    for (file, one), (_, two) in zip(files_of(whole), files_of(parts), strict=True):
        tensors += differ(one, two, file, differences)
    assert differences == []
    assert tensors > 20


@pytest.mark.parametrize(
    ("by", "accumulate", "interval"),
    [("steps", 1, 5), ("steps", 3, 1000), ("epochs", 1, 1000), ("epochs", 3, 5)],  # each pair of values occurs
)
def test_a_run_that_dies_after_each_epoch(
    by: str, accumulate: int, interval: int, folder: Path, tmp_path: Path
) -> None:
    """Epochs of 5 batches; a checkpoint after each step, and a validation after the last one, or none."""
    words = fit_words(folder, "classification", tmp_path)
    length = {"max_steps": {1: 12, 3: 5}[accumulate]} if by == "steps" else {"max_epochs": 3, "max_steps": -1}
    own = {**length, "accumulate_grad_batches": accumulate, "val_check_interval": interval}
    words += [f"--trainer.{key}={value}" for key, value in own.items()]
    words += ["--checkpoint.every_n_steps=1", "--data.batch_size=28"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done(*words, *traced(whole, None))
    expected, found = lines(whole), []
    batches = sum(line["event"] == "batch" for line in expected)
    assert batches == {("steps", 1): 12, ("steps", 3): 13}.get((by, accumulate), 15)
    for number, dying in enumerate([6, 11, None]):
        again = ["--ckpt_path=last"] if number else []
        if dying is None:
            done(*words, *traced(parts, None), *again)
        else:
            with pytest.raises(PowerCut):
                llmkit(*words, *traced(parts, (dying, "backward")), *again)
        found += lines(parts)
    differences = list(lines_differ(expected, found))
    for (file, one), (_, two) in zip(files_of(whole), files_of(parts), strict=True):
        differ(one, two, file, differences)
    assert differences == []


def test_killed_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``llmkit verify resume`` with real SIGKILLs: accumulation, worker processes, dropout."""
    config = copy.deepcopy(KILL.configs(folder)["classification"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(tmp_path / "config.yaml"), "--steps", "12", "--kills", "2"]
    words += ["--model.dim=16", "--model.num_layers=1"]
    words.append("--trainer.val_check_interval=12")  # each validation starts two processes
    monkeypatch.setattr(resume, "subprocess", forked)
    assert command.run("verify resume", words) == 0
    told = capsys.readouterr().out
    # The last of an epoch's 12 steps has one of its 34 batches, and is validated whatever the interval.
    assert "Identical after 2 kill(s): 34 losses, 3 validations" in told


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], None]:
    def use(verdict: Verdict) -> None:
        monkeypatch.setattr(resume, "check", lambda *words, **more: verdict)

    return use


def test_a_difference_is_told(verdicts: Callable[[Verdict], None], capsys: pytest.CaptureFixture[str]) -> None:
    verdicts(Verdict(differences=["batch 3: loss is 1.0, after resuming 2.0", "x"]))
    assert command.run("verify resume", ["--config", "x.yaml"]) == 1
    assert "NOT IDENTICAL: 2 difference(s), the first:\n  batch 3: loss" in capsys.readouterr().out


def test_a_run_that_fails_on_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is shown, and the check ends with a mistake of the user's."""
    quick = tmp_path / "python"  # without the seconds until torch and lightning are imported
    quick.write_text('#!/bin/sh\necho "error: $5 does not exist" >&2\nexit 2\n')
    quick.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(quick))
    with pytest.raises(UserError, match="verify resume: the run fails on its own, without a kill; see its output"):
        command.run("verify resume", ["--config", str(tmp_path / "nothing.yaml")])
    assert "nothing.yaml does not exist" in capsys.readouterr().err


def test_what_counts_as_a_difference() -> None:
    one: dict[str, Any] = {"a": torch.tensor([0.0, float("nan")]), "b": [1, {"c": torch.ones(2)}], "d": float("nan")}
    assert differences(one, copy.deepcopy(one)) == []
    assert differences(one, {**one, "a": torch.tensor([-0.0, float("nan")])}) == ["x: a differs"]
    assert differences(one, {**one, "a": one["a"].double()}) == ["x: a differs"]
    assert differences(one, {**one, "b": [2, one["b"][1]]}) == ["x: b[0]: 1, after resuming 2"]
    assert differences(one, {"a": one["a"], "b": one["b"]}) == ["x: only one run has d"]


def differences(one: Any, two: Any) -> list[str]:
    found: list[str] = []
    differ(one, two, "x", found)
    return found


def test_what_counts_as_another_trace() -> None:
    whole = [{"event": "batch", "at": n, "step": n, "loss": float(n).hex(), "time": 0.0} for n in (1, 2, 3)]
    killed = [{**line, "time": 1.0} for line in whole[:2]] + [whole[1], whole[2]]
    assert list(lines_differ(whole, killed)) == []
    assert list(lines_differ(whole, killed[:2])) == ["batch 3: missing in the resumed run"]
    other = {**whole[1], "loss": (2.5).hex()}
    assert list(lines_differ(whole, [*killed, other])) == ["batch 2: loss is 2.0, after resuming 2.5"]
    assert list(lines_differ(whole, [*killed, {**other, "at": 4}])) == ["batch 4: only in the resumed run"]

"""SIGTERM, Ctrl-C and SLURM's signal: the step ends, the run is saved and goes on exactly; a validation is not lost."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from command import TINY, Result, done, llmkit

from llmkit import main
from llmkit.run.throughput import LOGGED as SPEED
from llmkit.testing.resume import differ


def words_in(folder: Path) -> list[str]:
    """Return a fit of 8 steps with a validation of 3 batches after every fourth one."""
    (folder / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    own = ("--imports", "faults", "--model.dropout", "0.1", "--trainer.max_steps", "8")
    every = (
        "--trainer.val_check_interval",
        "4",
        "--trainer.limit_val_batches",
        "3",
        "--trainer.log_every_n_steps",
        "1",
    )
    data = ("--data.train", str(folder / "text.txt"))
    return ["fit", *data, *TINY, *own, *every, "--output", str(folder / "runs")]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A fit in a folder of this test."""
    return words_in(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same fit, left alone."""
    return done(*words_in(tmp_path_factory.mktemp("whole")), "--name", "whole")


def sender(number: int, step: int, validation_batch: int = -1) -> tuple[str, str]:
    arguments = {"number": number, "step": step, "validation_batch": validation_batch}
    return "--trainer.callbacks", json.dumps({"class_path": "faults.Sender", "init_args": arguments})


def last(result: Result) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def same(one: Result, two: Result, logged: bool = True) -> None:
    """Assert that two finished runs are equal in weights, optimizer, results and metrics."""
    first, second = last(one), last(two)
    for content in (first, second):
        # How many validation batches were begun: one more, where one was not ended.
        del content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    found: list[str] = []
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        differ(first[part], second[part], part, found)
    assert found == []
    results = [json.loads((run.folder / "results.json").read_text()) for run in (one, two)]
    assert results[0] == results[1]
    if not logged:
        return
    assert rows_of(one) == rows_of(two)


def rows_of(run: Result) -> list[dict[str, str]]:
    """Return the rows of a run's metrics, without how fast it was."""
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("where", ["in a step", "before a validation", "in a validation", "in the last validation"])
def test_the_run_goes_on_as_if_it_had_not_been_stopped(
    number: int, where: str, words: list[str], whole: Result
) -> None:
    places = {"in a step": (5, -1), "before a validation": (3, -1), "in a validation": (4, 1)}
    at = {**places, "in the last validation": (8, 1)}[where]
    before = signal.getsignal(signal.SIGINT)
    stopped = llmkit(*words, "--name", "parts", *sender(number, *at))
    assert stopped.code == 128 + number
    step = {"in a step": 6, "before a validation": 4, "in a validation": 4, "in the last validation": 8}[where]
    assert f"at step {step}; saved " in stopped.err
    assert "--ckpt_path last" in stopped.err
    assert signal.getsignal(signal.SIGINT) == before
    resumed = done(*words, "--name", "parts", "--ckpt_path", "last")
    assert resumed.folder.name == "version_1"
    same(whole, resumed)


def test_the_second_ctrl_c_stops_at_once(words: list[str], tmp_path: Path) -> None:
    """Two of them within a step: nobody waits for its end, and nothing is saved."""
    two = json.dumps([json.loads(sender(signal.SIGINT, 3)[1])] * 2)
    with pytest.raises(SystemExit):  # Lightning's way to leave on a KeyboardInterrupt
        llmkit(*words, "--trainer.callbacks", two)
    assert not list(tmp_path.rglob("last.ckpt"))


def test_the_second_sigterm_stops_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that asks twice is obeyed: the signal has its usual effect, here replaced by an exception.

    Unless both come at once: then they are one request, which reached the process on two ways.
    """
    two = json.dumps([json.loads(sender(signal.SIGTERM, 3)[1])] * 2)
    stopped = llmkit(*words, "--name", "copies", "--trainer.callbacks", two)
    assert stopped.code == 143 and "at step 4; saved " in stopped.err
    shutil.rmtree(Path(words[words.index("--output") + 1]))
    monkeypatch.setattr("llmkit.run.shutdown.COPY", 0.0)
    assert "by the second signal; nothing more is saved" in ended(words, monkeypatch, "--trainer.callbacks", two)


class Ended(BaseException):
    """The process has ended."""


def ended(words: list[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> str:
    """Run a fit that SIGTERM ends without saving; returns what it printed to stderr."""

    def end(number: int) -> None:
        assert number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL
        raise Ended

    monkeypatch.setattr(signal, "raise_signal", end)
    err = io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(err), pytest.raises(Ended):
        main.main([*words, *more])
    signal.signal(signal.SIGTERM, before)
    assert not list(Path(words[words.index("--output") + 1]).rglob("last.ckpt"))
    return err.getvalue()


def test_a_signal_during_compilation_stops_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler, replaced by one that gets the signal, may take minutes; before the first step nothing is lost."""

    def compile(*args: Any, **kwargs: Any) -> Any:
        def forward(*tensors: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # interrupted by the signal

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    err = ended(words, monkeypatch, "--model.compile", "true")
    assert "the first step compiles the network" in err
    assert "stopped by SIGTERM during the compilation, before the first step; nothing more is saved" in err


def test_signals_to_a_process_group_during_compilation(words: list[str], tmp_path: Path) -> None:
    """The real compiler, with processes of its own, of which none may be left; what Ctrl-C and ``timeout`` send."""
    plain = [word for word in words if word not in ("--imports", "faults")]
    plain += ["--model.attention", "standard", "--model.position", "none", "--model.feedforward", "relu"]  # few kernels
    command = [sys.executable, "-m", "llmkit", *plain, "--model.compile", "true"]
    runs: dict[signal.Signals, forked.Popen] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / number.name), "LLMKIT_TEST_RUN": str(tmp_path / number.name)}
        own["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # with processes that compile, as by default
        own |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # nothing is compiled twice
        runs[number] = forked.Popen(command, env={**os.environ, **own})
    try:
        for number, run in runs.items():
            mark = f"LLMKIT_TEST_RUN={tmp_path / number.name}\0".encode()
            until(functools.partial(has_started, run, mark))
            os.killpg(run.pid, number)
            _, printed = run.communicate()
            assert f"stopped by {number.name} during the compilation" in printed
            assert run.returncode in (-number, 128 + number)  # of a shell's view, 128 + number both
            until(functools.partial(has_ended, mark))
    finally:
        for run in runs.values():
            run.kill()


def has_started(run: forked.Popen, mark: bytes) -> bool:
    """Return whether a run has started a process of the compiler; one that has ended never will."""
    return bool(processes(mark)) or run.poll() is not None


def has_ended(mark: bytes) -> bool:
    """Return whether no process of a mark is left."""
    return not processes(mark)


def processes(mark: bytes) -> list[int]:
    """Return the processes that were started with a mark in their environment; a fork has that of its server."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds; fail if it does not within minutes."""
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_slurm_requeues_and_goes_on(
    words: list[str], whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of a step; the requeued job finds its own checkpoint, another job does not."""
    for key, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(key, value)
    commands: list[Any] = []

    def requeue(command: list[str], **options: Any) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", requeue)
    command = (*words, "--name", "job", *sender(signal.SIGUSR1, 5))
    first = done(*command)
    assert commands == [["scontrol", "requeue", "7"]]
    (saved,) = tmp_path.rglob("hpc_ckpt_1.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 6
    second = done(*words, "--name", "second", "--ckpt_path", "last")  # of the same job
    assert "no run below" in second.err
    same(whole, second)
    requeued = done(*command)
    assert str(saved) in requeued.err
    same(whole, requeued)
    assert [a == b for a, b in zip(speeds(first), speeds(requeued), strict=True)] == [True] * 6 + [False] * 2
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    other = done(*words, "--name", "job")
    assert "requeued" not in other.err
    assert not set(speeds(first)) & set(speeds(other))


def speeds(run: Result) -> list[str]:
    """Return how fast each step was, which no two steps are: rows that are equal were copied, not computed again."""
    with (run.folder / "metrics.csv").open(newline="") as handle:
        return [row["tokens_per_second"] for row in csv.DictReader(handle) if row["tokens_per_second"]]


def test_runs_of_epochs_stopped_at_their_ends(tmp_path: Path) -> None:
    """Twice, in the last step of an epoch: neither an epoch nor the count of them is lost or done again."""
    rows = "".join(f"word {i} of {i * 7 % 13},{'yes' if i % 2 else 'no'}\n" for i in range(20))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    data = ("--data.train", tmp_path / "rows.csv", "--data.validation", tmp_path / "rows.csv")
    own = ("--imports", "faults", "--trainer.max_steps", "-1", "--trainer.max_epochs", "4")
    every = (
        "--output",
        tmp_path / "runs",
        "--trainer.val_check_interval",
        "1000",
        "--trainer.accumulate_grad_batches",
        "2",
        "--data.batch_size",
        "4",
    )
    words = ("fit", *data, *TINY, "--model.head", "classification", *own, *every)  # 5 batches, 3 steps an epoch
    whole = done(*words, "--name", "whole")
    for step in (2, 5):
        resume = ("--ckpt_path", "last") if step > 2 else ()
        stopped = llmkit(*words, "--name", "parts", *sender(signal.SIGTERM, step), *resume)
        assert f"at step {step + 1}; saved " in stopped.err  # with one batch of the next step
    resumed = done(*words, "--name", "parts", "--ckpt_path", "last")
    assert last(whole)["global_step"] == last(resumed)["global_step"] == 12
    assert last(whole)["epoch"] == last(resumed)["epoch"]
    same(whole, resumed, logged=False)

"""Two processes: the same model and the same numbers as one process, and one run folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from command import TINY, done
from ddp_worker import epoch_sums
from small_networks import decided

from llmkit import UserError, load, plugin
from llmkit.model.sharding import shard

SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
FSDP2 = json.dumps({"class_path": SHARDED, "init_args": SIZES})
CPU = ("--trainer.accelerator", "cpu")
TWO = (*CPU, "--trainer.devices", "2", "--trainer.strategy")


def without(options: Sequence[str], *keys: str) -> list[str]:
    """Return options without some keys and their values."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for key, value in pairs if key not in keys for word in (key, value)]


EXACT = (
    *without(TINY, "--data.batch_size", "--trainer.max_steps"),
    *("--trainer.precision", "32-true", "--model.dropout", "0", "--trainer.limit_val_batches", "1.0"),
    *(
        "--model.optimizer",
        "{name: SGD, lr: 0.2, momentum: 0.9}",
        "--model.scheduler",
        "{name: ConstantLR, factor: 1.0}",
    ),
    *("--trainer.max_steps", "4"),
)


class Run:
    """A fit that is done by one process with large batches and by two with smaller ones.

    Args:
        words: its options.
        one: rows of a batch and batches of a step, where one process trains.
        two: the same where two do, for each of them.
        strategy: how the two share the work.
        only_two: options of the two besides.
    """

    def __init__(
        self,
        words: Sequence[object],
        one: tuple[int, int],
        two: tuple[int, int],
        strategy: str = "ddp",
        only_two: Sequence[str] = (),
    ) -> None:
        self.words, self.one, self.two, self.strategy, self.only_two = words, one, two, strategy, only_two

    def command(self, output: Path, processes: int) -> list[str]:
        """Return the words behind ``llmkit fit``."""
        rows, batches = self.one if processes == 1 else self.two
        where = CPU if processes == 1 else (*TWO, self.strategy, *self.only_two)
        sizes = ("--data.batch_size", rows, "--trainer.accumulate_grad_batches", batches)
        words = (*self.words, *EXACT, *sizes, *where, "--trainer.val_check_interval", 2 * batches, "--output", output)
        return [str(word) for word in words]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of unequal lengths."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    rows = "".join(f"{'word ' * (i % 5)}{i},{'abc'[i % 3]}\n" for i in range(23))
    (folder / "labels.csv").write_text(f"text,label\n{rows}")
    pairs = "".join(f"{'word ' * (i % 3)}{i}\t{'Wort ' * (3 * (i % 2))}{i}\n" for i in range(7))
    (folder / "pairs.tsv").write_text(f"source\ttarget\n{pairs}")
    return folder


def copy_below(data: Path) -> str:
    """The logger that writes a second ``metrics.csv``."""
    return json.dumps({"name": "csv", "save_dir": str(data / "logs")})


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Run]:
    """The fits by name. An epoch of rows of unequal lengths is a step, so that each step sees the same rows."""
    text = ("--data.train", data / "text.txt")
    labels = [f"--data.{part}={data / 'labels.csv'}" for part in ("train", "validation")]
    pairs = [f"--data.{part}={data / 'pairs.tsv'}" for part in ("train", "validation")]
    labels += ["--model.head=classification", "--model.head.dropout=0"]
    return {
        "blocks sharded, compiled": Run(text, (4, 1), (2, 1), FSDP2, ("--model.compile", "true")),
        "classification accumulated": Run(
            [*labels, "--model.ema=0.5"], (23, 1), (5, 3), only_two=("--trainer.logger", copy_below(data))
        ),
        "classification sharded": Run(labels, (23, 1), (5, 3), FSDP2),
        "translation sharded": Run([*pairs, "--model.head=translation"], (7, 1), (2, 2), FSDP2),
    }


@pytest.fixture(scope="module")
def alone(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folders of one process."""
    folders: dict[str, Path] = {}
    for name, run in runs.items():
        same = next((other for other in folders if runs[other].words == run.words), None)
        output = tmp_path_factory.mktemp("one")
        folders[name] = folders[same] if same else done("fit", *run.command(output, 1)).folder
    return folders


@pytest.fixture(scope="module")
def together(
    runs: dict[str, Run], alone: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder below which two processes put their runs, and what they printed. All is asked in one start."""
    folder = tmp_path_factory.mktemp("two")
    commands = [["fit", *run.command(folder / name, 2)] for name, run in runs.items()]
    commands += [[*words, *TWO, "ddp", "--output", str(folder / name)] for name, words in measurements(alone, data)]
    tasks = {"commands": commands, "sums": sums(data), "answer": str(folder / "sums.json"), "cache": str(folder / "c")}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        given = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(Path(__file__).with_name("ddp_worker.py")), str(folder / "tasks.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **given}
        started.append(forked.Popen(command, stdout=forked.PIPE, stderr=forked.STDOUT, env=environment))
    try:
        printed = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    return folder, "".join(printed)


def measurements(alone: dict[str, Path], data: Path) -> list[tuple[str, list[str]]]:
    """Return commands that use what one process trained: accuracy, BLEU of beam search, and predictions."""
    found = []
    for command, name, file in (
        ("test", "classification accumulated", "labels.csv"),
        ("test", "translation sharded", "pairs.tsv"),
        ("predict", "classification accumulated", "labels.csv"),
    ):
        options = ("--ckpt_path", alone[name] / "checkpoints" / "last.ckpt", f"--data.{command}", data / file)
        words = (command, *options, "--trainer.precision", "32-true", "--data.batch_size", 4)
        found.append((f"{name} {command}", [str(word) for word in words]))
    return found


def sums(data: Path) -> list[tuple[str, str]]:
    """Return the heads and files whose losses are added up over epochs."""
    files = {"classification": "labels.csv", "translation": "pairs.tsv", "generation": "text.txt"}
    return [(head, str(data / file)) for head, file in files.items()]


def results(output: Path) -> dict[str, Any]:
    """Return the results of the only run below a folder."""
    (path,) = output.rglob("results.json")
    assert [folder.name for folder in path.parent.parent.iterdir()] == ["version_0"]
    found: dict[str, Any] = json.loads(path.read_text())
    found.pop("provenance")  # which has the number of processes, and tokens with their padding
    return found


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Assert that results of one process and of two are equal but for rounding."""
    assert [found.pop("provenance")["processes"] for found in (one, two)] == [1, 2]
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, abs=1e-6, rel=1e-6) if isinstance(value, float) else value), key


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, and those that were trained where they are an average."""
    content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    trained = {f"trained {key}": value for key, value in content.get("ema", {}).get("trained", {}).items()}
    return {key: value.double() for key, value in {**content["state_dict"], **trained}.items()}


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of all weights over their norm."""
    assert found.keys() == wanted.keys()
    off = torch.stack([(found[key] - value).norm() for key, value in wanted.items()]).norm()
    return float(off / torch.stack([value.norm() for value in wanted.values()]).norm())


NAMES = ["blocks sharded, compiled", "classification accumulated", "classification sharded", "translation sharded"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name: str, alone: dict[str, Path], together: tuple[Path, str]) -> None:
    """The rows are odd in number and of unequal lengths: what the processes count in a step differs."""
    run = together[0] / name / "run" / "version_0"
    same(results(alone[name].parent.parent), results(together[0] / name))
    for kind in ("best", "last"):
        assert difference(weights(run, kind), weights(alone[name], kind)) < 2e-6


def test_the_steps_change_the_weights(runs: dict[str, Run], alone: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise equal ones would say nothing."""
    name = "translation sharded"
    one_step = done("fit", *runs[name].command(tmp_path, 1), "--trainer.max_steps", 1).folder
    assert difference(weights(one_step), weights(alone[name])) > 1e-2


def test_one_process_reports(runs: dict[str, Run], together: tuple[Path, str], data: Path) -> None:
    """And logs."""
    assert together[1].count("Run folder:") == len(runs)
    (copy,) = (data / "logs").rglob("metrics.csv")
    (run,) = (together[0] / "classification accumulated").rglob("metrics.csv")
    assert copy.read_text() == run.read_text() and copy.parent.name == run.parent.name == "version_0"


@pytest.mark.parametrize("name", ["classification accumulated test", "translation sharded test"])
def test_two_processes_measure_as_one(
    name: str, alone: dict[str, Path], data: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    """Accuracy, F1, the confusion matrix, BLEU and chrF."""
    done(*dict(measurements(alone, data))[name], *CPU, "--output", tmp_path)
    same(results(tmp_path), results(together[0] / name))


def test_two_processes_predict_as_one(
    alone: dict[str, Path], data: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    """One file, with an answer to each of the 23 rows, in the order of the rows."""
    name = "classification accumulated predict"
    done(*dict(measurements(alone, data))[name], *CPU, "--output", tmp_path)
    files = [next(folder.rglob("predictions.jsonl")) for folder in (tmp_path, together[0] / name)]
    one, two = ([json.loads(line)["probability"] for line in file.read_text().splitlines()] for file in files)
    assert len(set(one)) > 15
    assert two == pytest.approx(one, rel=1e-5)
    assert len(list((together[0] / name).rglob("predictions.jsonl"))) == together[1].count("predictions:") == 1


def test_an_epoch_of_two_processes_holds_every_row_once(data: Path, together: tuple[Path, str], tmp_path: Path) -> None:
    """Sums of losses, counts and rows over an epoch of 23 rows, of 7, and of blocks, in batches of 4."""
    found = json.loads((together[0] / "sums.json").read_text())
    wanted = [epoch_sums(head, file, tmp_path) for head, file in sums(data)]
    assert [epoch[2] for epoch in wanted[0]] == [23, 23]
    for two, one in zip(found, wanted, strict=True):
        for a, b in zip(two, one, strict=True):
            assert a == pytest.approx(b, rel=1e-6)


def test_a_sharded_checkpoint_loads_on_one_process(
    alone: dict[str, Path], data: Path, together: tuple[Path, str]
) -> None:
    folder = together[0] / "classification sharded" / "run" / "version_0"
    models = [load(path / "checkpoints" / "last.ckpt") for path in (folder, alone["classification sharded"])]
    texts = [line.rpartition(",")[0] for line in (data / "labels.csv").read_text().splitlines()[1:]]
    for answer, wanted in zip(*(model.predict(texts) for model in models), strict=True):
        assert answer["label"] == wanted["label"]
        assert answer["probability"] == pytest.approx(wanted["probability"], rel=1e-5)


# Started as a user does


def start(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which starts the second one."""
    command = [sys.executable, "-m", "llmkit", *map(str, words)]
    return forked.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_one_command_starts_two_processes(data: Path, tmp_path: Path) -> None:
    run = Run(("--data.train", data / "text.txt"), (4, 1), (2, 1))
    one = done("fit", *run.command(tmp_path / "one", 1))
    two = start("fit", *run.command(tmp_path / "two", 2))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Run folder:") == 1
    same(results(tmp_path / "one"), results(tmp_path / "two"))
    for kind in ("best", "last"):
        found = weights(tmp_path / "two" / "run" / "version_0", kind)
        assert difference(found, weights(one.folder, kind)) < 2e-6


def test_tensor_parallel_is_refused() -> None:
    """Lightning's default splits layers, which no layer here supports: the processes would train apart, unnoticed."""
    mesh = {"tensor_parallel": types.SimpleNamespace(size=lambda: 2), "data_parallel": None}
    with pytest.raises(UserError, match="trainer.strategy: .*data_parallel_size"):
        shard(decided(), plugin("head", "generation")(), mesh)

"""Loggers by name, with the real packages and without a network: what a run and its resumption leave in each."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import TINY, Result, done, llmkit

from llmkit.errors import UserError
from llmkit.run import trackers
from llmkit.run.class_names import spelled_out
from llmkit.run.cli import CLI

LAST = ("--ckpt_path", "last", "--trainer.max_steps", "4")
TAGS = {"head": "Generation", "attention": "MultiHead"}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, from which no connection can be made to another machine."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}.items():
        monkeypatch.setenv(name, value)
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "localhost", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture
def fit(offline: None) -> Callable[..., Result]:
    Path("text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    words = ("fit", "--data.train", "text.txt", *TINY, "--name", "exp", "--trainer.log_every_n_steps", "1")
    return lambda *more: done(*words, *more)


def logged(folder: Path) -> dict[int, float]:
    """The training loss of each step in ``metrics.csv``."""
    from llmkit.run.figures import read_metrics

    return dict(read_metrics(folder / "metrics.csv")["train_loss"])


def known_as(folder: Path) -> Any:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["RunFolder"].get("trackers")


def test_tensorboard(fit: Callable[..., Result]) -> None:
    """Events lie in the run folder; a resumed run shows the whole curve, as its ``metrics.csv`` does."""
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    words = ("--trainer.logger", "[csv, tensorboard]", "--trainer.logger+={name: csv, save_dir: more}")
    first = fit(*words).folder
    assert list(Path("more").rglob("metrics.csv")) and not (first / "lightning_logs").exists()
    second = fit(*words, *LAST).folder
    for folder in (first, second):
        events = reader.EventAccumulator(str(folder)).Reload()
        curve = {event.step: event.value for event in events.Scalars("train_loss")}
        assert curve == pytest.approx(logged(folder)) and len(curve) == (2 if folder == first else 4)
        assert "loss_curve" in events.Tags()["images"] and "sample/text_summary" in events.Tags()["tensors"]
        assert "dim: 16" in (folder / "hparams.yaml").read_text()
        assert "TensorBoardLogger" in (folder / "config.yaml").read_text()
    assert "version_" not in (first / "config.yaml").read_text()  # so that the file can be used again


def test_wandb(fit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    ends, ended = trackers.end, []
    monkeypatch.setattr(trackers, "end", lambda loggers, failed: ended.append(failed))
    words = ("--trainer.logger", "wandb", "--trainer.logger.project", "p", "--trainer.logger.log_model", "false")
    first = fit(*words).folder
    run = wandb.run
    assert (run.project, run.group, run.name) == ("p", "exp", "exp/version_0")
    assert list(run.tags) == list(TAGS.values()) and run.config["model.dim"] == 16
    assert run.summary["train_loss"] == pytest.approx(logged(first)[1])
    assert known_as(first) == {"WandbLogger": run.id}
    wandb.finish()
    media = {path.parent.name for path in first.glob("wandb/*/files/media/*/*")}
    assert media == {"images", "table"}
    fit(*words, *LAST)
    assert wandb.run.id == run.id and ended == [False, False]
    wandb.finish()
    monkeypatch.setattr(trackers, "end", ends)

    def fails(*given: Any, **more: Any) -> None:
        raise UserError("broken")

    monkeypatch.setattr(CLI, "fit", fails)
    result = llmkit("fit", "--data.train", "text.txt", *TINY, *words)
    assert "error: broken" in result.err and wandb.run is None  # so that the next run of the process has one of its own


def test_mlflow(fit: Callable[..., Result]) -> None:
    mlflow = pytest.importorskip("mlflow")
    first = fit("--trainer.logger", "mlflow").folder
    second = fit("--trainer.logger", "mlflow", *LAST).folder
    client = mlflow.tracking.MlflowClient(f"sqlite:///{Path('runs').absolute()}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert known_as(first) == known_as(second) == {"MLFlowLogger": run.info.run_id}
    assert run.info.run_name == "exp/version_0" and run.data.params["model.dim"] == "16"
    assert {**run.data.tags, **TAGS} == run.data.tags
    curve = {item.step: item.value for item in client.get_metric_history(run.info.run_id, "train_loss")}
    assert curve == pytest.approx(logged(second)) and len(curve) == 4
    assert {"loss.png", "sample.txt"} <= {item.path for item in client.list_artifacts(run.info.run_id)}


def test_aim(fit: Callable[..., Result]) -> None:
    aim = pytest.importorskip("aim")
    first = fit("--trainer.logger", "aim").folder
    second = fit("--trainer.logger", "aim", *LAST).folder
    (known,) = aim.Repo("runs").list_all_runs()
    assert known_as(first) == known_as(second) == {"AimLogger": known}
    run = aim.Run(known, repo="runs", force_resume=True)  # read only, it shows nothing until aim has an index
    assert (run.experiment, run.name, run["hparams"]["model.dim"]) == ("exp", "exp/version_0", 16)
    context = importlib.import_module("aim.storage.context").Context
    curve = run.get_metric("loss", context({"subset": "train"})).dataframe()
    assert dict(zip(curve["step"], curve["value"], strict=True)) == pytest.approx(logged(second)) and len(curve) == 4
    nothing = context({})
    assert run.get_image_sequence("loss_curve", nothing) and run.get_text_sequence("sample", nothing)
    run.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tensorbord", "unknown logger 'tensorbord'. Did you mean 'tensorboard'?"),
        ("{name: csv, save_dir: x, prefix: [x]}", "expected text, got '[\"x\"]'"),
        ("[csv, {class_path: wandbb}]", "unknown logger 'wandbb'. Did you mean 'wandb'?"),
        ("comet", "CometLogger needs a package that is not installed: pip install comet_ml"),
    ],
)
def test_a_wrong_logger_is_one_line(fit: Callable[..., Result], value: str, message: str) -> None:
    if value == "comet" and importlib.util.find_spec("comet_ml"):
        pytest.skip("it is installed")
    failed = llmkit("fit", "--data.train", "text.txt", "--trainer.logger", value)
    assert failed.err.count("llmkit: error") == 1, failed.err
    line = failed.err
    assert failed.code == 2 and "command line: trainer.logger" in line and message in line


class Offline(pl.loggers.MLFlowLogger):
    """A tracker that cannot be reached."""

    def __init__(self) -> None:
        pl.loggers.Logger.__init__(self)

    @property
    def experiment(self) -> Any:
        raise RuntimeError("api_key not configured\n  (no-tty)")


def test_a_tracker_that_fails_is_one_line(
    fit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error before training, a note at its end."""
    monkeypatch.setattr(trackers, "build", lambda *given: [Offline()])
    spec = json.dumps({"name": "csv", "save_dir": "more"})
    failed = llmkit("fit", "--data.train", "text.txt", *TINY, "--trainer.logger", spec)
    text = "trainer.logger: Offline cannot begin: RuntimeError: api_key not configured (no-tty)"
    assert failed.code == 2 and text in failed.err and not Path("runs").exists()
    trackers.send([Offline()], 1, {}, {"sample": "text"})
    text = "Offline did not take sample: RuntimeError: api_key not configured (no-tty)"
    assert capsys.readouterr().err == f"llmkit: note: {text}\n"


def test_names() -> None:
    home = "lightning.pytorch.loggers"
    board = {"class_path": f"{home}.CSVLogger", "init_args": {"save_dir": "x"}}
    for name in ("csv", "CSV", "csv_logger", "CSVLogger", f"{home}.CSVLogger"):
        for key in ("name", "class_path"):
            assert spelled_out({"logger": {key: name, "save_dir": "x"}}) == ({"logger": board}, [])
    assert spelled_out({"logger": ["csv", {"name": "csv", "save_dir": "x"}]}) == ({"logger": [board]}, [])
    for plain in (None, True, False):
        assert spelled_out({"logger": plain}) == ({"logger": plain}, [])
    assert spelled_out({"logger": "csv"}) == ({"logger": None}, [])
    given = {"strategy": "ddp", "accelerator": "cpu", "max_steps": 1}
    assert spelled_out(given) == (given, [])
    ddp = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"static_graph": True}}
    assert spelled_out({"strategy": {"name": "ddp", "static_graph": True}}) == ({"strategy": ddp}, [])


ROWS = {
    "generation": "word a b\n" * 60,
    "classification": "text,label\n" + "a b,x\nb c,y\n" * 12,
    "translation": "source,target\n" + "a b,b a\n" * 24,
}
COPY = "{name: csv, save_dir: more}"
LOGGERS = (COPY, "tensorboard", "wandb", "mlflow", f"[tensorboard, {COPY}]")
MODES = (
    *(("--trainer.profiler", name) for name in ("simple", "advanced", "{name: pytorch, record_module_names: false}")),
    ("--trainer.overfit_batches", "1"),
    ("--trainer.accumulate_grad_batches", "2"),
)
CALLBACKS = (
    (
        *("device_stats_monitor", "{name: early_stopping, monitor: val_loss}", "RichProgressBar", "spike_detection"),
        *("{name: timer, duration: '00:00:10:00'}", "model_summary"),
    ),
    (
        *("{name: stochastic_weight_averaging, swa_lrs: 0.1, swa_epoch_start: 1}", "LearningRateMonitor"),
        *("{name: model_checkpoint, monitor: val_loss, save_last: true}", "tqdm_progress_bar"),
    ),
    (
        "{name: ema_weight_averaging, decay: 0.5}" if hasattr(pl.callbacks, "EMAWeightAveraging") else "model_summary",
        *("{name: model_pruning, pruning_fn: l1_unstructured, amount: 0.1}", "rich_model_summary"),
        "{name: on_exception_checkpoint, dirpath: x}",
    ),
)


@pytest.mark.parametrize("number", range(len(LOGGERS)), ids=("csv", "tensorboard", "wandb", "mlflow", "list"))
@pytest.mark.parametrize("head", ROWS)
def test_loggers_callbacks_and_heads(offline: None, head: str, number: int) -> None:
    """Each logger, each callback and each mode with each head, and each callback with each logger."""
    turn, logger = list(ROWS).index(head), LOGGERS[number]
    group, mode = (turn + number) % 3, MODES[(2 * turn + number) % 5]
    if logger in ("wandb", "mlflow"):
        pytest.importorskip(logger)
    if "tensorboard" in logger and not importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is not installed")
    data = Path("rows.txt" if head == "generation" else "rows.csv")
    data.write_text(ROWS[head])
    words = ["fit", "--data.train", data, "--model.head", head, *TINY, "--trainer.limit_train_batches", "2"]
    words += ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "true"]
    words += ["--trainer.log_every_n_steps", "1", "--trainer.logger", logger, *mode]
    words += [] if group else ["--model.ema", "0.5"]
    schedules = () if "accumulate" in mode[0] else ("{name: gradient_accumulation_scheduler, scheduling: {1: 2}}",)
    ran = done(*words, "--trainer.callbacks", f"[{', '.join((*CALLBACKS[group], *schedules))}]")
    (folder,) = (path.parent for path in Path("runs").rglob("config.yaml"))
    saved = {path.stem for path in folder.rglob("*.ckpt")}
    assert saved == {"best", "last"} if group != 1 else "last" in saved and len(saved) == 2
    assert "Use it:" in ran.out
    if "profiler" in mode[0]:
        assert (folder / "fit-profile.txt").exists() or list(folder.glob("fit-profile*")), list(folder.iterdir())
    if group != 2:
        assert ("lr-AdamW" if group else "on_train_batch_start") in (folder / "metrics.csv").read_text()
    sent = ["loss_curve"]
    if head == "classification":
        done("test", "--ckpt_path", next(folder.rglob("last.ckpt")), "--data.test", data, "--trainer.logger", logger)
        sent.append("confusion_matrix")
    assert pictures(logger) >= set(sent)
    if COPY in logger:
        copied = Path("more", *folder.parts[1:], "metrics.csv").read_text()
        assert copied.splitlines() == (folder / "metrics.csv").read_text().splitlines()


def pictures(logger: str) -> set[str]:
    """The pictures that a tracker has got."""
    if logger == "wandb":
        assert importlib.import_module("wandb").run is None
        return {path.name.rpartition("_")[0].rpartition("_")[0] for path in Path("runs").rglob("media/images/*.png")}
    if logger == "mlflow":
        names = {"loss.png": "loss_curve", "confusion_matrix.png": "confusion_matrix"}
        return {names[path.name] for path in Path("runs/mlflow").rglob("*.png")}
    if "tensorboard" not in logger:
        return {"loss_curve", "confusion_matrix"}  # which lie in the run folder
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    return {
        tag
        for path in Path("runs").rglob("events.*")
        for tag in reader.EventAccumulator(str(path)).Reload().Tags()["images"]
    }


@pytest.mark.parametrize("heading", ["Loggers", "Callbacks and profilers", "The average of the weights"])
def test_the_recipes_of_the_page_run(offline: None, heading: str) -> None:
    """Or say which package to install."""
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text("utf-8")
    recipe = text.partition(f"\n### {heading}\n")[2].partition("```yaml\n")[2].partition("```")[0]
    Path("recipe.yaml").write_text(recipe)
    Path("rows.txt").write_text(ROWS["generation"])
    words = ("fit", "--config", "recipe.yaml", "--data.train", "rows.txt", *TINY)
    result = llmkit(*words, "--trainer.enable_progress_bar", "true")
    absent = [name for name in ("tensorboard", "wandb") if name in recipe and not importlib.util.find_spec(name)]
    assert result.code == (2 if absent else 0), result
    assert absent == re.findall(r"needs a package that is not installed: pip install (\w+)\n", result.err)


@pytest.mark.parametrize("head", ROWS)
def test_a_debug_run_leaves_nothing(offline: None, head: str) -> None:
    data = Path("rows.txt" if head == "generation" else "rows.csv")
    data.write_text(ROWS[head])
    words = [
        "fit",
        "--data.train",
        data,
        "--model.head",
        head,
        *TINY,
        "--trainer.fast_dev_run",
        "2",
        "--model.ema",
        "0.5",
    ]
    done(*words, "--trainer.logger", COPY, "--trainer.callbacks", "LearningRateMonitor", "--trainer.profiler", "simple")
    assert not Path("more").exists() and not list(Path("runs").rglob("*")), list(Path("runs").rglob("*"))

"""Lightning's callbacks and Python methods: averages of weights are averages, and looking on changes nothing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import TINY, done
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn

import llmkit
from llmkit.config.plan import plan
from llmkit.errors import UserError
from llmkit.model.average import MovingAverage
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import evaluating
from llmkit.run.figures import read_metrics

EPOCHS = 3


class Look(pl.Callback):
    """Keeps the weights at the start of each epoch and after each step, and what a batch's loss is given as."""

    def __init__(self, ask: bool = False) -> None:
        self.ask = ask
        self.epochs: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.losses: list[tuple[float, float]] = []
        self.rows: list[int] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epochs.append(pl_module.net.embedding.weight.detach().clone())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(pl_module.net.embedding.weight.detach().clone())
        self.losses.append((float(outputs["loss"]), float(pl_module.last_loss)))
        self.rows.append(len(next(iter(batch.values()))))
        if self.ask:
            pl_module.net.position.eval()  # a part that its user froze
            assert len(pl_module.predict(["a b", "b"])) == 2
            assert pl_module.training and pl_module.net.dropout.training and not pl_module.net.position.training


def fit(folder: Path, look: Look, *more: pl.Callback, **options: Any) -> LanguageModel:
    """Train a tiny classifier on four batches an epoch."""
    data = folder / "rows.csv"
    data.write_text("text,label\n" + "".join(f"{'ab'[i % 2]} {i % 5} b,{'xy'[i % 3 % 2]}\n" for i in range(16)))
    pl.seed_everything(0, verbose=False)
    model = LanguageModel(head=llmkit.plugin("head", "classification"), dim=8, num_layers=1, context=16, dropout=0.1)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }  # fmt: skip
    tokenizer = llmkit.plugin("tokenizer", "char")
    module = llmkit.DataModule(train=str(data), tokenizer=tokenizer, batch_size=4, validation_share=0)
    pl.Trainer(**{**settings, **options}, callbacks=[*more, look]).fit(model, module)
    return model


def test_stochastic_weight_averaging_averages_the_weights(tmp_path: Path) -> None:
    """Against the mean of the weights at the start of each epoch, which is when Lightning takes them up."""
    look = Look()
    model = fit(tmp_path, look, callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1))
    torch.testing.assert_close(model.network.embedding.weight.detach(), torch.stack(look.epochs).mean(0))


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has none before 2.6")
def test_a_moving_average_averages_the_weights(tmp_path: Path) -> None:
    look = Look()
    model = fit(tmp_path, look, callbacks.EMAWeightAveraging(decay=0.9), max_epochs=1)
    average = look.steps[0]
    for weights in look.steps[1:]:
        average = 0.9 * average + 0.1 * weights
    torch.testing.assert_close(model.network.embedding.weight.detach(), average)


def test_ema_is_the_average_that_is_validated_saved_and_resumed(tmp_path: Path) -> None:
    """Against the average computed step by step from the weights of a run without it, which trains the same."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    words = ["fit", "--data.train", text, *TINY, "--trainer.max_steps", "4", "--model.scheduler.warmup_steps", "1"]
    words += ["--trainer.val_check_interval", "2", "--checkpoint.keep", "9", "--checkpoint.every_n_steps", "1"]
    words += ["--output", tmp_path / "runs"]
    plain = done(*words, "--name", "plain").folder / "checkpoints"
    ema = [*words, "--name", "ema", "--model.ema", "0.3"]
    whole = done(*ema).folder / "checkpoints"

    def read(folder: Path, step: int) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(folder / f"step_{step}.ckpt", weights_only=True)
        return content

    expected: dict[str, Tensor] = {}
    for step in range(1, 5):
        trained, saved = read(plain, step)["state_dict"], read(whole, step)
        assert all(torch.equal(trained[name], value) for name, value in saved["ema"]["trained"].items())
        if step == 1:  # after one step the average is 2/11 of the start, which no checkpoint holds
            expected = saved["state_dict"]
        else:
            decay = min(0.3, (1 + step) / (10 + step))
            expected = {name: decay * expected[name] + (1 - decay) * trained[name] for name in trained}
        for name, value in expected.items():
            torch.testing.assert_close(saved["state_dict"][name], value)
    assert not torch.equal(trained["net.embedding.weight"], expected["net.embedding.weight"])
    again = [*words, "--name", "again", "--ckpt_path"]
    resumed = done(*again, whole / "step_2.ckpt").folder / "checkpoints"  # the checkpoint brings model.ema
    for step in (3, 4):
        one, other = read(whole, step), read(resumed, step)
        pairs = [(one["state_dict"], other["state_dict"]), (one["ema"]["trained"], other["ema"]["trained"])]
        assert all(torch.equal(value, b[name]) for a, b in pairs for name, value in a.items())
    without = done(*again, whole / "step_2.ckpt", "--model.ema", "null").folder / "checkpoints"
    ends = [read(folder, 4)["state_dict"] for folder in (plain, without)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    curves = [read_metrics(folder.parent / "metrics.csv")["val_loss"] for folder in (plain, whole, resumed)]
    assert curves[1] == curves[2] and curves[0] != curves[1]
    results = [json.loads((folder.parent / "results.json").read_text())["val_loss"] for folder in (whole, resumed)]
    assert results[0] == results[1] == pytest.approx(min(value for _, value in curves[1]))


def test_ema_costs_one_operation_a_step_and_refuses_what_it_cannot_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    average = MovingAverage(0.999, model, {})
    with torch.profiler.profile() as profile:
        average.update()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.pop("aten::_foreach_lerp_") == 1
    assert counts.keys() <= {"aten::lerp_", "aten::detach", "detach", "aten::to"}  # views of the weights, no copies
    for value in (0.0, 1.0):
        with pytest.raises(UserError, match="model.ema: must be above 0 and below 1"):
            LanguageModel(ema=value)


@pytest.mark.parametrize(
    ("strategy", "callback", "message"),
    [
        (FSDPStrategy, None, "model.ema: averages whole weights: use DDP instead of a strategy that shards"),
        (DDPStrategy, callbacks.StochasticWeightAveraging(0.1), "StochasticWeightAveraging averages the weights too"),
    ],
)
def test_ema_refuses_what_it_does_not_work_with(strategy: type, callback: pl.Callback | None, message: str) -> None:
    model = LanguageModel(ema=0.5)
    model.trainer = SimpleNamespace(strategy=strategy(), callbacks=[callback])  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        model.on_fit_start()


def test_ema_of_half_precision_moves() -> None:
    """In bf16 a step of a thousandth would be lost: 1 + 0.001 is 1."""
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    average = MovingAverage(0.999, model, {"steps": 10**6})
    nn.init.constant_(model.weight, 2.0)
    for _ in range(700):
        average.update()
    expected = 2 - 0.999**700
    torch.testing.assert_close(average.average[0], torch.full((2, 2), expected))
    saved = model.state_dict()
    state = copy.deepcopy(average.state(model, saved))
    assert saved["weight"].dtype == torch.bfloat16 and saved["weight"][0, 0] == torch.tensor(expected).bfloat16()
    model.load_state_dict(saved)
    resumed = MovingAverage(0.999, model, state)
    assert torch.equal(resumed.average[0], average.average[0]) and resumed.steps == average.steps
    assert torch.equal(model.weight, torch.full((2, 2), 2.0, dtype=torch.bfloat16))


def test_a_run_keeps_the_average(tmp_path: Path) -> None:
    """The average comes after the last validation, and ``last.ckpt`` must hold it all the same."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    words = ["fit", "--data.train", text, *TINY, "--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]
    words += ["--trainer.limit_train_batches", "3", "--output", tmp_path / "runs"]
    average = '{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1, "swa_epoch_start": 1}}'
    folder = done(*words, "--trainer.callbacks", average).folder / "checkpoints"
    files = [torch.load(folder / name, weights_only=True) for name in ("best.ckpt", "last.ckpt")]
    assert files[0]["global_step"] == files[1]["global_step"] == 6
    assert not torch.equal(*(file["state_dict"]["net.embedding.weight"] for file in files))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("callbacks", "early_stoping", "unknown callback 'early_stoping'. Did you mean 'EarlyStopping'?"),
        ("callbacks", "learning_rate_finder", "search model.optimizer.lr with llmkit tune"),
        ("callbacks", "lightning.pytorch.callbacks.BatchSizeFinder", "set data.batch_size"),
        ("callbacks", "[{name: backbone_finetuning, verbose: true}]", "train with model.freeze first"),
        ("callbacks", "ThroughputMonitor", "metrics.csv has tokens_per_second, mfu and memory_gib already"),
        ("callbacks", "{name: model_checkpoint, monitr: x}", "ModelCheckpoint has no argument 'monitr'"),
        ("profiler", "simpel", "unknown profiler 'simpel'. Did you mean 'simple'?"),
        ("profiler", "pytorch", "StochasticWeightAveraging copies the model, which has hooks of PyTorchProfiler"),
        ("callbacks", "{monitor: val_loss}", "expected a name, or {name: ..., arguments}, got {'monitor': 'val_loss'}"),
        ("profiler", "xla", "XLAProfiler needs a package that is not installed: pip install torch_xla"),
    ],
)
def test_a_callback_that_does_not_fit_is_one_line(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        average = ["--trainer.callbacks", "{name: stochastic_weight_averaging, swa_lrs: 0.1}"]
        plan("fit", ["--data.train", "x.txt", *average, f"--trainer.{key}", value])
    (problem,) = refused.value.problems
    assert problem.text.startswith(f"command line: trainer.{key}: ")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_callbacks_are_given_the_loss_of_the_batch(tmp_path: Path, accumulate: int) -> None:
    look = Look()
    fit(tmp_path, look, max_epochs=1, accumulate_grad_batches=accumulate)
    batches, step_so_far = zip(*look.losses, strict=True)
    expected = [batches[i] if i % accumulate == 0 else (batches[i - 1] + batches[i]) / 2 for i in range(len(batches))]
    assert step_so_far == pytest.approx(expected) and 0.5 < batches[0] < 0.9  # ln 2, of two classes


def test_predict_in_a_callback_changes_nothing(tmp_path: Path) -> None:
    asked, left = Look(ask=True), Look()
    fit(tmp_path, asked, max_epochs=1)
    fit(tmp_path, left, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(asked.steps, left.steps, strict=True))


def test_predict_says_what_it_takes(tmp_path: Path) -> None:
    model = fit(tmp_path, Look(), max_epochs=1, limit_train_batches=1)
    assert model.predict([]) == []
    with pytest.raises(UserError, match="takes a list of texts or rows, and got one str"):
        model.predict("a b")
    with pytest.raises(UserError, match="got one dict"):
        model.predict({"text": "a b"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="row 2 has no text; it needs text"):
        model.predict([{"text": "a"}, {"sentence": "b"}])
    with pytest.raises(UserError, match="not built yet"):
        LanguageModel().predict(["a"])
    with pytest.raises(TypeError, match="dropout"):
        LanguageModel.load_from_checkpoint("x.ckpt", dropout=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("head", ["generation", "classification", "translation"])
def test_lightnings_tuner(tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It leaves the size of batches that it has found, and the weights as they were."""
    data = tmp_path / "rows.csv"
    data.write_text(
        "text,label,source,target\n" + "".join(f"{'ab'[i % 2]} {i % 5} b,{'xy'[i % 2]},a b,b a\n" for i in range(40))
    )
    pl.seed_everything(0, verbose=False)
    columns: Any = {"text": "text"} if head == "generation" else None
    tokenizer = llmkit.plugin("tokenizer", "char")
    module = llmkit.DataModule(train=str(data), tokenizer=tokenizer, columns=columns, batch_size=2, validation_share=0)
    model = LanguageModel(head=llmkit.plugin("head", head), dim=8, num_layers=1, context=16)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    look = Look()
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, use_distributed_sampler=False, callbacks=[look], **off)  # type: ignore[arg-type]
    tuner = Tuner(trainer)
    assert tuner.scale_batch_size(model, datamodule=module, max_trials=2, steps_per_trial=1) == module.batch_size == 4
    before = model.network.embedding.weight.detach().clone()
    found: Any = tuner.lr_find(model, datamodule=module, num_training=8, update_attr=False)
    assert len(found.results["loss"]) == 8 and torch.equal(model.network.embedding.weight, before)
    look.rows.clear()
    trainer.fit(model, module)
    assert look.rows == [4]


def test_the_config_of_a_run_has_settings_that_are_not_plain_as_text(tmp_path: Path) -> None:
    """An interval of time, which a callback takes, is neither a number nor text when it is parsed."""
    (tmp_path / "text.txt").write_text("some words\n" * 40)
    arguments = {"dirpath": str(tmp_path), "train_time_interval": "01:00:00"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
    words = ("--data.train", tmp_path / "text.txt", *TINY, "--trainer.callbacks", json.dumps([callback]))
    done("fit", *words, "--output", tmp_path)
    (config,) = tmp_path.rglob("config.yaml")
    (written,) = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert written["init_args"]["train_time_interval"] == "1:00:00"


def test_evaluating_ends_with_an_error_too() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert not module.training and not module[0].training
        raise ZeroDivisionError
    assert module.training and module[0].training and not module[1].training

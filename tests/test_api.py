"""``llmkit.fit`` from Python: the same run as the command's, mistakes as exceptions, a process left as it was."""

from __future__ import annotations

import asyncio
import csv
import functools
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Result, cheap, done
from faults import Sender
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from test_process import state

import llmkit as kit
from llmkit.api.settings import read
from llmkit.checkpoint.content import check_classes
from llmkit.model.optim import AdamW
from llmkit.run.throughput import LOGGED as SPEED
from llmkit.testing.resume import differ
from llmkit_plugins.norm import RMSNorm

MODEL = {"dim": 16, "num_layers": 1, "context": 16, "dropout": 0.1, "decoding": {"max_new_tokens": 4}}
TRAINER = {"max_steps": 8, "val_check_interval": 2, "limit_val_batches": 2, "log_every_n_steps": 1}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return str(file)


@pytest.fixture
def tree(text: str, tmp_path: Path) -> dict[str, Any]:
    """A config of 8 steps whose last validation is not the best one: the learning rate is too high."""
    optimizer = {"name": "adamw", "lr": 20.0}
    return {
        "output": str(tmp_path / "runs"),
        "seed_everything": 3,
        "model": {**MODEL, "attention": {"name": "multi_head", "num_heads": 2}, "optimizer": optimizer},
        "data": {"train": text, "tokenizer": "char", "batch_size": 2},
        "trainer": {**TRAINER, **QUIET, "gradient_clip_val": 0.5},
    }


def fitted(*config: Any, **settings: Any) -> kit.Run:
    """Call ``llmkit.fit`` and catch what it prints."""
    with cheap():
        return kit.fit(*config, **settings)


def rows(run: Result | kit.Run) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(newline="") as handle:
        return [{key: value for key, value in row.items() if key not in SPEED} for row in csv.DictReader(handle)]


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, without what may be written in two ways, callbacks, and the name, which is that of the file."""
    model = {name: value for name, value in config["model"].items() if name != "cross_attention"}
    return {**config, "model": model, "name": "", "trainer": {**config["trainer"], "callbacks": None}}


def same(run: kit.Run, other: Result) -> None:
    """Assert that a run has the losses, the checkpoints, the results and the config of a command's, bit for bit."""
    assert rows(run) == rows(other)
    found: list[str] = []
    for name in ("best", "last"):
        one, two = (
            torch.load(item.folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for item in (run, other)
        )
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops"):
            differ(one[part], two[part], part, found)
    assert found == []
    assert (run.folder / "results.json").read_text() == (other.folder / "results.json").read_text()
    assert without_places(run.config) == without_places(yaml.safe_load((other.folder / "config.yaml").read_text()))


def test_fit_is_the_command(tree: dict[str, Any], text: str, tmp_path: Path) -> None:
    """With mappings, in a running event loop, and with objects that were built before the seed was set."""
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    command = done("fit", "--config", tmp_path / "experiment.yaml")

    layered = {"model.attention": "lstm", "model.dim": 99, "trainer": {"max_steps": 1}}
    attention = functools.partial(kit.plugin("attention", "multi_head").func, num_heads=2)  # type: ignore[attr-defined]
    groups = {"model": {"attention": attention, "dim": 16}, "trainer": {"max_steps": 8}, "seed": 3}

    async def cell() -> kit.Run:
        return fitted({**tree, "seed_everything": 0}, layered, **groups)

    before, drawn = state(), torch.get_rng_state()
    random.seed(0)
    same(asyncio.run(cell()), command)
    assert state() == before and torch.equal(torch.get_rng_state(), drawn)
    assert random.random() == random.Random(0).random()

    model = kit.LanguageModel(
        **{**MODEL, "decoding": kit.DecodingOptions(max_new_tokens=4)},  # type: ignore[arg-type]
        attention=attention,
        optimizer=functools.partial(AdamW, lr=20.0),
    )
    data = kit.DataModule(train=text, tokenizer=kit.plugin("tokenizer", "char"), batch_size=2)
    steps: list[int] = []
    callback = LambdaCallback(on_train_batch_end=lambda trainer, *rest: steps.append(trainer.global_step))
    rest = {key: tree[key] for key in ("output", "seed_everything")}
    logger = CSVLogger(tree["output"], "another")
    objects = {"callbacks": [callback, "ModelSummary"], "logger": logger}
    with cheap() as (_, err):
        run = kit.fit(model=model, data=data, trainer={**tree["trainer"], **objects}, **rest)
    assert steps == [*range(1, 9)]
    assert "trainer.callbacks: config.yaml does not have LambdaCallback, which was given" in err.getvalue()
    assert (Path(logger.log_dir) / "metrics.csv").is_file() and run.provenance["seed"] == 3
    named = run.config["trainer"]["callbacks"]
    assert [one["class_path"].rpartition(".")[2] for one in named] == ["ModelSummary"]
    same(run, command)
    best = torch.load(run.best or "", weights_only=True)["state_dict"]
    assert rows(run)[-1]["val_loss"] != str(run.metrics["val_loss"])  # the last step is not the best one
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_a_run_is_read_from_its_folder(tree: dict[str, Any], tmp_path: Path) -> None:
    run = fitted(tree, {"trainer.max_steps": 2})
    assert run.folder == tmp_path / "runs" / "run" / "version_0"
    assert run.best == run.folder / "checkpoints" / "best.ckpt" and run.last is not None
    assert set(run.metrics) == {"val_loss", "val_perplexity", "val_bits_per_byte", "val_unknown_share"}
    assert [(row["step"], "val_loss" in row) for row in run.history] == [(0, False), (1, False), (1, True)]
    assert run.history[-1]["val_loss"] == pytest.approx(run.metrics["val_loss"])
    assert run.config["trainer"]["max_steps"] == 2 and "precision" in run.results
    shown = f"val_loss {run.metrics['val_loss']:.4f}"
    assert repr(run).startswith(f"Run('{run.folder}'): {shown}, ")
    assert shown.split()[1] in run._repr_html_() and str(run.best) in run._repr_html_()
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    (answer,) = run.model.predict(["word"])
    assert run.model.spec["dim"] == 16 and answer["prompt"] == "word"
    greedy = kit.DecodingOptions(temperature=0)  # which leaves the length to the checkpoint, and to the head there
    assert len(run.model.predict(["word"], greedy)[0]["text"]) == 4
    assert kit.LanguageModel(decoding=greedy).head.decoding.max_new_tokens == 200
    with pytest.raises(kit.UserError, match="is not the folder of a run"):
        kit.Run(tmp_path / "nothing")
    part = torch.load(run.best, weights_only=True)["llmkit"]
    part["model"]["norm"] = {"class_path": "__main__.Mine", "init_args": {}}
    with pytest.raises(kit.UserError, match=r"here needs norm __main__\.Mine, a class of the script or notebook that"):
        check_classes(part, "here")

    (tmp_path / "new.txt").write_text("word\n\nline\n")
    with cheap():
        again: dict[str, Any] = {"ckpt_path": run.best, "output": tmp_path / "runs"}
        measured = kit.validate(**again, trainer=QUIET)
        tested = kit.test(**again, trainer=QUIET, data={"test": tree["data"]["train"]})
        answers = kit.predict(**again, trainer=QUIET, data={"predict": tmp_path / "new.txt"}).predictions
    assert measured.metrics.keys() == run.metrics.keys() and "test_loss" in tested.metrics
    assert [answer.get("prompt") for answer in answers] == ["word", None, "line"]
    with pytest.raises(kit.UserError, match="has no losses to plot"):
        tested.plot()


class Unnamed(RMSNorm):
    """A norm without a name."""


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": {"dmi": 3}}, "overrides: unknown key 'model.dmi'. Did you mean 'dim'?"),
        ({"model.dim": "wide"}, "overrides: model.dim: expected a whole number, got 'wide'"),
        (
            {"config": {"model": {"attention": "lstn"}}},
            "config: model.attention: unknown attention 'lstn'. Did you mean",
        ),
        ({"model.num_layers": 0}, "overrides: model.num_layers: must be at least 1, got 0"),
        ({"model": 3}, "model: expected a mapping or a llmkit.LanguageModel, got an object of builtins.int"),
        ({"model.norm": object()}, "model.norm: expected plain data, or a plugin's class, got an object of builtins."),
        ({"model.norm": Unnamed}, "is not registered: put @register('norm', 'unnamed') above it"),
        ({"trainer": {"max_stps": 1}}, "overrides: unknown key 'trainer.max_stps'. Did you mean 'max_steps'?"),
    ],
)
def test_a_mistake_is_an_exception(settings: dict[str, Any], text: str, tree: dict[str, Any]) -> None:
    with pytest.raises(kit.UserError) as caught:
        fitted(settings.pop("config", {}), {"data": tree["data"]}, **settings)
    assert text in str(caught.value)
    assert caught.value._render_traceback_()[0].startswith("llmkit: error: ")  # what a notebook shows


def test_objects_have_their_settings_already(text: str, tmp_path: Path) -> None:
    model = kit.LanguageModel(dim=16, num_layers=1, context=16)
    (tmp_path / "a.yaml").write_text("\nmodel:\n  dim: 8\n")
    place = f"leave it out of {tmp_path / 'a.yaml'}:2"
    also = {"model.dim": 8, "data.train": text}
    for config, overrides, where in ((tmp_path / "a.yaml", {}, place), (None, also, "out of overrides")):
        with pytest.raises(kit.UserError, match=f"model: is an object here, .* {where}"):
            read(config, {"model": model}, overrides)
    with pytest.raises(kit.UserError, match=r"norm: .*is not registered: put @register\('norm', 'unnamed'\) above it"):
        model = kit.LanguageModel(dim=16, num_layers=1, context=16, norm=Unnamed)
        read(None, {"model": model, "data.train": text})
    with pytest.raises(kit.UserError, match="a config is needed: a file, a mapping"):
        fitted(model=model)


def test_a_notebook_trains_in_one_process(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.api.run.in_notebook", lambda: True)
    with pytest.raises(kit.UserError, match=r"overrides: trainer\.devices: a notebook trains in one process, not in 2"):
        fitted(tree, {"trainer.devices": 2})


def test_ctrl_c_is_a_keyboard_interrupt(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the run has saved, or at once for the second one; another signal reaches whoever handled it before."""
    before = state()
    once, twice = [Sender(signal.SIGINT, 3)], [Sender(signal.SIGINT, 1), Sender(signal.SIGINT, 1)]
    with pytest.raises(KeyboardInterrupt):
        fitted(tree, {"trainer.callbacks": twice})
    assert not list(Path(tree["output"]).rglob("*.ckpt"))
    with pytest.raises(KeyboardInterrupt):
        fitted(tree, {"trainer.callbacks": once})
    assert state() == before
    run = fitted(tree, ckpt_path="last")
    assert run.history[-1]["step"] == 7
    assert fitted(tree, ckpt_path="last").folder == run.folder  # nothing is left to train
    caught: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", caught.append)
    with pytest.raises(kit.errors.Stopped):
        fitted(tree, {"trainer.callbacks": Sender(signal.SIGTERM, 3)})
    assert caught == [signal.SIGTERM]

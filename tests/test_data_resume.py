"""Training resumes exactly where it stopped, whatever stopped it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fakes import CharTokenizer, Joining, Labelling, Recorder, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from llmkit.contracts import Batch
from llmkit.data import DataModule


def corpus(folder: Path, lines: int = 60) -> str:
    rng = random.Random(0)
    path = folder / "rows.csv"
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 12))) for _ in range(lines)]
    path.write_text("text,label\n" + "".join(f"{word},{i % 3}\n" for i, word in enumerate(words)))
    return str(path)


def validation(folder: Path) -> str:
    path = folder / "validation.csv"
    path.write_text("text,label\nabc,0\ndef,1\n")
    return str(path)


def run(
    folder: Path,
    layout: str,
    settings: dict[str, Any],
    resume: str | None = None,
    kind: type[Recorder] = Recorder,
    **options: Any,
) -> list[Any]:
    model = kind(Joining() if layout == "blocks" else Labelling(), 8)
    data = DataModule(
        train=corpus(folder),
        validation=validation(folder),
        tokenizer=CharTokenizer,
        batch_size=4,
        cache_dir=str(folder / "cache"),
        **settings,
    )
    fit = trainer(folder, **options)
    fit.fit(model, datamodule=data, ckpt_path=resume)
    if "max_steps" in options and resume is None:
        fit.save_checkpoint(folder / "stopped.ckpt")
    return model.seen["train"]


CASES = [("blocks", {}), ("blocks", {"pack": True}), ("examples", {}), ("examples", {"num_workers": 2})]
CASES += [("examples", {"streaming": True}), ("blocks", {"streaming": True, "shuffle_buffer": 8})]
CASES += [("examples", {"streaming": True, "num_workers": 2})]


BY_STEPS: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 2}


@pytest.fixture(scope="module", params=CASES, ids=str)
def whole_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], int, list[Any]]:
    """A layout with its settings, the batches of an epoch, and what three epochs see that nothing stops."""
    folder, (layout, settings) = tmp_path_factory.mktemp("whole"), request.param
    epoch = len(run(folder, layout, without_workers(settings), max_epochs=1))
    same = settings if settings.get("streaming") else without_workers(settings)
    return layout, settings, epoch, run(folder, layout, same, max_steps=3 * epoch, **BY_STEPS)


def without_workers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that give the same batches, streams of several workers excepted, in less time."""
    return {key: value for key, value in settings.items() if key != "num_workers"}


@pytest.mark.parametrize("stop", ["mid-epoch", "epoch end", "second epoch"])
def test_resume_by_steps(tmp_path: Path, whole_run: tuple[str, dict[str, Any], int, list[Any]], stop: str) -> None:
    layout, settings, epoch, whole = whole_run
    if "num_workers" in settings and stop != "second epoch":
        return  # starting the processes takes seconds, and this moment is in the middle of an epoch and after one
    steps = {"mid-epoch": epoch // 2, "epoch end": epoch, "second epoch": epoch + 3}[stop]
    first = run(tmp_path, layout, settings, max_steps=steps, **BY_STEPS)
    rest = run(tmp_path, layout, settings, resume=str(tmp_path / "stopped.ckpt"), max_steps=3 * epoch, **BY_STEPS)
    assert len(whole) == 3 * epoch
    assert first == whole[:steps]
    assert rest == whole[steps:]


class Failing(Recorder):
    """Fails in the middle of a step."""

    def training_step(self, batch: Batch) -> Tensor:
        if len(self.seen["train"]) == 20:
            raise RuntimeError("power cut")
        return super().training_step(batch)


@pytest.fixture(scope="module", params=[CASES[0], CASES[3], CASES[4]], ids=str)
def run_in_epochs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], dict[str, Any], list[Any]]:
    """A layout with its settings, options of a trainer, and what three epochs see that nothing stops."""
    layout, settings = request.param
    often = layout == "examples" and not settings.get("streaming")
    options: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 10 if often else 1.0}
    whole = run(tmp_path_factory.mktemp("epochs"), layout, without_workers(settings), **options)
    return layout, settings, options, whole


@pytest.mark.parametrize("every", [3, 15])
def test_resume_after_a_failure(
    tmp_path: Path, run_in_epochs: tuple[str, dict[str, Any], dict[str, Any], list[Any]], every: int
) -> None:
    """From the last checkpoint of a run in epochs, saved by steps, with workers that had fetched ahead."""
    layout, settings, options, whole = run_in_epochs
    save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=every, enable_version_counter=False)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, layout, settings, kind=Failing, callbacks=[save], enable_checkpointing=True, **options)
    saved = int(torch.load(tmp_path / "last.ckpt")["global_step"])
    assert saved == 20 - 20 % every
    rest = run(tmp_path, layout, settings, resume=str(tmp_path / "last.ckpt"), **options)
    assert rest == whole[saved:]


def test_steps_then_epochs(tmp_path: Path) -> None:
    """Lightning counts the epoch that max_steps cut short; the data still continues with the next batch."""
    whole = run(tmp_path, "examples", {}, max_epochs=3)
    run(tmp_path, "examples", {}, max_steps=7, max_epochs=-1)
    rest = run(tmp_path, "examples", {}, resume=str(tmp_path / "stopped.ckpt"), max_epochs=3)
    assert len(rest) == 30
    assert rest == whole[7:37]


def test_fitting_twice_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path, "examples", {}, max_epochs=2)
    model = Recorder(Labelling(), 8)
    data = DataModule(
        train=corpus(tmp_path), tokenizer=CharTokenizer, batch_size=4, cache_dir=str(tmp_path / "cache"),
        validation=validation(tmp_path),
    )  # fmt: skip
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, datamodule=data)
    fit.fit_loop.max_epochs = 2
    fit.fit(model, datamodule=data)
    assert model.seen["train"] == whole


def test_overfitting_repeats_the_same_batch(tmp_path: Path) -> None:
    seen = run(tmp_path, "examples", {}, max_epochs=3, overfit_batches=2)
    assert seen[:2] == seen[2:4] == seen[4:]

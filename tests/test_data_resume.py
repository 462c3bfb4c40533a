"""Training goes on exactly where it stopped, whatever it was stopped by."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from data_fakes import CharTokenizer, Joining, Labelling, Recorder, trainer

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


def run(folder: Path, layout: str, settings: dict[str, Any], resume: str | None = None, **options: Any) -> list[Any]:
    model = Recorder(Joining() if layout == "blocks" else Labelling(), 8)
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
    if resume is None:
        fit.save_checkpoint(folder / "stopped.ckpt")
    return model.seen["train"]


CASES = [("blocks", {}), ("blocks", {"pack": True}), ("examples", {}), ("examples", {"num_workers": 2})]
CASES += [("examples", {"streaming": True}), ("blocks", {"streaming": True, "shuffle_buffer": 8})]
CASES += [("examples", {"streaming": True, "num_workers": 2})]


@pytest.mark.parametrize(("layout", "settings"), CASES)
@pytest.mark.parametrize("stop", ["mid-epoch", "epoch end", "second epoch"])
def test_resume_by_steps(tmp_path: Path, layout: str, settings: dict[str, Any], stop: str) -> None:
    epoch = len(run(tmp_path, layout, settings, max_epochs=1))
    steps = {"mid-epoch": epoch // 2, "epoch end": epoch, "second epoch": epoch + 3}[stop]
    options = {"max_epochs": -1, "limit_val_batches": 2}
    whole = run(tmp_path, layout, settings, max_steps=3 * epoch, **options)
    first = run(tmp_path, layout, settings, max_steps=steps, **options)
    rest = run(tmp_path, layout, settings, resume=str(tmp_path / "stopped.ckpt"), max_steps=3 * epoch, **options)
    assert len(whole) == 3 * epoch
    assert first == whole[:steps]
    assert rest == whole[steps:]

"""``model.init_from``: a new run begins with the tokenizer and the weights of another one's checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import TINY, Result, done, llmkit
from data_fakes import trainer
from torch import Tensor

from llmkit import DataModule, LanguageModel, UserError, load, plugin

QUIET = [word for word in TINY if word not in ("--data.tokenizer", "char")]
"""The options of a small fit, but for the tokenizer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, texts of other letters, and labelled ones."""
    path = tmp_path_factory.mktemp("init")
    (path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    (path / "other.txt").write_text("".join(f"zz {i} yy\n" for i in range(60)))
    (path / "labels.csv").write_text("text,label\n" + "".join(f"wort {i},{'ab'[i % 2]}\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Result:
    """A masked language model with a character tokenizer."""
    return fit(folder, "pretrained", "text.txt", "masked_lm", "--data.tokenizer", "char")


def fit(folder: Path, name: str, data: str, head: str, *words: object) -> Result:
    return done(*command(folder, name, data, head), *words)


def command(folder: Path, name: str, data: str, head: str) -> list[object]:
    return ["fit", "--data.train", folder / data, "--model.head", head, *QUIET, "--output", folder / name]


def weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def model_of(checkpoint: Path, head: str = "classification", **sizes: Any) -> LanguageModel:
    given: dict[str, Any] = {"dim": 16, "num_layers": 1, "context": 16, **sizes}
    return LanguageModel(head=plugin("head", head), init_from=str(checkpoint), **given)


class Start(pl.Callback):
    """Remembers the weights before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_python(folder: Path, pretrained: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are equal before the first step, the tokenizer is taken over, and labels are those of the new data."""
    model = model_of(pretrained.checkpoint)
    data = DataModule(train=str(folder / "labels.csv"), cache_dir=str(tmp_path / "cache"))
    assert not model.head_ready
    start = Start()
    trainer(tmp_path, max_steps=1, callbacks=[start]).fit(model, data)
    theirs = weights(pretrained.checkpoint)
    assert len(theirs) > 8 and set(start.weights) - set(theirs) == {"head.classifier.weight", "head.classifier.bias"}
    for name, value in theirs.items():
        assert torch.equal(start.weights[name], value), name
    assert any(not torch.equal(value, theirs[name]) for name, value in model.state_dict().items() if name in theirs)
    first = load(pretrained.checkpoint).tokenizer
    assert first is not None and model.tokenizer is data.tokenizer and data.tokenizer is not None
    assert data.tokenizer.to_state() == first.to_state()
    assert model.head.info() == {"labels": ["a", "b"]}
    assert model.head_ready
    told = capsys.readouterr().err
    assert told.count("note: ") == 1
    assert f"{pretrained.checkpoint}: {len(theirs)} of its {len(theirs)} weights taken, and its tokenizer" in told
    assert "only here: head.classifier.weight, head.classifier.bias" in told


def test_a_causal_classifier_takes_all_of_a_language_model(folder: Path, tmp_path: Path) -> None:
    source = fit(folder, "lm", "text.txt", "generation", "--data.tokenizer", "char").checkpoint
    words = ("--model.init_from", source, "--model.head.topology", "decoder")
    result = fit(folder, "causal", "labels.csv", "classification", *words)
    every = len(weights(source))
    assert f"{every} of its {every} weights taken" in result.err and "only there" not in result.err
    assert weights(result.checkpoint).keys() - weights(source).keys() == {
        "head.classifier.weight",
        "head.classifier.bias",
    }
    assert json.loads(done("infer", result.checkpoint, "--json", "wort 3").out)["label"] in ("a", "b")


def test_command_line_and_resuming(folder: Path, pretrained: Result, tmp_path: Path) -> None:
    """The file may be gone as soon as training has begun."""
    source = tmp_path / "source.ckpt"
    shutil.copy(pretrained.checkpoint, source)
    config = {"model": {"init_from": str(source), "head": "classification"}, "data": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", tmp_path / "run.yaml", "--data.train", folder / "labels.csv", *QUIET]
    words += ["--output", tmp_path]
    result = done(*words)
    assert result.err.count("weights taken") == 1
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["model"]["init_from"] == str(source) and saved["data"]["tokenizer"] is None
    content = torch.load(result.checkpoint, weights_only=True)["llmkit"]
    assert "init_from" not in content["model"]
    assert content["tokenizer_state"] == torch.load(source, weights_only=True)["llmkit"]["tokenizer_state"]

    again = done("fit", "--config", result.folder / "config.yaml", "--output", tmp_path / "again")
    one, two = weights(result.checkpoint), weights(again.checkpoint)
    assert all(torch.equal(value, two[name]) for name, value in one.items())

    source.unlink()
    assert json.loads(done("infer", result.checkpoint, "--json", "wort 3").out)["label"] in ("a", "b")
    resumed = done(*words, "--ckpt_path", "last", "--trainer.max_steps", "4", "--model.init_from", source)
    assert "weights taken" not in resumed.err
    assert torch.load(resumed.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    done("validate", "--config", tmp_path / "run.yaml", "--ckpt_path", result.checkpoint, "--output", tmp_path / "v")


def test_the_same_head_on_other_data(folder: Path, tmp_path: Path) -> None:
    """The vocabulary stays that of the checkpoint, also where the config names the same class of tokenizer."""
    first = fit(folder, "first", "text.txt", "generation", "--data.tokenizer", "char")
    words = ("--model.init_from", first.checkpoint, "--data.tokenizer", "char")
    second = fit(folder, "second", "other.txt", "generation", *words)
    count = len(weights(first.checkpoint))
    assert f"{count} of its {count} weights taken, and its tokenizer\n" in second.err
    states = [load(run.checkpoint).tokenizer for run in (first, second)]
    assert states[0] is not None and states[1] is not None
    assert states[0].to_state() == states[1].to_state()


def test_what_does_not_fit_is_told(folder: Path, pretrained: Result) -> None:
    words = ("--model.init_from", pretrained.checkpoint, "--model.num_layers", "2", "--model.position", "learned")
    deeper = fit(folder, "deeper", "text.txt", "masked_lm", *words)
    theirs = weights(pretrained.checkpoint)
    assert f"{len(theirs)} of its {len(theirs)} weights taken" in deeper.err
    assert "only here: net.position.table.weight, net.encoder.1." in deeper.err
    new = len(weights(deeper.checkpoint)) - len(theirs)
    assert f" and {new - 4} more" in deeper.err
    assert "another part: model.position Rotary there, Learned here" in deeper.err
    words = ("--model.init_from", deeper.checkpoint, "--model.position", "learned", "--model.context", "12")
    shorter = fit(folder, "shorter", "text.txt", "masked_lm", *words)
    assert "of another shape: net.position.table.weight (16, 16) there, (12, 16) here" in shorter.err
    assert "only there: net.encoder.1." in shorter.err
    assert f"{len(theirs)} of its {len(weights(deeper.checkpoint))} weights taken" in shorter.err


def refused(folder: Path, *words: object) -> str:
    """Return the one line that refuses a fit."""
    result = llmkit(*command(folder, "refused", "text.txt", "classification"), *words)
    assert result.code == 2, result
    (line,) = result.err.strip().splitlines()
    return line


def test_a_missing_file_is_told_before_anything_else(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.ckpt"
    line = refused(folder, "--model.init_from", missing, "--data.train", tmp_path / "none.txt")
    assert f"model.init_from: checkpoint {missing} does not exist" in line
    assert "model.init_from: checkpoint text.txt" in refused(folder, "--model.init_from", "text.txt")
    with pytest.raises(UserError, match=r"model.init_from: checkpoint .*none.ckpt does not exist"):
        model_of(missing)


def test_another_tokenizer_is_refused(folder: Path, pretrained: Result, tmp_path: Path) -> None:
    says = f"data.tokenizer: is BPE, but model.init_from {pretrained.checkpoint} brings a trained Char: remove"
    assert says in refused(folder, "--model.init_from", pretrained.checkpoint, "--data.tokenizer", "bpe")
    (tmp_path / "run.yaml").write_text(f"model: {{init_from: {pretrained.checkpoint}}}\ndata: {{tokenizer: bpe}}\n")
    assert says in refused(folder, "--config", tmp_path / "run.yaml")
    data = DataModule(
        train=str(folder / "text.txt"), tokenizer=plugin("tokenizer", "byte"), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(UserError, match="data.tokenizer: is Byte, but"):
        trainer(tmp_path, max_steps=1).fit(model_of(pretrained.checkpoint, "generation"), data)


def test_null_turns_it_off(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {init_from: none.ckpt, head: masked_lm}\ndata: {tokenizer: char}\n")
    words = [*command(folder, "off", "text.txt", "masked_lm"), "--config", tmp_path / "run.yaml"]
    assert "weights taken" not in done(*words, "--model.init_from", "null").err


def test_nothing_that_fits_is_refused(folder: Path, pretrained: Result, tmp_path: Path) -> None:
    model = model_of(pretrained.checkpoint, "masked_lm", dim=32)
    data = DataModule(train=str(folder / "text.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="none of its weights fits this model; of another shape: net.embedding.weight"):
        trainer(tmp_path, max_steps=1).fit(model, data)


def test_only_the_tokenizer_must_be_known(folder: Path, pretrained: Result, tmp_path: Path) -> None:
    """The weights are plain tensors: the classes they belong to need not be there."""
    content = torch.load(pretrained.checkpoint, weights_only=True)
    content["llmkit"]["model"]["head"]["class_path"] = "gone.heads.Head"
    content["llmkit"]["model"]["feedforward"]["class_path"] = "gone.parts.Own"
    torch.save(content, tmp_path / "foreign.ckpt")
    model_of(tmp_path / "foreign.ckpt")
    result = fit(folder, "foreign", "text.txt", "masked_lm", "--model.init_from", tmp_path / "foreign.ckpt")
    assert "weights taken" in result.err and "another part: model.feedforward Own there, SquaredReLU here" in result.err
    content["llmkit"]["tokenizer"]["class_path"] = "gone.tokens.Own"
    torch.save(content, tmp_path / "foreign.ckpt")
    line = refused(folder, "--model.init_from", tmp_path / "foreign.ckpt")
    assert "model.init_from: " in line and "needs tokenizer gone.tokens.Own, which is not an installed plugin" in line

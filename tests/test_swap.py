"""Swapping parts, resuming, overriding: what one config, one option or one checkpoint has to be enough for."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import TINY, Result, done, llmkit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from llmkit import DataModule, DecodingOptions, LanguageModel, UserError, imports, load, plugin, registry

HEADS = ("generation", "classification", "translation")
FILES = {
    **{"generation": "text.txt", "masked_lm": "text.txt", "classification": "labels.csv", "translation": "pairs.tsv"},
    **{"summarization": "summaries.csv", "token_classification": "tags.conll", "question_answering": "questions.squad"},
    **{"multi_label": "scored.jsonl", "regression": "scored.jsonl", "probe": "probe.csv", "completion": "prompts.csv"},
}
PROMPTS = ("word 3", "line 12 of")
ONE_OF_EACH_KIND = ("multi_head", "lstm", "low_rank")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data for every head."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"word {i} of line {i * 7 % 13}" for i in range(40)]
    (folder / "text.txt").write_text("\n".join(words) + "\n")
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{w},{'ab'[i % 2]}\n" for i, w in enumerate(words)))
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{word}\t{word[::-1]}\n" for word in words))
    (folder / "summaries.csv").write_text("document,summary\n" + "".join(f"{w},{w[:6]}\n" for w in words))
    (folder / "prompts.csv").write_text("prompt,completion\n" + "".join(f"{w},{w[:6]}\n" for w in words))
    tagged = ["".join(f"{part}\t{'B-N' if part.isdigit() else 'O'}\n" for part in w.split()) for w in words]
    (folder / "tags.conll").write_text("\n".join(tagged))
    answer = {"text": "word", "answer_start": 0}
    questions = [{"context": w, "qas": [{"id": w, "question": "which?", "answers": [answer]}]} for w in words]
    (folder / "questions.squad").write_text(json.dumps({"data": [{"title": "", "paragraphs": questions}]}))
    scored = [{"text": w, "labels": ["a", "b"][: i % 3], "score": i % 7} for i, w in enumerate(words)]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    (folder / "probe.csv").write_text("symbols,expected\n" + "".join(f"a {i % 7} b,- - {i % 7}\n" for i in range(40)))
    (folder / "rows.txt").write_text("".join(f"word {i}\n" for i in (5, 3, 11, 4, 7)))
    return folder


def of_head(head: str, data: Path) -> list[str]:
    """Return the options that train a head on its data."""
    file = FILES[head]
    words = ["--model.head", head, "--data.train", str(data / file), "--data.test", str(data / file)]
    return words + (["--data.format", file.partition(".")[2]] if file.endswith(("conll", "squad")) else [])


def fit(data: Path, output: Path, *words: object, head: str = "generation") -> Result:
    """Fit a tiny model for two steps."""
    return done("fit", *of_head(head, data), *TINY, "--output", output, *words)


def parts(result: Result) -> dict[str, Any]:
    """Return the written-out config of a run's model."""
    model: dict[str, Any] = yaml.safe_load((result.folder / "config.yaml").read_text())["model"]
    return model


def answers(result: Result, *words: object) -> list[dict[str, Any]]:
    """Return what a run's checkpoint says to some texts."""
    return [json.loads(line) for line in done("infer", result.checkpoint, "--json", *words).out.splitlines()]


def content(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


# Parts


@pytest.mark.parametrize(
    ("attention", "head"),
    [
        (attention, head)
        for attention in registry.entries("attention")
        for head in HEADS
        if head == "generation" or attention in ONE_OF_EACH_KIND  # test_backbone has each in every topology
    ],
)
def test_attention_and_head(attention: str, head: str, data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path, "--model.attention", attention, head=head)
    model = load(result.checkpoint)
    layer: Any = (model.network.encoder if head == "classification" else model.network.decoder)[0]
    assert type(layer.attention) is registry.find("attention", attention).load()
    together = answers(result, *PROMPTS, "--greedy", "--max_new_tokens", "5")
    alone = answers(result, *PROMPTS, "--greedy", "--max_new_tokens", "5", "--batch_size", 1)
    if head == "classification":
        assert [answer["label"] for answer in together] == [answer["label"] for answer in alone]
        assert all(set(answer["probabilities"]) == {"a", "b"} for answer in together)
        return
    assert together == alone
    if attention == "multi_head":  # what --greedy stands for is the same with all
        assert answers(result, *PROMPTS, "--num_beams", "1", "--temperature", "0", "--max_new_tokens", "5") == alone
    if attention not in ONE_OF_EACH_KIND:
        return  # what beams need of each, rows of its state in another order, its checks hold: decoding_reorder
    beams = answers(result, *PROMPTS, "--num_beams", "3", "--max_new_tokens", "5")
    assert len(beams) == 2
    assert all(isinstance(answer["text"], str) for answer in beams)


ASKED = {
    "masked_lm": ["word [MASK]", "line 12 [MASK] it"],
    "question_answering": [
        json.dumps({"question": "which?", "context": text}) for text in ("word 3", "line 12 of word 4 and line 7")
    ],
    "probe": ["a 3", "a 4 b a"],
}


@pytest.mark.parametrize(
    ("attention", "head"),
    [
        (attention, head)
        for attention in ("multi_head", "lstm")
        for head in sorted(FILES.keys() - set(HEADS))
        if attention == "multi_head" or FILES[head] not in ("scored.jsonl", "probe.csv")  # heads like those above
    ],
)
def test_attention_and_further_head(attention: str, head: str, data: Path, tmp_path: Path) -> None:
    assert FILES.keys() == registry.entries("head").keys()
    result = fit(data, tmp_path, "--model.attention", attention, head=head)
    asked, greedy = ASKED.get(head, PROMPTS), ("--greedy", "--max_new_tokens", "5")
    together = answers(result, *asked, *greedy)
    alone = answers(result, *asked, *greedy, "--batch_size", 1)
    assert len(together) == 2
    for one, other in zip(together, alone, strict=True):
        texts = {key: value for key, value in one.items() if isinstance(value, str)}
        assert texts == {key: other[key] for key in texts}


SMALL = {family: [*registry.entries(family)] for family in ("position", "feedforward", "norm")}


@pytest.mark.parametrize("number", range(max(map(len, SMALL.values()))))
def test_small_parts(number: int, data: Path, tmp_path: Path) -> None:
    """One of each family at once, until each was among them."""
    chosen = {family: names[number % len(names)] for family, names in SMALL.items()}
    result = fit(data, tmp_path, *(f"--model.{family}={name}" for family, name in chosen.items()))
    for family, name in chosen.items():
        assert parts(result)[family]["class_path"] == registry.find(family, name).class_path
    assert answers(result, "word", "--greedy")[0]["prompt"] == "word"


@pytest.mark.parametrize("name", registry.entries("tokenizer"))
def test_tokenizer(name: str, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": name}
    if name in ("bpe", "word", "wordpiece", "unigram"):
        options["vocab_size"] = 300
    if name == "pretrained":
        from llmkit_plugins.tokenizer import BPE

        trained = BPE(300)
        trained.train(iter([(data / "text.txt").read_text()]))
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(trained.to_state())["model"]))
        options["path"] = str(tmp_path / "tokenizer.json")
    result = fit(data, tmp_path, "--data.tokenizer", json.dumps(options))
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # the checkpoint has it all
    model = load(result.checkpoint)
    assert model.tokenizer is not None
    assert type(model.tokenizer) is registry.find("tokenizer", name).load()
    assert answers(result, "word 3", "--greedy")[0]["prompt"].split() == ["word", "3"]


@pytest.mark.parametrize(
    "words",
    [
        ("--model.norm_first", "false", "--model.tie_embeddings", "false", "--model.dropout", "0.3"),
        ("--data.pack", "true", "--model.optimizer", "{name: sgd, lr: 0.1}"),
        ("--data.documents", "line", "--model.scheduler", "{name: StepLR, step_size: 1}"),
        ("--data.documents", "line", "--data.pack", "true", "--model.attention", "lstm"),
        ("--data.streaming", "true", "--data.validation", "FILE", "--model.optimizer", "torch.optim.RMSprop"),
        ("--data.batch_tokens", "64", "--data.num_workers", "1"),
        ("--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2"),
        ("--model.optimizer", "muon"),
        ("--model.optimizer", "{name: muon, lr: 0.01, momentum: 0.9}", "--model.position", "{name: rotary, base: 500}"),
        (
            "--model.optimizer",
            "SGD",
            "--model.optimizer.lr",
            "0.1",
            "--model.scheduler",
            "{name: OneCycleLR, max_lr: 0.1}",
        ),
        ("--model.scheduler", "{name: cosine, warmup_steps: 1}"),
        ("--model.attention.num_heads", "8"),
        ("--model.attention", "llmkit_plugins.attention.recurrent.LSTM"),
        (
            "--model.attention",
            '{"class_path": "llmkit_plugins.attention.softmax.MultiHead", "init_args": {"num_heads": 2}}',
        ),
    ],
    ids=lambda words: " ".join(words).replace("--", "")[:60],
)
def test_option(words: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    heads = ("--model.position", "none") if "num_heads" in words[0] else ()  # rotary needs an even width
    result = fit(data, tmp_path, *[str(data / "text.txt") if word == "FILE" else word for word in words], *heads)
    checkpoint = content(result.checkpoint)
    assert checkpoint["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert len(answers(result, *PROMPTS)) == 2


def test_num_heads_alone_changes_the_default_attention(data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path, "--model.attention.num_heads", "8", "--model.dim", "32")
    assert parts(result)["attention"]["init_args"]["num_heads"] == 8
    assert load(result.checkpoint).spec["attention"]["init_args"]["num_heads"] == 8


# Configs


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_swap_over_arguments_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", {"model": {"attention": {"name": "multi_head", "num_heads": 2}}})
    assert parts(fit(data, tmp_path, "--config", config))["attention"]["init_args"]["num_heads"] == 2
    result = fit(data, tmp_path, "--config", config, "--model.attention", "lstm")
    assert parts(result)["attention"]["class_path"] == "llmkit_plugins.attention.recurrent.LSTM"
    assert "num_heads" not in parts(result)["attention"].get("init_args", {})
    assert "llmkit: note: model.attention is LSTM now; num_heads: 2 of " in result.err  # not silently


def test_swap_keeps_nothing_of_the_other_optimizer(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", {"model": {"optimizer": {"name": "adamw", "lr": 0.5, "betas": [0.5, 0.6]}}})
    below = write(tmp_path / "d.yaml", {"model": {"optimizer": "muon"}})
    result = fit(data, tmp_path, "--config", config, "--config", below)
    assert parts(result)["optimizer"]["class_path"] == "llmkit.model.optim.Muon"
    assert parts(result)["optimizer"].get("init_args", {}).get("lr") in (None, 0.02)


def test_two_files_merge(data: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {"model": {"attention": {"name": "multi_head", "num_heads": 2}, "dropout": 0.1}})
    second = write(tmp_path / "b.yaml", {"model": {"attention": {"name": "multi_head", "qk_norm": False}}})
    model = parts(fit(data, tmp_path, "--config", first, "--config", second))
    assert (model["attention"]["init_args"]["num_heads"], model["attention"]["init_args"]["qk_norm"]) == (2, False)
    assert model["dropout"] == 0.1


PLUGIN = '''\
from torch import nn

from llmkit import Attention, register


@register("attention", "swapped_mean")
class RunningMean(Attention):
    """Adds the mean of what came before."""

    def __init__(self, dim, role, scale=1.0):
        super().__init__(dim, role)
        self.scale = scale
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTD, seq, *, memory=None, state=None):
        counts = seq.positions_BT[..., None] + 1
        return self.out(self.scale * x_BTD.cumsum(1) / counts)
'''


def test_local_plugin(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the config, whatever the working directory; the checkpoint does not run it unasked."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "experiment"
    model = {"attention": {"name": "swapped_mean", "scale": 0.5}}
    config = write(folder / "mean.yaml", {"imports": ["parts/swapped_mean_plugin.py"], "model": model})
    (folder / "parts").mkdir()
    (folder / "parts" / "swapped_mean_plugin.py").write_text(PLUGIN)
    result = fit(data, tmp_path, "--config", config, "--model.attention.scale", "0.25")
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["imports"] == [str(folder / "parts" / "swapped_mean_plugin.py")]
    assert saved["model"]["attention"]["init_args"]["scale"] == 0.25
    fit(data, tmp_path, "--config", result.folder / "config.yaml")
    assert answers(result, "word", "--imports", folder / "parts" / "swapped_mean_plugin.py")

    # Another process has not imported it.
    monkeypatch.undo()
    del sys.modules["swapped_mean_plugin"]
    imports.imported.discard("swapped_mean_plugin")
    del registry._local["attention"]["swapped_mean"]
    monkeypatch.chdir(tmp_path)
    refused = llmkit("infer", result.checkpoint, "word")
    assert refused.code == 2, refused.err
    assert "swapped_mean_plugin.RunningMean" in refused.err
    assert "--imports" in refused.err
    assert "swapped_mean_plugin" not in sys.modules
    advice = refused.err.split("--imports", 1)[1].split()[0]  # what to type, from any folder
    assert Path(advice) == folder / "parts" / "swapped_mean_plugin.py"


# Runs and checkpoints


def test_runs_never_overwrite_each_other(data: Path, tmp_path: Path) -> None:
    first = fit(data, tmp_path, "--name", "twice")
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    second = fit(data, tmp_path, "--name", "twice")
    assert [first.folder.name, second.folder.name] == ["version_0", "version_1"]
    assert first.folder.parent == second.folder.parent == tmp_path / "twice"
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before
    names = {str(path.relative_to(first.folder)) for path in before}
    assert {"config.yaml", "metrics.csv", "results.json", "checkpoints/last.ckpt"} <= names
    assert {str(path.relative_to(second.folder)) for path in second.folder.rglob("*") if path.is_file()} == names


def test_checkpoint_content(data: Path, tmp_path: Path) -> None:
    checkpoint = content(fit(data, tmp_path, head="classification").checkpoint)["llmkit"]
    assert checkpoint["format"] == 1
    assert checkpoint["versions"] == {name: version(name) for name in ("llmkit", "torch", "lightning", "tokenizers")}
    assert checkpoint["model"]["attention"]["class_path"] == "llmkit_plugins.attention.softmax.MultiHead"
    assert checkpoint["tokenizer"]["class_path"].endswith(".Char")
    assert json.loads(checkpoint["tokenizer_state"])
    assert checkpoint["head_info"] == {"labels": ["a", "b"]}
    assert checkpoint["config"]["data"]["batch_size"] == 2
    json.dumps(checkpoint)  # plain data, all of it


STEPS = ("--model.scheduler", "{name: cosine, warmup_steps: 1, total_steps: 4}")


@pytest.mark.parametrize("how", ["last", "last with dropout", "file with config", "file alone"])
def test_resume(how: str, data: Path, tmp_path: Path) -> None:
    """Two steps and two more give what four give: batch order, optimizer, schedule and dropout included."""
    words = [*of_head("generation", data), *TINY, *STEPS, "--output", str(tmp_path)]
    words += ["--model.dropout", "0.1" if "dropout" in how else "0"]
    whole = done("fit", *words, "--name", "whole", "--trainer.max_steps", "4")
    half = done("fit", *words, "--name", "half")
    more = ("--name", "half", "--trainer.max_steps", "4")
    if how.startswith("last"):
        resumed = done("fit", *words, *more, "--ckpt_path", "last")
    elif how == "file with config":
        resumed = done("fit", "--config", half.folder / "config.yaml", *more, "--ckpt_path", half.checkpoint)
    else:
        resumed = done("fit", "--ckpt_path", half.checkpoint, "--trainer.max_steps", "4")
    assert resumed.folder == tmp_path / "half" / "version_1"
    one, two = content(whole.checkpoint), content(resumed.checkpoint)
    assert content(half.checkpoint)["global_step"] == 2
    assert one["global_step"] == two["global_step"] == 4
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key


def test_precedence(data: Path, tmp_path: Path) -> None:
    """A value is the checkpoint's, unless a config file gives it, unless the command line does."""
    result = fit(data, tmp_path, "--model.dropout", "0.1")
    config = write(tmp_path / "c.yaml", {"model": {"dropout": 0.2}, "data": {"batch_size": 3}})
    expected = {(): (0.1, 2), ("--config", str(config)): (0.2, 3)}
    expected[("--config", str(config), "--model.dropout", "0.3", "--data.batch_size", "4")] = (0.3, 4)
    for words, values in expected.items():
        again = done("fit", "--ckpt_path", result.checkpoint, "--trainer.max_steps", "3", "--output", tmp_path, *words)
        saved = yaml.safe_load((again.folder / "config.yaml").read_text())
        assert (saved["model"]["dropout"], saved["data"]["batch_size"]) == values
        assert saved["model"]["dim"] == 16
        last = again.folder / "checkpoints" / "last.ckpt"
        assert content(last)["llmkit"]["model"]["dropout"] == values[0]


def test_precedence_of_decoding(data: Path, tmp_path: Path) -> None:
    """What a head says of decoding holds where nobody says otherwise: a translation stays a beam search."""
    result = fit(data, tmp_path, head="translation")  # sets model.decoding.max_new_tokens
    assert load(result.checkpoint).head.decoding == DecodingOptions(max_new_tokens=4, temperature=0.0, num_beams=5)


@pytest.mark.parametrize("head", HEADS)
def test_commands_that_need_no_config(head: str, data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path, head=head)
    (result.folder / "config.yaml").unlink()
    given = (
        *("--ckpt_path", result.checkpoint, "--output", tmp_path / "after", "--trainer.enable_progress_bar", "false"),
        *(
            "--model.decoding.temperature",
            "0",
            "--model.decoding.num_beams",
            "1",
            "--trainer.precision",
            "32-true",
        ),  # as infer --greedy
    )
    validated = done("validate", *given)
    fitted = json.loads((result.folder / "results.json").read_text())
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "after").rglob("results.json")}
    assert len(found) == 1
    assert set(fitted) == set(found.popitem()[1])  # the values differ: the fit measured one batch only
    tested = done("test", *given)
    assert "test_loss" in "".join(path.read_text() for path in (tmp_path / "after").rglob("results.json"))
    assert "loss" in validated.out
    assert "loss" in tested.out

    predicted = done("predict", *given, "--data.predict", data / "rows.txt")
    (path,) = (tmp_path / "after").rglob("predictions.jsonl")
    assert str(path) in predicted.out
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = (data / "rows.txt").read_text().splitlines()
    assert len(lines) == len(rows)
    if head != "classification":
        assert [line["prompt" if head == "generation" else "source"] for line in lines] == rows
    single = answers(result, *rows, "--greedy", "--batch_size", 1)
    if head != "classification":
        assert lines == single
        return
    for line, answer in zip(lines, single, strict=True):
        assert line["label"] == answer["label"]
        assert line["probability"] == pytest.approx(answer["probability"], abs=1e-5)  # padding rounds otherwise


def test_metrics_of_test_are_those_of_validate(data: Path, tmp_path: Path) -> None:
    """The same rows give the same numbers, whatever they are called."""
    result = fit(data, tmp_path)
    given = ("--ckpt_path", result.checkpoint, "--data.validation", data / "text.txt")
    found: dict[str, float] = {}
    for command in ("validate", "test"):
        limit = ("--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0")
        done(command, *given, *limit, "--output", tmp_path / command)
        (path,) = (tmp_path / command).rglob("results.json")
        found |= json.loads(path.read_text())
    assert found["val_loss"] == found["test_loss"]
    assert found["val_bits_per_byte"] == found["test_bits_per_byte"]


# Python


def api_fit(data: Path, head: str) -> LanguageModel:
    file = {"generation": "text.txt", "classification": "labels.csv", "translation": "pairs.tsv"}[head]
    module = DataModule(train=str(data / file), tokenizer=plugin("tokenizer", "char"), batch_size=4)
    model = LanguageModel(
        head=plugin("head", head),
        attention=plugin("attention", "multi_head", num_heads=2),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        dim=16,
        num_layers=1,
        context=16,
        dropout=0.2,
        decoding=DecodingOptions(max_new_tokens=5, temperature=0.0),
    )
    trainer = pl.Trainer(
        max_steps=3,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, module)
    trainer.save_checkpoint(data / f"{head}.ckpt")
    return model


@pytest.mark.parametrize("head", HEADS)
def test_load_gives_the_trained_model(head: str, data: Path) -> None:
    model = api_fit(data, head)
    loaded = load(data / f"{head}.ckpt")
    assert not any(module.training for module in loaded.modules())
    assert isinstance(loaded, nn.Module)
    assert model.predict(list(PROMPTS)) == loaded.predict(list(PROMPTS))
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    assert loaded.spec == model.spec


def test_lightnings_own_loading(data: Path) -> None:
    """``load_from_checkpoint`` either gives the model or says what to use; it never gives an untrained one."""
    model = api_fit(data, "generation")
    try:
        loaded = LanguageModel.load_from_checkpoint(data / "generation.ckpt")
    except UserError as error:
        assert "llmkit.load" in str(error)
        return
    assert loaded.eval().predict(list(PROMPTS)) == model.predict(list(PROMPTS))


def test_unknown_checkpoint_in_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nope.ckpt")


def test_infer_reads_lines_of_a_file(data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path, head="classification")
    rows = (data / "rows.txt").read_text().splitlines()
    from_file = done("infer", result.checkpoint, "--input", data / "rows.txt").out
    assert from_file == done("infer", result.checkpoint, *rows).out
    assert from_file.count("\n") == len(rows)
    assert llmkit("infer", result.checkpoint, "--input", data / "rows.txt", "--json").out.count("\n") == len(rows)


# model.compile


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch._dynamo.reset()  # graphs of other tests' networks count towards torch's limit
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


@pytest.mark.parametrize("head", ["generation", "classification", "translation"])
def test_compile_is_one_key(head: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    compile_with(monkeypatch, counter)
    exact = ("--trainer.precision", "32-true", "--trainer.accelerator", "cpu")
    plain = fit(data, tmp_path / "plain", *exact, head=head)
    assert counter.frame_count == 0
    compiled = fit(data, tmp_path / "compiled", *exact, "--model.compile", "true", head=head)
    assert counter.frame_count > 0
    found, wanted = (json.loads((run.folder / "results.json").read_text()) for run in (compiled, plain))
    assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-5)
    model = load(compiled.folder / "checkpoints" / "last.ckpt")
    assert model.net is not None and not model.net._runs_compiled


def test_a_compiler_that_fails_is_told_in_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise RuntimeError("no compiler found")

    compile_with(monkeypatch, missing)
    words = (*of_head("generation", data), *TINY, "--output", tmp_path, "--model.compile", "true")
    result = llmkit("fit", *words)
    assert result.code == 2
    assert "model.compile: torch.compile failed: " in result.err and "no compiler found" in result.err
    assert "Traceback" not in result.err and "Training works without it." in result.err

"""Default, checkpoint, files and command line are layers of one tree, and a value means the same in each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import llmkit

from llmkit import LanguageModel, UserError
from llmkit.check import Raw, check_arguments, fits
from llmkit.config.plan import Plan, plan


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text\n")
    yield


def planned(content: str = "", *words: str) -> Plan:
    Path("x.yaml").write_text(f"data: {{train: text.txt}}\n{content}")
    return plan("fit", ["--config", "x.yaml", *words])


def model(content: str = "", *words: str) -> dict[str, Any]:
    found: dict[str, Any] = planned(content, *words).config.tree["model"]
    return found


def test_a_mapping_without_a_name_changes_the_plugin_below_it() -> None:
    assert model("model: {attention: {num_heads: 8}}")["attention"]["class_path"].endswith("MultiHead")
    assert model("model: {attention: {num_heads: 8}}")["attention"]["init_args"]["num_heads"] == 8
    Path("above.yaml").write_text("model: {attention: {dropout: 0.5}}\n")
    given = model("model: {attention: {name: grouped_query, num_kv_heads: 1}}", "--config", "above.yaml")["attention"]
    assert given["class_path"].endswith("GroupedQuery")
    assert given["init_args"]["num_kv_heads"] == 1 and given["init_args"]["dropout"] == 0.5
    words = ("--model.attention", "lstm", "--model.attention.num_heads", "2")
    with pytest.raises(UserError, match="command line: model.attention: LSTM has no argument 'num_heads'"):
        planned("", *words)


def test_another_class_takes_none_of_the_old_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    content = "model: {optimizer: {name: adamw, lr: 0.5, weight_decay: 0.25}}"
    given = model(content, "--model.optimizer", "muon")["optimizer"]["init_args"]
    assert given["lr"] == 0.02 and given["weight_decay"] == 0.01  # those of Muon, not what AdamW was given
    note = capsys.readouterr().err
    assert "lr: 0.5, weight_decay: 0.25 of x.yaml:2 no longer applies" in note
    assert model(content, "--model.optimizer.lr", "0.125")["optimizer"]["init_args"]["weight_decay"] == 0.25
    assert capsys.readouterr().err == ""


OTHER = "data.train is another one now (command line). "


@pytest.mark.parametrize(
    ("content", "words", "left", "says"),
    [
        (
            "validation: v.txt, test: t.txt, pattern: '(?P<text>.*)'",
            ("--data.train", "new.txt"),
            {"train": "new.txt", "validation": None, "test": None, "pattern": "(?P<text>.*)"},
            OTHER + "Left out with the old one: data.validation (x.yaml:1), data.test (x.yaml:1); set them too to keep "
            "them. Still in force: data.pattern (x.yaml:1).",
        ),
        (  # in either order, and each split for itself
            "validation: {text: v.txt}, test: t.txt",
            ("--data.validation", "mine.txt", "--data.train", "[new.txt]", "--data.test", "t.txt"),
            {"train": ["new.txt"], "validation": "mine.txt", "test": "t.txt"},
            "",
        ),
        (
            "validation: v.txt, encoding: latin-1",
            ("--config", "above.yaml"),
            {"train": "above.txt", "validation": "above.v", "encoding": "latin-1"},
            "data.train is another one now (above.yaml). Still in force: data.encoding (x.yaml:1).",
        ),
        ("validation: v.txt", ("--data.train", "text.txt"), {"train": "text.txt", "validation": "v.txt"}, ""),
        ("validation: v.txt", ("--data.train+=more.txt",), {"validation": "v.txt"}, ""),
        ("test: t.txt", ("--data.validation", "mine.txt"), {"train": "text.txt", "test": "t.txt"}, ""),
        (
            "test: t.txt, validation: v.txt",
            ("--data.source", "hub/name"),
            {"train": None, "validation": None, "test": None, "source": "hub/name"},
            "data.source is another one now (command line). Left out with the old one: data.train (x.yaml:1), "
            "data.validation (x.yaml:1), data.test (x.yaml:1); set",
        ),
        (
            "source: hub/name, train: train, validation: dev",
            ("--data.train", "train[:10%]"),
            {"train": "train[:10%]", "validation": "dev"},
            "",
        ),
    ],
)
def test_other_training_data_leave_out_the_splits_of_the_old(
    content: str, words: tuple[str, ...], left: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = "" if "train:" in content else "train: text.txt, "
    Path("x.yaml").write_text(f"data: {{{train}{content}}}\n")
    Path("above.yaml").write_text("data: {train: above.txt, validation: above.v}\n")
    data = plan("fit", ["--config", "x.yaml", *words]).config.tree["data"]
    assert {name: data[name] for name in left} == left
    told = capsys.readouterr().err
    assert says in told and bool(says) == bool(told)


@pytest.mark.parametrize("text", ["1e3", "1e-3", "010", "12:30", "no", "2024-01-01", "0x10", "[a, b]", "null"])
def test_a_word_means_what_it_means_in_a_file(text: str) -> None:
    for key in ("model.dim", "model.dropout", "model.tie_embeddings", "trainer.max_steps"):
        group, name = key.split(".")
        outcomes = []
        for content, words in ((f"{group}: {{{name}: {text}}}", ()), ("", (f"--{key}", text))):
            try:
                outcomes.append(planned(content, *words).config.tree[group][name])
            except UserError as error:
                outcomes.append(str(error).partition(f"{key}: ")[2])
        assert outcomes[0] == outcomes[1], key


def test_text_stays_text_on_the_command_line() -> None:
    tree = planned("", "--name", "123", "--data.train", "2024", "--model.init_from", "5").config.tree
    assert tree["name"] == "123" and tree["data"]["train"] == "2024" and tree["model"]["init_from"] == "5"


def test_classes_of_the_trainer() -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    callbacks = ("--trainer.callbacks", "LearningRateMonitor", "--trainer.callbacks+=DeviceStatsMonitor")
    trainer = planned("", *logger, *callbacks).config.tree["trainer"]
    assert trainer["logger"] == {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "logs"},
    }
    names = ("LearningRateMonitor", "DeviceStatsMonitor")
    assert trainer["callbacks"] == [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in names]
    with pytest.raises(UserError, match="command line: trainer.callbacks: EarlyStopping needs monitor"):
        planned("", "--trainer.callbacks", "EarlyStopping")
    with pytest.raises(UserError, match="command line: trainer.logger: CSVLogger has no argument 'save_dri'"):
        planned("", *logger[:2], "--trainer.logger.save_dri", "logs")


def test_places_survive_until_the_run() -> None:
    """What a plugin raises when it is built has the place of the argument that its message names."""
    Path("x.yaml").write_text("data: {train: text.txt}\nmodel:\n  attention: {name: multi_head, num_heads: 7}\n")
    result = llmkit("fit", "--config", "x.yaml")
    assert result.code == 2
    assert result.err.startswith("llmkit: error: x.yaml:3: model.attention.num_heads: dim 256 is not divisible by")


def test_the_walk_fills_in_and_types() -> None:
    given: dict[str, Any] = {"dim": Raw("8", 8), "attention": "lstm", "decoding": {"top_k": 3}}
    tree, problems = check_arguments(LanguageModel, given, "model")
    assert problems == []
    assert type(tree["dim"]) is int and tree["dim"] == 8
    assert tree["num_layers"] == 4 and tree["decoding"]["temperature"] == 0.8
    assert tree["attention"] == {"class_path": "llmkit_plugins.attention.recurrent.LSTM", "init_args": {}}
    assert list(tree)[:3] == ["head", "attention", "cross_attention"]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [3], ["3", 3.5, None, True]),
        (float, [3, 0.5], ["0.5", None]),
        (bool, [True], [1, "true", None]),
        (str, ["3", ""], [3, None, ["a"]]),
        (int | None, [None, 2], ["x"]),
        (list[str] | str, ["a", ["a", "b"]], [[1], {"a": "b"}]),
        (dict[str, str], [{"a": "b"}], ["a", {"a": [1]}]),
    ],
)
def test_fits(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert [fits(kind, value) for value in good] == [True] * len(good)
    assert [fits(kind, value) for value in bad] == [False] * len(bad)


def test_nulls_and_keys_of_other_types() -> None:
    tree = planned("model: {decoding: null}\n", "--model.optimizer.name", "sgd").config.tree["model"]
    assert tree["optimizer"]["class_path"] == "torch.optim.SGD" and tree["decoding"]["max_new_tokens"] == 200
    Path("x.yaml").write_text("data: {train: text.txt, columns: {no: 010, 1: b}}\n")
    assert plan("fit", ["--config", "x.yaml"]).config.tree["data"]["columns"] == {"no": "010", "1": "b"}
    with pytest.raises(UserError, match="x.yaml:2: unknown key 'model.5'"):
        planned("model: {5: 3}")
    with pytest.raises(UserError, match="x.yaml:2: name.*expected text"):
        planned("name: {a: b}")


def test_variables_are_filled_in_before_a_checkpoint_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "there")
    monkeypatch.setenv("NOTHING", "")
    words = ["--config", "x.yaml", "--output", "${PLACE}/runs${NOTHING}", "--ckpt_path", "best"]
    with pytest.raises(UserError, match="command line: --ckpt_path best: no run below there/runs/x has a checkpoint"):
        planned("", *words)

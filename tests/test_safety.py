"""Checkpoints, tokenizer files and configs that mean harm: nothing of them runs, and nothing is written elsewhere."""

from __future__ import annotations

import copy
import io
import json
import os
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clock import within
from command import TINY, Result, done, llmkit

from llmkit import LanguageModel, UserError, imports, load
from llmkit.check import check_arguments
from llmkit.run.cli import GROUPS

TEXT = "".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safety")
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    """A checkpoint of a language model."""
    return done("fit", "--data.train", folder / "text.txt", *TINY, "--output", folder / "runs").checkpoint


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the working folder, importable, that leaves a file behind when it is imported."""
    here = tmp_path / "here"
    here.mkdir()
    sentinel = here / "it_ran"
    (here / "bait.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: ...\ndef call(*args): ...\n")
    (here / "bait.yaml").write_text("class_path: bait.Evil\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    before = set(tmp_path.rglob("*"))
    yield here
    assert not sentinel.exists()
    assert "bait" not in sys.modules
    assert {path for path in tmp_path.rglob("*") if "runs" not in path.parts} - before <= {
        here / "x.ckpt",
        here / "x.yaml",
    }


def changed(good: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write a copy of a checkpoint that was changed."""
    content = torch.load(good, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def refused(call: Callable[[], object]) -> str:
    """Return the message of the error that refuses a file, at once."""

    def message() -> str:
        with pytest.raises(UserError) as error:
            call()
        return str(error.value)

    return within(2, message)


def refused_by_all(path: Path, *says: str) -> None:
    """The Python interface, the commands and ``init_from`` refuse a checkpoint in one line, and at once."""
    error = refused(lambda: load(path))
    assert str(path) in error and all(word in error for word in says), error
    with pytest.raises(UserError, match="model.init_from: checkpoint"):
        LanguageModel(init_from=str(path), dim=16, num_layers=1, context=16)
    for words in (("infer", path, "x"), ("validate", "--ckpt_path", path), ("fit", "--ckpt_path", path)):
        result = llmkit(*words)
        assert result.code == 2 and str(path) in one_line(result), result.err


def one_line(result: Result) -> str:
    (line,) = (line for line in result.err.splitlines() if not line.startswith("llmkit: note"))
    return line


# --- checkpoints: what is in the file


class Runs:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_that_runs_code(good: Path, bait: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        content["llmkit"]["head_info"] = Runs(f"touch {bait / 'it_ran'}")

    refused_by_all(changed(good, bait / "x.ckpt", add), "more than plain data")


def repacked(good: Path, path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    """Write a copy of a checkpoint whose members were changed, with the right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name.rpartition("/")[2], old.read(name)))
    path.write_bytes(buffer.getvalue())
    return path


def test_sizes_that_a_file_does_not_have(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    bomb = repacked(good, path, lambda name, data: bytes(10**7) if name == "0" else data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    refused_by_all(bomb, "claims to hold more than it does")

    plain = good.read_bytes()
    start = plain.index(b"data/0")
    path.write_bytes(plain[: start + 200] + bytes([plain[start + 200] ^ 1]) + plain[start + 201 :])
    refused_by_all(path, "checksum")

    def expanded(content: dict[str, Any]) -> None:
        content["state_dict"]["net.embedding.weight"] = torch.zeros(1, 16).expand(10**9, 16)

    refused_by_all(changed(good, path, expanded), "claims more numbers than are stored")

    def deep(name: str, data: bytes) -> bytes:
        # 10,000 empty lists, each put into the one before: pickle's opcodes ']' and 'a'.
        return b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"." if name == "data.pkl" else data

    refused_by_all(repacked(good, path, deep), "nested too deeply")

    def wide(content: dict[str, Any]) -> None:
        value: list[Any] = [0]
        for _ in range(40):
            value = [value, value]  # 2 ** 40 numbers in some hundred bytes
        content["llmkit"]["head_info"] = {"labels": value}

    refused_by_all(changed(good, path, wide), "more values than any checkpoint")


def set_at(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets ``keys[:-1]`` of llmkit's part to ``keys[-1]``."""

    def change(content: dict[str, Any]) -> None:
        node = content["llmkit"]
        for key in keys[:-2]:
            node = node[key]
        node[keys[-2]] = keys[-1]

    return change


NAN = float("nan")
STATE = '{"tokenizer": "Char", "characters": "%s"}'
DESCRIPTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "layers": (set_at("model", "num_layers", 10**9), ("num_layers 1000000000", "weights allow")),
    "dim": (set_at("model", "dim", 10**9), ("dim 1000000000", "weights allow")),
    "context": (set_at("model", "context", 10**12), ("context 1000000000000",)),
    "text": (set_at("model", "dim", "16"), ("model.dim: expected a whole number", "'16'")),
    "nan": (set_at("model", "num_layers", NAN), ("model.num_layers: expected a whole number", "NaN")),
    "bool": (set_at("model", "num_layers", True), ("model.num_layers: expected a whole number", "'true'")),
    "huge": (set_at("model", "dim", 2**70), ("number that is too large",)),
    "no class": (set_at("model", "attention", {}), ("attention has no class_path",)),
    "argument": (set_at("model", "attention", "init_args", "num_heads", "4"), ("model.attention.num_heads: expected",)),
    "tokens": (set_at("model", "decoding", "max_new_tokens", 10**9), ("max_new_tokens",)),
    "keys": (set_at("config", 3, 4), ("keys that are no text",)),
    "state": (set_at("tokenizer_state", "{"), ("tokenizer", "not valid JSON")),
    "vocabulary": (
        set_at("tokenizer_state", STATE % "abc"),
        ("has (27, 16), the config (9, 16)",),
    ),
    "config": (set_at("config", []), ("its config should be a mapping",)),
    "init_from": (set_at("model", "init_from", "/etc/passwd"), ("init_from",)),
    "format": (set_at("format", True), ("not an llmkit checkpoint",)),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_descriptions_that_are_wrong(kind: str, good: Path, tmp_path: Path) -> None:
    change, says = DESCRIPTIONS[kind]
    path = changed(good, tmp_path / "x.ckpt", change)
    error = refused(lambda: load(path))
    assert str(path) in error and all(word in error for word in says), error
    for words in (("infer", path, "x"), ("validate", "--ckpt_path", path)):
        result = llmkit(*words)
        if kind in ("argument", "init_from") and words[0] == "validate":
            continue  # a command says it of the key, or takes the model from its own config
        assert result.code == 2 and str(path) in one_line(result), result.err


def test_labels_of_another_type(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(40)))
    words = ("--data.train", tmp_path / "labels.csv", *TINY, "--output", tmp_path, "--model.head", "classification")
    trained = done("fit", *words).checkpoint
    for labels in ("ab", [1, 2], {"a": 1, "b": 2}, ["a", "b", "c"], None):
        path = changed(trained, tmp_path / "x.ckpt", set_at("head_info", "labels", labels))
        with pytest.raises(UserError, match="head_info|weights do not fit"):
            load(path)


def test_weights_that_are_not_finite(good: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["state_dict"]["net.decoder_norm.weight"].fill_(NAN)

    result = llmkit("infer", changed(good, tmp_path / "x.ckpt", change), "x")
    assert result.code == 2 and "NaN" in one_line(result)


# --- checkpoints: the classes they name, the files they write

CLASSES = ["os.system", "subprocess.Popen", "bait.Evil", "llmkit.__main__.main", "torch.hub.load", "builtins.eval"]


@pytest.mark.parametrize("path", CLASSES)
def test_a_checkpoint_that_names_a_class(path: str, good: Path, bait: Path) -> None:
    for key in ("attention", "optimizer"):
        spec = {"class_path": path, "init_args": {"command": f"touch {bait / 'it_ran'}"}}
        file = changed(good, bait / "x.ckpt", set_at("model", key, spec))
        for words in (("infer", file, "x"), ("validate", "--ckpt_path", file), ("fit", "--ckpt_path", file)):
            result = llmkit(*words)
            assert result.code == 2 and f"needs {key} {path}, which is not an installed plugin" in one_line(result)
    file = changed(good, bait / "x.ckpt", set_at("tokenizer", "class_path", path))
    refused_by_all(file, f"needs tokenizer {path}")


def test_a_checkpoint_adds_no_imports(good: Path, bait: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["llmkit"]["config"]["imports"] = [str(bait / "bait.py")]
        content["llmkit"]["model"]["attention"] = {"class_path": "bait.Evil", "init_args": {}}

    result = llmkit("fit", "--ckpt_path", changed(good, bait / "x.ckpt", change))
    assert result.code == 2 and f"--imports {bait / 'bait.py'}" in one_line(result)


def test_a_checkpoint_says_nothing_of_where_files_go(good: Path, folder: Path, tmp_path: Path) -> None:
    """Neither output, nor name, nor what writes files beside the training."""

    def change(content: dict[str, Any]) -> None:
        own = content["llmkit"]["config"]
        own |= {"output": str(tmp_path / "elsewhere"), "name": "../../elsewhere"}
        own["data"]["cache_dir"] = str(tmp_path / "elsewhere")
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path / "other")},
        }
        own["trainer"] |= {"logger": logger, "default_root_dir": str(tmp_path / "root"), "profiler": "simple"}
        own["trainer"] |= {"callbacks": [{"class_path": "os.system"}], "strategy": {"class_path": "os.system"}}

    here = tmp_path / "runs" / "mine" / "version_0" / "checkpoints"
    here.mkdir(parents=True)
    path = changed(good, here / "x.ckpt", change)
    result = done("fit", "--ckpt_path", path, "--trainer.max_steps", "3")
    assert result.folder == tmp_path / "runs" / "mine" / "version_1"
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs"}
    for key in ("logger", "default_root_dir", "profiler", "callbacks", "strategy"):
        assert f"trainer.{key}" in result.err
    assert result.err.count("give --config") == 1
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 3 and saved["data"]["batch_size"] == 2


def test_a_checkpoint_does_not_have_files_deleted(good: Path, tmp_path: Path) -> None:
    """Lightning's ModelCheckpoint deletes the files that a checkpoint names, below its own folder as it believes."""

    def change(content: dict[str, Any]) -> None:
        content["callbacks"]["ModelCheckpoint{}"] = {"last_model_path": "runs/x/checkpoints/../../../precious"}

    with pytest.raises(UserError, match="ModelCheckpoint in it names"):
        load(changed(good, tmp_path / "x.ckpt", change))


def test_training_state_that_is_damaged(good: Path, tmp_path: Path) -> None:
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda content: content.update(loops=3),
        lambda content: content["optimizer_states"][0]["param_groups"].pop(),
        lambda content: content["lr_schedulers"][0].update(last_epoch="x"),
    ]
    for change in changes:
        path = changed(good, tmp_path / "x.ckpt", change)
        result = llmkit("fit", "--ckpt_path", path, "--output", tmp_path, "--trainer.max_steps", "4")
        assert result.code == 2 and f"{path}: its training state is damaged" in one_line(result), result.err
        assert load(path)  # its weights are good


# --- configs

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "attention": ({"model": {"attention": "bait.Evil"}}, "model.attention: bait.Evil"),
    "attention by name": ({"model": {"attention": {"name": "bait.Evil"}}}, "model.attention: bait.Evil"),
    "optimizer": ({"model": {"optimizer": {"class_path": "subprocess.Popen"}}}, "model.optimizer: subprocess.Popen"),
    "callbacks": ({"trainer": {"callbacks": [{"class_path": "bait.Evil"}]}}, "trainer.callbacks: bait.Evil"),
    "callback": ({"trainer": {"callbacks": "bait.Evil"}}, "trainer.callbacks: bait.Evil"),
    "logger": ({"trainer": {"logger": {"class_path": "os.system"}}}, "trainer.logger: os.system"),
    "strategy": ({"trainer": {"strategy": "bait.Evil"}}, "trainer.strategy: bait.Evil"),
    "tokenizer": ({"data": {"tokenizer": "bait.Evil"}}, "data.tokenizer: bait.Evil"),
    "file": ({"trainer": {"callbacks": ["bait.yaml"]}}, "trainer.callbacks: 'bait.yaml' would be read as a file"),
    "function": (
        {"model": {"scheduler": {"name": "LambdaLR", "lr_lambda": "bait.call"}}},
        "model.scheduler.lr_lambda: bait.call",
    ),
    "nested": (
        {"model": {"optimizer": {"name": "adamw", "betas": [0.9, {"class_path": "bait.Evil"}]}}},
        "model.optimizer.betas: bait.Evil",
    ),
    "main": ({"trainer": {"callbacks": "llmkit.__main__.main"}}, "begin with '__'"),
    "name": ({"name": "../../x"}, "name: expected a relative path without '..'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_names_code(kind: str, folder: Path, bait: Path) -> None:
    tree, says = CONFIGS[kind]
    (bait / "x.yaml").write_text(yaml.safe_dump(tree))
    for command in ("fit", "inspect"):
        words = (command, "--config", bait / "x.yaml", "--data.train", folder / "text.txt", "--output", bait / "runs")
        result = llmkit(*words, "--trainer.max_steps", "1")
        assert result.code == 2 and says in one_line(result), result.err


@pytest.mark.parametrize(
    "words", [("--trainer.callbacks", "[bait.Evil]"), ("--trainer.callbacks.part", "{class_path: bait.Evil}")]
)
def test_a_command_line_that_names_code(words: tuple[str, str], folder: Path, bait: Path) -> None:
    result = llmkit("fit", "--data.train", folder / "text.txt", *words)
    assert result.code == 2 and "trainer.callbacks: " in one_line(result)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [touch it_ran]", "!!python/name:bait.Evil ''"])
def test_yaml_that_builds_objects(tag: str, bait: Path) -> None:
    (bait / "x.yaml").write_text(f"model: {tag}\n")
    result = llmkit("fit", "--config", bait / "x.yaml")
    assert result.code == 2 and "x.yaml:1: not valid YAML" in one_line(result)
    result = llmkit("fit", "--data.train", "x", "--model.attention", f"{{name: {tag}}}")
    assert result.code == 2


def test_what_is_installed_or_imported_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "imported", {"mine", "package.part"})
    for path in ("torch.optim.SGD", "lightning.pytorch.callbacks.EarlyStopping", "torchmetrics.Metric", "yaml.Loader"):
        assert not imports.refusal(path), path
    for path in ("mine.Class", "package.other.Class", "llmkit.model.optim.Muon", "llmkit_plugins.norm.RMSNorm"):
        assert not imports.refusal(path) and imports.is_plugin(path), path
    for path in ("os.system", "subprocess.Popen", "test_safety.Runs", "nowhere.Class", "torch.__main__.x", "mine"):
        assert bool(imports.refusal(path)) == (path != "mine"), path
    for path in ("lightning.pytorch.callbacks.EarlyStopping", "yaml.Loader", "torch.hub.load"):
        assert not imports.is_plugin(path), path


def test_texts_that_only_look_like_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.syspath_prepend(tmp_path)  # now 'tokenizer' can be imported
    tree: dict[str, dict[str, Any]] = {
        "model": {"init_from": "os.path", "optimizer": {"name": "adamw", "lr": 1e-3}, "attention": "lstm"},
        "data": {"train": "json.tool", "tokenizer": {"name": "pretrained", "path": "tokenizer.json"}},
        "trainer": {"strategy": "auto", "default_root_dir": "test.runs", "callbacks": ["LearningRateMonitor"]},
    }
    before = copy.deepcopy(tree)
    for group, cls in GROUPS.items():
        tree[group], problems = check_arguments(cls, tree.get(group, {}), group)
        assert problems == []
    plugins = {"optimizer", "attention", "tokenizer"}
    for group, given in before.items():
        assert all(tree[group][name] == value for name, value in given.items() if name not in plugins)


# --- tokenizer files and the network


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket can be opened."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_no_command_opens_a_socket(folder: Path, tmp_path: Path, offline: None) -> None:
    """Also with a tokenizer that others trained, whose file is gone when the checkpoint is used."""
    state = json.loads(torch.load(done_word(folder, tmp_path), weights_only=True)["llmkit"]["tokenizer_state"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state["model"]))
    tokenizer = ("--data.tokenizer", f"{{name: pretrained, path: {tmp_path / 'tokenizer.json'}}}")
    options = [word for word in TINY if word not in ("--data.tokenizer", "char")]
    words = ("--data.train", folder / "text.txt", *options, *tokenizer)
    path = done("fit", *words, "--output", tmp_path / "p").checkpoint
    (tmp_path / "tokenizer.json").unlink()
    assert done("infer", path, "word").out
    done("validate", "--ckpt_path", path, "--output", tmp_path / "v")
    done("fit", "--ckpt_path", path, "--trainer.max_steps", "3")
    hub = changed(path, tmp_path / "x.ckpt", set_at("tokenizer", "init_args", "path", "some/model"))
    assert done("infer", hub, "word").out


def done_word(folder: Path, tmp_path: Path) -> Path:
    """Train with a tokenizer of ``tokenizers``; returns the checkpoint."""
    options = [word for word in TINY if word not in ("--data.tokenizer", "char")]
    words = ("--data.train", folder / "text.txt", *options, "--data.tokenizer", "word", "--output", tmp_path / "w")
    return done("fit", *words).checkpoint


def test_a_tokenizer_file_with_paths(bait: Path) -> None:
    """Nothing in a tokenizer's file is a path to it; ids far apart would make it write for minutes."""
    from llmkit_plugins.tokenizer import Pretrained

    model = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    file = bait.parent / "runs.json"
    file.write_text(json.dumps(content))
    assert Pretrained(str(file)).encode("a") == [0]
    file.write_text(json.dumps({**content, "path": str(bait / "bait.py")}))
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        Pretrained(str(file)).encode("a")
    model["vocab"] = {"a": 0, "<unk>": 4_000_000_000}
    model |= {"vocab_file": str(bait / "x"), "cache": "/etc/passwd"}
    file.write_text(json.dumps(content))
    error = refused(lambda: Pretrained(str(file)).encode("a"))
    assert "its largest id is 4,000,000,000, and it has only 2 tokens" in error
    file.unlink()

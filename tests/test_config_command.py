"""``llmkit config show`` and ``diff``: the effective config with its origins, and what differs between two."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import TINY, Result, done, llmkit

from llmkit import imports, main, registry
from llmkit.check import settled
from llmkit.commands.config.tree import inline
from llmkit.config.files import read_yaml
from llmkit.run.cli import TRAINER_DEFAULTS

LOCAL = Path(__file__).resolve().parent.parent / "examples" / "local_plugin"


@pytest.fixture
def _no_local_plugins() -> Iterator[None]:
    """Undo the import of the example's plugin, so that other tests do not see it."""
    yield
    sys.modules.pop("running_mean", None)
    imports.imported.discard("running_mean")
    registry._local["attention"].pop("running_mean", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: a config, its data, and a run of it."""
    path = tmp_path_factory.mktemp("config")
    (path / "text.txt").write_text("".join(f"line {i} of the text has words {i * 7 % 13}\n" for i in range(60)))
    (path / "small.yaml").write_text(
        "# A comment.\n"
        "data:\n"
        "  train: text.txt\n"
        "  tokenizer: {name: char}\n"
        "model:\n"
        "  attention:\n"
        "    name: multi_head\n"
        "    num_heads: 2\n"
        "  optimizer: {class_path: llmkit.model.optim.AdamW, init_args: {lr: 1e-2}}\n"
        "  decoding: {temperature: 0.5}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def run(folder: Path) -> Result:
    return done("fit", "--config", "small.yaml", *TINY, "--data.tokenizer", "byte")


def shown(*words: str) -> dict[str, tuple[Any, str]]:
    found = json.loads(done("config", "show", *words, "--json").out)
    return {key: (item["value"], item["origin"]) for key, item in found.items()}


def test_every_value_has_its_origin(folder: Path) -> None:
    found = shown("--config", "small.yaml", "--model.dim", "64", "--model.attention.dropout=0.1", "--data.pack", "true")
    assert found["name"] == ("small", "default")
    assert found["data.train"] == ("text.txt", "small.yaml:3")
    assert found["data.tokenizer"] == ("char", "small.yaml:4")
    assert found["data.tokenizer.vocab_size"] == (None, "default")
    assert found["data.pack"] == (True, "command line")
    assert found["data.seed"] == (None, "linked: seed_everything")
    assert found["model.dim"] == (64, "command line")
    assert found["model.attention"] == ("multi_head", "small.yaml:7")
    assert found["model.attention.num_heads"] == (2, "small.yaml:8")
    assert found["model.attention.dropout"] == (0.1, "command line")
    assert found["model.attention.bias"] == (False, "default")
    assert found["model.optimizer"] == ("adamw", "small.yaml:9")
    assert found["model.optimizer.lr"] == (0.01, "small.yaml:9")
    assert found["model.scheduler.total_steps"] == (None, "computed: the run's number of steps")
    assert found["model.decoding.temperature"] == (0.5, "small.yaml:10")
    assert found["model.decoding.max_new_tokens"] == (200, "default of Generation")
    assert found["model.num_layers"] == (4, "default")
    trainer = {key: item for key, item in found.items() if key.startswith("trainer.")}
    assert set(trainer) == {f"trainer.{key}" for key in (*TRAINER_DEFAULTS, "precision", "max_epochs")}
    assert trainer["trainer.max_epochs"] == (10, "default of llmkit")
    assert trainer["trainer.gradient_clip_val"] == (1.0, "default of llmkit")
    assert shown("--config", "small.yaml", "--seed", "3")["seed_everything"] == (3, "command line")
    assert shown("--config", "small.yaml", "--all")["trainer.devices"] == ("auto", "default")
    nested = shown("--config", "small.yaml", "--model.lora", "{rank: 4}", "--model.lora.alpha", "2")
    assert (nested["model.lora.rank"], nested["model.lora.targets"][1]) == ((4, "command line"), "default")
    assert nested["model.lora.alpha"] == (2, "command line")
    assert shown("--config", "small.yaml", "--trainer.num_nodes", "1")["trainer.num_nodes"] == (1, "command line")


@pytest.mark.parametrize(
    ("text", "number"), [("1e3", 1000.0), ("010", 10), ("12:30", None), ("no", False), (".5", 0.5)]
)
def test_yaml_and_the_command_line_mean_the_same(folder: Path, text: str, number: Any) -> None:
    """What looks like a number or a truth value is text where text is asked for, within lists and mappings too."""
    values: dict[str, tuple[str, Any]] = {
        "name": (text, text),
        "data.columns": (f"{{text: {text}}}", {"text": text}),
        "data.column_names": (f"[{text}, a]", [text, "a"]),
    }
    if number is not None:
        key = "data.pack" if number is False else "model.optimizer.lr"
        values[key] = (text, number)
        if number is not False:
            values["model.optimizer.betas"] = (f"[{text}, 0.9]", [number, 0.9])
    lines = [f"{{{key.replace('.', ': {')}: {value}{'}' * (key.count('.') + 1)}" for key, (value, _) in values.items()]
    for i, line in enumerate(lines):
        (folder / f"same{i}.yaml").write_text(line)
    files = [word for i in range(len(lines)) for word in ("--config", f"same{i}.yaml")]
    options = [word for key, (value, _) in values.items() for word in (f"--{key}", value)]
    base = ("--config", "small.yaml")
    in_files, on_line = shown(*base, *files), shown(*base, *options)
    for key, (_, expected) in values.items():
        found = {name: value for name, (value, _) in in_files.items() if name == key or name.startswith(f"{key}.")}
        assert found == {name: on_line[name][0] for name in found}
        assert found.get(key, {k.removeprefix(f"{key}."): v for k, v in found.items()}) == expected


@pytest.mark.usefixtures("_no_local_plugins")
def test_the_origin_of_imports(folder: Path) -> None:
    plugin = str(LOCAL / "running_mean.py")
    found = shown("--config", str(LOCAL / "running_mean.yaml"))
    assert found["imports"] == ([plugin], f"{LOCAL / 'running_mean.yaml'}:3")
    assert found["model.attention"] == ("running_mean", f"{LOCAL / 'running_mean.yaml'}:9")
    assert shown("--config", "small.yaml", "--imports", plugin)["imports"] == ([plugin], "command line")


def test_what_is_shown_is_a_config_with_comments(folder: Path) -> None:
    words = ("--config", "small.yaml", "--model.head", "translation", "--data.train", "{source: a, target: 'b: c'}")
    text = done("config", "show", *words, "--trainer.max_time", "00:01:00:00").out
    lines = text.splitlines()
    assert any(re.fullmatch(r"    num_heads: 2 +# small.yaml:8", line) for line in lines)
    assert all("# " in line or re.fullmatch(r" *\w+:", line) for line in lines)
    (folder / "shown.yaml").write_text(text)
    before, after = shown(*words, "--trainer.max_time", "00:01:00:00"), shown("--config", "shown.yaml", "--name=small")
    assert {key: value for key, (value, _) in before.items()} == {key: value for key, (value, _) in after.items()}
    assert yaml.safe_load(text)["data"]["train"] == {"source": "a", "target": "b: c"}
    assert all(
        place.startswith(("shown.yaml", "command line")) for key, (_, place) in after.items() if key != "imports"
    )


def test_show_builds_nothing_and_reads_no_data(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert shown("--data.train", "missing.txt")["data.train"] == ("missing.txt", "command line")
    assert sorted(folder.rglob("*")) == before


def test_show_is_a_check(folder: Path) -> None:
    result = llmkit("config", "show", "--config", "small.yaml", "--model.dim", "wide", "--data.batch_sise", "3")
    assert result.code == 2 and result.out == ""
    assert "model.dim" in result.err and "Did you mean 'batch_size'?" in result.err
    assert all(line.startswith("llmkit: error: ") for line in result.err.splitlines())
    assert "--config" in llmkit("config", "show").err


def test_a_checkpoint_is_an_origin(run: Result) -> None:
    found = shown("--ckpt_path", str(run.checkpoint), "--model.dropout", "0.5")
    assert found["model.dim"] == (16, f"checkpoint {run.checkpoint}")
    assert found["model.dropout"] == (0.5, "command line")
    assert found["ckpt_path"][0] == str(run.checkpoint)


TEXTS = ("a", "", "yes", "null", "1e-3", "2024-01-01", "a: b", "a # b", "- a", "ü", "a\nb", "*.py", "../x", ".5", " a")


@pytest.mark.parametrize("value", [*TEXTS, None, True, 3, 1e-6, float("inf"), ["a", {"b": [1, "no"]}], {}])
def test_values_keep_their_meaning_on_one_line(value: Any, tmp_path: Path) -> None:
    text = f"key: {inline(value)}  # origin"
    assert "\n" not in text
    assert yaml.safe_load(text) == {"key": value}
    (tmp_path / "value.yaml").write_text(text)
    assert settled(read_yaml(tmp_path / "value.yaml").tree) == {"key": value}


# diff


def test_diff_of_configs(folder: Path) -> None:
    (folder / "other.yaml").write_text(
        "name: small\nmodel: {dim: 64, attention: lstm, head: generation}\ntrainer: {max_steps: 5}\n"
        "data: {train: text.txt, tokenizer: char}\n"
    )
    assert done("config", "diff", "small.yaml", "other.yaml").out == (
        "model.attention             multi_head -> lstm\n"
        "model.attention.num_heads   2          -> (none)\n"
        "model.attention.qk_norm     true       -> (none)\n"
        "model.attention.bias        false      -> (none)\n"
        "model.attention.dropout     0.0        -> (none)\n"
        "model.dim                   256        -> 64\n"
        "model.optimizer.lr          0.01       -> 0.001\n"
        "model.decoding.temperature  0.5        -> 0.8\n"
        "trainer.max_steps           -1         -> 5\n"
    )
    found = json.loads(done("config", "diff", "other.yaml", "small.yaml", "--json").out)
    assert found["model.dim"] == {"a": 64, "b": 256}
    assert found["model.attention.num_heads"] == {"b": 2}


def test_diff_of_runs(folder: Path, run: Result) -> None:
    assert done("config", "diff", run.folder, run.checkpoint).out == "no difference\n"
    found = json.loads(done("config", "diff", "small.yaml", run.folder, "--json").out)
    given = [word.removeprefix("--") for word in TINY if word.startswith("--")]
    assert set(found) == {*given, "data.tokenizer"}
    content = torch.load(run.checkpoint, weights_only=True)
    content["llmkit"]["versions"]["torch"] = "1.0"
    content["llmkit"]["config"]["model"]["dropout"] = 0.25
    torch.save(content, folder / "changed.ckpt")
    lines = done("config", "diff", run.checkpoint, "changed.ckpt").out.splitlines()
    assert [line.split() for line in lines] == [
        ["model.dropout", "0.0", "->", "0.25"],
        ["versions.torch", f'"{torch.__version__}"', "->", '"1.0"'],
    ]
    content["llmkit"]["config"] = {}  # as a model has that was trained from Python
    torch.save(content, folder / "python.ckpt")
    assert json.loads(done("config", "diff", "python.ckpt", "small.yaml", "--json").out)["model.dim"] == {
        "a": 16,
        "b": 256,
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("diff", "nowhere", "small.yaml"), "nowhere does not exist"),
        (("diff", ".", "small.yaml"), "is not a run folder"),
        (("diff", "small.yaml"), "RUN_B"),
        (("diff", "text.txt", "small.yaml"), "text.txt"),
        ((), "needs a command: show, diff, schema"),
        (("--config", "small.yaml"), "needs a command: show, diff, schema"),
        (("sow",), "Did you mean 'show'?"),
        (("schema", "--outptu", "x"), "Did you mean '--output'?"),
    ],
)
def test_mistakes(words: tuple[str, ...], text: str, folder: Path) -> None:
    result = llmkit("config", *words)
    assert result.code == 2 and text in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("words", [("-h",), ("show", "--help")])
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # as argparse ends
        main.main(["config", *words])
    text = capsys.readouterr().out
    assert text.startswith("usage: llmkit config")
    assert all(word in text for word in (("--all", "--json") if "show" in words else ("show", "diff", "schema")))

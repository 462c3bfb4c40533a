"""What a run folder says of its making, ``config diff`` of that, the note of edited plugins, and ``llmkit runs``."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, Result, done, llmkit

import llmkit as llmkit_package
from llmkit import imports, registry
from llmkit.checkpoint import sources
from llmkit.checkpoint.content import read
from llmkit.commands import runs
from llmkit.run import record

PLUGIN = """\
import json
from pathlib import Path
import lightning.pytorch as pl
from provenance_helper import EPS
from llmkit import register
from llmkit_plugins.norm import RMSNorm

@register("norm", "provenance_norm")
class Mine(RMSNorm):
    '''A norm.'''

class Peek(pl.Callback):
    def on_train_batch_end(self, trainer, *rest):
        made = json.loads((Path(trainer.log_dir) / "provenance.json").read_text())
        print("SEEN", made["status"], made["step"], made["git"]["commit"])
"""
WORDS = ("fit", *TINY, "--data.train", "text.txt", "--data.validation_share", "0.2")


def made(result: Result) -> dict[str, Any]:
    return record.read(result.folder / "provenance.json")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: a repository with one commit and a change after it, and a plugin of two files."""
    path = tmp_path_factory.mktemp("repository")
    (path / "text.txt").write_text("".join(f"line {i} of the text has words {i * 7 % 13}\n" for i in range(60)))
    (path / "provenance_mine.py").write_text(PLUGIN)
    (path / "provenance_helper.py").write_text("EPS = 1e-6\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for words in (("init", "--initial-branch=trunk"), ("add", "."), (*author, "commit", "--message=first")):
        subprocess.run(["git", "-C", path, *words], check=True, capture_output=True)
    (path / "text.txt").open("a").write("another line\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path
    for name in ("provenance_mine", "provenance_helper"):
        sys.modules.pop(name, None)
    imports.imported.discard("provenance_mine")
    registry.forget("provenance_mine")


@pytest.fixture(scope="module")
def whole(repository: Path) -> Result:
    """Four steps with the plugin."""
    own = ("--imports", "provenance_mine.py", "--model.norm", "provenance_norm", "--name", "whole")
    return done(*WORDS, *own, "--trainer.max_steps", "4", "--trainer.callbacks", "provenance_mine.Peek")


@pytest.fixture(scope="module")
def parts(repository: Path, whole: Result) -> Result:
    """The same in two parts of two steps."""
    own = ("--imports", "provenance_mine.py", "--model.norm", "provenance_norm", "--name", "parts")
    done(*WORDS, *own, "--trainer.max_steps", "2")
    return done(*WORDS, *own, "--trainer.max_steps", "4", "--ckpt_path", "last")


def test_a_run_records_what_made_it(repository: Path, whole: Result) -> None:
    """From the first step on: a killed run has it too."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert f"SEEN running 0 {commit}" in whole.out
    found = made(whole)
    assert found["git"] == {"commit": commit, "branch": "trunk", "dirty": True}
    tried = {"command": "fit", "status": "finished", "checkpoint": None}
    plain = {"llmkit": llmkit_package.__version__, "head": "generation", "attention": "multi_head", "seed": 0}
    ran = {"step": 4, "tokens": 4 * 2 * 16, "device": "cpu", "processes": 1, "metric": "val_loss", "better": "min"}
    assert found.items() >= {**tried, **plain, **ran}.items()
    assert 0 < found["seconds"] < 300
    assert abs((datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(found["started"])).days) <= 1
    weights = read(whole.checkpoint)["state_dict"]
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    assert found["packages"].items() >= {name: version(name) for name in ("torch", "lightning", "tokenizers")}.items()
    assert found["machine"].items() >= {"python": platform.python_version(), "gpu": None, "threads": 1}.items()
    for name in ("provenance_mine", "provenance_helper"):
        source = (repository / f"{name}.py").read_bytes()
        assert found["sources"][name] == hashlib.sha256(source).hexdigest()
        assert (whole.folder / "code" / f"{name}.py").read_bytes() == source
    assert len(list((whole.folder / "code").iterdir())) == 2  # not those that are installed
    ours = Path(sys.modules["llmkit_plugins.attention.softmax"].__file__ or "")
    assert found["sources"]["llmkit_plugins.attention.softmax"] == hashlib.sha256(ours.read_bytes()).hexdigest()


def test_results_carry_it_without_times(whole: Result, parts: Result) -> None:
    """A resumed run is the same run there: its steps and tokens include those before."""
    found = made(parts)
    results = [json.loads((run.folder / "results.json").read_text()) for run in (whole, parts)]
    assert results[1]["provenance"] == {key: found[key] for key in found if key not in record.OF_THE_TRY}
    assert found["checkpoint"].endswith("version_0/checkpoints/last.ckpt")
    assert results[0] == results[1]
    tested = done("test", "--ckpt_path", parts.checkpoint, "--data.test", "text.txt", "--imports", "provenance_mine.py")
    folder = Path(tested.out.partition("results: ")[2].strip()).parent
    tests = record.read(folder / "provenance.json")
    assert (tests["command"], tests["step"], tests["tokens"]) == ("test", read(parts.checkpoint)["global_step"], 128)
    assert "provenance." not in done("config", "diff", whole.folder, whole.folder).out
    (parts.folder / "provenance.json").write_text(json.dumps({**found, "seed": 7}))
    differs = done("config", "diff", whole.folder, parts.folder).out
    assert "provenance.seed " in differs
    assert "provenance.st" not in differs
    assert "provenance." not in done("config", "diff", whole.folder, parts.checkpoint).out


def test_a_checkpoint_of_an_edited_plugin_says_so(repository: Path, whole: Result) -> None:
    """Once, wherever it is loaded; helpers count, and a later llmkit's own plugins do not."""
    says = f"the source of provenance_helper has changed since checkpoint {whole.checkpoint} was written"
    ask = ("infer", whole.checkpoint, "line", "--imports", "provenance_mine.py")
    assert "has changed" not in done(*ask).err
    helper, text = repository / "provenance_helper.py", (repository / "provenance_helper.py").read_text()
    try:
        helper.write_text("EPS = 1e-5\n")
        assert done(*ask).err.count(says) == 1
        for words in (("predict", "--data.predict", "text.txt"), ("fit", "--trainer.max_steps", "5")):
            end = ("--imports", "provenance_mine.py", "--ckpt_path", whole.checkpoint, "--name", "edited")
            assert done(*words, *end, "--trainer.enable_progress_bar", "false").err.count(says) == 1
    finally:
        helper.write_text(text)
    part = read(whole.checkpoint)["llmkit"]
    own = {**part["sources"], "llmkit_plugins.norm": "0" * 64}
    assert sources.changed({**part, "sources": own}) == ["llmkit_plugins.norm"]
    assert sources.changed({**part, "sources": own, "versions": {"llmkit": "0.0.1"}}) == []
    assert sources.changed({**part, "sources": None}) == []
    assert json.loads(json.dumps(part["sources"])) == part["sources"]
    assert set(part["sources"]) > {"provenance_mine", "provenance_helper", "llmkit_plugins.tokenizer.plain"}
    assert "llmkit_plugins.tokenizer.sentencepiece" not in part["sources"]  # which the model does not use


def test_a_run_that_is_stopped_and_one_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    Path("text.txt").write_text("a line of text\n" * 60)
    more = ("--trainer.max_steps", "4", "--trainer.val_check_interval", "4")
    sender = json.dumps({"class_path": "faults.Sender", "init_args": {"number": 15, "step": 1}})
    assert llmkit(*WORDS, "--imports", "faults", *more, "--trainer.callbacks", sender).code == 128 + 15
    found = record.read(Path("runs/run/version_0/provenance.json"))
    assert (found["status"], found["step"], found["tokens"]) == ("stopped by signal 15", 2, 64)
    assert found["git"] == {"commit": None, "branch": None, "dirty": None}
    old = torch.load("runs/run/version_0/checkpoints/last.ckpt", weights_only=True)
    del old["callbacks"]["Throughput"], old["llmkit"]["sources"]  # as an older llmkit wrote it
    torch.save(old, "old.ckpt")
    resumed = done(*WORDS, *more, "--ckpt_path", "old.ckpt")
    assert (made(resumed)["step"], made(resumed)["tokens"]) == (4, None)
    assert "has changed" not in resumed.err


# llmkit runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders as three commands leave them, one of an older llmkit, and a cell of a study."""
    root = tmp_path_factory.mktemp("listed")

    def add(name: str, **files: Any) -> Path:
        path = root / name
        path.mkdir(parents=True)
        for file, content in files.items():
            (path / f"{file}.json").write_text(json.dumps(content))
        return path

    facts = {"command": "fit", "status": "finished", "metric": "val_loss", "better": "min", "attention": "lstm"}
    for number, (loss, params, started) in enumerate([(2.5, 900, "2026-01-02"), (2.25, 1_250_000, "2026-01-01")]):
        made = {**facts, "started": f"{started}T10:00:00+00:00", "seconds": 3725.4, "parameters": params, "step": 10}
        made |= {"head": "generation", "tokens": 64, "git": {"commit": "0123456789abcdef", "dirty": bool(number)}}
        results = {"val_loss": loss, "val_perplexity": 9.0 + number}
        path = add(f"b/version_{number}", provenance=made, results=results)
        rate = {"class_path": "llmkit.model.optim.AdamW", "init_args": {"lr": 0.003}}
        attention = {"class_path": "llmkit_plugins.attention.softmax.MultiHead", "init_args": {"num_heads": number}}
        (path / "config.yaml").write_text(
            json.dumps({"model": {"dim": 16 * (number + 1), "attention": attention, "optimizer": rate}})
        )
    (path := add("a/older/version_3", results={"val_accuracy": 0.5})).joinpath("config.yaml").write_text(
        "model: {attention: {class_path: llmkit_plugins.attention.softmax.MultiHead}}\n"
    )
    dying = add("a/version_0", provenance={**facts, "status": "running", "started": "2026-01-03T00:00:00+00:00"})
    dying.joinpath("metrics.csv").write_text("step,val_loss\n1,3.5\n2,\n3,3.0\n4,3.25\n")
    add("study/cells/x/version_0", results={"val_loss": 1.0})
    assert path.is_dir()
    return root


def table(*words: object) -> list[list[str]]:
    return [line.split() for line in done("runs", *words).out.splitlines()]


def test_runs_are_listed(folder: Path) -> None:
    lines = done("runs", folder).out.splitlines()
    assert lines[0].split() == [*runs.COLUMNS]
    shown = {line.split()[1]: " ".join(line.split()[2:]) for line in lines[1:]}
    assert list(shown)[1:] == ["a/version_0", "b/version_0", "b/version_1"]  # the newest first: the file of now
    assert shown["b/version_1"] == ("generation lstm 1.25M 10 val_loss 2.2500 64 1:02:05 2026-01-01 10:00 012345678+")
    assert shown["a/version_0"].startswith("- lstm - - val_loss 3.0000 (running)")
    assert shown["a/older/version_3"].startswith("- multi_head - - val_accuracy 0.5000 - - 20")
    inside = table(folder / "study")
    assert [row[1] for row in inside[1:]] == ["cells/x/version_0"]


def test_runs_are_sorted_and_filtered(folder: Path) -> None:
    def names(*words: object) -> list[str]:
        return [row[1] for row in table(folder, "--columns", "run", *words)[1:]]

    assert names("--sort", "val_loss")[:2] == ["b/version_1", "b/version_0"]  # those without a value last
    assert names("--sort", "parameters", "--reverse")[:2] == ["b/version_1", "b/version_0"]
    assert names("--where", "val_loss<=2.25") == ["b/version_1"]
    assert names("--where", "model.dim>16") == ["b/version_1"]
    assert names("--where", "model.attention.num_heads=0", "--where", "status=finished") == ["b/version_0"]
    assert names("--where", "status!=finished") == ["a/version_0"]
    assert names("--where", "date<2026-01-02", "--where", "attention=LSTM") == ["b/version_1"]
    assert table(folder, "--columns", "run,model.dim,git.commit", "--where", "step>=10")[1][2:] == [
        "16",
        "0123456789abcdef",
    ]
    rows = json.loads(done("runs", folder, "--json", "--sort", "val_loss").out)
    assert (rows[0]["run"], rows[0]["result"], rows[0]["val_perplexity"]) == ("b/version_1", 2.25, 10.0)
    only = json.loads(done("runs", folder, "--json", "--sort", "val_loss", "--columns", "name,version").out)
    assert only[0] == {"name": "b", "version": 1}


def test_a_run_is_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, or by its name: of several versions the newest. Where nothing can open it, its path is printed."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for words in (("1", "--sort", "val_loss"), ("b/version_1",)):
        assert done("runs", folder, "--open", *words).out == f"{folder / 'b' / 'version_1'}\n"
    assert done("runs", folder, "--open", "b").out == f"{folder / 'b' / 'version_0'}\n"
    assert done("runs", tmp_path).out == f"no runs in {tmp_path}\n"
    assert done("runs", tmp_path, "--json").out == "[]\n"
    assert "none of the 4 runs" in done("runs", folder, "--where", "step>99").out


def test_the_recipes_of_the_guide(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    Path("runs").symlink_to(folder)
    guide = (Path(__file__).parent.parent / "docs" / "runs.md").read_text("utf-8")
    shown = [
        done(*shlex.split(line)[1:]).out for line in re.findall(r"^llmkit .*", guide.partition("```sh")[2], re.M)[:5]
    ]
    assert shown[0].splitlines()[0].split() == [*runs.COLUMNS]
    assert [line.split()[1] for line in shown[1].splitlines()[1:]] == ["b/version_1", "b/version_0"]
    assert shown[2].splitlines()[-1].split()[2:] == ["multi_head", "0.003", "10", "012345678+"]
    assert len(json.loads(shown[3])) == 4
    assert Path(shown[4].strip()).is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "runs: nowhere is not a folder"),
        (("--sort", "val_los"), "no run has 'val_los'. Did you mean 'val_loss'?"),
        (("--where", "step"), "--where takes KEY=VALUE"),
        (("--where", "stepp=3"), "no run has 'stepp'. Did you mean 'step'?"),
        (("--columns", "run,stat"), "no run has 'stat'"),
        (("--open", "9"), "no run '9' in the list. Did you mean one of 1 to 4?"),
        (("--open", "bb"), "no run 'bb' in the list."),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, folder: Path) -> None:
    result = llmkit("runs", *(words if words[0] == "nowhere" else (folder, *words)))
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1

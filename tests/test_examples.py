"""The examples work as they are, from outside the repository."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import lightning.pytorch as pl
import pytest
import torch
from command import done
from test_plugins_new import QUICK

from llmkit import LanguageModel, plugin, registry
from llmkit.sequence import Sequence, padded, segments_of
from llmkit_plugins.tokenizer import Byte

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = (
    *("--data.tokenizer.vocab_size", "300", "--model.dim", "16", "--model.num_layers", "1", "--model.context", "16"),
    *("--model.decoding.max_new_tokens", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)


def run(*words: object, folder: Path, **environment: object) -> str:
    """Run Python in a folder and return what it printed, to either stream."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    line = [sys.executable, *map(str, words)]
    answer = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library to train on."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(4):
        (folder / f"m{number}.py").write_text("def main(self):\n    return [1, 2, 3]\n" * 30)
    return folder


def test_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / "python_api.py"), run_name="__main__")
    logging.getLogger("lightning.pytorch").setLevel(level)
    printed = out.getvalue().splitlines()
    assert [line.partition(":")[0] for line in printed[:2]] == ["multi_head", "lstm"]
    assert all(float(line.rpartition(" ")[2]) < 2 for line in printed[:2]), printed
    assert "day.\\nAfter" in printed[2]
    assert not list(tmp_path.iterdir())  # it cleans up


@pytest.mark.parametrize("head", ["classification", "generation"])
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_export(head: str, kind: str, tmp_path: Path) -> None:
    """The exported file answers as the checkpoint does, at other sizes than it was exported with, padded or not."""
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    example = runpy.run_path(str(EXAMPLES / "export.py"))
    pl.seed_everything(0, verbose=False)
    model = LanguageModel(head=plugin("head", head), dim=16, num_layers=1, context=16)
    model.tokenizer, model.head_ready = Byte(), True
    if head == "classification":
        model.head.set_info({"labels": ["a", "b", "c"]})
    model.configure_model()
    with torch.no_grad():
        model.network.embedding.weight.mul_(20)  # an untrained network would be undecided everywhere
    file, program = tmp_path / f"model.{kind}", example["export"](model.eval())
    texts = ["a text", "another text", "one"]
    rows = model.tokenizer.encode_batch(texts)
    ids, segments = padded(rows, 0), segments_of([len(row) for row in rows])
    assert segments is not None
    if kind == "onnx":
        example["write_onnx"](program, str(file))
        session = runtime.InferenceSession(file)
        (found,) = session.run(["scores"], {"ids": ids.numpy(), "segments": segments.numpy()})
        scores = torch.from_numpy(found).softmax(-1)
    else:
        torch.export.save(program, file)
        scores = torch.export.load(file).module()(ids, segments).softmax(-1)
    if head == "classification":
        answers = [list(answer["probabilities"].values()) for answer in model.predict(texts)]
        torch.testing.assert_close(scores, torch.tensor(answers))
    else:
        for row in range(len(texts)):
            network, length = model.network, len(rows[row])
            hidden = network.decode(ids[row : row + 1, :length], Sequence.dense(length))
            expected = (hidden @ network.embedding.weight.T).softmax(-1)
            torch.testing.assert_close(scores[row, :length], expected[0])


def test_local_plugin(tmp_path: Path, library: Path) -> None:
    # Its own folder is not the working folder: the YAML finds its file all the same.
    config = EXAMPLES / "local_plugin" / "running_mean.yaml"
    (tmp_path / "fit.py").write_text(
        "import sys\nfrom llmkit.main import main\nmain(sys.argv[1:])\nprint(*sys.modules)\n"
    )
    line = [sys.executable, str(tmp_path / "fit.py"), "fit", "--config", str(config), *TINY]
    answer = forked.run(line, cwd=tmp_path, env={**os.environ, "STDLIB": str(library)})
    assert "runs/running_mean/version_0/checkpoints/best.ckpt" in answer.stdout, answer.stderr
    loaded = answer.stdout.splitlines()[-1].split()
    assert "llmkit.data" in loaded and "datasets" not in loaded  # which only the sources of the Hub need
    saved = (tmp_path / "runs" / "running_mean" / "version_0" / "config.yaml").read_text()
    assert "class_path: running_mean.RunningMean" in saved
    assert str(EXAMPLES / "local_plugin" / "running_mean.py") in saved


@pytest.mark.usefixtures("no_cpp")
def test_package_plugin(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build writes into the source folder, which may be read-only or shared.
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLES / "package_plugin", source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run("-m", "pip", "install", *options, "--target", site, source, folder=tmp_path)
    assert (site / "llmkit_aft" / "py.typed").is_file()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STDLIB", str(library))
    monkeypatch.syspath_prepend(site)
    registry._installed.cache_clear()
    listed = json.loads(done("plugins", "attention", "--json").out)
    (found,) = (item for item in listed if item["name"] == "aft")
    assert found["distribution"] == "llmkit-aft"
    assert found["error"] is None

    config = EXAMPLES.parent / "configs" / "quickstart.yaml"
    printed = done("fit", "--config", config, "--model.attention", "aft", "--model.attention.limit", "4", *TINY).out
    assert "runs/quickstart/version_0/checkpoints/best.ckpt" in printed
    from transformers import AutoTokenizer

    from llmkit.interop.transformers import LlmkitForCausalLM

    assert "LlmkitForCausalLM" in done("export", tmp_path / "runs" / "quickstart", "exported").out
    assert "needs llmkit, llmkit-aft and transformers" in Path("exported/README.md").read_text()
    tokenizer: Any = AutoTokenizer.from_pretrained("exported")
    model: Any = LlmkitForCausalLM.from_pretrained("exported")
    written = model.generate(**tokenizer("def main", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    text = done("infer", "hf:exported", "def main", "--greedy", "--max_new_tokens", 4).out
    assert tokenizer.decode(written[0], skip_special_tokens=True).rstrip("\ufffd") == text.rstrip("\n")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert pytest.main([str(source / "tests"), *QUICK]) == 0, told.getvalue()
    for name in [name for name in sys.modules if name.startswith("llmkit_aft")]:
        del sys.modules[name]
    registry._installed.cache_clear()

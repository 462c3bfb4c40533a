"""The examples work as they are, from outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = (
    *("--data.tokenizer.vocab_size", "300", "--model.dim", "16", "--model.num_layers", "1", "--model.context", "16"),
    *("--model.decoding.max_new_tokens", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)


def run(*words: object, folder: Path, **environment: object) -> str:
    """Run Python in a folder and return what it printed."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    line = [sys.executable, *map(str, words)]
    answer = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library to train on."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(4):
        (folder / f"m{number}.py").write_text("def main(self):\n    return [1, 2, 3]\n" * 30)
    return folder


def test_python_api(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "python_api.py", folder=tmp_path).splitlines()
    assert [line.partition(":")[0] for line in printed[:2]] == ["multi_head", "lstm"]
    assert all(float(line.rpartition(" ")[2]) < 2 for line in printed[:2]), printed
    assert "day.\\nAfter" in printed[2]
    assert not list(tmp_path.iterdir())  # it cleans up


def test_local_plugin(tmp_path: Path, library: Path) -> None:
    # Its own folder is not the working folder: the YAML finds its file all the same.
    config = EXAMPLES / "local_plugin" / "running_mean.yaml"
    printed = run("-m", "llmkit", "fit", "--config", config, *TINY, folder=tmp_path, STDLIB=library)
    assert "runs/running_mean/version_0/checkpoints/best.ckpt" in printed
    saved = (tmp_path / "runs" / "running_mean" / "version_0" / "config.yaml").read_text()
    assert "class_path: running_mean.RunningMean" in saved
    assert str(EXAMPLES / "local_plugin" / "running_mean.py") in saved


def test_package_plugin(tmp_path: Path, library: Path) -> None:
    # A build writes into the source folder, which may be read-only or shared.
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLES / "package_plugin", source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run("-m", "pip", "install", *options, "--target", site, source, folder=tmp_path)
    assert (site / "llmkit_aft" / "py.typed").is_file()

    listed = json.loads(run("-m", "llmkit", "plugins", "attention", "--json", folder=tmp_path, PYTHONPATH=site))
    (found,) = (item for item in listed if item["name"] == "aft")
    assert found["distribution"] == "llmkit-aft"
    assert found["error"] is None

    config = EXAMPLES.parent / "configs" / "quickstart.yaml"
    words = ("fit", "--config", config, "--model.attention", "aft", "--model.attention.limit", "4", *TINY)
    printed = run("-m", "llmkit", *words, folder=tmp_path, PYTHONPATH=site, STDLIB=library)
    assert "runs/quickstart/version_0/checkpoints/best.ckpt" in printed
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=source, PYTHONPATH=site)

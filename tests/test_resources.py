"""Too little memory, and a disk that is full: told with what to do, and nothing that was written before is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, llmkit


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return ["fit", "--data.train", str(tmp_path / "text.txt"), *TINY, "--output", str(tmp_path / "runs")]


def test_memory_does_not_suffice(words: list[str]) -> None:
    result = llmkit(*words, "--imports", "faults", "--trainer.callbacks", "faults.Greedy")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if "error" in line]
    for said in (
        *("out of memory", "4000000000000000 bytes", "data.batch_size 2", "ids 2 x 16", "model.dim 16", "num_layers 1"),
        *("model.context 16", "vocabulary", "parameters", "Lower data.batch_size first", "accumulate_grad_batches"),
    ):
        assert said in line, said


def test_the_disk_is_full(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint does not fit: the run ends in one line, and the first one can be read."""
    save, calls = torch.save, []

    def full(content: Any, file: Any) -> None:
        save(content, file)
        calls.append(content)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmkit.run.saving.torch.save", full)
    result = llmkit(*words, "--checkpoint.every_n_steps", "1", "--trainer.max_steps", "5")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if "error" in line]
    assert "the disk is full, while writing" in line
    assert "last.ckpt" in line
    assert "intact" in line
    (left,) = (tmp_path / "runs").rglob("checkpoints/*")
    assert left.name == "last.ckpt"
    assert torch.load(left, weights_only=True)["global_step"] == 1

"""Too little memory, and a disk that is full: told with what to do, and nothing that was written before is lost."""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import TINY, llmkit

from llmkit.run import memory


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can return it")
def test_freed_memory_is_returned() -> None:
    callback, model = memory.ReturnMemory(), pl.LightningModule()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback.on_train_start(trainer, model)
    held = [torch.ones(16_000) for _ in range(2000)]  # 122 MiB in pieces that come from the heap
    del held[::2]
    before = memory.resident()
    callback.on_train_batch_end(trainer, model)
    assert memory.resident() < before - 40 * 2**20


def test_memory_is_returned_when_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, left, returns = [0], [1000, 1200, 2500], list[int]()

    def trim(kept: int) -> None:
        returns.append(sizes[-1])
        sizes.append(left.pop(0))

    monkeypatch.setattr(memory, "resident", lambda: sizes[-1] * 2**20)
    monkeypatch.setattr(memory, "_trim", trim)
    callback, model = memory.ReturnMemory(), pl.LightningModule()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback.on_train_start(trainer, model)
    # The first step leaves 1,000. A run that really needs 2,500 must not return memory in each step.
    for size in (1500, 2900, 3001, 2900, 3100, 3700, 2600):
        sizes.append(size)
        callback.on_train_batch_end(trainer, model)
    assert returns == [1500, 3001, 3100]


def test_the_environment_decides_how_many_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    memory.bound_kernels()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    memory.bound_kernels()
    assert os.environ[name] == memory.KERNELS

"""What Lightning, an optimizer or the system refuses once a run has begun: one line with the key, no traceback."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from command import TINY, done, llmkit

CHECKPOINTS = "--trainer.callbacks=ModelCheckpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a file where a folder is expected."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return folder


def words(folder: Path) -> list[str]:
    return ["fit", "--data.train", str(folder / "text.txt"), *TINY, "--output", str(folder / "runs")]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--trainer.overfit_batches", "0.001"], "error: Lightning: You requested to check 0.001"),
        (["--model.scheduler", "reducelronplateau"], "model.scheduler: ReduceLROnPlateau waits for a metric"),
        (["--model.optimizer", "sparseadam"], "model.optimizer: SparseAdam does not support dense gradients"),
        (["--trainer.callbacks", "LearningRateFinder"], "trainer.callbacks: LearningRateFinder: a learning rate"),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_los"],
            "trainer.callbacks: EarlyStopping: unknown metric 'val_los'. Did you mean 'val_loss'?",
        ),
        ([CHECKPOINTS, "--trainer.callbacks.monitor", "train_los"], "trainer.callbacks: `ModelCheckpoint(monitor="),
        (["--data.cache_dir", "text.txt"], "data.cache_dir: text.txt is a file, not a folder"),
        (["--output", "/proc/none"], "output: no folder can be created in /proc/none/run: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused(mistake: list[str], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = llmkit(*words(folder), *mistake)
    assert result.code == 2, result
    (line,) = [line for line in result.err.splitlines() if line.startswith("llmkit: error:")]
    assert says in line
    assert "Traceback" not in result.err


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: object, file: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("llmkit.run.saving.torch.save", refuse)
    result = llmkit(*words(folder))
    assert result.code == 2, result
    assert result.err.splitlines()[-1].endswith("last.ckpt cannot be used: Read-only file system")


def test_nothing_to_evaluate(folder: Path) -> None:
    checkpoint = done(*words(folder), "--data.validation_share", "0").checkpoint
    result = llmkit("validate", "--ckpt_path", checkpoint)
    assert result.code == 2, result
    assert "data.validation: no rows to evaluate" in result.err


def test_callbacks_of_ones_own(folder: Path) -> None:
    """By their short names in a file; the report recommends the checkpoint that there is."""
    (folder / "own.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}, "
        f"{{class_path: ModelCheckpoint, init_args: {{dirpath: {folder / 'kept'}}}}}]}}"
    )
    result = done(*words(folder), "--config", folder / "own.yaml")
    assert result.checkpoint.parent == folder / "kept"
    assert result.checkpoint.is_file()


def test_a_run_folder_means_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    """The best one; the last one to resume. The folder above means the newest run that has one."""
    rate = ("--model.optimizer", "{name: SGD, lr: 6.0}", "--model.scheduler", "{name: ConstantLR, factor: 1.0}")
    own = ("--trainer.val_check_interval", "2", "--output", tmp_path)
    run = done(*words(folder), *rate, *own, "--trainer.max_steps", "8").folder
    answers = [done("infer", path, "word").out for path in (run, run.parent, run / "checkpoints" / "best.ckpt")]
    assert len(set(answers)) == 1
    assert done("infer", run / "checkpoints" / "last.ckpt", "word").out != answers[0]
    assert "finished" in done(*words(folder), *rate, *own, "--trainer.max_steps", "8", "--ckpt_path", run).out
    (run.parent / "version_1").mkdir()
    assert done("infer", run.parent, "word").out == answers[0]
    result = llmkit("infer", run.parent / "version_1", "word")
    assert result.code == 2
    assert "is a folder without a checkpoint: it has no best.ckpt or last.ckpt" in result.err

"""Experiment trackers show a study as one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from test_study import planned

from llmkit.commands.cell import fit_cell
from llmkit.study.outcomes import OUTCOME
from llmkit.study.trackers import logger_words

TAGS = {"phase": "final", "variant": "lstm", "seed": 1}
CELL = "final/lstm/seed1-0a1b2c3d"
seen: list[dict[str, Any]] = []


class Grouping(CSVLogger):
    """A logger whose constructor has arguments for groups and tags."""

    def __init__(self, save_dir: str, group: str = "", tags: list[str] | None = None, name: str = "") -> None:
        super().__init__(save_dir, f"{group}/{name}")
        seen.append({"group": group, "tags": tags, "name": name})


class Plain(CSVLogger):
    """One that has none of them."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)


def filled(spec: Any) -> Any:
    (word,) = logger_words({"trainer": {"logger": spec}}, "sizes", CELL, TAGS)
    return json.loads(word.removeprefix("--trainer.logger="))


@pytest.mark.parametrize("given", [None, True, False])
def test_without_loggers_there_is_nothing_to_say(given: Any) -> None:
    assert logger_words({"trainer": {"logger": given}}, "sizes", CELL, TAGS) == []
    assert logger_words({}, "sizes", CELL, TAGS) == []


def test_loggers_get_what_their_constructors_accept() -> None:
    listed = ["sizes", "final", "lstm", "1"]
    own = {"save_dir": "x"}
    here = __name__
    assert filled({"class_path": f"{here}.Grouping", "init_args": own}) == [
        {
            "class_path": f"{here}.Grouping",
            "init_args": {"group": "sizes", "tags": listed, "name": "final/lstm/seed1", **own},
        }
    ]
    (plain, board) = filled([{"class_path": f"{here}.Plain", "init_args": own}, "TensorBoardLogger"])
    assert plain["init_args"] == own
    assert board["init_args"] == {"name": "sizes/final/lstm/seed1", "version": "0a1b2c3d"}
    (wandb,) = filled({"class_path": "WandbLogger", "init_args": {"project": "p"}, "dict_kwargs": {"group": "mine"}})
    assert wandb["init_args"] == {"name": "final/lstm/seed1", "id": "sizes-0a1b2c3d", "project": "p"}
    assert wandb["dict_kwargs"] == {"group": "mine", "tags": listed}
    (mlflow,) = filled({"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"run_name": "mine"}})
    assert mlflow["init_args"] == {"experiment_name": "sizes", "tags": {"study": "sizes", **TAGS}, "run_name": "mine"}


def test_a_cell_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan of a study to what its loggers write; what they are given makes no other cell."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    board = ["TensorBoardLogger"] if importlib.util.find_spec("tensorboard") else []
    loggers = [{"class_path": name, "init_args": {"save_dir": "logs"}} for name in [f"{__name__}.Grouping", *board]]
    plan = planned(tmp_path, name="s", tune=None)
    names = [cell.name for cell in planned(tmp_path, name="other", tune=None).cells()]
    assert names == [cell.name for cell in plan.cells()]
    for variant in plan.variants.values():
        variant.tree["trainer"] = {"logger": loggers}
        variant.words = [
            *("--data.train=text.txt", "--data.tokenizer=char", "--data.validation_share=0.1", "--imports", __file__),
            *("--model.head=generation", "--model.attention=lstm", "--model.dim=8", "--model.num_layers=1"),
            *("--model.context=8", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"),
        ]
    plan._made.clear()
    cell = plan.cells()[0]
    label, _, digest = cell.name.rpartition("-")
    assert fit_cell(plan.root / cell.name, cell, 1) == 0
    assert (plan.root / cell.name / OUTCOME).exists()
    assert seen[-1] == {"group": "s", "tags": ["s", "final", "a", "0"], "name": label}
    assert Path("logs/s", label, "version_0", "metrics.csv").exists()
    if board:
        assert list(Path("logs/s", label, digest).glob("events.*"))

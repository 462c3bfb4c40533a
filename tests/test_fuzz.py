"""A few of the files of ``docs/reliability/fuzz.py``, and whether what it watches for is seen at all."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import mutations
import pytest
from fuzzing import Fuzz, Result, Watch, results

from llmkit import UserError


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"), 1, ["generation", "token_classification"])


def test_damaged_files_load_or_are_refused(fuzz: Fuzz) -> None:
    found = list(results(fuzz, 150, workers=1))
    assert sorted(result.number for result in found) == list(range(150))
    assert [result for result in found if result.outcome not in ("loaded", "refused")] == []
    for kind in ("checkpoint", "tokenizer", "data"):
        assert {result.outcome for result in found if result.kind == kind} == {"loaded", "refused"}, kind


class Bad(Fuzz):
    """Does at each number what must not happen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, 0

    def run(self, number: int, folder: Path, watch: Watch | None = None) -> Result:
        self.number = number
        return super().run(number, folder, watch)

    def _checkpoint(self, rng: random.Random, folder: Path) -> tuple[str, Any]:
        def elsewhere() -> None:
            (self.folder.parent / "elsewhere").write_text("x")

        def spawn() -> None:
            os.system("true")

        doors: list[Callable[[], Any]] = [
            lambda: dict[str, str]()["x"],
            elsewhere,
            spawn,
            lambda: eval("print(1)"),
            lambda: os.kill(os.getpid(), 11),
            lambda: time.sleep(60),
            lambda: [None for _ in itertools.count() if False],
            lambda: bytearray(2 * fuzzing.MEMORY),
            lambda: (_ for _ in ()).throw(UserError("no")),
            lambda: None,
        ]
        return "bad", doors[self.number]

    _tokenizer = _data = _checkpoint


def test_what_must_not_happen_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "LIMIT", 1.0)
    monkeypatch.setattr(fuzzing, "PATIENCE", 3.0)
    (tmp_path / "inner").mkdir()
    found = {result.number: result.outcome for result in results(Bad(tmp_path / "inner"), 10, workers=1)}
    assert list(found.values()) == [
        *("raised KeyError", "ran code", "ran code", "ran code"),
        *("crashed (-11)", "hung", "hung", "raised MemoryError", "refused", "loaded"),
    ]


def test_damage_is_repeatable(fuzz: Fuzz) -> None:
    content = fuzz.checkpoints["generation"]
    kinds = set()
    for seed in range(60):
        first, second = (mutations.checkpoint(content, random.Random(seed)) for _ in range(2))
        assert first == second
        kinds.add(first[0])
        assert first[1] != content
    assert kinds == {"bytes", "bytes with checksums", "weights", "training state", "description"}

"""What the preparation says: word of long steps, and notes that count all rows of a split."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from data_fakes import CharTokenizer, Labelling, bound

from llmkit.contracts import Tokenizer
from llmkit.data import prepare, progress


class Slow(CharTokenizer):
    """Is trained until its progress is shown, at once where nothing is to be shown."""

    @staticmethod
    def shown() -> bool:
        return True

    def train(self, texts: Any) -> None:
        super().train(texts)
        until = time.monotonic() + 300
        while not self.shown():
            assert time.monotonic() < until
            time.sleep(0.01)


class OutStream(io.StringIO):
    """What a notebook prints to, of this name in IPython's kernel; it does not count as a terminal."""

    __module__ = "ipykernel.iostream"


@pytest.mark.parametrize("place", ["a log file", "a terminal", "a notebook"])
def test_long_steps_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    stderr = OutStream() if place == "a notebook" else io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: place == "a terminal")
    monkeypatch.setattr(sys, "stderr", stderr)
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"a{i},x\n" for i in range(20)))
    settings: Any = {"train": str(path), "validation_share": 0.25, "tokenizer": Slow}
    monkeypatch.setattr(progress, "FIRST", 60.0)
    bound(Labelling(), 8, tmp_path / "first", **settings)
    assert stderr.getvalue() == ""
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "NEXT", 0.01)
    monkeypatch.setattr(progress, "LOGGED", 0.01)
    monkeypatch.setattr(Slow, "shown", staticmethod(lambda: "15 rows" in stderr.getvalue()))
    bound(Labelling(), 8, tmp_path / "second", **settings)
    said = stderr.getvalue()
    if place != "a log file":
        assert "training the tokenizer: 15 rows" in said and said.rstrip(" ").endswith("\r")
    else:
        assert re.search(r"^llmkit: note: training the tokenizer, 15 rows, \d+ s$", said, re.M)


class Marking(Labelling):
    """Marks the rows whose text is ``b``."""

    notes: ClassVar = {"marked": "are marked"}

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        found = super().encode(rows, tokenizer, max_length)
        return {**found, "marked": [int(text == "b") for text in rows["text"]]}


def test_notes_count_the_whole_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "GROUP", 10)
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a,x\nb,x\n" * 30)
    for _ in range(2):  # encoded, then from the cache
        bound(Marking(), 8, tmp_path, train=str(path), validation_share=0)
        assert capsys.readouterr().err == "llmkit: note: data.train: 30 of 60 rows are marked\n"

"""The examination of plugins that are not llmkit's own, when their code is first used."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import TINY, done

from llmkit import imports, testing
from llmkit.testing import first_use

PLUGINS = """\
import plain_attention
from torch import nn
from llmkit.contracts import Attention, Feedforward
from llmkit_plugins.tokenizer import Char

class Good(plain_attention.PlainAttention):
    pass

class Ahead(Good):
    def forward(self, x, seq, *, memory=None, state=None):
        return super().forward(x.flip(1), seq, memory=memory, state=state)

class Forgets(Good):
    def forward(self, x, seq, *, memory=None, state=None):
        if state is not None:
            state.length += x.shape[1]
        return super().forward(x, seq, memory=memory)

class Wide(Good):
    def __init__(self, dim, role):
        if dim != 20:
            raise ValueError("20 only")
        super().__init__(dim, role)

class Shift(Feedforward):
    def forward(self, x):
        return x.roll(-1, 1)

class Drops(Char):
    def encode_batch(self, texts):
        return [[*row, 5000] for row in super().encode_batch(texts)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("first_use")
    (path / "used_first.py").write_text(PLUGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", [str(path), *sys.path])
        importlib.import_module("used_first")
        yield path
    sys.modules.pop("used_first")
    imports.imported.discard("used_first")


def lines(folder: Path, parts: dict[str, str], dim: int = 16) -> list[str]:
    config: dict[str, Any] = {"model": {"dim": dim}, "data": {}}
    for name, value in parts.items():
        group = config["data" if name == "tokenizer" else "model"]
        group[name] = {"class_path": value, "init_args": {}}
    return list(first_use.examine(config, folder / "cache"))


@pytest.mark.parametrize(
    ("key", "cls", "failing"),
    [
        ("model.attention", "Ahead", "causal_by_value"),
        ("model.attention", "Forgets", "decoding_steps"),
        ("model.feedforward", "Shift", "position_by_position"),
        ("data.tokenizer", "Drops", "ids_in_range"),
    ],
)
def test_what_fails_is_named(folder: Path, key: str, cls: str, failing: str) -> None:
    for _ in range(2):  # until it is mended
        (line,) = lines(folder, {key.partition(".")[2]: f"used_first.{cls}"})
        assert line.startswith(f"{key}: {cls} (file used_first.py, line ")
        assert f" fails the check {failing}: " in line


def test_what_passes_is_examined_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = testing.check

    def count(family: str, plugin: Any, **options: Any) -> testing.Report:
        calls.append(family)
        return check(family, plugin, **options)

    monkeypatch.setattr(testing, "check", count)
    assert lines(folder, {"attention": "used_first.Good", "cross_attention": "used_first.Good"}) == []
    assert calls == ["attention", "attention"]  # built, and examined
    assert lines(folder, {"attention": "used_first.Good", "norm": "llmkit_plugins.norm.RMSNorm"}) == []
    assert len(calls) == 2
    (folder / "used_first.py").write_text(PLUGINS + "\n# edited\n")
    del sys.modules["used_first"]  # as the next process finds it
    assert lines(folder, {"attention": "used_first.Good"}) == [] and len(calls) == 4
    assert lines(folder, {"attention": "used_first.Wide"}, 20) == [] and len(calls) == 7
    assert lines(folder, {"attention": "used_first.Wide"}, 24) == []  # the run itself says that it cannot be built


def test_every_property_exists_and_fit_prints_the_line(folder: Path) -> None:
    for family, names in first_use.PROPERTIES.items():
        assert set(names) <= {found.name for found in testing.properties(family)}
    (folder / "text.txt").write_text("to be or not to be " * 30)
    fit = functools.partial(done, "fit", "--data.train", "text.txt", "--imports", "used_first.py", *TINY)
    words = ("--model.attention", "used_first.Ahead", "--data.cache_dir", "cache", "--trainer.max_steps", "1")
    err = fit(*words).err
    assert "llmkit: note: model.attention: Ahead (file used_first.py, line 9) fails the check causal_by_value" in err
    assert "fails the check" not in fit(*words, "--examine", "false").err

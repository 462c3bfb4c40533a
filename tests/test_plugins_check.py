"""``llmkit plugins check``: files of a user, registered names, and mistakes on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import llmkit

TEXTBOOK = """
import torch
from torch import nn


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.query, self.key, self.value, self.project = (nn.Linear(embed_dim, embed_dim) for _ in range(4))

    def forward(self, x):
        batch, length, dim = x.shape
        shape = (batch, length, self.num_heads, self.head_dim)
        q, k, v = self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, dim=-1)
        return self.project((weights @ v).reshape(batch, length, dim))
"""
PLUGIN = """
from torch import nn

from llmkit.contracts import Attention


class Textbook(Attention):
    roles = frozenset({"causal", "bidirectional"})

    def __init__(self, dim, role, num_heads=4):
        super().__init__(dim, role)
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, seq, *, memory=None, state=None):
        shape = (*x.shape[:2], self.num_heads, self.dim // self.num_heads)
        q, k, v = self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)
        scores = q @ k.transpose(-2, -1) / shape[-1] ** 0.5
        mask = seq.mask(causal=self.role == "causal")
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return self.out((scores.softmax(-1) @ v).reshape(x.shape))


class Nothing:
    pass
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests: a module that was imported cannot come from another file."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "textbook_module.py").write_text(TEXTBOOK)
    (folder / "textbook_plugin.py").write_text(PLUGIN)
    return folder


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


def test_textbook_module_without_transpose(folder: Path) -> None:
    """A torch module that is not a plugin is checked too."""
    result = llmkit("plugins", "check", "textbook_module.py:SelfAttention", "--no_compile")
    assert result.code == 1
    assert "FAIL mixes_positions" in result.out and result.out.count("FAIL ") == 1
    text = " ".join(result.out.split())
    assert "no output depends on an earlier position" in text
    assert "without transpose(1, 2)" in text and "head by head" in text
    assert "derives from no contract of llmkit" in result.err


def test_textbook_plugin_without_transpose(folder: Path) -> None:
    """With the framework's mask it runs only at the length that is its number of heads; the report says why."""
    result = llmkit("plugins", "check", "textbook_plugin.py:Textbook", "--no_compile", "--init.num_heads", "8")
    assert result.code == 1
    text = " ".join(result.out.split())
    assert "FAIL shape" in text and "only 8 runs, its number of heads?" in text and "without transpose(1, 2)" in text
    assert "30 more not checked: shape fails" in text


def test_textbook_with_transpose_passes(folder: Path) -> None:
    right = TEXTBOOK.replace(".view(shape)", ".view(shape).transpose(1, 2)")
    right = right.replace("(weights @ v)", "(weights @ v).transpose(1, 2)")
    (folder / "textbook_right.py").write_text(right)
    result = llmkit("plugins", "check", "textbook_right.py:SelfAttention", "--no_compile", "--init.num_heads=2")
    assert result.code == 0 and "0 failed" in result.out


def test_registered_name_and_json(folder: Path) -> None:
    options = ("--dim", "6", "--json", "--seed", "3", "--only", "builds", "shape", "decoding_steps", "cross_memory")
    result = llmkit("plugins", "check", "attention/gru", *options)
    assert result.code == 0
    found = json.loads(result.out)
    assert found["title"] == "attention: llmkit_plugins.attention.recurrent.GRU()"
    assert {item["name"]: item["status"] for item in found["results"]}["cross_memory"] == "n/a"
    assert "6 wide" in found["results"][0]["detail"]
    assert result.err.startswith(
        "llmkit: note: differs from the default attention, multi_head: no argument num_heads (4"
    )
    assert "qk_norm (true there)" in result.err and result.err.count("\n") == 1


def test_reference_from_a_file(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "def wrong(module, x, seq, memory):\n    return 2 * module(x, seq, memory=memory)\n"
    )
    words = ("plugins", "check", "attention/standard", "--only", "reference", "--reference", "slow.py:wrong")
    result = llmkit(*words)
    assert result.code == 1 and "it differs by 0.5 of the largest value from the reference" in result.out
    result = llmkit(*words[:-1], "slow.py:right")
    assert result.code == 2 and "slow.py: unknown function 'right'. Allowed: wrong." in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["multi_haed"],
            "'multi_haed' does not name a plugin. Expected family/name (attention/multi_head), ",
        ),
        (["attention/multi_haed"], "unknown attention 'multi_haed'. Did you mean 'multi_head'?"),
        (["atention/multi_head"], "unknown family 'atention'. Did you mean 'attention'?"),
        (["missing.py:A"], "missing.py does not exist"),
        (["textbook_plugin.py:Textbok"], "unknown class 'Textbok'. Did you mean 'Textbook'?"),
        (["textbook_plugin.py:Nothing"], "textbook_plugin.py:Nothing derives from no contract"),
        (["no_such_module:A"], "cannot be imported"),
        (["attention/multi_head", "--init.num_head", "2"], "has no argument 'num_head'. Did you mean 'num_heads'?"),
        (["attention/multi_head", "--init.num_heads"], "--init.num_heads needs a value"),
        (
            ["attention/multi_head", "--only", "casual_by_value"],
            "'casual_by_value'. Did you mean 'causal_by_value'?",
        ),
        (["attention/multi_head", "--sed", "1"], "unknown plugins check option '--sed'. Did you mean '--seed'?"),
        (["textbook_module.py:SelfAttention", "--init.embed_dim=8"], "embed_dim is the width: set it by --dim"),
        (["tokenizer/char", "--dim", "8"], "the checks of family 'tokenizer' have no option 'dim'; available: seed"),
        (["head/classification", "--rows", "none.json"], "--rows none.json: "),
        ([], "TARGET"),
    ],
)
def test_mistakes(words: list[str], message: str, folder: Path) -> None:
    result = llmkit("plugins", "check", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result


def test_a_mistyped_verb() -> None:
    result = llmkit("plugins", "chekc", "attention/lstm")
    assert result.code == 2
    assert (
        result.err
        == "llmkit: error: unknown plugins command 'chekc'. Did you mean 'check'? Allowed: check, new, show.\n"
    )


def test_rows_of_a_head(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps({"text": ["a", "b b", "c", "d"], "label": ["x", "y", "y", "x"]}))
    words = ("plugins", "check", "head/classification", "--rows", "rows.json", "--only", "learns", "--json")
    result = llmkit(*words)
    (learned,) = json.loads(result.out)["results"]
    assert learned["detail"] == f"{len(json.dumps({'labels': ['x', 'y']}))} characters"


def test_a_plugin_that_raises_is_reported_with_its_line(folder: Path) -> None:
    source = PLUGIN.replace("scores = q", "raise KeyError('oops')\n        scores = q")
    (folder / "raising.py").write_text(source)
    result = llmkit("plugins", "check", "raising.py:Textbook", "--no_compile")
    assert result.code == 1 and "raised KeyError: 'oops' (at raising.py:" in " ".join(result.out.split())

"""Checkpoints of compressed models: each answers alike in a fresh process, and is refused if it is damaged."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

from llmkit import LanguageModel, UserError, compress, load, plugin, registry
from llmkit.analysis.compress.chain import parse
from llmkit.checkpoint.content import Stored, checked, section
from llmkit.errors import unknown
from llmkit.run.saving import save_model
from llmkit.sequence import DecodingOptions

TEXTS = ["the first text", "and a second one", "third, and the last"]
GREEDY = DecodingOptions(max_new_tokens=8, temperature=0.0)
WORDS = (TEXTS[0], "--greedy", "--max_new_tokens", "8")
ARGUMENTS = {"drop_layers": "1"}


def named(name: str) -> str:
    """A method as it is written: with what has to stand after its name."""
    for text in (ARGUMENTS.get(name, ""), "50"):
        try:
            parse(name + text)
        except UserError:
            continue
        return name + text
    raise AssertionError(unknown("argument of", name, ARGUMENTS))


METHODS = [named(name) for name in registry.entries("compression")]
KINDS = [*METHODS, "drop_heads50+drop_layers1+whitened_svd50+int8", "prune2:4+int4", "int8+bf16", "lstm: dynamic_int8"]


@functools.cache
def small(kind: str) -> LanguageModel:
    """A model with random weights, compressed; before the colon stands its attention."""
    attention, _, chain = kind.rpartition(": ")
    torch.manual_seed(0)
    model = LanguageModel(attention=plugin("attention", attention or "multi_head"), dim=32, num_layers=2, context=32)
    model.tokenizer, model.head_ready = plugin("tokenizer", "byte")(), True
    model.configure_model()
    for parameter in model.parameters():  # as after training: each map counts
        parameter.data += 0.2 * torch.randn_like(parameter)
    return compress(model.eval(), chain, TEXTS)


@functools.cache
def answer(kind: str) -> list[dict[str, Any]]:
    return small(kind).predict(TEXTS[:1], GREEDY)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {kind: folder / f"{number}.ckpt" for number, kind in enumerate(KINDS)}
    for kind, path in found.items():
        save_model(small(kind), path)
    return found


FRESH = """
import contextlib, io, json, sys, torch
from llmkit.main import main

load, safe, found = torch.load, [], {}

def watched(*args, **given):
    safe.append(given["weights_only"])
    return load(*args, **given)

torch.load = watched
words, *paths = map(json.loads, sys.argv[1:])
for path in paths:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["infer", path, *words])
    found[path] = [code, out.getvalue()]
print(json.dumps({"found": found, "safe": safe}))
"""


def test_a_fresh_process_answers_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    """One process, in which nothing has run, for all of them; each goes through the whole command."""
    (tmp_path / "fresh.py").write_text(FRESH)
    given = [json.dumps(WORDS), *(json.dumps(str(path)) for path in files.values())]
    fresh = forked.run([sys.executable, str(tmp_path / "fresh.py"), *given])
    assert fresh.returncode == 0, fresh.stderr
    answers = json.loads(fresh.stdout)
    assert answers["safe"] == [True] * len(files)
    expected = {str(path): [0, small(kind).head.show(answer(kind)[0]) + "\n"] for kind, path in files.items()}
    assert answers["found"] == expected
    assert len({text for _, text in expected.values()}) > len(files) / 2


def content(kind: str) -> dict[str, Any]:
    model = small(kind)
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {}, model.compression)
    return {"llmkit": json.loads(json.dumps(part)), "state_dict": dict(model.state_dict())}


def again(stored: dict[str, Any]) -> LanguageModel:
    """The model that comes out of the content of a checkpoint."""
    return LanguageModel.of_checkpoint(Stored(Path("x.ckpt"), checked(stored, "checkpoint x.ckpt"))).eval()


def refused(stored: dict[str, Any], what: str) -> bool:
    """Whether it is refused; it has to be in one line, which names the file."""
    try:
        model = again(stored)
    except UserError as error:
        assert str(error).startswith("checkpoint x.ckpt") and "\n" not in str(error), (what, error)
        return True
    model.predict(TEXTS[:1], DecodingOptions(max_new_tokens=1, temperature=0.0))
    return False


def without(state: dict[str, Tensor], name: str) -> None:
    del state[name]


def cut(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name][:1]


def of_another_type(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].float() if not state[name].is_floating_point() else state[name].to(torch.int16)


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """The containers in plain data and their keys, of each container the first two; texts for people left out."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in [key for key in keys if key not in ("note", "class_path")][:2]:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from leaves(value[key])


@pytest.mark.parametrize("kind", KINDS[:-2])
def test_a_damaged_file_is_refused_in_one_line(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """What is not refused has the same structure: it answers, and alike if only the method's name is another."""
    data = files[kind].read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"^checkpoint .*half.ckpt") as caught:
        load(tmp_path / "half.ckpt")
    assert "\n" not in str(caught.value)

    whole = content(kind)
    state, chain = whole["state_dict"], whole["llmkit"]["compression"]
    own = [name for name in state if "packed_" in name] or list(state)
    names = [*{name.rpartition(".")[2]: name for name in own}.values()]  # codes, scale, values, bits, left, right
    for damage, name in zip((without, cut, of_another_type), 3 * names, strict=False):
        stored = {**whole, "state_dict": dict(state)}
        damage(stored["state_dict"], name)
        assert refused(stored, f"{name} {damage.__name__}"), (name, damage)
    filled = {name: torch.full_like(state[name], math.nan if state[name].is_floating_point() else -1) for name in own}
    has_bits = any(name.endswith("bits") for name in own)
    assert refused({**whole, "state_dict": {**state, **filled}}, "all bits") == has_bits

    hostile: list[Any] = [-1, 10**18, "x", None, [], {}]
    for place, (one, key) in enumerate([*leaves(chain)]):
        before, one[key] = one[key], hostile[place % 6]
        refused(whole, f"{key} {one[key]}")
        one[key] = before
    other = METHODS[(METHODS.index(kind) + 1) % len(METHODS) if kind in METHODS else 0]
    chain[0]["method"] = small(other).compression[0]["method"]
    if not refused(whole, f"method {other}"):
        assert again(whole).predict(TEXTS[:1], GREEDY) == answer(kind), other

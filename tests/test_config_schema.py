"""``llmkit config schema``: as strict as the parser, for every shipped config and every registered plugin."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import torch
from command import done, llmkit
from jsonargparse import ArgumentParser

from llmkit import imports, registry
from llmkit.check import settled
from llmkit.commands.config import schema as schemas
from llmkit.config.files import read_yaml
from llmkit.config.plan import TOP_KEYS
from llmkit.data import DataModule
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import GROUPS, TRAINER_DEFAULTS
from llmkit.sequence import DecodingOptions

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {ROOT / "configs" / "compare.yaml", ROOT / "configs" / "tune.yaml"}
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - STUDIES)
LOCAL = ROOT / "examples" / "local_plugin"
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": int | float}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("config", "schema").out)
    return found


@pytest.fixture
def _no_local_plugins() -> Iterator[None]:
    """Undo the import of the example's plugin, so that other tests do not see it."""
    yield
    sys.modules.pop("running_mean", None)
    imports.imported.discard("running_mean")
    registry._local["attention"].pop("running_mean", None)


def accepts(rule: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a value is valid: the part of JSON Schema that is used here, as its specification says it."""
    unknown = set(rule) - {"$schema", "$defs", "title", "description", "default", *WORDS}
    assert not unknown, f"the checker does not know {unknown}"
    return all(WORDS[word](rule, value, root) for word in rule if word in WORDS)


def _target(rule: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = root
    for name in rule["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def _is(kind: str, value: Any) -> bool:
    if kind == "null":
        return value is None
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _extra(rule: dict[str, Any], value: dict[str, Any]) -> list[Any]:
    return [item for key, item in value.items() if key not in rule.get("properties", {})]


WORDS: dict[str, Any] = {
    "$ref": lambda r, v, root: accepts(_target(r, root), v, root),
    "type": lambda r, v, root: any(_is(kind, v) for kind in ([r["type"]] if isinstance(r["type"], str) else r["type"])),
    "enum": lambda r, v, root: any(v == item and isinstance(v, bool) == isinstance(item, bool) for item in r["enum"]),
    "const": lambda r, v, root: v == r["const"],
    "anyOf": lambda r, v, root: any(accepts(item, v, root) for item in r["anyOf"]),
    "not": lambda r, v, root: not accepts(r["not"], v, root),
    "pattern": lambda r, v, root: not isinstance(v, str) or bool(re.search(r["pattern"], v)),
    "required": lambda r, v, root: not isinstance(v, dict) or set(r["required"]) <= set(v),
    "properties": lambda r, v, root: (
        not isinstance(v, dict) or all(accepts(item, v[key], root) for key, item in r["properties"].items() if key in v)
    ),
    "additionalProperties": lambda r, v, root: (
        not isinstance(v, dict)
        or not _extra(r, v)
        or (
            r["additionalProperties"]
            if isinstance(r["additionalProperties"], bool)
            else all(accepts(r["additionalProperties"], item, root) for item in _extra(r, v))
        )
    ),
    "items": lambda r, v, root: not isinstance(v, list) or all(accepts(r["items"], item, root) for item in v),
    "prefixItems": lambda r, v, root: (
        not isinstance(v, list) or all(accepts(a, b, root) for a, b in zip(r["prefixItems"], v, strict=False))
    ),
    "minItems": lambda r, v, root: not isinstance(v, list) or len(v) >= r["minItems"],
    "maxItems": lambda r, v, root: not isinstance(v, list) or len(v) <= r["maxItems"],
}


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = settled(read_yaml(path).tree)
    return tree


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_knows_right_from_wrong(path: Path, schema: dict[str, Any]) -> None:
    good = read(path)
    assert accepts(schema, good, schema)
    optimizer = {"class_path": "llmkit.model.optim.AdamW", "init_args": {"learning_rate": 0.1}}
    wrong: dict[str, Any] = {
        "modle": {},
        "model": 3,
        "imports": {"a": 1},
        "model.atention": "lstm",
        "model.attention": "lsmt",
        "data.train": {"name": "mqarr"},
        "data.validation": {"name": "mqar", "pairs": "many"},
        "model.norm": {"name": "rms", "epsilon": 1e-6},
        "model.position": {"name": "learned", "class_path": "x.Y"},
        "model.head": ["generation"],
        "model.optimizer": optimizer,
        "model.scheduler": "steplr",  # it cannot do without step_size
        "model.feedforward": {"class_path": "no_module"},
        "model.dim": "large",
        "model.dropout": True,
        "model.decoding": {"temprature": 1},
        "data.format": "xml",
        "data.columns": ["a"],
        "data.tokenizer": {"name": "bpe", "vocab_size": "many"},
        "trainer.max_step": 3,
        "trainer.max_steps": 1.5,
        "trainer.precision": "8-bit",
    }
    for key, value in wrong.items():
        tree = copy.deepcopy(good)
        put(tree, key, value)
        assert not accepts(schema, tree, schema), f"{key}: {value}"


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.attention", None),
        ("model.attention", "my_package.attention.Mine"),
        ("model.attention", {"class_path": "my_package.attention.Mine", "init_args": {"anything": [1]}}),
        ("model.attention", {"class_path": "llmkit_plugins.attention.recurrent.LSTM"}),
        ("model.optimizer", "AdamW"),
        ("model.optimizer", {"name": "sgd", "lr": 0.1, "momentum": 0.9}),
        ("model.scheduler", {"name": "steplr", "step_size": 3}),
        ("model.decoding", {"num_beams": 4}),
        ("data.train", "${LLMKIT_DATA}/train.txt"),
        ("data.train", ["a.txt", "b.txt"]),
        ("data.train", {"source": "a.txt", "target": "b.txt"}),
        ("data.train", {"name": "mqar", "pairs": 4}),
        ("data.validation", {"length": [64, 128]}),
        ("trainer", None),
        ("trainer.callbacks", [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]),
        ("trainer.devices", [0, 1]),
        ("trainer.max_time", {"hours": 2}),
        ("trainer.precision", 16),
    ],
)
def test_the_schema_allows_every_form(key: str, value: Any, schema: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    put(tree, key, value)
    assert accepts(schema, tree, schema)


VALUES = (True, 3, 0.5, "text", ["a"], [3], {"a": "b"}, {"a": 3})


@pytest.mark.parametrize("cls", [LanguageModel, DataModule, DecodingOptions])
def test_the_schema_is_as_strict_as_the_parser(cls: type, schema: dict[str, Any]) -> None:
    rules = schemas.arguments(cls)["properties"]
    for name, kind in get_type_hints(cls.__init__).items():  # type: ignore[misc]
        if name == "return" or {f"model.{name}", f"data.{name}"} & set(registry.FAMILY_OF):
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=kind)
        assert accepts(rules[name], None, schema) == ("None" in str(kind))  # for the parser it is "not given"
        for value in VALUES:
            try:
                parser.parse_object({"value": value})
                right = True
            except Exception:
                right = False
            assert accepts(rules[name], value, schema) == right, f"{name}: {value!r}"


def test_the_schema_tells_all_of_each_argument(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    assert set(properties) == set(TOP_KEYS)
    for group in GROUPS:
        for name, rule in properties[group]["properties"].items():
            assert rule["description"] or group == "trainer", name
            assert "default" in rule, name
            if "$ref" not in rule and rule["default"] is not None:
                assert accepts(rule, rule["default"], schema), name
    assert properties["model"]["properties"]["attention"]["default"] == registry.DEFAULTS["attention"]
    assert properties["trainer"]["properties"]["gradient_clip_val"]["default"] == TRAINER_DEFAULTS["gradient_clip_val"]
    for family in registry.DEFAULTS.keys() - {"compression"}:  # of a command, not of a config
        names = [form["properties"]["name"]["enum"] for form in schema["$defs"][family]["anyOf"] if named(form)]
        assert names == [[name] for name in registry.entries(family)]


def named(form: dict[str, Any]) -> bool:
    return "name" in form.get("properties", {})


@pytest.mark.usefixtures("_no_local_plugins")
def test_the_schema_of_local_plugins_goes_into_a_file(schema: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    said = done("config", "schema", "--imports", LOCAL / "running_mean.py", "--output", file).out
    found = json.loads(file.read_text())
    content = read(LOCAL / "running_mean.yaml")
    assert not accepts(schema, content, schema)
    assert accepts(found, content, found)
    put(content, "model.attention", {"name": "running_mean", "bias": 3})
    assert not accepts(found, content, found)
    assert f"# yaml-language-server: $schema={file}" in said
    wrong = llmkit("config", "schema", "--output", tmp_path / "no" / "schema.json")
    assert wrong.code == 2 and "No such file or directory" in wrong.err


def test_a_broken_plugin_is_left_out_of_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = registry.Entry("norm", "broken", "no_such_module:Norm", "(local)")
    monkeypatch.setitem(registry._local["norm"], "broken", broken)
    text = json.dumps(schemas.choice("norm"))
    assert "broken" not in text and '"rms"' in text
    assert "left out of the schema: norm 'broken'" in capsys.readouterr().err


INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (tuple[int, ...], {"type": "array", "items": INTEGER}),
        (tuple[int, str], {"type": "array", "prefixItems": [INTEGER, TEXT], "minItems": 2, "maxItems": 2}),
        (dict[str, int], {"type": "object", "additionalProperties": INTEGER}),
        (int | list[str] | None, {"anyOf": [{"type": ["integer", "null"]}, {"type": "array", "items": TEXT}]}),
        (bool | torch.Tensor, {"type": "boolean"}),
        (Literal["a", 1], {"enum": ["a", 1]}),
        (int | Any, {}),
        (Callable[[int], int], {}),
    ],
)
def test_what_becomes_of_types(kind: Any, rule: dict[str, Any]) -> None:
    assert schemas.of_type(kind) == rule

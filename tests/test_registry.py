"""Names, discovery, short forms, and plugins that are broken."""

from __future__ import annotations

import abc
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from torch import Tensor, nn

from llmkit import commands as command
from llmkit import registry
from llmkit.contracts import Position
from llmkit.errors import UserError, nearest, unknown
from llmkit.registry import Entry

NAMES = {
    "tokenizer": ["bpe", "byte", "char", "pretrained", "unigram", "word", "wordpiece"],
    "attention": [
        *("differential", "grouped_query", "gru", "latent", "linear", "low_rank", "lstm", "min_gru", "multi_head"),
        *("pattern", "retention", "sliding_window", "standard"),
    ],
    "position": ["alibi", "learned", "none", "relative", "rotary", "sinusoidal"],
    "feedforward": ["gelu", "relu", "silu", "squared_relu", "swiglu"],
    "norm": ["layer", "rms"],
    "head": [
        *("classification", "completion", "generation", "masked_lm", "multi_label", "probe", "question_answering"),
        *("regression", "summarization", "token_classification", "translation"),
    ],
    "dataset": [
        *("compression", "fuzzy_recall", "in_context_recall", "induction", "memorization", "mqar", "noisy_recall"),
        *("parity", "s5", "selective_copying", "sorting"),
    ],
    "compression": [
        *("bf16", "drop_channels", "drop_heads", "drop_layers", "dynamic_int8", "gptq", "int4", "int8", "prune", "svd"),
        *("wanda", "whitened_svd"),
    ],
}
"""Every first-party plugin. A name that users write into configs must not vanish by accident."""


class Shift(Position):
    """Moves everything.

    A plugin for these tests.
    """

    def __init__(self, dim: int, max_length: int, amount: float = 1.0, sign: str = "plus") -> None:
        super().__init__(dim, max_length)
        self.amount, self.sign = amount, sign

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add the amount."""
        return x_BTD + self.amount


class Other(Position):
    """Another class that may want the same name."""


class Unfinished(Position, abc.ABC):
    """Has a method to define."""

    @abc.abstractmethod
    def more(self) -> None:
        """Not defined here."""


class Loose(Position):
    """Takes any argument."""

    def __init__(self, dim: int, max_length: int, **options: Any) -> None:
        super().__init__(dim, max_length)
        self.options = options


SHIFT = f"{__name__}.Shift"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_local", {family: {} for family in registry.DEFAULTS})


def message(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- names


def test_golden_list() -> None:
    found = {
        family: [name for name, entry in registry.entries(family).items() if entry.distribution == "llmkit"]
        for family in registry.DEFAULTS
    }
    assert found == NAMES


@pytest.mark.parametrize("family", NAMES)
def test_defaults_exist(family: str) -> None:
    """Data have none, they are files unless a config says otherwise; a model is compressed by a command."""
    assert registry.DEFAULTS[family] in ([""] if family in ("dataset", "compression") else NAMES[family])


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in NAMES.items() for name in names])
def test_every_plugin_can_be_loaded(family: str, name: str) -> None:
    cls = registry.find(family, name).load()
    assert issubclass(cls, registry.contract(family))
    assert cls.__doc__, "its first line is what `llmkit plugins` shows"


def test_unknown_names() -> None:
    assert message(lambda: registry.find("attention", "multihead")) == (
        f"unknown attention 'multihead'. Did you mean 'multi_head'? Allowed: {', '.join(NAMES['attention'])}."
    )
    text = message(lambda: registry.entries("atention"))
    assert text.startswith("unknown family 'atention'. Did you mean 'attention'? Allowed: attention, compression, ")
    assert registry.entries("head").keys() == set(NAMES["head"])


def test_nearest() -> None:
    assert nearest("ROTARI", ["rotary", "Learned"]) == " Did you mean 'rotary'?"
    assert nearest("learnt", ["rotary", "Learned"]) == " Did you mean 'Learned'?"
    assert nearest("qqq", ["rotary"]) == ""
    assert unknown("thing", "x", []) == "unknown thing 'x'. Allowed: (none)."


# --- register


def test_register() -> None:
    assert registry.register("position", "shift")(Shift) is Shift
    entry = registry.find("position", "shift")
    assert entry == Entry("position", "shift", f"{__name__}:Shift", "(local)")
    assert entry.class_path == SHIFT
    assert entry.load() is Shift
    assert list(registry.entries("position")) == sorted([*NAMES["position"], "shift"])
    registry.register("position", "shift")(Shift)  # the same class again: the file was imported twice


def test_a_name_belongs_to_one_class() -> None:
    registry.register("position", "shift")(Shift)
    assert message(lambda: registry.register("position", "shift")(Other)) == (
        f"position 'shift' is taken by {__name__}:Shift of (local)"
    )
    assert message(lambda: registry.register("position", "rotary")(Other)) == (
        "position 'rotary' is taken by llmkit_plugins.position:Rotary of llmkit"
    )
    registry.register("position", "other")(Other)  # and it may have another one


def test_register_refuses_what_breaks_the_contract() -> None:
    assert "unknown family 'positions'. Did you mean 'position'?" in message(
        lambda: registry.register("positions", "x")(Shift)
    )
    assert "does not derive from llmkit.contracts.Attention" in message(
        lambda: registry.register("attention", "x")(Shift)
    )
    not_a_class: Any = lambda dim, max_length: None  # noqa: E731
    assert "does not derive from llmkit.contracts.Position" in message(
        lambda: registry.register("position", "x")(not_a_class)
    )
    assert message(lambda: registry.register("position", "x")(Unfinished)) == (
        "position 'x': Unfinished is abstract, it still has to define more"
    )
    assert "x" not in registry.entries("position")


# --- short forms


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("shift", {"class_path": SHIFT}),
        ({"name": "shift"}, {"class_path": SHIFT}),
        ({"name": "shift", "amount": 2}, {"class_path": SHIFT, "init_args": {"amount": 2}}),
        ({"name": SHIFT, "amount": 2}, {"class_path": SHIFT, "init_args": {"amount": 2}}),
        (SHIFT, {"class_path": SHIFT}),
        ({"class_path": SHIFT}, {"class_path": SHIFT}),
        ({"class_path": SHIFT, "init_args": {"amount": 2}}, {"class_path": SHIFT, "init_args": {"amount": 2}}),
    ],
)
def test_expand(value: Any, expected: Any) -> None:
    registry.register("position", "shift")(Shift)
    assert registry.expand("position", value) == expected
    assert registry.expand("position", registry.expand("position", value)) == expected


def test_expand_refuses() -> None:
    assert message(lambda: registry.expand("position", "rotery")).startswith("unknown position 'rotery'. Did you mean")
    mixed = {"name": "rotary", "init_args": {"base": 1}}
    assert "Use one form" in message(lambda: registry.expand("position", mixed))
    for value in (None, 3, ["rotary"], {"base": 1}):
        assert "expected a name, or {name: ..., arguments}" in message(lambda: registry.expand("position", value))  # noqa: B023


@pytest.mark.parametrize(
    "value",
    [
        {"name": "shift", "amount": 2.0},
        {"class_path": SHIFT, "init_args": {"amount": 2.0}},
        functools.partial(Shift, amount=2.0),
    ],
)
def test_resolve_and_spec_of_are_inverse(value: Any) -> None:
    registry.register("position", "shift")(Shift)
    factory = registry.resolve("position", value)
    built = factory(8, 16)
    assert isinstance(built, Shift)
    assert (built.dim, built.max_length, built.amount, built.sign) == (8, 16, 2.0, "plus")
    spec = registry.spec_of(factory)
    assert spec == {"class_path": SHIFT, "init_args": {"amount": 2.0}}
    assert json.loads(json.dumps(spec)) == spec
    assert registry.spec_of(registry.resolve("position", spec)) == spec


@pytest.mark.parametrize("value", ["shift", SHIFT, {"class_path": SHIFT, "init_args": None}, Shift])
def test_resolve_without_arguments(value: Any) -> None:
    registry.register("position", "shift")(Shift)
    factory = registry.resolve("position", value)
    assert isinstance(factory(8, 16), Shift)
    assert registry.spec_of(factory) == {"class_path": SHIFT, "init_args": {}}


def test_plugin() -> None:
    registry.register("position", "shift")(Shift)
    assert registry.plugin("position", "shift", amount=3.0, sign="minus")(8, 16).sign == "minus"


def test_resolve_of_nothing_is_the_default() -> None:
    for family, name in [item for item in registry.DEFAULTS.items() if item[1]]:
        default = registry.find(family, name).load()
        assert registry.spec_of(registry.resolve(family, None)) == registry.spec_of(default)


def test_resolve_gives_fresh_objects() -> None:
    spec = {"class_path": f"{__name__}.Loose", "init_args": {"anything": [1]}}
    factory = registry.resolve("position", spec)
    assert factory(8, 16) is not factory(8, 16)
    assert factory(8, 16).options == {"anything": [1]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"name": SHIFT, "amuont": 2},
            "Shift has no argument 'amuont'. Did you mean 'amount'? It takes: amount, sign.",
        ),
        (f"{__name__}.Shfit", "cannot be imported: AttributeError: "),
        ("no_such_package.Position", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("torch.nn.Linear", "does not derive from llmkit.contracts.Position"),
        (f"{__name__}.Unfinished", "Unfinished is abstract, it still has to define more"),
    ],
)
def test_resolve_refuses(value: Any, text: str) -> None:
    assert text in message(lambda: registry.resolve("position", value))


def test_spec_of_refuses_what_a_checkpoint_cannot_hold() -> None:
    assert "expected a class or functools.partial of a class" in message(
        lambda: registry.spec_of(lambda dim: nn.Identity())
    )


def test_spec_of_what_the_parser_hands_out() -> None:
    def instantiate(cls: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    factory = functools.partial(instantiate, Shift, amount=2.0)
    assert registry.spec_of(factory) == {"class_path": SHIFT, "init_args": {"amount": 2.0}}


# --- `llmkit plugins`


GOOD = '''
from llmkit.contracts import Position

print("noise while importing")

class Good(Position):
    """A good one.

    More text.
    """
'''

MINE = '''
from llmkit import Position, register


@register("position", "mine")
class Mine(Position):
    """My own."""
'''


def install(folder: Path, name: str, points: str, **modules: str) -> None:
    """Write what an installed distribution looks like."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)


def llmkit(*argv: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    line = [sys.executable, "-m", "llmkit", *argv]
    return forked.run(line, env=environment, cwd=cwd)


def test_broken_plugins_are_listed_and_disturb_nobody(tmp_path: Path) -> None:
    install(
        tmp_path,
        "some-plugins",
        "[llmkit.position]\ngood = good_one:Good\nbroken = broken_one:Broken\nmissing = good_one:Missing\n"
        "wrong = collections:OrderedDict\n",
        good_one=GOOD,
        broken_one="raise RuntimeError('two\\nlines')\n",
    )
    answer = llmkit("plugins", "position", "--json", path=tmp_path, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "noise while importing" in answer.stderr
    found = {item["name"]: item for item in json.loads(answer.stdout)}
    assert list(found) == sorted([*NAMES["position"], "good", "broken", "missing", "wrong"])
    assert found["good"] == {
        "family": "position",
        "name": "good",
        "description": "A good one.",
        "file": "good_one.py",
        "line": 6,
        "distribution": "some-plugins",
        "default": False,
        "error": None,
    }
    errors = {name: item["error"] for name, item in found.items() if item["error"]}
    assert list(errors) == ["broken", "missing", "wrong"]
    assert "(broken_one:Broken) cannot be imported: RuntimeError: two lines" in errors["broken"]
    assert "AttributeError" in errors["missing"]
    assert "does not derive from llmkit.contracts.Position" in errors["wrong"]
    assert [name for name, item in found.items() if item["default"]] == ["rotary"]
    for name in NAMES["position"]:
        assert Path(found[name]["file"]).is_file()
        assert found[name]["distribution"] == "llmkit"
        assert found[name]["description"]


def test_a_broken_plugin_fails_only_who_uses_it(tmp_path: Path) -> None:
    install(tmp_path, "some-plugins", "[llmkit.position]\nbroken = broken_one:Broken\n", broken_one="1 / 0\n")
    code = (
        "from llmkit import plugin, UserError\nplugin('position', 'rotary')\n"
        "try: plugin('position', 'broken')\nexcept UserError as error: print(error)"
    )
    (tmp_path / "use.py").write_text(code)
    answer = forked.run([sys.executable, str(tmp_path / "use.py")], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert answer.stdout.strip().endswith("cannot be imported: ZeroDivisionError: division by zero")


def test_two_packages_with_one_name(tmp_path: Path) -> None:
    install(tmp_path, "some-plugins", "[llmkit.position]\nrotary = good_one:Good\n", good_one=GOOD)
    answer = llmkit("plugins", "position", path=tmp_path, cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("llmkit: error: two installed plugins are called position 'rotary': ")
    for text in ("good_one:Good of some-plugins", "llmkit_plugins.position:Rotary of llmkit"):
        assert text in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run_verb("plugins", ["position"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FAMILY", "NAME", "WHERE", "DISTRIBUTION", "DESCRIPTION"]
    assert [line.split()[1] for line in lines[1:-2]] == NAMES["position"]
    starred = [line for line in lines[1:-2] if line.split()[2] == "*"]
    assert [line.split()[1] for line in starred] == ["rotary"]
    assert len({line.index(" llmkit ") for line in lines[1:-2]}) == 1


def test_imports_register_before_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_position_file.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert command.run_verb("plugins", ["position", "--json", "--imports", "my_position_file.py"]) == 0
    mine = next(item for item in json.loads(capsys.readouterr().out) if item["name"] == "mine")
    assert mine["file"] == "my_position_file.py"
    assert mine["distribution"] == "(local)"
    assert mine["description"] == "My own."


def test_unknown_family_is_told() -> None:
    assert message(lambda: command.run_verb("plugins", ["positions"])).startswith(
        "unknown family 'positions'. Did you mean"
    )

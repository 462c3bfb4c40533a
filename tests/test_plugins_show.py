"""``llmkit plugins show``: what it tells, and its formulas against counts on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import done, llmkit

from llmkit.commands.plugins.formula import find
from llmkit.commands.plugins.show import papers

OWN = '''
import torch
from torch import nn

from llmkit.contracts import Attention, Feedforward, Head, Position
from llmkit.sequence import State


class Odd(Feedforward):
    """As many weights as no polynomial has.

    More of it, see arXiv:1234.56789.

    Args:
        power: of the width;
            one and a half.
        names: some.
    """

    def __init__(self, dim: int, power: float = 1.5, names: tuple[str, ...] = ("a", "b"), *, other=None):
        super().__init__(dim)
        self.weight = nn.Parameter(torch.zeros(int(dim**power)))

    def forward(self, x_BTD):
        return x_BTD


class Real(Feedforward):
    """Looks at a number when it is built, so that it needs memory."""

    def __init__(self, dim):
        super().__init__(dim)
        self.weight = nn.Parameter(torch.ones(dim, 2 * dim))
        assert self.weight.sum().item() == 2 * dim * dim

    def forward(self, x_BTD):
        return x_BTD


class Small(Feedforward):
    """No wider than 300."""

    def __init__(self, dim):
        from llmkit.errors import UserError

        if dim > 300:
            raise UserError(f"dim {dim} is more than 300")
        super().__init__(dim)
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD):
        return x_BTD


class Growing(Attention):
    """Keeps what it has seen, the last seven columns, and turns nothing."""

    roles = frozenset({"causal"})

    def __init__(self, dim, role, seen: int = 7):
        super().__init__(dim, role)
        self.seen = seen

    def forward(self, x_BTD, seq, *, memory=None, state=None):
        if state is not None:
            state["x"] = torch.cat([state["x"], x_BTD], 1)[:, -self.seen :]
        seq.bias(seq, 1)
        return x_BTD

    def init_state(self, batch_size, max_length, like):
        return State(x=like.new_zeros(batch_size, 0, self.dim))

    def mixing_flops(self, length):
        return self.dim**2 / (3 * length)


class Broken(Growing):
    """Takes a single length only."""

    def forward(self, x_BTD, seq, *, memory=None, state=None):
        return x_BTD.view(1, 77)


class Stateless(Growing):
    """Keeps nothing."""

    def init_state(self, batch_size, max_length, like):
        return None
'''


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("show")
    (folder / "shown_plugins.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield


def show(*words: object) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(done("plugins", "show", *words, "--json").out)
    return facts


def cost(facts: dict[str, Any], name: str) -> dict[str, tuple[str | None, float]]:
    """Return (formula, number) of a cost, by role."""
    return {line.get("role", ""): (line[name]["formula"], line[name]["number"]) for line in facts["cost"]}


D, T = 48, 20


@pytest.mark.parametrize(
    ("words", "parameters", "flops"),
    [
        # Queries, keys, values and output; one scale for each channel of a head.
        (("multi_head",), ("4 D^2 + D/4", 4 * D * D + D // 4), ("8 D^2 + 2 D T", 8 * D * D + 2 * D * T)),
        (("multi_head", "--init.num_heads", 6), ("4 D^2 + D/6", 4 * D * D + 8), ("8 D^2 + 2 D T", 20352)),
        (("multi_head", "--init.qk_norm", "false"), ("4 D^2", 9216), ("8 D^2 + 2 D T", 20352)),
        (
            ("multi_head", "--init.qk_norm=false", "--init.bias=true"),  # a bias has one dimension, and costs nothing
            ("4 D^2 + 4 D", 4 * D * D + 4 * D),
            ("8 D^2 + 2 D T", 20352),
        ),
        # A quarter of the keys and values.
        (
            ("grouped_query", "--init.num_kv_heads", 1),
            ("5 D^2/2 + D/4", 2 * D * D + 2 * D * D // 4 + D // 4),
            ("5 D^2 + 2 D T", 5 * D * D + 2 * D * T),
        ),
        # Four gates, each from the input and from the state, each with two biases; three of a GRU.
        (("lstm",), ("8 D^2 + 8 D", 8 * D * D + 8 * D), ("16 D^2", 16 * D * D)),
        (("gru",), ("6 D^2 + 6 D", 6 * D * D + 6 * D), ("12 D^2", 12 * D * D)),
    ],
)
def test_cost_of_attention(words: tuple[object, ...], parameters: tuple[str, int], flops: tuple[str, int]) -> None:
    facts = show(f"attention/{words[0]}", *words[1:], "--dim", D, "--context", T)
    assert cost(facts, "parameters")["causal"] == parameters
    assert cost(facts, "flops_per_token")["causal"] == flops


def test_cost_by_role() -> None:
    facts = show("attention/multi_head", "--dim", D, "--context", T)
    assert {role: found[0] for role, found in cost(facts, "flops_per_token").items()} == {
        "causal": "8 D^2 + 2 D T",
        "bidirectional": "8 D^2 + 4 D T",  # a causal position sees half of the others
        "cross": "8 D^2 + 4 D T",
    }
    # Two directions of half the width: per direction 4 gates of D/2 from D inputs and D/2 states, and two biases.
    half = D // 2
    found = cost(show("attention/lstm", "--dim", D), "parameters")["bidirectional"]
    assert found == ("6 D^2 + 8 D", 2 * (4 * half * (D + half) + 8 * half))


@pytest.mark.parametrize(
    ("words", "size", "grows"),
    [
        (("attention/multi_head",), ("2 D T", 2 * D * T), True),  # keys and values
        (("attention/grouped_query", "--init.num_kv_heads", 1), ("D T/2", D * T // 2), True),
        (("attention/lstm",), ("2 D", 2 * D), False),
        (("attention/gru",), ("D", D), False),
        (("shown_plugins:Growing",), ("7 D", 7 * D), False),  # empty at first, full after seven columns
        (("shown_plugins:Growing", "--init.seen", 1000), ("D T", D * T), True),
    ],
)
def test_decoding_state(words: tuple[object, ...], size: tuple[str, int], grows: bool) -> None:
    state = show(*words, "--dim", D, "--context", T)["supports"]["decoding_state"]
    assert (state["formula"], state["number"], state["grows"]) == (*size, grows)


def test_what_attention_supports() -> None:
    assert show("attention/lstm")["supports"]["roles"] == ["causal", "bidirectional"]
    assert show("attention/lstm")["supports"]["positions"] == ["add"]
    assert show("attention/multi_head")["supports"]["roles"] == ["causal", "bidirectional", "cross"]
    assert show("attention/multi_head")["supports"]["positions"] == ["add", "rotate", "bias"]
    facts = show("shown_plugins.py:Stateless")
    assert facts["supports"] == {"roles": ["causal"], "positions": ["add", "bias"], "decoding_state": None}
    assert "each new token costs a full pass" in done("plugins", "show", "shown_plugins.py:Stateless").out
    # Not polynomial, but of the form all the same.
    formula, number = cost(facts, "flops_per_token")["causal"]
    assert formula == "D^2/(3 T)" and number == pytest.approx(256 / 3)


def test_limits() -> None:
    facts = show("attention/multi_head", "--dim", 30)
    assert facts["limits"][0].startswith("dim 30 is not divisible by num_heads 4")
    assert facts["cost"] == []
    assert "dim 30 is not divisible" in done("plugins", "show", "attention/multi_head", "--dim", 30).out
    # An odd width is tried too: a causal LSTM can have it, a bidirectional one cannot.
    (limit,) = show("attention/lstm", "--dim", 30)["limits"]
    assert limit.startswith("dim 31 must be even")
    facts = show("attention/lstm", "--dim", 31)
    assert [line["role"] for line in facts["cost"]] == ["causal"]
    assert show("position/rotary")["limits"] == ["rotary positions need an even width of each head, got 257"]
    assert show("feedforward/gelu")["limits"] == []
    assert show("tokenizer/pretrained")["limits"] == ["the argument path must be given"]
    # One that cannot be run is shown as far as it goes.
    facts = show("shown_plugins:Broken")
    assert facts["supports"] == {"roles": ["causal"]} and cost(facts, "parameters") == {"causal": ("0", 0)}
    (limit,) = facts["limits"]
    assert limit.startswith("it raises RuntimeError: ") and "llmkit plugins check" in limit
    # A width that others are refused beyond has numbers, and no formula.
    facts = show("shown_plugins:Small", "--dim", 200)
    assert cost(facts, "parameters") == {"": (None, 200)}


@pytest.mark.parametrize(
    ("target", "formula", "number"),
    [
        ("feedforward/gelu", "8 D^2", 8 * D * D),
        ("norm/layer", "2 D", 2 * D),
        ("norm/rms", "D", D),
        ("position/learned", "D T", D * T),
        ("position/rotary", "0", 0),
        ("shown_plugins:Odd", None, int(D**1.5)),
        ("shown_plugins:Real", None, 2 * D * D),
    ],
)
def test_cost_of_small_parts(target: str, formula: str | None, number: int) -> None:
    facts = show(target, "--dim", D, "--context", T)
    assert cost(facts, "parameters") == {"": (formula, number)}
    flops = cost(facts, "flops_per_token") if "feedforward" in facts["family"] else None
    if target == "feedforward/gelu":
        assert flops == {"": ("16 D^2", 16 * D * D)}


def test_a_rounded_width_has_a_formula_at_round_widths() -> None:
    (line,) = show("feedforward/swiglu", "--dim", 100)["cost"]
    exact = 3 * 100 * 8 * math.ceil(4 * 100 / 12)  # three matrices, hidden width rounded up to a multiple of 8
    assert line["parameters"] == {"number": exact, "formula": "8 D^2", "only_multiples_of": 1200}
    printed = done("plugins", "show", "feedforward/swiglu", "--dim", 100).out
    assert f"{exact:,} (8 D^2 where D is a multiple of 1,200)" in printed


def test_who_it_is() -> None:
    facts = show("attention/multi_head")
    assert (facts["family"], facts["name"], facts["distribution"]) == ("attention", "multi_head", "llmkit")
    assert facts["class"] == "llmkit_plugins.attention.softmax.MultiHead"
    assert facts["default"] is True and facts["version"]
    lines = Path(facts["file"]).read_text(encoding="utf-8").splitlines()
    assert lines[facts["line"] - 1].startswith("class MultiHead(")
    assert facts["description"] == "Several heads, each with its own queries, keys and values (the usual choice)."
    assert facts["details"].startswith("Vaswani et al. 2017") and "Args" not in facts["details"]
    assert facts["papers"][0] == "https://arxiv.org/abs/1706.03762"


def test_arguments() -> None:
    found = {item["name"]: item for item in show("attention/multi_head")["arguments"]}
    assert list(found) == ["num_heads", "qk_norm", "bias", "dropout"]  # not dim and role, which are passed
    assert found["num_heads"] == {
        **{"name": "num_heads", "type": "int", "required": False, "default": 4},
        "description": "number of heads.",
    }
    (path,) = show("tokenizer/pretrained")["arguments"]
    assert path["required"] and path["default"] is None

    facts = show("shown_plugins:Odd")
    assert facts["papers"] == ["https://arxiv.org/abs/1234.56789"] and facts["version"] is None
    power, names, other = facts["arguments"]
    assert power["description"] == "of the width; one and a half." and power["default"] == 1.5
    assert names["type"] == "tuple[str, ...]" and names["default"] == ["a", "b"]
    assert other == {"name": "other", "type": "", "required": False, "default": None, "description": ""}


def test_what_heads_and_tokenizers_support() -> None:
    head = show("head/classification")
    assert head["supports"] == {
        **{"topology": "encoder", "layout": "examples", "inputs": ["text"], "targets": ["label"], "texts": ["text"]},
        "monitor": ["accuracy", "max"],
        "metrics": ["loss", "accuracy", "macro_f1", "confusion_matrix"],
    }
    assert head["cost"] == []
    tokenizer = show("tokenizer/byte")["supports"]
    assert (tokenizer["trained"], tokenizer["vocab_size"], tokenizer["special_ids"]["pad"]) == (True, 262, 0)
    tokenizer = show("tokenizer/bpe")["supports"]
    assert (tokenizer["trained"], tokenizer["vocab_size"]) == (False, None)


@pytest.mark.parametrize(
    "target",
    ["attention/gru", "position/alibi", "feedforward/swiglu", "norm/rms", "tokenizer/word", "head/translation"],
)
def test_text_says_what_the_data_says(target: str) -> None:
    facts, printed = show(target), done("plugins", "show", target).out
    assert printed.startswith(f"{facts['family']} {facts['name']}, from llmkit {facts['version']}\n")
    for text in (facts["description"], facts["class"], *facts["papers"], *facts["limits"]):
        assert text in printed
    for item in facts["arguments"]:
        assert any(line.split()[:1] == [item["name"]] and item["description"] in line for line in printed.splitlines())
    for name in facts["supports"]:
        assert name.replace("_", " ") in printed
    for line in facts["cost"]:
        for found in (value for value in line.values() if isinstance(value, dict)):
            assert found["formula"] in printed and f"{found['number']:,}" in printed


def test_papers() -> None:
    text = "See arXiv:1706.03762, section 3; doi:10.1162/neco.1997.9.8.1735. Again arXiv:1706.03762 and (doi:10.1/a-b)."
    assert papers(text) == [
        "https://arxiv.org/abs/1706.03762",
        "https://doi.org/10.1162/neco.1997.9.8.1735",
        "https://doi.org/10.1/a-b",
    ]
    assert papers("arXiv:cmp-lg/9408015") == ["https://arxiv.org/abs/cmp-lg/9408015"]
    assert papers("no paper") == []


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (lambda d, t: 3 * d * d - d / 3 + 5, "3 D^2 - D/3 + 5"),
        (lambda d, t: 1.5 * d * d / t - t * t, "3 D^2/(2 T) - T^2"),
        (lambda d, t: -d, "-D"),
        (lambda d, t: 0, "0"),
        (lambda d, t: 4096 * t, "4,096 T"),
        (lambda d, t: 0.1 * d * t, "D T/10"),  # not exact in binary
        (lambda d, t: 2 * d * max(0, t - 20) + 1 / t, "2 D T - 40 D + 1/T"),
        (lambda d, t: d**3, None),
        (lambda d, t: 2 * d * min(t, 50), None),
        (lambda d, t: d * math.log2(t), None),
        (lambda d, t: math.pi * d, None),
    ],
)
def test_formulas(count: Callable[[int, int], float], expected: str | None) -> None:
    found = find(count, 48, 20)
    assert (None if found is None else str(found)) == expected
    if found is not None:
        assert float(found(336, 260)) == pytest.approx(count(336, 260))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("attention/multi_hed",), ("unknown attention 'multi_hed'", "'multi_head'")),
        (("multi_head",), ("'multi_head' names no plugin", "family/name")),
        (("attention/multi_head", "--init.heads", 3), ("no argument 'heads'", "num_heads")),
        (("attention/multi_head", "--dim", 0), ("--dim must be at least 1",)),
        (("attention/multi_head", "--context", "x"), ("--context", "'x'")),
        (("shown_plugins:Nothing",), ("unknown class 'Nothing'",)),
        ((), ("TARGET",)),
    ],
)
def test_refused(words: tuple[object, ...], says: tuple[str, ...]) -> None:
    result = llmkit("plugins", "show", *words)
    assert result.code == 2 and len(result.err.splitlines()) == 1, result
    for text in says:
        assert text in result.err

"""``llmkit plugins show``: its facts, and its numbers against counts on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import done, llmkit

from llmkit.commands.plugins.show import text as show_text
from llmkit.testing.facts import papers

OWN = '''
import torch
from torch import nn

from llmkit.contracts import Attention, Feedforward, Head, Position
from llmkit.ops.fused import fused
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


class Whole(Growing):
    """The four maps of the default in one weight."""

    def __init__(self, dim, role, num_heads=2):
        super().__init__(dim, role)
        self.whole = nn.Linear(dim, 4 * dim, bias=False)


class Marked(Whole):
    """The same, and each map is named."""

    def __init__(self, dim, role, num_heads=2, **others):
        super().__init__(dim, role, num_heads)
        fused(self.whole, [dim] * 4)
        self.share = nn.Parameter(torch.zeros(()))


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


Formula = Callable[[int, int], float]
"""A number from the width D and the length T, as counted on paper."""

D, T = 48, 20


def cost(facts: dict[str, Any], name: str) -> dict[str, tuple[float, float | None]]:
    """Return a cost at the width and at twice the width, by role."""
    return {line.get("role", ""): (line[name]["at_dim"], line[name]["at_twice_dim"]) for line in facts["cost"]}


def expected(formula: Formula) -> tuple[float, float]:
    return formula(D, T), formula(2 * D, T)


def mixing(d: int, t: int) -> float:
    """FLOPs of four square matrices and of causal scores and sums."""
    return 8 * d * d + 2 * d * t


@pytest.mark.parametrize(
    ("words", "parameters", "flops"),
    [
        # Queries, keys, values and output; one scale for each channel of a head.
        (("multi_head",), lambda d, t: 4 * d * d + d // 4, mixing),
        (("multi_head", "--init.num_heads", 6), lambda d, t: 4 * d * d + d // 6, mixing),
        (("multi_head", "--init.qk_norm", "false"), lambda d, t: 4 * d * d, mixing),
        # A bias has one dimension, and costs nothing.
        (("multi_head", "--init.qk_norm=false", "--init.bias=true"), lambda d, t: 4 * d * d + 4 * d, mixing),
        (
            ("grouped_query", "--init.num_kv_heads", 1),  # a quarter of the keys and values
            lambda d, t: 2 * d * d + 2 * d * d // 4 + d // 4,
            lambda d, t: 5 * d * d + 2 * d * t,
        ),
        # Four gates, each from the input and from the state, each with two biases; three of a GRU.
        (("lstm",), lambda d, t: 8 * d * d + 8 * d, lambda d, t: 16 * d * d),
        (("gru",), lambda d, t: 6 * d * d + 6 * d, lambda d, t: 12 * d * d),
    ],
)
def test_cost_of_attention(words: tuple[object, ...], parameters: Formula, flops: Formula) -> None:
    facts = show(f"attention/{words[0]}", *words[1:], "--dim", D, "--context", T)
    assert cost(facts, "parameters")["causal"] == expected(parameters)
    assert cost(facts, "flops_per_token")["causal"] == expected(flops)


def test_cost_by_role() -> None:
    facts = show("attention/multi_head", "--dim", D, "--context", T)
    assert cost(facts, "flops_per_token") == {
        "causal": expected(mixing),
        "bidirectional": expected(lambda d, t: 8 * d * d + 4 * d * t),  # a causal position sees half of the others
        "cross": expected(lambda d, t: 8 * d * d + 4 * d * t),
    }
    # Two directions of half the width: per direction 4 gates of D/2 from D inputs and D/2 states, and two biases.
    found = cost(show("attention/lstm", "--dim", D), "parameters")["bidirectional"]
    assert found == expected(lambda d, t: 2 * (4 * d // 2 * (d + d // 2) + 8 * d // 2))


@pytest.mark.parametrize(
    ("words", "size", "grows"),
    [
        (("attention/multi_head",), lambda d, t: 2 * d * t, True),  # keys and values
        (("attention/grouped_query", "--init.num_kv_heads", 1), lambda d, t: d * t // 2, True),
        (("attention/lstm",), lambda d, t: 2 * d, False),
        (("attention/gru",), lambda d, t: d, False),
        (("shown_plugins:Growing",), lambda d, t: 7 * d, False),  # empty at first, full after seven columns
        (("shown_plugins:Growing", "--init.seen", 1000), lambda d, t: d * t, True),
    ],
)
def test_decoding_state(words: tuple[object, ...], size: Formula, grows: bool) -> None:
    state = show(*words, "--dim", D, "--context", T)["supports"]["decoding_state"]
    assert (state["at_dim"], state["at_twice_dim"], state["grows"]) == (*expected(size), grows)


def test_what_attention_supports() -> None:
    assert show("attention/lstm")["supports"]["roles"] == ["causal", "bidirectional"]
    assert show("attention/lstm")["supports"]["positions"] == ["add"]
    assert show("attention/multi_head")["supports"]["roles"] == ["causal", "bidirectional", "cross"]
    assert show("attention/multi_head")["supports"]["positions"] == ["add", "rotate", "bias"]
    facts = show("shown_plugins.py:Stateless")
    assert facts["supports"] == {"roles": ["causal"], "positions": ["add", "bias"], "decoding_state": None}
    assert "each new token costs a full pass" in done("plugins", "show", "shown_plugins.py:Stateless").out
    # Not a whole number: D^2 / (3 T).
    assert cost(facts, "flops_per_token")["causal"] == pytest.approx((256 / 3, 4 * 256 / 3))
    assert "85.33" in done("plugins", "show", "shown_plugins.py:Stateless").out


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
    assert facts["supports"] == {"roles": ["causal"]} and cost(facts, "parameters") == {"causal": (0, 0)}
    (limit,) = facts["limits"]
    assert limit.startswith("it raises RuntimeError: ") and "llmkit plugins check" in limit
    # Twice the width is refused.
    facts = show("shown_plugins:Small", "--dim", 200)
    assert cost(facts, "parameters") == {"": (200, None)}
    assert "200         -" in done("plugins", "show", "shown_plugins:Small", "--dim", 200).out


@pytest.mark.parametrize(
    ("target", "formula"),
    [
        ("feedforward/gelu", lambda d, t: 8 * d * d),
        # Three matrices; the hidden width is rounded up to a multiple of 8.
        ("feedforward/swiglu", lambda d, t: 3 * d * 8 * math.ceil(4 * d / 12)),
        ("norm/layer", lambda d, t: 2 * d),
        ("norm/rms", lambda d, t: d),
        ("position/learned", lambda d, t: d * t),
        ("position/rotary", lambda d, t: 0),
        ("shown_plugins:Odd", lambda d, t: int(d**1.5)),
        ("shown_plugins:Real", lambda d, t: 2 * d * d),
    ],
)
def test_cost_of_small_parts(target: str, formula: Formula) -> None:
    facts = show(target, "--dim", D, "--context", T)
    assert cost(facts, "parameters") == {"": expected(formula)}
    assert ("flops_per_token" in facts["cost"][0]) == (facts["family"] == "feedforward")
    if target == "feedforward/gelu":
        assert cost(facts, "flops_per_token") == {"": expected(lambda d, t: 16 * d * d)}


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
    assert list(found) == ["num_heads", "qk_norm", "bias", "dropout", "head_dim", "scale"]  # not dim and role
    assert found["num_heads"] == {
        **{"name": "num_heads", "type": "int", "required": False, "default": 4},
        "description": "number of heads.",
    }
    path, _ = show("tokenizer/pretrained")["arguments"]
    assert path["required"] and path["default"] is None

    facts = show("shown_plugins:Odd")
    assert facts["papers"] == ["https://arxiv.org/abs/1234.56789"] and facts["version"] is None
    power, names, other = facts["arguments"]
    assert power["description"] == "of the width; one and a half." and power["default"] == 1.5
    assert names["type"] == "tuple[str, ...]" and names["default"] == ["a", "b"]
    assert other == {"name": "other", "type": "", "required": False, "default": None, "description": ""}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("attention/multi_head",), []),
        (
            ("attention/multi_head", "--init.qk_norm", "false"),
            ["qk_norm is false (true there)", "lacks weights 12 (qk_scale)"],
        ),
        # Four square maps in one weight would be queries, keys, values and output in one: Muon has to know.
        (
            ("shown_plugins:Whole",),
            [
                "num_heads is 2 (4 there)",
                "no argument qk_norm (true there), bias (false there), dropout (0.0 there), head_dim (null there), "
                "scale (null there)",
                "lacks weights 12 (qk_scale), 4 of 48 x 48 (qkv.weight, out.weight)",
                "has further weights 192 x 48 (whole.weight)",
            ],
        ),
        (
            ("shown_plugins:Marked",),
            ["num_heads is 2 (4 there)", "lacks weights 12 (qk_scale)", "has further weights a number (share)"],
        ),
        (("norm/layer",), ["eps is 1e-05 (1e-06 there)", "has further weights 48"]),
        (
            ("position/learned",),
            ["no argument base (10000.0 there), scaling (null there)", "has further weights 20 x 48 (table.weight)"],
        ),
        (("head/translation",), []),
    ],
)
def test_what_differs_from_the_default(words: tuple[object, ...], expected: list[str]) -> None:
    facts = show(*words, "--dim", D, "--context", T)
    assert facts["differences"] == expected
    name = {"position": "rotary", "norm": "rms"}.get(facts["family"], "multi_head")
    section = f"\ndiffers from the default, {name}\n  {'; '.join(expected)}\n"
    assert (section in show_text(facts)) == bool(expected)


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
            assert f"{found['at_dim']:,}" in printed and f"{found['at_twice_dim']:,}" in printed


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
    ("words", "says"),
    [
        (("attention/multi_hed",), ("unknown attention 'multi_hed'", "'multi_head'")),
        (("multi_haed",), ("'multi_haed' does not name a plugin", "family/name", "Did you mean 'multi_head'?")),
        (("attention/multi_head", "--init.heads", 3), ("no argument 'heads'", "num_heads")),
        (("attention/multi_head", "--dim", 0), ("argument --dim: must be at least 1, got 0",)),
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

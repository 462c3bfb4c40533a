"""Attention by a pattern of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from command import TINY, done, llmkit

from llmkit import LanguageModel, UserError, load, plugin
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence
from llmkit_plugins.attention.pattern import Pattern
from llmkit_plugins.attention.recurrent import LSTM
from llmkit_plugins.attention.softmax import MultiHead
from llmkit_plugins.attention.window import SlidingWindow

VARIANTS: list[Any] = [{"name": "sliding_window", "window": 3, "num_heads": 2}, "lstm", "multi_head"]


def network(attention: Any, layers: int = 4) -> Backbone:
    names = {"position": "rotary", "feedforward": "gelu", "norm": "rms"}
    parts: dict[str, Any] = {family: plugin(family, name) for family, name in names.items()}
    cross = plugin("attention", "multi_head")
    sizes: dict[str, Any] = {"vocab_size": 11, "dim": 8, "num_layers": layers, "max_length": 12}
    return Backbone(topology="decoder", attention=attention, cross_attention=cross, **parts, **sizes).eval()


@torch.no_grad()
def test_each_layer_has_its_variant() -> None:
    """The numbers are those of a network whose layers were put together by hand, with the decoding state too."""
    torch.manual_seed(0)
    net = network(plugin("attention", "pattern", variants=VARIANTS))
    kinds = [type(layer.attention.variant) for layer in net.decoder]  # type: ignore[union-attr]
    assert kinds == [SlidingWindow, LSTM, MultiHead, SlidingWindow]
    by_hand = network(plugin("attention", "multi_head"))
    for own, layer in zip(by_hand.decoder, net.decoder, strict=True):
        own.attention = layer.attention.variant  # type: ignore[union-attr]
    names = {name: name.replace("attention.variant.", "attention.") for name in net.state_dict()}
    by_hand.load_state_dict({names[name]: value for name, value in net.state_dict().items()})
    ids = torch.randint(11, (2, 9))
    whole = net.decode(ids, Sequence.of(ids))
    torch.testing.assert_close(whole, by_hand.decode(ids, Sequence.of(ids)))
    state = net.init_state(2, 9)
    steps = [net.decode(ids[:, i : i + 1], Sequence.dense(1, start=i), state=state) for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert net.flops_per_position(9) == by_hand.flops_per_position(9)


def test_a_list_in_a_config(tmp_path: Any) -> None:
    """A list stands for the plugin: in a file, on the command line, and in the checkpoint."""
    (tmp_path / "text.txt").write_text("some text to train on\n" * 20)
    words = ("fit", "--data.train", tmp_path / "text.txt", "--output", tmp_path, *TINY, "--model.num_layers", "2")
    run = done(*words, "--model.attention", "[{name: sliding_window, window: 3}, lstm]")
    model = load(run.checkpoint)
    assert [type(layer.attention.variant) for layer in model.network.decoder] == [SlidingWindow, LSTM]  # type: ignore[union-attr]
    assert model.spec["attention"]["init_args"] == {"variants": [{"name": "sliding_window", "window": 3}, "lstm"]}
    again = done("fit", "--config", run.folder / "config.yaml", "--output", tmp_path / "again")
    assert load(again.checkpoint).spec["attention"] == model.spec["attention"]
    for value, says in {
        "[lstm, multi_hed]": "model.attention: unknown attention 'multi_hed'. Did you mean 'multi_head'?",
        "[{name: multi_head, window: 3}]": "model.attention: MultiHead has no argument 'window'.",
        "[llmkit_plugins.attention.recurrent.LSTM]": "expected the name of a variant",
        "[]": "variants should be a list of at least one variant",
    }.items():
        result = llmkit(*words, "--model.attention", value)
        assert result.code == 2 and says in result.err and result.err.count("\n") == 1, result.err


def test_what_a_variant_cannot_be() -> None:
    with pytest.raises(UserError, match="lstm cannot be built as 'cross', only as bidirectional, causal"):
        Pattern(8, "cross", ["multi_head", "lstm"])
    heads: dict[str, Any] = {"head": plugin("head", "translation"), "attention": plugin("attention", "pattern")}
    assert LanguageModel(**heads, dim=16, num_layers=1).spec["cross_attention"]["class_path"].endswith("MultiHead")

"""Initial weights: what they depend on, and the loss that a new network starts from."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import llmkit
from llmkit.contracts import Attention
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence


class Wasteful(Attention):
    """Draws far more than any other variant, its own weights included."""

    def __init__(self, dim: int, role: Any) -> None:
        super().__init__(dim, role)
        torch.rand(1000)
        self.out = nn.Linear(dim, dim, bias=False)
        self.own = nn.Parameter(torch.randn(dim))

    def forward(self, x_BTD: Tensor, seq: Sequence, **other: Any) -> Tensor:
        """Return the input, scaled."""
        return self.out(x_BTD * self.own)  # type: ignore[no-any-return]


def network(topology: str = "decoder", seed: int | None = 0, **changes: Any) -> Backbone:
    if seed is not None:
        torch.manual_seed(seed)
    sizes = {"vocab_size": 65, "dim": 16, "num_layers": 2, "max_length": 24}
    plugins = {"attention": "multi_head", "position": "learned", "feedforward": "relu", "norm": "rms"}
    parts = {key: changes.pop(key, name) for key, name in plugins.items()}
    parts = {key: llmkit.plugin(key, value) if isinstance(value, str) else value for key, value in parts.items()}
    cross = llmkit.plugin("attention", "multi_head")
    return Backbone(topology=topology, cross_attention=cross, **{**sizes, **parts, **changes})  # type: ignore[arg-type]


def shared(one: Backbone, other: Backbone) -> dict[str, bool]:
    """Return whether the drawn weights of equal name and shape are equal."""
    theirs = dict(other.named_parameters())
    drawn = {name: value for name, value in one.named_parameters() if value.std() > 0}
    return {
        name: torch.equal(value, theirs[name])
        for name, value in drawn.items()
        if name in theirs and theirs[name].shape == value.shape
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "lstm"},
        {"attention": "differential"},
        {"attention": Wasteful},
        {"attention": llmkit.plugin("attention", "multi_head", bias=True)},
        {"feedforward": "swiglu"},
        {"norm": "layer"},
        {"position": "rotary"},
        {"vocab_size": 40},
        {"tie_embeddings": False},
    ],
    ids=str,
)
def test_a_changed_part_leaves_the_initial_values_of_all_others(changes: dict[str, Any]) -> None:
    same = shared(network(), network(**changes))
    assert all(same.values())
    assert len(same) >= (5 if "vocab_size" in changes or "position" in changes or "feedforward" in changes else 6)


def test_other_seeds_names_and_a_second_network_differ() -> None:
    net = network()
    assert all(shared(net, network()).values())
    assert not any(shared(net, network(seed=1)).values())
    assert not any(shared(net, network(seed=None)).values()), "a second network of the same stream"
    weights = dict(net.named_parameters())
    assert not torch.equal(*(weights[f"decoder.{layer}.attention.out.weight"] for layer in (0, 1)))


def test_what_a_part_draws_for_itself_is_its_own() -> None:
    nets = [network(attention=Wasteful, feedforward=name) for name in ("relu", "swiglu")]
    assert torch.equal(*(dict(net.named_parameters())["decoder.1.attention.own"] for net in nets))


def test_the_random_stream_moves_by_one_number() -> None:
    network()
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.randint(2**62, ())
    assert torch.equal(torch.rand(3), after)


def test_values_have_the_spread_that_gpt2_has() -> None:
    net = network(dim=128, vocab_size=500, num_layers=8)
    assert net.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    stds = [value.std().item() for name, value in net.named_parameters() if name.endswith("feedforward.out.weight")]
    assert stds == pytest.approx([0.02 / math.sqrt(16)] * 8, rel=0.05)


POSITIONS = ["none", "rotary", "learned", "sinusoidal", "alibi"]
EACH_PAIR = [
    (("decoder", "encoder_decoder")[(number // 2 + tied) % 2], position, (number + tied) % 2 == 0, tied)
    for number, position in enumerate(POSITIONS)
    for tied in (True, False)
]
"""Topology, position, whether the norm comes first and embeddings are tied: any two values of two of them occur."""


@pytest.mark.parametrize(("topology", "position", "norm_first", "tied"), EACH_PAIR)
def test_a_new_network_scores_about_uniformly(
    topology: str, position: str, norm_first: bool, tied: bool, **scales: Any
) -> None:
    """Tied embeddings after a post-norm, or below sinusoidal positions, gave 4.5 to 10 nats above ln V."""
    net = network(
        topology, position=position, norm_first=norm_first, tie_embeddings=tied, dim=768, num_layers=1, **scales
    )
    net.quieten(None)
    ids = torch.randint(65, (4, 25))
    seq = Sequence.of(ids[:, :-1])
    with torch.no_grad():
        memory = net.encode(ids[:, :-1], seq) if topology == "encoder_decoder" else None
        hidden = net.decode(ids[:, :-1], seq, memory=memory)
    loss = cross_entropy((hidden @ net.output_weight_VD.T).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=0.35)


def test_scaled_embeddings_score_about_uniformly() -> None:
    """Without the scales in the calculation the loss is 3 nats above ln V."""
    test_a_new_network_scores_about_uniformly("decoder", "none", True, True, embedding_scale=768**0.5)
    test_a_new_network_scores_about_uniformly("encoder_decoder", "relative", False, True, output_scale=2.0)


@pytest.mark.parametrize(("head", "quiet"), [("generation", True), ("classification", False)])
def test_a_model_draws_its_weights_from_the_seed_alone(head: str, quiet: bool) -> None:
    """Whatever was drawn since the seed was set; a head's layers begin equal below any network."""

    def model(drawn: int, attention: str) -> dict[str, Tensor]:
        model = llmkit.LanguageModel(
            head=llmkit.plugin("head", head),
            attention=llmkit.plugin("attention", attention),
            norm_first=False,
            dim=384,
            num_layers=1,
        )
        model.head.learn({"label": ["a", "b"]})
        model.tokenizer = llmkit.plugin("tokenizer", "byte")()
        torch.manual_seed(1)
        torch.rand(drawn)
        model.configure_model()
        assert torch.rand(()) == torch.rand(drawn + 1, generator=torch.Generator().manual_seed(1))[-1]
        return model.state_dict()

    first, second = model(3, "lstm"), model(7, "multi_head")
    same = {name for name in first if name in second and torch.equal(first[name], second[name])}
    assert {"net.embedding.weight", "net.decoder.0.feedforward.out.weight"} <= same or head == "classification"
    assert {name for name in first if name.startswith("head.")} <= same
    side = "decoder" if head == "generation" else "encoder"
    assert (first[f"net.{side}.0.feedforward_norm.weight"] < 1).all() == quiet


class Counted(Wasteful):
    """Counts how often it is built, and draws numbers whatever the default device."""

    built: ClassVar[list[int]] = []

    def __init__(self, dim: int, role: Any) -> None:
        super().__init__(dim, role)
        self.built.append(dim)
        torch.rand(5, device="cpu")


def test_parts_are_tried_out_once_and_leave_the_random_stream() -> None:
    """Otherwise the second model of a process would get other numbers than the first."""
    for dim in (8, 8, 16):
        torch.manual_seed(0)
        llmkit.LanguageModel(attention=Counted, dim=dim)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
    assert Counted.built == [8, 16]

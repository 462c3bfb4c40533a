"""The network as a whole: counts by hand, roles, padding, packing, decoding with every variant and position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llmkit.contracts import Attention
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.model.groups import parameter_groups, parameter_kinds
from llmkit.registry import entries, plugin
from llmkit.sequence import Memory, Sequence, State
from llmkit_plugins.position import Learned

VARIANTS = list(entries("attention"))
POSITIONS = list(entries("position"))


def build(topology: str = "decoder", **changes: Any) -> Backbone:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "attention": "multi_head",
        "cross_attention": "multi_head",
        "position": "rotary",
        "feedforward": "relu",
        "norm": "rms",
    }
    parts.update({key: changes.pop(key) for key in list(changes) if key in parts})
    families = {"cross_attention": "attention"}
    factories = {
        key: plugin(families.get(key, key), value) if isinstance(value, str) else value for key, value in parts.items()
    }
    settings: dict[str, Any] = {"vocab_size": 29, "dim": 16, "num_layers": 2, "max_length": 24, **changes}
    return Backbone(topology=topology, **factories, **settings).eval()  # type: ignore[arg-type]


def test_parameters_by_hand() -> None:
    net = build(feedforward="relu", norm="layer", attention=plugin("attention", "multi_head", qk_norm=False))
    dim, layers, vocab = 16, 2, 29
    attention, feedforward, norms = 4 * dim * dim, 8 * dim * dim, 2 * dim
    weights = layers * (attention + feedforward + 2 * norms) + norms
    counts = net.num_parameters()
    got_norm = sum(p.numel() for name, p in net.named_parameters() if "norm" in name)
    assert counts["embedding"] == vocab * dim
    assert counts["non_embedding"] - got_norm == layers * (attention + feedforward)
    assert counts["non_embedding"] <= weights  # a norm may do without its bias
    assert counts["total"] == sum(p.numel() for p in net.parameters())


def test_untied_output_adds_one_matrix() -> None:
    assert build(tie_embeddings=False).num_parameters()["total"] == build().num_parameters()["total"] + 29 * 16


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_neighbours_change_nothing(variant: str, position: str) -> None:
    norm_first = (VARIANTS.index(variant) + POSITIONS.index(position)) % 2 == 0  # either one with each of both
    net = build("encoder_decoder", attention=variant, position=position, norm_first=norm_first)
    torch.manual_seed(1)
    source, target = torch.randint(29, (1, 5)), torch.randint(29, (1, 4))
    with torch.no_grad():
        memory = net.encode(source, Sequence.dense(5))
        alone = net.decode(target, Sequence.dense(4), memory=memory)
        other = torch.randint(29, (1, 9))
        ids = torch.cat([torch.cat([source, torch.randint(29, (1, 4))], 1), other])
        segments = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
        both = net.encode(ids, Sequence.of(ids, segments))
        hidden = net.decode(target.repeat(2, 1), Sequence.dense(4), memory=both)
    torch.testing.assert_close(hidden[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_as_if_alone(variant: str, position: str) -> None:
    net = build(attention=variant, position=position)
    ids = torch.randint(29, (1, 12), generator=torch.Generator().manual_seed(2))
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3]])
    with torch.no_grad():
        packed = net.decode(ids, Sequence.of(ids, segments))
        for start, stop in ((0, 5), (5, 8), (9, 12)):
            alone = net.decode(ids[:, start:stop], Sequence.dense(stop - start))
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_state_equals_the_full_pass(variant: str, position: str) -> None:
    net = build("encoder_decoder", attention=variant, position=position)
    generator = torch.Generator().manual_seed(3)
    source, target = torch.randint(29, (2, 6), generator=generator), torch.randint(29, (2, 9), generator=generator)
    with torch.no_grad():
        memory = net.encode(source, Sequence.dense(6))
        full = net.decode(target, Sequence.dense(9), memory=memory)
        state = net.init_state(2, 9)
        assert state is not None
        parts, start = [], 0
        for size in (3, 1, 1, 4):
            seq = Sequence.dense(size, start=start)
            parts.append(net.decode(target[:, start : start + size], seq, memory=memory, state=state))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)


class CausalMean(Attention):
    """Reads the mean of what came before; only causal, and without a decoding state."""

    def forward(
        self, x_BTD: torch.Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> torch.Tensor:
        mask = seq.mask(causal=True)
        weights = torch.ones(1, 1, 1, 1) if mask is None else mask.float()
        return (weights / weights.sum(-1, keepdim=True))[:, 0] @ x_BTD


@pytest.mark.parametrize("topology", ["encoder", "encoder_decoder"])
def test_a_role_that_a_variant_lacks_is_refused(topology: str) -> None:
    with pytest.raises(UserError, match=r"model.attention: CausalMean cannot be built as 'bidirectional'.* causal"):
        build(topology, attention=CausalMean)


def test_cross_attention_by_a_variant_that_cannot_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.cross_attention: LSTM cannot be built as 'cross'"):
        build("encoder_decoder", cross_attention="lstm")


def test_a_variant_without_state_says_so() -> None:
    assert build(attention=CausalMean).init_state(2, 8) is None


def test_parameter_groups_decay_matrices_only() -> None:
    net = build("encoder_decoder", position="learned", tie_embeddings=False)
    groups = {group["kind"]: group for group in parameter_groups(net, parameter_kinds(net))}
    assert all(p.dim() >= 2 for kind in ("matrix", "embedding") for p in groups[kind]["params"])
    assert all(p.dim() == 1 for p in groups["vector"]["params"]) and groups["vector"]["weight_decay"] == 0
    assert len(groups["embedding"]["params"]) == 3  # tokens, positions, output
    assert sum(len(group["params"]) for group in groups.values()) == len(list(net.parameters()))


def trained(net: Backbone, seed: int) -> list[torch.Tensor]:
    """Return hidden states of padded random rows and the gradients of their squares' sum."""
    torch.manual_seed(seed)
    source, target = torch.randint(29, (3, 7)), torch.randint(29, (3, 5))
    segments = torch.ones_like(source)
    segments[1, 4:] = 0
    memory = None if net.topology == "decoder" else net.encode(source, Sequence.of(source, segments))
    found = [] if memory is None else [memory.x_BSD]
    if net.topology != "encoder":
        found.append(net.decode(target, Sequence.of(target), memory=memory))
    torch.stack([hidden.square().sum() for hidden in found]).sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return [*found, *gradients]


def compiled(net: Backbone, backend: str = "aot_eager") -> CompileCounterWithBackend:
    """Compile a network and return what counts its graphs."""
    torch._dynamo.reset()  # graphs of other tests' networks count towards torch's limit
    counter = CompileCounterWithBackend(backend)
    net.compile(backend=counter)
    return counter


@pytest.mark.parametrize(
    ("topology", "variant", "backend"),
    [
        ("decoder", "multi_head", "inductor"),
        ("decoder", "linear", "aot_eager"),
        ("decoder", "lstm", "aot_eager"),
        ("encoder_decoder", "multi_head", "aot_eager"),
    ],
)
def test_a_compiled_network_trains_alike(topology: str, variant: str, backend: str) -> None:
    """Of each variant by itself, the checks of attention hold that it compiles."""
    net = build(topology, attention=variant, num_layers=1)
    plain = [trained(net, seed) for seed in (1, 2)]
    counter = compiled(net, backend)
    first = trained(net, 1)
    graphs = counter.frame_count
    assert graphs >= (2 if topology == "encoder_decoder" else 1)
    torch.testing.assert_close([first, trained(net, 2)], plain, rtol=1e-4, atol=2e-4)
    assert counter.frame_count == graphs, "compiled anew for a second batch of the same shapes"


def test_only_training_is_compiled() -> None:
    """Every length of a decoding state, every last batch and every mode would need a graph of its own."""
    net = build("encoder_decoder")
    counter = compiled(net)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        memory = net.encode(ids, Sequence.of(ids))
        net.decode(ids, Sequence.of(ids), memory=memory)
    net.decode(ids, Sequence.of(ids), memory=memory, state=net.init_state(1, 8))
    assert counter.frame_count == 0


def test_a_copy_of_a_compiled_network_has_weights_of_its_own() -> None:
    net = build(num_layers=1)
    compiled(net, "eager")
    other = copy.deepcopy(net)
    before = trained(net, 1)
    with torch.no_grad():
        other.embedding.weight.zero_()
    torch.testing.assert_close(trained(net, 1), before)
    assert not torch.equal(trained(other, 1)[0], before[0])


def test_sides_of_their_own() -> None:
    """Depth, positions and the norm after them; each side reads its own."""
    net = build("encoder_decoder", position="learned", decoder_layers=1, separate_positions=True, embedding_norm=True)
    assert (len(net.encoder), len(net.decoder)) == (2, 1)
    assert net.num_parameters()["embedding"] == 29 * 16 + 2 * 24 * 16
    ids, seq = torch.tensor([[1, 2, 3]]), Sequence.dense(3)
    memory = net.encode(ids, seq)
    (net.decode(ids, Sequence.dense(3), memory=Memory(memory.x_BSD.detach(), seq))).sum().backward()
    assert isinstance(net.decoder_position, Learned) and isinstance(net.position, Learned)
    assert net.decoder_position.table.weight.grad is not None and net.position.table.weight.grad is None
    assert net.decoder_embedding_norm is not None and net.embedding_norm is not None
    assert all(p.grad is not None for p in net.decoder_embedding_norm.parameters())
    assert all(p.grad is None for p in net.embedding_norm.parameters())


@pytest.mark.parametrize("name", ["decoder_layers", "separate_positions"])
def test_one_stack_has_no_sides(name: str) -> None:
    with pytest.raises(UserError, match=f"model.{name}: needs a head whose network has an encoder and a decoder"):
        build("decoder", **{name: True})


def test_scales_multiply_embeddings_and_last_states() -> None:
    ids = torch.randint(29, (2, 5))
    plain, scaled = build(), build(embedding_scale=3.0, output_scale=0.5)
    with torch.no_grad():
        scaled.embedding.weight /= 3
        torch.testing.assert_close(scaled.decode(ids, Sequence.dense(5)), plain.decode(ids, Sequence.dense(5)) / 2)


@pytest.mark.parametrize(("attention", "heads"), [("multi_head", 4), ("standard", 1), ("differential", 4), ("lstm", 0)])
def test_relative_positions_have_the_heads_of_the_attention(attention: str, heads: int) -> None:
    net = build("encoder_decoder", position="relative", attention=attention)
    sizes = [value.shape for name, value in net.named_parameters() if "position" in name]
    assert sizes == ([(32, heads)] * 2 if heads else [])


def test_relative_positions_of_layers_that_differ() -> None:
    two = plugin("attention", "pattern", variants=["multi_head", "standard"])
    with pytest.raises(UserError, match="layers with the same number of heads, and they have 1 and 4"):
        build(position="relative", attention=two)
    hybrid = plugin("attention", "pattern", variants=["lstm", "multi_head"])
    assert build(position="relative", attention=hybrid).num_parameters()["embedding"] == 29 * 16 + 32 * 4

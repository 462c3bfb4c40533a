"""Steps of decoding that are captured and replayed write what steps that are run write.

A CUDA graph is its stand-in of ``recorded`` on a CPU, and itself where there is a GPU.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from plain_attention import PlainAttention
from recorded import Graphs
from small_networks import decided
from torch import Tensor

from llmkit import registry
from llmkit.contracts import Attention
from llmkit.model.backbone import Backbone
from llmkit.ops import graphs
from llmkit.ops.decoding import Decoder, generate
from llmkit.sequence import DecodingOptions, Memory, Sequence, State

NEVER = 28  # a token that is banned
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
ATTENTION = sorted(registry.entries("attention"))
PROMPTS = [[3], [4, 5, 6, 7, 8], [9, 10, 11], [12], [13, 14], [15, 3], [4], [5, 6, 7]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that generates with graphs, and without; also how often it captured and replayed."""

    def both(net: Backbone, prompts: list[list[int]], device: str = "cpu", **rest: Any) -> tuple[Any, Any, Graphs]:
        eos_id = rest.pop("eos_id", NEVER)
        own = Graphs(graphs.CAPTURE["cuda"] if device == "cuda" else None)
        memory = rest.pop("memory", None)
        found = []
        for capture in ({device: own}, {}):
            monkeypatch.setattr(graphs, "CAPTURE", capture)
            given = {"eos_id": eos_id, "banned": [NEVER], "memory": memory, "device": device}
            found.append(generate(net.to(device), prompts, DecodingOptions(**rest), **given))
        return found[0], found[1], own

    graphs._leave_out.cache_clear()
    return both


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("number", "attention"), enumerate(ATTENTION))
def test_every_variant_takes_part(number: int, attention: str, device: str, captured: Any) -> None:
    """Greedy, and sampling for ragged prompts, both past the end of the context."""
    net = decided(attention, position=("rotary", "alibi", "learned")[number % 3], max_length=40)
    for prompts, temperature in ((PROMPTS[1:2], 0.0), (PROMPTS, 1.0)):
        found, expected, own = captured(net, prompts, device, max_new_tokens=56, temperature=temperature, seed=3)
        assert found == expected and {len(row) for row in found} == {56}
        assert own.captures >= 2  # one for each beginning of the context
        assert own.replays > 40


@pytest.mark.parametrize("attention", ["multi_head", "latent", "linear"])
def test_rows_that_end_and_memories(attention: str, captured: Any) -> None:
    """What is left of a batch is captured again."""
    net = decided("multi_head", "encoder_decoder", cross=attention)
    source = torch.tensor([[3, 4, 5, 6], [7, 8, 1, 1], [9, 2, 12, 1]])
    seq = Sequence.from_segments((torch.arange(4)[None] < torch.tensor([[4], [2], [3]])).long())
    with torch.no_grad():
        memory: Memory = net.encode(source, seq)
    whole, _, _ = captured(net, [[2]] * 3, memory=memory, max_new_tokens=60, temperature=1.0)
    eos_id = whole[0][25]
    found, expected, own = captured(net, [[2]] * 3, memory=memory, max_new_tokens=60, temperature=1.0, eos_id=eos_id)
    assert found == expected and len({len(row) for row in found}) > 1
    assert own.captures > 0


def test_scores_are_those_of_a_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that began with padding, and where the room of the cache ends."""
    monkeypatch.setattr(graphs, "CAPTURE", {"cpu": (own := Graphs())})
    net, ids, segments = decided("grouped_query"), torch.randint(3, 28, (2, 25)), torch.ones(2, 25, dtype=torch.long)
    segments[1, :3] = 0
    # Then torch fills new memory with NaN, which even a weight of zero would let through.
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            decoder = Decoder(net, 2, 25, steps=20)
            decoder.feed(ids[:, :5], segments[:, :5])
            for column in range(5, 25):
                found = decoder.feed(ids[:, column : column + 1])
            expected = net.decode(ids, Sequence.from_segments(segments))[:, -1] @ net.output_weight_VD.T
            with pytest.raises(ValueError, match="room for 25 columns, got 26"):
                decoder.feed(ids[:, :1])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert own.replays == 19


class Steps(Attention):
    """Adds to each column what came before, in a way that ``kind`` says; one column needs no more than the state."""

    def __init__(self, dim: int, role: Any, kind: str) -> None:
        super().__init__(dim, role)
        self.kind = kind

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return zeros."""
        return State({name: like.new_zeros(batch_size, self.dim) for name in ("sum", "last", "before")})

    def forward(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None) -> Any:
        """Return the sum so far and the column before the last one."""
        assert state is not None
        outputs: list[Tensor] = []
        for x_BD in x_BTD.unbind(1):
            outputs.append(state["sum"].tanh() + state["before"])
            state["sum"] = state["sum"] * 0.5 + x_BD
            state["before"], state["last"] = state["last"], x_BD
            state.length += 1
            if self.kind == "reads its length":
                outputs[-1] = outputs[-1] * (state.length % 5)
            if self.kind == "more than its tensors":
                vars(state)["count"] = vars(state).get("count", 0) + 1
                outputs[-1] = outputs[-1] * (vars(state)["count"] % 5)
            if self.kind == "not permitted":
                outputs[-1] = outputs[-1] * (5 if float(x_BD.sum()) > 0 else 1)
            assert state.length and state.length != 0
        return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    "kind", ["", "reads its length", "more than its tensors", "not permitted", "shape of its tensors"]
)
def test_a_variant_gets_graphs_for_nothing_or_is_left_out(
    kind: str, captured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = decided(position="none")
    for layer in net.decoder:
        part = PlainAttention(16, "causal") if "shape" in kind else Steps(16, "causal", kind)
        vars(layer)["_modules"]["attention"] = part
    for _ in range(2):
        found, expected, own = captured(net.eval(), PROMPTS[1:2], max_new_tokens=40, temperature=1.0)
        assert found == expected and len(set(found[0])) > 3
        assert (own.captures, own.replays) == ((0, 0) if kind else (1, 38))
    said = capsys.readouterr().err
    assert said.count("decoding runs without CUDA graphs (") == bool(kind) and kind in said


def test_short_texts_beams_and_processes_that_work_together_are_run(
    captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture has to pay, rows of beams change places at each step, and processes may wait for one that captures."""
    net = decided()
    assert captured(net, PROMPTS[1:2], max_new_tokens=graphs.ENOUGH, temperature=0)[2].captures == 0
    assert captured(net, PROMPTS[1:2], max_new_tokens=graphs.ENOUGH + 1, temperature=0)[2].captures == 1
    assert captured(net, PROMPTS[1:2], max_new_tokens=40, num_beams=2)[2].captures == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert captured(net, PROMPTS[1:2], max_new_tokens=40, temperature=0)[2].captures == 0


def test_a_capture_ends_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all that this process does on the device later would fail. Captures share one stream."""
    graph = mock.create_autospec(torch.cuda.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    stream = mock.Mock()
    fakes = {"Stream": stream, "stream": mock.MagicMock(), "current_stream": mock.Mock(), "current_device": lambda: 0}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._stream.cache_clear()
    result, replay = graphs.cuda_graph(lambda: torch.ones(1))
    assert torch.equal(result, torch.ones(1)) and replay is graph.return_value.replay
    with pytest.raises(ZeroDivisionError):
        graphs.cuda_graph(lambda: torch.ones(1 // 0))
    began, ended = graph.return_value.capture_begin, graph.return_value.capture_end
    assert [call.kwargs for call in began.mock_calls] == [{"capture_error_mode": "thread_local"}] * 2
    assert ended.call_count == 2 and stream.call_count == 1
    graphs._stream.cache_clear()

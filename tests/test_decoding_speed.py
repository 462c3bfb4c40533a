"""What makes generation fast changes nothing: each fast path against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import decided
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.ops import decoding
from llmkit.ops.decoding import Decoder, by_columns, column_major, generate
from llmkit.sequence import DecodingOptions, Sequence

PROMPTS = [[3], [4, 5, 6, 7, 8], [9, 10, 11]]
STEPS = 40  # more columns than a cache begins with
NEVER = 28  # a token that is banned


@torch.no_grad()
def plain(net: Backbone, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens by a full pass each."""
    ids = list(prompt)
    for _ in range(steps):
        hidden_1TD = net.decode(torch.tensor([ids]), Sequence.dense(len(ids)))
        ids.append(int((hidden_1TD[0, -1] @ net.output_weight_VD[:NEVER].T).argmax()))
    return ids[len(prompt) :]


def greedy(net: Backbone, prompts: list[list[int]], eos_id: int = NEVER, **rest: Any) -> list[list[int]]:
    options = DecodingOptions(max_new_tokens=STEPS, temperature=0)
    return generate(net, prompts, options, eos_id=eos_id, banned=[NEVER], **rest)


@pytest.mark.parametrize(
    ("attention", "position"),
    [
        *((name, "rotary") for name in ("multi_head", "grouped_query", "latent", "differential", "lstm", "linear")),
        *(("multi_head", name) for name in ("alibi", "learned", "sinusoidal")),
        ("sliding_window", "alibi"),
    ],
)
def test_long_ragged_greedy_equals_full_passes(attention: str, position: str) -> None:
    rest: dict[str, Any] = {"window": 7} if attention == "sliding_window" else {}
    net = decided(attention, position=position, **rest)
    assert greedy(net, PROMPTS) == [plain(net, prompt, STEPS) for prompt in PROMPTS]
    assert greedy(net, PROMPTS[1:2]) == [plain(net, PROMPTS[1], STEPS)]


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something, not those that look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "view" in str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def kernels(attention: str, layers: int, prompts: tuple[Tensor, Tensor | None]) -> int:
    """Return how many operations a step of decoding takes."""
    net = decided(attention)
    net.decoder = net.decoder[:layers]
    decoder = Decoder(net, 2, 32)
    decoder.feed(*prompts)
    with Kernels() as counter:
        decoder.feed(torch.tensor([[3], [4]]))
    return int(counter.count)


@pytest.mark.parametrize("segments", [None, [[1, 1, 1], [0, 1, 1]]])
@pytest.mark.parametrize(
    ("attention", "most"),
    [("multi_head", 38), ("linear", 46), ("retention", 42), ("low_rank", 34), ("min_gru", 30), ("lstm", 38)],
)
def test_a_step_takes_few_operations_a_layer(attention: str, most: int, segments: list[list[int]] | None) -> None:
    """On an accelerator a token costs what it launches: for linear, retention and low_rank it was about 90 a layer."""
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]]), None if segments is None else torch.tensor(segments)
    assert kernels(attention, 2, prompts) - kernels(attention, 1, prompts) <= most


@pytest.mark.parametrize("every", [1, 7])
def test_rows_that_end_are_left_out(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Whatever the first token is that ends a row, and however seldom the host looks."""
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", every)
    net = decided()
    whole = greedy(net, PROMPTS)
    for eos in {token for row in whole for token in row}:
        expected = [row[: row.index(eos)] if eos in row else row for row in whole]
        heard: list[list[int]] = [[] for _ in PROMPTS]
        assert every > 1 or greedy(net, PROMPTS, eos) == expected
        assert greedy(net, PROMPTS, eos, on_token=lambda row, token: heard[row].append(token)) == expected  # noqa: B023
        assert heard == expected


def test_rows_are_left_out_where_texts_outgrow_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    net, options = decided("lstm"), DecodingOptions(max_new_tokens=150, temperature=1.0, seed=3)
    found = generate(net, PROMPTS, options, eos_id=NEVER, banned=[NEVER])
    assert [len(row) for row in found] == [150] * 3
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", 11)
    assert generate(net, PROMPTS, options, eos_id=NEVER, banned=[NEVER]) == found


def test_weights_lie_by_columns_only_meanwhile() -> None:
    net, ids = decided("lstm"), torch.tensor([[3, 4, 5]])
    before = {name: (p.data_ptr(), p.stride()) for name, p in net.named_parameters()}
    expected = net.decode(ids, Sequence.dense(3))
    with pytest.raises(KeyError), column_major(net):
        changed = {name for name, p in net.named_parameters() if p.data_ptr() != before[name][0]}
        torch.testing.assert_close(net.decode(ids, Sequence.dense(3)), expected)
        raise KeyError
    # The feedforward's way in and the recurrence have no fewer outputs than inputs; embeddings are not multiplied by.
    kinds = ("feedforward.inner.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0")
    assert changed == {name for name in before if name.endswith(kinds)}
    assert {name: (p.data_ptr(), p.stride()) for name, p in net.named_parameters()} == before


def test_training_goes_on_after_generation() -> None:
    net = decided("lstm")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        greedy(net, PROMPTS)
        net.decode(torch.tensor([[3, 4, 5]]), Sequence.dense(3)).square().sum().backward()
        optimizer.step()
    assert all(p.is_contiguous() and p.grad is not None for p in net.decoder.parameters())
    assert torch.backends.mkldnn.enabled


def test_only_plain_float_matrices_on_a_cpu_are_copied() -> None:
    wide = torch.randn(5, 3)
    copy = by_columns(nn.Parameter(wide))
    assert copy is not None and copy.T.is_contiguous() and torch.equal(copy, wide)
    others: list[Tensor] = [wide.T, wide.bfloat16(), wide[0], wide.T.contiguous(), wide.to("meta")]
    assert [by_columns(other) for other in others] == [None] * 5


@pytest.mark.parametrize("attention", ["multi_head", "grouped_query", "latent", "linear", "low_rank", "lstm"])
def test_beams_of_several_texts_are_those_of_each_alone(attention: str) -> None:
    """Though texts end at different steps, and memories are not reordered with the beams."""
    cross = attention if attention in ("linear", "low_rank") else "multi_head"
    net = decided(attention, "encoder_decoder", cross=cross)
    source = torch.tensor([[3, 4, 5, 6], [7, 8, 1, 1], [9, 2, 12, 1]])
    lengths = [4, 2, 3]
    segments = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    options = DecodingOptions(max_new_tokens=STEPS, num_beams=4)
    memory = net.encode(source, Sequence.of(source, segments))
    together = generate(net, [[2]] * 3, options, eos_id=0, banned=[1], memory=memory)
    for row, length in enumerate(lengths):
        alone = net.encode(source[row : row + 1, :length], Sequence.dense(length))
        assert generate(net, [[2]], options, eos_id=0, banned=[1], memory=alone) == together[row : row + 1]


def test_broken_scores_are_told_of() -> None:
    net = decided()
    net.embedding.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        generate(net, [[3]], DecodingOptions(max_new_tokens=4), eos_id=NEVER)
    assert torch.backends.mkldnn.enabled

"""Sampling and beam search against exhaustive search and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small_networks import decided
from torch import Tensor

from llmkit.contracts import Network
from llmkit.model.backbone import Backbone
from llmkit.ops.decoding import Chooser, _beam_search, generate
from llmkit.sequence import DecodingOptions, Memory, Sequence, State

EOS = 0


class Markov(Network):
    """A network whose scores depend on the last token only."""

    def __init__(self, scores_VV: Tensor) -> None:
        self.scores_VV = scores_VV

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        raise AssertionError("not an encoder")

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        return self.scores_VV[ids_BT]

    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        return None

    @property
    def output_weight_VD(self) -> Tensor:
        return torch.eye(len(self.scores_VV))

    @property
    def max_length(self) -> int:
        return 64


def exhaustive(scores: Tensor, start: int, most: int, penalty: float) -> list[int]:
    """The best continuation of all, by trying each: finished ones with their eos, or open ones at full length."""
    logp = scores.log_softmax(-1)
    vocab = range(1, len(scores))
    best: tuple[float, list[int]] = (-math.inf, [])
    for length in range(1, most + 1):
        for body in itertools.product(vocab, repeat=length - 1):
            path = [start, *body]
            total = sum(float(logp[a, b]) for a, b in itertools.pairwise(path))
            ends = [([*body], total + float(logp[path[-1], EOS]))]
            if length == most:
                ends += [([*body, t], total + float(logp[path[-1], t])) for t in vocab]
            for ids, value in ends:
                best = max(best, (value / ((5 + length) / 6) ** penalty, ids))
    return best[1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beam_finds_the_exhaustive_best(seed: int, penalty: float) -> None:
    scores = 2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    options = DecodingOptions(max_new_tokens=4, num_beams=64, length_penalty=penalty)
    got = generate(Markov(scores), [[1], [2]], options, eos_id=EOS)
    assert got == [exhaustive(scores, start, 4, penalty) for start in (1, 2)]


def small_network(attention: str = "multi_head", topology: str = "decoder") -> Backbone:
    return decided(attention, topology, vocab_size=17, max_length=32, feedforward="relu")


def plain_greedy(net: Backbone, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        hidden = net.decode(torch.tensor([ids]), Sequence.dense(len(ids)))
        token = int((hidden[0, -1] @ net.output_weight_VD.T).argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ["standard", "multi_head", "grouped_query", "lstm", "gru"])
def test_ragged_greedy_equals_a_plain_loop(attention: str) -> None:
    net = small_network(attention)
    prompts = [[3], [4, 5, 6, 7, 8], [9, 10, 11]]
    got = generate(net, prompts, DecodingOptions(max_new_tokens=12, temperature=0), eos_id=EOS)
    with torch.no_grad():
        assert got == [plain_greedy(net, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("attention", ["multi_head", "lstm"])
def test_beam_of_one_is_greedy_and_rows_do_not_disturb_each_other(attention: str) -> None:
    net = small_network(attention, "encoder_decoder")
    source = torch.tensor([[3, 4, 5, 6], [7, 8, 1, 1]])
    segments = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    memory = net.encode(source, Sequence.of(source, segments))
    one = DecodingOptions(max_new_tokens=8, temperature=0)
    greedy = generate(net, [[2], [2]], one, eos_id=EOS, memory=memory)
    none = torch.empty(0, dtype=torch.long)
    with torch.inference_mode():
        assert _beam_search(net, [[2], [2]], one, 8, EOS, none, memory) == greedy
    wide = DecodingOptions(max_new_tokens=8, num_beams=4)
    both = generate(net, [[2], [2]], wide, eos_id=EOS, memory=memory)
    alone = net.encode(source[1:, :2], Sequence.dense(2))
    assert generate(net, [[2]], wide, eos_id=EOS, memory=alone)[0] == both[1]


def test_a_text_that_outgrows_the_context_goes_on() -> None:
    net = small_network()
    options = DecodingOptions(max_new_tokens=50, temperature=1.0)
    new = generate(net, [[3, 4]], options, eos_id=16, banned=[16])[0]
    assert len(new) == 50


def chosen(scores: Tensor, banned: list[int] | None = None, **options: Any) -> Tensor:
    return Chooser(DecodingOptions(**options), banned or [], torch.device("cpu"))(scores.clone())


def test_sampling_follows_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    drawn = chosen(scores, temperature=2.0)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - (scores[0] / 2).softmax(-1)).abs().max() < 0.015


def test_top_k_and_top_p_keep_only_the_best() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log().repeat(2000, 1)
    assert set(chosen(scores, temperature=1.0, top_k=2).tolist()) == {2, 3}
    # 0.4 alone does not reach 0.6, 0.4 + 0.3 does.
    assert set(chosen(scores, temperature=1.0, top_p=0.6).tolist()) == {2, 3}
    assert set(chosen(scores, temperature=1.0, top_p=0.01).tolist()) == {2}
    assert set(chosen(scores, [2], temperature=0).tolist()) == {3}


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"num_beams": 0}],
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecodingOptions(**wrong)  # type: ignore[arg-type]

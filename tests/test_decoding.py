"""Sampling and beam search against exhaustive search and plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from small_networks import decided
from torch import Tensor

from llmkit.contracts import Network
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.ops.decoding import beam_search, generate
from llmkit.ops.sampling import Chooser, Rules
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
    found = beam_search(net, [[2], [2]], Rules(one, [], EOS, torch.device("cpu")), memory)
    assert [beams[0][1] for beams in found] == greedy
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
    settings, device = DecodingOptions(**options), torch.device("cpu")
    prompts = [[0]] * len(scores)
    return Chooser(settings, Rules(settings, banned or [], EOS, device), prompts, None, device)(scores.clone())


def test_sampling_follows_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    drawn = chosen(scores, temperature=2.0)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - (scores[0] / 2).softmax(-1)).abs().max() < 0.015


def test_draws_of_a_row_and_of_neighbours_are_independent() -> None:
    """Pairs of draws, of one row and of two neighbours, are spread evenly: chi-square, 15 degrees of freedom."""
    options, device, rows = DecodingOptions(temperature=1.0, seed=5), torch.device("cpu"), torch.arange(500)
    choose = Chooser(options, Rules(options, [], EOS, device), [[0]] * 500, rows, device)
    draws = torch.stack([choose(torch.zeros(500, 4)) for _ in range(40)])
    for pairs in (4 * draws[1:] + draws[:-1], 4 * draws[:, 1:] + draws[:, :-1]):
        counts = torch.bincount(pairs.flatten(), minlength=16).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 38  # one in a thousand is above


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.9}])
def test_a_sampled_text_depends_neither_on_the_batch_nor_on_neighbours(options: dict[str, Any]) -> None:
    """64 equal prompts get 64 texts, the same ones in batches of 1, 4 and 64, and next to other prompts."""
    net, settings = (
        small_network(),
        DecodingOptions(max_new_tokens=9, min_new_tokens=9, temperature=9.0, seed=3, **options),
    )

    def texts(prompts: list[list[int]], rows: list[int] | None) -> list[list[int]]:
        numbers = None if rows is None else torch.tensor(rows)
        return generate(net, prompts, settings, eos_id=EOS, rows=numbers)

    whole = texts([[3, 4]] * 64, None)
    assert len({tuple(text) for text in whole}) == 64
    fours = [texts([[3, 4]] * 4, list(range(start, start + 4))) for start in range(0, 64, 4)]
    assert [text for four in fours for text in four] == whole
    assert [texts([[3, 4]], [i])[0] for i in range(8)] == whole[:8]
    assert texts([[5, 6, 7, 8], [3, 4], [9]], [7, 1, 5])[1] == whole[1]
    others = generate(net, [[3, 4]] * 64, dataclasses.replace(settings, seed=4), eos_id=EOS)
    assert sum(map(list.__eq__, others, whole)) < 3


def test_top_k_and_top_p_keep_only_the_best() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log().repeat(2000, 1)
    assert set(chosen(scores, temperature=1.0, top_k=2).tolist()) == {2, 3}
    # 0.4 alone does not reach 0.6, 0.4 + 0.3 does.
    assert set(chosen(scores, temperature=1.0, top_p=0.6).tolist()) == {2, 3}
    assert set(chosen(scores, temperature=1.0, top_p=0.01).tolist()) == {2}
    assert set(chosen(scores, [2], temperature=0).tolist()) == {3}


@pytest.mark.parametrize("extreme", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 1e-300}])
def test_the_smallest_values_are_greedy_and_the_largest_are_even(extreme: dict[str, Any]) -> None:
    scores = torch.tensor([[0.1, -3.0, 40.0, 39.9]]).repeat(200, 1)
    assert set(chosen(scores, seed=2**63 - 1, **extreme).tolist()) == {2}
    assert set(chosen(scores, [0], temperature=1e300).tolist()) == {1, 2, 3}


def plain_rules(scores: list[float], text: list[int], written: int, options: DecodingOptions) -> list[float]:
    """The definitions of transformers' processors, for one text: repetition, n-grams, minimum length."""
    scores, size = list(scores), options.no_repeat_ngram_size
    for token in set(text):
        penalty = options.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for start in range(len(text) - size + 1) if size else ():
        if text[start : start + size - 1] == text[len(text) - size + 1 :]:
            scores[text[start + size - 1]] = -math.inf
    if written < options.min_new_tokens:
        scores[EOS] = -math.inf
    return scores


RULES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 7},
    {"min_new_tokens": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("given", RULES)
def test_rules_equal_their_definitions(given: dict[str, Any]) -> None:
    options, generator = DecodingOptions(**given), torch.Generator().manual_seed(1)
    for length in (1, 2, 3, 12):
        texts = torch.randint(5, (6, length), generator=generator)
        texts[0, : length - 1] = -1  # a short prompt among longer ones
        scores = torch.randn(6, 9, generator=generator)
        rows = [[token for token in row if token >= 0] for row in texts.tolist()]
        expected = [plain_rules(a, b, length, options) for a, b in zip(scores.tolist(), rows, strict=True)]
        rules = Rules(options, [], EOS, torch.device("cpu"))
        torch.testing.assert_close(rules(scores, length, texts), torch.tensor(expected))


def test_a_text_without_any_token_left_ends() -> None:
    options = DecodingOptions(max_new_tokens=9, temperature=0.0, no_repeat_ngram_size=1, min_new_tokens=9)
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    found = generate(Markov(scores), [[1]], options, eos_id=EOS)[0]
    assert sorted(found) == [2, 3]
    assert generate(Markov(scores), [[1]], dataclasses.replace(options, num_beams=2), eos_id=EOS) in (
        [[2, 3]],
        [[3, 2]],
    )


@torch.no_grad()
def plain_beams(net: Backbone, prompt: list[int], options: DecodingOptions) -> list[tuple[float, list[int]]]:
    """Beam search with a full pass for each text. A text that fills the context keeps its last half."""
    steps, width, start = options.max_new_tokens or 0, options.num_beams, max(0, len(prompt) - net.max_length)
    open_: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, steps + 1):
        if len(prompt) + length - 1 - start >= net.max_length and length > 1:
            start = len(prompt) + length - 1 - net.max_length // 2
        found = []
        for total, ids in open_:
            text = [*prompt, *ids]
            hidden = net.decode(torch.tensor([text[start:]]), Sequence.dense(len(text) - start))[0, -1]
            logp = (hidden @ net.output_weight_VD.T).log_softmax(-1)
            values = plain_rules(logp.tolist(), text, length - 1, options)
            found += [(total + value, [*ids, token]) for token, value in enumerate(values)]
        found = sorted(found, key=lambda item: -item[0])[: 2 * width]
        norm = ((5 + length) / 6) ** options.length_penalty
        finished += [(total / norm, ids[:-1]) for total, ids in found[:width] if ids[-1] == EOS]
        finished = sorted(finished, key=lambda item: -item[0])[:width]
        open_ = [item for item in found if item[1][-1] != EOS][:width]
        if len(finished) == width and open_[0][0] / norm <= finished[-1][0]:
            return finished
    return sorted([*finished, *((total / norm, ids) for total, ids in open_)], key=lambda item: -item[0])


@pytest.mark.parametrize("given", [{}, {"num_beams": 1}, {"length_penalty": 0.0, "min_new_tokens": 9}, *RULES[-1:]])
@pytest.mark.parametrize("prompt", [5, 25, 40])
def test_beams_read_and_write_as_much_as_greedy(given: dict[str, Any], prompt: int) -> None:
    """A prompt of 25 in a context of 32 is read whole, and followed by 20 tokens; two prompts are as each alone."""
    net = small_network()
    options = DecodingOptions(**{"max_new_tokens": 20, "num_beams": 3, "temperature": 0.0, **given})
    prompts = [[(3 * i * i + i + first) % 16 + 1 for i in range(prompt)] for first in (0, 5)]
    found = beam_search(net, prompts, Rules(options, [], EOS, torch.device("cpu")))
    for beams, text in zip(found, prompts, strict=True):
        expected = plain_beams(net, text, options)
        assert [ids for _, ids in beams] == [ids for _, ids in expected]
        assert [score for score, _ in beams] == pytest.approx([score for score, _ in expected], rel=1e-4)
    if options.num_beams == 1:
        assert [beams[0][1] for beams in found] == generate(net, prompts, options, eos_id=EOS)


def test_sampling_with_beams_is_refused() -> None:
    for given in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(UserError, match=f"model.decoding.{next(iter(given))}: is for sampling, and num_beams is 3"):
            generate(small_network(), [[3]], DecodingOptions(num_beams=3, **given), eos_id=EOS)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_new_tokens": 0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"num_beams": 0}),
        *({"min_new_tokens": -1}, {"min_new_tokens": 5, "max_new_tokens": 4}, {"num_beams": 10**20}),
        *({"num_return_sequences": 2}, {"repetition_penalty": 0.0}, {"no_repeat_ngram_size": -1}),
        *({"stop_strings": ["a", ""]}, {"length_penalty": 1e300}, {"seed": 99999999999999999999}),
    ],
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecodingOptions(**wrong)

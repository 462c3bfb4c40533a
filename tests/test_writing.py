"""Texts from ids: prompt and continuation, piece by piece, stop strings, n-best lists, scores."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from small_networks import decided

from llmkit.contracts import Tokenizer
from llmkit.ops import decoding
from llmkit.ops.writing import CUT, LAG, Stream, Written, split, write
from llmkit.registry import plugin
from llmkit.sequence import DecodingOptions, Sequence
from llmkit_plugins.tokenizer import BPE, Byte, Char, Unigram, Word, WordPiece

TEXTS = [
    "the cat's mat isn't red , they're (we'll) don't",
    "he said : 'tis real ' re ##e'll",
    "猫 在 垫子 上。 été 😀 naïve",
    "a  b",
]
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": Byte(),
    "char": Char(),
    "bpe": BPE(300),
    "word": Word(),
    "wordpiece": WordPiece(150),
    "unigram": Unigram(100),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = TOKENIZERS[request.param]
    found.train(iter(TEXTS))
    return found


def drawn(tokenizer: Tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and continuations: texts cut anywhere, and any tokens."""
    draw = random.Random(0)
    whole = [tokenizer.encode(draw.choice(TEXTS)) for _ in range(count // 2)]
    pairs = [(ids[:at], ids[at:]) for ids in whole for at in [draw.randrange(1, len(ids))]]
    any_ids = range(6, tokenizer.vocab_size)
    return [*pairs, *((draw.choices(any_ids, k=4), draw.choices(any_ids, k=12)) for _ in range(count // 2))]


def test_prompt_and_text_are_what_all_tokens_are_decoded_to(tokenizer: Tokenizer) -> None:
    for prompt, new in drawn(tokenizer, 100):
        start, text = split(tokenizer, prompt, new)
        assert (start + text).rstrip(CUT) == tokenizer.decode(prompt + new).rstrip(CUT)
        assert not text.endswith(CUT)


def test_pieces_are_the_text(tokenizer: Tokenizer) -> None:
    for prompt, new in drawn(tokenizer, 200):
        for stops in ([], ["'"], ["cat", "e "]):
            stream = Stream(tokenizer, prompt, stops)
            pieces = "".join(map(stream.add, new))
            final = "".join(split(tokenizer, prompt, new, stops))
            rest = stream.rest(final)
            assert pieces + rest == final, (prompt, new, stops)
            if not stops and CUT not in final:  # what is shown last is what the last tokens could still change
                assert len(rest) <= len(final) - len(tokenizer.decode((prompt + new)[: -LAG - 1])) + 2


def letters() -> Char:
    """A tokenizer of 26 characters."""
    found = Char()
    found.train(iter(["abcdefghij klmnopqrstu.'!"]))
    return found


PROMPTS = ["abc", "hello", "o"]
SAMPLED: dict[str, Any] = {"max_new_tokens": 40, "temperature": 3.0, "seed": 1}


def written(options: DecodingOptions, prompts: list[str] = PROMPTS) -> list[list[Written]]:
    tokenizer = letters()
    net = decided(vocab_size=tokenizer.vocab_size)
    return write(net, tokenizer.encode_batch(prompts), tokenizer, options)


@pytest.mark.parametrize("given", [SAMPLED, {"max_new_tokens": 30, "num_beams": 3, "num_return_sequences": 3}])
def test_a_text_ends_before_a_stop_string(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    free = written(DecodingOptions(**given))
    text = free[1][0].text
    for every in (1, 7):  # steps between two looks at the tokens
        monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", every)
        for stops in ([text[4:6]], [text[9:12], "zz", text[10:12]], [text[3]]):
            found = written(DecodingOptions(**given, stop_strings=stops))
            assert not [one for each in found for one in each for stop in stops if stop in one.text]
            if "seed" in given:  # a search goes other ways once a beam has ended
                ends = [min([each[0].text.find(stop) % 99 for stop in stops]) for each in free]
                assert [each[0].text for each in found] == [
                    each[0].text[:end] for each, end in zip(free, ends, strict=True)
                ]


def test_a_stop_string_ends_the_work() -> None:
    tokenizer, steps = letters(), []
    net = decided(vocab_size=tokenizer.vocab_size)
    prompt = tokenizer.encode("hello")
    text = write(net, [prompt], tokenizer, DecodingOptions(**SAMPLED))[0][0].text
    options = DecodingOptions(**SAMPLED, stop_strings=[text[2:4]])
    write(net, [prompt], tokenizer, options, on_text=lambda row, piece: steps.append(piece))
    assert len(steps) == 5 and "".join(steps) == f"hello{text[:2]}"  # four tokens and the rest


def test_the_best_beams_are_listed_with_their_scores() -> None:
    """The score is the log probability of text and eos over the length penalty."""
    tokenizer = letters()
    net = decided(vocab_size=tokenizer.vocab_size)
    head = plugin("head", "generation")()
    batch = head.collate([{"ids": tokenizer.encode("abc")}], tokenizer)
    options = DecodingOptions(max_new_tokens=6, num_beams=4, num_return_sequences=3, length_penalty=0.7)
    answer = head.predict(net, batch, tokenizer, options)[0]
    found = answer["candidates"]
    assert found[0]["text"] == answer["text"] and len({one["text"] for one in found}) == 3
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert head.show(answer).split("\n") == [f"{one['score']:.4f}\tabc{one['text']}" for one in found]
    for one in found:
        ids = tokenizer.encode("abc" + one["text"]) + [tokenizer.eos_id] * (len(one["text"]) < 6)
        with torch.no_grad():
            scores = (net.decode(torch.tensor([ids]), Sequence.dense(len(ids)))[0] @ net.output_weight_VD.T).double()
        logp = scores.log_softmax(-1)
        total = sum(float(logp[at - 1, ids[at]]) for at in range(3, len(ids)))
        assert one["score"] == pytest.approx(total / ((5 + len(ids) - 3) / 6) ** 0.7, rel=1e-4)


@torch.no_grad()
def test_the_score_of_a_text_is_its_log_probability() -> None:
    """Of each token from all before it, or from half a context and more of a long text."""
    tokenizer, head = letters(), plugin("head", "generation")()
    net = decided(vocab_size=tokenizer.vocab_size, max_length=16)
    texts = ["a", "hello", "abcdefghijklmnop", "abcdefghij klmnopq", "the end of a long text that goes on. " * 2]
    found = head.score(net, head.collate([{"ids": tokenizer.encode(text)} for text in texts], tokenizer))
    for text, answer in zip(texts, found, strict=True):
        ids, total = tokenizer.encode(text), 0.0
        for at in range(1, len(ids)):
            start = 0 if at <= 16 else (at - 17) // 9 * 9 + 9  # windows of 16 begin at 0, 9, 18, ...
            part = torch.tensor([ids[start:at]])
            hidden = net.decode(part, Sequence.dense(part.shape[1]))[0, -1]
            total += float((hidden @ net.output_weight_VD.T).double().log_softmax(-1)[ids[at]])
        assert answer["tokens"] == len(ids) - 1
        assert answer["log_probability"] == pytest.approx(total, rel=1e-5)
        expected = None if len(ids) == 1 else pytest.approx(math.exp(-total / (len(ids) - 1)), rel=1e-4)
        assert answer["perplexity"] == expected


@torch.no_grad()
def test_the_score_of_a_translation_is_its_log_probability() -> None:
    tokenizer, head = letters(), plugin("head", "translation")()  # with label smoothing, which a score is without
    net = decided(topology="encoder_decoder", vocab_size=tokenizer.vocab_size)
    rows = {"source": ["abc", "hello you"], "target": ["what is it", "no"]}
    features = head.encode(rows, tokenizer, 64)
    items = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    for answer, item in zip(head.score(net, head.collate(items, tokenizer)), items, strict=True):
        memory = net.encode(torch.tensor([item["source"]]), Sequence.dense(len(item["source"])))
        given = torch.tensor([[tokenizer.bos_id, *item["target"][:-1]]])
        hidden = net.decode(given, Sequence.dense(given.shape[1]), memory=memory)[0]
        logp = (hidden @ net.output_weight_VD.T).double().log_softmax(-1)
        assert answer["log_probability"] == pytest.approx(float(logp[range(len(logp)), item["target"]].sum()), rel=1e-5)
        assert answer["tokens"] == len(item["target"])

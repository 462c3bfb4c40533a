"""The question answering head against plain loops, SQuAD's metric against a table, windows against none."""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, Result, done, llmkit
from torch import Tensor, nn

from llmkit.contracts import Head, Network, Tokenizer
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.registry import plugin
from llmkit.sequence import DecodingOptions, Memory, Sequence, State
from llmkit.testing import check
from llmkit.testing.head.examples import FIELDS
from llmkit_plugins.head.answer_scores import answer_scores, cmrc_scores
from llmkit_plugins.head.words import words

RADII = (0, 2, 5, 15, 40)
CONTEXT = "In 1928, Ann Lee moved to  Paris\u00a0(France); her son, Bob, stayed in Rome until the war ended in 1945."
ROWS: dict[str, list[Any]] = {
    "question": ["Where did Ann Lee move to?", "Who stayed?", "Wann endete der Krieg?", "什么?"],
    "context": [CONTEXT, CONTEXT, CONTEXT, "我们在北京大学。"],
    "answers": [
        {"text": ["Paris\u00a0(France)", "Paris"], "answer_start": [27, 27]},
        {"text": ["Bob"], "answer_start": [CONTEXT.index("Bob")]},
        {"text": ["1945"], "answer_start": [CONTEXT.index("1945")]},
        {"text": ["北京大学"], "answer_start": [3]},
    ],
}


def byte_tokenizer() -> Tokenizer:
    tokenizer: Tokenizer = plugin("tokenizer", "byte")()
    return tokenizer


def answering(**arguments: Any) -> Head:
    head: Head = plugin("head", "question_answering", **arguments)()
    torch.manual_seed(1)
    head.build(16, 262)
    with torch.no_grad():
        head.get_submodule("classifier").weight.mul_(30)  # type: ignore[operator]
    return head.double().eval()


def network(head: Head, context: int = 200) -> Backbone:
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=262,
        dim=16,
        num_layers=2,
        topology=head.topology,
        max_length=context,
        attention=plugin("attention", "multi_head"),
        cross_attention=plugin("attention", "multi_head"),
        position=plugin("position", "rotary"),
        feedforward=plugin("feedforward", "gelu"),
        norm=plugin("norm", "layer"),
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)
    return net.eval()


def items(head: Head, rows: dict[str, list[Any]], context: int) -> list[dict[str, Any]]:
    features = head.encode(rows, byte_tokenizer(), context)
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def batch_of(head: Head, rows: dict[str, list[Any]], context: int) -> dict[str, Tensor]:
    return head.collate(items(head, rows, context), byte_tokenizer())


def answers_of(head: Head, net: Network, rows: dict[str, list[Any]], context: int) -> list[dict[str, Any]]:
    with torch.no_grad():
        return head.predict(net, batch_of(head, rows, context), byte_tokenizer(), DecodingOptions())


Candidate = tuple[int, int, Tensor]


def plain_candidates(head: Head, net: Network, question: str, context: str, windows: list[Any]) -> list[Candidate]:
    """Return window, word and (start, end) scores of each candidate of a question, by loops over bytes and words."""
    encode = byte_tokenizer().encode
    spans = words(context)
    there = [context[a:b].lower() for a, b in spans]
    asked = {question[a:b].lower() for a, b in words(question)}
    linear: Any = head.get_submodule("classifier")
    found = []
    for number, (first, end) in enumerate(windows):
        ids = [*encode(question.rstrip()), byte_tokenizer().sep_id]
        places = []
        for w in range(first, end):
            new = encode(context[spans[w - 1][1] if w else 0 : spans[w][1]])
            places.append(range(len(ids), len(ids) + len(new)))
            ids += new
        states = net.encode(torch.tensor([ids]), Sequence.dense(len(ids))).x_BSD[0]
        for w, place in zip(range(first, end), places, strict=True):
            mean = sum(states[i] for i in place) / len(place)
            near = []
            for radius in RADII:
                around = [there[v] for v in range(len(there)) if abs(v - w) <= radius and there[v] in asked]
                near.append(sum(1 / there.count(word) for word in around))
            inputs = torch.cat([torch.as_tensor(mean), torch.tensor(near, dtype=torch.float64)])
            found.append((number, w, linear.weight @ inputs + linear.bias))
    return found


def plain_loss(candidates: list[Candidate], context: str, gold: list[tuple[int, int]], windows: list[Any]) -> float:
    """Return -log of the share that the gold words have in all candidates of all windows, for start and end."""
    loss = 0.0
    for side in (0, 1):
        everything = sum(math.exp(float(scores[side])) for _, _, scores in candidates)
        wanted = {
            (number, (first, last)[side])
            for first, last in gold
            for number, (begin, end) in enumerate(windows)
            if begin <= first and last < end
        }
        right = sum(math.exp(float(s[side])) for number, w, s in candidates if (number, w) in wanted)
        loss -= math.log(right / everything)
    return loss


def gold_words(context: str, answers: dict[str, list[Any]]) -> list[tuple[int, int]]:
    """Return first and last word of each answer."""
    found = []
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        inside = [w for w, (a, b) in enumerate(words(context)) if a < start + len(text) and b > start]
        found.append((inside[0], inside[-1]))
    return found


def windows_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(row["windows"][::2], row["windows"][1::2], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("context", [200, 64])
def test_loss_metrics_and_answers_are_those_of_plain_loops(context: int) -> None:
    """At a context of 64 bytes each question has several windows."""
    head = answering(max_answer_words=4)
    net = network(head, context)
    rows = items(head, ROWS, context)
    assert [len(windows_of(row)) > 1 for row in rows] == [context == 64] * 3 + [False]
    total, exact, f1 = 0.0, 0.0, 0.0
    wanted = []
    for i, row in enumerate(rows):
        text, answers, windows = ROWS["context"][i], ROWS["answers"][i], windows_of(row)
        candidates = plain_candidates(head, net, ROWS["question"][i], text, windows)
        total += plain_loss(candidates, text, gold_words(text, answers), windows)
        spans = words(text)
        best = max(
            (float(a[2][0] + b[2][1]), (spans[a[1]][0], spans[b[1]][1]))
            for a in candidates
            for b in candidates
            if a[0] == b[0] and 0 <= b[1] - a[1] < 4
        )[1]
        wanted.append((*best, text[slice(*best)]))
        scores = answer_scores(wanted[-1][2], answers["text"], by_character=i == 3)
        exact, f1 = exact + 25 * scores[0], f1 + 25 * scores[1]
    batch = batch_of(head, ROWS, context)
    loss = head.loss(net, batch)
    assert int(loss.count) == 4
    assert float(loss.total) == pytest.approx(total, rel=1e-6)
    answers = head.predict(net, batch, byte_tokenizer(), DecodingOptions())
    assert [(answer["start"], answer["end"], answer["answer"]) for answer in answers] == wanted
    assert [answer["question"] for answer in answers] == ROWS["question"]
    metrics: dict[str, Any] = head.metrics("test")
    for part in (slice(0, 1), slice(1, 4)):
        batch = batch_of(head, {name: column[part] for name, column in ROWS.items()}, context)
        head.evaluate(net, batch, metrics, byte_tokenizer())
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found == pytest.approx({"loss": total / 4, "exact_match": exact, "f1": f1}, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("context", [200, 64])
def test_loss_and_answers_do_not_depend_on_batching_order_or_padding(context: int) -> None:
    head = answering()
    net = network(head, context)
    rows = items(head, ROWS, context)
    whole = head.loss(net, head.collate(rows, byte_tokenizer()))
    answers = head.predict(net, head.collate(rows, byte_tokenizer()), byte_tokenizer(), DecodingOptions())
    for split in ([[row] for row in rows], [rows[2:], rows[:2]], [rows[::-1]]):
        batches = [head.collate(part, byte_tokenizer()) for part in split]
        parts = [head.loss(net, batch) for batch in batches]
        assert sum(int(part.count) for part in parts) == int(whole.count)
        assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), rel=1e-9)
        found = [a for batch in batches for a in head.predict(net, batch, byte_tokenizer(), DecodingOptions())]
        for answer in found:
            (same,) = [other for other in answers if other["question"] == answer["question"]]
            assert same == {**answer, "score": pytest.approx(answer["score"])}


def test_loss_has_a_gradient_where_a_question_has_no_answer() -> None:
    head = answering().train()
    net = network(head)
    rows = {**ROWS, "answers": [{"text": [], "answer_start": []}, *ROWS["answers"][1:]]}
    loss = head.loss(net, batch_of(head, rows, 200))
    assert int(loss.count) == 3
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*head.parameters(), *net.parameters()])
    nothing = head.loss(net, batch_of(head, {name: column[:1] for name, column in rows.items()}, 200))
    assert int(nothing.count) == 0 and float(nothing.total.detach()) == 0
    nothing.total.backward()


# Windows


class Local(Network):
    """A network whose states depend on the token alone."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.embedding = nn.Embedding(262, 16).double()

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        return Memory(self.embedding(ids_BT), seq)

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        raise NotImplementedError

    @property
    def output_weight_VD(self) -> Tensor:
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        raise NotImplementedError


def test_windows_find_what_one_window_finds_where_the_model_is_local() -> None:
    head = answering(max_answer_words=3)
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefg", k=rng.randrange(1, 7))) for _ in range(60))
    rows: dict[str, list[Any]] = {"question": ["ab?", "cab gaf?", "?"], "context": [text] * 3}
    whole = answers_of(head, Local(), rows, 1000)
    assert all(len(windows_of(row)) == 1 for row in items(head, rows, 1000))
    for context in (60, 80, 200):
        assert all(len(windows_of(row)) > 1 for row in items(head, rows, context))
        found = answers_of(head, Local(), rows, context)
        assert [(a["start"], a["end"]) for a in found] == [(a["start"], a["end"]) for a in whole]


@pytest.mark.parametrize("stride", [None, 1, 7, 1000])
def test_windows_cover_everything_and_fit(stride: int | None) -> None:
    head = answering(stride=stride)
    rng = random.Random(1)
    for _ in range(50):
        sizes = [rng.randrange(1, 15) for _ in range(rng.randrange(1, 40))]
        text = " ".join("x" * (size - (place > 0)) or "-" for place, size in enumerate(sizes))
        row = items(head, {"question": ["q"], "context": [text]}, 18)[0]
        room, sizes, windows = 16, row["sizes"], windows_of(row)
        assert windows[0][0] == 0 and windows[-1][1] == len(sizes)
        for first, end in windows:
            assert first < end and sum(sizes[first:end]) <= room
            assert end == len(sizes) or sum(sizes[first : end + 1]) > room  # no word more would fit
        for (first, end), (later, after) in pairwise(windows):
            assert first < later <= end < after
            # Not before a stride is over, unless a word would be left out.
            assert sum(sizes[first:later]) >= min(stride or 8, room) or later == end


def test_a_long_question_leaves_half_the_context() -> None:
    head = answering()
    rows = {"question": ["long question " * 9, "?"], "context": ["one two three four five six seven"] * 2}
    features = head.encode(rows, byte_tokenizer(), 40)
    assert features["truncated"] == [1, 0]
    assert byte_tokenizer().decode(features["asked"][0]) == ("long question " * 9)[:19]
    assert len(features["asked"][0]) == 20
    batch = batch_of(head, rows, 40)
    assert batch["ids"].shape[1] <= 40
    for context in (2, 3, 4):  # however small
        assert batch_of(head, rows, context)["ids"].shape[1] <= context


def test_a_word_longer_than_a_window_is_cut() -> None:
    head = answering()
    rows = {"question": ["q"], "context": ["a " + "b" * 100 + " c"]}
    assert items(head, rows, 20)[0]["sizes"] == [1, 18, 2]
    answer = answers_of(head, network(head, 20), rows, 20)[0]
    assert rows["context"][0][answer["start"] : answer["end"]] == answer["answer"]


@pytest.mark.parametrize("context", ["", " \n", "\u3000x\u3000", "x" * 300, "\ud83d \x00 é\u0301"])
def test_the_answer_is_always_a_piece_of_the_context(context: str) -> None:
    head = answering()
    (answer,) = answers_of(head, network(head, 40), {"question": [""], "context": [context]}, 40)
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    assert 0 < answer["score"] <= 1 + 1e-9


# Answers


def test_answers_that_do_not_stand_where_they_should() -> None:
    head = answering()
    text = "Bob met Ann. Then Ann met Bob."
    given: list[Any] = [
        {"text": ["Ann"], "answer_start": [19]},  # near the second one
        [{"text": "Bob", "answer_start": 3, "answer_type": "Person"}],
        {"text": ["Zoe"], "answer_start": [0]},
        {"text": ["Bob"], "answer_start": [26]},
    ]
    rows = {"question": ["Who?"] * 4, "context": [text] * 4, "answers": given}
    features = head.encode(rows, byte_tokenizer(), 200)
    spans = words(text)
    found = [[text.rindex("Ann")], [0], [], [26]]
    assert [[spans[w][0] for w in starts] for starts in features["starts"]] == found
    assert features["starts"] == features["ends"]
    assert features["moved"] == [1, 1, 0, 0]
    assert features["untrained"] == [0, 0, 1, 0]
    with torch.no_grad():
        metrics: dict[str, Any] = head.metrics("validation")
        batch = batch_of(head, rows, 200)
        head.evaluate(network(head), batch, metrics, byte_tokenizer())
        assert int(head.loss(network(head), batch).count) == 3
    assert int(metrics["loss"].count) == 3
    assert int(metrics["f1"].count) == 4


UNANSWERED: dict[str, list[Any]] = {**ROWS, "answers": [*ROWS["answers"][:2], {"text": [], "answer_start": []}, []]}


def abstaining(**arguments: Any) -> Head:
    head: Head = plugin("head", "question_answering", **arguments)()
    head.learn(UNANSWERED)
    again: Head = plugin("head", "question_answering", **arguments)()
    again.set_info(head.info())
    torch.manual_seed(1)
    again.build(16, 262)
    return again.double().eval()


@torch.no_grad()
def test_questions_without_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """The loss against a plain loop over windows that are read one by one."""
    head, context = abstaining(), 100
    net = network(head, context)
    batch = batch_of(head, UNANSWERED, context)
    assert capsys.readouterr().err == ""  # they are trained on
    rows, begin = len(batch["ids"]), 0
    assert rows > len(ROWS["question"])  # some contexts have several windows
    expected = 0.0
    scores: Any = head
    found = scores.scores(net, batch)
    none = head.get_submodule("no_answer")
    for q, answers in enumerate(UNANSWERED["answers"]):
        own = sorted(set(batch["windows"][q].tolist()) - {-1})
        least = [math.inf, math.inf]
        for row in own:
            length = int(batch["segments"][row].sum())
            ids = batch["ids"][row, :length]
            x_TD = net.encode(ids[None], Sequence.dense(length)).x_BSD[0]
            place = ids.tolist().index(byte_tokenizer().sep_id)
            least = [min(pair) for pair in zip(least, none(x_TD[place]).tolist(), strict=True)]
        for side in (0, 1):
            # All candidates but the last are those of a head that has to answer, up to the normaliser.
            rest = found[q, :-1, side] - found[q, -1, side]
            assert float(found[q, :, side].exp().sum()) == pytest.approx(1)
            plain = head.get_submodule("classifier")(_features(net, batch, q))[:, side]
            assert rest[: len(plain)].tolist() == pytest.approx((plain - least[side]).tolist(), rel=1e-6, abs=1e-9)
            if not _texts(answers):
                expected -= float(found[q, -1, side])
            else:
                right = batch["gold"][q, :-1, side]
                expected -= float(found[q, :-1, side][right].logsumexp(0))
        begin += len(own)
    assert begin == rows
    loss = head.loss(net, batch)
    assert float(loss.total) == pytest.approx(expected) and int(loss.count) == 4


def _texts(answers: Any) -> list[str]:
    return list(answers["text"]) if isinstance(answers, dict) else answers


def _features(net: Network, batch: dict[str, Any], q: int) -> Tensor:
    """Return each candidate's mean state, and the numbers of words of the question around it."""
    count = int((batch["windows"][q] >= 0).sum())
    states = []
    for k in range(count):
        row = int(batch["windows"][q, k])
        length = int(batch["segments"][row].sum())
        x_TD = net.encode(batch["ids"][row, :length][None], Sequence.dense(length)).x_BSD[0]
        own = batch["words"][row, :length] == q * batch["windows"].shape[1] + k
        states.append(x_TD[own].mean(0) if own.any() else torch.zeros(16, dtype=torch.float64))
    return torch.cat([torch.stack(states), batch["near"][q, :count].double()], -1)


@torch.no_grad()
def test_a_perfect_model_of_unanswerable_questions_scores_100(monkeypatch: pytest.MonkeyPatch) -> None:
    head = abstaining()
    batch = batch_of(head, UNANSWERED, 200)
    perfect = batch["gold"].double().log()
    monkeypatch.setattr(head, "scores", lambda net, batch: perfect)
    for scores, values in ((perfect, (100, 100, 100, 100)), (perfect.roll(1, 1), (0, 0, 0, 0))):
        monkeypatch.setattr(head, "scores", lambda net, batch, scores=scores: scores)
        metrics: dict[str, Any] = head.metrics("validation")
        head.evaluate(network(head), batch, metrics, byte_tokenizer())
        names = ("exact_match", "f1", "has_answer_f1", "no_answer_f1")
        found = [float(metrics[name].compute()) for name in names]
        assert found == list(values) if scores is perfect else found[0] < 100 and found[3] == 0
    monkeypatch.setattr(head, "scores", lambda net, batch: perfect)
    answers = head.predict(network(head), batch, byte_tokenizer(), DecodingOptions())
    assert [answer["answer"] for answer in answers][2:] == ["", ""]
    assert answers[2]["start"] == answers[2]["end"] == 0 and answers[2]["score"] == 1


def test_a_head_that_abstains_passes_the_checks() -> None:
    rows = {name: FIELDS[name] for name in ("question", "context")}
    rows["answers"] = [{"text": [], "answer_start": []}, *FIELDS["answers"][1:4], []]
    report = check("head", "question_answering", rows=rows)
    assert not report.failed, str(report)


def test_an_answer_inside_a_word_is_that_word() -> None:
    features = answering().encode(
        {"question": ["?"], "context": ["the 1990s (then)"], "answers": [{"text": ["1990"], "answer_start": [4]}]},
        byte_tokenizer(),
        100,
    )
    assert features["starts"] == features["ends"] == [[1]]


@pytest.mark.parametrize("answers", ["x", {"text": ["a"]}, {"text": ["a"], "answer_start": []}, [{"text": "a"}], 3])
def test_answers_of_another_shape_are_refused(answers: Any) -> None:
    with pytest.raises(UserError, match=r"answers must be \{text: \[\.\.\.\], answer_start: \[\.\.\.\]\} or .*, got"):
        items(answering(), {"question": ["?"], "context": ["a"], "answers": [answers]}, 100)


@pytest.mark.parametrize("arguments", [{"stride": 0}, {"max_answer_words": 0}])
def test_arguments_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(arguments))} must be at least 1, got 0"):
        answering(**arguments)


# The metric


def official(prediction: str, references: list[str]) -> tuple[float, float]:
    """SQuAD v1.1's definitions, written down plainly."""

    def tokens(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    def f1(reference: str) -> float:
        found, wanted = tokens(prediction), tokens(reference)
        same = sum((Counter(found) & Counter(wanted)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(found), same / len(wanted)
        return 2 * precision * recall / (precision + recall)

    exact = max(float(tokens(prediction) == tokens(reference)) for reference in references)
    return exact, max(map(f1, references))


def test_answer_scores_are_the_official_ones() -> None:
    rng = random.Random(0)
    vocabulary = ["The", "a", "An", "cat", "cats", "sat,", "U.S.", "(42)", "theatre", "\u2014", "cat-sat", "the", "É"]
    for _ in range(500):
        texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(1, 5))) for _ in range(4)]
        assert answer_scores(texts[0], texts[1:]) == pytest.approx(official(texts[0], texts[1:]))


@pytest.mark.parametrize(
    ("answer", "references", "by_character", "exact", "f1"),
    [
        ("the Denver Broncos", ["Denver Broncos!"], False, 1, 1),
        ("Denver", ["Denver Broncos", "Broncos"], False, 0, 2 / 3),
        ("in 1945", ["1945"], False, 0, 2 / 3),
        ("北京", ["北京大学"], False, 0, 0),
        ("北京", ["北京大学"], True, 0, 2 / 3),
        ("《北京 大学》。", ["北京大学"], True, 1, 1),
        ("1928年", ["1928"], True, 0, 8 / 9),
        ("the", ["theNexon"], True, 0, 6 / 11),
        ("x", [], False, 0, 0),
        ("the", [], False, 1, 1),
        ("", [], True, 1, 1),
        ("", ["x"], True, 0, 0),
    ],
)
def test_answer_scores(answer: str, references: list[str], by_character: bool, exact: float, f1: float) -> None:
    assert answer_scores(answer, references, by_character) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("北京大学", ["北大"], 0, 1 / 3),  # in common is the run of one character, not two characters
        ("北京大学", ["北大", "京大学"], 0, 6 / 7),
        ("1928年", ["1928"], 0, 2 / 3),  # a number is one unit
        ("《北京 大学》。", ["北京大学"], 0, 1),  # for an exact match only punctuation is left out
        ("A-B", ["ab"], 1, 1),
        ("x", [], 0, 0),
        ("", ["x"], 0, 0),
    ],
)
def test_cmrc_scores_are_those_of_its_official_script(
    answer: str, references: list[str], exact: float, f1: float
) -> None:
    assert cmrc_scores(answer, references) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("level", "f1"), [("auto", [200 / 3, 0]), ("word", [0, 0]), ("character", [200 / 3, 80]), ("cmrc", [200 / 3, 0])]
)
def test_level(level: str, f1: list[float]) -> None:
    """``auto`` goes by most words of the context."""
    for question, context, answer, predicted, wanted in (
        ("?", "我们在北京大学。", "北京大学", (3, 5), f1[0]),
        ("?", "He met 北京 people.", "people", (10, 14), f1[1]),
    ):
        head = answering(level=level)
        row: dict[str, list[Any]] = {
            "question": [question],
            "context": [context],
            "answers": [{"text": [answer], "answer_start": [0]}],
        }
        batch = batch_of(head, row, 100)
        head._best = lambda scores, batch: [(context, *predicted, 1.0)]  # type: ignore[assignment]  # noqa: B023
        metrics: dict[str, Any] = head.metrics("test")
        with torch.no_grad():
            head.evaluate(network(head), batch, metrics, byte_tokenizer())
        assert float(metrics["f1"].compute()) == pytest.approx(wanted), context


# From a file to an answer


def squad(rows: dict[str, list[Any]]) -> dict[str, Any]:
    paragraphs = []
    for question, context, answers in zip(*(rows[name] for name in ("question", "context", "answers")), strict=True):
        listed = [{"text": t, "answer_start": s} for t, s in zip(*answers.values(), strict=True)]
        paragraphs.append({"context": context, "qas": [{"id": "1", "question": question, "answers": listed}]})
    return {"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("squad")
    (folder / "a.json").write_text(json.dumps(squad(ROWS)))
    words = ("--model.head", "question_answering", "--data.train", folder / "a.json", "--data.format", "squad")
    return done(
        *("fit", *words, *TINY, "--model.context", "64", "--output", folder / "runs"),
        *("--data.validation", folder / "a.json", "--data.test", folder / "a.json", "--data.tokenizer", "byte"),
    )


def test_fit_and_test(fitted: Result, tmp_path: Path) -> None:
    assert "exact_match" in fitted.out
    tested = done("test", "--ckpt_path", fitted.checkpoint, "--output", tmp_path)
    (path,) = tmp_path.rglob("results.json")
    assert "f1" in tested.out and json.loads(path.read_text())["test_loss"] > 0


def test_infer_reads_json_objects(fitted: Result, tmp_path: Path) -> None:
    rows = [{"question": q, "context": c, "id": 3} for q, c in zip(ROWS["question"], ROWS["context"], strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    out = done("infer", fitted.checkpoint, *lines, "--json").out
    answers = [json.loads(line) for line in out.splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        assert answer["question"] == row["question"]
        assert str(row["context"])[answer["start"] : answer["end"]] == answer["answer"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert done("infer", fitted.checkpoint, "--input", path, "--json").out == out
    assert done("infer", fitted.checkpoint, lines[1]).out.startswith(answers[1]["answer"] + "\t")
    predict = ("--data.predict", path, "--data.format", "json", "--output", tmp_path)
    done("predict", "--ckpt_path", fitted.checkpoint, *predict)
    (found,) = tmp_path.rglob("predictions.jsonl")
    predicted = [json.loads(line) for line in found.read_text().splitlines()]
    assert [row["answer"] for row in predicted] == [answer["answer"] for answer in answers]


@pytest.mark.parametrize("text", ["Who?", '["Who?"]', '{"question": "Who?"}', '{"question": "", "context": "x"}', "3"])
def test_infer_asks_for_the_fields(fitted: Result, text: str) -> None:
    result = llmkit("infer", fitted.checkpoint, text)
    assert result.code == 2
    wanted = """this checkpoint reads question and context: expected '{"question": "...", "context": "..."}', got"""
    assert wanted in result.err and result.err.count("\n") == 1


def test_it_learns_to_answer() -> None:
    """A few questions learned by heart, in windows; the loss goes far below that of a guess."""
    head = answering()
    net = network(head, 64).float().train()
    head.float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(4)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2)
    batch = batch_of(head, ROWS, 64)
    for _ in range(80):
        optimizer.zero_grad()
        loss = head.loss(net, batch)
        loss.total.backward()
        optimizer.step()
    answers = answers_of(head, net.eval(), ROWS, 64)
    assert float(loss.total.detach()) / 4 < 0.5
    assert [answer["answer"] for answer in answers[1:]] == ["Bob", "1945", "北京大学"]
    assert answers[0]["answer"].startswith("Paris")

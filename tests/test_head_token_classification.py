"""The token classification head against plain loops and seqeval, and its way from a file to an answer."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import seqeval.metrics
import torch
import torch.nn.functional as F
from command import TINY, done, llmkit
from seqeval.metrics.sequence_labeling import get_entities

from llmkit.contracts import Head, Tokenizer
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.registry import plugin
from llmkit.sequence import DecodingOptions, Sequence
from llmkit_plugins.head.token_classification import EntityScore, entities
from llmkit_plugins.head.words import by_character, characters, encode, pieces, running, words

SENTENCES = [
    ["EU", "rejects", "German", "call", "."],
    ["Peter", "Blackburn"],
    ["#", "in", "New", "York", "City", "!"],
    ["x"],
]
TAGS = [
    ["B-org", "O", "B-misc", "O", "O"],
    ["B-per", "I-per"],
    ["O", "O", "B-loc", "I-loc", "I-loc", "O"],
    ["O"],
]
LABELS = ["O", "B-loc", "B-misc", "B-org", "B-per", "I-loc", "I-per"]


def byte_tokenizer() -> Tokenizer:
    tokenizer: Tokenizer = plugin("tokenizer", "byte")()
    return tokenizer


def labelled(**arguments: Any) -> Head:
    head: Head = plugin("head", "token_classification", **arguments)()
    head.learn({"tokens": SENTENCES, "tags": TAGS})
    torch.manual_seed(1)
    head.build(16, 262)
    with torch.no_grad():
        head.get_submodule("classifier").weight.mul_(40)  # type: ignore[operator]
    return head.double().eval()


def network(head: Head) -> Backbone:
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=262,
        dim=16,
        num_layers=2,
        topology=head.topology,
        max_length=48,
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


def items(head: Head, rows: dict[str, list[Any]], context: int = 48) -> list[dict[str, Any]]:
    features = head.encode(rows, byte_tokenizer(), context)
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def batch_of(head: Head, rows: dict[str, list[Any]], context: int = 48) -> dict[str, torch.Tensor]:
    return head.collate(items(head, rows, context), byte_tokenizer())


ROWS: dict[str, list[Any]] = {"tokens": SENTENCES, "tags": TAGS}


def plain_scores(head: Head, net: Backbone, sentence: list[str], context: int = 48) -> list[torch.Tensor]:
    """Return the tag scores of each word that fits, by loops over the bytes of the sentence's words."""
    ids: list[int] = []
    spans = []
    for place, word in enumerate(sentence):
        new = byte_tokenizer().encode(word if place == 0 else " " + word)
        if len(ids) + len(new) > context:
            break
        spans.append((len(ids), len(ids) + len(new)))
        ids += new
    states = net.encode(torch.tensor([ids]), Sequence.dense(len(ids))).x_BSD[0]
    linear: Any = head.get_submodule("classifier")
    return [linear.weight @ sum(states[i] for i in range(a, b)) / (b - a) + linear.bias for a, b in spans]


@torch.no_grad()
def test_loss_is_the_plain_cross_entropy_of_words() -> None:
    head = labelled()
    net = network(head)
    total, count = 0.0, 0
    for sentence, tags in zip(SENTENCES, TAGS, strict=True):
        for scores, tag in zip(plain_scores(head, net, sentence), tags, strict=True):
            total -= float(scores.log_softmax(-1)[LABELS.index(tag)])
            count += 1
    loss = head.loss(net, batch_of(head, ROWS))
    assert int(loss.count) == count == 14
    assert float(loss.total) == pytest.approx(total, rel=1e-9)


@torch.no_grad()
def test_loss_does_not_depend_on_batching_order_or_padding() -> None:
    head = labelled()
    net = network(head)
    rows = items(head, ROWS)
    whole = head.loss(net, head.collate(rows, byte_tokenizer()))
    for split in ([[row] for row in rows], [rows[2:], rows[:2]], [rows[::-1]]):
        parts = [head.loss(net, head.collate(part, byte_tokenizer())) for part in split]
        assert sum(int(part.count) for part in parts) == int(whole.count)
        assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), rel=1e-9)


def test_loss_has_a_gradient() -> None:
    head = labelled().train()
    net = network(head)
    head.loss(net, batch_of(head, ROWS)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*head.parameters(), *net.parameters()])


@torch.no_grad()
@pytest.mark.parametrize("context", [48, 12])
def test_metrics_and_predictions_are_those_of_plain_loops(context: int) -> None:
    """At a context of 12 bytes the words beyond it count as tagged O."""
    head = labelled()
    net = network(head)
    rows: dict[str, list[Any]] = {"tokens": SENTENCES, "tags": [list(tags) for tags in TAGS]}
    rows["tags"][0][2] = "B-work"  # training had no such tag
    predicted = []
    losses = []
    for sentence, tags in zip(SENTENCES, rows["tags"], strict=True):
        scores = plain_scores(head, net, sentence, context)
        predicted.append([LABELS[int(row.argmax())] for row in scores] + ["O"] * (len(sentence) - len(scores)))
        for row, tag in zip(scores, tags, strict=False):
            if tag in LABELS:
                losses.append(float(F.cross_entropy(row[None], torch.tensor([LABELS.index(tag)]))))
    assert len({tag for tags in predicted for tag in tags}) > 2  # or nothing would be tested
    metrics: dict[str, Any] = head.metrics("test")
    for part in (slice(0, 1), slice(1, 4)):
        piece = {name: column[part] for name, column in rows.items()}
        head.evaluate(net, batch_of(head, piece, context), metrics, byte_tokenizer())
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing right
        wanted = {
            "loss": sum(losses) / len(losses),
            "accuracy": seqeval.metrics.accuracy_score(rows["tags"], predicted),
            "precision": seqeval.metrics.precision_score(rows["tags"], predicted),
            "recall": seqeval.metrics.recall_score(rows["tags"], predicted),
            "f1": seqeval.metrics.f1_score(rows["tags"], predicted),
        }
    assert found == pytest.approx(wanted)
    features = head.encode(rows, byte_tokenizer(), context)
    assert features["truncated"] == ([1, 1, 1, 0] if context == 12 else [0] * 4)
    answers = head.predict(net, batch_of(head, rows, context), byte_tokenizer(), DecodingOptions())
    assert [answer["tags"] for answer in answers] == predicted
    assert [answer["tokens"] for answer in answers] == SENTENCES


# Entities


def random_tags(rng: random.Random, alphabet: list[str]) -> list[str]:
    return [rng.choice(alphabet) for _ in range(rng.randrange(12))]


@pytest.mark.parametrize("prefixes", ["BI", "I", "BIES"])
def test_entities_are_seqevals(prefixes: str) -> None:
    rng = random.Random(0)
    alphabet = ["O", *(f"{prefix}-{label}" for prefix in prefixes for label in ("a", "b-c"))]
    wanted = [random_tags(rng, alphabet) for _ in range(300)]
    for tags in wanted:
        assert entities(tags) == [(label, first, last + 1) for label, first, last in get_entities(tags)]
    found = [[tag if rng.random() < 0.7 else rng.choice(alphabet) for tag in tags] for tags in wanted]
    reference = {
        "precision": seqeval.metrics.precision_score(wanted, found),
        "recall": seqeval.metrics.recall_score(wanted, found),
        "f1": seqeval.metrics.f1_score(wanted, found),
    }
    assert 0.1 < reference["f1"] < 0.9
    for kind, value in reference.items():
        score = EntityScore(kind)  # type: ignore[arg-type]
        score.update(found[:100], wanted[:100])
        score.update(found[100:], wanted[100:])
        assert float(score.compute()) == pytest.approx(value)


@pytest.mark.parametrize("kind", ["precision", "recall", "f1"])
def test_scores_without_entities_are_zero(kind: Any) -> None:
    score = EntityScore(kind)
    score.update([["O", "O"], []], [["O", "O"], []])
    assert float(score.compute()) == 0


def test_other_schemes_are_read_as_bioes() -> None:
    assert entities(["B-a", "M-a", "E-a", "S-a", "O", "U-b", "B-b", "I-b", "L-b", "I-b"]) == [
        ("a", 0, 3), ("a", 3, 4), ("b", 5, 6), ("b", 6, 9), ("b", 9, 10),
    ]  # fmt: skip


# What it learns, and what is refused


def test_learn_and_info() -> None:
    head = labelled()
    assert head.info() == {"labels": LABELS, "by_character": False}
    head.learn({"tokens": [[*"我在北京上大学"], ["h", "t", "\ufffd\ufffd", "，", "x"]], "tags": [["B-loc"], ["O"]]})
    assert head.info() == {"labels": ["O", "B-loc"], "by_character": True}
    other = labelled()
    other.set_info(head.info())
    assert other.info() == head.info()


def test_tags_as_numbers() -> None:
    head: Head = plugin("head", "token_classification", names=["O", "B-x", "I-x"])()
    head.learn({"tokens": [["a", "b"]], "tags": [[0, 1]]})
    assert head.info()["labels"] == ["O", "B-x"]
    features = head.encode({"tokens": [["a", "b"]], "tags": [[0, 1]]}, byte_tokenizer(), 8)
    assert features["tags"] == ["O\nB-x"]


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ([["O", 1]], r"numbers need model\.head\.names"),
        ([["O", "NOUN"]], r"'NOUN' is not a tag: expected O, B-label or I-label"),
        ([["O", "B-"]], r"'B-' is not a tag"),
        (["O O"], r"tags must be a list, one tag a word, got 'O O'"),
        ([["O", "O"]], r"no tag of the training data is other than O"),
    ],
)
def test_what_are_no_tags(tags: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plugin("head", "token_classification")().learn({"tokens": [["a", "b"]], "tags": tags})


def test_unequal_numbers_of_tokens_and_tags() -> None:
    with pytest.raises(UserError, match="the sentence 'EU rejects' has 2 tokens and 1 tags"):
        items(labelled(), {"tokens": [["EU", "rejects"]], "tags": [["O"]]})


# Texts


def test_offsets_are_those_of_the_raw_text() -> None:
    head = labelled()
    net = network(head)
    texts = ["  Peter\u00a0Blackburn — in\n New York (USA).", "我在北京", " \n", "e\u0301te\u0301 #1"]
    with torch.no_grad():
        answers = head.predict(net, batch_of(head, {"tokens": texts}), byte_tokenizer(), DecodingOptions())
    for text, answer in zip(texts, answers, strict=True):
        assert answer["text"] == text
        assert answer["tokens"] == [text[a:b] for a, b in words(text)]
        for entity in answer["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
    assert sum(len(answer["entities"]) for answer in answers) > 3
    assert answers[2]["tokens"] == answers[2]["tags"] == []


def test_text_is_cut_into_characters_where_training_words_were_such() -> None:
    head = labelled()
    head.set_info({**head.info(), "by_character": True})
    with torch.no_grad():
        batch = batch_of(head, {"tokens": ["去 http了"]})
        answer = head.predict(network(head), batch, byte_tokenizer(), DecodingOptions())[0]
    assert answer["tokens"] == [*"去http了"]


def test_show_marks_the_entities() -> None:
    places = [("Ann", "per", 0, 3), ("New York", "loc", 7, 15)]
    marked = [{"text": text, "label": label, "start": a, "end": b} for text, label, a, b in places]
    answer = {"text": "Ann in New York.", "tokens": [], "tags": [], "entities": marked}
    assert labelled().show(answer) == "[Ann](per) in [New York](loc)."


def test_words_of_a_text() -> None:
    def cut(text: str) -> list[str]:
        return [text[a:b] for a, b in words(text)]

    assert cut("Don't pay 10,000$ (a_b)!") == [
        "Don",
        "'",
        "t",
        "pay",
        "10",
        ",",
        "000",
        "$",
        "(",
        "a",
        "_",
        "b",
        ")",
        "!",
    ]
    assert cut("1928年にNexonが。") == ["1928", "年", "に", "Nexon", "が", "。"]
    assert cut("한국어 हिन्दी e\u0301te\u0301") == ["한", "국", "어", "हिन्दी", "e\u0301te\u0301"]
    assert cut("") == cut(" \u3000\n") == []
    text = " a,b\n c "
    assert pieces(text, words(text)) == [" a", ",", "b", "\n c"]
    assert [text[a:b] for a, b in characters(text)] == ["a", ",", "b", "c"]
    assert by_character("1928年にNexonが。") and not by_character("Is 北京 a city?")


def test_words_of_a_list_become_running_text() -> None:
    for given, wanted in (
        (["He", "said", "我", "", "!"], "He said 我  !"),
        (["他", "在", "h", "t", "，", "买", "iPhone", "了"], "他在ht，买iPhone了"),
        (["나는", "학교에", "간다"], "나는 학교에 간다"),
        ([], ""),
    ):
        text, spans = running(given)
        assert text == wanted
        assert [text[a:b] for a, b in spans] == given


# Tokenizers


@pytest.mark.parametrize("name", ["char", "byte", "word", "bpe", "wordpiece", "unigram"])
def test_every_tokenizer_gives_each_word_its_pieces(name: str) -> None:
    sizes = {"word": 60, "bpe": 300, "wordpiece": 120, "unigram": 90}
    tokenizer: Tokenizer = plugin("tokenizer", name, **({"vocab_size": sizes[name]} if name in sizes else {}))()
    head = labelled()
    tokenizer.train(piece for sentence in SENTENCES for piece in type(head).words["tokens"](sentence))
    rows = head.encode({"tokens": SENTENCES}, tokenizer, 200)
    assert [len(sizes) for sizes in rows["sizes"]] == [len(sentence) for sentence in SENTENCES]
    for sentence, ids, lengths in zip(SENTENCES, rows["ids"], rows["sizes"], strict=True):
        assert min(lengths) > 0 and sum(lengths) == len(ids)
        # Known words, encoded one by one, are the running text again.
        assert tokenizer.decode(ids).replace(" ", "") == "".join(sentence)
        if name in ("char", "byte", "bpe"):
            assert tokenizer.decode(ids) == " ".join(sentence)
    if name in ("word", "wordpiece", "unigram"):  # blanks are no pieces of their own
        assert encode(tokenizer, [["New", " New"]]) == [[tokenizer.encode("New")] * 2]
    if name == "word":
        assert all(size == 1 for lengths in rows["sizes"] for size in lengths)


def test_the_tokenizer_is_trained_on_the_words_alone(tmp_path: Path) -> None:
    """Words that nothing divides in running text are words of the vocabulary all the same."""
    path = tmp_path / "a.conll"
    path.write_text("".join(f"{c}\tB-x\n" for c in "北京大学") + "\n" + "".join(f"{c}\tO\n" for c in "我去北京"))
    words = ("--model.head", "token_classification", "--data.train", path, "--data.format", "conll")
    result = done(
        *("fit", *words, *TINY, "--data.validation", path, "--output", tmp_path / "runs"),
        *("--data.tokenizer", "{name: word, vocab_size: 40}"),
    )
    state = torch.load(result.checkpoint, weights_only=True)["llmkit"]["tokenizer_state"]
    assert {*"北京大学我去"} <= set(json.loads(state)["model"]["model"]["vocab"])


# From a file to an answer


def test_fit_test_predict_and_infer(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    lines = ["\n".join(f"{w} {t}" for w, t in zip(*pair, strict=True)) for pair in zip(SENTENCES, TAGS, strict=True)]
    path.write_text("\n\n".join(lines * 4) + "\n")
    words = ("--model.head", "token_classification", "--data.train", path, "--data.format", "conll")
    result = done("fit", *words, *TINY, "--output", tmp_path / "runs", "--data.test", path)
    assert "f1" in result.out
    tested = done("test", "--ckpt_path", result.checkpoint, "--output", tmp_path / "tested")
    assert "recall" in tested.out
    assert "8 of 16 texts in data.test are longer than model.context (16 tokens)" in tested.err
    text = "Peter in  New York"
    answer = json.loads(done("infer", result.checkpoint, text, "--json").out)
    assert answer["text"] == text and answer["tokens"] == text.split()
    (tmp_path / "b.jsonl").write_text(json.dumps({"tokens": text.split()}) + "\n" + json.dumps({"tokens": text}) + "\n")
    predict = ("--data.predict", tmp_path / "b.jsonl", "--data.format", "json", "--output", tmp_path / "predicted")
    done("predict", "--ckpt_path", result.checkpoint, *predict)
    (found,) = (tmp_path / "predicted").rglob("predictions.jsonl")
    assert [json.loads(line)["tokens"] for line in found.read_text().splitlines()] == [text.split()] * 2


def test_the_row_with_too_few_tags_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": ["O", "B-x"]}\n{"tokens": ["a", "b"], "tags": ["O"]}\n')
    words = ("--model.head", "token_classification", "--data.train", path, "--data.validation", path)
    result = llmkit("fit", *words, *TINY, "--output", tmp_path / "runs")
    assert result.code == 2
    assert "a.jsonl:2 is refused by the head: the sentence 'a b' has 2 tokens and 1 tags" in result.err

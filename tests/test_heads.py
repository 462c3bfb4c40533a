"""Heads against plain computations: the loss, padding, batching, metrics and predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F

from llmkit.contracts import IGNORE, Head, Tokenizer
from llmkit.data.examples import Examples, Features
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.registry import entries, plugin, target_of
from llmkit.sequence import DecodingOptions, Sequence

TEXTS = ["a small step", "hello", "one more text here", "xyz"]
VARIANTS = ["standard", "multi_head", "grouped_query", "lstm", "gru"]


def byte_tokenizer() -> Tokenizer:
    tokenizer: Tokenizer = plugin("tokenizer", "byte")()
    return tokenizer


def network(head: Head, attention: str = "multi_head", vocab: int = 262, position: str = "rotary") -> Backbone:
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=vocab,
        dim=16,
        num_layers=2,
        topology=head.topology,
        max_length=48,
        attention=plugin("attention", attention),
        cross_attention=plugin("attention", "multi_head"),
        position=plugin("position", position),
        feedforward=plugin("feedforward", "gelu"),
        norm=plugin("norm", "layer"),
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)  # far enough from uniform for differences to show
    head.double()
    return net.eval()


def items(head: Head, tokenizer: Tokenizer, **rows: list[Any]) -> list[dict[str, Any]]:
    features = head.encode(rows, tokenizer, 48)
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def classification() -> Head:
    head: Head = plugin("head", "classification")()
    head.learn({"label": ["neg", "pos", "neg", "meh"]})
    torch.manual_seed(1)
    head.build(16, 262)
    return head.eval()


CASES: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "generation": (lambda: plugin("head", "generation")(), {"text": TEXTS}),
    "classification": (classification, {"text": TEXTS, "label": ["neg", "pos", "meh", "neg"]}),
    "translation": (
        lambda: plugin("head", "translation", label_smoothing=0.1)(),
        {"source": TEXTS, "target": ["ein Schritt", "hallo du da", "noch ein Text", "x"]},
    ),
}


@pytest.fixture(params=[(name, variant) for name in CASES for variant in VARIANTS], ids=lambda p: "-".join(p))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Head, Backbone, list[dict[str, Any]], Tokenizer]]:
    name, variant = request.param
    make, rows = CASES[name]
    head, tokenizer = make(), byte_tokenizer()
    with torch.no_grad():
        yield head, network(head, variant), items(head, tokenizer, **rows), tokenizer


def test_loss_does_not_depend_on_batching_order_or_padding(
    case: tuple[Head, Backbone, list[dict[str, Any]], Tokenizer],
) -> None:
    head, net, rows, tokenizer = case
    whole = head.loss(net, head.collate(rows, tokenizer))
    for split in ([[r] for r in rows], [rows[2:], rows[:2]], [rows[::-1]]):
        parts = [head.loss(net, head.collate(part, tokenizer)) for part in split]
        assert sum(int(part.count) for part in parts) == int(whole.count)
        assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), rel=1e-9)


def test_generation_loss_is_the_plain_cross_entropy() -> None:
    head: Head = plugin("head", "generation")()
    net, tokenizer = network(head), byte_tokenizer()
    total, count = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor(tokenizer.encode(text))
            hidden = net.decode(ids[None], Sequence.dense(len(ids)))[0]
            for t in range(len(ids) - 1):
                total -= float((hidden[t] @ net.embedding.weight.T).log_softmax(-1)[ids[t + 1]])
                count += 1
        loss = head.loss(net, head.collate(items(head, tokenizer, text=TEXTS), tokenizer))
        metrics: dict[str, Any] = head.metrics("validation")
        batch = {**head.collate(items(head, tokenizer, text=TEXTS), tokenizer), "bytes": torch.tensor(40.0)}
        head.evaluate(net, batch, metrics, tokenizer)
    assert int(loss.count) == count and float(loss.total) == pytest.approx(total, rel=1e-9)
    assert float(metrics["perplexity"].compute()) == pytest.approx(math.exp(total / count), rel=1e-6)
    assert float(metrics["bits_per_byte"].compute()) == pytest.approx(total / math.log(2) / 40, rel=1e-6)


def test_classification_loss_and_metrics_are_the_plain_ones() -> None:
    head, tokenizer = classification(), byte_tokenizer()
    net = network(head)
    linear = head.get_submodule("classifier")
    assert isinstance(linear, torch.nn.Linear)
    labels = ["neg", "pos", "meh", "neg"]
    with torch.no_grad():
        rows = items(head, tokenizer, text=TEXTS, label=labels)
        scores = []
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            mean = net.encode(ids, Sequence.dense(ids.shape[1])).x_BSD[0].mean(0)
            scores.append(linear.weight @ mean + linear.bias)
        wanted = F.cross_entropy(torch.stack(scores), torch.tensor([1, 2, 0, 1]), reduction="sum")
        batch = head.collate(rows, tokenizer)
        assert float(head.loss(net, batch).total) == pytest.approx(float(wanted), rel=1e-6)
        metrics: dict[str, Any] = head.metrics("test")
        head.evaluate(net, batch, metrics, tokenizer)
        answers = head.predict(
            net, head.collate(items(head, tokenizer, text=TEXTS), tokenizer), tokenizer, DecodingOptions()
        )
    predicted = [answer["label"] for answer in answers]
    assert float(metrics["accuracy"].compute()) == pytest.approx(
        sum(a == b for a, b in zip(predicted, labels, strict=True)) / 4
    )
    f1 = []
    for name in ("meh", "neg", "pos"):
        hits = sum(p == name == t for p, t in zip(predicted, labels, strict=True))
        f1.append(2 * hits / max(1, predicted.count(name) + labels.count(name)))
    assert float(metrics["macro_f1"].compute()) == pytest.approx(sum(f1) / 3)
    assert metrics["confusion_matrix"].compute().sum() == 4
    for answer, row in zip(answers, scores, strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(row.softmax(-1).tolist(), rel=1e-6)
        assert answer["probability"] == max(answer["probabilities"].values())


def test_translation_loss_is_the_plain_smoothed_cross_entropy_and_bleu_is_sacrebleus() -> None:
    head: Head = plugin("head", "translation", label_smoothing=0.1)()
    head.decoding = DecodingOptions(temperature=0.0, num_beams=2, max_new_tokens=6)
    net, tokenizer = network(head), byte_tokenizer()
    targets = ["ein Schritt", "hallo du da", "noch ein Text", "x"]
    total = plain = 0.0
    count = 0
    with torch.no_grad():
        for source, target in zip(TEXTS, targets, strict=True):
            ids = torch.tensor([[*tokenizer.encode(source), tokenizer.eos_id]])
            wanted = torch.tensor([*tokenizer.encode(target), tokenizer.eos_id])
            given = torch.tensor([[tokenizer.bos_id, *wanted[:-1].tolist()]])
            memory = net.encode(ids, Sequence.dense(ids.shape[1]))
            hidden = net.decode(given, Sequence.dense(given.shape[1]), memory=memory)[0]
            scores = hidden @ net.embedding.weight.T
            total += float(F.cross_entropy(scores, wanted, reduction="sum", label_smoothing=0.1))
            plain += float(F.cross_entropy(scores, wanted, reduction="sum"))
            count += len(wanted)
        batch = head.collate(items(head, tokenizer, source=TEXTS, target=targets), tokenizer)
        loss = head.loss(net, batch)
        metrics: dict[str, Any] = head.metrics("test")
        head.evaluate(net, batch, metrics, tokenizer)
        answers = head.predict(net, batch, tokenizer, head.decoding)
    assert int(loss.count) == count and float(loss.total) == pytest.approx(total, rel=1e-9)
    assert float(metrics["loss"].compute()) == pytest.approx(plain / count, rel=1e-6)
    translations = [answer["text"] for answer in answers]
    assert float(metrics["bleu"].compute()) == pytest.approx(sacrebleu.corpus_bleu(translations, [targets]).score)
    assert float(metrics["chrf"].compute()) == pytest.approx(sacrebleu.corpus_chrf(translations, [targets]).score)


@pytest.mark.parametrize("name", ["classification", "translation", "summarization"])
def test_label_smoothing_is_not_in_the_validation_loss(name: str) -> None:
    """It is a setting of the training; every head that has it is listed here."""
    with_smoothing = [
        n for n in entries("head") if "label_smoothing" in signature(target_of(plugin("head", n))).parameters
    ]
    assert with_smoothing == ["classification", "summarization", "translation"]
    found = []
    for smoothing in (0.0, 0.3):
        head: Head = plugin("head", name, label_smoothing=smoothing)()
        if name == "classification":
            head.learn({"label": ["a", "b", "c"]})
        columns = dict.fromkeys((*head.inputs, *head.targets), TEXTS)
        torch.manual_seed(0)
        head.build(16, 262)
        head.double().eval()
        net, tokenizer = network(head), byte_tokenizer()
        rows = items(head, tokenizer, **(columns if name != "classification" else {**columns, "label": list("abca")}))
        batch = head.collate(rows, tokenizer)
        metrics: dict[str, Any] = head.metrics("validation")
        with torch.no_grad():
            head.evaluate(net, batch, metrics, tokenizer)
            found.append((float(metrics["loss"].compute()), float(head.loss(net, batch).total)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1] != pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize(
    ("target", "tokenize"),
    [
        ("我们在北京大学学习中文。", "zh"),
        ("私は東京で日本語を勉強しています。", "ja"),
        ("ผมเรียนภาษาไทยที่กรุงเทพ", "char"),
        ("저는 서울에서 한국어를 공부합니다.", "13a"),
        ("Ich lerne in München Deutsch.", "13a"),
        ("Он сказал: 你好", "13a"),
    ],
)
def test_bleu_goes_by_the_script_of_the_targets(target: str, tokenize: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A perfect translation gets 100, where 13a takes an unspaced sentence for a single word."""
    head: Head = plugin("head", "translation")()
    head.learn({"source": ["a"], "target": [target] * 3})
    again: Head = plugin("head", "translation")()
    again.set_info(head.info())
    metric: Any = again.metrics("test")["bleu"]
    metric.update([target], [target])
    assert float(metric.compute()) == pytest.approx(100)
    signature_of = metric.signature()
    assert f"tok:{tokenize}" in signature_of or (tokenize == "ja" and "tok:char" in signature_of)
    assert ("BLEU uses sacrebleu's tokenizer" in capsys.readouterr().err) == (tokenize != "13a")


def test_an_unknown_tokenizer_of_bleu_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="unknown bleu_tokenize '13b'. Did you mean '13a'"):
        plugin("head", "translation", bleu_tokenize="13b")()
    old: Head = plugin("head", "translation")()
    old.set_info({})  # of a checkpoint from before there was a choice
    assert old.info() == {} and "tok:13a" in old.metrics("test")["bleu"].signature()  # type: ignore[operator]


def test_the_reference_of_bleu_is_the_text_as_written() -> None:
    head: Head = plugin("head", "translation")()
    tokenizer = byte_tokenizer()
    texts = ["Ein  Mann, “zitiert” 我 ☃ " * 9]  # longer than the context: the ids are cut, the reference is not
    batch = head.collate(items(head, tokenizer, source=["a"], target=texts), tokenizer)
    assert batch["reference"] == texts
    assert batch["targets"].shape[1] == 48


def test_translations_of_one_length_are_batched_by_their_difference() -> None:
    head: Head = plugin("head", "translation")()
    tokenizer = byte_tokenizer()
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 24, 2000)
    others = np.clip(lengths + rng.integers(-4, 5, 2000), 1, None)
    rows = {"source": ["a" * n for n in lengths], "target": ["b" * n for n in others]}
    features = head.encode(rows, tokenizer, 48)
    assert features["skew"] == (lengths - others).tolist()
    examples = Examples(Features.of([features]), head, tokenizer, 32, 1000)
    padding = []
    for order in (examples.training_order(rng), [rng.permutation(2000)[i::40] for i in range(40)]):
        batches = [examples[rows] for rows in order]
        assert sum(len(batch["ids"]) for batch in batches) == 2000
        total = sum(batch["source"].numel() + batch["targets"].numel() for batch in batches)
        wasted = sum(int((b["source"] == 0).sum() + (b["targets"] == IGNORE).sum()) for b in batches)
        padding.append(wasted / total)
    assert padding[0] < 0.1 < 0.25 < padding[1]


def test_unknown_label_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown label 'ne'. Did you mean 'neg'\? .*not seen in training"):
        items(classification(), byte_tokenizer(), text=["a"], label=["ne"])


def test_one_label_is_refused() -> None:
    with pytest.raises(UserError, match="at least two labels"):
        plugin("head", "classification")().learn({"label": ["a", "a"]})


def test_empty_prompt_is_refused() -> None:
    head: Head = plugin("head", "generation")()
    with pytest.raises(UserError, match="no tokens"):
        head.collate(items(head, byte_tokenizer(), text=[""]), byte_tokenizer())


def test_info_round_trip() -> None:
    head = classification()
    other: Head = plugin("head", "classification")()
    other.set_info(head.info())
    assert other.info() == {"labels": ["meh", "neg", "pos"]}


def test_generation_continues_a_memorised_text() -> None:
    head: Head = plugin("head", "generation")()
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    net = network(head).float().train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(4)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    batch = head.collate(items(head, tokenizer, text=["the quick brown fox jumps"]), tokenizer)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(net, batch).total.backward()
        optimizer.step()
    prompt = head.collate(items(head, tokenizer, text=["the quick "]), tokenizer)
    for options in (
        DecodingOptions(max_new_tokens=15, temperature=0),
        DecodingOptions(max_new_tokens=15, num_beams=3),
        DecodingOptions(max_new_tokens=15, temperature=0.05, top_k=3, seed=7),
    ):
        answer = head.predict(net.eval(), prompt, tokenizer, options)[0]
        assert answer == {"prompt": "the quick ", "text": "brown fox jumps"}


def test_factories_name_their_class() -> None:
    assert target_of(plugin("head", "generation")).__name__ == "Generation"

"""Summarization: ROUGE against the rouge_score package and numbers worked out by hand, the loss against a plain one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from command import TINY, done
from torchmetrics.utilities import dim_zero_sum

from llmkit import DecodingOptions, UserError, plugin
from llmkit.contracts import IGNORE, Head, Tokenizer
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence
from llmkit_plugins.head.summarization import ROUGE

KINDS: tuple[Literal["1", "2", "L"], ...] = ("1", "2", "L")


def rouge(kind: Literal["1", "2", "L"], predictions: list[str], references: list[str]) -> float:
    metric = ROUGE(kind)
    metric.update(predictions, references)
    return float(metric.compute())


def english(seed: int) -> list[str]:
    """Return texts of a few words, in all kinds of writing, some of them empty or of one word."""
    rng = random.Random(seed)
    line = "The the CAT cat's sat, on-a mat. (mat) under_score 3.5 $20 U.S.A. #Person1# don 't --- dog"
    return [
        rng.choice([" ", "\n"]).join(rng.choices(line.split(), k=rng.choice([0, 1, 2, 5, 12, 30]))) for _ in range(60)
    ]


def scorer_of(kind: str) -> Any:
    """The scorer of rouge_score, whose import takes seconds: all of nltk and scipy.stats."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([f"rouge{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_equals_rouge_score_on_english(kind: Literal["1", "2", "L"]) -> None:
    scorer = scorer_of(kind)
    predictions, references = english(1), english(2)
    scores = [
        scorer.score(reference, prediction)[f"rouge{kind}"].fmeasure
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    assert sum(0 < score < 1 for score in scores) > 15
    assert rouge(kind, predictions, references) == pytest.approx(100 * sum(scores) / 60, abs=1e-9)
    for prediction, reference, score in zip(predictions, references, scores, strict=True):
        assert rouge(kind, [prediction], [reference]) == pytest.approx(100 * score, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_takes_the_best_of_several_references(kind: Literal["1", "2", "L"]) -> None:
    predictions, first, second = english(1), english(2), english(5)
    scorer = scorer_of(kind)
    scores = [
        scorer.score_multi([*pair], prediction)[f"rouge{kind}"].fmeasure
        for prediction, *pair in zip(predictions, first, second, strict=True)
    ]
    metric = ROUGE(kind)
    metric.update(predictions, [[*pair] for pair in zip(first, second, strict=True)])
    assert float(metric.compute()) == pytest.approx(100 * sum(scores) / 60, abs=1e-9)


def test_a_reference_in_each_line() -> None:
    """The first is trained on, and all are compared with."""
    tokenizer = plugin("tokenizer", "byte")()
    head: Any = plugin("head", "summarization", references="lines")()
    rows = {"document": ["d", "e"], "summary": ["ab\ncd\n\n", ""]}
    features = head.encode(rows, tokenizer, 16)
    assert [tokenizer.decode(ids) for ids in features["target"]] == ["ab", ""]
    batch = head.collate([{name: column[i] for name, column in features.items()} for i in range(2)], tokenizer)
    assert [head._listed(target) for target in batch["reference"]] == [["ab", "cd"], [""]]
    one: Any = plugin("head", "summarization")()
    assert one._listed("ab\ncd") == ["ab\ncd"]


def test_tokens_before_a_target_and_around_a_source() -> None:
    """The decoder reads all of them, has to predict none of them, and stays within the context."""
    tokenizer: Any = plugin("tokenizer", "byte")()
    tokenizer.around = ([tokenizer.sep_id], [], [tokenizer.mask_id, tokenizer.eos_id])
    head: Any = plugin("head", "summarization", start=["eos", "pad"])()
    features = head.encode({"document": ["d", "e" * 9], "summary": ["ab", "c" * 9]}, tokenizer, 6)
    batch = head.collate([{name: column[i] for name, column in features.items()} for i in range(2)], tokenizer)
    d, a, b, c, e = (tokenizer.encode(letter)[0] for letter in "dabce")
    sep, mask, eos, pad = tokenizer.sep_id, tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id
    assert batch["source"].tolist() == [[sep, d, mask, eos, pad, pad], [sep, e, e, e, mask, eos]]
    assert batch["ids"].tolist() == [[eos, pad, a, b, pad, pad], [eos, pad, c, c, c, c]]
    assert batch["targets"].tolist() == [[IGNORE, a, b, eos, IGNORE, IGNORE], [IGNORE, c, c, c, c, eos]]
    assert features["truncated"] == [0, 1] and features["length"] == [4, 6]
    for start, says in (([], "at least one token, got none"), (["boss"], "start: unknown token 'boss'. Did you mean")):
        with pytest.raises(UserError, match=says):
            plugin("head", "summarization", start=start)()


def test_rouge_takes_characters_of_chinese_and_japanese() -> None:
    # 我 吃 苹 果 of 我 喜 欢 吃 苹 果: 4 of 6 and 4 of 4; the pairs 吃苹 and 苹果 are 2 of 5 and of 3.
    assert rouge("1", ["我吃苹果。"], ["我喜欢吃苹果"]) == pytest.approx(100 * 8 / 10)
    assert rouge("2", ["我吃苹果。"], ["我喜欢吃苹果"]) == pytest.approx(100 * 4 / 8)
    assert rouge("L", ["果苹我吃"], ["我喜欢吃苹果"]) == pytest.approx(100 * 4 / 10)
    assert rouge("1", ["カレーを食べる"], ["カレーを食べた"]) == pytest.approx(100 * 12 / 14)
    # Latin words among them stay whole: GPT 模 型 and GPT2 模 型.
    assert rouge("1", ["GPT模型"], ["gpt2模型"]) == pytest.approx(100 * 4 / 6)
    # Letters beyond ASCII belong to their word.
    assert rouge("1", ["CAFÉ Straße"], ["café strasse"]) == pytest.approx(100 * 2 / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_of_processes_adds_up(kind: Literal["1", "2", "L"]) -> None:
    """The sums of two halves, as processes would add them, are the sums of the whole."""
    predictions, references = english(3), english(4)
    parts = [ROUGE(kind), ROUGE(kind)]
    parts[0].update(predictions[:7], references[:7])
    parts[1].update(predictions[7:30], references[7:30])
    parts[1].update(predictions[30:], references[30:])
    mean = 100 * sum(float(part.total) for part in parts) / sum(int(part.count) for part in parts)
    assert mean == pytest.approx(rouge(kind, predictions, references), abs=1e-9)
    assert set(parts[0]._reductions.values()) == {dim_zero_sum}


def test_loss_and_rouge_of_the_head() -> None:
    tokenizer: Tokenizer = plugin("tokenizer", "byte")()
    head: Head = plugin("head", "summarization", label_smoothing=0.1)()
    head.decoding = DecodingOptions(temperature=0.0, num_beams=2, max_new_tokens=6)
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=1,
        topology=head.topology,
        max_length=48,
        attention=plugin("attention", "multi_head"),
        cross_attention=plugin("attention", "multi_head"),
        position=plugin("position", "rotary"),
        feedforward=plugin("feedforward", "gelu"),
        norm=plugin("norm", "layer"),
    ).double()
    net.eval()
    documents, summaries = ["a long document", "another one, " * 9], ["a  “document”", "one"]
    features = head.encode({"document": documents, "summary": summaries}, tokenizer, 48)
    assert features["truncated"] == [0, 1] and features["length"] == [18, 48]
    items = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    batch = head.collate(items, tokenizer)
    total = 0.0
    with torch.no_grad():
        for document, summary in zip(documents, summaries, strict=True):
            ids = torch.tensor([[*tokenizer.encode(document)[:47], tokenizer.eos_id]])
            wanted = torch.tensor([*tokenizer.encode(summary), tokenizer.eos_id])
            memory = net.encode(ids, Sequence.dense(ids.shape[1]))
            given = torch.tensor([[tokenizer.bos_id, *wanted[:-1].tolist()]])
            scores = net.decode(given, Sequence.dense(len(wanted)), memory=memory)[0] @ net.embedding.weight.T
            total += float(F.cross_entropy(scores, wanted, reduction="sum", label_smoothing=0.1))
        loss = head.loss(net, batch)
        metrics: dict[str, Any] = head.metrics("test")
        head.evaluate(net, batch, metrics, tokenizer)
        answers = head.predict(net, batch, tokenizer, head.decoding)
    assert float(loss.total) == pytest.approx(total, rel=1e-9)
    assert set(metrics) == {"loss", "perplexity", "unknown_share", "rouge1", "rouge2", "rougeL"}
    assert set(head.metrics("validation")) == {"loss", "perplexity", "unknown_share"}
    assert answers[0]["document"] == documents[0] and head.show(answers[0]) == answers[0]["text"]
    written = [answer["text"] for answer in answers]
    for kind in KINDS:
        assert float(metrics[f"rouge{kind}"].compute()) == pytest.approx(rouge(kind, written, summaries))


def test_fit_test_and_infer(tmp_path: Path) -> None:
    rows = [{"text": f"word {i} of line {i * 7 % 13}", "short": f"line {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data.train", tmp_path / "rows.jsonl", "--data.test", tmp_path / "rows.jsonl")
    columns = ("--data.columns", "{document: text, summary: short}")
    result = done("fit", "--model.head", "summarization", *data, *columns, *TINY, "--output", tmp_path)
    assert "longer than model.context (16 tokens): the start of each" in result.err
    tested = done("test", "--ckpt_path", result.checkpoint, "--output", tmp_path / "t", "--trainer.accelerator", "cpu")
    assert all(name in tested.out for name in ("rouge1", "rouge2", "rougeL"))
    answer = json.loads(done("infer", result.checkpoint, "--json", "word 3 of line").out)
    assert answer["document"] == "word 3 of line" and isinstance(answer["text"], str)

"""Metrics against sacrebleu and against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sacrebleu
import torch
from torchmetrics import Metric

from llmkit.contracts import Loss
from llmkit.ops.metrics import BLEU, BitsPerByte, ChrF, Mean, MeanLoss, Perplexity

HYPOTHESES = ["the cat sat on the mat .", "a dog runs", "nothing fits", "我喜歡吃蘋果。"]
REFERENCES = ["the cat sat on a mat.", "A dog runs through the park.", "x y z", "我喜欢吃苹果。"]


def loss(total: float, count: int) -> Loss:
    return Loss(torch.tensor(total), torch.tensor(count))


def test_perplexity_by_hand() -> None:
    # Tokens with probabilities 1/2, 1/4 and 1/8: mean of 1, 2, 3 bits is 2 bits, so the perplexity is 4.
    metric, mean = Perplexity(), MeanLoss()
    for part in (loss(math.log(2) + math.log(4), 2), loss(math.log(8), 1)):
        metric.update(part)
        mean.update(part)
    assert metric.compute().item() == pytest.approx(4.0)
    assert mean.compute().item() == pytest.approx(2 * math.log(2))


def test_bits_per_byte_by_hand() -> None:
    # 6 bits for 3 tokens that stand for 12 bytes.
    metric = BitsPerByte()
    metric.update(loss(6 * math.log(2), 3), torch.tensor(12.0))
    assert metric.compute().item() == pytest.approx(0.5)
    # An unknown token of 4 bytes, 8 bits each, takes 2 bits to be called unknown.
    metric.update(loss(2 * math.log(2), 1), torch.tensor(4.0), 4.0)
    assert metric.compute().item() == pytest.approx((6 + 2 + 32) / 16)


def test_weighted_by_token_not_by_batch() -> None:
    metric = MeanLoss()
    metric.update(loss(10.0, 10))
    metric.update(loss(30.0, 1))
    assert metric.compute().item() == pytest.approx(40 / 11)


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char"])
def test_bleu_equals_sacrebleu(tokenize: str) -> None:
    metric = BLEU(tokenize)
    metric.update(HYPOTHESES[:1], REFERENCES[:1])
    metric.update(HYPOTHESES[1:], REFERENCES[1:])
    wanted = sacrebleu.BLEU(tokenize=tokenize)
    assert metric.compute().item() == pytest.approx(wanted.corpus_score(HYPOTHESES, [REFERENCES]).score, abs=1e-9)
    assert metric.signature() == str(wanted.get_signature())


def test_chrf_equals_sacrebleu() -> None:
    metric = ChrF()
    metric.update(HYPOTHESES[:2], REFERENCES[:2])
    metric.update(HYPOTHESES[2:], REFERENCES[2:])
    wanted = sacrebleu.CHRF()
    assert metric.compute().item() == pytest.approx(wanted.corpus_score(HYPOTHESES, [REFERENCES]).score, abs=1e-9)
    assert metric.signature() == str(wanted.get_signature())


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 3, 2)])
def test_several_references_equal_sacrebleu(counts: tuple[int, ...]) -> None:
    several = [(REFERENCES[i:] + REFERENCES[:i])[:count] for i, count in enumerate(counts)]
    streams: Any = [[row[i] if i < len(row) else None for row in several] for i in range(max(counts))]
    for metric, wanted in ((BLEU(), sacrebleu.BLEU()), (ChrF(), sacrebleu.CHRF())):
        for text, references in zip(HYPOTHESES, several, strict=False):
            metric.update([text], [references])
        texts = HYPOTHESES[: len(several)]
        assert metric.compute().item() == pytest.approx(wanted.corpus_score(texts, streams).score, abs=1e-9)
        assert metric.signature() == str(wanted.get_signature())


def test_a_sum_over_a_count_is_the_same_in_any_batches() -> None:
    """Kept in double precision: in single precision the small values would be lost."""
    values = [1e8, 1.0, 1.0, 0.25]
    metric = Mean()
    for value in values:
        metric.update(value, 1)
    halves = [Mean(), Mean()]
    halves[0].update(values[0], 1)
    halves[1].update(sum(values[1:]), 3)
    assert float(metric.compute()) == sum(values) / 4 == float(sum(half.total for half in halves)) / 4


@pytest.mark.parametrize("kind", [MeanLoss, Perplexity, BitsPerByte])
def test_a_lower_loss_is_better(kind: type[Metric]) -> None:
    assert kind.higher_is_better is False

"""The completion head: the loss of completions alone, against plain computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmkit import DecodingOptions, LanguageModel, plugin
from llmkit.contracts import IGNORE
from llmkit.model.use import batch_of
from llmkit.sequence import Sequence

ROWS = [
    {"prompt": "ask: ", "completion": "answer"},
    {"prompt": "a longer question? ", "completion": "y"},
    {"prompt": "", "completion": "ab"},
    {"prompt": "0123456789" * 5, "completion": "the end"},
    {"prompt": "q", "completion": "0123456789" * 5},
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(head=plugin("head", "completion"), dim=16, num_layers=1, context=32)
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    return model.eval()


def batch(model: LanguageModel, rows: list[dict[str, str]]) -> dict[str, Any]:
    assert model.tokenizer is not None
    return batch_of(model.head, model.tokenizer, 32, rows, ("prompt", "completion"))


def test_what_is_read_and_what_is_predicted(model: LanguageModel) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found = batch(model, ROWS)
    ids, targets = found["ids"], found["targets"]
    assert ids.shape == targets.shape and ids.shape[1] == 32
    for row, (read, predicted) in zip(ROWS, zip(ids, targets, strict=True), strict=True):
        answer = [*tokenizer.encode(row["completion"]), tokenizer.eos_id][:32]
        assert predicted[predicted != IGNORE].tolist() == answer
        first = int((predicted != IGNORE).int().argmax())
        prompt = tokenizer.encode(row["prompt"]) or [tokenizer.bos_id]
        assert read[: first + 1].tolist() == prompt[-(first + 1) :]  # its end, where it does not fit
        assert read[first + 1 : first + len(answer)].tolist() == answer[:-1]
    assert model.head.encode({key: [row[key] for row in ROWS] for key in ROWS[0]}, tokenizer, 32)["truncated"] == [
        *(0, 0, 0, 1, 1)
    ]


@torch.no_grad()
def test_the_loss_is_that_of_the_completions(model: LanguageModel) -> None:
    """Computed row by row from the log probabilities of each token of the completion given all before it."""
    net, tokenizer = model.network, model.tokenizer
    assert tokenizer is not None
    totals = []
    for row in ROWS[:3]:
        prompt = tokenizer.encode(row["prompt"]) or [tokenizer.bos_id]
        answer = [*tokenizer.encode(row["completion"]), tokenizer.eos_id]
        ids = torch.tensor([[*prompt, *answer]])
        logits = F.linear(net.decode(ids, Sequence.of(ids))[0], net.output_weight_VD).log_softmax(-1)
        totals.append(-sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
    loss = model.head.loss(net, batch(model, ROWS[:3]))
    assert float(loss.total) == pytest.approx(sum(totals), rel=1e-5)
    assert int(loss.count) == sum(len(tokenizer.encode(row["completion"])) + 1 for row in ROWS[:3])
    scores = [answer["log_probability"] for answer in model.score(ROWS[:3])]
    assert scores == pytest.approx([-total for total in totals], rel=1e-5)


def test_it_writes_after_the_prompt(model: LanguageModel) -> None:
    """The same from the prompt alone and from a row whose completion is known."""
    options = DecodingOptions(max_new_tokens=6, temperature=0.0)
    alone = model.predict([{"prompt": row["prompt"]} for row in ROWS[:2]], options)
    assert model.tokenizer is not None
    known = model.head.predict(model.network, batch(model, ROWS[:2]), model.tokenizer, options)
    assert alone == known and [answer["prompt"] for answer in alone] == [row["prompt"] for row in ROWS[:2]]


def test_it_learns_to_answer_and_to_stop() -> None:
    """After a short training it writes each completion, and nothing after it."""
    torch.manual_seed(0)
    model = LanguageModel(head=plugin("head", "completion"), dim=32, num_layers=2, context=32)
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    optimizer, rows = torch.optim.AdamW(model.parameters(), 3e-3), batch(model, ROWS[:2])
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.head.loss(model.network, rows)
        (loss.total / loss.count).backward()
        optimizer.step()
    answers = model.eval().predict([{"prompt": row["prompt"]} for row in ROWS[:2]])
    assert [answer["text"] for answer in answers] == ["answer", "y"]

"""The masked language model against plain loops: what is hidden, the loss, the metrics, the guesses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, done, llmkit
from torch import Tensor

from llmkit import DecodingOptions, LanguageModel, UserError, load, plugin
from llmkit.contracts import Batch, Tokenizer
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence
from llmkit_plugins.head.masked_lm import MaskedLM, encode_masked, fixed_draws
from llmkit_plugins.tokenizer import BPE, Byte, Char, Unigram, Word, WordPiece

TEXTS = ["a small step for one man", "hello", "one more text here, longer than the others", "xyz xyz xyz"]
STORY = "the quick brown fox jumps over the lazy dog"


def built(tokenizer: Tokenizer, mask_rate: float = 0.15, dim: int = 16, context: int = 64) -> tuple[MaskedLM, Backbone]:
    """Return a head that knows a tokenizer, and a network with distinct outputs, both in double precision."""
    torch.manual_seed(0)
    head = MaskedLM(mask_rate)
    net = Backbone(
        vocab_size=tokenizer.vocab_size,
        dim=dim,
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
    head.set_tokenizer(tokenizer)
    head.build(dim, tokenizer.vocab_size)
    return head.eval(), net.eval()


def batch_of(head: MaskedLM, tokenizer: Tokenizer, texts: list[str]) -> Batch:
    ids = head.encode({"text": texts}, tokenizer, 64)["ids"]
    return head.collate([{"ids": row} for row in ids], tokenizer)


def shares(ids: Tensor, given: Tensor, chosen: Tensor, mask_id: int) -> tuple[float, float, float, float]:
    """Return the share of chosen tokens, and of these the shares that are masked, another token, and the same."""
    count = int(chosen.sum())
    masked, same = int((given[chosen] == mask_id).sum()), int((given == ids)[chosen].sum())
    return count / chosen.numel(), masked / count, (count - masked - same) / count, same / count


@pytest.mark.parametrize("fixed", [False, True])
def test_shares_of_what_becomes_of_the_tokens(fixed: bool) -> None:
    head, _ = built(Byte())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 262, (1000, 200), generator=generator)
    draws = fixed_draws(ids, Sequence.of(ids)) if fixed else torch.rand((3, *ids.shape), generator=generator)
    given, chosen = head.hide(ids, draws)
    assert torch.equal(given[~chosen], ids[~chosen])
    # Standard deviations are 0.0008 and, of 30,000 chosen tokens, 0.0023 and less.
    assert shares(ids, given, chosen, Byte.mask_id) == pytest.approx((0.15, 0.8, 0.1, 0.1), abs=0.009)
    # By place and by token the share is the same: 1,000 draws a place, about 780 a token.
    assert (chosen.double().mean(0) - 0.15).abs().max() < 0.06
    by_token = torch.stack([chosen[ids == token].double().mean() for token in range(6, 262)])
    assert (by_token - 0.15).abs().max() < 0.07
    others = given[chosen & (given != Byte.mask_id) & (given != ids)]
    assert int(others.min()) == 6 and int(others.max()) == 261
    assert abs(float(others.double().mean()) - 133.5) < 6  # uniform: a standard deviation of 1.4


def test_fixed_draws_are_uniform_and_unrelated() -> None:
    """Short rows of few different tokens, many of which repeat each other: real text is like that."""
    ids = torch.randint(6, 16, (4000, 12), generator=torch.Generator().manual_seed(2))
    draws = fixed_draws(ids, Sequence.of(ids)).double().flatten(1)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    histogram = torch.stack([torch.histc(row, 20, 0, 1) for row in draws]) / draws.shape[1]
    assert (histogram - 0.05).abs().max() < 0.005
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.02
    neighbours = fixed_draws(ids, Sequence.of(ids)).double()[0]
    pairs = torch.corrcoef(torch.stack([neighbours[:, :-1].flatten(), neighbours[:, 1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 0.02


def test_special_tokens_are_never_chosen() -> None:
    head, _ = built(Byte(), mask_rate=1.0)
    ids = torch.arange(262).repeat(4, 1)
    given, chosen = head.hide(ids, torch.rand(3, 4, 262))
    assert not chosen[:, :6].any() and chosen[:, 6:].all()
    assert torch.equal(given[:, :6], ids[:, :6])


def plain_loss(head: MaskedLM, net: Backbone, ids: Tensor) -> tuple[float, int, int]:
    """Return the summed loss of one unpadded row, the number of chosen tokens and how many are guessed right."""
    seq = Sequence.dense(ids.shape[1])
    given, chosen = head.hide(ids, fixed_draws(ids, seq))
    states = net.encode(given, seq).x_BSD[0]
    total, count, hits = 0.0, 0, 0
    for place, token in enumerate(ids[0].tolist()):
        if not chosen[0, place]:
            continue
        scores = [float(states[place] @ row) for row in net.embedding.weight]
        top = max(scores)
        total += top + math.log(sum(math.exp(score - top) for score in scores)) - scores[token]
        hits += scores[token] == top
        count += 1
    return total, count, hits


@torch.no_grad()
def test_loss_and_metrics_are_those_of_a_plain_loop() -> None:
    tokenizer = Byte()
    head, net = built(tokenizer, mask_rate=0.4)
    rows = [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    parts = [plain_loss(head, net, row) for row in rows]
    total, count, hits = (sum(part[i] for part in parts) for i in range(3))
    batch = batch_of(head, tokenizer, TEXTS)
    assert "segments" in batch
    loss = head.loss(net, batch)
    assert int(loss.count) == count > 20
    assert float(loss.total) == pytest.approx(total, rel=1e-9)
    metrics: dict[str, Any] = head.metrics("validation")
    head.evaluate(net, batch, metrics, tokenizer)
    assert float(metrics["loss"].compute()) == pytest.approx(total / count, rel=1e-6)
    assert float(metrics["perplexity"].compute()) == pytest.approx(math.exp(total / count), rel=1e-6)
    assert float(metrics["accuracy"].compute()) == pytest.approx(hits / count, rel=1e-6)


@torch.no_grad()
def test_evaluation_does_not_depend_on_batching_order_padding_or_packing() -> None:
    tokenizer = Byte()
    head, net = built(tokenizer, mask_rate=0.4)
    rows = [tokenizer.encode(text) for text in TEXTS]
    alone = [head.loss(net, head.collate([{"ids": row}], tokenizer)) for row in rows]
    count, total = sum(int(loss.count) for loss in alone), sum(float(loss.total) for loss in alone)
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        whole = head.loss(net, head.collate([{"ids": rows[i]} for i in order], tokenizer))
        assert int(whole.count) == count
        assert float(whole.total) == pytest.approx(total, rel=1e-9)
        ids = torch.tensor([[token for i in order for token in rows[i]] + [tokenizer.pad_id] * 3])
        segments = torch.tensor([[n for n, i in enumerate(order, 1) for _ in rows[i]] + [0] * 3])
        packed = head.loss(net, {"ids": ids, "segments": segments})
        assert int(packed.count) == count
        assert float(packed.total) == pytest.approx(total, rel=1e-9)


@torch.no_grad()
def test_the_padded_end_of_a_last_block_is_not_read() -> None:
    tokenizer = Byte()
    head, net = built(tokenizer, mask_rate=0.4)
    ids = torch.tensor([tokenizer.encode(TEXTS[2])])
    loss, padded = (head.loss(net, {"ids": torch.nn.functional.pad(ids, (0, n))}) for n in (0, 7))
    assert tokenizer.pad_id == 0
    assert int(padded.count) == int(loss.count)
    assert float(padded.total) == pytest.approx(float(loss.total), rel=1e-9)


def test_training_hides_other_tokens_each_time() -> None:
    head, net = built(Byte(), mask_rate=0.4)
    batch = batch_of(head, Byte(), TEXTS)
    with torch.no_grad():
        assert float(head.loss(net, batch).total) == float(head.loss(net, batch).total)
        head.train()
        torch.manual_seed(5)
        first, second = head.loss(net, batch), head.loss(net, batch)
        assert float(first.total) != float(second.total)
        torch.manual_seed(5)
        assert float(head.loss(net, batch).total) == float(first.total)


def test_a_batch_in_which_nothing_is_chosen() -> None:
    head, net = built(Byte())
    loss = head.train().loss(net, {"ids": torch.full((2, 5), Byte.unk_id)})
    loss.total.backward()
    assert (int(loss.count), float(loss.total.detach())) == (0, 0.0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters() if p.grad is not None)


def test_mask_rate_is_checked() -> None:
    with pytest.raises(UserError, match="mask_rate must be above 0 and at most 1, got 0"):
        MaskedLM(0.0)


# Texts with [MASK]


@pytest.mark.parametrize(
    "tokenizer", [Word(2000), BPE(1000), WordPiece(1000), Unigram(1000)], ids=lambda tokenizer: type(tokenizer).__name__
)
def test_a_mask_stands_for_a_word(tokenizer: Tokenizer, root: Path) -> None:
    """Filled with a word's token, the ids are those of the text with the word."""
    tokenizer.train(iter((root / "README.md").read_text(encoding="utf-8").splitlines()))
    token = tokenizer.encode("a model")[1]
    for text in ("a [MASK] the", "a [MASK]", "the [MASK] a [MASK]", "the [MASK] [MASK] the a"):
        (row,) = encode_masked([text], tokenizer)
        assert row.count(tokenizer.mask_id) == text.count("[MASK]")
        filled = [token if number == tokenizer.mask_id else number for number in row]
        assert filled == tokenizer.encode(text.replace("[MASK]", "model"))
    # The first word of a text may have another token than the same word later on.
    assert encode_masked(["[MASK] a"], tokenizer) == [[tokenizer.mask_id, tokenizer.encode("model a")[-1]]]


@pytest.mark.parametrize("tokenizer", [Char(), Byte()], ids=lambda tokenizer: type(tokenizer).__name__)
@pytest.mark.parametrize("text", ["the [MASK]ox", "[MASK]he fox", "the[MASK]fox", "the fo[MASK]"])
def test_a_mask_stands_for_a_character(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.train(iter([STORY]))
    left, _, right = text.partition("[MASK]")
    assert encode_masked([text], tokenizer) == [[*tokenizer.encode(left), tokenizer.mask_id, *tokenizer.encode(right)]]


def test_several_masks_and_texts_without_any() -> None:
    tokenizer = Char()
    tokenizer.train(iter(["我爱你 abc"]))
    mask = tokenizer.mask_id
    a, b = tokenizer.encode("我你")
    assert encode_masked(["我[MASK]你", "[MASK][MASK]", "我", ""], tokenizer) == [[a, mask, b], [mask, mask], [a], []]
    assert encode_masked(["我", "我你"], tokenizer) == [[a], [a, b]]


def test_a_memorised_text_is_filled_in() -> None:
    story = "every good old fox runs far"
    tokenizer = Word(100)
    tokenizer.train(iter([story]))
    head, net = built(tokenizer, mask_rate=0.3, dim=32)
    net.float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(4)
    batch = batch_of(head, tokenizer, [story] * 4 + ["every good old fox"] * 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    head.train()
    for _ in range(100):
        optimizer.zero_grad()
        head.loss(net, batch).total.backward()
        optimizer.step()
    head.eval()
    asked = batch_of(head, tokenizer, ["every good [MASK] fox [MASK] far", "every good old [MASK]"])
    with torch.no_grad():
        answers = head.predict(net, asked, tokenizer, DecodingOptions(top_k=3))
        sample = head.sample(net, batch, tokenizer)
    assert [answer["text"] for answer in answers] == [story, "every good old fox"]
    best = [[guesses[0]["token"] for guesses in answer["masks"]] for answer in answers]
    assert best == [["old", "runs"], ["fox"]]
    for guesses in [*answers[0]["masks"], *answers[1]["masks"]]:
        values = [guess["probability"] for guess in guesses]
        assert len(values) == 3 and values == sorted(values, reverse=True) and sum(values) <= 1 + 1e-6
    first, second, third = head.show(answers[0]).splitlines()
    assert first == story and second.startswith("  'old' 0.") and third.startswith("  'runs' 0.")
    assert sample == f"{story}\n  -> {story}"


@torch.no_grad()
def test_special_tokens_are_never_guessed() -> None:
    head, net = built(Byte())
    net.embedding.weight[:6] *= 100
    asked = batch_of(head, Byte(), ["a [MASK] c", "[MASK] d"])
    answers = head.predict(net, asked, Byte(), DecodingOptions(top_k=1000))
    assert [len(answer["masks"][0]) for answer in answers] == [256, 256]
    assert sum(guess["probability"] for guess in answers[0]["masks"][0]) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_text_without_a_mask_is_refused() -> None:
    head, net = built(Byte(), context=16)
    for text in ("plain text", "more letters than fit [MASK]"):
        with pytest.raises(UserError, match=r"no \[MASK\] in the text \(its first 16 tokens\)") as error:
            head.predict(net, batch_of(head, Byte(), ["a [MASK]", text]), Byte(), head.decoding)
        assert text[:16] in str(error.value)


# From the command line


@pytest.mark.parametrize(
    "words",
    [(), ("--data.pack", "true", "--data.documents", "line", "--data.tokenizer", "bpe")],
    ids=["blocks", "pack"],
)
def test_fit_and_infer(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    data = ("--data.train", tmp_path / "text.txt", "--data.test", tmp_path / "text.txt", "--output", tmp_path)
    result = done("fit", "--model.head", "masked_lm", *data, *TINY, *words)
    assert "Sample:" in result.out
    tested = done("test", "--ckpt_path", result.checkpoint, "--output", tmp_path / "t", "--trainer.accelerator", "cpu")
    assert all(name in tested.out for name in ("loss", "perplexity", "accuracy"))
    answer = json.loads(done("infer", result.checkpoint, "--json", "word [MASK] of", "--top_k", "2").out)
    assert answer["text"].startswith("word") and [len(guesses) for guesses in answer["masks"]] == [2]
    refused = llmkit("infer", result.checkpoint, "word 3")
    assert refused.code == 2 and "no [MASK] in the text" in refused.err
    model: LanguageModel = load(result.checkpoint)
    assert not any(name.startswith("head.") for name in model.state_dict())
    assert model.predict(["a [MASK]"])[0]["masks"][0][0].keys() == {"token", "probability"}

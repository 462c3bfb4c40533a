"""Models of Hugging Face as a starting point, against transformers' own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CLASSIFIERS, DECODERS, ENCODERS, ROWS, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import llmkit
from llmkit import LanguageModel
from llmkit.contracts import Network
from llmkit.ops.decoding import Decoder
from llmkit.sequence import Sequence
from llmkit_plugins.head.masked_lm import MaskedLM


def padded_ids(pad: int) -> tuple[Tensor, Tensor]:
    """Ids, (3, 20), and where they are real."""
    generator = torch.Generator().manual_seed(3)
    ids, real = torch.randint(5, ROWS, (3, 20), generator=generator), torch.ones(3, 20, dtype=torch.long)
    real[1, 15:], real[2, 7:] = 0, 0
    return torch.where(real > 0, ids, pad), real


def scores(net: Network, hidden: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden, net.output_weight_VD, net.output_bias_V)


def assert_equal(actual: Tensor, expected: Tensor, real: Tensor) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual[real > 0], expected[real > 0], rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("case", DECODERS)
@torch.no_grad()
def test_decoders_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, *DECODERS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    ids, real = padded_ids(0)
    expected = theirs(input_ids=ids, attention_mask=real).logits
    net = ours.network
    assert_equal(scores(net, net.decode(ids, Sequence.of(ids, real))), expected, real)

    # Greedy decoding with the cache. By the decoder, because the head never writes special tokens.
    assert ours.tokenizer is not None
    ids = torch.tensor([[*ours.tokenizer.around[0], *ours.tokenizer.encode("abc de fgh")]])
    assert ids[0, 0] == (5 if case.startswith("gpt2") else 1)
    written = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    decoder, fed = Decoder(net, 1, 40), ids
    for token in written[0, ids.shape[1] :]:
        fed = decoder.feed(fed).argmax(-1, keepdim=True)
        assert fed[0, 0] == token


@pytest.mark.parametrize("case", ENCODERS)
@torch.no_grad()
def test_masked_language_models_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, *ENCODERS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    assert isinstance(ours.head, MaskedLM)
    ids, real = padded_ids(theirs.config.pad_token_id)
    expected = theirs(input_ids=ids, attention_mask=real).logits
    hidden = ours.head.dense(ours.network.encode(ids, Sequence.of(ids, real)).x_BSD)
    assert_equal(scores(ours.network, hidden), expected, real)


@pytest.mark.parametrize("case", CLASSIFIERS)
@torch.no_grad()
def test_classifiers_equal_transformers(case: str, tmp_path: Path) -> None:
    """The ids come from transformers' own reading of the tokenizer, with what its post-processor puts around."""
    theirs = save(tmp_path, *CLASSIFIERS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    texts = ["abc de", "f", "ghij klm no pq rst uvw xyz abc def ghi jkl mno"]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))  # type: ignore[no-untyped-call]
    for text, answer in zip(texts, ours.predict(texts), strict=True):
        read = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        expected = theirs(input_ids=read["input_ids"][:, read["attention_mask"][0] > 0]).logits.softmax(-1)[0]
        assert list(answer["probabilities"]) == ["bad", "fair", "good"]
        torch.testing.assert_close(torch.tensor([*answer["probabilities"].values()]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pair_of_texts_equals_transformers(tmp_path: Path) -> None:
    """Ids and token types of a pair, cut from the longer one."""
    theirs = save(tmp_path, *CLASSIFIERS["bert"])
    head = {"name": "classification", "pool": "pooler", "pair": True}
    ours = LanguageModel.published(f"hf:{tmp_path}", head)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))  # type: ignore[no-untyped-call]
    for one, other in [("abc", "de fgh"), ("abc " * 9, "de " * 8), ("abc", "de fg " * 12), ("abcde " * 8, "f")]:
        read = tokenizer(one, other, truncation=True, max_length=32, return_tensors="pt", return_token_type_ids=True)
        real = read["attention_mask"][0] > 0
        expected = theirs(**{name: value[:, real] for name, value in read.items()}).logits.softmax(-1)[0]
        (answer,) = ours.predict([{"text": one, "text_pair": other}])
        torch.testing.assert_close(torch.tensor([*answer["probabilities"].values()]), expected, rtol=0, atol=1e-5)

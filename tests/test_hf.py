"""Models of Hugging Face in and out, against transformers' own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CLASSIFIERS, DECODERS, ENCODERS, ROWS, save, write_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llmkit
from llmkit import LanguageModel, plugin, registry
from llmkit.checkpoint.content import section
from llmkit.contracts import Network
from llmkit.hf.export import _write_tokenizer as write_exported
from llmkit.hf.export import export
from llmkit.ops.decoding import Decoder
from llmkit.sequence import DecodingOptions, Sequence
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


def exported(model: LanguageModel, folder: Path, loader: str) -> Any:
    """A model written and loaded by transformers, which misses no weight and finds none that it does not know."""
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {})
    export(folder, part, model.state_dict(), model.tokenizer, "card")
    found, info = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return found.eval()


@pytest.mark.parametrize("case", DECODERS)
@torch.no_grad()
def test_decoders_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, *DECODERS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    ids, real = padded_ids(0)
    expected = theirs(input_ids=ids, attention_mask=real).logits
    net = ours.network
    assert_equal(scores(net, net.decode(ids, Sequence.of(ids, real))), expected, real)

    again = exported(ours, tmp_path / "exported", "AutoModelForCausalLM")
    assert_equal(again(input_ids=ids, attention_mask=real).logits, expected, real)

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
    named = LanguageModel.published(f"hf:{tmp_path}", {"name": "masked_lm", "mask_rate": 0.2})
    given = named.spec["head"]["init_args"]
    assert given.pop("mask_rate") == 0.2 and given == ours.spec["head"]["init_args"] and given["transform"]
    again = exported(ours, tmp_path / "exported", "AutoModelForMaskedLM")
    assert_equal(again(input_ids=ids, attention_mask=real).logits, expected, real)


@pytest.mark.parametrize("case", CLASSIFIERS)
@torch.no_grad()
def test_classifiers_equal_transformers(case: str, tmp_path: Path) -> None:
    """The ids come from transformers' own reading of the tokenizer, with what its post-processor puts around."""
    theirs = save(tmp_path, *CLASSIFIERS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    texts = ["abc de", "f", "ghij klm no pq rst uvw xyz abc def ghi jkl mno"]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))  # type: ignore[no-untyped-call]
    again = exported(ours, tmp_path / "exported", "AutoModelForSequenceClassification")
    assert again.config.id2label == theirs.config.id2label
    own: Any = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text, answer in zip(texts, ours.predict(texts), strict=True):
        read = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        expected = theirs(input_ids=read["input_ids"][:, read["attention_mask"][0] > 0]).logits.softmax(-1)[0]
        again_read = own(text, truncation=True, max_length=32, return_tensors="pt")
        torch.testing.assert_close(again(**again_read).logits.softmax(-1)[0], expected, rtol=0, atol=1e-5)
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


OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"feedforward": "swiglu"},  # the defaults but for the feedforward
    "llama": {
        **{"feedforward": {"name": "gelu", "gated": True, "bias": True}, "tie_embeddings": False},
        **{"attention": {"name": "grouped_query", "num_heads": 4, "num_kv_heads": 1, "qk_norm": False}},
    },
    "mistral": {"attention": {"name": "sliding_window", "qk_norm": False, "window": 4}, "feedforward": "swiglu"},
    "gpt2": {
        **{"feedforward": {"name": "squared_relu", "bias": True}, "position": "learned", "norm": "layer"},
        **{"attention": {"name": "multi_head", "qk_norm": False, "bias": True}},
    },
}


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_models_of_ours_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Logits of a left-padded batch, and text that is generated with the cache, from the saved tokenizer."""
    model = LanguageModel(head=plugin("head", "generation"), dim=24, num_layers=2, context=48, **OWN[kind])
    model.tokenizer = plugin("tokenizer", "bpe", vocab_size=300)()
    model.tokenizer.train(iter(["a text to learn from, and another one " * 9]))
    model.configure_model()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs = exported(model, tmp_path / "out", "AutoModelForCausalLM")
    assert theirs.config.model_type == kind
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.padding_side = "left"
    texts = ["a text", "another text to learn from"]
    read = tokenizer(texts, return_tensors="pt", padding=True)
    real = read["attention_mask"]
    own = model.network.decode(read["input_ids"], Sequence.of(read["input_ids"], real))
    got = theirs(input_ids=read["input_ids"], attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0))
    assert_equal(got.logits, scores(model.network, own), real)
    written = theirs.generate(**read, max_new_tokens=9, do_sample=False)[:, read["input_ids"].shape[1] :]
    answers = model.predict(texts, DecodingOptions(max_new_tokens=9, temperature=0.0))
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    # The bytes of an incomplete character at the end are left out here.
    assert [answer["text"].rstrip("\ufffd") for answer in answers] == [text.rstrip("\ufffd") for text in texts]


TEXTS = [
    *(
        "Hello  world\n\tnext line",
        " leading and trailing ",
        "emoji \U0001f600, Umlaute \u00e4\u00f6\u00fc, \u4e2d\u6587 \u5b57",
        "a",
    ),
    *(
        "a <unk> b [UNK] <pad> </s> <|endoftext|> <mask>",
        "it ' s ( odd ) , isn ' t it ?",
        "x" * 120,
        "\u0000\uffff \u2581",
    ),
]


@pytest.mark.parametrize("name", registry.entries("tokenizer"))
def test_tokenizers_give_the_same_ids_and_texts(name: str, tmp_path: Path) -> None:
    if name == "pretrained":
        write_tokenizer(tmp_path, "bert")
        published = plugin("tokenizer", name, path=str(tmp_path), as_published=True)
        again = plugin("tokenizer", name, path="gone")()
        again.from_state(published().to_state())
        assert published().around == again.around == ([1], [2], [2])
        assert plugin("tokenizer", name, path=str(tmp_path))().around == ([], [], [])
    sizes = {"bpe": 300, "unigram": 120, "wordpiece": 160, "word": 20, "char": 40}
    given: dict[str, Any] = {"vocab_size": sizes[name]} if name in sizes else {}
    given |= {"path": str(tmp_path)} if name == "pretrained" else {}
    ours = plugin("tokenizer", name, **given)()
    ours.train(iter(TEXTS * 2))
    folder = tmp_path / "out"
    folder.mkdir()
    write_exported(folder, ours, ours.published(), 64)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    for role in ("pad", "bos", "eos", "unk", "mask", "sep"):
        assert getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_id"), role

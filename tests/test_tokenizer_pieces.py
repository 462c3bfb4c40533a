"""Byte-level BPE that remembers pieces of text, against ``tokenizers`` alone on the same text."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from llmkit.data import cache
from llmkit_plugins.tokenizer import BPE, Pretrained, pieces
from llmkit_plugins.tokenizer.base import HuggingFace
from llmkit_plugins.tokenizer.pieces import SPACES, Encoder

WORDS = [
    "the",
    "It's",
    "we'll",
    "'",
    "''",
    "x",
    "né",
    "我爱",
    "42",
    "…",
    "🦊",
    "\0",
    "\x1c",
    "\u200b",
    "\ufeff",
    "<pad>",
]
TEXT = st.lists(st.sampled_from([*WORDS, *SPACES, " ", " ", "\n"]) | st.text(max_size=3), max_size=40).map("".join)


@pytest.fixture(scope="module")
def bpe() -> BPE:
    tokenizer = BPE(400)
    tokenizer.train(iter(["the theme of these\n\n  three  poems: it's what we'll see, né? 我爱我爱 42 4242\t\t…"] * 3))
    return tokenizer


@pytest.fixture(scope="module")
def gpt2(data_folder: Callable[[str], Path]) -> Pretrained:
    return Pretrained(str(data_folder("gpt2_bpe")))


def alone(tokenizer: HuggingFace, texts: list[str]) -> list[list[int]]:
    """The ids by ``tokenizers`` alone, each text as a whole."""
    hf = tokenizer._ready()
    hf.encode_special_tokens = True
    return [hf.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_equals_tokenizers_alone(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: HuggingFace = request.getfixturevalue(name)
    monkeypatch.setattr(pieces, "NEW", 1.0)  # remember whatever comes, and forget it soon
    monkeypatch.setattr(pieces, "MOST", 50)
    monkeypatch.setattr(pieces, "LONGEST", 12)
    tokenizer._ready().encode_special_tokens = True
    encoder = Encoder(tokenizer._ready())

    @given(st.lists(TEXT, max_size=5))
    @example(["a" * 100 + " b" * 30, "", " ", "\n\n", " \n x", "x \n", "\x1c a\x1c\x1d b"])
    @settings(deadline=None)
    def check(texts: list[str]) -> None:
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        assert encoder.encode(texts) == alone(tokenizer, texts)

    check()
    assert encoder._num_bytes is not None


def test_every_character_beside_white_space(bpe: BPE) -> None:
    characters = [chr(i) for i in [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1F700), 0x10FFFF]]
    texts = [f"{c}. {c} \n{c}{c} a{c} {c}a\n" for c in characters]
    texts = ["".join(texts[start : start + 2000]) for start in range(0, len(texts), 2000)]
    assert bpe.encode_batch(texts) == alone(bpe, texts)


def test_white_space_is_what_the_pattern_of_words_takes_for_it(bpe: BPE) -> None:
    """Only a run of white space is split before its last character."""
    split = bpe._ready().pre_tokenizer.pre_tokenize_str
    found = [c for c in map(chr, [*range(0xD800), *range(0xE000, 0x20000)]) if len(split(f"a{c}{c}b")) == 4]
    assert {*found, " "} == {*SPACES}  # a blank goes with the letter after it


def test_memory_has_bounds(bpe: BPE, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(bpe._ready())
    assert encoder.encode(["a b c d"]) == alone(bpe, ["a b c d"])
    assert not encoder._known  # nothing came twice
    long = "x" * (pieces.LONGEST + 1)
    text = long + " a" * 99
    assert encoder.encode([text]) == alone(bpe, [text])
    assert encoder._known.keys() == {" a"}
    monkeypatch.setattr(pieces, "MOST", 1)
    assert encoder.encode([" b" * 9]) == alone(bpe, [" b" * 9])
    assert not encoder._known


def test_only_what_is_plain_byte_level_bpe_is_remembered(bpe: BPE) -> None:
    def changed(change: Callable[[HFTokenizer], object]) -> HFTokenizer:
        hf = HFTokenizer.from_str(bpe._ready().to_str())
        change(hf)
        return hf

    def set_to(name: str, value: object) -> Callable[[HFTokenizer], object]:
        return lambda hf: setattr(hf, name, value)

    def drop_byte(hf: HFTokenizer) -> None:
        vocab = {piece: i for piece, i in hf.get_vocab().items() if piece != "z"}
        hf.model = models.BPE(vocab, [])

    assert Encoder(bpe._ready())._num_bytes is not None
    for change in (
        set_to("normalizer", normalizers.NFC()),
        set_to("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        set_to("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        set_to("pre_tokenizer", pre_tokenizers.Whitespace()),
        set_to("model", models.WordLevel({"a": 0}, "a")),
        set_to("model", models.BPE(bpe._ready().get_vocab(), [], dropout=0.1)),
        lambda hf: hf.add_tokens(["see  you"]),
        drop_byte,
    ):
        encoder = Encoder(changed(change))
        assert encoder._num_bytes is None
        texts = ["see  you see  you the the zz", "a a a"]
        if encoder.hf.model.__class__ is not models.BPE or not encoder.hf.model.dropout:
            encoded = encoder.hf.encode_batch(texts, add_special_tokens=False)
            assert encoder.encode(texts) == [encoding.ids for encoding in encoded]


def test_what_is_remembered_stays_here(bpe: BPE, tmp_path: Path) -> None:
    tokenizer = BPE(400)
    tokenizer.from_state(bpe.to_state())
    before = cache.identity(tokenizer, tmp_path)
    tokenizer.encode("the the the the")
    assert tokenizer._encoder is not None and tokenizer._encoder._known
    assert cache.identity(tokenizer, tmp_path) == before
    assert pickle.loads(pickle.dumps(tokenizer))._encoder is None
    tokenizer.train(iter(["other words, other merges"] * 9))
    assert tokenizer.encode_batch(["the the the the"]) == alone(tokenizer, ["the the the the"])

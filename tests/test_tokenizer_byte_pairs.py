"""Byte-level BPE by tiktoken, against ``tokenizers`` on the same text."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from llmkit.data import identity
from llmkit_plugins.tokenizer import BPE, Pretrained, byte_pairs
from llmkit_plugins.tokenizer.base import HuggingFace, byte_level
from llmkit_plugins.tokenizer.byte_pairs import Encoder, bytes_by_character, same_by_tiktoken

SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u200a\u2028\u2029\u202f\u205f\u3000"

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


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few characters are enough for tiktoken."""
    monkeypatch.setattr(byte_pairs, "FEW", 0)


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
    return [hf.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in texts]


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_equals_tokenizers_alone(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: HuggingFace = request.getfixturevalue(name)

    @given(st.lists(TEXT, max_size=5))
    @example(["a" * 100 + " b" * 30, "", " ", "\n\n", " \n x", "x \n", "\x1c a\x1c\x1d b"])
    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def check(texts: list[str]) -> None:
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        assert tokenizer.encode_batch(texts) == alone(tokenizer, texts)

    check()
    assert tokenizer._encoder is not None and tokenizer._encoder._fast is not None


@pytest.mark.parametrize("name", ["wikitext-2/valid.txt", "multi30k/train.de", "chnsenticorp/train.tsv"])
def test_equals_tokenizers_on_real_text(name: str, gpt2: Pretrained, data_folder: Callable[[str], Path]) -> None:
    folder, file = name.split("/")
    text = (data_folder(folder) / file).read_text("utf-8")[:50_000]
    trained = BPE(2000)
    trained.train(iter(text.splitlines(keepends=True)))
    for tokenizer in (gpt2, trained):
        texts = [text, *text.splitlines()]
        assert tokenizer.encode_batch(texts) == alone(tokenizer, texts)
        assert tokenizer._encoder is not None and tokenizer._encoder._fast is not None


def test_every_character(bpe: BPE) -> None:
    characters = [chr(i) for i in [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1F700), 0x10FFFF]]
    texts = [f"{c}. {c} \n{c}{c} a{c}1 {c}a\n" for c in characters]
    texts = ["".join(texts[start : start + 2000]) for start in range(0, len(texts), 2000)]
    assert bpe.encode_batch(texts) == alone(bpe, texts)


@pytest.mark.parametrize("run", ["a", "\n", "我", "é\t", "!"])
def test_text_without_end(run: str, bpe: BPE) -> None:
    texts = [run * 100_000]
    assert bpe.encode_batch(texts) == alone(bpe, texts)


def test_white_space_without_end(bpe: BPE) -> None:
    texts = [" " * 1_000_001 + "a"]
    assert bpe.encode_batch(["ready"]) == alone(bpe, ["ready"])
    assert bpe.encode_batch(texts) == alone(bpe, texts)


def test_few_characters_do_not_wait_for_tiktoken(bpe: BPE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pairs, "FEW", 10)
    encoder = Encoder(bpe._ready())
    for text, is_fast in (("the theme", False), ("of", True), ("these poems", True)):
        assert encoder.encode([text]) == alone(bpe, [text])
        assert (encoder._fast is not None) == is_fast


def test_only_where_the_ids_are_sure_to_be_the_same(bpe: BPE) -> None:
    def changed(change: Callable[[HFTokenizer], object]) -> HFTokenizer:
        hf = HFTokenizer.from_str(bpe._ready().to_str())
        change(hf)
        return hf

    def set_to(name: str, value: object) -> Callable[[HFTokenizer], object]:
        return lambda hf: setattr(hf, name, value)

    def drop_byte(hf: HFTokenizer) -> None:
        vocab = {piece: i for piece, i in hf.get_vocab().items() if piece != "z"}
        hf.model = models.BPE(vocab, [])

    assert same_by_tiktoken(bpe._ready()) is not None
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
        texts = ["see  you see  you the the zz", "a a a"]
        if encoder.hf.model.__class__ is not models.BPE or not encoder.hf.model.dropout:
            encoded = encoder.hf.encode_batch(texts, add_special_tokens=False)
            assert encoder.encode(texts) == [encoding.ids for encoding in encoded]
        assert same_by_tiktoken(encoder.hf) is None


@pytest.mark.parametrize(
    ("merges", "is_sure", "text"),
    [
        (["a b", "c d", "ab c", "ab cd"], True, None),
        (["b c", "a b", "ab c"], False, "abc"),  # tiktoken makes the third token of a and bc
        (["a b", "b c", "a bc", "ab c"], False, None),  # two ways to one token
        (["abc d", "a b", "ab c"], False, None),  # older than its part
    ],
)
def test_merges_that_training_does_not_make(merges: list[str], is_sure: bool, text: str | None) -> None:
    alphabet = sorted(bytes_by_character())
    tokens = dict.fromkeys([*alphabet, *(merge.replace(" ", "") for merge in merges)])
    hf = byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges]))  # type: ignore[misc]
    assert (same_by_tiktoken(hf) is not None) == is_sure
    if text is None:
        return
    ranks = {bytes(map(bytes_by_character().__getitem__, token)): i for i, token in enumerate(tokens)}
    fast = tiktoken.Encoding("other", pat_str=byte_pairs.WORDS, mergeable_ranks=ranks, special_tokens={})
    assert fast.encode_ordinary(text) != hf.encode(text).ids, "otherwise nothing would have to be looked at"


def test_a_merge_that_ignores_merges_is_left_alone(bpe: BPE) -> None:
    described = json.loads(bpe._ready().to_str())
    described["model"]["ignore_merges"] = True
    assert same_by_tiktoken(HFTokenizer.from_str(json.dumps(described))) is None


def test_other_letters_are_noticed(bpe: BPE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries that know different versions of Unicode: here tiktoken takes a letter for a sign."""
    monkeypatch.setattr(byte_pairs, "WORDS", byte_pairs.WORDS.replace(r"\p{L}", r"[\p{L}&&[^\u1c89]]"))
    assert same_by_tiktoken(bpe._ready()) is None


def test_what_is_made_ready_stays_here(bpe: BPE, tmp_path: Path) -> None:
    tokenizer = BPE(400)
    tokenizer.from_state(bpe.to_state())
    before = identity.of(tokenizer, tmp_path)
    tokenizer.encode("the the the the")
    assert tokenizer._encoder is not None and tokenizer._encoder._fast is not None
    assert identity.of(tokenizer, tmp_path) == before
    assert pickle.loads(pickle.dumps(tokenizer))._encoder is None
    tokenizer.train(iter(["other words, other merges"] * 9))
    assert tokenizer.encode_batch(["the the the the"]) == alone(tokenizer, ["the the the the"])

"""Tokenizers against str.encode, tiktoken, transformers and slow plain-Python versions of their algorithms."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from clock import within
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from llmkit.contracts import Tokenizer
from llmkit.errors import UserError
from llmkit.registry import check_contract
from llmkit_plugins.tokenizer import BPE, Byte, Char, Pretrained, Unigram, Word, WordPiece

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, doesn't it?\n",
    "the dog (a lazy one) sleeps; the fox jumps again!\r\n\tUpper lower UPPER.\n",
    "我爱学习编程。我爱狐狸\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den Deich\n",
    "<pad> <unk> <unk> <unk> is how some texts write an unknown word <unk> <s> </s> [MASK]\n",
] * 3
ODD = [
    "",
    " ",
    "  two leading, two trailing  ",
    "\n\n\t\r\n\r",
    "a\x00b\x01\x7f\x85",
    "我爱学习编程",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👋🏽",
    "e\u0301 is not é, ﬁ is not fi, Å is not Å",
    "\ufeff\ufffe\uffff\ufdd0\u2028\u00a0\u3000\u2581▁",
    "\U0010ffff\U00020000",
    "<pad><bos><eos><unk><mask><sep> <|endoftext|> [CLS] [PAD] </s>",
    "<pad> \uffff <unk> \uffff<|endoftext|> \uffff",
    "x" * 3000,
    "مرحبا שלום नमस्ते",
]
TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "char": Char,
    "byte": Byte,
    "word": lambda: Word(100),
    "bpe": lambda: BPE(330),
    "wordpiece": lambda: WordPiece(220),
    "unigram": lambda: Unigram(150),
}
LEARNED = [name for name in TRAINED if name != "byte"]


def built(name: str) -> Tokenizer:
    tokenizer = TRAINED[name]()
    tokenizer.train(iter(TEXTS))
    return tokenizer


@pytest.fixture(scope="module")
def ready() -> dict[str, Tokenizer]:
    return {name: built(name) for name in TRAINED}


@pytest.fixture(scope="module")
def gpt2(data_folder: Callable[[str], Path]) -> Pretrained:
    return Pretrained(str(data_folder("gpt2_bpe")))


def specials(tokenizer: Tokenizer) -> list[int]:
    return [getattr(tokenizer, f"{role}_id") for role in ROLES]


# --- all of them


@pytest.mark.parametrize("name", [*TRAINED, "pretrained"])
def test_is_a_plugin_with_help(name: str) -> None:
    cls = Pretrained if name == "pretrained" else type(TRAINED[name]())
    check_contract("tokenizer", name, cls)
    doc = cls.__doc__ or ""
    assert doc.splitlines()[0].endswith(".") and "Source:" in doc
    assert ("Args:" in doc) == (name != "byte")


@pytest.mark.parametrize("name", TRAINED)
def test_special_ids_come_first(ready: dict[str, Tokenizer], name: str) -> None:
    assert specials(ready[name]) == [0, 1, 2, 3, 4, 5]
    assert ready[name].trained


@pytest.mark.parametrize("name", TRAINED)
def test_empty_input(ready: dict[str, Tokenizer], name: str) -> None:
    assert ready[name].encode_batch([]) == [] and ready[name].decode_batch([]) == []
    assert ready[name].encode("") == [] and ready[name].decode([]) == ""


@pytest.mark.parametrize("name", TRAINED)
@given(texts=st.lists(st.text(), max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_text(ready: dict[str, Tokenizer], name: str, texts: list[str]) -> None:
    """Batch equals single, ids are in range, and no special token but the unknown one comes from text."""
    tokenizer = ready[name]
    rows = tokenizer.encode_batch(texts)
    assert rows == [tokenizer.encode(text) for text in texts]
    assert all(i == 3 or 6 <= i < tokenizer.vocab_size for row in rows for i in row)
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows]
    if name in ("byte", "bpe"):
        assert tokenizer.decode_batch(rows) == texts


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("text", ODD)
def test_odd_text(ready: dict[str, Tokenizer], name: str, text: str) -> None:
    for tokenizer in (ready[name], pickle.loads(pickle.dumps(ready[name]))):
        ids = tokenizer.encode(text)
        assert all(i == 3 or 6 <= i < tokenizer.vocab_size for i in ids)
        if name in ("byte", "bpe"):
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TRAINED)
def test_text_that_names_special_tokens(ready: dict[str, Tokenizer], name: str) -> None:
    """Also where such words are frequent in the training text."""
    tokenizer = ready[name]
    for text in ("<pad>", "<unk>", "<s> </s>", "[MASK] <unk>"):
        ids = tokenizer.encode(text)
        assert ids and min(ids) >= 6
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("name", TRAINED)
def test_decode_leaves_special_ids_out(ready: dict[str, Tokenizer], name: str) -> None:
    tokenizer = ready[name]
    ids = tokenizer.encode("the fox jumps")
    assert tokenizer.decode([1, *ids, 2, 0, 0, 5, 4, 3]) == tokenizer.decode(ids) == "the fox jumps"
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize("name", TRAINED)
def test_state_and_pickle_restore_an_equal_tokenizer(ready: dict[str, Tokenizer], name: str) -> None:
    tokenizer = ready[name]
    restored = type(tokenizer)()
    restored.from_state(tokenizer.to_state())
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, *ODD]
    for other in (restored, copy):
        assert other.trained and other.vocab_size == tokenizer.vocab_size
        assert other.to_state() == tokenizer.to_state()
        rows = tokenizer.encode_batch(texts)
        assert other.encode_batch(texts) == rows and other.decode_batch(rows) == tokenizer.decode_batch(rows)


@pytest.mark.parametrize("name", TRAINED)
def test_lone_surrogates_become_replacement_characters(ready: dict[str, Tokenizer], name: str) -> None:
    tokenizer = ready[name]
    assert tokenizer.encode("fox \ud83d x") == tokenizer.encode("fox \ufffd x")
    assert tokenizer.encode("fox \ud83d\ude00 x") == tokenizer.encode("fox 😀 x")
    again = TRAINED[name]()
    again.train(iter([*TEXTS, "\ud800"]))
    if name != "wordpiece":  # as BERT's, it drops U+FFFD with the control characters
        assert again.decode(again.encode("\udfff")) == "\ufffd"


BAD_STATES = [
    "",
    "{",
    "null",
    "[]",
    "7",
    '"x"',
    "{}",
    '{"tokenizer": 5}',
    '{"tokenizer": "Nobody"}',
    "[" * 200_000,
    "1" * 10_000,
    "\ud800",
]


@pytest.mark.parametrize("name", [*TRAINED, "pretrained"])
@pytest.mark.parametrize("state", BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_states(name: str, state: str) -> None:
    tokenizer = Pretrained("nowhere") if name == "pretrained" else TRAINED[name]()
    with pytest.raises(UserError, match="tokenizer state") as error:
        tokenizer.from_state(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LEARNED)
def test_damaged_states(ready: dict[str, Tokenizer], name: str) -> None:
    """Cut off anywhere, with any value replaced or removed: UserError, or a tokenizer that works."""
    state = ready[name].to_state()
    for cut in range(0, len(state), max(1, len(state) // 40)):
        with pytest.raises(UserError):
            TRAINED[name]().from_state(state[:cut])

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in list(items)[:9]:
            yield (*path, key)
            yield from places(item, (*path, key))

    outcomes = Counter[str]()
    for path in places(json.loads(state)):
        values: list[Any] = [None, -1, 10**30, "x", "\ud800", [], {}, True, "remove"]
        for value in values:
            data = json.loads(state)
            parent = data
            for key in path[:-1]:
                parent = parent[key]
            if value == "remove":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            tokenizer = TRAINED[name]()
            try:
                tokenizer.from_state(json.dumps(data))
            except UserError:
                outcomes["refused"] += 1
                assert tokenizer.trained == (name == "byte")
            else:
                outcomes["accepted"] += 1
                ids = tokenizer.encode("the fox \U0010fffd")
                assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert outcomes["refused"] > 5


def test_state_of_another_tokenizer(ready: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match="is of 'BPE', expected 'Word'"):
        Word().from_state(ready["bpe"].to_state())


@pytest.mark.parametrize("name", LEARNED)
def test_untrained(name: str) -> None:
    tokenizer = TRAINED[name]()
    assert not tokenizer.trained
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.encode("x"),
        lambda: tokenizer.decode([7]),
        lambda: tokenizer.vocab_size,
        tokenizer.to_state,
    ]
    for call in calls:
        with pytest.raises(UserError, match="is not trained yet"):
            call()
    assert not pickle.loads(pickle.dumps(tokenizer)).trained


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(name: str, texts: list[str]) -> None:
    tokenizer = TRAINED[name]()
    with pytest.raises(UserError, match="^no text to train the tokenizer on$"):
        tokenizer.train(iter(texts))
    assert not tokenizer.trained


@pytest.mark.parametrize("name", ["word", "wordpiece"])
def test_only_white_space(name: str) -> None:
    with pytest.raises(UserError, match="^no text to train the tokenizer on$"):
        TRAINED[name]().train(iter([" \n ", "\t"]))


@pytest.mark.parametrize("name", LEARNED)
def test_training_streams_and_passes_errors_on(name: str) -> None:
    def broken() -> Iterator[str]:
        yield "one text"
        raise KeyError("from the data")

    tokenizer = TRAINED[name]()
    with pytest.raises(KeyError, match="from the data"):
        tokenizer.train(broken())
    assert not tokenizer.trained
    tokenizer.train(text for text in TEXTS)
    assert tokenizer.trained


def test_byte_reads_no_text() -> None:
    tokenizer = Byte()
    texts = iter(["x"])
    tokenizer.train(texts)
    assert tokenizer.trained and next(texts) == "x"


@pytest.mark.parametrize(
    ("build", "minimum"),
    [
        (lambda: Char(6), 7),
        (lambda: Word(0), 7),
        (lambda: BPE(261), 262),
        (lambda: BPE(3), 262),
        (lambda: WordPiece(6), 7),
        (lambda: Unigram(-1), 7),
    ],
)
def test_vocab_size_too_small_at_once(build: Callable[[], Tokenizer], minimum: int) -> None:
    with pytest.raises(UserError, match=rf"vocab_size -?\d+ is too small, the minimum is {minimum} "):
        build()


@pytest.mark.parametrize("cls", [WordPiece, Unigram])
def test_vocab_size_too_small_for_the_characters(cls: type[WordPiece] | type[Unigram]) -> None:
    with pytest.raises(UserError, match="is too small") as error:
        cls(10).train(iter(TEXTS))
    found = re.search(r"the minimum is (\d+)", str(error.value))
    assert found
    minimum = int(found[1])
    with pytest.raises(UserError, match="is too small"):
        cls(minimum - 1).train(iter(TEXTS))
    tokenizer = cls(minimum)
    tokenizer.train(iter(TEXTS))
    assert tokenizer.vocab_size == minimum
    assert 3 not in tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("vocab_size", [270, 300, 1000])
@pytest.mark.parametrize("cls", [Char, Word, BPE, WordPiece, Unigram])
def test_vocab_size_is_a_limit(cls: Callable[[int], Tokenizer], vocab_size: int) -> None:
    tokenizer = cls(vocab_size)
    tokenizer.train(iter(TEXTS))
    assert tokenizer.vocab_size <= vocab_size
    if vocab_size == 270 and cls is BPE:
        assert tokenizer.vocab_size == vocab_size


SCRIPT = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from test_tokenizers import TRAINED, built
print(*[hashlib.sha256(built(name).to_state().encode()).hexdigest() for name in TRAINED])
"""


def test_training_is_deterministic_across_processes(ready: dict[str, Tokenizer]) -> None:
    """The hash maps of the library have another order in every process, and its sums depend on the threads."""
    env = os.environ | {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *sys.path]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [sha256(tokenizer.to_state().encode()).hexdigest() for tokenizer in ready.values()]


@pytest.mark.parametrize("name", LEARNED)
def test_order_of_the_texts_does_not_matter(ready: dict[str, Tokenizer], name: str) -> None:
    tokenizer = TRAINED[name]()
    tokenizer.train(reversed(TEXTS))
    assert tokenizer.to_state() == ready[name].to_state()


@pytest.mark.parametrize("name", TRAINED)
def test_long_text_in_fair_time(ready: dict[str, Tokenizer], name: str) -> None:
    tokenizer = ready[name]
    for text in ("the lazy fox, " * 20_000, "x" * 262_144, "我爱学习编程" * 15_000):
        decoded = within(5, lambda: tokenizer.decode(tokenizer.encode(text)))  # noqa: B023
        if name in ("byte", "bpe"):
            assert decoded == text


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_training_on_a_long_text_without_spaces(name: str) -> None:
    within(10, lambda: TRAINED[name]().train(iter(["abcdefghij" * 10_000])))


# --- one by one


@given(text=st.text())
@settings(deadline=None)
def test_byte_is_utf8(text: str) -> None:
    assert [i - 6 for i in Byte().encode(text)] == list(text.encode())


def test_byte_decodes_incomplete_characters() -> None:
    assert Byte().decode(Byte().encode("我")[:2] + Byte().encode("x")) == "\ufffdx"
    assert Byte().vocab_size == 262


@given(text=st.text(min_size=1))
@settings(deadline=None)
def test_char_loses_nothing_it_has_seen(text: str) -> None:
    tokenizer = Char()
    tokenizer.train(iter([text]))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [6 + sorted(set(text)).index(character) for character in text]
    assert tokenizer.vocab_size == 6 + len(set(text))


@pytest.mark.parametrize("text", [text for text in ODD if text])
def test_char_loses_no_odd_text(text: str) -> None:
    tokenizer = Char()
    tokenizer.train(iter([text]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_keeps_the_most_frequent() -> None:
    tokenizer = Char(vocab_size=9)
    tokenizer.train(iter(["cccc", "bb", "aaa", "ddx"]))  # b before d: the code point decides
    assert tokenizer.encode("abcdx?") == [6, 7, 8, 3, 3, 3]
    assert tokenizer.decode(tokenizer.encode("abcdx?")) == "abc"
    assert tokenizer.vocab_size == 9


@pytest.mark.parametrize("characters", ["", "ba", "aab", 5, None, ["a"], "a\ud800"])
def test_char_state_must_be_sorted(characters: Any) -> None:
    with pytest.raises(UserError, match="incomplete or contradicts itself"):
        Char().from_state(json.dumps({"tokenizer": "Char", "characters": characters}))


@pytest.mark.parametrize("lowercase", [False, True])
def test_word_counts_words(lowercase: bool) -> None:
    tokenizer = Word(vocab_size=30, min_frequency=2, lowercase=lowercase)
    texts = [text.lower() if lowercase else text for text in TEXTS]
    tokenizer.train(iter(TEXTS))
    counts = Counter(word for text in texts for word in text.split())
    ranked = sorted((word for word in counts if counts[word] >= 2), key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate(ranked[:24], 6)}
    assert tokenizer.vocab_size == 6 + len(ids)
    assert tokenizer.encode_batch(TEXTS) == [[ids.get(word, 3) for word in text.split()] for text in texts]


def test_word_boundaries_and_unknown_words(ready: dict[str, Tokenizer]) -> None:
    word = ready["word"]
    assert word.encode("the\nfox\r\n\tjumps") == word.encode("the fox jumps")
    assert word.encode("gnu") == [3]
    assert word.decode(word.encode(" the  gnu\nfox ")) == "the fox"


def test_word_min_frequency() -> None:
    with pytest.raises(UserError, match="min_frequency must be at least 1, got 0"):
        Word(min_frequency=0)
    tokenizer = Word(min_frequency=3)
    tokenizer.train(iter(["a a b b b"]))
    assert tokenizer.encode("a b") == [3, 6]


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
COMMON = st.text(st.sampled_from("abcdefghij THEthe'sréüß我爱学习0123456789.,!?<|>\n\t👋é\u0301"), max_size=60)


def byte_characters() -> dict[str, int]:
    """The printable stand-ins of the bytes in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def as_tiktoken(vocab: dict[str, int]) -> tiktoken.Encoding:
    """Return tiktoken's encoding with the same pieces; it merges by the rank of the result, which is the id."""
    table = byte_characters()
    pieces = {bytes(table[c] for c in piece): i for piece, i in vocab.items() if all(c in table for c in piece)}
    # tiktoken wants the bytes to have ids too, and every other piece a higher rank.
    return tiktoken.Encoding("reference", pat_str=GPT2_PATTERN, mergeable_ranks=pieces, special_tokens={})


def test_bpe_equals_tiktoken(ready: dict[str, Tokenizer]) -> None:
    vocab = json.loads(ready["bpe"].to_state())["model"]["model"]["vocab"]
    reference = as_tiktoken({piece: i for piece, i in vocab.items() if i >= 6})
    assert len([i for i in vocab.values() if i >= 262]) == 330 - 262

    @given(text=COMMON)
    @settings(deadline=None)
    def check(text: str) -> None:
        assert ready["bpe"].encode(text) == reference.encode_ordinary(text)

    check()
    for text in TEXTS:
        assert ready["bpe"].encode(text) == reference.encode_ordinary(text)


def test_bpe_merges_the_most_frequent_pair_first() -> None:
    tokenizer = BPE(264)
    tokenizer.train(iter(["ab ab ab abc abc"]))
    ab, space_ab = 262, 263
    assert tokenizer.encode("ab") == [ab] and tokenizer.encode(" ab") == [space_ab]


def greedy(words: list[str], vocab: dict[str, int]) -> list[int]:
    """WordPiece as in the BERT paper's code: the longest piece from the left, or the word is unknown."""
    ids: list[int] = []
    for word in words:
        start, found = 0, []
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in vocab:
                    found.append(vocab[piece])
                    start = end
                    break
            else:
                found = [3]
                break
        ids += found
    return ids


@given(text=st.text(st.sampled_from("abcdeghijklmnortuvwxyzTU我爱狐 \n.,()<>"), max_size=60))
@settings(deadline=None)
def test_wordpiece_is_greedy(ready: dict[str, Tokenizer], text: str) -> None:
    vocab = json.loads(ready["wordpiece"].to_state())["model"]["model"]["vocab"]
    words = re.findall(r"[我爱狐.,()<>]|[a-zTU]+", text)
    assert ready["wordpiece"].encode(text) == greedy(words, vocab)


def test_wordpiece_text_comes_back_readable(ready: dict[str, Tokenizer]) -> None:
    wordpiece = ready["wordpiece"]
    for text in ("the dog (a lazy one) sleeps; the fox jumps again!", "doesn't it?", "我爱学习编程。我爱狐狸"):
        assert wordpiece.decode(wordpiece.encode(text)) == text
    assert wordpiece.decode(wordpiece.encode("the  fox\n 我爱 dog")) == "the fox 我爱 dog"


def test_wordpiece_treats_ideographs_as_words() -> None:
    tokenizer = WordPiece()
    tokenizer.train(iter(["我爱学习编程", "hello"]))
    vocab = json.loads(tokenizer.to_state())["model"]["model"]["vocab"]
    assert {"我", "爱", "编"} < vocab.keys() and not any("##我" in piece for piece in vocab)
    assert 3 not in tokenizer.encode("程编我hello爱")


@pytest.mark.parametrize("cls", [Word, WordPiece])
def test_lowercase_keeps_accents(cls: type[Word] | type[WordPiece]) -> None:
    tokenizer = cls(lowercase=True)
    tokenizer.train(iter(["ÜBER Café"]))
    assert tokenizer.decode(tokenizer.encode("Über CAFÉ")) == "über café"
    assert tokenizer.encode("über") == tokenizer.encode("ÜBER")


@given(text=st.text(st.sampled_from("abcdeghijklmnortuvwxyz我爱狐 "), max_size=30))
@settings(deadline=None)
def test_unigram_is_the_most_probable_cut(ready: dict[str, Tokenizer], text: str) -> None:
    vocab = json.loads(ready["unigram"].to_state())["model"]["model"]["vocab"]
    scores = dict(map(tuple, vocab[6:]))
    ids = ready["unigram"].encode(text)
    best = 0.0
    for word in re.findall("▁[^▁]*", "▁" + text.replace(" ", "▁")) if text else []:
        totals = [0.0] + [-float("inf")] * len(word)
        for end in range(1, len(word) + 1):
            options = [totals[start] + scores[word[start:end]] for start in range(end) if word[start:end] in scores]
            totals[end] = max(options)
        best += totals[-1]
    assert sum(vocab[i][1] for i in ids) == pytest.approx(best, abs=1e-4)
    assert "".join(vocab[i][0] for i in ids) == ("▁" + text.replace(" ", "▁") if text else "")
    assert ready["unigram"].decode(ids) == text


@given(text=st.text(min_size=1, alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=40)
def test_unigram_loses_nothing_it_has_seen(text: str) -> None:
    tokenizer = Unigram()
    tokenizer.train(iter([text]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- pretrained


def golden(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "golden_encodings.jsonl").read_text("utf-8").splitlines()]


def test_gpt2_golden_ids(gpt2: Pretrained, data_folder: Callable[[str], Path]) -> None:
    rows = golden(data_folder("gpt2_bpe"))
    assert len(rows) == 100
    copy = Pretrained("not needed any more")
    copy.from_state(gpt2.to_state())
    for tokenizer in (gpt2, copy, pickle.loads(pickle.dumps(gpt2))):
        assert tokenizer.encode_batch([row["text"] for row in rows]) == [row["ids"] for row in rows]
        assert tokenizer.decode_batch([row["ids"] for row in rows]) == [row["text"] for row in rows]
        assert specials(tokenizer) == [50257, 50256, 50256, 50256, 50258, 50259]
        assert tokenizer.vocab_size == 50260
        assert tokenizer.to_state() == gpt2.to_state()


def test_gpt2_equals_tiktoken_and_transformers(gpt2: Pretrained, data_folder: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' GPT2Tokenizer")
    folder = data_folder("gpt2_bpe")
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    reference = as_tiktoken({piece: i for piece, i in vocab.items() if piece != "<|endoftext|>"})
    other = transformers.GPT2Tokenizer.from_pretrained(str(folder))

    @given(text=COMMON)
    @settings(deadline=None)
    def check(text: str) -> None:
        ids = gpt2.encode(text)
        assert ids == reference.encode_ordinary(text) == other.encode(text)
        assert gpt2.decode(ids) == text

    check()


def test_gpt2_special_token_is_not_read_from_text(gpt2: Pretrained) -> None:
    ids = gpt2.encode("a<|endoftext|>b")
    assert 50256 not in ids and gpt2.decode(ids) == "a<|endoftext|>b"
    assert gpt2.decode([50256, *gpt2.encode("a"), 50256, 50257, 50258, 50259]) == "a"


@given(text=st.text())
@settings(deadline=None)
def test_gpt2_loses_nothing(gpt2: Pretrained, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text and all(0 <= i < 50256 for i in ids)


def test_pretrained_needs_no_training(gpt2: Pretrained) -> None:
    assert gpt2.trained
    texts = iter(["x"])
    gpt2.train(texts)
    assert next(texts) == "x"


def test_pretrained_is_read_at_first_use(tmp_path: Path) -> None:
    tokenizer = Pretrained("./nowhere")
    assert tokenizer.trained
    with pytest.raises(UserError, match="^pretrained tokenizer './nowhere': no such file or folder$"):
        _ = tokenizer.pad_id
    path = bert(tmp_path).path
    assert not hasattr(Pretrained(path), "padding_id")
    assert Pretrained(path).sep_id == 3
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert pickle.loads(pickle.dumps(Pretrained(path))).vocab_size == len(vocab)


def saved(hf: HFTokenizer, folder: Path) -> Pretrained:
    hf.save(str(folder / "tokenizer.json"))
    return Pretrained(str(folder))


def bert(folder: Path) -> Pretrained:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    hf = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
    hf.normalizer = normalizers.BertNormalizer()
    hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.WordPiece()
    hf.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False))
    hf.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hf.enable_truncation(4)
    hf.enable_padding(length=32)
    return saved(hf, folder)


def test_bert_style(tmp_path: Path) -> None:
    tokenizer = bert(tmp_path)
    assert specials(tokenizer) == [0, 2, 3, 1, 4, 3]
    text = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not {0, 1, 2, 3, 4} & {*ids}  # neither cut, padded nor decorated
    assert tokenizer.vocab_size == len(json.loads(tokenizer.to_state())["model"]["model"]["vocab"])
    assert not {0, 2, 3, 4} & {*tokenizer.encode("[PAD] [CLS] [SEP] [MASK]")}
    assert tokenizer.encode("gnu\U0001f98a") == [1]
    assert tokenizer.decode([2, *ids, 3, 0, 0]) == text


def test_word_level_special_tokens_as_words(tmp_path: Path) -> None:
    """Such a model holds special tokens as words, which white space alone would let text reach."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "fox": 3, "<b>": 4}
    hf = HFTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(hf, tmp_path)  # none of them is flagged as special
    assert specials(tokenizer) == [5, 1, 2, 0, 6, 2]
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("<s> fox </s> <b>") == [0, 3, 0, 4]
    assert tokenizer.decode([1, 3, 4, 2, 5]) == "fox <b>"


def test_unigram_control_pieces(tmp_path: Path) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁fox", -3.0)]
    pieces += [(character, -5.0) for character in "</s>fox"]
    hf = HFTokenizer(models.Unigram(pieces, unk_id=2))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    hf.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer = saved(hf, tmp_path)
    assert specials(tokenizer) == [0, 12, 1, 2, 13, 1]
    ids = tokenizer.encode("fox </s> fox")
    assert not {0, 1, 2} & {*ids} and tokenizer.decode(ids) == "fox </s> fox"
    assert 2 in tokenizer.encode("q")


def test_bpe_whose_merges_spell_a_special_token(tmp_path: Path) -> None:
    hf = HFTokenizer(models.BPE(unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<pad>"], show_progress=False)
    hf.train_from_iterator(["<unk> <unk> <unk>x <unk>x fox"] * 3, trainer)
    hf.encode_special_tokens = True
    assert hf.encode("<unk>").ids == [0]  # that flag alone does not keep text from it
    tokenizer = saved(hf, tmp_path)
    ids = tokenizer.encode("<unk> <pad> <unk>x fox")
    assert 1 not in ids and tokenizer.encode("<unk>") and 0 not in tokenizer.encode("<unk>x <unk>")
    assert tokenizer.unk_id == 0 and tokenizer.encode("Ω") == [0]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    """Ordinary added tokens are still found in text; ids stay, also behind special ones."""
    hf = HFTokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    hf.add_special_tokens(["<|endoftext|>", "<|weird|>"])
    hf.add_tokens([AddedToken("<call>", normalized=False)])
    hf.add_special_tokens(["<|pad|>"])
    expected = {name: hf.token_to_id(name) for name in ("<|endoftext|>", "<call>", "<|pad|>")}
    assert expected == {"<|endoftext|>": 3, "<call>": 5, "<|pad|>": 6}
    tokenizer = saved(hf, tmp_path)
    assert specials(tokenizer) == [6, 3, 3, 3, 7, 8] and tokenizer.vocab_size == 9
    assert tokenizer.encode("ab<call>a") == [2, 5, 0]
    assert not {3, 4, 6} & {*tokenizer.encode("a<|weird|><|pad|><|endoftext|>")}
    assert "".join(tokenizer.decode([3, 2, 4, 5, 6, 7, 8]).split()) == "ab<call>"


def test_tokenizer_json_file_and_folder(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    file = Pretrained(str(tmp_path / "tokenizer.json"))
    assert file.to_state() == folder.to_state() and file.encode("the fox") == folder.encode("the fox")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the folder has no tokenizer.json, and no vocab.json with merges.txt"),
        ({"vocab.json": "{}"}, "the folder has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a tokenizer.json"),
        ({"tokenizer.json": '{"hello": 1}'}, "is not a tokenizer.json"),
        ({"vocab.json": "{", "merges.txt": ""}, "pretrained tokenizer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nq r\n"}, "pretrained tokenizer"),
    ],
)
def test_bad_files(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Pretrained(str(tmp_path)).encode("x")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_hub_name_offline() -> None:
    with pytest.raises(
        UserError, match="'nobody/nothing': no such file or folder here, and its tokenizer.json could not be downloaded"
    ) as error:
        _ = Pretrained("nobody/nothing").vocab_size
    assert "\n" not in str(error.value)


def test_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name goes to the library unchanged; what comes back is treated like a file."""
    asked: list[str] = []

    class Hub:
        @staticmethod
        def from_pretrained(name: str) -> HFTokenizer:
            asked.append(name)
            return HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))

    state = bert(tmp_path).to_state()
    monkeypatch.setattr("llmkit_plugins.tokenizer.pretrained.HFTokenizer", Hub)
    assert Pretrained("some/model").to_state() == state
    assert asked == ["some/model"]


@pytest.mark.parametrize("key", ["special_ids", "vocab_size", "model"])
def test_pretrained_damaged_states(tmp_path: Path, key: str) -> None:
    state = json.loads(bert(tmp_path).to_state())
    bad: list[Any] = [None, -1, 5, 1.5, "x", [], {}, {"pad": 0}, dict.fromkeys(ROLES, 200), dict.fromkeys(ROLES, True)]
    for value in bad:
        with pytest.raises(UserError, match="tokenizer state of Pretrained"):
            Pretrained("nowhere").from_state(json.dumps(state | {key: value}))


# --- speed, on real text


@pytest.mark.parametrize("cls", [Char, Byte, BPE])
def test_speed_on_a_megabyte(cls: type[Tokenizer], data_folder: Callable[[str], Path]) -> None:
    text = (data_folder("tinyshakespeare") / "input.txt").read_text("utf-8")
    tokenizer = cls()
    tokenizer.train(iter(text.splitlines(keepends=True)))
    ids = within(5 if cls is BPE else 1, lambda: tokenizer.encode(text))  # 0.5 and 0.05 are usual
    assert tokenizer.decode(ids) == text

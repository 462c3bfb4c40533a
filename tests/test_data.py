"""Blocks, packing, batches of examples, parts and the cache, against plain recomputation."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import pickle
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from clock import within
from data_fakes import BOS, EOS, PAD, CharTokenizer, Joining, Labelling, Recorder, Translating, bound, trainer
from torch import nn

from llmkit import plugin
from llmkit.contracts import IGNORE
from llmkit.data import DataModule, batches, cache, identity
from llmkit.data.batches import EvaluationOrder, Loader, TrainingOrder, evenly
from llmkit.data.examples import Examples, Features
from llmkit.data.prepare import hidden_bytes
from llmkit.data.tokens import Blocks, Order, best_fit, split_batches
from llmkit.errors import UserError

Pair = tuple[int, int]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def prose(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcde é\n", k=length))


def table(folder: Path, rows: int, name: str = "train.csv") -> str:
    rng = random.Random(1)
    lines = [f"{''.join(rng.choices('abcdef', k=rng.randint(1, 40)))},{'xyz'[i % 3]}" for i in range(rows)]
    return write(folder / name, "text,label\n" + "\n".join(lines) + "\n")


def ids_of(data: DataModule, text: str) -> list[int]:
    return data.tokenizer.encode(text)


def evaluated(data: DataModule) -> Loader:
    """Return the validation loader, where there is one."""
    loader = data.val_dataloader()
    assert isinstance(loader, Loader)
    return loader


def in_order(loader: Loader) -> list[Any]:
    """Return the batches of an evaluation as they were sorted, before they were spread."""
    return [batch for _, batch in sorted(zip(evenly(len(loader)), loader, strict=True), key=lambda pair: pair[0])]


def everything(loader: Any, key: str = "ids") -> list[Any]:
    return [row for batch in loader for row in batch[key].tolist()]


# Blocks


@pytest.mark.parametrize("length", [2, 5, 8, 9, 16, 17, 100, 333])
def test_evaluation_blocks_hold_every_target_once(tmp_path: Path, length: int) -> None:
    text = prose(length)
    path = write(tmp_path / "a.txt", text)
    data = bound(Joining(), 8, tmp_path, train=path, validation=path, batch_size=3)
    ids, targets = [], []
    for batch in in_order(evaluated(data)):
        assert batch["ids"].shape[1] == 8
        assert batch["ids"].dtype == batch["targets"].dtype == torch.int64
        assert len(batch["ids"]) <= 3
        ids += batch["ids"].flatten().tolist()
        targets += batch["targets"].flatten().tolist()
    expected = ids_of(data, text)
    assert [t for t in targets if t != IGNORE] == expected[1:]
    assert [i for i, t in zip(ids, targets, strict=True) if t != IGNORE] == expected[:-1]
    rest = [i for i, t in zip(ids, targets, strict=True) if t == IGNORE]
    assert rest in ([PAD] * len(rest), [expected[-1]] + [PAD] * (len(rest) - 1))


@pytest.mark.parametrize("length", [2, 5, 9, 20, 24, 100, 1001])
def test_training_blocks(tmp_path: Path, length: int) -> None:
    """Blocks are pieces of the text and do not overlap within an epoch; each epoch is cut and ordered differently."""
    path = write(tmp_path / "a.txt", prose(length))
    data = bound(Joining(), 8, tmp_path, train=path, validation=path, batch_size=4)
    split = data.split("train")
    stream = ids_of(data, prose(length))
    places: set[int] = set()
    sizes = set()
    for epoch in range(60):
        order = split.training_order(np.random.default_rng(epoch))
        sizes.add(len(order))
        starts = np.concatenate(order)
        assert len(set(starts.tolist())) == len(starts)
        assert len({start % 8 for start in starts.tolist()}) == 1
        batch = split[starts]
        for start, ids, targets in zip(starts, batch["ids"].tolist(), batch["targets"].tolist(), strict=True):
            expected = stream[start : start + 9]
            assert [i for i, t in zip(ids, targets, strict=True) if t != IGNORE] == expected[:-1]
            assert [t for t in targets if t != IGNORE] == expected[1:]
            places.update(range(start + 1, start + len(expected)))
    assert sizes == {split.num_batches}
    assert places == set(range(1, length))  # every token is a target in some epoch
    if length > 100:
        assert [len(batch) for batch in list(order)[:-1]] == [4] * (split.num_batches - 1)
        assert len(starts) == (length - 8) // 8  # all blocks there is room for, whatever the offset


def test_bytes_of_a_batch(tmp_path: Path) -> None:
    text = prose(500)
    path = write(tmp_path / "a.txt", text)
    data = bound(Joining(), 8, tmp_path, train=path, validation=path, batch_size=4)
    assert data.bytes_per_token("validation") == pytest.approx(len(text.encode()) / 499)
    total = sum(float(batch["bytes"]) for batch in evaluated(data))
    assert total == pytest.approx(len(text.encode()))
    for batch in evaluated(data):
        real = int((batch["targets"] != IGNORE).sum())
        assert float(batch["bytes"]) == pytest.approx(real * len(text.encode()) / 499)


def test_documents_end_with_eos_unless_alone(tmp_path: Path) -> None:
    texts = ["ab\ncd\n", "ba", "", "d\n"]
    for i, text in enumerate(texts):
        write(tmp_path / f"{i}.txt", text)
    data = bound(Joining(), 32, tmp_path, train=str(tmp_path / "*.txt"), validation=str(tmp_path / "0.txt"))
    expected = [id for text in texts if text for id in [*ids_of(data, text), EOS]]
    tokens: Any = data.split("train")
    assert tokens.tokens.tolist() == expected
    alone: Any = data.split("validation")
    assert alone.tokens.tolist() == ids_of(data, texts[0])


def test_lines_as_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ab\n\n  \ncd\u2028e\nf")
    data = bound(Joining(), 32, tmp_path, train=path, validation=path, documents="line")
    tokens: Any = data.split("train")
    assert tokens.tokens.tolist() == [i for text in ("ab", "cd\u2028e", "f") for i in [*ids_of(data, text), EOS]]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_line_is_a_document(tmp_path: Path, streaming: bool) -> None:
    """An empty line is its end alone, and every end stands for a newline."""
    path = write(tmp_path / "a.txt", "\nab\n\n\ncd e\n")
    settings: Any = {"train": path, "validation": path, "documents": "every_line"}
    data = bound(Joining(), 12, tmp_path, batch_size=1, streaming=streaming, **settings)
    expected = [EOS, *ids_of(data, "ab"), EOS, EOS, EOS, *ids_of(data, "cd e"), EOS]
    if streaming:
        (batch,) = data.train_dataloader()
        assert [*batch["ids"][0].tolist()[:10], batch["targets"][0][9]] == expected
        return
    split: Any = data.split("validation")
    assert split.tokens.tolist() == expected
    assert split.stored.num_bytes == 11
    (batch,) = evaluated(bound(Joining(), 12, tmp_path, batch_size=9, pack=True, **settings))
    assert int((batch["targets"] != IGNORE).sum()) == 11  # each line's characters and its end


def test_wikitext_has_as_many_tokens_as_published(tmp_path: Path, data_folder: Callable[[str], Path]) -> None:
    """The validation split with an end for each of its lines: 217,646 (Merity et al. 2017, arXiv:1609.07843)."""
    path = str(data_folder("wikitext-2") / "valid.txt")
    for name in ("transformer", "lstm"):
        config = yaml.safe_load(Path(f"configs/generation/wikitext2_{name}.yaml").read_text())
        word = plugin("tokenizer", "word")
        documents = config["data"]["documents"]
        data = bound(Joining(), 64, tmp_path, train=path, validation=path, documents=documents, tokenizer=word)
        split: Any = data.split("validation")
        assert (split.size, len(split)) == (217_646, 217_645)  # the first is not predicted


def test_bytes_that_unknown_tokens_hide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "the cat sat\n" * 9)
    other = write(tmp_path / "b.txt", "the zzzé sat\nyy  the cat y\n")
    word, head = plugin("tokenizer", "word"), plugin("head", "generation")()
    settings: Any = {"train": path, "validation": other, "documents": "line", "tokenizer": word}
    (batch,) = evaluated(bound(head, 16, tmp_path, **settings))
    assert int((batch["targets"] == 3).sum()) == 3  # zzzé, yy, y
    assert float(batch["hidden"]) == pytest.approx(5 + 2 + 1)
    assert float(batch["bytes"]) == pytest.approx(len("the zzzé sat\nyy  the cat y\n".encode()))
    assert hidden_bytes(["a?!b", "ab", "é"], [[6, 3, 3, 7], [6, 7], [3]], CharTokenizer("ab")) == [2, 0, 2]


def test_a_large_file_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.data import formats

    monkeypatch.setattr(formats, "CHUNK", 50)
    text = prose(3000) + "x" * 500  # the last line is longer than a chunk
    path = write(tmp_path / "a.txt", text)
    data = bound(Joining(), 8, tmp_path, train=path, validation_share=0.25, batch_size=7)
    cut = int(len(text) * 0.75)
    train: Any = data.split("train")
    validation: Any = data.split("validation")
    assert train.tokens.tolist() == ids_of(data, text[:cut])
    assert CharTokenizer.trainings[-1] == text[:cut]
    assert validation.tokens.tolist() == ids_of(data, text[cut:])  # "x" is unknown: not seen in training
    assert data.tokenizer.unk_id in validation.tokens


def test_vocabulary_decides_the_width(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", prose(50))
    small = bound(Joining(), 8, tmp_path, train=path, validation=path)
    large = DataModule(train=path, validation=path, cache_dir=str(tmp_path / "cache"))
    large.bind(Joining(), 8, CharTokenizer("".join(map(chr, range(70_000, 140_000)))))
    large.setup()
    narrow: Any = small.split("train")
    wide: Any = large.split("train")
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)


# Packing


def plain_pairs(documents: list[list[int]]) -> list[Pair]:
    pairs: list[Pair] = []
    for ids in documents:
        whole = [BOS, *ids, EOS]
        pairs += itertools.pairwise(whole)
    return sorted(pairs)


def check_packed(batch: Any, context: int) -> list[list[int]]:
    """Return the inputs of the segments, after checking that they are runs 1, 2, .. followed by padding."""
    found = []
    for ids, targets, segments in zip(
        batch["ids"].tolist(), batch["targets"].tolist(), batch["segments"].tolist(), strict=True
    ):
        assert len(ids) == context
        real = [s for s in segments if s]
        assert segments == sorted(real) + [0] * (context - len(real))
        assert sorted(set(real)) == list(range(1, max(real) + 1))
        for number in set(real):
            where = [i for i, s in enumerate(segments) if s == number]
            # Within a segment the target is the next input: nothing crosses to another document.
            assert [ids[i] for i in where[1:]] == [targets[i] for i in where[:-1]]
            found.append([ids[i] for i in where] + [targets[where[-1]]])
        assert all(i == PAD and t == IGNORE for i, t, s in zip(ids, targets, segments, strict=True) if s == 0)
    return found


@pytest.mark.parametrize("context", [4, 16, 64])
def test_packed_documents(tmp_path: Path, context: int) -> None:
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcd", k=rng.randint(1, 40))) for _ in range(50)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    settings: Any = {"train": path, "validation": path, "documents": "line", "pack": True, "batch_size": 3}
    data = bound(Joining(), context, tmp_path, **settings)
    documents = [ids_of(data, line) for line in lines]
    pieces: list[list[int]] = []
    pairs: list[Pair] = []
    num_bytes = 0.0
    for batch in evaluated(data):
        pieces += check_packed(batch, context)
        flat = zip(batch["ids"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True)
        pairs += [pair for pair in flat if pair[1] != IGNORE]
        num_bytes += float(batch["bytes"])
    assert sorted(pairs) == plain_pairs(documents)  # every target exactly once
    expected = []
    for ids in documents:
        whole = [BOS, *ids, EOS]
        expected += [whole[i : i + context + 1] for i in range(0, len(whole) - 1, context)]
    assert sorted(pieces) == sorted(expected)
    assert num_bytes == pytest.approx(sum(len(line) + 1 for line in lines))  # eos stands for the newline
    assert len(evaluated(data)) * 3 * context < 1.35 * len(pairs) + 3 * context
    rows = [row for batch in data.train_dataloader() for row in batch["ids"].tolist()]
    assert len({tuple(row) for row in rows}) > len(rows) // 2
    split: Any = data.split("train")
    assert len(rows) == split.num_rows


def test_best_fit_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 10_000)
    rows = within(1, lambda: best_fit(lengths, 64))
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 64
    assert filled.sum() / (64 * len(filled)) > 0.97
    assert best_fit(np.empty(0, np.int64), 8).size == 0


# Features


TEXTS = ["", "a", "12345678", "two\nlines\r\x00", "我们 \ud800 \U0001f600" * 3, "é" * 1000, ""]


def test_texts_are_the_same_again_after_storage(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "text": TEXTS,
        "ids": [list(range(n)) for n in range(7)],
        "none": [""] * 7,
        "number": [*range(7)],
        "no list": [[] for _ in range(7)],
    }
    expected = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    groups = [
        {name: column[part] for name, column in columns.items()} for part in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    features = Features.of(groups)
    features.write(tmp_path)
    for stored in (features, Features.read(tmp_path), pickle.loads(pickle.dumps(Features.read(tmp_path)))):
        assert [stored[index] for index in range(stored.count)] == expected


def test_stored_texts_are_mapped_and_compact(tmp_path: Path) -> None:
    """A byte a byte, and none of them read before its row is asked for."""
    Features.of({"text": ["ab" * 5000] * 100, "ids": [[1]] * 100} for _ in range(20)).write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("text*.bin")) == 20 * 100 * 10_000
    stored = Features.read(tmp_path).values["text"]
    assert isinstance(stored.base, np.memmap) and not stored.flags.owndata


@pytest.mark.parametrize(
    "groups",
    [
        [{"x": ["a", 1]}],
        [{"x": [1, "a"]}],
        [{"x": ["a"]}, {"x": [1]}],
        [{"x": [[1]]}, {"x": ["a"]}],
        [{"x": [["a"]]}],
        [{"x": [b"a"]}],
        [{"x": [0.5]}],
        [{"x": [None]}],
    ],
)
def test_features_of_other_types_are_refused(groups: list[dict[str, list[Any]]]) -> None:
    with pytest.raises(TypeError, match="feature 'x' must be"):
        Features.of(groups)


def test_texts_do_not_count_as_length() -> None:
    """Where a head gives no length, a row costs its ids."""
    features = Features.of([{"text": ["long " * 99, "a", "b"], "ids": [[1], [1, 2], [1, 2, 3]]}])
    examples = Examples(features, Labelling(), CharTokenizer("ab"), 1, None)
    assert np.concatenate(examples.evaluation_order()).tolist() == [2, 1, 0]


class Quoting(Labelling):
    """Keeps the text of each row next to its ids."""

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        return {**super().encode(rows, tokenizer, max_length), "text": rows["text"]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> Any:
        return {**super().collate(features, tokenizer), "text": [item["text"] for item in features]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_texts_reach_the_batch_with_their_rows(tmp_path: Path, num_workers: int, streaming: bool) -> None:
    path = table(tmp_path, 60)
    settings: dict[str, Any] = {"num_workers": num_workers, "streaming": streaming}
    data = bound(Quoting(), 64, tmp_path, train=path, validation=path, batch_size=8, **settings)
    seen = []
    for batch in data.train_dataloader():
        assert data.tokenizer.decode_batch(batch["ids"].tolist()) == batch["text"]
        seen += batch["text"]
    assert sorted(seen) == sorted(line.split(",")[0] for line in Path(path).read_text().splitlines()[1:])


# Examples


@pytest.mark.parametrize("settings", [{"batch_size": 7}, {"batch_tokens": 90}, {"batch_size": 7, "num_workers": 2}])
def test_an_epoch_holds_every_example_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = table(tmp_path, 200)
    data = bound(Labelling(), 64, tmp_path, train=path, validation=path, **settings)
    lines = [line.split(",") for line in Path(path).read_text().splitlines()[1:]]
    expected = sorted([*ids_of(data, text), -"xyz".index(label)] for text, label in lines)
    loader = data.train_dataloader()
    orders = []
    for _ in range(3):
        found, order = [], []
        for batch in loader:
            if "batch_tokens" in settings:
                assert batch["ids"].numel() <= 90
            else:
                assert len(batch["ids"]) <= 7
            for ids, label in zip(batch["ids"].tolist(), batch["label"].tolist(), strict=True):
                found.append([i for i in ids if i != PAD] + [-label])
            order.append(batch["ids"].tolist())
        assert sorted(found) == expected
        assert len(order) == len(loader)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert {len(rows) for order in orders for rows in order} != {1}
    found = everything(evaluated(data))
    assert sorted([i for i in ids if i != PAD] for ids in found) == sorted(row[:-1] for row in expected)
    widths = [batch["ids"].shape[1] for batch in in_order(evaluated(data))]
    assert widths[0] == 40
    assert widths == sorted(widths, reverse=True)


def examples_of(lengths: Any, batch_size: int = 32, batch_tokens: int | None = None) -> Examples:
    features = Features.of([{"ids": [[7] * length for length in lengths], "length": list(lengths)}])
    return Examples(features, Labelling(), CharTokenizer("ab"), batch_size, batch_tokens)


def padding(lengths: Any, order: Any) -> float:
    """Return the share of padding in batches."""
    wide = sum(max(lengths[row] for row in batch) * len(batch) for batch in order)
    return 1 - float(sum(lengths) / wide)


@pytest.mark.parametrize(("rows", "batch_tokens"), [(4000, None), (4000, 3000), (300, None), (300, 2000)])
def test_rows_meet_other_rows_in_each_epoch(rows: int, batch_tokens: int | None) -> None:
    """With lengths like those of dialogues, which are rarely equal; sorting alone brings 52 to 78 % together again."""
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(4.5, 0.6, rows)]
    examples = examples_of(lengths, batch_tokens=batch_tokens)
    epochs = [list(examples.training_order(np.random.default_rng([0, epoch]))) for epoch in range(12)]
    assert {len(found) for found in epochs} == {examples.num_batches}
    pairs = again = 0
    for found, following in itertools.pairwise(epochs):
        assert sorted(np.concatenate(found).tolist()) == list(range(rows))
        if batch_tokens:
            assert all(max(lengths[row] for row in b) * len(b) <= batch_tokens for b in found)
        else:
            assert sorted(map(len, found))[1:] == [32] * (len(found) - 1)  # one is not full, not always the same
        where = {row: number for number, batch in enumerate(following) for row in batch.tolist()}
        for batch in found:
            pairs += len(batch) * (len(batch) - 1)
            again += sum(n * (n - 1) for n in Counter(where[row] for row in batch.tolist()).values())
    assert again / pairs < 0.3
    shuffled = np.split(np.random.default_rng(0).permutation(rows), range(32, rows, 32))
    assert padding(lengths, epochs[0]) < padding(lengths, examples.evaluation_order()) + (0.05 if rows > 300 else 0.2)
    assert padding(lengths, epochs[0]) < 0.75 * padding(lengths, shuffled)


def test_batches_by_tokens_have_round_numbers_of_rows() -> None:
    """A CPU's library keeps kernels for each shape: memory would grow from epoch to epoch."""
    lengths = np.clip(np.random.default_rng(0).lognormal(2.7, 0.3, 6000).astype(int), 4, 40)
    examples = examples_of(lengths, batch_tokens=3000)
    epochs = [examples.training_order(np.random.default_rng([0, epoch])) for epoch in range(6)]
    rows = [len(batch) for found in epochs for batch in found]
    assert np.mean([number % 2 ** max(0, number.bit_length() - 4) == 0 for number in rows]) > 0.9
    assert np.mean(rows) > 0.8 * 3000 / lengths.mean()


def test_the_first_batches_of_an_evaluation_represent_all(tmp_path: Path) -> None:
    """So that ``limit_val_batches`` measures nearly the same: lengths and labels of rows, places in a text."""
    lengths = np.random.default_rng(0).integers(1, 60, 900).tolist()
    order = EvaluationOrder(examples_of(lengths, 8).evaluation_order)
    for count in (5, 10, 30):
        rows = np.concatenate(list(itertools.islice(order, count)))
        assert np.mean([lengths[row] for row in rows]) == pytest.approx(np.mean(lengths), rel=0.15)
    # Rows of equal length do not come in the order of the file, which may be sorted by label.
    equal = np.concatenate(list(itertools.islice(EvaluationOrder(examples_of([5] * 800, 8).evaluation_order), 10)))
    assert 0.3 < np.mean(equal < 400) < 0.7
    path = write(tmp_path / "a.txt", prose(4000))
    starts: Any = EvaluationOrder(
        bound(Joining(), 8, tmp_path, train=path, validation=path).split("validation").evaluation_order
    )
    assert np.mean(np.concatenate(list(itertools.islice(starts, 5)))) == pytest.approx(2000, rel=0.15)
    for count in (1, 2, 10, 97):
        assert sorted(evenly(count)) == list(range(count))


def test_a_row_longer_than_batch_tokens_comes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bound(Labelling(), 64, tmp_path, train=table(tmp_path, 50), batch_tokens=10)
    count = len(data.train_dataloader())
    said = f"an optimizer step holds {45 / count:.0f} rows on average (1 batch), an epoch has {count} steps"
    assert capsys.readouterr().err.count(said) == 1
    assert sum(len(batch["ids"]) for batch in data.train_dataloader()) == 45
    assert all(len(b["ids"]) == 1 for b in data.train_dataloader() if b["ids"].shape[1] > 10)


def test_what_a_step_of_batch_tokens_holds() -> None:
    split = examples_of([5] * 90, batch_tokens=50)
    count = split.num_batches
    assert count in (9, 10)
    steps = -(-count // 4)  # the last one takes what is left of the epoch
    said = f"data.batch_tokens 50: an optimizer step holds {90 / steps:.0f} rows on average (4 batches: "
    assert split.step_note(count, 4, 1) == f"{said}trainer.accumulate_grad_batches 4), an epoch has {steps} steps"
    said = "an optimizer step holds 30 rows on average (4 batches: 2 processes, trainer.accumulate_grad_batches 2), "
    assert f"{said}an epoch has 3 steps" in split.step_note(5, 2, 2)
    assert split.step_note(1, 8, 1).endswith(
        "90 rows on average (1 batch: trainer.accumulate_grad_batches 8), an epoch has 1 step"
    )


def test_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    path = table(tmp_path, 100)

    def epochs(seed: int, **settings: Any) -> list[Any]:
        data = bound(Labelling(), 64, tmp_path, train=path, batch_size=8, seed=seed, **settings)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        loader = data.train_dataloader()
        found = [everything(loader) for _ in range(2)]
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.equal(state[0], after[0])  # the global random states are left alone
        assert state[1:] == after[1:]
        return found

    assert epochs(0) == epochs(0) == epochs(0, num_workers=2)
    assert epochs(0) != epochs(1)
    assert sorted(map(tuple, bound_rows(tmp_path, path, 0))) == sorted(map(tuple, bound_rows(tmp_path, path, 1)))


def bound_rows(folder: Path, path: str, seed: int) -> list[Any]:
    """Return the validation rows: the same for every seed."""
    data = bound(Labelling(), 64, folder, train=path, batch_size=1, seed=seed)
    return everything(evaluated(data))


def test_translation_is_padded_little_and_fast(tmp_path: Path, data_folder: Callable[[str], Path]) -> None:
    folder = data_folder("multi30k")
    files = {"source": str(folder / "train.en"), "target": str(folder / "train.de")}

    class Words(CharTokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[SPECIAL_WORD] * len(text.split()) for text in texts]

    for settings in ({"batch_tokens": 4096}, {"batch_size": 64}):
        data = bound(Translating(), 128, tmp_path, train=files, tokenizer=Words, validation_share=0, **settings)
        found = within(4, lambda: list(data.train_dataloader()))  # noqa: B023
        parts = [batch[name] for batch in found for name in ("source", "target")]
        assert sum(len(batch["source"]) for batch in found) == 29_000
        assert sum(int((part == PAD).sum()) for part in parts) / sum(part.numel() for part in parts) < 0.08


SPECIAL_WORD = 7


# Ranks


@pytest.mark.parametrize("rows", [3, 40, 100])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    path = table(tmp_path, rows)
    data = bound(Labelling(), 64, tmp_path, train=path, validation=path, batch_size=4)
    alone = [batch["ids"].tolist() for batch in data.train_dataloader()]
    whole = sorted(everything(evaluated(data)))
    train, validation = [], []
    for rank in range(size):
        monkeypatch.setattr(batches, "world", lambda rank=rank: (rank, size))
        loader = data.train_dataloader()
        train.append([batch["ids"].tolist() for batch in loader])
        assert len(train[-1]) == len(loader)
        loader = evaluated(data)
        validation.append([batch["ids"].tolist() for batch in loader])
        assert len(validation[-1]) == len(loader)
    assert len({len(part) for part in train}) == 1
    shared = [batch for step in zip(*train, strict=True) for batch in step]
    before = len(alone) // size * size
    assert shared[:before] == alone[:before]  # only what is left of the epoch is shared out in other batches
    assert all(shared)
    assert all(len(batch) <= 4 for batch in shared)

    def strip(found: Any) -> list[list[int]]:
        return sorted([i for i in row if i] for batch in found for row in batch)

    assert strip(shared) == strip(alone)  # none lost, none twice
    assert strip(batch for rank in validation for batch in rank) == strip([whole])
    assert len({len(part) for part in validation}) == 1 or rows < size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_an_epoch_of_several_ranks_holds_every_row_once(monkeypatch: pytest.MonkeyPatch, size: int, batch: int) -> None:
    """Whatever is left of the epoch's last round, and in any epoch; a row more than planned only if there is no way."""
    for rows in range(1, 60):

        def plan(rng: np.random.Generator, rows: int = rows) -> list[Any]:
            cut = np.split(rng.permutation(rows), range(batch, rows, batch))
            return [cut[i] for i in rng.permutation(len(cut))]  # a batch that is not full may come at any place

        order = TrainingOrder(plan, -(-rows // batch), rows, seed=0)
        for order.epoch in range(2):
            found: list[Any] = []
            for rank in range(size):
                monkeypatch.setattr(batches, "world", lambda rank=rank: (rank, size))
                share = list(order)
                assert len(share) == len(order)
                found += share
            assert all(len(part) for part in found)
            assert max(map(len, found)) <= batch + (rows % size > 0 and batch == 1)
            if rows >= size:
                assert sorted(np.concatenate(found).tolist()) == list(range(rows))
            else:
                assert set(np.concatenate(found).tolist()) == set(range(rows))


def test_evaluation_order_gives_up_when_rows_are_fewer_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "world", lambda: (1, 2))
    order = EvaluationOrder(lambda: [np.array([0])])
    assert (len(order), list(order)) == (0, [])
    train = TrainingOrder(lambda rng: [np.array([0])], 1, 1, seed=0)
    assert (len(train), len(list(train))) == (1, 1)


# Parts of the training data


def test_validation_is_a_random_share_of_documents(tmp_path: Path) -> None:
    path = table(tmp_path, 50)
    data = bound(Labelling(), 64, tmp_path, train=path, validation_share=0.2, batch_size=100)
    train, validation = (sorted(everything(part)) for part in (data.train_dataloader(), evaluated(data)))
    assert (len(train), len(validation)) == (40, 10)
    lines = [line.split(",")[0] for line in Path(path).read_text().splitlines()[1:]]
    whole = [[i for i in row if i] for row in train + validation]
    assert sorted(whole) == sorted(ids_of(data, line) for line in lines)
    positions = [lines.index(data.tokenizer.decode(row)) for row in validation]
    assert sorted(positions) not in (list(range(10)), list(range(40, 50)))
    assert set(CharTokenizer.trainings[-1]) <= set("abcdef")
    assert len(CharTokenizer.trainings[-1]) == sum(sum(i > 0 for i in row) for row in train)
    assert len(Labelling.learned[-1]) == 40


@pytest.mark.parametrize(("rows", "share", "kept"), [(2, 0.01, 1), (2, 0.9, 1), (10, 0.99, 1), (10, 0.01, 9)])
def test_each_part_gets_at_least_one_row(tmp_path: Path, rows: int, share: float, kept: int) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "ab,x\n" * rows)
    data = bound(Labelling(), 64, tmp_path, train=path, validation_share=share)
    assert len(everything(data.train_dataloader())) == kept
    assert len(everything(evaluated(data))) == rows - kept


def test_no_validation(tmp_path: Path) -> None:
    data = bound(Labelling(), 64, tmp_path, train=table(tmp_path, 9), validation_share=0)
    assert data.val_dataloader() == []
    assert len(everything(data.train_dataloader())) == 9


def test_a_single_row_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: has one row only.*data\.validation"):
        bound(Labelling(), 64, tmp_path, train=table(tmp_path, 1))


# Cache


def counts(folder: Path, path: str, head: Any = None, context: int = 64, **settings: Any) -> tuple[int, int, int]:
    """Return how many tokenizers were trained, heads taught and batches of rows encoded to set up."""
    before = len(CharTokenizer.trainings), len(Labelling.learned), len(Labelling.encoded)
    bound(head or Labelling(), context, folder, train=path, **settings)
    after = len(CharTokenizer.trainings), len(Labelling.learned), len(Labelling.encoded)
    first, second, third = (b - a for a, b in zip(before, after, strict=True))
    return first, second, third


def test_cache_hits_and_misses(tmp_path: Path) -> None:
    path = table(tmp_path, 30)
    assert counts(tmp_path, path) == (1, 1, 2)
    assert counts(tmp_path, path) == (0, 0, 0)
    assert counts(tmp_path, path, batch_size=5, seed=3, num_workers=1) == (0, 0, 0)  # these do not change the rows
    assert counts(tmp_path, path, context=32) == (0, 0, 2)
    assert counts(tmp_path, path, head=Labelling(offset=1)) == (0, 1, 2)
    assert counts(tmp_path, path, validation_share=0.2) == (1, 1, 2)
    assert counts(tmp_path, path, encoding="ascii") == (1, 1, 2)
    assert counts(tmp_path, path, validation=path) == (1, 1, 1)  # the same rows are encoded once
    text = Path(path).read_text()
    Path(path).write_text(text.replace("a,", "b,", 1))  # the same size
    assert counts(tmp_path, path) == (1, 1, 2)
    Path(path).write_text(text)
    assert counts(tmp_path, path) == (0, 0, 0)  # the old content is known


def test_a_tokenizer_of_other_settings_misses(tmp_path: Path) -> None:
    class Lower(CharTokenizer):
        def __init__(self, flag: bool = False) -> None:
            super().__init__()
            self.flag = flag

    path = table(tmp_path, 30)
    assert counts(tmp_path, path, tokenizer=Lower) == (1, 1, 2)
    assert counts(tmp_path, path, tokenizer=lambda: Lower(True))[0] == 1
    assert counts(tmp_path, path, tokenizer=Lower) == (0, 0, 0)


class Arguments(Labelling):
    """A head with an argument of any type."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given


def test_arguments_of_any_type_are_in_the_key(tmp_path: Path) -> None:
    path, words = table(tmp_path, 30), tmp_path / "words.txt"
    words.write_text("a")

    def count(given: Any) -> int:
        return counts(tmp_path, path, head=Arguments(given))[2]

    pairs = [
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (lambda text: text.lower(), lambda text: text.upper()),
        (partial(str.replace, "a"), partial(str.replace, "b")),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
        ({1: {"a", "b"}}, {1: {"a", "c"}}),
        (Path("a"), Path("b")),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
    ]
    for one, other in pairs:
        assert [count(one), count(copy.deepcopy(one)), count(other), count(one)] == [2, 0, 2, 0], one
    assert [count(str(words)), count(str(words))] == [2, 0]
    words.write_text("b")
    assert [count(str(words)), count(str(words))] == [2, 0]


def test_what_cannot_be_described_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, 30)
    assert [counts(tmp_path, path, head=Arguments(threading.Lock()))[1:] for _ in range(2)] == [(1, 2), (1, 2)]
    assert "what Arguments makes of the data is not kept in the cache: attribute 'given'" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("*.*"))) == 6  # until the process ends
    for own in cache._own:
        own.cleanup()
    assert not list((tmp_path / "cache").glob("*.*"))


def test_an_edited_file_of_a_plugin_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts that the plugin imports within a function, by way of another; but not before it is read again."""
    path, helper = table(tmp_path, 30), tmp_path / "edited_helper.py"
    (tmp_path / "edited_package").mkdir()
    (tmp_path / "edited_package" / "__init__.py").write_text("")
    (tmp_path / "edited_package" / "plugin.py").write_text(
        "from data_fakes import Labelling\nfrom . import middle\nclass Edited(Labelling):\n    pass\n"
    )
    (tmp_path / "edited_package" / "middle.py").write_text("def clean(x):\n    import edited_helper\n    return x\n")
    helper.write_text("A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def count() -> tuple[int, int, int]:
        head: Any = importlib.import_module("edited_package.plugin")
        importlib.import_module("edited_helper")
        return counts(tmp_path, path, head=head.Edited())

    try:
        assert [count(), count()] == [(1, 1, 2), (0, 0, 0)]
        helper.write_text("A = 22\n")
        assert count() == (0, 0, 0)  # the code that runs is still the old one
        del sys.modules["edited_helper"]
        assert [count(), count()] == [(0, 1, 2), (0, 0, 0)]
    finally:
        for name in [name for name in sys.modules if name.startswith("edited_")]:
            del sys.modules[name]


def test_a_library_of_another_environment_counts_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that this environment builds on, or the user's own; reading all files of torch would take minutes."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "stacked_library.py").write_text("import stacked_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert identity._Naming(tmp_path, set()).code(["stacked_library"]) == [("stacked_library", "None")]


def test_a_given_tokenizer_and_head_are_used(tmp_path: Path) -> None:
    path = table(tmp_path, 30)
    before = len(CharTokenizer.trainings), len(Labelling.learned)
    head = Labelling()
    head.set_info({"labels": ["z", "y", "x"]})
    data = DataModule(test=path, cache_dir=str(tmp_path / "cache"))  # nothing to train on
    data.bind(head, 64, CharTokenizer("fedcba"), head_ready=True)
    data.setup("test")
    assert data.tokenizer.to_state() == '"fedcba"'
    assert (len(CharTokenizer.trainings), len(Labelling.learned)) == before
    batch = next(iter(data.test_dataloader()))
    text, label = data.tokenizer.decode(batch["ids"][0].tolist()), "zyx"[batch["label"][0]]
    assert f"{text},{label}\n" in Path(path).read_text()


def test_another_process_at_once(tmp_path: Path) -> None:
    """Two writers of one entry do not disturb each other, and a writer that fails leaves nothing."""
    barrier = threading.Barrier(2)
    found = []

    def fill(folder: Path) -> None:
        (folder / "a").write_text("x")
        barrier.wait(10)
        (folder / "b").write_text("y")

    threads = [threading.Thread(target=lambda: found.append(cache.entry(tmp_path, "key", fill))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "key"] * 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "contents.json", "key"]

    def fail(folder: Path) -> None:
        (folder / "a").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.entry(tmp_path, "other", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_file_digest_is_remembered_but_never_stale(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    info = path.stat()
    first = cache.file_digest(path, tmp_path)
    path.write_text("two")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # the same size and time of modification
    assert cache.file_digest(path, tmp_path) != first


# Lightning


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings(
    "error",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*srun. command is available",
    "ignore:.*This process.*is multi-threaded",
)
def test_all_stages_of_a_trainer(tmp_path: Path, num_workers: int) -> None:
    path = table(tmp_path, 30)
    data = DataModule(
        path, path, path, path, tokenizer=CharTokenizer, batch_size=4, num_workers=num_workers,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    model = Recorder(Labelling(), 64)
    run = trainer(tmp_path, max_epochs=2, log_every_n_steps=1)
    run.fit(model, datamodule=data)
    run.validate(model, datamodule=data)
    run.test(model, datamodule=data)
    assert len(run.predict(model, datamodule=data) or []) == 8
    lines = [line.split(",")[0] for line in Path(path).read_text().splitlines()[1:]]
    found = [data.tokenizer.decode(row) for batch in model.seen["predict"] for row in batch]
    assert found == lines  # predictions stand in the order of the rows
    assert [len(model.seen[stage]) for stage in ("train", "validation", "test")] == [16, 2 + 8 * 3, 8]


def test_predicting_with_a_head_that_joins(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "ab\ncd\n\ne\n")
    data = bound(Joining(), 8, tmp_path, train=path, validation=path, predict=path, batch_size=2)
    rows = everything(data.predict_dataloader())
    assert [data.tokenizer.decode(row) for row in rows] == ["ab", "cd", "e"]


def test_splits_travel_to_workers_without_their_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", prose(50_000))
    data = bound(Joining(), 8, tmp_path, train=path, validation=path)
    split = data.split("train")
    first = split[np.array([0, 8])]
    assert len(pickle.dumps(split)) < 10_000
    again = pickle.loads(pickle.dumps(split))[np.array([0, 8])]
    assert torch.equal(first["ids"], again["ids"])
    assert not isinstance(split, Examples)


@pytest.mark.parametrize("pack", [False, True])
def test_what_is_read_from_the_file_is_what_the_mapped_array_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: bool
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(prose(length) for length in (3, 90, 1, 500, 40)))
    data = bound(Joining(), 8, tmp_path, train=str(tmp_path / "a.txt"), documents="line", pack=pack, validation_share=0)
    split = data.split("train")
    assert isinstance(split, Blocks)
    orders = [split.training_order(np.random.default_rng(0)), split.evaluation_order()]
    read = [split[rows] for order in orders for rows in order]
    if pack:
        assert "tokens" not in vars(split)  # nothing was mapped
    monkeypatch.delattr(os, "pread")  # as on Windows
    mapped = pickle.loads(pickle.dumps(split))
    for rows, batch in zip([rows for order in orders for rows in order], read, strict=True):
        again = mapped[rows]
        pairs = [(torch.as_tensor(batch[name]), torch.as_tensor(again[name])) for name in batch]
        assert batch.keys() == again.keys() and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("rows", [0, 1, 7, 24, 1001])
def test_an_order_is_a_permutation_cut_on_demand(rows: int) -> None:
    order = Order(np.random.default_rng(3), rows, 8, 5, 16)
    plain = split_batches(5 + 16 * np.random.default_rng(3).permutation(rows), 8)
    assert len(order) == len(plain)
    assert [batch.tolist() for batch in order] == [batch.tolist() for batch in plain]
    assert all(batch.dtype == np.int64 for batch in order)
    with pytest.raises(IndexError):
        order[len(order)]


def test_blocks_are_quick(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", prose(400_000))
    data = bound(Joining(), 256, tmp_path, train=path, validation=path, batch_size=12)
    loader = data.train_dataloader()
    count = sum(1 for _ in loader)
    within(0.5e-3 * count, lambda: sum(1 for _ in loader))  # 0.05 ms measured


def test_unbound_is_told(tmp_path: Path) -> None:
    data = DataModule(train="x", cache_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="bind"):
        data.setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: must be at least 1"),
        ({"batch_tokens": 0}, r"data\.batch_tokens: must be at least 1"),
        ({"validation_share": 1.0}, r"data\.validation_share: must be"),
        ({"num_workers": -1}, r"data\.num_workers: must be"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataModule(**settings)


def test_another_model_in_the_trainer(tmp_path: Path) -> None:
    """The data follows the module that the trainer runs; what that one knows already is not learned again."""
    path = write(tmp_path / "a.csv", "text,label\n" + "ab,x\nba,y\n" * 10)
    data = DataModule(path, test=path, tokenizer=CharTokenizer, cache_dir=str(tmp_path / "cache"))
    first, second = Recorder(Labelling(), 64), Recorder(Labelling(), 64)
    trainer(tmp_path, max_epochs=1).fit(first, datamodule=data)
    assert data.head is first.head
    second.head.set_info({"labels": ["y", "x"]})
    second.head_ready, second.tokenizer = True, CharTokenizer("ba")
    trainer(tmp_path).test(second, datamodule=data)
    assert data.head is second.head
    assert data.tokenizer is second.tokenizer
    assert sorted(row for batch in second.seen["test"] for row in batch) == [[6, 7]] * 10 + [[7, 6]] * 10

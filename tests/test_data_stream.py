"""Streams give what prepared splits give, in other batches."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_fakes import CharTokenizer, Joining, Labelling, Recorder, bound, trainer
from test_data import check_packed, everything, ids_of, plain_pairs, prose, table, write

from llmkit.contracts import IGNORE
from llmkit.data import DataModule, corpus, module, stream
from llmkit.data.prepare import Item
from llmkit.errors import UserError


@pytest.mark.parametrize("length", [5, 30, 1000])
@pytest.mark.parametrize("shuffle_buffer", [1, 12, 100_000])
def test_blocks_of_a_stream(tmp_path: Path, length: int, shuffle_buffer: int) -> None:
    """An epoch holds all blocks from one offset on; epochs begin at other offsets and have each token as a target."""
    text = "".join(chr(200 + i) for i in range(length))  # each token has a place
    path = write(tmp_path / "a.txt", text)
    settings: Any = {"train": path, "validation": path, "batch_size": 4}
    data = bound(Joining(), 8, tmp_path, streaming=True, shuffle_buffer=shuffle_buffer, **settings)
    tokens = ids_of(data, text)
    loader = data.train_dataloader()
    offsets: set[int] = set()
    places: set[int] = set()
    for _ in range(40):
        starts, num_bytes = [], 0.0
        for batch in loader:
            assert len(batch["ids"]) <= 4
            num_bytes += float(batch["bytes"])
            for ids, targets in zip(batch["ids"].tolist(), batch["targets"].tolist(), strict=True):
                start = tokens.index(ids[0])
                found = tokens[start : start + 9]
                assert [i for i, t in zip(ids, targets, strict=True) if t != IGNORE] == found[:-1]
                assert [t for t in targets if t != IGNORE] == found[1:]
                starts.append(start)
                places.update(range(start + 1, start + len(found)))
        first = min(starts)
        assert sorted(starts) == list(range(first, max(first + 1, length - 8), 8))
        offsets.add(first)
        assert num_bytes == 2 * min(length - 1, 8 * len(starts))
    assert places == set(range(1, length))
    assert offsets == (set(range(8)) if length > 16 else {0})
    order = [everything(loader) for _ in range(2)]
    assert length < 100 or order[0] != order[1]


def test_documents_of_a_stream_end_with_eos(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(prose(30, seed).replace("\n", " ") for seed in range(20)))
    settings: Any = {"train": path, "validation": path, "documents": "line", "batch_size": 1}
    prepared = bound(Joining(), 8, tmp_path, **settings)
    data = bound(Joining(), 8, tmp_path, streaming=True, shuffle_buffer=1, **settings)
    split: Any = prepared.split("train")
    found = list(itertools.chain.from_iterable(everything(data.train_dataloader())))
    tokens = split.tokens.tolist()
    assert found in [tokens[offset : offset + len(found)] for offset in range(8)]
    assert len(found) > len(tokens) - 16


@pytest.mark.parametrize("shuffle_buffer", [1, 4, 1000])
def test_packed_stream(tmp_path: Path, shuffle_buffer: int) -> None:
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcd", k=rng.randint(1, 40))) for _ in range(50)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    settings: Any = {"documents": "line", "pack": True, "batch_size": 4, "shuffle_buffer": shuffle_buffer}
    data = bound(Joining(), 16, tmp_path, train=path, validation=path, streaming=True, **settings)
    pairs = []
    num_bytes = 0.0
    for batch in data.train_dataloader():
        check_packed(batch, 16)
        flat = zip(batch["ids"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True)
        pairs += [pair for pair in flat if pair[1] != IGNORE]
        num_bytes += float(batch["bytes"])
    assert sorted(pairs) == plain_pairs([ids_of(data, line) for line in lines])
    assert num_bytes == pytest.approx(sum(len(line) + 1 for line in lines))  # eos stands for the newline


def rows_of(loader: Any) -> Counter[tuple[int, ...]]:
    return Counter(tuple(i for i in row if i) for row in everything(loader))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("settings", [{"batch_size": 7}, {"batch_tokens": 90}])
def test_examples_of_a_stream(tmp_path: Path, num_workers: int, settings: dict[str, Any]) -> None:
    path = table(tmp_path, 100)
    plain = rows_of(bound(Labelling(), 64, tmp_path, train=path, validation_share=0).train_dataloader())
    data = bound(
        Labelling(), 64, tmp_path, train=path, validation=path, streaming=True, shuffle_buffer=30,
        num_workers=num_workers, **settings,
    )  # fmt: skip
    loader = data.train_dataloader()
    epochs = [everything(loader), everything(loader)]
    assert Counter(tuple(i for i in row if i) for row in epochs[0]) == plain
    assert epochs[0] != epochs[1]
    assert everything(data.train_dataloader()) == epochs[0]
    if "batch_tokens" in settings:
        assert all(batch["ids"].numel() <= 90 for batch in loader)


def test_ranks_read_different_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path, 60)
    plain = rows_of(bound(Labelling(), 64, tmp_path, train=path, validation_share=0).train_dataloader())
    found = []
    for rank in range(3):
        monkeypatch.setattr(module, "world", lambda rank=rank: (rank, 3))
        data = bound(Labelling(), 64, tmp_path, train=path, validation=path, streaming=True, batch_size=5)
        # With several ranks a stream begins again at its end.
        found += everything(itertools.islice(data.train_dataloader(), 4))
        next(itertools.islice(data.train_dataloader(), 9, None))
    assert Counter(tuple(i for i in row if i) for row in found) == plain


def test_validation_is_the_head_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT", (6, 10**6))
    monkeypatch.setattr(module, "SAMPLE", (5, 10**6))
    path = table(tmp_path, 40)
    texts = [line.split(",")[0] for line in Path(path).read_text().splitlines()[1:]]
    data = bound(Labelling(), 64, tmp_path, train=path, streaming=True)
    assert CharTokenizer.trainings[-1] == "".join(texts[6:11])
    assert rows_of(data.val_dataloader()) == Counter(tuple(ids_of(data, text)) for text in texts[:6])
    assert rows_of(data.train_dataloader()) == Counter(tuple(ids_of(data, text)) for text in texts[6:])


def test_too_few_rows_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "world", lambda: (2, 3))
    path = table(tmp_path, 2)
    data = bound(Labelling(), 64, tmp_path, train=path, validation=path, streaming=True)
    with pytest.raises(UserError, match="too few rows for 3 readers"):
        next(iter(data.train_dataloader()))


def test_streams_travel_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where workers are not forked."""
    monkeypatch.setattr(corpus, "HELD_OUT", (6, 10**6))
    for settings in ({}, {"validation": table(tmp_path, 5, "v.csv")}):
        data = bound(Labelling(), 64, tmp_path, train=table(tmp_path, 40), streaming=True, **settings)
        plain = data.train_dataloader().dataset
        assert everything(pickle.loads(pickle.dumps(plain))) == everything(plain)


def test_limits_of_the_head_of_a_stream() -> None:
    items = [Item({"text": "abc", "label": 1}, i) for i in range(10)]
    assert len(list(stream.take(items, (4, 100)))) == 4
    assert len(list(stream.take(items, (100, 7)))) == 3
    assert len(list(stream.take(items, (100, 1)))) == 1
    assert len(list(stream.take(items, (100, 100)))) == 10


def test_a_short_stream_needs_validation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: all 40 rows would be set aside for validation\. Set"):
        bound(Labelling(), 64, tmp_path, train=table(tmp_path, 40), streaming=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_as_a_stream(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("train", 30), ("validation", 5)):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(size)))
    settings: Any = {"source": str(source), "documents": "line", "streaming": True, "num_workers": num_workers}
    data = bound(Joining(), 8, tmp_path, pack=True, batch_size=4, **settings)
    batches = list(data.train_dataloader())
    found = [piece for batch in batches for piece in check_packed(batch, 8)]
    starts = sorted(data.tokenizer.decode(piece) for piece in found if piece[0] == data.tokenizer.bos_id)
    assert starts == sorted(f"train{i}"[:8] for i in range(30))
    assert len(data.split("validation")) == 5 * len("validation0") + 5


def test_a_stream_in_a_trainer(tmp_path: Path) -> None:
    path = table(tmp_path, 40)
    data = DataModule(
        train=path, validation=path, tokenizer=CharTokenizer, streaming=True, batch_size=8, cache_dir=str(tmp_path)
    )
    model = Recorder(Labelling(), 64)
    trainer(tmp_path, max_steps=12, max_epochs=-1).fit(model, datamodule=data)
    assert len(model.seen["train"]) == 12
    assert len(model.seen["validation"]) == 2 + 5 * 2
    with pytest.raises(UserError, match="overfit_batches"):
        trainer(tmp_path, max_steps=12, overfit_batches=1).fit(Recorder(Labelling(), 64), datamodule=data)

"""Which rows of ``data.train`` are trained on: shares, folds, limits, and columns that a split has of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from command import TINY, done
from data_fakes import CharTokenizer, Joining, Labelling, bound

from llmkit.data import DataModule
from llmkit.errors import UserError


def table(folder: Path, rows: int) -> str:
    path = folder / "a.csv"
    path.write_text("text,label\n" + "".join(f"{number:03},x\n" for number in range(rows)))
    return str(path)


def texts(data: DataModule, *stages: Any) -> list[list[str]]:
    """Return the texts of each stage, in the order of the rows."""
    found = []
    for stage in stages:
        split: Any = data.split(stage)
        found.append([data.tokenizer.decode(split.features[i]["ids"]) for i in range(len(split))])
    return found


def test_a_share_for_testing(tmp_path: Path) -> None:
    path = table(tmp_path, 50)
    data = bound(Labelling(), 8, tmp_path, train=path, validation_share=0.2, test_share=0.1)
    train, validation, test = texts(data, "train", "validation", "test")
    assert (len(train), len(validation), len(test)) == (35, 10, 5)
    assert sorted(train + validation + test) == [f"{number:03}" for number in range(50)]
    assert CharTokenizer.trainings[-1] == "".join(train)
    # The validation rows are those of a run without a test part, and a test part can do without validation.
    assert texts(bound(Labelling(), 8, tmp_path, train=path, validation_share=0.2), "validation") == [validation]
    alone = bound(Labelling(), 8, tmp_path, train=path, validation_share=0, test_share=0.1)
    assert texts(alone, "test") == [test]
    assert len(texts(alone, "train")[0]) == 45 and alone.val_dataloader() == []
    given = bound(Labelling(), 8, tmp_path, train=path, validation=path, test_share=0.1)
    assert [len(part) for part in texts(given, "train", "validation", "test")] == [45, 50, 5]


def test_folds(tmp_path: Path) -> None:
    path = table(tmp_path, 53)
    tested = []
    for fold in range(5):
        data = bound(Labelling(), 8, tmp_path, train=path, validation_share=0.1, folds=5, fold=fold)
        train, validation, test = texts(data, "train", "validation", "test")
        assert len(validation) == 5 and len(test) in (10, 11)
        assert sorted(train + validation + test) == [f"{number:03}" for number in range(53)]
        tested += test
    assert sorted(tested) == [f"{number:03}" for number in range(53)]  # each row is tested once


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"test_share": 1.0}, r"data\.test_share: must be 0 or more and below 1, got 1\.0"),
        ({"test_share": 0.95}, r"data\.test_share: leaves nothing to train on"),
        ({"folds": 1}, r"data\.folds: must be at least 2"),
        ({"folds": 3, "fold": 3}, r"data\.fold: expected 0 to 2, got 3"),
        ({"fold": 1}, r"data\.fold: expected data\.folds to be set"),
        ({"folds": 3, "test_share": 0.1}, r"data\.folds: cannot be combined with data\.test_share"),
        ({"folds": 3, "test": "b.csv"}, r"data\.folds: cuts the test part from data\.train, but data\.test is set"),
        ({"test_share": 0.1, "streaming": True}, r"data\.test_share: cannot be combined with data\.streaming"),
        ({"limit": 5, "streaming": True}, r"data\.limit: cannot be combined with data\.streaming"),
        ({"limit": 0}, r"data\.limit: must be at least 1, got 0"),
        ({"limit": {"trian": 5}}, r"data\.limit: unknown split 'trian'\. Did you mean 'train'\?"),
        ({"folds": 10}, r"data\.train: has 4 rows, too few for 10 parts"),
        ({"columns": {"tst": {"text": "a"}}}, r"data\.columns: a mapping is for a split .*, 'tst' is none"),
        ({"columns": {"label": ["text", "label"]}}, r"data\.columns\.label: is not a text: it is read from one column"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        bound(Labelling(), 8, tmp_path, train=table(tmp_path, 4), **settings)


def test_a_limit_takes_random_rows_and_a_larger_one_adds_to_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, 60)
    found = {}
    for limit in (5, 20, 100):
        data = bound(Labelling(), 8, tmp_path, train=path, validation_share=0.1, limit={"train": limit})
        found[limit], validation = texts(data, "train", "validation")
        assert len(validation) == 6
        assert CharTokenizer.trainings[-1] == "".join(found[limit])
    assert [len(rows) for rows in found.values()] == [5, 20, 54]
    assert set(found[5]) < set(found[20]) < set(found[100])
    assert found[20] == sorted(found[20]) != found[100][:20]
    assert "note: data.train: at most 20 rows are used (data.limit)\n" in capsys.readouterr().err
    data = bound(Labelling(), 8, tmp_path, train=path, validation=path, test=path, predict=path, limit=7)
    assert [len(rows) for rows in texts(data, "train", "validation", "test", "predict")] == [7, 7, 7, 60]


def joined(folder: Path, sizes: list[int], **settings: Any) -> tuple[list[str], DataModule]:
    contents = ["".join(chr(97 + (i + k) % 26) for i in range(size)) for k, size in enumerate(sizes)]
    for k, content in enumerate(contents):
        (folder / f"{k:02}.txt").write_text(content)
    return contents, bound(Joining(), 8, folder, train=str(folder / "*.txt"), **settings)


def stream(data: DataModule, stage: Any) -> list[str]:
    split: Any = data.split(stage)
    ids: list[int] = split.tokens.tolist()
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == data.tokenizer.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [data.tokenizer.decode(document) for document in documents if document]


@pytest.mark.parametrize("sizes", [[1000, 25], [25, 1000], [500, 500, 500], [700]])
def test_a_share_is_a_share_of_the_text(tmp_path: Path, sizes: list[int]) -> None:
    """Two files, one of them tiny: whole files would train on the tiny one, or validate on it."""
    contents, data = joined(tmp_path, sizes, validation_share=0.1, test_share=0.2)
    borders = [(int(size * (1 - 0.1 - 0.2)), int(size * 0.8)) for size in sizes]
    pairs = list(zip(contents, borders, strict=True))
    assert stream(data, "train") == [text[:first] for text, (first, _) in pairs]
    assert stream(data, "validation") == [text[first:second] for text, (first, second) in pairs]
    assert stream(data, "test") == [text[second:] for text, (_, second) in pairs]


def test_many_texts_stay_whole(tmp_path: Path) -> None:
    contents, data = joined(tmp_path, [50 + 5 * (k % 3) for k in range(20)], validation_share=0.1)
    train, validation = stream(data, "train"), stream(data, "validation")
    assert (len(train), len(validation)) == (18, 2)
    assert sorted(train + validation) == sorted(contents)


def test_the_same_file_under_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(table(tmp_path, 9))
    os.symlink(path, "link.csv")
    os.link(path, "hard.csv")
    names = ["a.csv", "./a.csv", str(path), "link.csv", "hard.csv", "*.csv"]
    data = bound(Labelling(), 8, tmp_path, train=names, validation_share=0)
    assert len(data.split("train")) == 9


def test_columns_of_a_split_and_several_for_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body,label\na,b,x\nc,d,x\n")
    (tmp_path / "b.csv").write_text("review,score\na b,x\n")
    columns = {"text": ["title", "body"], "predict": {"text": "review"}, "test": {"text": "review", "label": "score"}}
    first, second = str(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    files: Any = {"train": first, "validation": first, "test": second, "predict": second}
    data = bound(Labelling(), 8, tmp_path, columns=columns, **files)
    assert texts(data, "train", "test", "predict") == [["a\nb", "c\nd"], ["ab"], ["ab"]]  # the blank is unknown


def test_a_fold_is_trained_and_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text("title,body,label\n" + "good,day,1\nbad,night,0\n" * 10)
    words = ("--data.train", "reviews.csv", "--data.columns.text", "[title, body]", "--model.head", "classification")
    run = done("fit", *words, "--data.folds", "5", "--data.fold", "2", "--data.limit.train", "12", *TINY)
    tested = done("test", "--ckpt_path", run.checkpoint, "--trainer.enable_progress_bar", "false")
    assert "accuracy" in tested.out


def test_rows_that_two_splits_have_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("train", "ax bx cx ax dx ex"), ("valid", "ay fx bx"), ("test", "gx cx")):
        rows = "".join(f"{row[0]},{row[1]}\n" for row in content.split())
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}z,y\n" if name == "train" else f"text,label\n{rows}")
    train, valid, test = (str(tmp_path / f"{name}.csv") for name in ("train", "valid", "test"))
    files: Any = {"train": train, "validation": valid, "test": test}
    says = "llmkit: note: data.{}: {} rows have the text of a row of data.train\n"
    for _ in range(2):  # read, then from the cache
        data = bound(Labelling(), 8, tmp_path, **files)
        data.setup("fit")
        assert capsys.readouterr().err == says.format("validation", "2 of 3")  # another label is the same text
    again = DataModule(**files, cache_dir=str(tmp_path / "cache"))
    again.bind(data.head, 8, data.tokenizer, head_ready=True)
    again.setup("test")  # the training rows are in the cache
    assert capsys.readouterr().err == says.format("test", "1 of 2")
    os.remove(train)
    away = DataModule(**files, cache_dir=str(tmp_path / "cache"))
    away.bind(data.head, 8, data.tokenizer, head_ready=True)
    away.setup("test")
    assert capsys.readouterr().err == ""

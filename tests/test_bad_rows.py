"""Rows that cannot be used: named and refused, or left out and counted; damaged caches; files of any bytes at all."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from data_fakes import CharTokenizer, Joining, Labelling, Translating, bound

from llmkit.contracts import Tokenizer
from llmkit.data import cache, formats, hub
from llmkit.data.tokens import Ending, Piece, write_tokens
from llmkit.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

GOOD = '{"text": "a", "label": "x"}\n'
LABEL = r"(?P<label>\w)\|(?P<text>.+)"
UTF8 = r"is not utf-8 text\. Set data\.encoding to the encoding of the file"


def table(text: list[Any], label: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": text, "label": label}), sink)
    return bytes(sink.getvalue())


def invalid_utf8() -> bytes:
    """Return a table whose second text is one byte that is no UTF-8."""
    offsets = pyarrow.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xffc")])
    return table(text, ["x", "x", "y"])


def twice_named() -> bytes:
    sink = pyarrow.BufferOutputStream()
    columns = [pyarrow.array(["a", "b"]), pyarrow.array(["x", "y"]), pyarrow.array(["y", "y"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "label", "label"]), sink)
    return bytes(sink.getvalue())


def question(text: Any, answers: Any = None) -> dict[str, Any]:
    return {"question": text, "answers": answers if answers is not None else [{"text": "x", "answer_start": 0}]}


def squad(*questions: Any) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": questions}]}]})


def loaded(folder: Path, path: str, on_bad_row: Any = "skip", **options: Any) -> list[str]:
    """Return the texts of the training rows, as they went through the whole data layer."""
    data = bound(options.pop("head", None) or Labelling(), 16, folder, train=path, validation_share=0,
                 on_bad_row=on_bad_row, **options)  # fmt: skip
    split: Any = data.split("train")
    return [data.tokenizer.decode(split.features[i]["ids"]) for i in range(len(split))]


class Case:
    """A file with one bad row among good ones: how it is named, and which texts are left."""

    def __init__(self, name: str, content: str | bytes, says: str, left: str, **options: Any) -> None:
        self.name, self.says, self.left, self.options = name, says, left, options
        self.content = content if isinstance(content, bytes) else content.encode()


ROW = [
    Case("a.jsonl", GOOD + "{\n" + GOOD, r"a\.jsonl:2 is not JSON: ", "aa"),
    Case("a.jsonl", GOOD + "[3]\n", r"a\.jsonl:2 holds list, expected an object", "a"),
    Case("a.jsonl", GOOD + "[" * 5000 + "\n" + GOOD, r"a\.jsonl:2 is not JSON: nested too deeply", "aa"),
    Case("a.jsonl", GOOD + '{"text": 1' + "0" * 5000 + "}\n", r"a\.jsonl:2 is not JSON: Exceeds the limit", "a"),
    Case("a.jsonl", GOOD.encode() + b'{"text": "\xff", "label": "x"}\n', rf"a\.jsonl:2 {UTF8}", "a"),
    Case("a.jsonl", GOOD + '{"text": "b"}\n', r"a\.jsonl:2 has no column 'label' for the head's field", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"x"', "null"), r"a\.jsonl:2 has an empty cell \(null\) in column", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"x"', "NaN"), r"a\.jsonl:2 has an empty cell \(NaN\) in column", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"a"', "3"), r"a\.jsonl:2 has int, expected text or a list of texts, in", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"a"', '["a", {}]'), r"a\.jsonl:2 has list, expected text", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"a"', '"\\ud800"'), r"a\.jsonl:2 holds a lone surrogate.*'text'", "a"),
    Case("a.jsonl", GOOD + GOOD.replace('"a"', '"\\u0000"'), r"a\.jsonl:2 holds a NUL character in column", "a"),
    Case("a.jsonl", GOOD + "\0\n", r"a\.jsonl:2 holds a NUL character: is it text, and in utf-8", "a"),
    Case("a.json", f"[{GOOD}, 3, {GOOD}]", r"a\.json:2 holds int, expected an object", "aa"),
    Case("a.json", f"[{GOOD}, {{}}]", r"a\.json:2 has no column 'text'.* Columns: \(none\)", "a"),
    Case("a.csv", "text,label\na,x\nb\n\nc,y\n", r"a\.csv:3 has 1 cells, expected 2: text, label", "ac"),
    Case("a.csv", "text,label\na,x\nb,x,\nc,y\n", r"a\.csv:3 has 3 cells, expected 2: text, label", "ac"),
    Case("a.csv", "text,label,label\na,x,y\nb,x,y\n", r"a\.csv:2 has more than one value", ""),
    Case("a.jsonl", GOOD + GOOD.replace("}", ', "label": "y"}'), r"a\.jsonl:2 has more than one value", "a"),
    Case("a.parquet", twice_named(), r"a\.parquet:1 has more than one value", ""),
    Case("a.csv", "a,x\n\xe9,x\nc,y\n".encode("latin-1"), rf"a\.csv:2 {UTF8}", "ac", column_names=["text", "label"]),
    Case("a.csv", 'text,label\na,x\n"b"b,x\nc,y\n', r"a\.csv:3 is not CSV: ',' expected after '\"' ", "ac"),
    Case("a.csv", 'text,label\na,x\n"b,x\nc,y\nd,"y"\ne,y\n', r"a\.csv:3 is not CSV: .* \(up to line 5\)", "ae"),
    Case("a.csv", 'text,label\na,x\n"b,x\nc,y\n\nd,x\n', r"a\.csv:3 opens a quotation mark that is not closed", "acd"),
    Case("a.csv", 'text,label\na,x\nc,y\nd,"y\n', r"a\.csv:4 opens a quotation mark that is not closed", "ac"),
    Case("a.csv", "text,label\na,x\n\0,x\n", r"a\.csv:3 holds a NUL character: is it text", "a"),
    Case("a.tsv", 'text\tlabel\n"\tx\nb\nc\ty\n', r"a\.tsv:3 has 1 cells, expected 2: text, label", '"c'),
    Case("a.tsv", "text\tlabel\na\tx\n\xe9\tx\n".encode("latin-1"), rf"a\.tsv:3 {UTF8}", "a"),
    Case("a.txt", "x|a\n\nx,b\ny|c\n", r"a\.txt:3 does not match data\.pattern: 'x,b'", "ac", pattern=LABEL),
    Case("a.txt", b"x|a\nx|\xff\ny|c\n", rf"a\.txt:2 {UTF8}", "ac", pattern=LABEL),
    Case("a.parquet", table(["a", None, "c"], ["x", "x", "y"]), r"a\.parquet:2 has an empty cell \(null\)", "ac"),
    Case("a.parquet", table([b"a", b"b"], ["x", "y"]), r"a\.parquet:1 has bytes, expected text", ""),
    Case("a.parquet", table(["a", "b"], [b"x", b"y"]), r"a\.parquet:1 has bytes, .* in column 'label'", ""),
    Case("a.parquet", invalid_utf8(), r"a\.parquet:2 cannot be read: UnicodeDecodeError", "ac"),
    Case("a.conll", "a x\n\nb\nb x\n\nc y\n", r"a\.conll:3 has no 'tags'", "ac", format="conll"),
    Case("a.conll", "a\tx\n\nb\tx\n\tx\n\nc\ty\n", r"a\.conll:4 does not begin with a word", "ac", format="conll"),
    Case("a.conll", b"a x\n\nb x\n\xff x\nb x\n\nc y\n", rf"a\.conll:4 {UTF8}", "ac", format="conll"),
    Case("a.json", squad(question("a"), question(3), question("c")),
         r"a\.json:2 \(data\[0\]\.paragraphs\[0\]\.qas\[1\]\) has no str 'question'", "ac", format="squad"),
    Case("a.json", squad(question("a"), question("b", [{"text": 1}]), question("c")),
         r"a\.json:2 \(data\[0\]\.paragraphs\[0\]\.qas\[1\]\) has no str 'text'", "ac", format="squad"),
]  # fmt: skip


class Sentences(Labelling):
    """A sentence, and its tags as one label."""

    inputs, texts, targets = ("text",), ("text",), ("label",)

    def learn(self, columns: Mapping[str, Any]) -> None:
        super().learn({"label": ["".join(tags) for tags in columns["label"]]})

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        return super().encode({**rows, "label": ["".join(tags) for tags in rows["label"]]}, tokenizer, max_length)


COLUMNS = {"conll": {"text": "tokens", "label": "tags"}, "squad": {"text": "question", "label": "context"}}


def prepared(folder: Path, case: Case) -> tuple[str, dict[str, Any]]:
    path = folder / case.name
    path.write_bytes(case.content)
    head = Sentences() if case.options.get("format") == "conll" else Labelling()
    return str(path), {"columns": COLUMNS.get(case.options.get("format", "")), "head": head, **case.options}


@pytest.mark.parametrize("case", ROW, ids=lambda case: case.says)
def test_a_bad_row(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    path, options = prepared(tmp_path, case)
    with pytest.raises(UserError, match=rf"^data\.train: /.*/{case.says}") as caught:
        loaded(tmp_path, path, "error", **options)
    assert "\n" not in str(caught.value)
    if not case.left:
        with pytest.raises(UserError, match=rf"^data\.train: no rows in {case.name}: 2 of 2 rows skipped: {case.says}"):
            loaded(tmp_path, path, **options)
        return
    assert "".join(loaded(tmp_path, path, **options)) == case.left
    assert f"note: data.train: 1 of {len(case.left) + 1} rows skipped: {case.name}:" in capsys.readouterr().err


def test_several_bad_rows_in_one_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are read several times; rows are counted once, and told of again when all comes from the cache."""
    (tmp_path / "a.jsonl").write_text((GOOD + "{\n") * 2 + "[]\n")
    (tmp_path / "b.jsonl").write_text(GOOD.replace('"a"', '"b"') + "{\n" * 1200)
    wrong = "is not JSON: Expecting property name enclosed in double quotes"
    told = (
        f"llmkit: note: data.train: 1,203 of 1,206 rows skipped: a.jsonl:2 {wrong}; a.jsonl:4 {wrong}; "
        "a.jsonl:5 holds list, expected an object; and 1,200 more\n"
    )
    for _ in range(2):
        assert loaded(tmp_path, str(tmp_path / "*.jsonl")) == ["a", "a", "b"]
        assert capsys.readouterr().err == told
    data = bound(Labelling(), 16, tmp_path, train=str(tmp_path / "*.jsonl"), validation_share=0, on_bad_row="skip")
    data.split("train")
    data.setup()
    assert capsys.readouterr().err == told


def test_parts_of_a_split_tell_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "ab,x\n" * 20 + "c\n" + "ab,x\n" * 20)
    data = bound(Labelling(), 16, tmp_path, train=str(path), on_bad_row="skip")
    assert [len(data.split(stage)) for stage in ("train", "validation")] == [36, 4]
    assert capsys.readouterr().err.count("1 of 41 rows skipped") == 1
    bound(Labelling(), 16, tmp_path, train=str(path), validation=str(path), on_bad_row="skip")
    told = capsys.readouterr().err
    for stage in ("train", "validation"):
        assert told.count(f"data.{stage}: 1 of 41 rows skipped: a.csv:22 has") == 1


def test_the_setting_is_part_of_what_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\nb\n")
    assert loaded(tmp_path, str(path)) == ["a"]
    with pytest.raises(UserError, match=r"a\.csv:3 has 1 cells"):
        loaded(tmp_path, str(path), "error")


def test_a_column_that_no_row_has_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.data import rows

    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3)
    says = r"a\.jsonl:1 has no column 'txt' for the head's field 'text'\. Did you mean 'text'\? Columns: text, label\."
    for part in ({"validation_share": 0}, {"validation": str(path)}, {}):
        with pytest.raises(UserError, match=rf"^data\.train: no rows in a\.jsonl: 3 of 3 rows skipped: {says}"):
            bound(Labelling(), 16, tmp_path, train=str(path), columns={"text": "txt"}, on_bad_row="skip", **part)
    monkeypatch.setattr(rows, "GIVE_UP", 2)  # an endless stream is not read to its end
    with pytest.raises(UserError, match=rf"^data\.train: the first 2 rows are bad: {says}"):
        loaded(tmp_path, str(path), columns={"text": "txt"})


def test_the_advice_to_skip_is_for_rows_after_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, advised in (("{\n" + GOOD, False), (GOOD + "{\n", True)):
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            loaded(tmp_path, str(path), "error")
        assert ("data.on_bad_row: skip" in str(caught.value)) == advised


FILE = [
    ("a.csv", b"", "no rows in"),
    ("a.csv", 'text,label\na,x\n'.encode("utf-16"), rf"a\.csv:1 {UTF8}"),
    ("a.csv", "text,label\na,x\n".encode("utf-16-le"), r"a\.csv:1 holds a NUL character: is it text, and in utf-8"),
    ("a.csv", b"\x7fELF\x02\x01\0\0\xff\xfe\n\x80", rf"a\.csv:1 {UTF8}"),
    ("a.csv", b'"text,label\na,x\n', r"a\.csv:1 opens a quotation mark that is not closed"),
    ("a.json", b"", "no rows in"),
    ("a.json", GOOD.encode("utf-16"), rf"(no rows in a\.json: 2 of 2 rows skipped: )?a\.json:1 {UTF8}"),
    ("a.json", f"[{GOOD},{GOOD}".encode(), r"a\.json:3 is not JSON: Expecting ',' delimiter"),
    ("a.json", b"[" * 5000, r"a\.json is not JSON: nested too deeply"),
    ("a.json", b'[{"text": 1' + b"0" * 5000 + b"}]", r"a\.json is not JSON: Exceeds the limit"),
    ("a.json", b'[{"text": "\xff', rf"a\.json:1 {UTF8}"),
    ("a.parquet", b"", r"a\.parquet: ArrowInvalid: "),
    ("a.parquet", table(["a"] * 9, ["x"] * 9)[:-20], r"a\.parquet: ArrowInvalid: "),
]  # fmt: skip


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(("name", "content", "says"), FILE)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str, on_bad_row: str) -> None:
    """It is an error whatever the setting: its rows are not known."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train: (/.*/)?{says}") as caught:
        loaded(tmp_path, str(tmp_path / name), on_bad_row)
    assert "\n" not in str(caught.value)


def test_bad_lines_are_left_out_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "CHUNK", 8)  # the second chunk is bad as a whole
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntw\xff\nthree\n\x00six\x00\x00\n\xff\nfour\xc3\xa9")
    options: Any = {"train": str(path), "validation": str(path)}
    with pytest.raises(UserError, match=rf"^data\.train: /.*/a\.txt:2 {UTF8}$"):
        bound(Joining(), 4, tmp_path, **options)
    data = bound(Joining(), 4, tmp_path, on_bad_row="skip", **options)
    tokens: Any = data.split("train")
    assert data.tokenizer.decode(tokens.tokens.tolist()) == "one\nthree\nfouré"
    told = capsys.readouterr().err
    assert "data.train: 3 of 6 rows skipped: a.txt:2 is not utf-8 text" in told
    assert "a.txt:4 holds a NUL character" in told


def test_a_pair_is_skipped_as_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.en").write_bytes(b"a\nb\xff\nc\nd\n")
    (tmp_path / "a.de").write_bytes(b"e\nf\n\xfe\nh\n")
    files: Any = {"source": str(tmp_path / "a.en"), "target": str(tmp_path / "a.de")}
    with pytest.raises(UserError, match=rf"^data\.train: /.*/a\.en:2 {UTF8} \(to leave"):
        bound(Translating(), 8, tmp_path, train=files, validation_share=0)
    data = bound(Translating(), 8, tmp_path, train=files, validation_share=0, on_bad_row="skip")
    split: Any = data.split("train")
    assert [data.tokenizer.decode(split.features[i][name]) for i in range(2) for name in files] == ["a", "e", "d", "h"]
    told = capsys.readouterr().err
    assert "2 of 4 rows skipped: a.en:2 is not utf-8 text" in told
    assert "; a.de:3 is not" in told


def refuse(rows: Mapping[str, list[Any]]) -> None:
    for text in rows["text"]:
        if "z" in text:
            raise UserError(f"no\n{text}")


class Refusing(Labelling):
    """Refuses texts with 'z', and learning of the label 'w'."""

    def learn(self, columns: Mapping[str, Any]) -> None:
        labels = []
        for label in columns["label"]:
            if label == "w":
                raise UserError("no label")
            labels.append(label)
        if "only" in labels:
            raise UserError("one label only")
        super().learn({"label": labels})

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        refuse(rows)
        return super().encode(rows, tokenizer, max_length)


class Refining(Joining):
    """Refuses texts with 'z'."""

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        refuse(rows)
        return super().encode(rows, tokenizer, max_length)


def test_rows_that_the_head_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    texts = ["ab"] * 700 + ["zc"] + ["ab"] * 700 + ["zd", "zc", "b"]
    path.write_text("text,label\nd\n" + "".join(f"{text},x\n" for text in texts))
    before = len(Labelling.encoded)
    found = loaded(tmp_path, str(path), head=Refusing())
    assert found == [text for text in texts if "z" not in text]
    assert len(Labelling.encoded) - before < 40  # not row by row
    told = capsys.readouterr().err
    assert "data.train: 1 of 1,405 rows skipped: a.csv:2 has 1 cells" in told
    refused = "a.csv:703 is refused by the head: no zc; a.csv:1404 is refused by the head: no zd; a.csv:1405 is"
    assert f"data.train: 3 of 1,405 rows skipped: {refused}" in told
    path.write_text("text,label\na,x\nz,x\n")
    with pytest.raises(UserError, match=r"^data\.train: /.*/a\.csv:3 is refused by the head: no z$"):
        loaded(tmp_path, str(path), "error", head=Refusing())
    path.write_text("text,label\nz,x\nz,x\n")
    with pytest.raises(UserError, match=r"^data\.train: no rows in a\.csv: 2 of 2 rows skipped: a\.csv:2 is refused"):
        loaded(tmp_path, str(path), head=Refusing())


def test_what_a_head_cannot_learn_from_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for label, says in (("w", r"/.*/a\.csv:3: no label"), ("only", "one label only")):
        path.write_text(f"text,label\na,x\nb,{label}\nc,x\n")
        with pytest.raises(UserError, match=rf"^data\.train: {says}$"):
            loaded(tmp_path, str(path), head=Refusing())


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["x", "y"])

    class Data(list[Any]):
        features: ClassVar[dict[str, Any]] = {"text": datasets.Value("string"), "label": labels}

    rows = Data({"text": text, "label": label} for text, label in (("a", 0), (None, 1), ("c", 2), ("d", 1)))
    builder = type("Builder", (), {"info": type("Info", (), {"splits": {"train": 0}}), "config_id": "c", "hash": "1"})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    data = bound(Labelling(), 16, tmp_path, source="name", validation_share=0, on_bad_row="skip")
    assert len(data.split("train")) == 2
    told = "2 of 4 rows skipped: train:2 has an empty cell (null) in column 'text'; train:3 has a class number that"
    assert f"data.train: {told}" in capsys.readouterr().err

    class Breaks(Data):
        def __iter__(self) -> Any:
            yield {"text": "a", "label": 0}
            raise RuntimeError("broken\nshard")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Breaks())
    with pytest.raises(UserError, match=r"^data\.train: 'name' cannot be read after row 1 of 'train': broken shard$"):
        list(hub.Hub("name", None, False).rows("data.train", "train").read())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream(tmp_path: Path, num_workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The first bad row is told at once, the number at the end of each pass, by one reader."""
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_text("text,label\nab,x\nb\n" + "ba,x\n" * 20 + "z,x\nc,d,e\n")
    other.write_text("text,label\nab,x\n")
    data = bound(Refusing(), 16, tmp_path, train=str(path), validation=str(other), streaming=True, on_bad_row="skip",
                 batch_size=4, num_workers=num_workers)  # fmt: skip
    assert capfd.readouterr().err == ""
    loader = data.train_dataloader()
    for _ in range(2):
        assert sum(len(batch["ids"]) for batch in loader) == 21
        first, *rest = capfd.readouterr().err.splitlines()
        assert first == "llmkit: note: data.train: skipped: a.csv:3 has 1 cells, expected 2: text, label"
        # The refused row is the 22nd: with two readers the second one gets it, which tells nothing.
        assert len(rest) == 1
        assert f"data.train: {2 if num_workers else 3} of 24 rows skipped: a.csv:3 has 1 cells" in rest[0]


def test_a_stream_of_refused_rows(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("z\n" * 9)
    other.write_text("ab\nab\n")
    data = bound(Refining(), 4, tmp_path, train=str(path), validation=str(other), streaming=True, on_bad_row="skip",
                 documents="line")  # fmt: skip
    with pytest.raises(UserError, match=r"^data\.train: 9 of 9 rows skipped: a\.txt:1 is refused by the head: no z; "):
        list(data.train_dataloader())


# The cache


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if path.name != "files")


@pytest.mark.parametrize("joins", [False, True])
def test_damaged_entries_are_made_again(tmp_path: Path, joins: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("a.txt" if joins else "a.csv")
    path.write_text("abc " * 50 if joins else "text,label\n" + "ab,x\n" * 30)
    options: Any = {"train": str(path), "pack": joins, "validation_share": 0, "batch_size": 2}

    def batches() -> list[Any]:
        data = bound(Joining() if joins else Labelling(), 16, tmp_path, **options)
        found = data.train_dataloader()
        return [{name: torch.as_tensor(value).tolist() for name, value in batch.items()} for batch in found]

    expected = batches()
    files = [file for entry in entries(tmp_path) for file in sorted(entry.iterdir())]
    names = {"contents.json", "state.json", "skipped.json", "rows.npy"}
    assert {file.name for file in files} == names | (
        {"tokens.bin", "starts.npy", "meta.json"} if joins else {"values.npz", "ends.npz", "info.json"}
    )
    capsys.readouterr()
    for file in files:
        whole = file.read_bytes()
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        for damaged in (whole[:half], b"", flipped if file.suffix != ".bin" else b"", None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            assert batches() == expected
            told = capsys.readouterr().err
            assert told.count("\n") == 1
            assert f"note: the cache entry {file.parent} is damaged (" in told or file.name == "contents.json"
            assert file.stat().st_size == len(whole)  # made again
    assert len(entries(tmp_path)) == len({file.parent for file in files})


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2

    def left(name: str, hours: float, inside: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_text("x")
        for path, age in ((tmp_path / name / "tokens.bin", inside), (tmp_path / name, hours)):
            then = time.time() - age * 3600
            os.utime(path, (then, then))

    left(f"{key}.abcd_123", 25, 25)
    left(f"{key}.abcd_124", 25, 1)  # still written to
    left(f"{key}.abcd_125", 1, 1)
    left(f"{key}.mine", 50, 50)
    left("notes.abcd_123", 50, 50)
    left(key, 50, 50)
    assert cache.entry(tmp_path, "f" * 32, lambda folder: None).is_dir()
    kept = {f"{key}.abcd_124", f"{key}.abcd_125", f"{key}.mine", "notes.abcd_123", key, "f" * 32}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_so(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "tokens.bin").symlink_to("/dev/full")
        write_tokens(folder, [Piece([6] * 100_000, 1, 0)], CharTokenizer("a"), False, Ending())

    with pytest.raises(OSError, match="No space left") as caught:
        cache.entry(tmp_path, "key", write)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []

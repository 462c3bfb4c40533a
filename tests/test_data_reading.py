"""What is read of a file: compressed ones, white space that divides nothing, nested and several columns, delimiters."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_fakes import Translating, bound, labelled

from llmkit.data.opening import Options
from llmkit.data.rows import Row
from llmkit.data.sources import local
from llmkit.errors import UserError

ROWS = "text,label\na b,x\né,y\n"


def rows_of(path: Any, **options: Any) -> list[Any]:
    return [row.data for row in local("data.train", path, Options(**options)).read() if isinstance(row, Row)]


# Characters


@pytest.mark.parametrize("divider", ["\t", " ", " x\t", " x "])
def test_only_blanks_and_tabs_divide_a_conll_line(tmp_path: Path, divider: str) -> None:
    path = tmp_path / "a.conll"
    words = ["10\u00a0000", "\u3000", "a\u2009b", "\u0085", "x\rz"]
    path.write_text("".join(f"{word}{divider}B-X\u00a0Y\n" for word in words), encoding="utf-8", newline="")
    (row,) = rows_of(str(path), format="conll")
    assert row["tags"] == ["B-X\u00a0Y"] * 5
    assert [word.removesuffix(" x") for word in row["tokens"]] == words


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\rb\nc\n", ["a\rb", "c"]),
        (b"a\r\nb\r\r\nc\r", ["a", "b\r", "c\r"]),
        (b"a\rb\rc\r", ["a", "b", "c"]),  # of an old Macintosh
        (b"a\rb", ["a", "b"]),
        (b"a\x0b\x1c\xc2\x85\xe2\x80\xa8b\nc", ["a\x0b\x1c\x85\u2028b", "c"]),
    ],
)
def test_a_carriage_return_alone_ends_no_line(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_bytes(content)
    other.write_bytes(b"".join(b"%d\n" % number for number in range(len(lines))))
    assert [row["text"] for row in rows_of(str(path))] == lines
    pairs = rows_of({"source": str(path), "target": str(other)})
    assert pairs == [{"source": line, "target": str(number)} for number, line in enumerate(lines)]


# Compressed files


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/a.csv", content)
        archive.writestr("__MACOSX/folder/._a.csv", "junk")
    return sink.getvalue()


def zstandard(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "a.csv.gz": gzip.compress, "a.CSV.BZ2": bz2.compress, "a.csv.xz": lzma.compress, "a.csv.zst": zstandard,
    "any.zip": zipped, "a.csv": gzip.compress,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESS[name](ROWS.encode()))
    assert labelled(tmp_path, str(tmp_path / name)) == [("a b", "x"), ("é", "y")]


@pytest.mark.parametrize("name", COMPRESS)
def test_damaged_compressed_files(tmp_path: Path, name: str) -> None:
    content = bytearray(COMPRESS[name](ROWS.encode() * 1000))
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^data\.train: /.*: \w+: ") as caught:
        list(local("data.train", str(tmp_path / name), Options()).read())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "is a tar archive. Unpack it and name the files to read"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c123", "is a 7z archive. Unpack it"),
        ("a.rar", b"Rar!\x1a\x07\x00", "is a RAR archive. Unpack it"),
    ],
)
def test_archives_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train: /.*/{name} {says}"):
        list(local("data.train", str(tmp_path / name), Options()).read())


def test_a_zip_archive_of_several_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, ROWS)
    with pytest.raises(UserError, match=r"a\.zip is a zip archive of 2 files: a\.csv, b\.csv\. Unpack it and name"):
        local("data.train", str(tmp_path / "a.zip"), Options())


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"^data\.train: '/.*' is a folder; '/.*/\*' reads its files \(a\.txt\)$"):
        local("data.train", str(tmp_path), Options())
    with pytest.raises(UserError, match=r"^data\.train: '/.*/inside' is a folder without files$"):
        local("data.train", str(tmp_path / "inside"), Options())


# Columns


def test_nested_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": i, "translation": {"en": f"e{i}", "de": f"d{i}", "x": {"z": "!"}}} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"source": "translation.en", "target": "translation.x.z"}
    data = bound(Translating(), 8, tmp_path, train=str(path), validation_share=0, columns=columns)
    split: Any = data.split("train")
    found = [[data.tokenizer.decode(split.features[i][name]) for name in columns] for i in range(2)]
    assert found == [["e0", "!"], ["e1", "!"]]
    columns["target"] = "translation.dee"
    says = r"no column 'translation\.dee' .* Did you mean 'translation\.de'\? Columns: id, translation\.en, translation"
    with pytest.raises(UserError, match=says):
        bound(Translating(), 8, tmp_path, train=str(path), validation_share=0, columns=columns)


def test_a_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(ROWS.replace(",", ";").replace("a b", '"a;b, c"'))
    assert labelled(tmp_path, str(path), delimiter=";") == [("a;b, c", "x"), ("é", "y")]
    for mark, advice in ((";", r"data\.delimiter: ';'"), ("\t", r"data\.format: tsv")):
        path.write_text(ROWS.replace(",", mark))
        with pytest.raises(UserError, match=rf"^data\.train: .*a\.csv:1 has one column, 'text.*label'\. Set {advice}$"):
            labelled(tmp_path, str(path))
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(UserError, match=r"^data\.delimiter: must be one character, got"):
            Options(delimiter=wrong)
    path.rename(tmp_path / "a.tsv")
    with pytest.raises(UserError, match=r"^data\.delimiter: is for files of format csv, and .*a\.tsv are read as tsv"):
        labelled(tmp_path, str(tmp_path / "a.tsv"), delimiter=";")
    (tmp_path / "new.txt").write_text("a; b\n")  # the delimiter is that of the training data, and no cells are here
    found = local("data.predict", str(tmp_path / "new.txt"), Options(delimiter=";"))
    assert [row.data for row in found.read() if isinstance(row, Row)] == [{"text": "a; b"}]


def test_the_suffix_decides_before_a_pattern_that_other_files_need(tmp_path: Path) -> None:
    """A pattern that was made for the training file does not keep a table from being read as one."""
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "a.train").write_text("x a b\n")
    pattern = r"(?P<label>\w) (?P<text>.*)"
    files = [str(tmp_path / "a.train"), str(tmp_path / "a.csv")]
    assert sorted(labelled(tmp_path, files, pattern=pattern)) == [("a b", "x"), ("a b", "x"), ("é", "y")]
    says = r"b\.csv:2 .*\. data\.pattern is not used for csv; data\.format: lines reads any file by it\."
    (tmp_path / "b.csv").write_text("x a b\ny c\n")
    with pytest.raises(UserError, match=says):
        labelled(tmp_path, str(tmp_path / "b.csv"), pattern=pattern)
    assert labelled(tmp_path, str(tmp_path / "b.csv"), pattern=pattern, format="lines") == [("a b", "x"), ("c", "y")]
    (tmp_path / "c.txt").write_text("no\n")
    with pytest.raises(UserError, match=r"c\.txt:1 does not match.*For a file of another form set data\.pattern: null"):
        labelled(tmp_path, str(tmp_path / "c.txt"), pattern=pattern)


def test_a_table_without_a_header_is_advised(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a b,x\né,y\n")
    says = r"a\.csv:2 has no column 'text'.*For a file without a header data\.column_names names all of them\.$"
    with pytest.raises(UserError, match=says):
        labelled(tmp_path, str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match=r"^data\.column_names: names 'text' twice$"):
        labelled(tmp_path, str(tmp_path / "a.csv"), column_names=["text", "text"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "label,text,label,note,note\nx,a,y,,\n"),
        ("a.tsv", "label\ttext\tlabel\nx\ta\ty\n"),
        ("a.jsonl", '{"label": "x", "text": "a", "label": "y"}\n'),
        ("a.json", '[{"label": "x", "text": "a", "label": "y"}]'),
        ("a.parquet", ""),
    ],
)
def test_a_column_that_comes_twice(tmp_path: Path, name: str, content: str) -> None:
    """It is an error where it is read, and only there."""
    path = tmp_path / name
    if content:
        path.write_text(content)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table([["x"], ["a"], ["y"]], names=["label", "text", "label"]), path)
    says = rf"^data\.train: .*{name}:\d has more than one value in column 'label'"
    with pytest.raises(UserError, match=says):
        labelled(tmp_path, str(path))
    assert labelled(tmp_path, str(path), columns={"label": "text"}) == [("a", "a")]

"""Files of any bytes at all end in rows or in an error to act on, and a bad row takes no other one with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fakes import Joining, Labelling, bound
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bad_rows import COLUMNS, LABEL, Sentences, question, squad, table

from llmkit.data.corpus import Corpus
from llmkit.data.opening import Options
from llmkit.data.parts import Shares
from llmkit.errors import UserError

SENTENCES = [f"{letter} word {letter} \xe9\u4e2d" for letter in "abcdefgh"]
PAIRS = list(zip(SENTENCES, "xyxyxyxy", strict=True))
ITEMS = [{"text": text, "label": label} for text, label in PAIRS]
FORMATS: dict[str, tuple[str | bytes, dict[str, Any]]] = {
    "a.txt": ("".join(f"{text}\n" for text in SENTENCES), {"head": Joining()}),
    "a.text": ("".join(f"{text}\n" for text in SENTENCES), {"head": Joining(), "documents": "line"}),
    "a.lines": ("".join(f"{label}|{text}\n" for text, label in PAIRS), {"pattern": LABEL}),
    "a.tsv": ("".join(f"{text}\t{label}\n" for text, label in PAIRS), {"column_names": ["text", "label"]}),
    "a.jsonl": ("".join(json.dumps(item, ensure_ascii=i % 2 > 0) + "\n" for i, item in enumerate(ITEMS)), {}),
    "a.csv": ("text,label\n" + "".join(f'"{text}\n""{text}",{label}\n' for text, label in PAIRS), {}),
    "a.json": (json.dumps(ITEMS, indent=1), {}),
    "squad.json": (squad(*map(question, SENTENCES)), {"format": "squad", "columns": COLUMNS["squad"]}),
    "a.parquet": (table(SENTENCES, [label for _, label in PAIRS]), {}),
    "a.conll": (
        "\n".join(f"{text}\t{label}\n\uffff\tx\n" for text, label in PAIRS),
        {"format": "conll", "columns": COLUMNS["conll"], "head": Sentences()},
    ),
}
PIECES = [
    b"\n", b"\r", b"\0", b"\xff", b"\xc3", b'"', b"'", b",", b"\t", b"[", b"{", b"}", b"\\", b"\\ud800", b"null",
    b"\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"-DOCSTART-", b"#",
    b"[" * 3000, b"9" * 5000, b" " * 5000, b"\t" * 5000, b"a\t" * 2000,
]  # fmt: skip
CHANGES = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "repeat", "end"]),
    st.floats(0, 1),
    st.integers(1, 60),
    st.sampled_from(PIECES) | st.binary(min_size=1, max_size=5),
)


def changed(content: bytes, kind: str, where: float, length: int, piece: bytes) -> tuple[bytes, bytes, bytes]:
    """Return what is before a change, what is put there, and what is after it."""
    at = round(where * len(content))
    match kind:
        case "flip":
            return content[:at], bytes(b ^ piece[0] for b in content[at : at + 1]), content[at + 1 :]
        case "cut":
            return content[:at], b"", content[at + length :]
        case "insert":
            return content[:at], piece, content[at:]
        case "repeat":
            return content[: at + length], b"", content[at:]
        case _:
            return content[:at], b"", b""


def all_changed(content: bytes, changes: list[Any]) -> bytes:
    for change in changes:
        content = b"".join(changed(content, *change))
    return content


def read_rows(folder: Path, name: str, content: bytes, on_bad_row: Any) -> list[dict[str, Any]] | None:
    """Return the rows as every part of the data layer reads them, or None when there is an error to act on."""
    _, given = FORMATS[name]
    options = Options(given.get("format", "auto"), given.get("pattern"), given.get("column_names"))
    (folder / name).write_bytes(content)
    paths: Any = {"train": str(folder / name), "validation": None, "test": None, "predict": None}
    columns, documents = given.get("columns"), given.get("documents", "file")
    corpus = Corpus(paths, None, None, options, on_bad_row, columns, documents, Shares(), {}, False, folder)
    try:
        reader = corpus.reader("train", given.get("head") or Labelling())
        reader.check()
        found = [item.fields for item in reader.read()]
    except UserError as error:
        assert str(error).startswith("data.train: ")
        assert name in str(error)
        assert "\n" not in str(error)
        return None
    assert found
    assert reader.skipped.count == 0 or on_bad_row == "skip"
    json.dumps(found, ensure_ascii=False, default=str).encode()  # every text can be written
    return found


def texts_of(rows: list[dict[str, Any]] | None, name: str) -> set[str]:
    """Return the texts, line by line where the file is one document."""
    texts = [row["text"] for row in rows or []]
    return set("".join(texts).split("\n") if name == "a.txt" else map(str, texts))


def content_of(name: str) -> bytes:
    content = FORMATS[name][0]
    return content.encode() if isinstance(content, str) else content


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_end_in_rows_or_an_error(tmp_path: Path, name: str) -> None:
    content = content_of(name)
    assert len(texts_of(read_rows(tmp_path, name, content, "error"), name)) >= len(SENTENCES)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def check(changes: list[Any]) -> None:
        mutated = all_changed(content, changes)
        strict, lenient = (read_rows(tmp_path, name, mutated, setting) for setting in ("error", "skip"))
        assert strict is None or lenient == strict

    check()


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.lines", "a.tsv", "a.jsonl"])
def test_lines_that_are_not_touched_survive(tmp_path: Path, name: str) -> None:
    content = content_of(name)
    lines = dict(zip(content.split(b"\n"), SENTENCES, strict=False))
    assert texts_of(read_rows(tmp_path, name, content, "skip"), name) - {""} == set(lines.values())

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(CHANGES)
    def check(change: Any) -> None:
        before, new, after = changed(content, *change)
        mutated = before + new + after
        assume(name != "a.jsonl" or not mutated.strip().startswith(b"["))  # then it is one list, which is broken
        untouched = {*before.split(b"\n")[:-1], *after.split(b"\n")[1:]} & lines.keys()
        found = texts_of(read_rows(tmp_path, name, mutated, "skip"), name)
        assert {lines[line] for line in untouched} <= found

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_through_the_whole_data_layer(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    options: dict[str, Any] = {"head": Labelling(), **FORMATS[name][1]}

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def check(changes: list[Any]) -> None:
        path.write_bytes(all_changed(content_of(name), changes))
        for on_bad_row in ("error", "skip"):
            try:
                data = bound(
                    context=64, folder=tmp_path, train=str(path), validation=str(path), on_bad_row=on_bad_row, **options
                )
                assert sum(len(batch["ids"]) for batch in data.train_dataloader())
            except UserError as error:
                assert name in str(error)

    check()

"""Reading rows: every format, and a message with the place for whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_fakes import CharTokenizer, Joining, Labelling, Translating, bound, labelled

from llmkit.data import DataModule, hub
from llmkit.data.opening import Options
from llmkit.data.rows import Bad, Row
from llmkit.data.sources import local
from llmkit.errors import UserError

ROWS = [("a b", "x"), ('c "quoted", d', "y"), ("NA", "x"), ("é", "y")]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\na b,x\n"c ""quoted"", d",y\nNA,x\n\né,y\n', encoding="utf-8")
    assert labelled(tmp_path, str(path)) == ROWS


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a\nb",x\nc,y\n')
    assert labelled(tmp_path, str(path)) == [("a\nb", "x"), ("c", "y")]


def test_tsv_takes_quotation_marks_for_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in ROWS) + 'x\t"open\n')
    assert labelled(tmp_path, str(path)) == [*ROWS, ('"open', "x")]


def test_table_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{text}\t{label}\tmore\n" for text, label in ROWS))
    assert labelled(tmp_path, str(path), column_names=["text", "label", "note"]) == ROWS


@pytest.mark.parametrize("layout", ["lines", "list"])
def test_json(tmp_path: Path, layout: str) -> None:
    items = [{"body": text, "label": label} for text, label in ROWS]
    path = tmp_path / "a.json"
    lines = "\n\n".join(map(json.dumps, items)) + "\n"
    path.write_text(lines if layout == "lines" else " \n" + json.dumps(items, indent=1))
    assert labelled(tmp_path, str(path), columns={"text": "body"}) == ROWS


def test_json_paragraphs_are_joined_and_numbers_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ["a", "b"], "label": 1}\n{"text": "c", "label": 0}\n')
    assert labelled(tmp_path, str(path)) == [("a\nb", 1), ("c", 0)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts, labels = zip(*ROWS, strict=True)
    parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
    assert labelled(tmp_path, str(tmp_path / "a.parquet")) == ROWS


def test_lines_with_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.train"
    path.write_bytes("X:abc Wer?\n\nY:d é\u2028!\n".encode("latin-1", "replace"))
    found = labelled(tmp_path, str(path), pattern=r"(?P<label>\w+):\S+ (?P<text>.*)", encoding="latin-1")
    assert found == [("Wer?", "X"), ("é?!", "Y")]


def rows_of(path: Path, format: Any, pattern: str | None = None) -> list[Row]:
    rows = local("data.train", str(path), Options(format, pattern)).read()
    return [row for row in rows if isinstance(row, Row)]


def bad_of(path: Path, format: Any, pattern: str | None = None) -> list[str]:
    rows = local("data.train", str(path), Options(format, pattern)).read()
    return [row.message(Path(row.file).name) for row in rows if isinstance(row, Bad)]


def test_conll(tmp_path: Path) -> None:
    """Blocks of lines are sentences; '#' is a word where its line looks like the others, else begins a comment."""
    path = tmp_path / "a.conll"
    lines = [
        "# global.columns = a b", "", "-DOCSTART- -X- O", "", "# sent_id = 1", "EU NNP B-ORG ", "# # O", "x.  y I-ORG",
        " \t ", "", "#\tNNP\tO", "New York\tNNP\tB-LOC", "\u2028\tNNP\tO", "# a comment of ours", "", "#", "",
        "-DOCSTART-",
    ]  # fmt: skip
    path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    rows = rows_of(path, "conll")
    assert [row.data for row in rows] == [
        {"tokens": ["EU", "#", "x."], "tags": ["B-ORG", "O", "I-ORG"]},
        {"tokens": ["#", "New York", "\u2028"], "tags": ["O", "B-LOC", "O"]},
    ]
    assert [(row.number, row.first, row.file) for row in rows] == [(6, True, str(path)), (11, True, str(path))]


def test_conll_without_tags(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("EU\nrejects\n\n#\n!")
    assert [row.data for row in rows_of(path, "conll")] == [{"tokens": ["EU", "rejects"]}, {"tokens": ["#", "!"]}]


def test_conll_with_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("#\thttp://x [2009]\n1\t北0\tB-LOC\tO\n2\t京1\tI-LOC\tO\n3\t#0\tO\tO\n")
    found = rows_of(path, "conll", r"\d+\t(?P<word>.)\d\t(?P<outer>\S+)\t(?P<inner>\S+)")
    wanted = {"word": ["北", "京", "#"], "outer": ["B-LOC", "I-LOC", "O"], "inner": ["O", "O", "O"]}
    assert [row.data for row in found] == [wanted]


@pytest.mark.parametrize(
    ("content", "pattern", "says"),
    [
        ("a O\n\nb\nc O\n", None, "a.conll:3 has no 'tags', other lines of the sentence have"),
        ("a\tO\n\tO\n", None, "a.conll:2 does not begin with a word: '\\tO'"),
        ("a\tO\nb O\n", r"(?P<tokens>\S+)\t(?P<tags>\S+)", "a.conll:2 does not match data.pattern: 'b O'"),
    ],
)
def test_malformed_conll(tmp_path: Path, content: str, pattern: str | None, says: str) -> None:
    path = tmp_path / "a.conll"
    path.write_text(content + "\nd\tO\n")
    assert bad_of(path, "conll", pattern) == [says]
    assert rows_of(path, "conll", pattern)[-1].data == {"tokens": ["d"], "tags": ["O"]}


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "A",
            "paragraphs": [
                {
                    "context": "c1",
                    "qas": [
                        {"id": "x", "question": "q1", "answers": [{"text": "c", "answer_start": 0, "kind": "y"}]},
                        {"id": 7, "question": "q2", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "c2", "qas": [{"question": "q3"}]},
            ],
        },
        {"paragraphs": [{"context": "c3", "id": "p", "qas": []}]},
        {"title": "B", "paragraphs": [{"context": "c1", "qas": [{"id": "z", "question": "q4"}]}]},
    ],
}


def test_squad(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SQUAD, indent=1))
    rows = rows_of(path, "squad")
    columns = ("id", "title", "context", "question", "answers")
    assert [tuple(map(row.data.get, columns)) for row in rows] == [
        ("x", "A", "c1", "q1", {"text": ["c"], "answer_start": [0]}),
        ("7", "A", "c1", "q2", {"text": [], "answer_start": []}),
        ("3", "A", "c2", "q3", None),
        ("z", "B", "c1", "q4", None),
    ]
    assert [(row.first, row.number) for row in rows] == [(True, 1), (False, 2), (True, 3), (True, 4)]


def test_no_paragraph_is_on_both_sides(tmp_path: Path) -> None:
    paragraphs = [
        {"context": f"c{p}", "qas": [{"question": f"q{q}", "answers": []} for q in range(3)]} for p in range(10)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    fields = {"text": "context", "label": "question"}
    data = bound(Labelling(), 8, tmp_path, train=str(path), format="squad", columns=fields, validation_share=0.3)
    sides = []
    for stage in ("train", "validation"):
        split: Any = data.split(stage)
        sides.append([data.tokenizer.decode(split.features[i]["ids"]) for i in range(len(split))])
    assert [len(side) for side in sides] == [21, 9]
    assert not set(sides[0]) & set(sides[1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r":1 is not JSON"),
        ("[]", r": expected SQuAD's format, but the file has no list 'data'"),
        (json.dumps(SQUAD)[:-9], r":1 is not JSON"),
    ],
)
def test_a_file_that_is_not_squad(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^data\.train: .*a\.json{says}"):
        rows_of(path, "squad")


@pytest.mark.parametrize(
    ("old", "new", "says", "left"),
    [
        ('"data": [', '"data": [{}, ', "1 (data[0]) has no list 'paragraphs'", "x 7 4 z"),
        ('"data": [', '"data": [3, ', "1 (data[0]) has no list 'paragraphs'", "x 7 4 z"),
        ('"context": "c1", ', "", "1 (data[0].paragraphs[0]) has no str 'context'", "2 z"),
        ('"q1"', "null", "1 (data[0].paragraphs[0].qas[0]) has no str 'question'", "7 3 z"),
        ('start": 0', 'start": "0"', "1 (data[0].paragraphs[0].qas[0]) has no int 'answer_start'", "7 3 z"),
        ('"answers": []', '"answers": {}', "2 (data[0].paragraphs[0].qas[1]) has no list 'answers'", "x 3 z"),
    ],
)
def test_malformed_squad(tmp_path: Path, old: str, new: str, says: str, left: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SQUAD).replace(old, new, 1))
    assert bad_of(path, "squad") == [f"a.json:{says}"]
    rows = rows_of(path, "squad")
    assert " ".join(row.data["id"] for row in rows) == left
    assert rows[0].first  # also where the first question of a paragraph is the bad one


def test_several_files_are_sorted(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},x\n")
    assert [text for text, _ in labelled(tmp_path, str(tmp_path / "?.csv"))] == ["a", "b", "c"]
    head = Labelling()
    data = bound(head, 8, tmp_path, train=[str(tmp_path / "c.csv"), str(tmp_path / "a.csv")], validation_share=0)
    assert CharTokenizer.trainings[-1] == "ac"
    assert len(data.train_dataloader()) == 1


def test_parallel_files(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\n\nthree\u2028\x0b.")
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\n")
    files = {"source": str(tmp_path / "a.en"), "target": str(tmp_path / "a.de")}
    data = bound(Translating(), 8, tmp_path, train=files, validation_share=0)
    split: Any = data.split("train")
    rows = [[data.tokenizer.decode(split.features[i][name]) for name in files] for i in range(3)]
    assert rows == [["one", "eins"], ["", "zwei"], ["three\u2028\x0b.", "drei"]]


def test_a_folder_for_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    source = tmp_path / "source"
    source.mkdir()
    for name, label in (("train", "x"), ("test", "y")):
        lines = [json.dumps({"text": f"{name}{i}", "label": label}) for i in range(10)]
        (source / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    data = DataModule(source=str(source), tokenizer=CharTokenizer, cache_dir=str(tmp_path / "cache"))
    data.bind(Labelling(), 16)
    with pytest.raises(ValueError, match="'y' is not in list"):
        data.setup("test")  # the split of that name is there; its label was not in training
    data.setup("fit")
    assert len(data.split("train")) == 9
    assert len(data.split("validation")) == 1  # no split of that name: a share of train
    sliced = DataModule(
        source=str(source), train="train[:4]", validation="train[4:]", tokenizer=CharTokenizer, cache_dir=str(tmp_path)
    )
    sliced.bind(Labelling(), 16)
    sliced.setup("fit")
    assert (len(sliced.split("train")), len(sliced.split("validation"))) == (4, 6)
    wrong = DataModule(source=str(source), train="trian", cache_dir=str(tmp_path))
    wrong.bind(Labelling(), 16)
    with pytest.raises(UserError, match=r"data\.train: .* no split 'trian'\. Did you mean 'train'\?"):
        wrong.setup("fit")
    file = DataModule(source=str(source), train=str(source / "train.jsonl"), cache_dir=str(tmp_path))
    file.bind(Labelling(), 16)
    with pytest.raises(UserError, match=r"It is a file: to read it, set data\.source: null\."):
        file.setup("fit")


def test_class_numbers_become_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    builder = SimpleNamespace(info=SimpleNamespace(splits={"train": None}), config_id="default", hash="1")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    read = hub.Hub("name", None, False).rows("data.train", "train").read
    assert [row.data["label"] for row in read() if isinstance(row, Row)] == ["yes", "no"]


# What is wrong


def fails(folder: Path, message: str, content: str | bytes = "", name: str = "train.csv", **settings: Any) -> None:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"train": str(path), "validation": str(path), **settings}
    with pytest.raises(UserError, match=message) as caught:
        bound(settings.pop("head", None) or Labelling(), 16, folder, **settings)
    assert "\n" not in str(caught.value)


def test_wrong_columns(tmp_path: Path) -> None:
    content = "text,label\na,x\n"
    message = r"data\.train: .*train\.csv:2 has no column 'txt' for the head's field 'text'\."
    hint = r" Did you mean 'text'\? Columns: text, label\. data\.columns names those to read\.$"
    fails(tmp_path, message + hint, content, columns={"text": "txt"})
    message = r"data\.columns: the head has no field 'txet'\. Did you mean 'text'\? Fields: text, label\."
    fails(tmp_path, message, content, columns={"txet": "text"})
    fails(tmp_path, r"train\.txt:1 has no column 'label' ", "a\nb\n", name="train.txt")


def test_wrong_cells(tmp_path: Path) -> None:
    def cell(says: str, row: str) -> None:
        fails(tmp_path, rf"train\.json:2 {says}", '{"text": "a", "label": 1}\n' + row, name="train.json")

    cell(r"has an empty cell \(null\) in column 'text'", '{"text": null, "label": 1}')
    cell(r"has int, expected text or a list of texts, in column 'text'", '{"text": 3, "label": 1}')
    cell(r"has list, expected text or a list of texts, in column 'text'", '{"text": ["a", 3], "label": 1}')
    cell(r"has no column 'label' ", '{"text": "a"}')


def test_no_rows(tmp_path: Path) -> None:
    fails(tmp_path, r"data\.train: no rows in train\.csv", "text,label\n")
    fails(tmp_path, r"data\.train: no rows in train\.csv", "")
    fails(tmp_path, r"data\.train: no rows in train\.csv", "text,label\n", validation=None)
    fails(tmp_path, r"data\.train: no rows in a\.txt", "\n\n", name="a.txt", documents="line", head=Joining())
    fails(tmp_path, r"data\.train: no rows in a\.txt", "", name="a.txt", head=Joining())
    fails(tmp_path, r"data\.train: no rows in a\.txt", "", name="a.txt", head=Joining(), validation=None)
    fails(tmp_path, r"data\.train: fewer than two tokens in a\.txt", "x", name="a.txt", head=Joining())


def test_malformed_files(tmp_path: Path) -> None:
    fails(tmp_path, r"data\.train: .*train\.csv:3 has 1 cells, expected 2", "text,label\na,x\nb\n")
    fails(tmp_path, r"data\.train: .*train\.csv:2 opens a quotation mark that is not closed", 'text,label\n"a,x\n')
    fails(tmp_path, r"a\.json:2 is not JSON", '{"text": "a", "label": 1}\n{"text\n', name="a.json")
    fails(tmp_path, r"a\.json:1 is not JSON.*one object a line", '{\n"text": "a"}', name="a.json")
    fails(tmp_path, r"a\.json:2 is not JSON", '[{"text": "a",\n}]', name="a.json")
    fails(tmp_path, r"a\.json:1 holds str, expected an object", '["a"]', name="a.json")
    fails(tmp_path, r"data\.train: .*a\.parquet: ArrowInvalid", "text", name="a.parquet")
    fails(
        tmp_path,
        r"a:2 does not match data\.pattern: 'oops'",
        "x a\noops\n",
        name="a",
        pattern=r"(?P<label>.) (?P<text>.)",
    )
    fails(tmp_path, r"data\.pattern: is not a regular expression", "x", name="a", pattern="(")
    fails(tmp_path, r"data\.pattern: has no named group", "x", name="a", pattern="(.)")
    fails(tmp_path, r"data\.format: 'lines' needs data\.pattern", "x", name="a", format="lines")


def test_wrong_encoding(tmp_path: Path) -> None:
    content = "text,label\na,x\né,y\n".encode("latin-1")
    fails(tmp_path, r"data\.train: .*train\.csv:3 is not utf-8 .*data\.encoding", content)
    fails(tmp_path, r"unknown encoding: utf-88", "text,label\n", encoding="utf-88")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_DATA", raising=False)
    fails(tmp_path, r"data\.train: no file '.*none\.csv'$", train=str(tmp_path / "none.csv"))
    fails(tmp_path, r"data\.validation: no file '.*\*\.tsv'$", "text,label\na,x\n", validation=str(tmp_path / "*.tsv"))
    monkeypatch.setenv("LLMKIT_DATA", str(tmp_path / "data"))
    hint = r"no file '.*none\.csv'\. The folder named by the environment variable LLMKIT_DATA .* is missing"
    fails(tmp_path, hint, train=str(tmp_path / "data" / "none.csv"))


def test_parallel_files_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\n")
    files: Any = {"source": str(tmp_path / "a.en"), "target": str(tmp_path / "a.de")}
    told = r"data\.train: parallel files have unequal numbers of lines \(.*a\.en: 2, .*a\.de: 3\)"
    fails(tmp_path, told, head=Translating(), train=files)
    several: Any = {"source": str(tmp_path / "a.*")}
    fails(tmp_path, r"data\.train\.source: parallel files are given one per field", head=Translating(), train=several)
    fails(tmp_path, r"a\.en:1 has no column 'target' ", head=Translating(), train={"source": files["source"]})


def test_what_is_not_configured(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\nb,x\n")
    fails(tmp_path, r"data\.train: is not set", train=None)
    data = bound(Labelling(), 16, tmp_path, train=str(path))
    with pytest.raises(UserError, match=r"data\.test: is not set"):
        data.test_dataloader()
    with pytest.raises(UserError, match=r"data\.predict: is not set"):
        data.predict_dataloader()


def test_a_source_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/name'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    fails(tmp_path, r"data\.source: 'some/name' cannot be loaded: Couldn't reach 'some/name' on the Hub", train=None,
          validation=None, source="some/name")  # fmt: skip

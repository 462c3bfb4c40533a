"""Labels of a column: which are the same class, which are refused, and that no class is only set aside."""

from __future__ import annotations

import json
import math
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from data_fakes import Joining, bound

from llmkit.contracts import Head
from llmkit.data.parts import Shares, measure
from llmkit.data.prepare import Item
from llmkit.errors import UserError
from llmkit_plugins.head.classification import Classification
from llmkit_plugins.head.labels import ClassNumbers, count_classes
from llmkit_plugins.head.multi_label import MultiLabel
from llmkit_plugins.head.regression import Regression
from llmkit_plugins.head.token_classification import TokenClassification

NFD = "cafe\N{COMBINING ACUTE ACCENT}"


def test_one_class_in_any_notation() -> None:
    labels = ["POS", "POS ", "caf\xe9", NFD, 1, 1.0, "1", Decimal(1), "New\N{NO-BREAK SPACE} York", "New York", "", " "]
    found = count_classes(labels)
    assert found == {"1": 4, "New York": 2, "POS": 2, "caf\xe9": 2}
    numbers = ClassNumbers(list(found))
    assert [numbers[label] for label in labels[:10]] == [2, 2, 3, 3, 0, 0, 0, 0, 1, 1]


def test_labels_of_older_checkpoints() -> None:
    numbers = ClassNumbers(["1.0", "2.0", "POS "])
    assert [numbers[label] for label in (1.0, "2.0", "POS")] == [0, 1, 2]


def test_classes_that_look_alike_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(count_classes(["pos", "POS", "\N{FULLWIDTH LATIN SMALL LETTER P}os", "neg"])) == 4
    assert "note: the labels 'POS', 'pos', '\N{FULLWIDTH LATIN SMALL LETTER P}os' are" in capsys.readouterr().err


def rows_file(folder: Path, field: str, values: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "ab", field: value}) + "\n" for value in values))
    return str(path)


CSV_SCORES = [f"{i / 10}" for i in range(60)]


@pytest.mark.parametrize(
    ("head", "field", "values", "says"),
    [
        (Classification, "label", [["a", "b"], "a"], r"\S+:1: the label is a list, .*\(model.head: multi_label\)"),
        (Classification, "label", ["a", "b", ["a"]], r"\S+:3 is refused by the head: the label is a list"),
        (Classification, "label", ["a", "b", {"a": 1}], r"\S+:3 is refused by the head: the label is a mapping"),
        (Classification, "label", ["a", "b", " "], r"\S+:3 is refused by the head: the label is empty"),
        (Classification, "label", ["a", "b", math.nan], r"\S+:3 has an empty cell \(NaN\)"),
        (Classification, "label", ["a", 2, math.inf], r"\S+:3 is refused by the head: the label is inf"),
        (Classification, "label", [1, 0, "x", True], r"\S+:4: there are truth values \(True\) and numbers \(1\)"),
        (Classification, "label", [False, "a", 0.0], r"\S+:3: there are truth values \(False\) and numbers \(0\)"),
        (Classification, "label", ["1", "1.0", "2"], r"\S+:2: the labels '1' and '1.0' are the same number"),
        (Classification, "label", CSV_SCORES, r"the labels are 60 different numbers \(0.0, .*\(model.head: regression"),
        (Classification, "label", list(range(30)), r"the labels are 30 different numbers \(0, 1, 10, ...\)"),
        (
            MultiLabel,
            "labels",
            [["a"], "a;b"],
            r"\S+:2 is refused by the head: the labels are the text 'a;b', .*sep",
        ),
        (MultiLabel, "labels", [3], r"\S+:1: the labels are 3, expected a list: .*\(model.head: classification\)"),
        (MultiLabel, "labels", [["a"], ["a", ["b"]]], r"\S+:2 is refused by the head: the label is a list"),
        (MultiLabel, "labels", [[], []], "multi_label: the training data has no label"),
        (MultiLabel, "labels", [["a"], ["a", None]], r"\S+:2 is refused by the head: the label is empty \(null\)"),
        (Regression, "score", [0.5, 1, "1,5"], r"\S+:3 is refused by the head: the score is '1,5', expected a finite"),
        (Regression, "score", ["", 1], r"\S+:1: the score is '', expected a finite number"),
        (Regression, "score", [1, 2, True], r"\S+:3 is refused by the head: the score is True"),
        (Regression, "score", [1, 1.0], "regression needs different scores; those of the training data are all 1"),
    ],
)
def test_what_is_not_a_label_is_refused(
    tmp_path: Path, head: type[Head], field: str, values: list[Any], says: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.train: {says}") as caught:
        bound(head(), 8, tmp_path, train=rows_file(tmp_path, field, values), validation_share=0)
    assert "\n" not in str(caught.value)


def test_bad_labels_can_be_skipped(tmp_path: Path) -> None:
    values = ["", "a", "b", ["a"], "a", " "]
    head = Classification()
    path = rows_file(tmp_path, "label", values)
    data = bound(head, 8, tmp_path, train=path, validation_share=0, on_bad_row="skip")
    assert head.labels == ["a", "b"] and rows(data) == 3
    tagged = tmp_path / "tags.jsonl"
    tags = [["O"], ["B-a "], ["?"], ["O"]]
    tagged.write_text("".join(json.dumps({"tokens": ["x"], "tags": row}) + "\n" for row in tags))
    tagger = TokenClassification()
    data = bound(tagger, 8, tmp_path, train=str(tagged), validation_share=0, on_bad_row="skip")
    assert tagger.labels == ["O", "B-a"] and rows(data) == 3


def rows(data: Any) -> int:
    return int(data.split("train").training_rows)


def test_scores_that_are_classes() -> None:
    """Half stars of many reviews, and numbered intents: these are classes."""
    for labels in ([i % 10 / 2 for i in range(100)], [i % 150 for i in range(1000)]):
        head = Classification()
        head.learn({"label": labels})
        assert len(head.labels) == len(set(labels))


def test_no_class_is_only_set_aside(tmp_path: Path) -> None:
    labels = ["a", "b"] * 40 + [f"r{i}" for i in range(20)]
    path = rows_file(tmp_path, "label", labels)
    head = Classification()
    data = bound(head, 8, tmp_path, train=path, validation_share=0.2)
    assert head.labels == sorted(set(labels))
    kept = Counter(labels[item] for item in range(100) if not chosen(labels, 0.2)[item])
    assert kept.keys() == set(labels) and rows(data) == kept.total()
    loader: Any = data.val_dataloader()
    found = [number for batch in loader for number in batch["label"].tolist()]
    assert len(found) == 100 - kept.total() >= 10 and {head.labels[number] for number in found} <= {"a", "b"}
    plain = Shares(validation=0.2).of(100, "data.train")
    assert chosen(["a"] * 100, 0.2).tolist() == plain.tolist()  # nothing changes where no class would be lost
    with pytest.raises(UserError, match=r"^data\.train: each row that would be set aside for validation has a class"):
        bound(Classification(), 8, tmp_path, train=rows_file(tmp_path, "label", ["a", "b", "c"]))


def chosen(labels: list[str], share: float) -> Any:
    items = [Item({"text": "ab", "label": label}, number) for number, label in enumerate(labels)]
    return measure(lambda: iter(items), None, ("label",)).chosen(Shares(validation=share), "data.train")


def test_labels_set_aside_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("corpus", "module"):
        monkeypatch.setattr(f"llmkit.data.{module}.HELD_OUT", (2, 100))
    head = Classification()
    bound(head, 8, tmp_path, train=rows_file(tmp_path, "label", ["x", "a", "a", "b", "b"]), streaming=True)
    assert head.labels == ["a", "b", "x"]


@pytest.mark.parametrize("batch", [{"batch_size": 10}, {"batch_tokens": 40}])
@pytest.mark.parametrize(("balance", "share"), [(1.0, 1 / 2), (0.5, 1 / 4), (0.0, 1 / 10)])
def test_classes_are_drawn_in_balance(tmp_path: Path, batch: dict[str, int], balance: float, share: float) -> None:
    """A tenth of the rows has the rare class: 1 : 9, with balance 0.5 the roots of these, 1 : 3."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{'ab' * (1 + i % 3)},{'x' if i % 10 else 'rare'}\n" for i in range(300)))
    data = bound(Classification(), 8, tmp_path, train=str(path), validation_share=0, balance=balance, seed=1, **batch)
    loader = data.train_dataloader()
    epochs = [list(loader) for _ in range(20)]
    found = Counter(number for epoch in epochs for item in epoch for number in item["label"].tolist())
    assert found[0] / found.total() == pytest.approx(share, abs=0.02)
    assert {len(epoch) for epoch in epochs} == {len(loader)}
    assert found.total() == pytest.approx(20 * 300, rel=0.03)
    most = [(item["ids"].shape, item["ids"].numel()) for epoch in epochs for item in epoch]
    assert all(size <= 40 if "batch_tokens" in batch else shape[0] <= 10 for shape, size in most)
    again = bound(Classification(), 8, tmp_path, train=str(path), validation_share=0, balance=balance, seed=1, **batch)
    first = [item["ids"].tolist() for item in again.train_dataloader()]
    assert first == [item["ids"].tolist() for item in epochs[0]]
    assert balance == 0 or first != [item["ids"].tolist() for item in epochs[1]]


@pytest.mark.parametrize(
    ("head", "options", "says"),
    [
        (Joining(), {}, r"is for heads with one class a row \(classification\)"),
        (Regression(), {}, r"is for heads with one class a row \(classification\), not for Regression"),
        (Classification(), {"streaming": True}, "cannot be combined with data.streaming"),
        (Classification(), {"balance": 2}, "must be from 0 to 1, got 2"),
    ],
)
def test_balance_that_cannot_be(tmp_path: Path, head: Head, options: dict[str, Any], says: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label,score\nab,x,1\nba,y,2\nabc,y,3\n")
    with pytest.raises(UserError, match=rf"^data\.balance: {says}$"):
        bound(head, 8, tmp_path, train=str(path), validation_share=0, **{"balance": 1.0, **options}).train_dataloader()

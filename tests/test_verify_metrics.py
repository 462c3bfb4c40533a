"""``llmkit verify metrics`` and ``llmkit.testing.invariance``: shipped plugins pass, broken ones are told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command import TINY, done, llmkit
from torch import Tensor, nn
from torchmetrics import MeanMetric

from llmkit import DataModule, LanguageModel, UserError, plugin, registry
from llmkit.commands.verify.metrics import table
from llmkit.contracts import Attention, Batch, Head, Loss, Network, Role, Stage, Tokenizer
from llmkit.data import batches
from llmkit.ops.metrics import Mean
from llmkit.sequence import Memory, State
from llmkit.sequence import Sequence as Positions
from llmkit.testing.invariance import Finding, check
from llmkit_plugins.attention.softmax import MultiHead
from llmkit_plugins.head.classification import Classification
from llmkit_plugins.head.generation import Generation
from llmkit_plugins.head.translation import Translation

TEXTS = [" ".join(["word", "of", "line", "x"][: 1 + i % 4] * (1 + i % 5)) + f" {i}" for i in range(24)]
FILES = {
    "text": ("text.txt", "auto"),
    "label": ("labels.csv", "auto"),
    "target": ("pairs.tsv", "auto"),
    "summary": ("summaries.csv", "auto"),
    "tags": ("tags.conll", "conll"),
    "answers": ("questions.squad", "squad"),
    "labels": ("several.jsonl", "auto"),
    "score": ("scores.csv", "auto"),
    "expected": ("probe.csv", "auto"),
    "completion": ("completions.csv", "auto"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of unequal lengths for every head."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{t},{'abc'[i % 3]}\n" for i, t in enumerate(TEXTS)))
    several = [json.dumps({"text": t, "labels": list("abc"[: i % 4])}) + "\n" for i, t in enumerate(TEXTS)]
    (folder / "several.jsonl").write_text("".join(several))
    spaced = [" ".join(t.replace(" ", "")[:32]) for t in TEXTS]
    asked_for = [re.sub(r"[^ olx]", "-", t) for t in spaced]
    (folder / "probe.csv").write_text(
        "\n".join(["symbols,expected", *map(",".join, zip(spaced, asked_for, strict=True))])
    )
    (folder / "scores.csv").write_text("text,score\n" + "".join(f"{t},{i % 7}\n" for i, t in enumerate(TEXTS)))
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{t}\t{t[: i + 2]}\n" for i, t in enumerate(TEXTS)))
    (folder / "summaries.csv").write_text(
        "document,summary\n" + "".join(f"{t},{t[: i + 2]}\n" for i, t in enumerate(TEXTS))
    )
    completions = "".join(f"{t},{t[: i + 2]}\n" for i, t in enumerate(TEXTS))
    (folder / "completions.csv").write_text(f"prompt,completion\n{completions}")
    tagged = ["".join(f"{word}\t{'B-N' if word.isdigit() else 'O'}\n" for word in t.split()) for t in TEXTS]
    (folder / "tags.conll").write_text("\n".join(tagged))
    asked = [
        {"context": t, "qas": [{"id": t, "question": "which?", "answers": [{"text": "word", "answer_start": 0}]}]}
        for t in TEXTS
    ]
    (folder / "questions.squad").write_text(json.dumps({"data": [{"title": "", "paragraphs": asked}]}))
    return folder


def findings(head: Any, folder: Path, rows: int = 8, attention: Any = None, **options: Any) -> dict[str, Finding]:
    """Return what is found for a small model on its data, by number."""
    cls = registry.target_of(head)
    file, format = FILES[(*cls.targets, *cls.inputs)[0]]
    path = str(folder / file)
    data = DataModule(
        train=path, validation=path, format=format, tokenizer=plugin("tokenizer", "byte"),  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"), **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(head, attention, dim=16, num_layers=1, context=32)
    found = check(model, data, rows)
    assert model.training
    assert model.head.decoding == registry.target_of(head).decoding
    return {finding.what: finding for finding in found}


def failed(found: Mapping[str, Finding]) -> set[str]:
    return {what for what, finding in found.items() if not finding.passed}


@pytest.mark.parametrize("head", registry.entries("head"))
def test_shipped_heads_pass(head: str, folder: Path) -> None:
    found = findings(plugin("head", head), folder, 5)
    assert not failed(found), table(list(found.values()))
    model = plugin("head", head)()
    names = {"loss", "count of the loss", "answers", "gradient"}
    if head != "classification":  # its metrics need the labels
        names |= {f"val_{name}" for name in model.metrics("validation")}
    assert names <= found.keys()
    assert all(finding.difference < 1e-6 for finding in found.values())


LENGTH = sum(min(len(text), 32) for text in TEXTS) / len(TEXTS)
PLACE = (len("\n".join(TEXTS)) // 32) * 32 / 2  # of blocks of 32, from the first to the last
ORDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "by length": ("classification", f"mean length {LENGTH:g}", {"batch_size": 2}),
    "by length and tokens": ("classification", f"mean length {LENGTH:g}", {"batch_tokens": 64}),
    "text": ("generation", f"mean place {PLACE:g}", {"batch_size": 1}),
    "packed": ("generation", "mean place 12.5", {"batch_size": 1, "pack": True, "documents": "line"}),
}


@pytest.mark.parametrize("order", ORDERS)
def test_first_batches_that_do_not_represent_all(order: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, reference, options = ORDERS[order]
    what = "first validation batches"
    found = findings(plugin("head", head), folder, 2, **options)
    assert found[what].passed
    assert found[what].reference == reference
    assert found[what].difference < 0.15
    monkeypatch.setattr(batches, "evenly", range)  # sorted
    found = findings(plugin("head", head), folder, 2, **options)
    assert failed(found) == {what}
    assert found[what].difference > 0.25
    assert re.fullmatch(r"the first \d+ batches, mean (length|place) [\d.]+", found[what].first)


@pytest.mark.parametrize("options", [{"pack": True, "documents": "line"}, {"batch_tokens": 64}])
def test_packed_documents_and_batches_by_tokens_pass(options: dict[str, Any], folder: Path) -> None:
    assert not failed(findings(plugin("head", "generation"), folder, 6, **options))


# Broken plugins


class Rounded(Classification):
    """Counts by a number that its batches carry as a floating-point tensor, which half precision rounds."""

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        return {**super().collate(features, tokenizer), "weight": torch.tensor(0.1 * len(features))}

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": Mean()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["loss"].update(batch["weight"], len(batch["ids"]))


class MeanLoss(Classification):
    """Gives the mean over the batch in the place of the sum."""

    def loss(self, net: Network, batch: Batch) -> Loss:  # type: ignore[override]
        found = super().loss(net, batch)
        return Loss(found.total / found.count, torch.ones(()))


class PaddedMean(Classification):
    """Divides by the padded length, not by the number of tokens."""

    def scores(self, net: Network, batch: Batch) -> Tensor:
        segments = batch.get("segments")
        x_BTD = net.encode(batch["ids"], Positions.of(batch["ids"], segments)).x_BSD
        if segments is not None:
            x_BTD = x_BTD * (segments > 0)[..., None]
        scores: Tensor = self.classifier(x_BTD.mean(1))
        return scores


class MeanOfMeans(Generation):
    """Averages the perplexities of the batches."""

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {**super().metrics(stage), "mean": MeanMetric()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        super().evaluate(net, batch, metrics, tokenizer)
        loss = self.loss(net, batch)
        metrics["mean"].update((loss.total / loss.count).exp())


class AnswersInOrder(Classification):
    """Names the neighbour's label."""

    def predict(self, *args: Any) -> list[dict[str, Any]]:
        return [{"label": answer["label"], "place": place} for place, answer in enumerate(super().predict(*args))]


class Leaking(Attention):
    """Attention that looks at padding."""

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        self.attention = MultiHead(dim, role, num_heads=2)

    def forward(
        self, x_BTD: Tensor, seq: Positions, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        return self.attention(x_BTD, Positions(seq.positions_BT), memory=memory)  # type: ignore[no-any-return]


class DrawsByPlace(Generation):
    """Samples by the place in the batch, not by the number of the row."""

    def predict(self, net: Network, batch: Batch, *rest: Any) -> list[dict[str, Any]]:
        return super().predict(net, {name: value for name, value in batch.items() if name != "rows"}, *rest)


class DrawsByPlaceWhenAsked(Translation):
    """Does the same; its own options are beam search, which draws nothing."""

    def predict(self, net: Network, batch: Batch, *rest: Any) -> list[dict[str, Any]]:
        return super().predict(net, {name: value for name, value in batch.items() if name != "rows"}, *rest)


class Unsteady(Generation):
    """Loses figures in single precision, and only there."""

    def loss(self, net: Network, batch: Batch) -> Loss:  # type: ignore[override]
        found = super().loss(net, batch)
        large = 1e4 * found.count
        return Loss((found.total + large) - large, found.count)


def test_a_mean_in_the_place_of_a_sum(folder: Path) -> None:
    found = findings(MeanLoss, folder)
    assert failed(found) == {"loss", "count of the loss", "gradient"}
    assert found["count of the loss"].first.startswith("batch size 2, rows ")
    assert found["gradient"].first == "accumulation 2, of 2 + 6 rows"
    assert found["loss"].difference > 0.1
    shown = table(list(found.values()))
    assert "FAIL loss: first at batch size 2, rows " in shown
    assert shown.endswith(f"{len(found) - 3} of {len(found)} numbers do not depend on how rows are batched")


def test_padding_that_counts(folder: Path) -> None:
    found = findings(PaddedMean, folder)
    assert {"loss", "val_loss", "answers", "gradient"} <= failed(found)
    assert "count of the loss" not in failed(found)
    first = found["loss"].first
    assert first.startswith("batch size 2, rows ")
    assert found["val_loss"].first == first


def test_a_number_that_a_precision_plugin_rounds(folder: Path) -> None:
    found = findings(Rounded, folder)
    assert failed(found) == {"val_loss"}
    assert found["val_loss"].first == "trainer.precision bf16-true, batch size 1"


def test_a_mean_of_means(folder: Path) -> None:
    found = findings(MeanOfMeans, folder)
    assert failed(found) == {"val_mean", "val_mean of padded rows"}
    assert found["val_mean of padded rows"].first.startswith("batch size 2, rows ")


@pytest.mark.parametrize("head", [AnswersInOrder, DrawsByPlace, DrawsByPlaceWhenAsked])
def test_answers_that_depend_on_the_place(head: type[Head], folder: Path) -> None:
    found = findings(head, folder, 5)
    assert failed(found) == {"answers"}
    assert "another answer to" in found["answers"].first


@pytest.mark.parametrize("head", ["classification", "masked_lm"])
def test_attention_that_looks_at_padding(head: str, folder: Path) -> None:
    found = findings(plugin("head", head), folder, attention=Leaking)
    where = " of padded rows" if head == "masked_lm" else ""
    assert {f"loss{where}", f"val_loss{where}", "gradient"} <= failed(found)
    assert "count of the loss" not in failed(found)


def test_rounding_is_told_from_a_fault(folder: Path) -> None:
    found = findings(Unsteady, folder)
    assert not failed(found)
    loss = found["loss"]
    assert loss.difference > 1e-6
    assert loss.exact is not None
    assert loss.exact < 1e-9
    assert "pass (rounding: " in table([loss])


# The command


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = ["--model.head", "classification", "--data.train", folder / "labels.csv", *TINY]
    fitted = done("fit", *words, "--output", tmp_path / "runs")
    result = done("verify", "metrics", *words, "--rows", 6, "--output", tmp_path / "none")
    assert result.out.startswith("new weights, at most 6 rows, in single precision on cpu\n")
    assert "8 of 8 numbers do not depend on how rows are batched" in result.out
    assert not (tmp_path / "none").exists()
    trained = done("verify", "metrics", "--ckpt_path", fitted.checkpoint, "--rows", 6, *TINY[-4:])
    assert trained.out.startswith(f"weights of {fitted.checkpoint}")
    value = {out.split("val_loss")[1].split()[0] for out in (result.out, trained.out)}
    assert len(value) == 2  # the weights are the trained ones


def test_the_command_with_a_broken_plugin(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_head.py").write_text(
        "import torch\nfrom llmkit import register\nfrom llmkit.contracts import Loss\n"
        "from llmkit_plugins.head.classification import Classification\n\n\n"
        "@register('head', 'broken_mean')\nclass Broken(Classification):\n    '''A mean.'''\n\n"
        "    def loss(self, net, batch):\n        found = super().loss(net, batch)\n"
        "        return Loss(found.total / found.count, torch.ones(()))\n"
    )
    words = ("--imports", tmp_path / "broken_head.py", "--model.head", "broken_mean")
    result = llmkit("verify", "metrics", *words, "--data.train", folder / "labels.csv", *TINY, "--rows", 6)
    assert result.code == 1
    assert "FAIL" in result.out
    assert "batch size 2, rows " in result.out


def test_mistakes(folder: Path) -> None:
    assert "argument --rows: must be at least 2, got 1" in llmkit("verify", "metrics", "--config", "x", "--rows", 1).err
    assert "needs --config FILE" in llmkit("verify", "metrics").err
    data = DataModule(train=str(folder / "labels.csv"), streaming=True, validation_share=0.0)
    with pytest.raises(UserError, match=r"data\.validation is needed"):
        check(LanguageModel(plugin("head", "classification"), dim=16, num_layers=1, context=32), data)

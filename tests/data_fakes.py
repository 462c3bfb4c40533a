"""Small heads, a tokenizer and a module that the tests of the data layer share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Loss, Network, Stage, Tokenizer, Topology
from llmkit.data import DataModule
from llmkit.sequence import DecodingOptions, padded

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = 6


class CharTokenizer(Tokenizer):
    """One id a character, in the order of the alphabet."""

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(SPECIAL)
    trainings: ClassVar[list[str]] = []  # the texts that all instances were trained on

    def __init__(self, alphabet: str = "") -> None:
        self.alphabet = alphabet

    @property
    def vocab_size(self) -> int:
        return SPECIAL + len(self.alphabet)

    @property
    def trained(self) -> bool:
        return bool(self.alphabet)

    def train(self, texts: Iterator[str]) -> None:
        text = "".join(texts)
        self.trainings.append(text)
        self.alphabet = "".join(sorted(set(text)))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids = {char: SPECIAL + i for i, char in enumerate(self.alphabet)}
        return [[ids.get(char, UNK) for char in text] for text in texts]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return ["".join(self.alphabet[i - SPECIAL] for i in row if i >= SPECIAL) for row in ids]

    def to_state(self) -> str:
        return json.dumps(self.alphabet)

    def from_state(self, state: str) -> None:
        self.alphabet = json.loads(state)


class FakeHead(Head):
    """What the tests do not look at; counts how many rows it has encoded."""

    topology: ClassVar[Topology] = "decoder"
    encoded: ClassVar[list[int]] = []

    def loss(self, net: Network, batch: Batch) -> Loss:
        raise NotImplementedError

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        raise NotImplementedError

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        raise NotImplementedError


class Joining(FakeHead):
    """Rows become one stream."""

    layout = "blocks"
    inputs = ("text",)
    texts = ("text",)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        self.encoded.append(len(rows["text"]))
        ids = tokenizer.encode_batch(rows["text"])
        return {"ids": ids, "length": [len(row) for row in ids]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        return {"ids": padded([item["ids"] for item in features], tokenizer.pad_id)}


class Labelling(FakeHead):
    """Text and a label; the labels are learned."""

    topology = "encoder"
    inputs = ("text",)
    targets = ("label",)
    texts = ("text",)
    learned: ClassVar[list[list[Any]]] = []

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.labels: list[Any] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        found = list(columns["label"])
        self.learned.append(found)
        self.labels = sorted(set(found))

    def info(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def set_info(self, info: dict[str, Any]) -> None:
        self.labels = info["labels"]

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        self.encoded.append(len(rows["text"]))
        ids = [row[:max_length] for row in tokenizer.encode_batch(rows["text"])]
        out: dict[str, list[Any]] = {"ids": ids, "length": [len(row) for row in ids]}
        if "label" in rows:
            out["label"] = [self.labels.index(label) + self.offset for label in rows["label"]]
        return out

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        batch = {"ids": padded([item["ids"] for item in features], tokenizer.pad_id)}
        if "label" in features[0]:
            batch["label"] = torch.tensor([item["label"] for item in features])
        return batch


class Translating(FakeHead):
    """Two texts a row."""

    topology = "encoder_decoder"
    inputs = ("source",)
    targets = ("target",)
    texts = ("source", "target")

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        source, target = (tokenizer.encode_batch(rows[name]) for name in ("source", "target"))
        return {
            "source": source,
            "target": target,
            "length": [max(map(len, pair)) for pair in zip(source, target, strict=True)],
        }

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        return {name: padded([item[name] for item in features], tokenizer.pad_id) for name in ("source", "target")}


class Recorder(pl.LightningModule):
    """Remembers the batches of each stage and trains nothing."""

    def __init__(self, head: Head, context: int) -> None:
        super().__init__()
        self.head, self.context, self.head_ready = head, context, False
        self.tokenizer: Tokenizer | None = None
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[Any]]] = {"train": [], "validation": [], "test": [], "predict": []}

    def training_step(self, batch: Batch) -> Tensor:
        self.seen["train"].append(batch["ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: Batch) -> None:
        self.seen["validation"].append(batch["ids"].tolist())

    def test_step(self, batch: Batch) -> None:
        self.seen["test"].append(batch["ids"].tolist())

    def predict_step(self, batch: Batch) -> list[Any]:
        self.seen["predict"].append(batch["ids"].tolist())
        return [None] * len(batch["ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    """Return a quiet trainer."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "use_distributed_sampler": False, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=folder, **(options | kwargs))


def bound(head: Head, context: int, folder: Path, **settings: Any) -> DataModule:
    """Return a DataModule that is set up for training, with its cache in ``folder``."""
    data = DataModule(**{"tokenizer": CharTokenizer, "cache_dir": str(folder / "cache"), **settings})
    data.bind(head, context)
    data.setup("fit")
    return data


def labelled(folder: Path, path: Any, **settings: Any) -> list[tuple[str, Any]]:
    """Return (text, label) as the head got them, in the order of the rows."""
    head = Labelling()
    data = bound(head, 64, folder, train=path, validation_share=0, **settings)
    split: Any = data.split("train")
    rows = [split.features[i] for i in range(len(split))]
    return [(data.tokenizer.decode(row["ids"]), head.labels[row["label"]]) for row in rows]

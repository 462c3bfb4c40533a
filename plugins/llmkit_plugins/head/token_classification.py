"""Labelling the words of a sentence, as in named entity recognition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.metrics import EXACT, MeanLoss, MeanScore
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of
from llmkit_plugins.head.labels import accepted, class_name
from llmkit_plugins.head.words import characters, encode, means, pieces, running, words


def _pieces(tokens: Any) -> list[str]:
    text, spans = _text(tokens, words)
    return pieces(text, spans)


def _text(tokens: Any, cut: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return a text with its words: a list of words is joined, a text is split."""
    return (tokens, cut(tokens)) if isinstance(tokens, str) else running(tokens)


class TokenClassification(Head):
    """Named entity recognition: mean of the encoder's states over each word's pieces, then a linear layer.

    ``tokens`` is the list of a sentence's words, or a text, which is then cut into words: characters where nearly all
    training words are single ones, else runs of letters or digits and single signs. ``tags`` has a tag for each word,
    ``O`` or a prefix and a label, ``B-person``; schemes BIO, BIOES, BMES, BILOU. Words beyond the context count as
    tagged ``O``.

    Args:
        dropout: dropout before the linear layer.
        names: the tags that the numbers 0, 1, ... stand for, where the data has numbers.
    """

    topology = "encoder"
    inputs = ("tokens",)
    targets = ("tags",)
    classes = ("tags",)
    texts = ()
    words: ClassVar = {"tokens": _pieces}
    monitor = ("f1", "max")

    def __init__(self, dropout: float = 0.1, names: list[str] | None = None) -> None:
        super().__init__()
        self.names = names
        self.dropout = nn.Dropout(dropout)
        self.labels: list[str] = []
        self.by_character = False

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take the tags from the training rows, ``O`` first, then sorted; see whether words are single characters."""
        found = {tag for _, tags in accepted(columns["tags"], self._tags) for tag in tags} - {"O"}
        if not found:
            raise UserError("token_classification: no tag of the training data is other than O")
        self.labels = ["O", *sorted(found)]
        lengths = [len(word) for tokens in columns["tokens"] if not isinstance(tokens, str) for word in tokens]
        self.by_character = lengths.count(1) > 0.9 * len(lengths)

    def _tags(self, tags: Any) -> list[str]:
        """Return a row's tags as strings. Raises UserError for a value that is not a tag."""
        if not isinstance(tags, list):
            raise UserError(f"token_classification: tags must be a list, one tag a word, got {tags!r:.60}")
        found = []
        for tag in tags:
            if (
                isinstance(tag, int)
                and not isinstance(tag, bool)
                and self.names is not None
                and 0 <= tag < len(self.names)
            ):
                tag = self.names[tag]
            if isinstance(tag, int):
                need = "numbers need model.head.names, the list of the tags that they stand for"
                raise UserError(f"token_classification: {need}; it is {self.names}, and the data has the tag {tag}")
            tag = class_name(tag) if isinstance(tag, str) and tag.strip() else str(tag)
            if tag != "O" and not re.fullmatch(r"[BIESMLU]-[\S ]+", tag):
                raise UserError(
                    f"token_classification: '{tag}' is not a tag: expected O, B-label or I-label (or BIOES)"
                )
            found.append(tag)
        return found

    def info(self) -> dict[str, Any]:
        """Return the tags and whether words are single characters."""
        return {"labels": self.labels, "by_character": self.by_character}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what ``info`` returned. Raises TypeError when the tags are not texts."""
        "".join(info["labels"])
        self.labels, self.by_character = list(info["labels"]), bool(info["by_character"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from a word's mean state to the tags."""
        self.classifier = nn.Linear(dim, len(self.labels))
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return the features of each sentence.

        ``ids`` of the words that fit into the context, and the number of ids of each of them, ``sizes``; the sentence
        as running ``text``, the ``spans`` of all its words in it and, where they are known, the ``tags`` of all of
        them, one a line.
        """
        before, _, after = tokenizer.around
        room = max(max_length - len(before) - len(after), 1)
        found = [_text(tokens, characters if self.by_character else words) for tokens in rows["tokens"]]
        features: dict[str, list[Any]] = {name: [] for name in ("ids", "sizes", "text", "spans", "length", "truncated")}
        for (text, spans), ids in zip(found, encode(tokenizer, [pieces(*sentence) for sentence in found]), strict=True):
            sizes: list[int] = []
            for piece in ids:
                if sum(sizes) + len(piece) > room:
                    break
                sizes.append(len(piece))
            kept = [token for piece in ids[: len(sizes)] for token in piece] or [tokenizer.unk_id]
            features["ids"].append([*before, *kept, *after])
            features["sizes"].append(sizes)
            features["text"].append(text)
            features["spans"].append([place for span in spans for place in span])
            features["length"].append(len(features["ids"][-1]))
            features["truncated"].append(int(len(sizes) < len(ids)))
        if "tags" in rows:
            features["tags"] = []
            for (text, spans), tags in zip(found, map(self._tags, rows["tags"]), strict=True):
                if len(tags) != len(spans):
                    raise UserError(f"the sentence {text[:40]!r} has {len(spans)} tokens and {len(tags)} tags")
                features["tags"].append("\n".join(tags))
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return a batch.

        ``ids``, ``segments`` where padded, and ``words``, the number of each token's word in its sentence or -1,
        (B, T); ``text``, and ``spans`` padded with -1; where the tags are known, all of them as ``tags``, one a line,
        and those of the words that fit as ``targets``, (B, W).
        """
        rows = [feature["ids"] for feature in features]
        before = [-1] * len(tokenizer.around[0])
        owners = [[w for w, size in enumerate(feature["sizes"]) for _ in range(size)] for feature in features]
        owners = [
            [*before, *owner, *[-1] * (len(row) - len(before) - len(owner))]
            for owner, row in zip(owners, rows, strict=True)
        ]
        batch: Batch = {
            "ids": padded(rows, tokenizer.pad_id),
            "words": padded(owners, -1),
            "spans": padded([feature["spans"] for feature in features], -1),
            "text": [feature["text"] for feature in features],
        }
        segments = segments_of([len(row) for row in rows])
        if segments is not None:
            batch["segments"] = segments
        if "tags" in features[0]:
            numbers = {label: number for number, label in enumerate(self.labels)}
            batch["tags"] = [feature["tags"] for feature in features]
            targets = [
                [numbers.get(tag, IGNORE) for tag in feature["tags"].splitlines()[: len(feature["sizes"])]]
                for feature in features
            ]
            width = batch["spans"].shape[1] // 2
            batch["targets"] = padded([[IGNORE] * width, *targets], IGNORE)[1:]
        return batch

    def scores(self, net: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the scores of each word's tags, (B, W, labels), and which words fit into the context, (B, W)."""
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments"))).x_BSD
        rows, width = len(x_BTD), batch["spans"].shape[1] // 2
        first_B1 = width * torch.arange(rows, device=x_BTD.device)[:, None]
        words_BT = torch.where(batch["words"] < 0, -1, batch["words"] + first_B1)
        states_ND, sizes_N = means(x_BTD, words_BT, rows * width)
        scores: Tensor = self.classifier(self.dropout(states_ND))
        return scores.reshape(rows, width, -1), sizes_N.reshape(rows, width) > 0

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed cross-entropy of the words' tags; tags that training did not have are left out."""
        return self._loss(self.scores(net, batch)[0], batch["targets"])

    def _loss(self, scores: Tensor, targets: Tensor) -> Loss:
        exact = scores.flatten(0, 1).to(torch.promote_types(scores.dtype, torch.float32))
        total = F.cross_entropy(exact, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return Loss(total, (targets != IGNORE).sum())

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, accuracy of words, and precision, recall and F1 of entities."""
        return {
            "loss": MeanLoss(),
            "accuracy": MeanScore(),
            "precision": EntityScore("precision"),
            "recall": EntityScore("recall"),
            "f1": EntityScore("f1"),
        }

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        scores, fits = self.scores(net, batch)
        metrics["loss"].update(self._loss(scores, batch["targets"]))
        expected = [tags.splitlines() for tags in batch["tags"]]
        found = [tags[: len(row)] for tags, row in zip(self._predicted(scores, fits), expected, strict=True)]
        right = [a == b for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)]
        metrics["accuracy"].update(sum(right), len(right))
        for name in ("precision", "recall", "f1"):
            metrics[name].update(found, expected)

    def _predicted(self, scores: Tensor, fits: Tensor) -> list[list[str]]:
        """Return the best tag of each word; O for padding and for words that did not fit."""
        numbers = scores.argmax(-1) * fits  # O is number 0
        return [[self.labels[number] for number in row] for row in numbers.tolist()]

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return ``text``, ``tokens``, ``tags`` and ``entities`` of each row.

        An entity has ``text``, ``label``, ``start`` and ``end``, its place in the row's text: the one that was given,
        or the list of words joined by spaces.
        """
        answers = []
        tags = self._predicted(*self.scores(net, batch))
        for row, text, places in zip(tags, batch["text"], batch["spans"].tolist(), strict=True):
            spans = [(a, b) for a, b in zip(places[::2], places[1::2], strict=True) if a >= 0]
            row = row[: len(spans)]
            found = [(label, spans[first][0], spans[end - 1][1]) for label, first, end in entities(row)]
            answers.append(
                {
                    "text": text,
                    "tokens": [text[a:b] for a, b in spans],
                    "tags": row,
                    "entities": [{"text": text[a:b], "label": label, "start": a, "end": b} for label, a, b in found],
                }
            )
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        """Return the text with its entities marked: ``[Paris](location) in spring``."""
        text: str = answer["text"]
        for entity in reversed(answer["entities"]):
            start, end = entity["start"], entity["end"]
            text = f"{text[:start]}[{text[start:end]}]({entity['label']}){text[end:]}"
        return text


_SAME_PREFIX = {"M": "I", "L": "E", "U": "S"}  # BMES and BILOU, as BIOES writes them


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the entities of a sentence as (label, first word, word after the last one).

    Tags are ``O`` or a prefix and a label, ``B-PER``; schemes BIO, BIOES, BMES, BILOU. As conlleval counts, and seqeval
    by default, an ``I-`` that continues no entity of its label begins one (Tjong Kim Sang and De Meulder 2003,
    "Introduction to the CoNLL-2003 Shared Task").
    """
    found: list[tuple[str, int, int]] = []
    before, label, begin = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, new = tag.partition("-")
        prefix = _SAME_PREFIX.get(prefix, prefix)
        if not (before in ("B", "I") and prefix in ("I", "E") and new == label):
            if before != "O":
                found.append((label, begin, place))
            begin = place
        before, label = prefix, new
    return found


class EntityScore(Metric):
    """Precision, recall or F1 of entities, 0 to 1; an entity is right if its label, first and last word are.

    Computed over all entities together (micro average), as conlleval and seqeval do.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, kind: Literal["precision", "recall", "f1"]) -> None:
        super().__init__()
        self.kind = kind
        self.add_state("counts", torch.zeros(3, dtype=EXACT), dist_reduce_fx="sum")

    def update(self, predicted: list[list[str]], expected: list[list[str]]) -> None:
        """Add the tags of sentences."""
        pairs = [(set(entities(a)), set(entities(b))) for a, b in zip(predicted, expected, strict=True)]
        rows = [[0, 0, 0], *([len(a & b), len(a), len(b)] for a, b in pairs)]
        self.counts += self.counts.new_tensor(rows).sum(0)

    def compute(self) -> Tensor:
        """Return the score; 0 where no entity was predicted or none is in the references."""
        right, predicted, expected = self.counts
        of = {"precision": predicted, "recall": expected, "f1": (predicted + expected) / 2}[self.kind]
        score: Tensor = right / of.clamp(min=0.5)  # the least number of entities that is not zero
        return score

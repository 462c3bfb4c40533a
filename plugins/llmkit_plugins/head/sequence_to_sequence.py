"""The base of heads that read one text and write another."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError, unknown
from llmkit.ops.distillation import Logits, SoftTargets
from llmkit.ops.losses import linear_cross_entropy
from llmkit.ops.metrics import Mean, MeanLoss, Perplexity
from llmkit.ops.writing import Written, answer, scored, shown, write
from llmkit.sequence import DecodingOptions, Memory, Sequence, first_rows, padded, segments_of

STARTS = ("bos", "eos", "pad")
"""Tokens that may stand before a target."""


class SequenceToSequence(Head):
    """Encoder-decoder that reads the field ``inputs[0]`` (the source) and writes ``targets[0]`` (the target).

    Args:
        label_smoothing: share of the probability spread evenly over the vocabulary while training.
        references: ``lines``: each line of a target is a reference of its own, the first of which is trained on.
        start: the tokens that the decoder reads before a target; None: bos.

    Raises:
        UserError: no token to start with, or an unknown one.
    """

    topology = "encoder_decoder"

    def __init__(
        self,
        label_smoothing: float = 0.1,
        references: Literal["one", "lines"] = "one",
        start: list[str] | None = None,
    ) -> None:
        super().__init__()
        start = ["bos"] if start is None else start
        if not start:
            raise UserError("start should have at least one token, got none")
        for name in start:
            if name not in STARTS:
                raise UserError(f"start: {unknown('token', name, STARTS)}")
        self.label_smoothing, self.references, self.start = label_smoothing, references, list(start)

    @abstractmethod
    def text_metrics(self) -> dict[str, nn.Module]:
        """Return metrics whose ``update`` takes the texts that were written, and a list of references for each."""

    def _listed(self, target: str) -> list[str]:
        """Return the references in a target, at least one."""
        lines = [line for line in target.split("\n") if line.strip()] if self.references == "lines" else []
        return lines or [target]

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``source`` and ``target`` ids, each ended by eos and cut to the context.

        A tokenizer may put other ids around a source.
        """
        before, _, after = tokenizer.around
        after = after or [tokenizer.eos_id]
        room, begun = max_length - len(before) - len(after), len(self.start)
        sources = tokenizer.encode_batch(rows[self.inputs[0]])
        features: dict[str, list[Any]] = {"source": [[*before, *row[: max(room, 0)], *after] for row in sources]}
        longest = [len(row) + len(before) + len(after) for row in sources]
        if self.targets[0] in rows:
            written = rows[self.targets[0]]
            targets = tokenizer.encode_batch([self._listed(target)[0] for target in written])
            features["reference"] = written  # metrics compare with the text itself, which the ids may not give back
            features["target"] = [[*row[: max(max_length - begun, 0)], tokenizer.eos_id] for row in targets]
            longest = [max(a, len(b) + begun) for a, b in zip(longest, targets, strict=True)]
            both = zip(features["source"], features["target"], strict=True)
            features["skew"] = [len(source) - len(target) for source, target in both]
        features["length"] = [min(length, max_length) for length in longest]
        features["truncated"] = [int(length > max_length) for length in longest]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return source (B, S), its segments where padded; target input and targets, (B, T), and reference texts."""
        sources = [feature["source"] for feature in features]
        batch: Batch = {"source": padded(sources, tokenizer.pad_id)}
        segments = segments_of([len(row) for row in sources])
        if segments is not None:
            batch["segments"] = segments
        if "target" in features[0]:
            targets = [feature["target"] for feature in features]
            start = self._start(tokenizer)
            batch["ids"] = padded([[*start, *row[:-1]] for row in targets], tokenizer.pad_id)
            batch["targets"] = padded([[IGNORE] * (len(start) - 1) + row for row in targets], IGNORE)
            batch["reference"] = [feature["reference"] for feature in features]
        return batch

    def _start(self, tokenizer: Tokenizer) -> list[int]:
        return [int(getattr(tokenizer, f"{role}_id")) for role in self.start]

    def logits(self, net: Network, batch: Batch) -> Logits:
        """Return the scores of the target tokens, for distillation."""
        return self._logits(net, batch, self._memory(net, batch))

    def loss(self, net: Network, batch: Batch, soft: SoftTargets | None = None) -> Loss:
        """Return the summed, smoothed cross-entropy of the target tokens; a teacher's scores are mixed in."""
        return self._loss(net, batch, self._memory(net, batch), self.label_smoothing, soft)

    def _memory(self, net: Network, batch: Batch) -> Memory:
        return net.encode(batch["source"], Sequence.of(batch["source"], batch.get("segments")))

    def _logits(self, net: Network, batch: Batch, memory: Memory) -> Logits:
        # Target padding stands at the end, where causal attention never looks, and its loss is ignored.
        seq = Sequence.dense(batch["ids"].shape[1], batch["ids"].device)
        hidden_BTD = net.decode(batch["ids"], seq, memory=memory)
        return Logits(hidden_BTD.flatten(0, 1), net.output_weight_VD, net.output_bias_V)

    def _loss(
        self, net: Network, batch: Batch, memory: Memory, smoothing: float, soft: SoftTargets | None = None
    ) -> Loss:
        hidden_ND, weight_VD, bias_V = self._logits(net, batch, memory)
        return linear_cross_entropy(hidden_ND, weight_VD, batch["targets"].flatten(), smoothing, bias_V, soft)

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss and perplexity (not smoothed), the share of unknown tokens among the targets, and on the test
        data the metrics of the written texts.
        """
        metrics: dict[str, nn.Module] = {"loss": MeanLoss(), "perplexity": Perplexity(), "unknown_share": Mean()}
        return {**metrics, **self.text_metrics()} if stage == "test" else metrics

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch; where there are metrics of texts, write them."""
        memory = self._memory(net, batch)
        loss = self._loss(net, batch, memory, 0.0)
        of_texts = [metric for name, metric in metrics.items() if name not in ("loss", "perplexity", "unknown_share")]
        metrics["loss"].update(loss)
        metrics["perplexity"].update(loss)
        metrics["unknown_share"].update((batch["targets"] == tokenizer.unk_id).sum(), loss.count)
        if of_texts:
            texts = [found[0].text for found in self._write(net, batch, memory, tokenizer, self.decoding)]
            references = [self._listed(target) for target in batch["reference"]]
            for metric in of_texts:
                metric.update(texts, references)

    def _write(
        self, net: Network, batch: Batch, memory: Memory, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[list[Written]]:
        starts = [self._start(tokenizer)] * len(batch["source"])
        # Not of the batch: an answer does not depend on it.
        limit = options.max_new_tokens or max(net.max_length - len(self.start), options.min_new_tokens)
        options = dataclasses.replace(options, max_new_tokens=limit)
        rows, device = batch.get("rows"), batch["source"].device
        return write(net, starts, tokenizer, options, memory=memory, rows=rows, device=device)

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return the source, under its field's name, and ``text``, what was written, of each row.

        If several texts are asked for, all are in ``candidates``.
        """
        found = self._write(net, batch, self._memory(net, batch), tokenizer, options)
        sources = tokenizer.decode_batch(batch["source"].tolist())
        both = zip(sources, found, strict=True)
        return [{self.inputs[0]: source, **answer(texts, options)} for source, texts in both]

    def show(self, answer: dict[str, Any]) -> str:
        """Return what was written, or a line for each candidate."""
        return shown(answer)

    def score(self, net: Network, batch: Batch) -> list[dict[str, Any]]:
        """Return the log probability of each target given its source, its number of tokens and its perplexity."""
        seq = Sequence.dense(batch["ids"].shape[1], batch["ids"].device)
        hidden_BTD = net.decode(batch["ids"], seq, memory=self._memory(net, batch))
        both = zip(hidden_BTD, batch["targets"], strict=True)
        weight_VD, bias_V = net.output_weight_VD, net.output_bias_V
        losses = [linear_cross_entropy(states, weight_VD, targets, bias_V=bias_V) for states, targets in both]
        return [scored(float(loss.total), int(loss.count)) for loss in losses]

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return two source texts with what was written for them."""
        answers = self.predict(net, first_rows(batch, 2), tokenizer, self.decoding)
        return "\n".join(f"{answer[self.inputs[0]]}\n  -> {answer['text']}" for answer in answers)

"""Causal language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.distillation import Logits, SoftTargets
from llmkit.ops.losses import linear_cross_entropy
from llmkit.ops.metrics import BitsPerByte, Mean, MeanLoss, Perplexity
from llmkit.ops.writing import OnText, answer, scored, shown, write
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of


def causal_logits(net: Network, batch: Batch) -> Logits:
    """Return a decoder's scores of the next tokens of ``ids``, (B, T)."""
    hidden_BTD = net.decode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments")))
    return Logits(hidden_BTD.flatten(0, 1), net.output_weight_VD, net.output_bias_V)


def causal_loss(net: Network, batch: Batch, soft: SoftTargets | None = None) -> Loss:
    """Return the summed cross-entropy of a decoder's ``ids`` and ``targets``, (B, T)."""
    hidden_ND, weight_VD, bias_V = causal_logits(net, batch)
    return linear_cross_entropy(hidden_ND, weight_VD, batch["targets"].flatten(), bias_V=bias_V, soft=soft)


class Generation(Head):
    """Causal language model: predicts the next token, continues a prompt.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

    topology = "decoder"
    layout = "blocks"
    inputs = ("text",)
    texts = ("text",)
    kept = "end"
    decoding = DecodingOptions(max_new_tokens=200)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` of each text, whole: the data layer cuts them into blocks, prediction keeps the end."""
        ids = tokenizer.encode_batch(rows["text"])
        return {"ids": ids, "truncated": [int(len(row) > max_length) for row in ids]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids and next-token targets, (B, T), of separate texts."""
        rows = [[*tokenizer.around[0], *feature["ids"]] for feature in features]
        if not all(rows):
            raise UserError("the prompt has no tokens: give at least one character of text")
        batch = {"ids": padded(rows, tokenizer.pad_id), "targets": padded([[*row[1:], IGNORE] for row in rows], IGNORE)}
        segments = segments_of([len(row) for row in rows])
        return batch if segments is None else {**batch, "segments": segments}

    def logits(self, net: Network, batch: Batch) -> Logits:
        """Return the scores of the next tokens, for distillation."""
        return causal_logits(net, batch)

    def loss(self, net: Network, batch: Batch, soft: SoftTargets | None = None) -> Loss:
        """Return the summed next-token cross-entropy; a teacher's scores are mixed in."""
        return causal_loss(net, batch, soft)

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, perplexity, bits per byte and the share of unknown tokens among the targets."""
        metrics: dict[str, nn.Module] = {"loss": MeanLoss(), "perplexity": Perplexity()}
        return {**metrics, "bits_per_byte": BitsPerByte(), "unknown_share": Mean()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        loss = self.loss(net, batch)
        metrics["loss"].update(loss)
        metrics["perplexity"].update(loss)
        metrics["bits_per_byte"].update(loss, batch["bytes"], batch.get("hidden", 0.0))
        metrics["unknown_share"].update((batch["targets"] == tokenizer.unk_id).sum(), loss.count)

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions, on_text: OnText | None = None
    ) -> list[dict[str, Any]]:
        """Return ``prompt`` and ``text`` (the continuation) of each row; several ``candidates`` if asked for."""
        prompts = _real_rows(batch["ids"], batch.get("segments"))
        device = batch["ids"].device
        found = write(net, prompts, tokenizer, options, rows=batch.get("rows"), device=device, on_text=on_text)
        return [{"prompt": texts[0].prompt, **answer(texts, options)} for texts in found]

    def show(self, answer: dict[str, Any]) -> str:
        """Return the prompt with its continuation, or a line for each candidate."""
        return shown(answer, answer["prompt"])

    def score(self, net: Network, batch: Batch) -> list[dict[str, Any]]:
        """Return the log probability of each text's tokens after the first, its number of tokens and its perplexity.

        Each token is predicted from all before it; of a text longer than the context, from half a context or more.
        """
        weight_VD, device, half = net.output_weight_VD, batch["ids"].device, max(1, net.max_length // 2)
        rows = _real_rows(batch["ids"], batch.get("segments"))
        parts: list[tuple[int, list[int], list[int]]] = []  # row, what is read, and what is predicted
        for row, ids in enumerate(rows):
            start, done = 0, 1  # the tokens before ``done`` are predicted already
            while done < len(ids):
                end = min(start + net.max_length + 1, len(ids))
                parts.append((row, ids[start : end - 1], [*[IGNORE] * (done - start - 1), *ids[done:end]]))
                start, done = end - half, end
        totals, counts = [0.0] * len(rows), [0] * len(rows)
        for first in range(0, len(parts), len(rows)):
            group = parts[first : first + len(rows)]
            ids_BT, targets_BT = padded([ids for _, ids, _ in group], 0), padded([t for *_, t in group], IGNORE)
            segments_BT = segments_of([len(ids) for _, ids, _ in group])
            seq = Sequence.of(ids_BT.to(device), None if segments_BT is None else segments_BT.to(device))
            hidden_BTD = net.decode(ids_BT.to(device), seq)
            for (row, *_), hidden_TD, targets_T in zip(group, hidden_BTD, targets_BT.to(device), strict=True):
                loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T, bias_V=net.output_bias_V)
                totals[row] += float(loss.total)
                counts[row] += int(loss.count)
        return [scored(total, count) for total, count in zip(totals, counts, strict=True)]

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return a continuation of the first words of a validation batch."""
        prompt = {"ids": batch["ids"][:1, : min(16, net.max_length // 2)]}
        answer = self.predict(net, prompt, tokenizer, self.decoding)[0]
        return f"{answer['prompt']}|{answer['text']}"


def _real_rows(ids_BT: Tensor, segments_BT: Tensor | None) -> list[list[int]]:
    if segments_BT is None:
        return [list(map(int, row)) for row in ids_BT.tolist()]
    return [list(map(int, row[real > 0].tolist())) for row, real in zip(ids_BT, segments_BT, strict=True)]

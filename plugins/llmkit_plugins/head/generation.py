"""Causal language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.decoding import OnToken, generate
from llmkit.ops.losses import linear_cross_entropy
from llmkit.ops.metrics import BitsPerByte, Mean, MeanLoss, Perplexity
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of


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
        rows = [feature["ids"] for feature in features]
        if not all(rows):
            raise UserError("the prompt has no tokens: give at least one character of text")
        batch = {"ids": padded(rows, tokenizer.pad_id), "targets": padded([[*row[1:], IGNORE] for row in rows], IGNORE)}
        segments = segments_of([len(row) for row in rows])
        return batch if segments is None else {**batch, "segments": segments}

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed next-token cross-entropy."""
        hidden_BTD = net.decode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments")))
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), net.output_weight_VD, batch["targets"].flatten())

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
        self,
        net: Network,
        batch: Batch,
        tokenizer: Tokenizer,
        options: DecodingOptions,
        on_token: OnToken | None = None,
    ) -> list[dict[str, Any]]:
        """Return ``prompt`` and ``text`` (the continuation) of each row."""
        prompts = _real_rows(batch["ids"], batch.get("segments"))
        arguments: dict[str, Any] = {
            "eos_id": tokenizer.eos_id,
            "banned": special_ids(tokenizer) - {tokenizer.eos_id},
            "device": batch["ids"].device,
        }
        if options.num_beams > 1:
            # Rows of different lengths cannot share a beam search.
            new = [generate(net, [prompt[-net.max_length // 2 :]], options, **arguments)[0] for prompt in prompts]
        else:
            new = generate(net, prompts, options, on_token=on_token, **arguments)
        texts = tokenizer.decode_batch(new)
        starts = tokenizer.decode_batch(prompts)
        return [{"prompt": start, "text": text} for start, text in zip(starts, texts, strict=True)]

    def show(self, answer: dict[str, Any]) -> str:
        """Return the prompt with its continuation."""
        return f"{answer['prompt']}{answer['text']}"

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return a continuation of the first words of a validation batch."""
        prompt = {"ids": batch["ids"][:1, : min(16, net.max_length // 2)]}
        answer = self.predict(net, prompt, tokenizer, self.decoding)[0]
        return f"{answer['prompt']}|{answer['text']}"


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that stand for no text."""
    names = ("pad_id", "bos_id", "eos_id", "unk_id", "mask_id", "sep_id")
    return {getattr(tokenizer, name) for name in names}


def _real_rows(ids_BT: Tensor, segments_BT: Tensor | None) -> list[list[int]]:
    if segments_BT is None:
        return [list(map(int, row)) for row in ids_BT.tolist()]
    return [list(map(int, row[real > 0].tolist())) for row, real in zip(ids_BT, segments_BT, strict=True)]

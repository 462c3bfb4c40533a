"""Completing prompts: what a language model is taught when it is tuned to follow instructions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from torch import nn

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError, unknown
from llmkit.ops.distillation import Logits, SoftTargets
from llmkit.ops.losses import linear_cross_entropy
from llmkit.ops.metrics import Mean, MeanLoss, Perplexity
from llmkit.ops.writing import answer, scored, shown, write
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of
from llmkit_plugins.head.generation import causal_logits, causal_loss

SPEAKERS = ("system", "user", "assistant", "tool")


@runtime_checkable
class Chats(Protocol):
    """A tokenizer that has a chat template."""

    def chat(self, messages: list[dict[str, str]], reply: bool = False) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and which the assistant wrote; ``reply``: it ends where that begins."""


def conversation(given: Any) -> list[dict[str, str]]:
    """Return a list of messages, the JSON of one, perhaps as ``{messages: ...}``, or what a user says as messages.

    Raises UserError for anything else.
    """
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except ValueError:
            parsed = None
        given = parsed if isinstance(parsed, list | dict) else [{"role": "user", "content": given}]
    messages = given.get("messages") if isinstance(given, Mapping) else given
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages: expected a list of {{role, content}}, got {str(given)[:60]!r}")
    for message in messages:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"messages: each needs a role and a content, both text, got {str(message)[:60]!r}")
        if texts[0] not in SPEAKERS:
            raise UserError(f"messages: {unknown('role', str(texts[0]), SPEAKERS)}")
    return [{str(name): value for name, value in message.items()} for message in messages]


class Completion(Head):
    """Causal language model that reads a ``prompt`` and writes its ``completion``, the only part that has a loss.

    Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"; for instructions Wei et al.
    2021, arXiv:2109.01652. Prompt and completion are encoded one by one, and a completion is followed by the token that
    ends a text: what stands between the two, a blank or a line end, belongs to one of them. Of a row that is longer
    than the context the beginning of the prompt is left out, of a completion that is as long as that its end.

    Args:
        chat: rows are conversations, in the field ``messages``: a list of ``{role, content}``, or its JSON. The
            tokenizer's chat template makes them text, all that the assistant wrote has a loss, and prediction writes
            the assistant's next turn. A text that is not JSON is what the user says.
    """

    topology = "decoder"
    inputs = ("prompt",)
    targets = ("completion",)
    texts = ("prompt", "completion")
    notes = MappingProxyType({"silent": "have nothing that the assistant wrote, and no loss"})
    packs = True  # examples may share a row
    kept = "end"
    decoding = DecodingOptions(max_new_tokens=200, temperature=0.0)

    def __init__(self, chat: bool = False) -> None:
        super().__init__()
        self.chat = chat
        if chat:
            self.inputs, self.targets, self.texts = ("messages",), (), ()  # type: ignore[misc,assignment]

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``prompt``, its ids, and where the completion is known ``ids`` and ``targets``, one for each id."""
        if self.chat:
            return self._conversations(rows["messages"], tokenizer, max_length)
        before = tokenizer.around[0]
        prompts = [[*before, *row] or [tokenizer.bos_id] for row in tokenizer.encode_batch(rows["prompt"])]
        if "completion" not in rows:
            lengths = [min(len(row), max_length) for row in prompts]
            return {"prompt": prompts, "length": lengths, "truncated": [int(len(row) > max_length) for row in prompts]}
        features: dict[str, list[Any]] = {"prompt": prompts, "ids": [], "targets": [], "length": [], "truncated": []}
        for prompt, completion in zip(prompts, tokenizer.encode_batch(rows["completion"]), strict=True):
            target = [*completion, tokenizer.eos_id][:max_length]
            kept = prompt[-(max_length - len(target) + 1) :]  # the last target is not read
            features["ids"].append([*kept, *target[:-1]])
            features["targets"].append([*[IGNORE] * (len(kept) - 1), *target])
            features["length"].append(len(kept) + len(target) - 1)
            features["truncated"].append(int(len(kept) < len(prompt) or len(target) <= len(completion)))
        return features

    def _conversations(self, rows: list[Any], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        names = ("prompt", "ids", "targets", "length", "truncated", "silent")
        features: dict[str, list[Any]] = {name: [] for name in names}
        if not isinstance(tokenizer, Chats):
            raise UserError(f"messages: {type(tokenizer).__name__} has no chat template: use a pretrained tokenizer")
        for row in rows:
            messages = conversation(row)
            last = len(messages) - (messages[-1]["role"] == "assistant")
            prompt, _ = tokenizer.chat(messages[:last], reply=True)
            whole, wrote = tokenizer.chat(messages)
            targets = [number if own else IGNORE for number, own in zip(whole, wrote, strict=True)][1:]
            features["prompt"].append(prompt)
            features["ids"].append(whole[:-1][-max_length:])
            features["targets"].append(targets[-max_length:])
            features["length"].append(len(features["ids"][-1]))
            features["truncated"].append(int(len(targets) > max_length))
            features["silent"].append(int(all(target == IGNORE for target in targets[-max_length:])))
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return prompts (B, P), padded by -1, and where completions are known ids and targets, (B, T).

        Segments, (B, T), are there where the ids are padded.
        """
        batch: Batch = {"prompt": padded([feature["prompt"] for feature in features], -1)}
        if "targets" not in features[0]:
            return batch
        rows, targets = ([feature[name] for feature in features] for name in ("ids", "targets"))
        batch |= {"ids": padded(rows, tokenizer.pad_id), "targets": padded(targets, IGNORE)}
        segments = segments_of([len(row) for row in rows])
        return batch if segments is None else {**batch, "segments": segments}

    def logits(self, net: Network, batch: Batch) -> Logits:
        """Return the scores of the next tokens, for distillation."""
        return causal_logits(net, batch)

    def loss(self, net: Network, batch: Batch, soft: SoftTargets | None = None) -> Loss:
        """Return the summed cross-entropy of the completions' tokens; a teacher's scores are mixed in."""
        return causal_loss(net, batch, soft)

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss and perplexity of the completions, and the share of unknown tokens in them."""
        return {"loss": MeanLoss(), "perplexity": Perplexity(), "unknown_share": Mean()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        loss = self.loss(net, batch)
        metrics["loss"].update(loss)
        metrics["perplexity"].update(loss)
        metrics["unknown_share"].update((batch["targets"] == tokenizer.unk_id).sum(), loss.count)

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return ``prompt`` and ``text``, what was written, of each row; several ``candidates`` if asked for."""
        prompts = [row[row >= 0].tolist() for row in batch["prompt"]]
        found = write(net, prompts, tokenizer, options, rows=batch.get("rows"), device=batch["prompt"].device)
        return [{"prompt": texts[0].prompt, **answer(texts, options)} for texts in found]

    def show(self, answer: dict[str, Any]) -> str:
        """Return what was written, or a line for each candidate."""
        return shown(answer)

    def score(self, net: Network, batch: Batch) -> list[dict[str, Any]]:
        """Return the log probability of each completion given its prompt, its number of tokens and its perplexity."""
        hidden_BTD = net.decode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments")))
        weight_VD, bias_V = net.output_weight_VD, net.output_bias_V
        both = zip(hidden_BTD, batch["targets"], strict=True)
        losses = [linear_cross_entropy(states, weight_VD, targets, bias_V=bias_V) for states, targets in both]
        return [scored(float(loss.total), int(loss.count)) for loss in losses]

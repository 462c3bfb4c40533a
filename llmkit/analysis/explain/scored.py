"""One row as a function of its tokens' vectors: what attributions and deletion curves are computed on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from llmkit.analysis.explain.capture import Recording
from llmkit.analysis.explain.maps import of
from llmkit.analysis.explain.reading import row_batch
from llmkit.analysis.explain.tokens import labels
from llmkit.contracts import IGNORE, Batch, Network, Tokenizer
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel


class Call(NamedTuple):
    """One call of a module."""

    x: Tensor
    """Its first argument."""
    y: Tensor
    """What it returned."""


@contextmanager
def watched(module: nn.Module, instead: Tensor | None = None) -> Iterator[list[Call]]:
    """Record the calls of a module within the block; the first one returns ``instead`` where it is given."""
    calls: list[Call] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        calls.append(Call(inputs[0], output))
        return instead if len(calls) == 1 else None

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


@runtime_checkable
class Scoring(Protocol):
    """A head that has scores of classes."""

    def scores(self, net: Network, batch: Batch, /) -> Any:
        """Return the scores of each text's classes, (B, C); of other shapes where words are scored."""


class ScoredRow:
    """One row, and what the model makes of it, as a function of the vectors of its tokens.

    The score is that of the most probable class where the head scores classes of a text. Where the head predicts next
    tokens and has no target field it is the log probability of the most probable next token. Of all other heads it is
    the log probability of the row's targets (minus the loss); targets that the row lacks are the model's own answer.

    The baseline of a token is the vector of the mask token. Tokens that frame a text (``[CLS]``, bos) stay.

    Args:
        model: the model, in eval mode.
        row: a text, or a row with the head's fields.
        at: the position in ``targets`` whose log probability is the score, in place of all of them.

    Raises:
        UserError: the row lacks a field or has no target, or ``at`` is not a position with a target.
    """

    def __init__(self, model: LanguageModel, row: str | Mapping[str, Any], at: int | None = None) -> None:
        self.model, self.head, self.net = model, model.head, model.network
        head = self.head
        given = dict(row) if isinstance(row, Mapping) else {**dict.fromkeys(head.inputs, ""), head.inputs[0]: row}
        self.class_: int | None = None
        """The number of the most probable class; None: the head has no classes of a text."""
        self.by_token = False
        """Whether the loss is the cross-entropy of the decoder's states: then rows are scored many at once."""
        with torch.no_grad():
            if isinstance(head, Scoring):
                self.batch = row_batch(model, given, head.inputs)
                scores = head.scores(self.net, self.batch)
                if isinstance(scores, Tensor) and scores.dim() == 2:
                    self.class_ = int(scores[0].argmax())
            if self.class_ is None:
                self.batch = row_batch(model, self._complete(given), (*head.inputs, *head.targets))
                self._choose_targets(at)
                loss = head.loss(self.net, self.batch)
                self.count = int(loss.count)
                if not self.count:
                    raise UserError(f"{type(head).__name__} predicts nothing in this row: there is nothing to explain")
                if self.net.topology != "encoder" and "targets" in self.batch:
                    own = -float(self._log_probabilities(self.batch)[0])
                    self.by_token = math.isclose(own, float(loss.total), rel_tol=1e-3, abs_tol=1e-3)
            elif at is not None:
                raise UserError(f"{type(head).__name__} has no target tokens to choose from")
        self._read()

    def of(self, model: LanguageModel) -> ScoredRow:
        """Return the same row, tokens and target as another model of the same sizes reads them."""
        other = copy.copy(self)
        other.model, other.head, other.net = model, model.head, model.network
        other._read()
        return other

    @torch.no_grad()
    def _read(self) -> None:
        with watched(self.net.embedding) as calls:
            self._score_one()
        self.ids: list[int] = calls[0].x.flatten().tolist()
        """The tokens that the network reads (of an encoder-decoder: the source), P of them."""
        self.x_RTD = calls[0].y
        framing = {self.tokenizer.pad_id, self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.sep_id}
        framing |= {number for part in self.tokenizer.around for number in part}
        self.free = [place for place, number in enumerate(self.ids) if number not in framing]
        """The positions that the baseline replaces."""
        self.baseline_RTD = self.with_baseline([self.free])[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that read the tokens: the encoder's, or those of a network that has none."""
        return list(self.net.decoder if self.net.topology == "decoder" else self.net.encoder)

    @property
    def tokens(self) -> list[str]:
        """The tokens as a person reads them."""
        return labels(self.tokenizer, self.ids)

    @property
    def explained(self) -> str:
        """What the score is of: the name of the class, or the target tokens."""
        if self.class_ is not None:
            names = self.head.info().get("labels")
            return str(names[self.class_]) if isinstance(names, list) else f"output {self.class_}"
        targets = self.batch.get("targets")
        if not self.by_token or targets is None:
            return "the targets"
        return "".join(labels(self.tokenizer, targets[targets != IGNORE].tolist()))

    @torch.no_grad()
    def maps(self) -> list[Tensor]:
        """Return the map of each layer that reads the tokens, (H, P, P)."""
        recording = Recording(self.net)
        self._score_one(recording)
        rows, length, _ = self.x_RTD.shape
        found = []
        for part in (part for part in recording.passes[0].parts if part.kind == "attention"):
            pictures = [of(part, number).weights_HTS for number in range(rows)]
            whole_HPP = pictures[0].new_zeros(len(pictures[0]), rows * length, rows * length)
            for first, weights_HTT in zip(range(0, rows * length, length), pictures, strict=True):
                places = slice(first, first + weights_HTT.shape[-1])  # padding stands at the end
                whole_HPP[:, places, places] = weights_HTT
            found.append(whole_HPP)
        return found

    def with_baseline(self, places: Sequence[Sequence[int]]) -> Tensor:
        """Return the vectors once for each list of positions, with the baseline there, (N, R, T, D)."""
        with torch.no_grad():
            baseline_D = self.net.embedding(torch.tensor(self.tokenizer.mask_id, device=self.x_RTD.device))
        x_NPD = self.x_RTD.flatten(0, 1).repeat(len(places), 1, 1)
        for number, chosen in enumerate(places):
            x_NPD[number, list(chosen)] = baseline_D
        return x_NPD.reshape(-1, *self.x_RTD.shape)

    def score(self, x_NRTD: Tensor, module: nn.Module | None = None) -> Tensor:
        """Return the score, (N,), for each of N values of the embedding's output, or of a module's."""
        module = self.net.embedding if module is None else module
        if self.class_ is not None:
            return self._scores(x_NRTD, module)[:, self.class_]
        if self.by_token:
            with watched(module, x_NRTD.flatten(0, 1)):
                return self._log_probabilities(self._repeated(len(x_NRTD)))
        found = []
        for x_RTD in x_NRTD:
            with watched(module, x_RTD):
                found.append(self._score_one())
        return torch.stack(found)

    @torch.no_grad()
    def probability(self, x_NRTD: Tensor) -> Tensor:
        """Return the probability of the class, or of the targets (the geometric mean of theirs), (N,).

        A head with one score only has no probabilities: it is the score.
        """
        if self.class_ is None:
            return (self.score(x_NRTD) / max(self.count, 1)).exp()
        scores_NC = self._scores(x_NRTD, self.net.embedding)
        return (scores_NC.softmax(-1) if scores_NC.shape[1] > 1 else scores_NC)[:, self.class_]

    @torch.no_grad()
    def states(self, module: nn.Module, x_RTD: Tensor) -> Tensor:
        """Return what a module returns when the embedding returns ``x_RTD``."""
        with watched(self.net.embedding, x_RTD), watched(module) as calls:
            self._score_one()
        return calls[0].y

    def _scores(self, x_NRTD: Tensor, module: nn.Module) -> Tensor:
        with watched(module, x_NRTD.flatten(0, 1)):
            scores: Tensor = cast(Scoring, self.head).scores(self.net, self._repeated(len(x_NRTD)))
        return scores.float()

    def _log_probabilities(self, batch: Batch) -> Tensor:
        """Return the sum of the log probabilities of each row's targets, (B,)."""
        targets_BT = batch["targets"]
        places = (targets_BT[0] != IGNORE).nonzero()[:, 0]
        recording = Recording(self.net)
        self.head.loss(recording, batch)
        scores = vocabulary_scores(self.net, recording.passes[-1].hidden_BTD[:, places]).float().log_softmax(-1)
        return scores.gather(-1, targets_BT[:, places, None]).sum((1, 2))

    def _repeated(self, count: int) -> Batch:
        """Return the batch of the row ``count`` times."""
        return {
            name: value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.batch.items()
        }

    def _score_one(self, net: Network | None = None) -> Tensor:
        net = self.net if net is None else net
        if self.class_ is None:
            return -self.head.loss(net, self.batch).total
        score: Tensor = cast(Scoring, self.head).scores(net, self.batch)[0, self.class_]
        return score

    def _complete(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with its targets, taken from the model's answer where it lacks them."""
        if missing := [name for name in self.head.targets if name not in row]:
            answer = self.model.predict([row])[0]
            for name in missing:
                value = answer.get(name, answer.get("text"))
                if value is None and {"answer", "start"} <= answer.keys():  # a span of the context
                    value = {"text": [answer["answer"]], "answer_start": [answer["start"]]}
                if value is None:
                    raise UserError(f"the row needs the field {name}: {type(self.head).__name__} does not answer in it")
                row[name] = value
        return row

    def _choose_targets(self, at: int | None) -> None:
        """Leave one target: that at ``at``, or without target fields the most probable next token."""
        targets = self.batch.get("targets")
        if targets is None or (at is None and self.head.targets):
            return
        places = (targets[0] != IGNORE).nonzero()[:, 0].tolist()
        chosen = torch.full_like(targets, IGNORE)
        if at is None:
            chosen[0, -1] = next_scores(self.model, self.batch)[0, -1].argmax()
        elif at in places:
            chosen[0, at] = targets[0, at]
        else:
            raise UserError(f"there is no target at {at}; they are at {', '.join(map(str, places[:20])) or 'none'}")
        self.batch = {**self.batch, "targets": chosen}


def next_scores(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the scores over the vocabulary at each position of a decoder, (B, T, V)."""
    recording = Recording(model.network)
    model.head.loss(recording, batch)
    return vocabulary_scores(model.network, recording.passes[-1].hidden_BTD)


def vocabulary_scores(net: Network, hidden_BTD: Tensor) -> Tensor:
    """Return the scores over the vocabulary of what a network returned, (B, T, V)."""
    scores = hidden_BTD @ net.output_weight_VD.to(hidden_BTD.dtype).T
    return scores if net.output_bias_V is None else scores + net.output_bias_V

"""Finding the answer to a question in a text."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.metrics import MeanLoss, MeanScore
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of
from llmkit_plugins.head.answer_scores import answer_scores, cmrc_scores
from llmkit_plugins.head.labels import accepted
from llmkit_plugins.head.matches import RADII, matches_of, near_matches, spans_of
from llmkit_plugins.head.words import Span, by_character, encode, means, pieces


def _pieces(text: str) -> list[str]:
    return pieces(text, spans_of(text))


class QuestionAnswering(Head):
    """Extractive question answering: the span of a context that answers a question.

    The encoder reads the question, a separator and the context; a context that is too long for that is read in
    overlapping windows. A linear layer scores each word as the first and as the last one of the answer (Devlin et al.
    2019, arXiv:1810.04805), from the mean of its pieces' states and from how many words of the question stand near it
    (as the match feature of Chen et al. 2017, arXiv:1704.00051). Probabilities are over all windows of a question
    together (Clark and Gardner 2018, arXiv:1710.10723). ``answers`` is as in SQuAD: a mapping with the lists ``text``
    and ``answer_start``, or a list of mappings with one of each.

    If some training rows have no answers, as in SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822), the head may
    abstain: the state at the separator is scored as one more candidate, in the window where it is least likely. The
    answer is then the empty text.

    Args:
        dropout: dropout before the linear layer.
        stride: tokens from the beginning of a window to that of the next one; null: half of what fits.
        max_answer_words: words of the longest answer that is looked for.
        level: what exact match and F1 compare: ``word`` (SQuAD's official scores), ``character``, ``auto``, which is
            ``character`` where most words of the context are single characters as in Chinese and Japanese, or ``cmrc``:
            CMRC 2018's official scores, whose F1 counts the longest common run alone and is lower.
    """

    topology = "encoder"
    inputs = ("question", "context")
    targets = ("answers",)
    texts = ("question", "context")
    words: ClassVar = {"question": _pieces, "context": _pieces}
    monitor = ("f1", "max")
    notes: ClassVar = {
        "moved": "have a wrong answer_start: their answers were found elsewhere in the context",
        "untrained": "have no answer in their context, or one that fits into no window: not trained on, but counted in "
        "scores",
    }

    def __init__(
        self,
        dropout: float = 0.1,
        stride: int | None = None,
        max_answer_words: int = 30,
        level: Literal["auto", "word", "character", "cmrc"] = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("stride", stride), ("max_answer_words", max_answer_words)):
            if value is not None and value < 1:
                raise UserError(f"question_answering: {name} must be at least 1, got {value}")
        self.stride, self.max_answer_words, self.level = stride, max_answer_words, level
        self.dropout = nn.Dropout(dropout)
        self.abstains = False

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """See whether some training rows have no answers."""
        self.abstains = any(not answers for _, answers in accepted(columns["answers"], _answers))

    def info(self) -> dict[str, Any]:
        """Return whether it may abstain, if it may."""
        return {"abstains": True} if self.abstains else {}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what ``info`` returned."""
        self.abstains = bool(info.get("abstains", False))

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from a word's mean state and matches to its scores as first and as last word."""
        self.classifier = nn.Linear(dim + len(RADII), 2)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        if self.abstains:
            self.no_answer = nn.Linear(dim, 2)
            nn.init.normal_(self.no_answer.weight, std=0.02)
            nn.init.zeros_(self.no_answer.bias)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return the features of each question with all its windows.

        ``asked``: ids of the question and the separator, at most half of the context. ``ids`` of the context's words
        and ``sizes``, the number of ids of each of them; ``matches``: see ``matches_of``. ``windows``: first word and
        word after the last one of each window. The candidates for first and last word are the words of the first
        window, then those of the second and so on: ``starts`` and ``ends`` are those that begin and end an answer.
        ``question``, ``text`` (the context) and ``answers`` (JSON) are texts. ``moved`` and ``untrained`` are 1 where
        ``notes`` say so.
        """
        spans = [spans_of(context) for context in rows["context"]]
        asked = encode(tokenizer, [_pieces(question) for question in rows["question"]])
        contexts = encode(tokenizer, [pieces(*row) for row in zip(rows["context"], spans, strict=True)])
        names = ("asked", "ids", "sizes", "windows", "matches", "question", "text", "length", "truncated")
        features: dict[str, list[Any]] = {name: [] for name in names}
        for question, text, piece_ids, word_ids in zip(rows["question"], rows["context"], asked, contexts, strict=True):
            ids = [token for piece in piece_ids for token in piece]
            kept = [*ids[: max(0, max_length // 2 - 1)], tokenizer.sep_id]
            room = max_length - len(kept)
            word_ids = [piece[:room] for piece in word_ids]
            sizes = [len(piece) for piece in word_ids]
            windows = self._windows(sizes, room)
            longest = max(sum(sizes[first:end]) for first, end in windows)
            features["asked"].append(kept)
            features["ids"].append([token for piece in word_ids for token in piece])
            features["sizes"].append(sizes)
            features["windows"].append([word for window in windows for word in window])
            features["matches"].append(matches_of(question, text))
            features["question"].append(question)
            features["text"].append(text)
            features["length"].append(len(windows) * (len(kept) + longest))
            features["truncated"].append(int(len(kept) <= len(ids)))
        if "answers" in rows:
            self._add_answers(features, rows, spans)
        return features

    def _windows(self, sizes: list[int], room: int) -> list[Span]:
        """Return first word and word after the last one of each window of at most ``room`` tokens."""
        stride = min(self.stride or max(1, room // 2), room)
        begins = [0, *accumulate(sizes)]  # of each word, in tokens
        found: list[Span] = []
        first = end = 0
        while end < len(sizes):
            fits = bisect_right(begins, begins[first] + room) - 1
            if fits > end:
                found.append((first, fits))
            end = fits
            # The next one begins a stride later, but leaves no word out.
            first = min(bisect_left(begins, begins[first] + stride), end)
        return found

    def _add_answers(
        self, features: dict[str, list[Any]], rows: Mapping[str, list[Any]], spans: list[list[Span]]
    ) -> None:
        """Add the answers as text and as candidates, and mark those that are not where they should be."""
        features |= {name: [] for name in ("starts", "ends", "answers", "moved", "untrained")}
        for text, given, places, windows in zip(
            rows["context"], rows["answers"], spans, features["windows"], strict=True
        ):
            starts, ends = set(), set()
            answers = _answers(given)
            found = [_find(text, *answer) for answer in answers]
            for begin, (answer, _) in zip(found, answers, strict=True):
                if begin is None:
                    continue
                first = bisect_right(places, begin, key=lambda span: span[1])
                last = bisect_left(places, begin + len(answer), key=lambda span: span[0]) - 1
                before = 0
                for a, b in zip(windows[::2], windows[1::2], strict=True):
                    if a <= first <= last < b:
                        starts.add(before + first - a)
                        ends.add(before + last - a)
                    before += b - a
            moved = any(begin not in (None, start) for begin, (_, start) in zip(found, answers, strict=True))
            features["moved"].append(int(moved))
            features["untrained"].append(int(not starts and not (self.abstains and not answers)))
            features["starts"].append(sorted(starts))
            features["ends"].append(sorted(ends))
            features["answers"].append(json.dumps([answer for answer, _ in answers]))

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return a batch of Q questions with at most K candidates.

        One row a window: ``ids``, ``segments`` where padded, and ``words``, question * K + candidate of each token of
        the context, -1 of others, (B, T). ``windows``: the row of each candidate, and ``places``: its word in the
        context, -1 for padding, (Q, K); ``near``: how many words of the question are around it, (Q, K, radii).
        ``question``, ``text`` and, where they are known, ``answers`` as in ``encode``; then also ``gold``, whether a
        candidate is the first and the last word of an answer, (Q, K, 2). A head that may abstain has one more
        candidate in ``gold``, the last one, which is right where there are no answers, and ``separators``, the place of
        the separator in each window.
        """
        most = max(sum(f["windows"][1::2]) - sum(f["windows"][::2]) for f in features)
        ids: list[list[int]] = []
        owners: list[list[int]] = []
        windows: list[list[int]] = []
        places: list[list[int]] = []
        separators: list[int] = []
        for q, feature in enumerate(features):
            begins = [0, *accumulate(feature["sizes"])]
            windows.append([])
            places.append([])
            for first, end in zip(feature["windows"][::2], feature["windows"][1::2], strict=True):
                candidate = q * most + len(places[-1]) - first  # of word 0
                owners.append([-1] * len(feature["asked"]))
                owners[-1] += [candidate + w for w in range(first, end) for _ in range(feature["sizes"][w])]
                windows[-1] += [len(ids)] * (end - first)
                places[-1] += range(first, end)
                ids.append(feature["asked"] + feature["ids"][begins[first] : begins[end]])
                separators.append(len(feature["asked"]) - 1)
        batch: Batch = {
            "ids": padded(ids, tokenizer.pad_id),
            "words": padded(owners, -1),
            "windows": padded(windows, -1),
            "places": padded(places, -1),
            **{name: [feature[name] for feature in features] for name in ("question", "text")},
        }
        if self.abstains:
            batch["separators"] = torch.tensor(separators)
        segments = segments_of([len(row) for row in ids])
        if segments is not None:
            batch["segments"] = segments
        near = [near_matches(feature["matches"])[row] for feature, row in zip(features, places, strict=True)]
        batch["near"] = nn.utils.rnn.pad_sequence(near, batch_first=True)
        if "answers" in features[0]:
            batch["answers"] = [feature["answers"] for feature in features]
            batch["gold"] = torch.zeros(len(features), most + self.abstains, 2, dtype=torch.bool)
            for q, feature in enumerate(features):
                batch["gold"][q, feature["starts"], 0] = True
                batch["gold"][q, feature["ends"], 1] = True
                if self.abstains and not json.loads(feature["answers"]):
                    batch["gold"][q, most] = True
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        """Return the log-probabilities of each candidate as first and as last word of the answer, (Q, K, 2).

        A head that may abstain has one more candidate, the last one.
        """
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments"))).x_BSD
        windows = batch["windows"]
        states_ND, _ = means(x_BTD, batch["words"], windows.numel())
        states_QKD = self.dropout(states_ND).reshape(*windows.shape, -1)
        scores: Tensor = self.classifier(torch.cat([states_QKD, batch["near"].to(states_QKD.dtype)], -1))
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        padding = windows[..., None] < 0
        exact = exact.masked_fill(padding, -torch.inf)
        if self.abstains:
            at = torch.arange(len(x_BTD), device=x_BTD.device), batch["separators"]
            none_B2 = self.no_answer(self.dropout(x_BTD[at])).to(exact.dtype)
            none_QK2 = none_B2[windows.clamp(min=0)].masked_fill(padding, torch.inf)
            exact = torch.cat([exact, none_QK2.amin(1, keepdim=True)], 1)
        return exact.log_softmax(1)

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed negative log-probability of first and last words, over the questions with an answer."""
        return self._loss(self.scores(net, batch), batch["gold"])

    def _loss(self, scores: Tensor, gold: Tensor) -> Loss:
        known_Q = gold[..., 0].any(1)
        # Of a question without an answer all candidates are chosen: it adds nothing, without a look at which those are.
        chosen = scores.masked_fill(~gold & known_Q[:, None, None], -torch.inf)
        return Loss(-chosen.logsumexp(1).masked_fill(~known_Q[:, None], 0.0).sum(), known_Q.sum())

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, and exact match and F1 of the answers' text, 0 to 100.

        A head that may abstain has the F1 of questions with answers and of those without, too (of which it is the share
        where it abstains).
        """
        parts = ("has_answer_f1", "no_answer_f1") if self.abstains else ()
        return {"loss": MeanLoss(), **{name: MeanScore() for name in ("exact_match", "f1", *parts)}}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        scores = self.scores(net, batch)
        metrics["loss"].update(self._loss(scores, batch["gold"]))
        for (text, start, end, _), answers in zip(self._best(scores, batch), batch["answers"], strict=True):
            references = json.loads(answers)
            exact, f1 = self._answer_scores(text, text[start:end], references)
            metrics["exact_match"].update(100 * exact, 1)
            metrics["f1"].update(100 * f1, 1)
            if self.abstains:
                answered = bool(references)
                metrics["has_answer_f1"].update(100 * f1 * answered, answered)
                metrics["no_answer_f1"].update(100 * f1 * (not answered), not answered)

    def _answer_scores(self, context: str, answer: str, references: list[str]) -> tuple[float, float]:
        if self.level == "cmrc":
            return cmrc_scores(answer, references)
        by = by_character(context) if self.level == "auto" else self.level == "character"
        return answer_scores(answer, references, by)

    def _best(self, scores: Tensor, batch: Batch) -> list[tuple[str, int, int, float]]:
        """Return the context, the best span within one window, and its probability, of each question.

        The span is empty where abstaining is more probable than any other.
        """
        windows, count = batch["windows"], batch["windows"].shape[1]
        best = torch.full_like(scores[:, 0, 0], -torch.inf)
        none = scores[:, -1].sum(-1) if self.abstains else best
        scores = scores[:, :count]
        first, last = torch.zeros_like(windows[:, 0]), torch.zeros_like(windows[:, 0])
        for more in range(min(self.max_answer_words, count)):
            sums = scores[:, : count - more, 0] + scores[:, more:, 1]
            sums = sums.masked_fill(windows[:, : count - more] != windows[:, more:], -torch.inf)
            top, at = sums.max(1)
            better = top > best
            best = torch.where(better, top, best)
            first, last = torch.where(better, at, first), torch.where(better, at + more, last)
        abstain, best = (none > best).tolist(), best.maximum(none)
        chosen = [batch["places"].gather(1, at[:, None])[:, 0].tolist() for at in (first, last)]
        found = []
        for text, a, b, empty, score in zip(batch["text"], *chosen, abstain, best.exp().tolist(), strict=True):
            spans = spans_of(text)
            found.append((text, 0, 0, score) if empty else (text, spans[a][0], spans[b][1], score))
        return found

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return of each row ``question``, ``answer``, its place ``start`` and ``end`` in the context, and ``score``.

        The score is the product of the probabilities of the answer's first and last word. The answer is empty, and its
        place 0 and 0, where the head abstains.
        """
        return [
            {"question": question, "answer": text[start:end], "start": start, "end": end, "score": score}
            for question, (text, start, end, score) in zip(
                batch["question"], self._best(self.scores(net, batch), batch), strict=True
            )
        ]

    def show(self, answer: dict[str, Any]) -> str:
        """Return the answer and its score."""
        return f"{answer['answer']}\t{answer['score']:.4f}"

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return two questions with their answers."""
        answers = self.predict(net, batch, tokenizer, self.decoding)[:2]
        return "\n".join(f"{answer['question']}\n  -> {answer['answer']}" for answer in answers)


def _answers(given: Any) -> list[tuple[str, int]]:
    """Return the text of each answer and where it begins; answers without text are none."""
    try:
        if isinstance(given, Mapping):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
        return [(str(text), int(start)) for text, start in pairs if str(text).strip()]
    except (KeyError, TypeError, ValueError) as error:
        shape = "{text: [...], answer_start: [...]} or [{text: ..., answer_start: ...}]"
        raise UserError(f"question_answering: answers must be {shape}, got {given!r:.80}") from error


def _find(context: str, answer: str, start: int) -> int | None:
    """Return where the answer is in the context, nearest to ``start``; None if it is not there."""
    if not answer.strip():
        return None
    if start >= 0 and context.startswith(answer, start):
        return start
    found = (match.start() for match in re.finditer(f"(?={re.escape(answer)})", context))
    return min(found, key=lambda place: abs(place - start), default=None)

"""How well a linear classifier reads labels off the states of each layer, next to a control task.

Control tasks: Hewitt and Liang 2019, arXiv:1909.03368. Each type of word gets a random label, the same wherever it
stands, so that only memory of words can solve it. The accuracy on the labels minus that on the control is selectivity.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.analysis.explain.capture import Recording
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.pairs import Accuracy
from llmkit.model.use import evaluating
from llmkit.sequence import Sequence as Positions
from llmkit.sequence import padded, segments_of

DECAY = 1e-3
"""Of the squared weights, relative to the mean loss of an item."""


@dataclasses.dataclass(frozen=True)
class Items:
    """Things with a label: texts, or words of texts."""

    states_LND: Tensor
    """The states of each layer, before the first one at 0."""
    labels: list[str]
    types: list[str]
    """The word that decides about the label of the control task: the word itself, or the first one of a text."""
    texts: list[int]
    """The number of the text that each item is of."""


@dataclasses.dataclass(frozen=True)
class Probed:
    """What was read off one layer; accuracies are of items that the classifier has not seen."""

    layer: int
    """0: the states before the first layer."""
    accuracy: float
    interval: tuple[float, float]
    """The 95 % interval of the accuracy (Wilson)."""
    control: float
    """The accuracy on the control task."""

    @property
    def selectivity(self) -> float:
        """The accuracy minus that on the control task."""
        return self.accuracy - self.control


def classify(x_ND: Tensor, y_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weights, (classes, D), and biases of logistic regression with a small penalty, fitted by L-BFGS."""
    weight = torch.zeros(classes, x_ND.shape[1], dtype=x_ND.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x_ND.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x_ND, weight, bias), y_N) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def probe(items: Items, seed: int = 0, validation: float = 0.2) -> tuple[list[Probed], float]:
    """Return the accuracies by layer, and that of always giving the most frequent training label.

    Args:
        items: states with labels.
        seed: of the split, by texts, and of the control task's labels.
        validation: the share of texts that are kept for the accuracy.

    Raises:
        UserError: fewer than two labels, or too few texts to split.
    """
    counts = Counter(items.labels)
    if len(counts) < 2:
        raise UserError(f"a probe needs at least two labels, and the rows have only {list(counts)}")
    draw = np.random.default_rng(seed)
    names = sorted(counts)
    number = {name: place for place, name in enumerate(names)}
    labels = torch.tensor([number[name] for name in items.labels])
    shares = np.array([counts[name] for name in names]) / len(items.labels)
    random_label = {word: int(draw.choice(len(names), p=shares)) for word in sorted(set(items.types))}
    control = torch.tensor([random_label[word] for word in items.types])
    texts = np.array(items.texts)
    distinct = np.unique(texts)
    kept = draw.permutation(distinct)[: round(validation * len(distinct))]
    held = torch.from_numpy(np.isin(texts, kept))
    if not 0 < int(held.sum()) < len(texts):
        raise UserError(f"a probe needs rows to fit and rows to judge by, and there are {len(distinct)}")
    most = int(labels[~held].mode().values)
    found = []
    for layer, states_ND in enumerate(items.states_LND.float()):
        mean, std = states_ND[~held].mean(0), states_ND[~held].std(0, correction=0)
        x_ND = (states_ND - mean) / std.clamp(min=1e-6)
        right = []
        for y_N in (labels, control):
            weight, bias = classify(x_ND[~held], y_N[~held], len(names))
            right.append(int((F.linear(x_ND[held], weight, bias).argmax(-1) == y_N[held]).sum()))
        total = int(held.sum())
        one = Accuracy("", right[0], total)
        found.append(Probed(layer, one.share, one.interval, right[1] / total))
    return found, float((labels[held] == most).float().mean())


@torch.no_grad()
def items_of(
    model: LanguageModel, rows: Sequence[Mapping[str, Any]], text: str, label: str, batch_size: int = 32
) -> Items:
    """Return the states of rows with their labels: the mean state of a text, or that of each word of a list of words.

    Args:
        model: whose encoder, or decoder where there is none, reads the texts.
        rows: each with a text and its label, or a list of words and as many labels.
        text: the column of the text or the words.
        label: the column of the labels.
        batch_size: texts at once.

    Raises:
        UserError: a row lacks a column, has no text there or not one label a word, or none has a word.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    pieces, labels, types, texts = [], list[str](), list[str](), list[int]()
    for index, row in enumerate(rows):
        if missing := [name for name in (text, label) if name not in row]:
            raise UserError(f"row {index + 1} has no column {' and no '.join(missing)}; it has {', '.join(row)}")
        words, given = row[text], row[label]
        if isinstance(words, list) != isinstance(given, list) or (isinstance(words, list) and len(words) != len(given)):
            raise UserError(
                f"row {index + 1}: {text} and {label} should be a text and a label, or lists of equal length"
            )
        if not all(isinstance(word, str) for word in (words if isinstance(words, list) else [words])):
            raise UserError(f"row {index + 1}: {text} should be a text or a list of words, got {words!r:.60}")
        if words == []:
            continue
        pieces.append(_pieces(tokenizer, words if isinstance(words, list) else [words], model.context))
        if isinstance(words, list):
            fits = len(pieces[-1][1])
            labels += [str(one) for one in given[:fits]]
            types += [str(word) for word in words[:fits]]
        else:
            fits = 1
            labels.append(str(given))
            types.append(next(iter(words.split() if " " in words else words), ""))
        texts += [index] * fits
    found = []
    with evaluating(model):
        for first in range(0, len(pieces), batch_size):
            group = pieces[first : first + batch_size]
            states_LBTD = _states(model, [ids for ids, _ in group])
            for number, (_, spans) in enumerate(group):
                found += [states_LBTD[:, number, begin:end].mean(1) for begin, end in spans]
    if not found:
        raise UserError("there is no text or word to probe")
    return Items(torch.stack(found, 1), labels, types, texts)


def _pieces(tokenizer: Tokenizer, words: list[str], context: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of words in a row, and the places of the tokens of each word that fits into the context."""
    before, _, after = tokenizer.around
    room = context - len(before) - len(after)
    if len(words) == 1:
        encoded = [tokenizer.encode(words[0])[: max(room, 1)] or [tokenizer.unk_id]]
    else:
        # A word is encoded with the blank before it, unless the tokenizer puts one before every text.
        blank = "" if tokenizer.encode("a a") == 2 * tokenizer.encode("a") else " "
        encoded = tokenizer.encode_batch([words[0], *(blank + word for word in words[1:])])
        encoded = [ids or [tokenizer.unk_id] for ids in encoded]
    ids, spans = list(before), list[tuple[int, int]]()
    for word in encoded:
        if len(ids) + len(word) > max(room, 1) + len(before):
            break
        spans.append((len(ids), len(ids) + len(word)))
        ids += word
    return [*ids, *after], spans


def _states(model: LanguageModel, rows: list[list[int]]) -> Tensor:
    """Return the states before the first layer and after each, (L, B, T, D)."""
    net, tokenizer = model.network, model.tokenizer
    assert tokenizer is not None
    ids_BT, segments_BT = padded(rows, tokenizer.pad_id).to(model.device), segments_of([len(row) for row in rows])
    seq = Positions.of(ids_BT, None if segments_BT is None else segments_BT.to(model.device))
    recording = Recording(net)
    recording.decode(ids_BT, seq) if net.topology == "decoder" else recording.encode(ids_BT, seq)
    return torch.stack(recording.passes[0].states).cpu()

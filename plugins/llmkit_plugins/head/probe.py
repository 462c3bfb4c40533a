"""Answers at some positions of a sequence of symbols: what synthetic tasks measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.losses import linear_cross_entropy
from llmkit.ops.metrics import EXACT, MeanLoss, MeanScore
from llmkit.sequence import DecodingOptions, Sequence, first_rows, padded, segments_of

NOTHING = "-"
"""What stands in ``expected`` where nothing is asked."""


def answers_in(text: str) -> list[str]:
    """Return the symbols of ``expected`` that are answers."""
    return [symbol for symbol in text.split() if symbol != NOTHING]


class Probe(Head):
    """A causal model that reads a sequence of symbols and answers at some of its positions.

    ``symbols`` has symbols with spaces between them, ``expected`` for each of them the answer to be given once it has
    been read, or ``-``: ``a 3 b 7 a`` and ``- - - - 3``. Only answers count in the loss and the metrics. Loss and
    accuracy are those of rows no longer than the longest training row; ``accuracy_to_256`` is that of all rows of 129
    to 256 symbols.

    Args:
        from_last: give all answers from the hidden state at the last symbol alone, by a network of two layers that is
            aware of the position; everything has to be compressed into that state (Poli et al. 2024, arXiv:2403.17844).
    """

    topology = "decoder"
    inputs = ("symbols",)
    targets = ("expected",)
    texts = ("symbols", "expected")
    words: ClassVar = {"symbols": str.split, "expected": answers_in}
    kept = "end"
    monitor = ("accuracy", "max")

    def __init__(self, from_last: bool = False) -> None:
        super().__init__()
        self.from_last = from_last
        self.longest = 0

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take the length of the longest training row, and the share of symbols after which there is an answer."""
        lengths = [len(text.split()) for text in columns["symbols"]]
        self.longest = max(lengths)
        self.scored_share = sum(len(answers_in(text)) for text in columns["expected"]) / sum(lengths)

    def info(self) -> dict[str, Any]:
        """Return both."""
        return {"longest": self.longest, "scored_share": self.scored_share}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what ``info`` returned."""
        self.longest, self.scored_share = int(info["longest"]), float(info["scored_share"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the network that answers from the last state."""
        if self.from_last:
            self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` of the symbols and, where they are known, ``targets``, ``IGNORE`` where nothing is asked.

        Of a row that is longer than the context the end is kept. Raises UserError for a row without symbols, an
        ``expected`` of another length, and a symbol that is not one token.
        """
        symbols = [text.split() for text in rows["symbols"]]
        expected = [text.split() for text in rows.get("expected", [])]
        kinds = sorted({symbol for row in [*symbols, *expected] for symbol in row})
        ids = dict(zip(kinds, tokenizer.encode_batch(kinds), strict=True))
        if not all(symbols):
            raise UserError("probe: a row has no symbols")
        for row, answers in zip(symbols, expected, strict=False):
            if len(answers) != len(row):
                raise UserError(f"probe: {len(row)} symbols, but 'expected' has {len(answers)}: {' '.join(row)[:40]!r}")
        for symbol, tokens in ids.items():
            if len(tokens) != 1 and symbol != NOTHING:
                text = f"probe: the symbol '{symbol}' is {len(tokens)} tokens; data.tokenizer: word keeps symbols whole"
                raise UserError(text)
        truncated = [int(len(row) > max_length) for row in symbols]
        symbols, expected = ([row[-max_length:] for row in rows] for rows in (symbols, expected))
        found: dict[str, list[Any]] = {"ids": [[ids[symbol][0] for symbol in row] for row in symbols]}
        if "expected" in rows:
            found["targets"] = [[IGNORE if symbol == NOTHING else ids[symbol][0] for symbol in row] for row in expected]
        return {**found, "length": [len(row) for row in symbols], "truncated": truncated}

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ``ids``, ``targets`` where they are known, and ``segments`` where padded, (B, T)."""
        lengths = [len(feature["ids"]) for feature in features]
        batch: Batch = {"ids": padded([feature["ids"] for feature in features], tokenizer.pad_id)}
        if "targets" in features[0]:
            batch["targets"] = padded([feature["targets"] for feature in features], IGNORE)
        segments = segments_of(lengths)
        return batch if segments is None else {**batch, "segments": segments}

    def _hidden(self, net: Network, batch: Batch) -> Tensor:
        """Return what each answer is given from, (B, T, D)."""
        ids_BT, segments_BT = batch["ids"], batch.get("segments")
        hidden_BTD = net.decode(ids_BT, Sequence.of(ids_BT, segments_BT))
        if not self.from_last:
            return hidden_BTD
        rows, length, dim = hidden_BTD.shape
        last_B = torch.full((rows,), length - 1) if segments_BT is None else (segments_BT > 0).sum(-1) - 1
        last_BD = hidden_BTD[torch.arange(rows, device=ids_BT.device), last_B.to(ids_BT.device)]
        found: Tensor = self.decoder(last_BD[:, None] + waves(length, dim).to(last_BD))
        return found

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed cross-entropy of the answers."""
        hidden_ND = self._hidden(net, batch).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, net.output_weight_VD, batch["targets"].flatten())

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss and accuracy of the answers, and their accuracy by the length of the row."""
        return {"loss": MeanLoss(), "accuracy": MeanScore(), "accuracy_to": ByLength()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        hidden_BTD, targets_BT = self._hidden(net, batch), batch["targets"]
        segments_BT = batch.get("segments", torch.ones_like(targets_BT))
        lengths_B = (segments_BT > 0).sum(-1)
        asked_BT = targets_BT != IGNORE
        right_BT = torch.zeros_like(asked_BT)
        right_BT[asked_BT] = (hidden_BTD[asked_BT] @ net.output_weight_VD.T).argmax(-1) == targets_BT[asked_BT]
        metrics["accuracy_to"].update(right_BT.sum(-1), asked_BT.sum(-1), lengths_B)
        known_B = lengths_B <= self.longest
        metrics["accuracy"].update(right_BT[known_B].sum(), asked_BT[known_B].sum())
        targets_N = targets_BT[known_B].flatten()
        loss = linear_cross_entropy(hidden_BTD[known_B].flatten(0, 1), net.output_weight_VD, targets_N)
        metrics["loss"].update(loss)

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return the ``symbols`` of each row and the most probable answer after each of them, ``answers``."""
        best_BT = (self._hidden(net, batch) @ net.output_weight_VD.T).argmax(-1)
        segments_BT = batch.get("segments", torch.ones_like(best_BT))
        answers = []
        for ids, best, real in zip(batch["ids"], best_BT, segments_BT > 0, strict=True):
            texts = (tokenizer.decode_batch([[number] for number in row[real].tolist()]) for row in (ids, best))
            answers.append(dict(zip(("symbols", "answers"), map(" ".join, texts), strict=True)))
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        """Return the symbols, and below them the answers."""
        return f"{answer['symbols']}\n{answer['answers']}"

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return the first row of a validation batch: its symbols, what is expected, and the answers where it is."""
        row = first_rows(batch, 1)
        (answer,) = self.predict(net, row, tokenizer, self.decoding)
        targets = row["targets"][0, : len(answer["answers"].split())].tolist()
        expected = [NOTHING if target == IGNORE else tokenizer.decode([target]) for target in targets]
        given = [NOTHING if e == NOTHING else a for a, e in zip(answer["answers"].split(), expected, strict=True)]
        return "\n".join([answer["symbols"], " ".join(expected), " ".join(given)])


def waves(length: int, dim: int) -> Tensor:
    """Return sines and cosines of the positions, (T, D), as in Vaswani et al. 2017, arXiv:1706.03762."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


class ByLength(Metric):
    """The share of right answers in rows of 1, 2, 3 to 4, 5 to 8, 9 to 16, ... symbols; NaN where there are none."""

    full_state_update = False
    higher_is_better = True
    counts: Tensor
    labels = tuple(str(2**power) for power in range(32))
    """The longest rows of each group."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, len(self.labels), dtype=EXACT), dist_reduce_fx="sum")

    def update(self, right_B: Tensor, asked_B: Tensor, lengths_B: Tensor) -> None:
        """Add rows: how many answers are right, how many there are, and how long the row is."""
        group_B = torch.bucketize(lengths_B, 2 ** torch.arange(len(self.labels), device=lengths_B.device))
        self.counts.index_add_(1, group_B, torch.stack([right_B, asked_B]).to(EXACT))

    def compute(self) -> Tensor:
        """Return the share of each group."""
        return self.counts[0] / self.counts[1]

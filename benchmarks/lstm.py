"""The attention variant ``lstm`` beside torch's nn.LSTM (batch_first) used plainly: the layer alone and a whole model.

The layer alone has the same weights' shape and the same input. Rows without padding go through the same kernel, so
that a ratio of 1, give or take a few hundredths, is all there can be. Rows of 56 to 64 positions are packed for nn.LSTM
(pack_padded_sequence), whose time to pack is counted. The whole model is an embedding of 8,000 words, two layers and
the same matrix for the output, trained by fused AdamW. There llmkit's network has neither norms nor feedforward, as
the plain one; its residual branches remain, an addition a layer, and its loss is the one of the head ``generation``.
No Trainer: train.py has it.

    python benchmarks/lstm.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kit import OURS, Gemm, Report, arguments, interleave
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from turns import step_of

from llmkit import plugin
from llmkit.contracts import Feedforward, Norm
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence

DIM, LAYERS, VOCAB, BATCH, LENGTH = 200, 2, 8000, 20, 64
PEER = "nn.LSTM"
GOAL = 1.0

Run = Callable[[], Any]


class NoFeedforward(Feedforward):
    """Adds nothing to the residual branch."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return zero."""
        return x_BTD.new_zeros(())


class NoNorm(Norm):
    """Leaves the values as they are."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the input."""
        return x_BTD


class Plain(nn.Module):
    """A language model as in torch's examples: embedding, nn.LSTM, output by the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.rnn = nn.LSTM(DIM, DIM, LAYERS, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scores, (B, T, V)."""
        return F.linear(self.rnn(self.embedding(ids))[0], self.embedding.weight)


def main() -> None:
    """Measure the layer and the model."""
    args = arguments(__doc__, repeats=10)
    report = Report("lstm", args.json)
    gemm = Gemm(repeats=5)
    weights = 2.0 * 8 * DIM**2 * BATCH * LENGTH  # operations of a layer forward
    output = 2.0 * VOCAB * DIM * BATCH * LENGTH
    cases: tuple[tuple[str, dict[str, Run], float], ...] = (
        ("layer, forward", layers(train=False), weights),
        ("layer, forward and backward", layers(train=True), 3 * weights),
        ("layer, padded rows, forward", padded(train=False), 0.0),
        ("layer, padded rows, forward and backward", padded(train=True), 0.0),
        ("language model, forward", models(train=False), LAYERS * weights + output),
        ("language model, training step", models(train=True), 3 * (LAYERS * weights + output)),
    )
    for case, runs, flops in cases:
        repeats = args.repeats if "layer" in case else max(1, args.repeats // 5)
        turns = {name: repeated(run, repeats) for name, run in runs.items()}
        found = interleave({**turns, "GEMM": gemm}, args.cycles)
        peak = found.pop("GEMM")
        times = {name: [seconds / repeats for seconds in values] for name, values in found.items()}
        limits = {OURS: gemm.seconds(flops, peak)} if flops else None
        report.compare(f"{case}, {DIM} wide, {BATCH} x {LENGTH}", times, "ms", 1e3, {PEER: GOAL}, limits)
    report.close()


def layers(train: bool) -> dict[str, Run]:
    """Return a run of each layer on rows without padding."""
    layer, rnn = plugin("attention", "lstm")(DIM, "causal"), nn.LSTM(DIM, DIM, batch_first=True)
    x, seq = torch.randn(BATCH, LENGTH, DIM, requires_grad=True), Sequence.dense(LENGTH)
    return {OURS: timed_run(lambda: layer(x, seq), train), PEER: timed_run(lambda: rnn(x)[0], train)}


def padded(train: bool) -> dict[str, Run]:
    """Return a run of each layer on padded rows."""
    layer, rnn = plugin("attention", "lstm")(DIM, "causal"), nn.LSTM(DIM, DIM, batch_first=True)
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    lengths = torch.linspace(56, LENGTH, BATCH).long()
    segments = (torch.arange(LENGTH) < lengths[:, None]).long()

    def theirs() -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(rnn(packed)[0], batch_first=True)[0]

    return {OURS: timed_run(lambda: layer(x, Sequence.from_segments(segments)), train), PEER: timed_run(theirs, train)}


def timed_run(run: Callable[[], Tensor], train: bool) -> Run:
    """Return the run without gradients, or with its backward pass."""
    return (lambda: run().sum().backward()) if train else torch.no_grad()(run)


def models(train: bool) -> dict[str, Run]:
    """Return a step of each language model, or its loss alone."""
    head = plugin("head", "generation")()
    net = Backbone(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        topology=head.topology,
        max_length=LENGTH,
        attention=plugin("attention", "lstm"),
        cross_attention=plugin("attention", "multi_head"),
        position=plugin("position", "none"),
        feedforward=NoFeedforward,
        norm=NoNorm,
    )
    plain = Plain()

    def ours(ids: Tensor, targets: Tensor) -> Tensor:
        loss = head.loss(net, {"ids": ids, "targets": targets})
        mean: Tensor = loss.total / loss.count
        return mean

    def theirs(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten())

    rows = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    if train:
        return {OURS: step_of(net, ours, [batch]), PEER: step_of(plain, theirs, [batch])}
    return {
        OURS: torch.no_grad()(lambda: ours(*batch)),
        PEER: torch.no_grad()(lambda: theirs(*batch)),
    }


def repeated(run: Run, times: int) -> Run:
    """Return a turn of so many runs."""

    def turn() -> None:
        for _ in range(times):
            run()

    return turn


if __name__ == "__main__":
    main()

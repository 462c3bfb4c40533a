"""Training an encoder-decoder on Multi30k's real lengths: llmkit's Trainer path beside nn.Transformer and JoeyNMT.

English to German, one BPE of 8,000 for both, 3+3 layers, 256 wide, 4 heads, pre-norm, one matrix for all embeddings
and the output, smoothed cross-entropy, fused AdamW, fp32; what is measured is CPU time for each real target token.
Each peer runs twice: on the very batches that llmkit makes (equal batches), and on random batches padded to the
longest, of as many rows on average (own batches): JoeyNMT's loader makes these, and so does a plain DataLoader. Batches
of 3,000 tokens are those of configs/translation/multi30k.yaml; larger ones give random batches more padding.

llmkit runs ``llmkit fit`` with its loader, logging and checks. The peers get batches that lie ready, in a loop of the
bare necessities; JoeyNMT has its own loss, which also counts correct tokens. nn.Transformer is called as its tutorial
does it, with causal and padding masks. Both have biases and ReLU where llmkit has its own defaults. Dropout is where
each library has it: on embeddings and residual branches, with the peers on attention weights and hidden values too;
``--dropout 0`` compares without any.

    python benchmarks/seq2seq.py [--dropout 0.1]
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kit import DATA, OURS, Gemm, Report, arguments
from torch import Tensor, nn
from turns import Seat, fit, plain, step_of, take_turns

from llmkit import DataModule, plugin
from llmkit.contracts import IGNORE, Batch, Tokenizer
from llmkit.data.examples import Examples

LAYERS, DIM, HEADS, VOCAB, SMOOTHING, CONTEXT, BATCH_TOKENS = 3, 256, 4, 8000, 0.1, 128, 3000
FILES = {name: str(DATA / "multi30k" / f"train.{end}") for name, end in (("source", "en"), ("target", "de"))}
GOALS = {"equal": 1.7, "own": 3.0}
PADDING_GOAL = 0.06

Peer = tuple[nn.Module, Callable[..., Tensor], Callable[[Batch], tuple[Any, ...]]]
"""A model, its mean loss, and what makes the loss's arguments from a batch of llmkit's."""


def main() -> None:
    """Measure both cases and the padding."""
    args = arguments(__doc__, dropout=0.1)
    report = Report("seq2seq", args.json)
    with tempfile.TemporaryDirectory() as folder:
        examples, rows = prepare(folder)
        contestants: dict[str, Callable[[Seat], None]] = {
            OURS: functools.partial(ours, folder=folder, dropout=args.dropout)
        }
        for case in GOALS:
            for peer in PEERS:
                contestants[f"{peer}, {case}"] = functools.partial(
                    theirs, folder=folder, peer=peer, case=case, dropout=args.dropout
                )
        contestants["GEMM"] = gemm
        found = take_turns(contestants, args.cycles)
    missing = {peer: found[f"{peer}, equal"].missing for peer in PEERS if found[f"{peer}, equal"].missing}
    lengths = [np.diff(examples.features.ends[name]) for name in ("source", "target")]

    def per_token(name: str, case: str) -> list[float]:
        taken = rows[case][2 : 2 + args.cycles]  # the first two steps do not count
        return [time / float(lengths[1][row].sum()) for time, row in zip(found[name].seconds, taken, strict=True)]

    # Six operations a weight; that rows have as many source as target tokens is true within 4 %.
    limits = {OURS: Gemm(repeats=20).seconds(6.0 * found[OURS].facts["parameters"], found["GEMM"].seconds)}
    for case, goal in GOALS.items():
        times = {OURS: per_token(OURS, "equal")}
        times |= {peer: per_token(f"{peer}, {case}", case) for peer in PEERS if peer not in missing}
        report.compare(
            f"{case} batches, {LAYERS}+{LAYERS}L {DIM} wide, dropout {args.dropout:g}", times, "µs a target token", 1e6,
            dict.fromkeys(PEERS, goal), limits, missing,
            note=f"{1 / median(times[OURS]):,.0f} target tokens a second; the limit counts no padding",
        )  # fmt: skip
    for name, batches in ((OURS, rows["equal"]), ("random", rows["own"])):
        padding = padding_of(batches, lengths)
        wanted = {"goal": f"under {PADDING_GOAL:g}", "met": padding < PADDING_GOAL} if name == OURS else {}
        report.add("padding of an epoch, source and target", name, round(padding, 4), "of all positions", **wanted)
    report.close()


def prepare(folder: str) -> tuple[Examples, dict[str, Sequence[Any]]]:
    """Return the training rows as llmkit has them, and an epoch's batches: llmkit's and random ones."""
    tokenizer = plugin("tokenizer", "bpe", vocab_size=VOCAB)
    data = DataModule(
        train=FILES, tokenizer=tokenizer, batch_tokens=BATCH_TOKENS, validation_share=0, seed=0, cache_dir=folder
    )
    data.bind(plugin("head", "translation", label_smoothing=SMOOTHING)(), CONTEXT)
    examples = data.split("train")
    assert isinstance(examples, Examples)
    equal = list(data.train_dataloader().sampler)
    own = np.array_split(np.random.default_rng(1).permutation(len(examples)), len(equal))
    return examples, {"equal": equal, "own": own}


def ours(seat: Seat, folder: str, dropout: float) -> None:
    """Train by ``llmkit fit``."""
    settings = {
        "data.train": json.dumps(FILES),
        "data.validation_share": 0,
        "data.tokenizer": "bpe",
        "data.tokenizer.vocab_size": VOCAB,
        "data.batch_tokens": BATCH_TOKENS,
        "data.cache_dir": folder,
        "model.head": "translation",
        "model.head.label_smoothing": SMOOTHING,
        "model.attention": "multi_head",
        "model.attention.num_heads": HEADS,
        "model.dim": DIM,
        "model.num_layers": LAYERS,
        "model.context": CONTEXT,
        "model.dropout": dropout,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "name": "bench",
    }
    fit(seat, [word for name, value in settings.items() for word in (f"--{name}", str(value))], 1)


def theirs(seat: Seat, folder: str, peer: str, case: str, dropout: float) -> None:
    """Train a peer by a plain loop, from the second batch on: llmkit takes one before the first turn."""
    examples, rows = prepare(folder)
    model, loss, arguments_of = PEERS[peer](examples.tokenizer, dropout)
    batches = [arguments_of(examples[row]) for row in rows[case][1:40]]
    plain(seat, step_of(model, loss, batches), 1)


def gemm(seat: Seat) -> None:
    """Multiply large matrices."""
    plain(seat, Gemm(repeats=1), 20)


def padding_of(rows: Sequence[Any], lengths: Sequence[Any]) -> float:
    """Return the share of padding in all positions of both sides."""
    real = sum(side[row].sum() for row in rows for side in lengths)
    return 1 - float(real / sum(len(row) * side[row].max() for row in rows for side in lengths))


def transformer(tokenizer: Tokenizer, dropout: float) -> Peer:
    """torch.nn.Transformer with learned positions, its embedding matrix used for the output too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(tokenizer.vocab_size, DIM)
            self.positions = nn.Parameter(torch.randn(CONTEXT, DIM) * 0.02)
            self.layers = nn.Transformer(
                DIM, HEADS, LAYERS, LAYERS, 4 * DIM, dropout, batch_first=True, norm_first=True
            )  # fmt: skip

        def forward(self, source: Tensor, ids: Tensor) -> Tensor:
            padding = source == tokenizer.pad_id
            hidden = self.layers(
                self.embed(source),
                self.embed(ids),
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(ids.shape[1]),
                tgt_is_causal=True,
                src_key_padding_mask=padding,
                tgt_key_padding_mask=torch.where(ids == tokenizer.pad_id, float("-inf"), 0.0),
                memory_key_padding_mask=padding,
            )
            return F.linear(hidden, self.embedding.weight)

        def embed(self, ids: Tensor) -> Tensor:
            return F.dropout(self.embedding(ids) + self.positions[: ids.shape[1]], dropout)

    model = Model()
    nn.init.normal_(model.embedding.weight, std=0.02)

    def loss(source: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        scores = model(source, ids).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORE, label_smoothing=SMOOTHING)

    return model, loss, lambda batch: (batch["source"], batch["ids"], batch["targets"])


def joeynmt(tokenizer: Tokenizer, dropout: float) -> Peer:
    """JoeyNMT's transformer with its own batches' masks and its own loss, divided by the number of tokens."""
    from joeynmt.batch import Batch as Joined
    from joeynmt.model import build_model
    from joeynmt.vocabulary import Vocabulary

    special = {"unk": "<unk>", "pad": "<pad>", "bos": "<s>", "eos": "</s>"}
    settings: dict[str, Any] = {f"{name}_token": text for name, text in special.items()}
    settings |= {f"{name}_id": number for number, name in enumerate(special)}
    tokens = [str(number) for number in range(tokenizer.vocab_size - len(special))]
    vocabulary = Vocabulary(tokens, SimpleNamespace(**settings, sep_token=None, lang_tags=[]))
    vocabulary.pad_index, vocabulary.eos_index = tokenizer.pad_id, tokenizer.eos_id  # the ids are llmkit's
    side = {
        "type": "transformer",
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "hidden_size": DIM,
        "ff_size": 4 * DIM,
        "dropout": dropout,
        "layer_norm": "pre",
        "embeddings": {"embedding_dim": DIM, "scale": True, "dropout": dropout},
    }
    model: Any = build_model(
        {"encoder": side, "decoder": side, "tied_embeddings": True, "tied_softmax": True}, vocabulary, vocabulary
    )
    model.loss_function = ("crossentropy", SMOOTHING)

    def loss(source: Tensor, batch: Joined) -> Tensor:
        summed = model(return_type="loss", **vars(batch))[0]
        mean: Tensor = batch.normalize(summed, normalization="tokens")
        return mean

    def arguments_of(batch: Batch) -> tuple[Tensor, Joined]:
        source, targets = batch["source"], batch["targets"]
        written = torch.cat([batch["ids"][:, :1], targets.masked_fill(targets == IGNORE, tokenizer.pad_id)], 1)
        lengths = (source != tokenizer.pad_id).sum(1)
        rows, device = torch.arange(len(source)), source.device
        joined = Joined(source, lengths, None, written, None, rows, device, tokenizer.pad_id, tokenizer.eos_id)
        joined.sort_by_src_length()
        return joined.src, joined

    return model, loss, arguments_of


PEERS: dict[str, Callable[[Tokenizer, float], Peer]] = {"nn.Transformer": transformer, "JoeyNMT": joeynmt}

if __name__ == "__main__":
    main()

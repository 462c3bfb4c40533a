"""``llmkit inspect``: every number against one that was counted another way."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import TINY, done, llmkit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from llmkit import DataModule, LanguageModel, load, main, plugin
from llmkit.commands import inspect as describing
from llmkit.commands.inspect import describe
from llmkit.model.backbone import Backbone
from llmkit.ops import losses
from llmkit.sequence import Sequence
from llmkit.testing.invariance import build

DIM, LAYERS, HEADS, CONTEXT, BATCH = 16, 3, 4, 16, 2
MODEL = ("--model.num_layers", LAYERS, "--model.attention", json.dumps({"name": "multi_head", "num_heads": HEADS}))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of many blocks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return path


@functools.cache
def inspect(text: Path, *words: object) -> dict[str, Any]:
    """Return what inspect says about a tiny model."""
    facts: dict[str, Any] = json.loads(done("inspect", "--json", "--data.train", text, *TINY, *MODEL, *words).out)
    return facts


def network(text: Path, output: Path, *words: object) -> tuple[LanguageModel, Backbone]:
    """Return the same model, built by a fit."""
    model = load(done("fit", "--data.train", text, *TINY, *MODEL, *words, "--output", output).checkpoint)
    return model, model.network


def test_keys_and_sizes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = inspect(text)
    assert set(facts) == {*("tree", "parameters", "flops_per_token", "memory_bytes", "tokens_per_step", "vocab_size")}
    assert set(facts["parameters"]) == {"embedding", "non_embedding", "head", "total", "trained"}
    assert set(facts["memory_bytes"]) == {"weights", "gradients", "optimizer", "activations", "peak"}
    assert facts["vocab_size"] == 6 + len(set(text.read_text()))  # special tokens and characters
    assert facts["tokens_per_step"] == BATCH * CONTEXT
    assert inspect(text, "--trainer.accumulate_grad_batches", "3")["tokens_per_step"] == 3 * BATCH * CONTEXT
    assert list(tmp_path.iterdir()) == []  # nothing ran, nothing is left


def test_config_and_table(text: Path, tmp_path: Path) -> None:
    config = tmp_path / "toy.yaml"
    config.write_text(f"data:\n  train: {text}\n  tokenizer: char\nmodel:\n  dim: 32\n  num_layers: 2\n")
    facts = json.loads(done("inspect", "--config", config, "--json").out)
    table = done("inspect", "--config", config).out
    assert f"{facts['parameters']['total']:,}" in table
    assert "2 x Layer" in table
    for line in facts["tree"]:
        assert line in table
    assert llmkit("inspect", "--json", "--config", tmp_path / "nope.yaml").code == 2


def test_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main.main(["inspect", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: llmkit inspect --config FILE [options]\n")
    assert "--json" in printed and "llmkit fit --help" in printed


def test_parameters(text: Path) -> None:
    facts = inspect(text)
    embedding = facts["vocab_size"] * DIM  # tied: the output matrix is the same one
    attention = 3 * DIM * DIM + DIM * DIM + HEADS  # queries, keys and values; output; one scale a head (qk_norm)
    feedforward = 2 * DIM * (4 * DIM)  # squared_relu: in and out, four times as wide
    norms = 2 * DIM  # rms: one scale, before attention and before feedforward
    layers = LAYERS * (attention + feedforward + norms) + DIM  # and the final norm
    assert facts["parameters"] == {
        "embedding": embedding,
        "non_embedding": layers,
        "head": 0,
        "total": embedding + layers,
        "trained": embedding + layers,
    }
    untied = inspect(text, "--model.tie_embeddings", "false")["parameters"]
    assert untied["total"] == embedding + layers + embedding
    learned = inspect(text, "--model.position", "learned")["parameters"]
    assert learned["total"] == embedding + layers + CONTEXT * DIM


@pytest.mark.parametrize("tied", ["true", "false"])
def test_flops(tied: str, text: Path, tmp_path: Path) -> None:
    """Against torch's counter on a forward pass.

    It does not know the CPU's attention kernel, so attention runs as the two batched products that it stands for:
    scores and weighted sum, 4 * T * T * D a layer, hidden pairs included. A causal position reads half of the positions
    on average, which is what is reported. So half of these products is taken off the counter's number.
    """
    facts = inspect(text, "--model.tie_embeddings", tied)
    _, net = network(text, tmp_path, "--model.tie_embeddings", tied)
    ids = torch.randint(net.embedding.num_embeddings, (BATCH, CONTEXT))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_BTD = net.decode(ids, Sequence.of(ids))
        hidden_BTD.flatten(0, 1) @ net.output_weight_VD.T
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert attention == LAYERS * BATCH * 4 * CONTEXT * CONTEXT * DIM
    expected = (counter.get_total_flops() - attention / 2) / (BATCH * CONTEXT)
    assert facts["flops_per_token"] == {"forward": pytest.approx(expected), "training": pytest.approx(3 * expected)}


@pytest.mark.parametrize(
    ("optimizer", "matrix", "other"),
    [
        ("adamw", 8, 8),  # two moments of four bytes
        ("{name: SGD, lr: 0.1}", 0, 0),
        ("{name: SGD, lr: 0.1, momentum: 0.9}", 4, 4),
        ("muon", 4, 8),  # matrices: momentum only; the rest as AdamW
    ],
)
def test_memory(optimizer: str, matrix: int, other: int, text: Path) -> None:
    facts = inspect(text, "--model.optimizer", optimizer)
    total, memory = facts["parameters"]["total"], facts["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == 4 * total
    matrices = LAYERS * (4 * DIM * DIM + 8 * DIM * DIM)
    assert memory["optimizer"] == matrix * matrices + other * (total - matrices)


def test_activations_grow_with_the_batch(text: Path) -> None:
    one, three = (inspect(text, "--data.batch_size", size)["memory_bytes"]["activations"] for size in (2, 6))
    assert one > BATCH * CONTEXT * DIM * LAYERS * 4  # at the least what enters each layer
    assert 2 * one < three <= 3 * one


def test_a_large_model_needs_no_memory(text: Path, tmp_path: Path) -> None:
    """50 GiB of weights, 40 of activations: none of it is allocated. Vectors for the embedding are not read."""
    size = ("--model.dim", 2**14, "--model.num_layers", 4, "--data.batch_size", 2**14)
    facts = inspect(text, *size, "--model.word_vectors", tmp_path / "none.txt")
    assert facts["memory_bytes"]["weights"] > 48 * 2**30 and facts["memory_bytes"]["activations"] > 40 * 2**30


def test_a_plugin_that_asks_for_values(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asking.py").write_text(ASKING)
    monkeypatch.chdir(tmp_path)
    words = ("--data.train", text, *TINY, "--imports", "asking.py", "--examine", "false", "--model.norm", "asking.Asks")
    result = done("inspect", *words)
    assert "note: activations and peak are unknown: aten." in result.err
    assert result.out.count(" unknown\n") == 2


ASKING = """
from llmkit.contracts import Norm

class Asks(Norm):
    def forward(self, x_BTD):
        return x_BTD / (1 + len(x_BTD[x_BTD > 1]))
"""


FILES = {"generation": "text.txt", "masked_lm": "text.txt", "translation": "pairs.tsv", "classification": "rows.csv"}


ONE = {"num_layers": 1}
CASES = [(head, {} if head == "generation" else ONE, 1 + (head == "translation")) for head in FILES]
AGAIN = {"gradient_checkpointing": True, "num_layers": 3}
LESS = {**AGAIN, "lora": {"rank": 2}}


@pytest.mark.parametrize(
    ("head", "settings", "batches"),
    [
        *CASES,
        ("generation", ONE, 2),
        ("generation", {"attention": plugin("attention", "lstm")}, 1),
        *(("generation", AGAIN, 1), ("generation", LESS, 1)),
    ],
)
def test_peak(
    head: str, settings: dict[str, Any], batches: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what the CPU's allocator reports to torch's profiler; the sum of the parts is an upper limit.

    The loss of inspect ends with its second chunk, which changes nothing.
    """
    lines = text.read_text().splitlines()
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{line}\t{line[3:]}\n" for line in lines))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{line},{i % 3}\n" for i, line in enumerate(lines)))
    (tmp_path / "text.txt").write_text(text.read_text())
    tokenizer: Any = plugin("tokenizer", "char")
    data = DataModule(train=str(tmp_path / FILES[head]), tokenizer=tokenizer, batch_size=8, cache_dir=str(tmp_path))
    context = 96 if "attention" in settings else 32  # the kernel of LSTMs keeps a workspace of each position
    model = LanguageModel(plugin("head", head), **{"dim": 64, "num_layers": 2, "context": context, **settings})
    build(model, data)
    batch = next(iter(data.train_dataloader()))
    assert model.tokenizer is not None
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", losses.ROWS * model.tokenizer.vocab_size)
    chunks = []
    for context_manager in (contextlib.nullcontext, losses.shapes_only):
        monkeypatch.setattr(describing, "shapes_only", context_manager)
        torch.manual_seed(0)  # masked_lm draws what it hides
        with mock.patch.object(losses, "cross_entropy_", wraps=losses.cross_entropy_) as chunk:
            memory = describe(model, batch, batches)["memory_bytes"]
        chunks.append((chunk.call_count // batches, memory))
    (all_of_them, whole), (few, memory) = chunks
    assert memory == whole and few == min(2, all_of_them)
    assert all_of_them > 2 or head != "generation"
    assert all(p.grad is None for p in model.parameters())

    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(batches):
            loss = model.head.loss(model.network, batch)
            (loss.total / loss.count).backward()
            del loss
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert memory["peak"] == pytest.approx(memory["weights"] + memory["optimizer"] + peak, rel=0.01)
    parts = sum(memory.values()) - memory["peak"]
    assert memory["peak"] <= parts
    assert batches == 1 or memory["peak"] == pytest.approx(parts, rel=0.01)

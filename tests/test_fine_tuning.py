"""Fine-tuning: parts that stay as they are, and learning rates by depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import TINY, done, llmkit
from torch import nn

from llmkit import LanguageModel, plugin
from llmkit.model.groups import parameter_groups, parameter_kinds
from llmkit.model.use import batch_of

KEPT = ("trained", "average")
"""What a checkpoint has of a moving average in half precision, next to its weights."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A small classifier with frozen parts and decaying rates; its folder is the last word."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(30)))
    parts = ("--model.freeze", "[embedding, encoder.0-1, head.classifier.bias]", "--model.layer_decay", "0.5")
    given = ("--data.train", folder / "rows.csv", "--model.head", "classification", *TINY, "--model.num_layers", "3")
    return ["fit", *given, *parts, "--output", folder]


def weights(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def test_frozen_parts_stay_to_the_bit(words: list[object]) -> None:
    """Seeded alike, a run of one step and one of four end with the same frozen weights, and others elsewhere."""
    once = done(*words, "--trainer.max_steps", 1)
    long = done(*words, "--trainer.max_steps", 4)
    assert "model.freeze: " in long.err and "parameters stay as they are" in long.err
    first, last = (weights(run.folder / "checkpoints" / "last.ckpt") for run in (once, long))
    for name, value in first.items():
        frozen = name.startswith(("net.embedding.", "net.encoder.0.", "net.encoder.1.", "head.classifier.bias"))
        assert torch.equal(value, last[name]) == frozen, name


def test_a_run_with_both_is_resumed_exactly(words: list[object]) -> None:
    """With a moving average in half precision, over steps of several batches."""
    words = [*words, "--model.scheduler.total_steps", 4, "--model.ema", 0.5, "--trainer.precision", "bf16-true"]
    words += ["--trainer.accumulate_grad_batches", 2]
    whole, half = done(*words, "--trainer.max_steps", 4), done(*words, "--trainer.max_steps", 2)
    rest = ("--ckpt_path", half.folder / "checkpoints" / "last.ckpt")
    resumed = done(*words, "--trainer.max_steps", 4, *rest)
    ends = [torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    for one, other in [[end["state_dict"] for end in ends], *([end["ema"][key] for end in ends] for key in KEPT)]:
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(value.dtype == torch.float32 for value in ends[0]["ema"]["average"].values())
    for option, says in {
        ("--model.layer_decay", "0.6"): "model.layer_decay: is 0.6, but the checkpoint has 0.5: a resumed run keeps",
        ("--model.freeze", "null"): "model.freeze: is None, but the checkpoint has ['embedding'",
    }.items():
        result = llmkit(*words, "--trainer.max_steps", 4, *rest, *option)
        assert result.code == 2 and says in result.err, result.err


def test_rates_by_depth() -> None:
    """The head has the whole rate, the last layer once the decay; no weight is left out."""
    parts = {"head": plugin("head", "masked_lm"), "position": plugin("position", "learned")}
    model = LanguageModel(**parts, dim=8, num_layers=2, context=8, layer_decay=0.5)  # type: ignore[arg-type]
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    optimizer = model.parts.optimizer(model.groups())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    full = model.spec["optimizer"]["init_args"].get("lr", 1e-3)
    for name, rate in rates.items():
        steps = 0 if "encoder_norm" in name else 3 - (int(name.split(".")[2]) + 1 if ".encoder." in name else 0)
        assert rate == pytest.approx(full * 0.5**steps), name
    plain = parameter_groups(model, parameter_kinds(model))
    assert [group["kind"] for group in plain] == ["matrix", "embedding", "vector"]
    assert all("lr_scale" not in group for group in plain)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("freeze", "[embeding]", "model.freeze: unknown part 'embeding'. Did you mean 'embedding'?"),
        ("freeze", "[encoder.2-7]", "model.freeze: unknown part 'encoder.3'"),
        ("freeze", "[embedding, encoder, encoder_norm, head]", "model.freeze: leaves nothing to train"),
        ("vocab_size", "5", "model.vocab_size: must be at least "),
        ("token_types", "-1", "model.token_types: must be 0 or more, got -1"),
        ("layer_decay", "0", "model.layer_decay: must be above 0 and at most 1, got 0"),
    ],
)
def test_what_is_refused(option: str, value: str, says: str, words: list[object]) -> None:
    result = llmkit(*words, f"--model.{option}", value)
    assert result.code == 2 and says in result.err, result.err


def test_nothing_changes_without_them() -> None:
    net = nn.ModuleDict({"encoder": nn.ModuleList([nn.Linear(2, 2)]), "embedding": nn.Embedding(3, 2)})
    groups = parameter_groups(net, parameter_kinds(net))
    assert [(group["kind"], len(group["params"])) for group in groups] == [
        ("matrix", 1),
        ("embedding", 1),
        ("vector", 1),
    ]


@pytest.mark.parametrize(
    ("head", "position"), [("masked_lm", "rotary"), ("translation", "rotary"), ("translation", "relative")]
)
def test_gradient_checkpointing_changes_no_number(head: str, position: str) -> None:
    """Losses and gradients are equal to the bit, with dropout on; far fewer bytes are kept for the gradient."""
    found, kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        mixing = plugin("attention", "multi_head", dropout=0.2)
        parts = {"head": plugin("head", head), "attention": mixing, "position": position}
        parts |= {"dim": 16, "num_layers": 4, "context": 32}
        model = LanguageModel(**parts, dropout=0.2, gradient_checkpointing=again)  # type: ignore[arg-type]
        model.tokenizer = plugin("tokenizer", "byte")()
        model.configure_model()
        model.train()
        rows = [{"text": "a text of some length", "source": "a text", "target": "another"}] * 3
        fields = (*model.head.inputs, *model.head.targets)
        batch = batch_of(model.head, model.tokenizer, 32, rows, fields)
        saved: dict[int, int] = {}

        def pack(value: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            torch.manual_seed(1)
            loss = model.head.loss(model.network, batch)
        kept.append(sum(saved.values()))
        loss.total.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.total.detach(), **grads})
    assert len(found[0]) > 20
    for name, value in found[0].items():
        if "position.table" in name:  # the layers' shares of its gradient are added in another order
            torch.testing.assert_close(found[1][name], value)
        else:
            assert torch.equal(found[1][name], value), name
    assert kept[1] < 0.5 * kept[0]

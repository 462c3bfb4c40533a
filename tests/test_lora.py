"""Low-rank adapters: what they compute, what is trained, and how they are merged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command import TINY, Result, done, llmkit
from torch import Tensor, nn

import llmkit as package
from llmkit import LanguageModel, plugin, registry
from llmkit.model.groups import parameter_groups, parameter_kinds
from llmkit.ops.decoding import Decoder
from llmkit.ops.lora import LoRA, LoRALinear, merged
from llmkit.sequence import Sequence

LORA = ("--model.lora", "{rank: 2, alpha: 6, targets: [attention.qkv, feedforward]}")


def network(attention: str = "multi_head", **more: object) -> LanguageModel:
    parts = {"head": plugin("head", "generation"), "dim": 16, "num_layers": 2, "context": 16}
    model = LanguageModel(**parts, attention=plugin("attention", attention), **more)  # type: ignore[arg-type]
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    return model


def scrambled(model: LanguageModel) -> LanguageModel:
    """Give the adapters values as after training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_b." in name:
            parameter.data.normal_(std=0.03, generator=generator)
    return model


def test_the_formula() -> None:
    """W x + b + alpha / rank * B A x, with an adapter for each of the maps that are fused."""
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    linear.fused = {"weight": [3, 4]}  # type: ignore[assignment]
    adapted, x = LoRALinear(linear, LoRA(rank=2, alpha=3)), torch.randn(4, 5)
    assert torch.equal(adapted(x), linear(x))
    for value in (*adapted.lora_a, *adapted.lora_b):
        nn.init.normal_(value)
    a, b = [[value.detach() for value in values] for values in (adapted.lora_a, adapted.lora_b)]
    rows = [linear.weight[i] + 1.5 * (b[i >= 3][i - 3 * (i >= 3)] @ a[i >= 3]) for i in range(7)]
    torch.testing.assert_close(adapted(x), x @ torch.stack(rows).T + linear.bias)
    torch.testing.assert_close(merged(adapted.state_dict(prefix="x."), 1.5)["x.weight"], torch.stack(rows))


@pytest.mark.parametrize("name", registry.entries("attention"))
@torch.no_grad()
def test_new_adapters_change_nothing_and_merging_them_neither(name: str) -> None:
    """In a whole pass, and token by token, where a variant may read its weights in another way."""
    targets = ["feedforward"] if name in ("lstm", "gru") else None
    torch.manual_seed(0)
    plain = network(name)
    torch.manual_seed(0)
    model = network(name, lora=LoRA(rank=2, targets=targets))
    ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(states(model, ids), states(plain, ids))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    scrambled(model)
    plain.load_state_dict(merged(model.state_dict(), 8.0))
    expected = states(plain, ids)
    assert (states(model, ids) - expected).abs().max() < 1e-5
    decoders = [Decoder(net.network, 2, 12) for net in (model, plain)]
    for column in ids.split(1, 1):
        one, other = (decoder.feed(column) for decoder in decoders)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def states(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.eval().network.decode(ids, Sequence.of(ids))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A fit with adapters on weights that another run wrote; its folder is the last word."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(30)))
    given = ("fit", "--data.train", folder / "rows.csv", "--model.head", "classification", *TINY, "--output", folder)
    base = done(*given, "--model.optimizer.lr", "0.01").folder / "checkpoints" / "last.ckpt"
    rest = ("--model.optimizer.lr", "0.05", "--model.scheduler.total_steps", 4, "--model.dropout", "0.1")
    return [*given[:-2], *LORA, *rest, "--model.init_from", base, "--output", folder]


def content(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def last(run: Result) -> Path:
    return run.folder / "checkpoints" / "last.ckpt"


def test_all_else_stays_to_the_bit_but_the_head(words: list[object]) -> None:
    """Of the network; a checkpoint with adapters answers as one with the merged weights."""
    run = done(*words, "--trainer.max_steps", 4)
    base = content(Path(str(words[words.index("--model.init_from") + 1])))
    now = content(last(run))
    for name, value in base.items():
        assert torch.equal(value, now[name]) == name.startswith("net."), name
    adapters = {name: value for name, value in now.items() if name not in base}
    assert {name.split(".")[-2] for name in adapters} == {"lora_a", "lora_b"} and len(adapters) == 10
    assert all(value.abs().max() > 0 for value in adapters.values())
    trained = sum(value.numel() for value in (*adapters.values(), now["head.classifier.weight"])) + 2
    total = sum(value.numel() for value in now.values())
    says = f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
    assert f"llmkit: note: model.lora: trains {says}" in run.err and f"\nTrained: {says}" in run.out
    shown = done("inspect", *words[1:]).out
    assert re.search(rf"trained +{trained:,}\n", shown)
    assert re.search(rf"optimizer +{trained * 8 / 2**20:,.1f} MiB", shown)

    loaded = package.load(last(run))
    assert loaded.spec["lora"] is None and loaded.state_dict().keys() == base.keys()
    torch.testing.assert_close(loaded.state_dict(), merged(now, 3.0))
    again = done(*words[: words.index("--model.lora")], "--model.init_from", last(run), "--trainer.max_steps", 1)
    assert "11 of its 11 weights taken" in again.err, again.err


def test_a_run_is_resumed_exactly(words: list[object]) -> None:
    """With a moving average, which is one of the trained weights alone."""
    words = [*words, "--model.ema", "0.5"]
    whole, half = done(*words, "--trainer.max_steps", 4), done(*words, "--trainer.max_steps", 2)
    rest = ("--ckpt_path", last(half), "--trainer.max_steps", 4)
    resumed = done(*words, *rest)
    ends = [content(last(run)) for run in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert len(torch.load(last(whole), weights_only=True)["ema"]["trained"]) == 12 < len(ends[0])
    refused = llmkit(*words, *rest, "--model.lora.rank", 4)
    assert refused.code == 2 and "model.lora: is {'rank': 4, " in refused.err and "do not fit" in refused.err


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("{rank: 0}", "model.lora.rank: must be at least 1, got 0"),
        ("{alpha: -1}", "model.lora.alpha: must be above 0, got -1.0"),
        ("{rank: 2, dropout: 1.5}", "model.lora.dropout: must be at least 0 and below 1, got 1.5"),
        ("{ranks: 2}", "unknown key 'model.lora.ranks'. Did you mean 'rank'?"),
        ("{targets: [atention]}", "model.lora.targets: unknown linear map 'atention'. Did you mean 'attention'?"),
        ("{targets: [encoder.0-3]}", "model.lora.targets: unknown linear map 'encoder.1'"),
        ("{targets: []}", "model.lora.targets: is empty; these are there: attention.qkv, attention.out, feedf"),
    ],
)
def test_what_is_refused(lora: str, says: str, words: list[object]) -> None:
    result = llmkit(*words, "--model.lora", lora)
    assert result.code == 2 and says in result.err, result.err
    assert result.err.count("error") == 1


def test_an_attention_without_linear_maps_needs_targets(words: list[object]) -> None:
    result = llmkit(*words, "--model.lora", "{rank: 2}", "--model.attention", "lstm")
    assert result.code == 2 and "model.lora.targets: must be set: this attention has no linear map" in result.err


def test_muon_gets_each_adapter_as_a_matrix_of_its_own() -> None:
    model = network(lora=LoRA(rank=2, targets=["decoder.0-1.attention", "out"]))
    groups = parameter_groups(model, parameter_kinds(model), {})
    assert [(group["kind"], len(group["params"])) for group in groups] == [("matrix", 2 * (6 + 2 + 2))]
    assert all(rows == [len(p)] for p, rows in zip(groups[0]["params"], groups[0]["maps"], strict=True))

"""Optimizers and schedule against torch's own and plain formulas."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from llmkit.model import optim
from llmkit.model.groups import fused_maps
from llmkit.model.language_model import LanguageModel
from llmkit.model.optim import AdamW, Muon, WarmupCosine, WarmupStableDecay, orthogonalise
from llmkit.registry import plugin


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_fused_adamw_equals_plain_adamw() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    got = train(model, AdamW(model.parameters(), lr=0.01))
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    torch.testing.assert_close(got, train(twin, plain), rtol=1e-5, atol=1e-6)


def test_vectors_are_not_decayed() -> None:
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "kind": "matrix"}, {"params": [bias], "kind": "vector", "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.1, weight_decay=0.5)
    weight.grad, bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3, 3), 0.95)) and torch.equal(bias, torch.ones(3))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonalise_against_svd(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    got = orthogonalise(matrices, 8).float()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    # The iteration keeps the singular vectors and brings every singular value near 1.
    values = torch.einsum("kri,krc,kic->ki", u, got, vh)
    assert values.min() > 0.5 and values.max() < 1.35
    assert (got - u @ torch.diag_embed(values) @ vh).abs().max() < 0.05


def test_orthogonalise_leaves_the_smallest_values_of_a_square_matrix_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim, "fast_bf16", lambda device: False)  # without rounding
    matrices = torch.randn(20, 64, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert ((values > 0.65) & (values < 1.22)).float().mean() > 0.97
    before = torch.linalg.svdvals(matrices) / matrices.norm(dim=(1, 2), keepdim=True).squeeze(-1)
    assert (values[:, -1] <= 485.1 * before[:, -1]).all() and values[:, -1].min() < 0.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim has no Muon before torch 2.9")
@pytest.mark.parametrize("bf16", [True, False])
def test_muon_agrees_with_torchs_muon_on_one_matrix(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "fast_bf16", lambda device: bf16)
    torch.manual_seed(3)
    start = torch.randn(16, 8)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([{"params": [ours], "kind": "matrix"}], lr=0.1, weight_decay=0.0)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
    for step in range(3):
        gradient = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    if bf16:
        assert torch.equal(ours, theirs)
    # Torch's iterates in bf16 always; a step of 0.1 per singular direction is what they must agree on.
    assert (ours - theirs).norm() < 0.05 * (ours - start).norm()


def test_muon_orthogonalises_each_map_of_a_fused_weight() -> None:
    """As if each map were a weight of its own; the maps of queries, keys and values have different sizes here."""
    torch.manual_seed(4)
    start, sizes = torch.randn(16, 8), [8, 4, 4]
    whole = nn.Parameter(start.clone())
    pieces = [nn.Parameter(piece.clone()) for piece in start.split(sizes)]
    one = Muon([{"params": [whole], "kind": "matrix", "maps": [sizes]}], lr=0.1)
    several = Muon([{"params": pieces, "kind": "matrix"}], lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn(16, 8)
        for piece, gradient in zip(pieces, whole.grad.split(sizes), strict=True):
            piece.grad = gradient.clone()
        one.step()
        several.step()
    torch.testing.assert_close(whole.detach(), torch.cat([piece.detach() for piece in pieces]))


def test_muon_takes_hidden_matrices_by_their_maps_and_no_classifier() -> None:
    model = LanguageModel(
        head=plugin("head", "classification"), attention=plugin("attention", "lstm"), optimizer=Muon, dim=8,
        feedforward=plugin("feedforward", "swiglu"), num_layers=1, context=8,
    )  # fmt: skip
    model.tokenizer = plugin("tokenizer", "byte")()
    model.head.set_info({"labels": ["a", "b"]})
    model.configure_model()
    matrices, embeddings, _ = model.groups()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p].rpartition("0.")[2]: rows for p, rows in zip(matrices["params"], matrices["maps"], strict=True)}
    gates = [4] * 4
    assert found == {
        "attention.rnn.weight_ih_l0": gates, "attention.rnn.weight_hh_l0": gates,
        "attention.rnn.weight_ih_l0_reverse": gates, "attention.rnn.weight_hh_l0_reverse": gates,
        "feedforward.inner.weight": [24, 24], "feedforward.out.weight": [8],
    }  # fmt: skip
    assert {names[p] for p in embeddings["params"]} == {"net.embedding.weight", "head.classifier.weight"}


def test_the_maps_of_latent_attention() -> None:
    """Latent and rotary key are two maps of the input, keys and values two of the latent; cross has no rotary key."""
    build = plugin("attention", "latent", num_heads=2, kv_rank=6, rope_dim=2)
    assert fused_maps(build(8, "causal")) == {"down.weight": [6, 2], "up.weight": [8, 8]}
    assert fused_maps(build(8, "cross")) == {"down.weight": [6], "up.weight": [8, 8]}


def test_muon_uses_adamw_for_everything_else() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    groups = [{"params": list(model.parameters()), "kind": "embedding"}]
    got = train(model, Muon(groups, adam_lr=0.01, weight_decay=0.1))
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    torch.testing.assert_close(got, train(twin, plain), rtol=1e-5, atol=1e-6)


def test_muon_state_survives_a_state_dict() -> None:
    model = small_model()

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in module.parameters() if p.dim() == 2]
        vectors = [p for p in module.parameters() if p.dim() == 1]
        return [{"params": matrices, "kind": "matrix"}, {"params": vectors, "kind": "vector", "weight_decay": 0.0}]

    optimizer = Muon(groups(model))
    train(model, optimizer)
    twin = copy.deepcopy(model)
    restored = Muon(groups(twin))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(train(model, optimizer), train(twin, restored), rtol=0, atol=0)


def rates_of(schedule_of: Any, steps: int) -> list[float]:
    """Return the learning rates of a schedule at a peak of 2, those of all steps and the one after."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = schedule_of(optimizer), []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_is_the_formula() -> None:
    rates = rates_of(partial(WarmupCosine, warmup_steps=4, min_lr_ratio=0.1, total_steps=20), 20)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 16)))
    assert rates[12] == pytest.approx(middle) and rates[20] == pytest.approx(0.2)


def test_warmup_stable_decay_is_the_formula() -> None:
    """Hägele et al. 2024: 1 - sqrt((n - (N - N_decay)) / N_decay), with N = 20 and N_decay = 8; Hu et al. by lines."""
    settings: dict[str, Any] = {"warmup_steps": 4, "decay_share": 0.4, "total_steps": 20}
    start = [0.5, 1.0, 1.5, *[2.0] * 9]
    rates = rates_of(partial(WarmupStableDecay, **settings), 20)
    assert rates == pytest.approx([*start, *(2 * (1 - math.sqrt(n / 8)) for n in range(9))])
    rates = rates_of(partial(WarmupStableDecay, shape="linear", min_lr_ratio=0.25, **settings), 20)
    assert rates == pytest.approx([*start, *(2 * (0.25 + 0.75 * (1 - n / 8)) for n in range(9))])
    constant = partial(WarmupStableDecay, **{**settings, "decay_share": 0})
    assert rates_of(constant, 30) == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 28])
    assert rates_of(partial(WarmupStableDecay, **{**settings, "total_steps": None}), 30)[3:] == [2.0] * 28
    wrongs: list[dict[str, Any]] = [
        {"decay_share": 1.5},
        {"shape": "cosine"},
        {"warmup_steps": -1},
        {"min_lr_ratio": 2},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            rates_of(partial(WarmupStableDecay, **wrong), 1)

"""The chunked loss against torch's own cross-entropy on whole scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.contracts import IGNORE
from llmkit.ops import losses


def inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, dim, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 40, 10**6])
@pytest.mark.parametrize("ignored", [0, 5])
def test_equals_torch_value_and_gradient(
    smoothing: float, chunk: int, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    hidden, weight, targets = inputs(23, 6, 11)
    targets[:ignored] = IGNORE
    loss = losses.linear_cross_entropy(hidden, weight, targets, smoothing)
    (loss.total * 3).backward()
    got = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    wanted = F.cross_entropy(
        hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    (wanted * 3).backward()
    assert int(loss.count) == 23 - ignored
    torch.testing.assert_close(loss.total, wanted)
    torch.testing.assert_close(got, (hidden.grad, weight.grad))


class Products(TorchDispatchMode):
    """Records the shapes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.add(tuple(x.shape for x in args))
        return func(*args, **(kwargs or {}))


def test_products_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of targets: oneDNN keeps kernels for each shape, and memory would grow with every batch."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 11 * 150)
    with Products() as products:
        for ignored in range(1, 150, 7):
            hidden, weight, targets = inputs(300, 6, 11)
            targets[:ignored] = IGNORE
            losses.linear_cross_entropy(hidden, weight, targets).total.backward()
    rows = {n for shapes in products.shapes for shape in shapes for n in shape} - {6, 11}
    assert rows == {64, 128}


def test_all_ignored_is_zero() -> None:
    hidden, weight, targets = inputs(4, 3, 5)
    loss = losses.linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    loss.total.backward()
    assert loss.total == 0 and loss.count == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_bf16_autocast_is_close_to_fp32() -> None:
    hidden, weight, targets = inputs(64, 32, 100, torch.float32)
    exact = losses.linear_cross_entropy(hidden, weight, targets).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = losses.linear_cross_entropy(hidden, weight, targets).total
    low.backward()
    assert low.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=2e-2, atol=0)


@settings(deadline=None)
@given(
    rows=st.integers(1, 30),
    dim=st.integers(1, 9),
    vocab=st.integers(2, 20),
    ignored=st.integers(0, 30),
    smoothing=st.sampled_from([0.0, 0.1]),
    autocast=st.booleans(),
)
def test_agrees_with_its_plain_definition(
    rows: int, dim: int, vocab: int, ignored: int, smoothing: float, autocast: bool
) -> None:
    results = []
    for function in (losses.linear_cross_entropy, losses.plain_linear_cross_entropy):
        hidden, weight, targets = inputs(rows, dim, vocab, torch.float32)
        targets[:ignored] = IGNORE
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, targets, smoothing)
        loss.total.backward()
        assert loss.count == max(0, rows - ignored)
        results.append((loss.total, hidden.grad, weight.grad))
    # Under autocast both round scores and gradients to bfloat16, at different places.
    rtol, atol = (3e-2, 5e-2) if autocast else (1e-4, 1e-5)
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)

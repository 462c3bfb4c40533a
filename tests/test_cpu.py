"""The layers for training on a CPU, against torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import decided
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmkit.ops import cpu
from llmkit.ops.cpu import Dropout, Linear, computed_again, times, use_cpu_layers
from llmkit.ops.elementwise import rms_norm, squared_relu
from llmkit.ops.losses import linear_cross_entropy
from llmkit.sequence import Sequence

needs_kernel = pytest.mark.skipif(not cpu._X86, reason="torch has no such kernel on this processor")


@pytest.fixture(autouse=True)
def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers each time, and no product so small that it would be left to torch."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "LEAST", 1)


def pair(bias: bool = True, inputs: int = 6, outputs: int = 5) -> tuple[Linear, nn.Linear]:
    """Return our map and, with the same weights in double precision, torch's."""
    ours = nn.Linear(inputs, outputs, bias)
    theirs = copy.deepcopy(ours).double()
    use_cpu_layers(ours)
    assert type(ours) is Linear
    return ours, theirs


def same(found: Tensor | None, wanted: Tensor | None) -> None:
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "a batch of sequences": lambda: torch.randn(3, 4, 6),
    "rows": lambda: torch.randn(7, 6),
    "one vector": lambda: torch.randn(6),
    "nothing": lambda: torch.randn(0, 4, 6),
    "values that lie across memory": lambda: torch.randn(3, 6, 4).transpose(1, 2),
    "a slice": lambda: torch.randn(3, 4, 12)[..., 3:9],
    "a repeated row": lambda: torch.randn(1, 1, 6).expand(3, 4, 6),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_output_and_gradients(name: str, bias: bool) -> None:
    ours, theirs = pair(bias)
    x = INPUTS[name]()
    outputs = []
    for layer, leaf in ((ours, x.detach()), (theirs, x.double())):
        leaf.requires_grad_()
        y = layer(leaf)
        weights = torch.arange(y.numel()).view(y.shape).to(y.dtype).cos()
        (y * weights).sum().backward()
        outputs.append([y, leaf.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for found, wanted in zip(*outputs, strict=True):
        same(found, wanted)


def test_only_the_gradients_that_are_asked_for() -> None:
    ours, theirs = pair()
    x = torch.randn(4, 6)
    ours.weight.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    same(leaf.grad, theirs.weight.sum(0).expand(4, 6))
    assert ours.weight.grad is None
    ours.requires_grad_(False)
    assert not ours(x).requires_grad


def test_weights_that_lie_by_column() -> None:
    ours, theirs = pair(bias=False, inputs=8, outputs=32)
    x = torch.randn(5, 8)
    with torch.no_grad():
        ours.weight.data = ours.weight.T.contiguous().T
        same(ours(x), theirs(x.double()))
        same(times(x, ours.weight), theirs(x.double()))


@needs_kernel
def test_elsewhere_torch_computes() -> None:
    ours, _ = pair()
    x = torch.randn(4, 6)
    assert "_Linear" in str(ours(x).grad_fn)  # else this would be a test of nothing
    assert "_Linear" not in str(copy.deepcopy(ours).double()(x.double()).grad_fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    try:
        backend.enabled = False
        assert "_Linear" not in str(ours(x).grad_fn)
    finally:
        backend.enabled = before
    assert ours.to("meta")(x.to("meta")).shape == (4, 5)
    compiled = torch.compile(pair()[0], backend="eager", fullgraph=True)
    assert compiled(x).shape == (4, 5)


@needs_kernel
def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    monkeypatch.setattr(cpu, "LEAST", 4 * 6 * 5)
    assert "_Linear" in str(ours(torch.randn(4, 6)).grad_fn)
    assert "_Linear" not in str(ours(torch.randn(3, 6)).grad_fn)


@needs_kernel
def test_a_second_gradient_is_refused_rather_than_wrong() -> None:
    ours, _ = pair()
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_subclasses_are_left_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    before = list(net.state_dict())
    use_cpu_layers(net)
    assert [type(part) for part in net] == [Linear, Own]
    assert list(net.state_dict()) == before
    assert type(pickle.loads(pickle.dumps(net[0]))) is Linear
    assert isinstance(net[0], nn.Linear)


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float) -> None:
    layer = nn.Dropout(p)
    use_cpu_layers(layer)
    assert type(layer) is Dropout
    x = torch.randn(400, 500).abs_().add_(1).requires_grad_()
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    same(y[kept], x[kept].double() / (1 - p))
    same(x.grad, kept.double() / (1 - p))
    assert not torch.equal(y, layer(x))


def test_dropout_does_nothing_outside_training_and_is_torchs_elsewhere() -> None:
    layer = nn.Dropout(0.5)
    use_cpu_layers(layer)
    x = torch.randn(5, 6)
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    for value in (x.double(), x.bfloat16()):
        torch.manual_seed(1)
        found = layer(value)
        torch.manual_seed(1)
        assert torch.equal(found, F.dropout(value, 0.5))
    whole = nn.Dropout(1.0)
    use_cpu_layers(whole)
    assert not whole(x).any()


# Inputs that are computed again

SOURCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, w: rms_norm(x, w, 1e-6),
    "squared relu": lambda x, w: squared_relu(x),
}


@needs_kernel
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_computed_again_gives_the_same_gradients_and_is_not_kept(name: str) -> None:
    found: list[list[Tensor]] = []
    kept: list[bool] = []
    for again in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        use_cpu_layers(layer)
        leaf, weight = torch.randn(3, 4, 6).requires_grad_(), torch.randn(6).requires_grad_()
        saved: set[int] = set()

        def noted(value: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(value.data_ptr())
            return value

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda value: value):
            y = SOURCES[name](leaf, weight)
            z = layer(y if again else y.view_as(y))  # the mark is on the tensor itself
        kept.append(y.data_ptr() in saved)
        z.square().sum().backward()
        assert leaf.grad is not None and layer.weight.grad is not None
        found.append([z, leaf.grad, layer.weight.grad])
    assert kept == [False, True]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_value_changed_in_place_is_kept() -> None:
    layer = nn.Linear(6, 5, bias=False)
    use_cpu_layers(layer)
    x = torch.randn(4, 6)
    y = computed_again(x * 2, torch.mul, x, torch.tensor(2.0))
    y.add_(1)
    layer(y).sum().backward()
    same(layer.weight.grad, (2 * x + 1).sum(0).expand(5, 6))


@needs_kernel
def test_a_source_changed_in_place_is_told() -> None:
    layer = nn.Linear(6, 5, bias=False)
    use_cpu_layers(layer)
    x = torch.randn(4, 6)
    z = layer(computed_again(x * 2, torch.mul, x, torch.tensor(2.0)))
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# In a network


@pytest.mark.parametrize("feedforward", ["squared_relu", "gelu", "swiglu"])
@pytest.mark.parametrize("attention", ["multi_head", "linear", "lstm", "latent"])
def test_a_network_learns_the_same(attention: str, feedforward: str) -> None:
    fast = decided(attention, feedforward=feedforward)
    assert any(type(part) is Linear for part in fast.modules())
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.div_(8)  # a network that is sure of itself has gradients that say little
    plain = copy.deepcopy(fast).double()
    for part in plain.modules():
        if isinstance(part, Linear):
            part.__class__ = nn.Linear  # type: ignore[assignment]
    ids = torch.randint(29, (3, 17))
    losses = []
    for net in (fast, plain):
        hidden = net.decode(ids, Sequence.of(ids)).flatten(0, 1)
        losses.append(linear_cross_entropy(hidden, net.output_weight_VD, ids.flatten()).total)
        losses[-1].backward()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    for (name, one), other in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        error = (one.grad.double() - other.grad).norm() / other.grad.norm().clamp_min(1e-6)
        assert error < 1e-4, f"{name}: {error}"


def test_the_kernel_is_counted_by_torchs_counter() -> None:
    ours, _ = pair()
    x = torch.randn(3, 4, 6)
    counts = []
    for function in (ours, lambda x: F.linear(x, ours.weight, ours.bias)):
        with FlopCounterMode(display=False) as counter:
            function(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0

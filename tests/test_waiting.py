"""Nothing in a training step waits for an accelerator: no value of a tensor is read, and batches are sent ahead.

On the meta device no tensor has values, so whatever reads one raises. Where there is a GPU, torch itself watches.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmkit import registry
from llmkit.errors import UserError
from llmkit.model import optim
from llmkit.model.backbone import Backbone
from llmkit.model.groups import fused_maps, parameter_groups, parameter_kinds
from llmkit.model.optim import AdamW, Muon
from llmkit.model.step import OptimizerStep
from llmkit.ops import graphs
from llmkit.ops.decoding import Decoder
from llmkit.registry import plugin, target_of
from llmkit.sequence import on_device
from llmkit.testing.head.subject import CONTEXT, Subject

DEVICES = ["meta", *["cuda"] * torch.cuda.is_available()]
HEADS = sorted(registry.entries("head"))
ATTENTION = sorted(registry.entries("attention"))


class NoCopies(TorchFunctionMode):
    """Refuses tensors made of Python numbers on an accelerator: that copy waits for what runs there already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            assert value.device.type == "cpu", f"{func.__name__} on {value.device}"
        return value


@contextlib.contextmanager
def watched(device: str) -> Any:
    """Raise where the host waits for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoCopies():
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Run:
    """A head with a network, and training steps of it without a trainer."""

    def __init__(
        self, device: str, head: str, attention: str = "multi_head", position: str = "rotary", rows: int = 3
    ) -> None:
        subject = Subject(functools.partial(target_of(plugin("head", head))))
        self.head = subject.raw()
        self.batch = subject.batch(subject.items[:rows], self.head)
        roles = target_of(plugin("attention", attention)).roles
        self.net = Backbone(
            vocab_size=262, dim=16, num_layers=2, topology=self.head.topology, max_length=CONTEXT, dropout=0.1,
            attention=plugin("attention", attention),
            cross_attention=plugin("attention", attention if "cross" in roles else "multi_head"),
            position=plugin("position", position), feedforward=plugin("feedforward", "swiglu"),
            norm=plugin("norm", "rms"),
        )  # fmt: skip
        self.device = torch.device(device)
        self.modules = nn.ModuleDict({"head": self.head, "net": self.net}).to(self.device).train()
        trainer = SimpleNamespace(
            accumulate_grad_batches=1, world_size=1, global_step=0, log_every_n_steps=50, is_global_zero=True,
            strategy=SimpleNamespace(model=None), precision_plugin=SimpleNamespace(scaler=None),
        )  # fmt: skip
        self.model: Any = SimpleNamespace(trainer=trainer, device=self.device, head=self.head)
        self.step = OptimizerStep(5)

    def train(self, optimizer: torch.optim.Optimizer | None = None, batches: int = 1) -> None:
        """Take a step of an optimizer, as the LightningModule does; without one, of the gradient only."""
        self.model.trainer.accumulate_grad_batches = batches
        for _ in range(batches):
            self.step.batch = on_device(self.batch, self.device)
            loss, _ = self.step.loss(self.model, self.head.loss(self.net, self.step.batch))
            loss.backward()
        if optimizer is not None:
            self.step.finish(self.model, optimizer, 1.0)
            optimizer.step()

    def waits(self, **kwargs: Any) -> bool:
        """Whether a step waits for the device; the first one may, for whatever is set up then."""
        if self.device.type == "cuda":
            self.train(**kwargs)
        try:
            with watched(self.device.type):
                self.train(**kwargs)
        except (RuntimeError, NotImplementedError) as error:  # of torch, for a value that is read
            assert any(word in str(error) for word in ("meta", "synchroniz")), error
            return True
        return False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", HEADS)
def test_a_step_of_a_head(device: str, head: str) -> None:
    """Masked_lm multiplies only hidden tokens with the vocabulary, and has to know how many there are."""
    run = Run(device, head, position="alibi")
    assert run.waits() == (head == "masked_lm")
    if head == "classification":
        vars(run.head)["class_weights"] = {"neg": 2.0}
        assert not run.waits()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_step_of_an_attention_variant(device: str, attention: str) -> None:
    """The kernels of recurrent networks take the lengths of packed documents from the host."""
    assert not Run(device, "generation", attention, rows=2).waits()  # both of one length
    assert Run(device, "generation", attention).waits() == (attention in ("lstm", "gru"))
    # Sums over the documents of a source exist for as many documents as there are.
    with contextlib.suppress(UserError):
        packed = Run(device, "translation", attention)
        assert packed.waits() == (attention in ("lstm", "gru", "linear", "low_rank"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_steps_of_decoding(device: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is run, that is captured, and later ones; none of them reads how many columns there were."""
    captured = mock.Mock(side_effect=lambda step: (step(), lambda: None))
    if device == "meta":
        monkeypatch.setattr(graphs, "CAPTURE", {"meta": captured})
    run = Run(device, "generation", attention, position="alibi")
    decoder = Decoder(run.net.eval(), 2, 64, steps=40)
    ids_BT = torch.zeros(2, 5, dtype=torch.long, device=device)
    with torch.no_grad():
        decoder.feed(ids_BT)
        decoder.feed(ids_BT[:, :1])
        with watched(device):
            for _ in range(3):
                decoder.feed(ids_BT[:, :1])
    assert decoder.static is not None and decoder.static.captured is not None


@pytest.mark.parametrize(
    ("device", "kind"), [("meta", Muon), *[("cuda", Muon), ("cuda", AdamW)] * torch.cuda.is_available()]
)
@pytest.mark.parametrize("batches", [1, 2])
def test_a_whole_step(device: str, kind: Any, batches: int) -> None:
    """Whether the gradient is finite is decided on the device, and read with that of other steps."""
    run = Run(device, "generation")
    with mock.patch.object(optim, "FUSED", {"cpu", "cuda", "meta"}):
        groups = parameter_groups(run.net, parameter_kinds(run.net), fused_maps(run.net) if kind is Muon else None)
        optimizer: Any = kind(groups)
        assert not run.waits(optimizer=optimizer, batches=batches)
    assert optimizer.found_inf.shape == ()


def test_batches_are_sent_from_pinned_memory() -> None:
    batch = {"ids": torch.arange(6), "text": ["a"], "bytes": torch.tensor(6.0)}
    pinned = mock.Mock()
    with mock.patch.object(Tensor, "pin_memory", return_value=pinned) as pin:
        sent = on_device(batch, torch.device("cuda", 0))
        assert on_device(batch, torch.device("cpu"))["ids"] is batch["ids"]
    assert sent["text"] is batch["text"] and sent["ids"] is sent["bytes"] is pinned.to.return_value
    assert pin.call_count == 2
    pinned.to.assert_called_with(torch.device("cuda", 0), non_blocking=True)

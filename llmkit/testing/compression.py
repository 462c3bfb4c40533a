"""The properties of compression methods."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration, Compression
from llmkit.model.language_model import LanguageModel
from llmkit.sequence import Sequence
from llmkit.testing.numerics import seeded
from llmkit.testing.report import Properties, Violation

PROPERTIES: Properties[Subject] = Properties()
VOCAB, LENGTH, ROWS = 48, 12, 8


@dataclass(frozen=True)
class Subject:
    """A compression method under test.

    Attributes:
        factory: builds it.
        dim: width of the model that is compressed.
        seed: of weights and inputs.
    """

    factory: functools.partial[Any]
    dim: int
    seed: int

    @functools.cached_property
    def ids(self) -> Tensor:
        """The rows of the model, (B, T)."""
        return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(self.seed))

    def model(self, seed: int = 0) -> nn.ModuleDict:
        """Return a model of the default parts, with a linear map in the place of a head."""
        with seeded(self.seed + seed), torch.no_grad():
            parts = LanguageModel(dim=self.dim, num_layers=2, context=LENGTH).parts
            model = nn.ModuleDict({"net": parts.backbone("decoder", VOCAB), "head": nn.Linear(self.dim, 3)})
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    @torch.no_grad()
    def outputs(self, model: nn.ModuleDict) -> Tensor:
        """Return what a model's head makes of the hidden states, (B, T, 3)."""
        net: Any = model["net"]
        found: Tensor = model["head"](net.decode(self.ids, Sequence.dense(LENGTH)))
        return found

    def compressed(self, method: Compression) -> tuple[nn.ModuleDict, dict[str, Any]]:
        """Return a compressed model, and what the method has made."""
        model = self.model()
        rows = Calibration(lambda: float(self.outputs(model).float().square().mean()), ROWS)
        with torch.no_grad():
            return model, method.apply(model, rows if method.reads else None)


def subject(factory: functools.partial[Any], *, seed: int = 0, dim: int | None = None) -> Subject:
    """Return the subject."""
    return Subject(factory, dim or 32, seed)


def _state(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}


@PROPERTIES(
    "it changes a model, and what it returns is plain data that comes back from JSON as it was",
    "A checkpoint cannot carry it, or it does nothing.",
    essential=True,
)
def plain_data(subject: Subject) -> None:
    model, made = subject.compressed(subject.factory())
    if not isinstance(made, Mapping) or json.loads(json.dumps(made)) != made:
        raise Violation(f"apply returned {made!r:.200}")
    before, after = subject.model().state_dict(), model.state_dict()
    if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before):
        raise Violation("the state of the model is what it was")


@PROPERTIES(
    "the compressed model computes finite numbers of the same shape",
    "The model is ruined.",
    essential=True,
)
def finite(subject: Subject) -> str:
    model, _ = subject.compressed(subject.factory())
    found, expected = subject.outputs(model).float(), subject.outputs(subject.model())
    if found.shape != expected.shape or not found.isfinite().all():
        raise Violation(f"outputs of shape {tuple(found.shape)}, {int((~found.isfinite()).sum())} of them not finite")
    size = sum(value.nbytes for value in model.state_dict().values())
    whole = sum(value.nbytes for value in subject.model().state_dict().values())
    return f"{size / whole:.0%} of the bytes, largest change {float((found - expected).abs().max()):.2g}"


@PROPERTIES(
    "rebuild gives an untrained model, also one without memory, the names, shapes and types of the compressed one",
    "Its checkpoint is refused as damaged.",
    essential=True,
)
def rebuilds(subject: Subject) -> None:
    model, made = subject.compressed(subject.factory())
    expected = _state(model)
    for device in ("cpu", "meta"):
        new = subject.model(seed=1).to(device)
        subject.factory().rebuild(new, copy.deepcopy(made))
        found = _state(new)
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if differing:
            name = differing[0]
            raise Violation(f"on {device} {name} is {found.get(name)}, compressed {expected.get(name)}")


@PROPERTIES(
    "a model that was rebuilt and has loaded the weights computes what the compressed one does, to the bit",
    "What infer answers is not what was measured.",
)
def comes_back(subject: Subject) -> None:
    model, made = subject.compressed(subject.factory())
    new = subject.model(seed=1)
    subject.factory().rebuild(new, json.loads(json.dumps(made)))
    new.load_state_dict(model.state_dict())
    found, expected = subject.outputs(new.eval()), subject.outputs(model)
    if not torch.equal(found, expected):
        raise Violation(f"outputs differ by up to {float((found - expected).abs().max()):.2g}")


@PROPERTIES("the same model is always compressed alike", "A table of methods cannot be reproduced.")
def repeats(subject: Subject) -> None:
    first, second = (subject.compressed(subject.factory())[0].state_dict() for _ in range(2))
    for name in first:
        if not torch.equal(first[name], second[name]):
            raise Violation(f"{name} differs the second time")

"""The teacher of a run that distils: a trained model that another one learns from, and that stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmkit.contracts import Batch, Loss, Network
from llmkit.errors import Problem, UserError, blame, note
from llmkit.model.use import Answers
from llmkit.ops.distillation import Distillable, Distillation, SoftTargets

KEY = "model.distill.teacher"


class Teacher:
    """A trained model whose scores are mixed into another one's loss. It is not part of that one: no module of it.

    Args:
        model: the trained model, in eval mode.
        settings: where it comes from, and how it is used.

    Attributes:
        sha256: the hash of its weights.
    """

    def __init__(self, model: Answers, settings: Distillation) -> None:
        self.model, self.settings = model.requires_grad_(False), settings
        self.sha256 = weights_hash(model)

    @classmethod
    def load(cls, settings: Distillation, load: Callable[[str], Answers], rank: int) -> Teacher:
        """Return the teacher that the settings name, with a note on the first process (``rank`` 0).

        Raises UserError when it cannot be read, or is another one than the run began with.
        """
        with blame(KEY):
            teacher = cls(load(settings.teacher), settings)
        if settings.sha256 not in (None, teacher.sha256):
            text = f"{settings.teacher} has other weights than the teacher that the run began with"
            raise UserError(Problem(KEY, text))
        if rank == 0:
            variant = teacher.model.spec["attention"]["class_path"].rpartition(".")[2]
            size = teacher.model.network.num_parameters()["total"]
            how = f"temperature {settings.temperature:g}, weight {settings.weight:g}"
            note(f"model.distill: learns from {settings.teacher} ({variant}, {size:,} parameters), {how}")
        return teacher

    def check(self, student: Answers) -> None:
        """Raise UserError, which names both, when a model cannot learn from this one; its tokenizer is known."""
        name, own, head = self.settings.teacher, self.model, student.head
        if not isinstance(head, Distillable) or "soft" not in inspect.signature(head.loss).parameters:
            text = f"{type(head).__name__} cannot learn from a teacher; generation, classification, translation can"
            raise UserError(Problem("model.distill", text))
        pairs = {
            "the head": (type(own.head).__name__, type(head).__name__),
            "fields": (own.head.inputs, head.inputs),
            "the tokenizer": tuple(type(model.tokenizer).__name__ for model in (own, student)),
            "a vocabulary of": tuple(len(model.network.output_weight_VD) for model in (own, student)),
            "labels and the like": (own.head.info(), head.info()),
        }
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise UserError(Problem(KEY, f"{name} has {what} {theirs}, this model {ours}: they must be the same"))
        assert own.tokenizer is not None and student.tokenizer is not None
        if own.tokenizer.to_state() != student.tokenizer.to_state():
            kind = type(own.tokenizer).__name__
            text = f"{name} has a {kind} trained on other data than this model's {kind}: train both on the same data"
            raise UserError(Problem(KEY, text))
        if own.context < student.context:
            text = f"{name} reads at most {own.context} positions, and this model {student.context} (model.context)"
            raise UserError(Problem(KEY, text))

    def described(self) -> dict[str, Any]:
        """Return the settings as plain data, with the hash of the weights, for a checkpoint."""
        return {**dataclasses.asdict(self.settings), "sha256": self.sha256}

    def loss(self, head: nn.Module, net: Network, batch: Batch) -> Loss:
        """Return a student's training loss of a batch, with the teacher's scores mixed in."""
        assert isinstance(head, Distillable)
        if self.settings.weight == 0:
            return head.loss(net, batch)
        teacher = self.model.head
        assert isinstance(teacher, Distillable)
        with torch.no_grad():
            logits = teacher.logits(self.model.network, batch)
        return head.loss(net, batch, SoftTargets(logits, self.settings.temperature, self.settings.weight))


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a module's weights."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

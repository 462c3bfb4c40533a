"""How a model is made from a checkpoint, or from a model of Hugging Face, outside of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from llmkit.check import check_arguments
from llmkit.checkpoint.archive import file_of
from llmkit.checkpoint.content import Stored, check_classes, read, refusing
from llmkit.checkpoint.sources import note_changed
from llmkit.checkpoint.weights import without_adapters
from llmkit.contracts import Head
from llmkit.errors import Problem, UserError
from llmkit.hf import start as hf
from llmkit.model.use import Answers


class Loadable(Answers):
    """A model that is loaded from a file."""

    head_ready: bool
    _initial: Stored | None

    @abstractmethod
    def restore(self, stored: Stored) -> None:
        """Take over what a checkpoint carries besides the weights. Raises UserError when it does not fit."""

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Return the model of a checkpoint, ready to predict, in eval mode: not compiled, its adapters merged.

        Args:
            path: a ``.ckpt`` file written by ``llmkit fit``, a run folder: its best checkpoint, or a model of Hugging
                Face, ``hf:NAME_OR_FOLDER[@REVISION]``.
            device: where the model is put.

        Raises:
            UserError: missing or damaged file, a newer format, weights of other sizes than its description says, or
                a plugin that is not installed.
        """
        if hf.is_published(path):
            return cls.published(str(path)).to(device).eval()
        path = file_of(path, "best.ckpt", "last.ckpt")
        return cls.of_checkpoint(without_adapters(Stored(path, read(path)))).to(device).eval()

    @classmethod
    def of_checkpoint(cls, stored: Stored) -> Self:
        """Return the model of a checkpoint that was read. Raises UserError as ``load``."""
        model = cls.described(stored.part, f"checkpoint {stored.path}")
        model.restore(stored)
        with refusing(f"checkpoint {stored.path} describes no model"):
            model.configure_model()
        model.load_state_dict(stored.content["state_dict"])
        return model

    @classmethod
    def described(cls, part: Mapping[str, Any], where: str) -> Self:
        """Return a model as llmkit's section of a checkpoint describes it, not yet built.

        Raises UserError, which begins with ``where``, for a description that is damaged or needs other plugins.
        """
        check_classes(part, where)
        note_changed(part, where)
        spec = {**part["model"], "compile": False}
        _, problems = check_arguments(cls, spec, "model")
        if problems:
            raise UserError(*(f"{where} is damaged: {problem}" for problem in problems))
        with refusing(f"{where} describes no model"):
            if any(spec.get(name) is not None for name in ("init_from", "adapter", "word_vectors")):
                raise UserError("a checkpoint begins with its own weights, it has no init_from")
            return cls(**spec)

    @classmethod
    def published(cls, name: str, head: Mapping[str, Any] | str | None = None, adapter: str | None = None) -> Self:
        """Return a model of Hugging Face, ready to predict.

        Args:
            name: ``hf:NAME_OR_FOLDER[@REVISION]``.
            head: another head than the one it was published with, as a config names it.
            adapter: an adapter of peft that is merged into its weights.

        Raises UserError when it cannot be read, is of an architecture that is not supported, or has no head.
        """
        if head is None and adapter is None and (stored := hf.own_checkpoint(name)) is not None:
            return cls.of_checkpoint(stored)
        settings, _ = hf.settings_of(name, head)
        same = "head" in settings
        chosen = hf.with_arguments(settings["head"], head) if same else head
        model = cls(**{**settings, "head": chosen}, init_from=name, adapter=adapter)
        assert model._initial is not None
        if same:
            model.head.set_info(model._initial.part["head_info"])
        elif type(model.head).learn is not Head.learn:
            text = f"{type(model.head).__name__} learns from training data: use model.init_from {name} of a fit"
            raise UserError(Problem("model.head", text))
        model.head_ready = True
        model.configure_model()
        return model

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu") -> Self:  # type: ignore[override]
        """Return the model of a checkpoint: Lightning's name for ``load``."""
        return cls.load(checkpoint_path, map_location)

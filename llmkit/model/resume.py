"""Settings of optimizer and schedule that change when a run is resumed: applied as if they had held from the start."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from llmkit import registry
from llmkit.errors import Problem, UserError
from llmkit.model.parts import Parts

Settings = list[dict[str, Any]]
"""The settings of each parameter group."""
NAMES = ("optimizer", "scheduler")
DEVICE = ("params", "fused", "foreach", "capturable")
"""Settings that depend on where the parameters are."""


def stored_settings(trainer: pl.Trainer, spec: Mapping[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return optimizer and schedule of the run that a checkpoint continues, as plain data; {} unless one is fitted.

    The state of a schedule of another class is taken out of the checkpoint.

    Args:
        trainer: what loads it.
        spec: the description of the model that resumes.
        checkpoint: what is being loaded.

    Raises UserError when the optimizer is of another class, whose state means something else.
    """
    if trainer.state.fn != "fit":
        return {}
    stored = {name: checkpoint["llmkit"]["model"][name] for name in NAMES}
    now, then = (_class_name(specs["optimizer"]) for specs in (spec, stored))
    if now != then:
        text = (
            f"is {now}, but the checkpoint has the state of {then}: a resumed run keeps its optimizer. For a new run "
            f"that begins with these weights, use model.init_from instead of --ckpt_path"
        )
        raise UserError(Problem("model.optimizer", text))
    # They decide what the optimizer's groups are.
    for name, default in {"freeze": None, "layer_decay": 1.0, "mup_base_dim": None}.items():
        if spec[name] != (before := checkpoint["llmkit"]["model"].get(name, default)):
            text = f"is {spec[name]}, but the checkpoint has {before}: a resumed run keeps its parameter groups"
            raise UserError(Problem(f"model.{name}", text))
    teachers = (spec["distill"] or {}, checkpoint["llmkit"]["model"].get("distill") or {})
    if teachers[0].get("sha256") != teachers[1].get("sha256"):
        paths = [given.get("teacher", "no teacher") for given in teachers]
        text = f"is {paths[0]}, but the checkpoint's run began with {paths[1]}: a resumed run keeps its teacher"
        raise UserError(Problem("model.distill.teacher", text))
    if _class_name(spec["scheduler"]) != _class_name(stored["scheduler"]):
        checkpoint["lr_schedulers"] = []
    return stored


def apply_changes(trainer: pl.Trainer, parts: Parts, stored: Mapping[str, Any], groups: Settings) -> None:
    """Apply what differs between the present settings and those that optimizer and schedule were restored with.

    An unchanged setting keeps the value that it has come to in training, to the bit. The learning rate becomes that of
    a run which had the present settings from its first step.

    Args:
        trainer: its optimizer and schedule were restored from a checkpoint.
        parts: the present settings.
        stored: what ``stored_settings`` returned; {}: nothing was resumed.
        groups: the parameter groups that the optimizer is built from.
    """
    if not stored:
        return
    optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    total = int(trainer.estimated_stepping_batches)
    # Schedules of torch bring the length that they were made for back from the checkpoint.
    total_then = getattr(schedule, "total_steps", None) or total
    if total == total_then and all(_text(parts.spec[name]) == _text(stored[name]) for name in NAMES):
        return
    now, state = _replay(parts, groups, total, trainer.global_step)
    then: Settings = [{} for _ in groups]
    state_then: dict[str, Any] = {}
    if _class_name(parts.spec["scheduler"]) == _class_name(stored["scheduler"]):
        before = copy.copy(parts)
        specs = {name: {**stored[name], "class_path": parts.spec[name]["class_path"]} for name in NAMES}
        before.spec = {**parts.spec, **specs}
        before.factories = {**parts.factories, **{name: registry.resolve(name, specs[name]) for name in NAMES}}
        then, state_then = _replay(before, groups, total_then, trainer.global_step)
    for group, new, old in zip(optimizer.param_groups, now, then, strict=True):
        group |= {key: value for key, value in new.items() if key not in old or old[key] != value}
    if state != state_then:
        schedule.load_state_dict(state)


def _replay(parts: Parts, groups: Settings, total_steps: int, step: int) -> tuple[Settings, dict[str, Any]]:
    """Return the groups' settings and the schedule's state that a run has after so many steps."""
    optimizer = parts.optimizer([{**group, "params": [nn.Parameter(torch.zeros(2, 2))]} for group in groups])
    schedule = parts.schedule(optimizer, total_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has taken no step
        for _ in range(step):
            schedule.step()
    kept = [{key: value for key, value in group.items() if key not in DEVICE} for group in optimizer.param_groups]
    return kept, schedule.state_dict()


def _class_name(spec: Mapping[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]


def _text(spec: Mapping[str, Any]) -> str:
    return json.dumps([_class_name(spec), spec.get("init_args") or {}], sort_keys=True, default=str)

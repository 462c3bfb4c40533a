"""What loggers get from a study, so that an experiment tracker shows its runs as one group."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

GROUPS = ("group", "experiment_name")
"""Arguments of loggers for what runs have in common."""


def logger_words(tree: Mapping[str, Any], study: str, name: str, tags: Mapping[str, Any]) -> list[str]:
    """Return the option that names the loggers of a config with what identifies a cell; none without loggers.

    What the config sets stays. Of the rest, a logger is given what its constructor has arguments for: the study as
    ``group`` or ``experiment_name``, the cell as ``name`` or ``run_name``, ``tags``, and an ``id`` or ``version`` that
    stays the same when the cell is resumed. Where the study has no argument of its own it comes first in the name.

    Args:
        tree: the config of the cell.
        study: the name of the study.
        name: of the cell, PHASE/VARIANT/SEED-DIGEST.
        tags: what else identifies it.
    """
    given = tree.get("trainer", {}).get("logger")
    if given in (None, True, False):
        return []
    specs = given if isinstance(given, list) else [given]
    full = [{"class_path": spec} if isinstance(spec, str) else spec for spec in specs]
    found = [_filled(spec, study, name, tags) for spec in full]
    return [f"--trainer.logger={json.dumps(found)}"]


def _filled(spec: dict[str, Any], study: str, name: str, tags: Mapping[str, Any]) -> dict[str, Any]:
    package, _, attribute = spec["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(package or "lightning.pytorch.loggers"), attribute)
    parameters = inspect.signature(cls).parameters
    label, _, digest = name.rpartition("-")
    # What it passes on to wandb.init.
    passed_on = {"group", "tags"} if attribute == "WandbLogger" else set()
    accepted = parameters.keys() | passed_on
    in_group = not accepted.isdisjoint(GROUPS)
    shown = label if in_group else f"{study}/{label}"
    as_mapping = "dict" in str(getattr(parameters.get("tags"), "annotation", "")).lower()
    values: dict[str, Any] = {
        **dict.fromkeys(GROUPS, study),
        **dict.fromkeys(("name", "run_name"), shown),
        "tags": {"study": study, **tags} if as_mapping else [study, *map(str, tags.values())],
        "id" if "id" in accepted else "version": f"{study}-{digest}" if in_group else digest,
    }
    init = {key: value for key, value in values.items() if key in accepted - passed_on}
    rest = {key: value for key, value in values.items() if key in passed_on}
    return {
        **spec,
        "init_args": {**init, **spec.get("init_args", {})},
        **({"dict_kwargs": {**rest, **spec.get("dict_kwargs", {})}} if rest else {}),
    }

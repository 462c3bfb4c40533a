"""What loggers get from a study, so that an experiment tracker shows its runs as one group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmkit.run.class_names import listed
from llmkit.run.trackers import Identity, filled


def logger_words(tree: Mapping[str, Any], study: str, name: str, tags: Mapping[str, Any]) -> list[str]:
    """Return the option that names the loggers of a config with what identifies a cell; none without loggers.

    The study is their ``group`` or ``experiment_name``, the cell their ``name`` or ``run_name``, and an ``id`` or
    ``version`` stays the same when the cell is resumed. Where the study has no argument of its own it comes first in
    the name.

    Args:
        tree: the config of the cell.
        study: the name of the study.
        name: of the cell, PHASE/VARIANT/SEED-DIGEST.
        tags: what else identifies it.
    """
    label, _, digest = name.rpartition("-")
    run = Identity(study, label, f"{study}/{label}", {"study": study, **tags}, f"{study}-{digest}", digest)
    specs = listed(tree.get("trainer", {}).get("logger"))
    found = [filled({"class_path": spec} if isinstance(spec, str) else spec, run) for spec in specs]
    return [f"--trainer.logger={json.dumps(found)}"] if found else []

"""The files of a run folder that say what it was and what came out. Nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS, PROVENANCE = "results.json", "provenance.json"
OF_THE_TRY = ("command", "status", "started", "seconds", "checkpoint")
"""The part of the provenance that differs between equal runs, a resumed one and one that was left alone, say."""


def read(file: Path) -> dict[str, Any]:
    """Return what a file of a run folder holds; nothing where it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

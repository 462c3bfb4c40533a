"""What a study calls its settings and costs, and how its variants look in figures."""

from __future__ import annotations

from typing import Any

from llmkit.run.drawing import BLACK, COLOURS, LINES, MARKERS
from llmkit.study.verdicts import Results

COSTS = {
    "params": "parameters without embeddings",
    "total_params": "parameters",
    "flops": "FLOPs for a training token",
    "cache": "bytes of cache for a sequence",
    "time": "seconds for a training step",
}
EQUAL = {
    "params": "at equal parameters",
    "flops": "at equal FLOPs for a token",
    "time": "at equal training time",
    "none": "as large as they are",
}
"""What is made equal, in words."""


def label(results: Results, setting: str) -> str:
    """Return what a setting is called."""
    if setting == "base" and results["tuned"] is None:
        return EQUAL[results["match"]]
    return {"tuned": "tuned", "base": "as in the base config", **EQUAL}[setting]


def looks_of(results: Results) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each variant; the baseline is black."""
    others = [name for name in results["variants"] if name != results["baseline"]]
    looks: dict[str, tuple[str, str, Any]] = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(others)
    }
    return {results["baseline"]: (BLACK, "o", "-"), **looks}

"""``llmkit explain CHECKPOINT --faithfulness``: how far each method that explains can be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import columns

if TYPE_CHECKING:
    from llmkit.analysis.explain.faithfulness import Mean
    from llmkit.model.language_model import LanguageModel

TITLES = ("method", "deletion", "below random", "insertion", "above random", "with random weights")


def report(model: LanguageModel, rows: Sequence[str | Mapping[str, Any]], folder: Path, seed: int) -> int:
    """Print the figures of each method over rows and write ``faithfulness.json``; returns the exit code."""
    from llmkit.analysis.explain.attribution import captum
    from llmkit.analysis.explain.faithfulness import METHODS, measure

    captum()  # refuses before anything is computed
    found = measure(model.requires_grad_(False), rows, METHODS, seed)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: one.facts() for name, one in found.items()}
    (folder / "faithfulness.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    table = [list(TITLES)]
    for name, one in found.items():
        random = "" if one.randomised is None else shown(one.randomised)
        cells = [f"{one.deletion.value:.3f}", shown(one.deletion_gain), f"{one.insertion.value:.3f}"]
        table.append([name, *cells, shown(one.insertion_gain), random])
    print("\n".join(columns(table)))
    first = next(iter(found.values()))
    print(f"areas under the probability of the answer, which is {shown(first.whole)} for whole texts")
    print(f"means over {first.texts:,} texts with 95 % intervals")
    print(folder / "faithfulness.json")
    return 0


def shown(mean: Mean) -> str:
    """Return a mean with its interval."""
    return f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})"

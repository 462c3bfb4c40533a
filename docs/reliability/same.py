"""Real experiments in which nothing differs: how often does a verdict claim a difference?

    python docs/reliability/same.py            # 20 experiments of two arms and five seeds: 200 small runs

The arms are the same config under two names, trained with other seeds each, so that whatever is claimed is false. At
most one of twenty may be, on average. Stopped, the same command with the same ``--folder`` resumes. Writes
``same.json`` next to this file, from which ``table.py`` makes a sentence of ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from pathlib import Path
from typing import Any

from llmkit.commands.cell import fit_cell
from llmkit.study import verdicts
from llmkit.study.execute import Local
from llmkit.study.outcomes import Cell, outcome_of

HERE = Path(__file__).resolve().parent
WORDS = ("river", "stone", "house", "green", "walk", "small", "light", "water", "seven", "bright", "corner")
FIT = (
    *("--data.validation_share=0.1", "--data.tokenizer=char", "--data.batch_size=8", "--model.head=generation"),
    *("--model.attention=multi_head", "--model.attention.num_heads=2", "--model.dim=16", "--model.num_layers=1"),
    *("--model.context=32", "--model.scheduler.warmup_steps=5", "--trainer.accelerator=cpu"),
    *("--trainer.max_steps=30", "--trainer.val_check_interval=30", "--trainer.enable_progress_bar=false"),
)
ARMS = ("one", "other")


def cell_of(root: Path, experiment: int, arm: int, number: int, seeds: int) -> Cell:
    """Return a run, whose seed no other run has."""
    seed = (experiment * len(ARMS) + arm) * seeds + number
    argv = (*FIT, f"--data.train={root / 'text.txt'}", f"--seed={seed}")
    return Cell(f"{experiment}/{ARMS[arm]}/seed{number}", argv, ARMS[arm], seed)


def main() -> None:
    """Run all experiments and count verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("same"))
    parser.add_argument("--experiments", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    root, seeds = options.folder.absolute(), options.seeds
    root.mkdir(parents=True, exist_ok=True)
    os.environ["LLMKIT_CACHE"] = str(root / "cache")
    chance = random.Random(0)
    (root / "text.txt").write_text("\n".join(" ".join(chance.choices(WORDS, k=7)) for _ in range(600)) + "\n")
    plan = [
        [[cell_of(root, experiment, arm, number, seeds) for number in range(seeds)] for arm in range(len(ARMS))]
        for experiment in range(options.experiments)
    ]
    cells = [cell for experiment in plan for arm in experiment for cell in arm]
    left = [cell for cell in cells if outcome_of(root / cell.name, "val_loss") is None]
    modules = [f"llmkit_plugins.{name}" for name in ("attention.softmax", "head.generation", "tokenizer")]
    local = Local(root, options.workers, 1, fit_cell, ["llmkit.commands.cell", *modules])
    local(left, len(cells))
    words, deviations = [], []
    for experiment in plan:
        runs: list[dict[str, float | None]] = []
        for arm in experiment:
            outcomes = [outcome_of(root / cell.name, "val_loss") for cell in arm]
            runs.append({str(number): found.value for number, found in enumerate(outcomes) if found is not None})
            deviations.append(statistics.stdev(value for value in runs[-1].values() if value is not None))
        variants = {name: {"runs": {"base": found}, "at_edge": False} for name, found in zip(ARMS, runs, strict=True)}
        results: dict[str, Any] = {"baseline": ARMS[0], "better": "min", "margin": None, "seeds": list(range(seeds))}
        results["variants"] = variants
        words += [verdict.word for verdict in verdicts.of(results, "base")]
    found = {
        "experiments": len(plan),
        "seeds": seeds,
        "false": sum(word in ("better", "worse") for word in words),
        "verdicts": {word: words.count(word) for word in sorted(set(words))},
        "deviation": round(math.sqrt(statistics.mean(value**2 for value in deviations)), 4),
        "failed": local.failed,
    }
    print(json.dumps(found))
    (HERE / "same.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

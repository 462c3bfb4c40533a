"""Made-up results of studies, as ``llmkit.study.report`` reads them."""

from __future__ import annotations

from typing import Any

import numpy as np


def study(
    shifts: dict[str, float],
    *,
    seeds: int = 6,
    sd: float = 0.01,
    correlation: float = 0.5,
    better: str = "min",
    margin: float | None = 0.01,
    tuned: bool = False,
) -> dict[str, Any]:
    """A study of variants whose true results differ from the first one's by ``shifts``."""
    draw = np.random.default_rng(0)
    settings = ["base", "tuned"] if tuned else ["base"]
    shared = {setting: correlation**0.5 * draw.standard_normal(seeds) for setting in settings}
    variants: dict[str, Any] = {}
    for number, (name, shift) in enumerate(shifts.items()):
        runs, curves = {}, {}
        for setting in settings:
            noise = shared[setting] + (1 - correlation) ** 0.5 * draw.standard_normal(seeds)
            values = 4 + (shift if setting == "tuned" or not tuned else 1.5 * shift) + sd * noise
            runs[setting] = {str(seed): float(value) for seed, value in enumerate(values)}
            curves[setting] = {
                seed: [[step, value + 3 * (0.05 ** (step / 600) - 0.05)] for step in range(50, 601, 50)]
                for seed, value in runs[setting].items()
            }
        rates = [0.0005 * 2**k for k in range(5)]
        variants[name] = {
            "overrides": {"model.attention": name},
            "matched": {"model.feedforward.hidden_multiple": 2 + number / 7} if number else {},
            "left": 0.0012 * (-1) ** number if number else 0.0,
            "costs": {
                "params": 1.7e6 + 2e3 * number,
                "total_params": 2.1e6 + 2e3 * number,
                "flops": 1.2e7 * (1 + number / 10),
                "cache": 3.1e4 / (1 + number),
            },
            "notes": ["feedforward is 0.8 times the width"] if number == 1 else [],
            "tuning": [
                {"value": rate, "results": [None if rate > 0.006 else 4 + shift + 0.03 * (k - 2) ** 2 * (1 + number)]}
                for k, rate in enumerate(rates)
            ]
            if tuned
            else None,
            "chosen": rates[2] if tuned else None,
            "at_edge": tuned and number == 2,
            "runs": runs,
            "curves": curves,
        }
    return {
        **{
            "name": "attention",
            "metric": "val_loss",
            "better": better,
            "margin": margin,
            "baseline": next(iter(shifts)),
        },
        **{"match": "params", "llmkit": "0.1.0", "base": "configs/quickstart.yaml", "seeds": list(range(seeds))},
        "data": {"steps": 600, "tokens": 614400, "tokens_per_step": 1024, "train": "the standard library"},
        "tuned": {"key": "model.optimizer.lr", "factor": 2.0, "seeds": [100]} if tuned else None,
        "variants": variants,
        "failed": [],
    }

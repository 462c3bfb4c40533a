"""How far each method that explains can be trusted, for each attention variant on one task.

    LLMKIT_DATA=../shared/data python docs/studies/explain/faithfulness.py [--texts 30] [VARIANT ...]

A classifier of TREC's questions (``$LLMKIT_DATA/trec``): two layers, 64 wide, whole words, two passes over the training
questions, seed 0. The figures are over the first test questions. They go into docs/studies/explain/faithfulness.json,
from which ``python docs/reproduce.py --render`` writes the table of docs/results.md. Needs captum. Takes some three
minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from llmkit import DataModule, LanguageModel, plugin
from llmkit.analysis.explain.faithfulness import METHODS, measure
from llmkit.data.opening import Options
from llmkit.data.rows import Row
from llmkit.data.sources import local

VARIANTS = (
    *("multi_head", "standard", "grouped_query", "sliding_window", "differential", "latent"),
    *("linear", "retention", "low_rank", "min_gru", "gru", "lstm"),
)
ARGUMENTS: dict[str, dict[str, Any]] = {"sliding_window": {"window": 4}}  # wider than most questions it would be full
PATTERN = r"(?P<label>\w+):\S+ (?P<text>.*)"
FILE = Path(__file__).with_suffix(".json")


def train(variant: str, folder: Path, cache: str) -> LanguageModel:
    """Return a trained classifier."""
    pl.seed_everything(0, verbose=False)
    words = plugin("tokenizer", "word", vocab_size=20000, lowercase=True)
    data = DataModule(
        train=str(folder / "TREC.train"),
        validation_share=0.05,
        pattern=PATTERN,
        encoding="latin-1",
        tokenizer=words,
        batch_size=100,
        cache_dir=cache,
    )
    model = LanguageModel(
        head=plugin("head", "classification", dropout=0.3),
        attention=plugin("attention", variant, **ARGUMENTS.get(variant, {})),
        dim=64,
        num_layers=2,
        context=64,
        dropout=0.3,
        optimizer=plugin("optimizer", "adamw", lr=6e-3),
        scheduler=plugin("scheduler", "cosine", warmup_steps=10),
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train, measure, and write the figures of the variants."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--texts", type=int, default=30)
    options = parser.parse_args()
    folder = Path(os.environ.get("LLMKIT_DATA", "../shared/data")) / "trec"
    source = local("data.test", str(folder / "TREC.test"), Options(pattern=PATTERN, encoding="latin-1"))
    rows = [row.data for row in source.read() if isinstance(row, Row)]
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        for variant in options.variants:
            start = time.process_time()
            model = train(variant, folder, cache)
            trained = time.process_time()
            with torch.no_grad():
                answers = model.predict([row["text"] for row in rows])
            right = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
            figures = measure(model, [row["text"] for row in rows[: options.texts]], METHODS)
            found[variant] = {
                "accuracy": right / len(rows),
                "seconds": [trained - start, time.process_time() - trained],
                "methods": {name: one.facts() for name, one in figures.items()},
            }
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(variant, json.dumps(found[variant])[:400], flush=True)


if __name__ == "__main__":
    main()

"""Train, evaluate, save, load and ask a model without the command line; then swap the attention variant.

python examples/python_api.py
"""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path

import lightning.pytorch as pl

import llmkit
from llmkit.model.optim import AdamW

WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def fit(text: Path, attention: str) -> tuple[llmkit.LanguageModel, float]:
    """Return a small character model trained on a text file, and its validation perplexity."""
    pl.seed_everything(0, verbose=False)
    data = llmkit.DataModule(
        train=str(text),
        tokenizer=llmkit.plugin("tokenizer", "char"),
        batch_size=16,
        cache_dir=str(text.parent / "cache"),
    )
    model = llmkit.LanguageModel(
        attention=llmkit.plugin("attention", attention),  # or a class of yours, or functools.partial of one
        dim=32,
        num_layers=1,
        context=32,
        optimizer=functools.partial(AdamW, lr=1e-2),
    )
    trainer = pl.Trainer(
        max_steps=150,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=text.parent,
    )
    trainer.fit(model, data)
    (metrics,) = trainer.validate(model, data, verbose=False)
    trainer.save_checkpoint(text.parent / f"{attention}.ckpt")
    return model, metrics["val_perplexity"]


def main() -> None:
    """Compare two variants and let the second one continue a text."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "week.txt"
        text.write_text("".join(f"After {a} comes {b}.\n" for a, b in zip(WEEK, WEEK[1:] + WEEK[:1], strict=True)) * 60)
        for attention in ("multi_head", "lstm"):
            model, perplexity = fit(text, attention)
            size = sum(p.numel() for p in model.parameters())
            print(f"{attention}: {size:,} parameters, validation perplexity {perplexity:.2f}")
        loaded = llmkit.load(Path(folder) / "lstm.ckpt")  # needs nothing but the file
        options = llmkit.DecodingOptions(max_new_tokens=24, temperature=0)
        print(loaded.predict(["After Monday comes"], options)[0])


if __name__ == "__main__":
    main()

"""Data: rows from files or the hub, tokenized once and cached, served in finished batches."""

from llmkit.data.module import DataModule

__all__ = ["DataModule"]

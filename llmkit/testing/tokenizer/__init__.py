"""The properties of tokenizers."""

from llmkit.testing.report import Properties
from llmkit.testing.tokenizer import encoding, state
from llmkit.testing.tokenizer.subject import Subject, subject

PROPERTIES: Properties[Subject] = Properties(encoding.PROPERTIES, state.PROPERTIES)

__all__ = ["PROPERTIES", "Subject", "subject"]

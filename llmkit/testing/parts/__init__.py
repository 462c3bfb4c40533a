"""The properties of position encodings, feedforward networks and norms."""

from llmkit.testing.parts.position import POSITION
from llmkit.testing.parts.position_wise import FEEDFORWARD, NORM
from llmkit.testing.parts.subject import Subject, subject

__all__ = ["FEEDFORWARD", "NORM", "POSITION", "Subject", "subject"]

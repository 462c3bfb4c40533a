"""The examination of attention variants."""

from llmkit.testing.attention import decoding, forward, numbers
from llmkit.testing.attention.subject import Reference, Subject, subject
from llmkit.testing.report import Properties

PROPERTIES: Properties[Subject] = Properties(forward.PROPERTIES, numbers.PROPERTIES, decoding.PROPERTIES)

__all__ = ["PROPERTIES", "Reference", "Subject", "subject"]

"""The examination of heads."""

from llmkit.testing.head import answers, losses
from llmkit.testing.head.subject import Reference, Subject, subject
from llmkit.testing.report import Properties

PROPERTIES: Properties[Subject] = Properties(losses.PROPERTIES, answers.PROPERTIES)

__all__ = ["PROPERTIES", "Reference", "Subject", "subject"]

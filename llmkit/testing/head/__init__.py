"""The properties of heads."""

from llmkit.testing import modules
from llmkit.testing.head import answers, losses
from llmkit.testing.head.subject import Reference, Subject, subject
from llmkit.testing.report import Properties

PROPERTIES: Properties[Subject] = Properties(
    losses.PROPERTIES,
    modules.gradients,
    modules.every_parameter_learns,
    modules.deterministic,
    answers.PROPERTIES,
    modules.state_dict,
    modules.bfloat16,
)

__all__ = ["PROPERTIES", "Reference", "Subject", "subject"]

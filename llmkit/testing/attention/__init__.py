"""The properties of attention variants."""

from llmkit.testing import modules
from llmkit.testing.attention import decoding, forward, mixing, numbers
from llmkit.testing.attention.subject import Reference, Subject, subject
from llmkit.testing.report import Properties

PROPERTIES: Properties[Subject] = Properties(
    modules.builds,
    modules.weights_are_set,
    modules.shape,
    forward.PROPERTIES,
    modules.gradients,
    modules.every_parameter_learns,
    modules.deterministic,
    modules.bfloat16,
    modules.state_dict,
    modules.layout_of_inputs,
    modules.meta_device,
    numbers.PROPERTIES,
    decoding.PROPERTIES,
    mixing.PROPERTIES,
)

__all__ = ["PROPERTIES", "Reference", "Subject", "subject"]

"""What the fork server of a study imports: the command of a cell, without the packages that it does not use."""

from llmkit import lazy

lazy.defer({})

from llmkit.commands import cell  # noqa: E402, F401

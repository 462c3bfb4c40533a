"""A short examination of each plugin that is not llmkit's own, when its code is used for the first time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit import registry, testing
from llmkit.data import cache, identity
from llmkit.errors import UserError, place

PROPERTIES = {
    "attention": ["shape", "causal_by_value", "padding", "packed_documents", "decoding_steps", "decoding_padding"],
    "position": ["shape", "given_positions", "documents_restart"],
    "feedforward": ["shape", "position_by_position"],
    "norm": ["shape", "position_by_position"],
    "tokenizer": ["ids_in_range", "batches", "state", "encoding_keeps_state"],
}
"""What is examined: the properties without which training and its figures mean nothing, well under a second together.

Heads are left out: their examination takes rows of their own fields. So are data sets, which may take long to begin."""


def examine(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield a line for each plugin of a config that breaks a property.

    Args:
        config: the checked tree.
        folder: the cache, which remembers the plugins that passed, by their code and arguments.
    """
    own = {entry.class_path.partition(".")[0] for entry in _entries() if entry.distribution == "llmkit"}
    seen = []
    for key, family in registry.FAMILY_OF.items():
        group, _, leaf = key.partition(".")
        spec = config[group].get(leaf)
        if spec is None or spec in seen or family not in PROPERTIES or spec["class_path"].partition(".")[0] in own:
            continue
        seen.append(spec)
        factory = registry.factory_of(spec, family)
        used = identity.of(factory.func, folder, factory)
        passed = folder / "examined" / cache.digest([family, PROPERTIES[family], used])
        if used is not None and passed.exists():
            continue
        failed = [result for result in _examined(family, factory, config["model"]["dim"]) if result.status == "fail"]
        if not failed:
            with contextlib.suppress(OSError):  # a cache that cannot be written is reported by the data
                cache.write_text(passed, "")
            continue
        others = f"; also broken: {', '.join(result.name for result in failed[1:])}" if failed[1:] else ""
        yield f"{key}: {place(factory.func)} fails the check {failed[0].summary()}{others}"


def _entries() -> list[registry.Entry]:
    return [entry for family in registry.DEFAULTS for entry in registry.entries(family).values()]


def _examined(family: str, factory: functools.partial[Any], dim: int) -> tuple[testing.Result, ...]:
    """Return the results; at the width of the config where no usual one fits the plugin's arguments."""
    options: dict[str, Any] = {}
    try:
        if family != "tokenizer" and testing.check(family, factory, only=["builds"]).failed:
            options["dim"] = dim
            if testing.check(family, factory, only=["builds"], **options).failed:
                return ()  # the run itself says why
        return testing.check(family, factory, only=PROPERTIES[family], **options).results
    except UserError:  # here too
        return ()

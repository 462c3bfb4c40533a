"""What is learned from the training rows before training: the tokenizer's vocabulary and the head's labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llmkit import registry
from llmkit.contracts import Head, Tokenizer
from llmkit.data import cache, identity
from llmkit.data.corpus import Reader
from llmkit.data.prepare import Column, texts
from llmkit.data.progress import Step
from llmkit.errors import Problem, UserError, blame, returned


def train_tokenizer(
    tokenizer: Tokenizer, factory: Callable[[], Tokenizer] | None, head: Head, reader: Reader, folder: Path
) -> None:
    """Train the tokenizer that ``factory`` built on the head's texts, or load it from the cache."""

    def write(path: Path) -> None:
        reader.check()
        with blame("data.tokenizer"), Step("training the tokenizer") as step:
            tokenizer.train(texts(lambda: step.counted(reader.read()), head))
        cache.write_text(path / "state.json", tokenizer.to_state())

    try:
        spec = registry.spec_of(factory)["init_args"] if factory else {}
    except UserError:  # not a class of the registry: the settings of the tokenizer have to identify it
        spec = {}
    used = [identity.of(tokenizer, folder, tokenizer, spec), identity.of(head, folder, dict(head.words))]
    path = cache.entry(folder, reader.cache_key(used, "tokenizer"), write)
    if not tokenizer.trained:
        tokenizer.from_state((path / "state.json").read_text(encoding="utf-8"))


def learn_head(head: Head, reader: Reader, folder: Path) -> None:
    """Let the head learn from the training rows, or restore from the cache what an equal head has learned."""
    learned = False

    def write(path: Path) -> None:
        nonlocal learned
        reader.check()
        place: list[str] = []
        try:
            with Step(f"reading {reader.source.key} for the head"):
                head.learn({name: Column(reader.read, name, place) for name in (*head.inputs, *head.targets)})
        except UserError as error:
            raise UserError(Problem(reader.source.key, ": ".join([*place, str(error)]))) from error
        try:
            text = json.dumps(head.info())
        except (TypeError, ValueError) as error:
            raise returned(head, "info", head.info(), f"plain data for JSON: {error}") from error
        cache.write_text(path / "info.json", text)
        learned = True

    path = cache.entry(folder, reader.cache_key([identity.of(head, folder)], "head"), write)
    if not learned:
        head.set_info(json.loads((path / "info.json").read_text(encoding="utf-8")))

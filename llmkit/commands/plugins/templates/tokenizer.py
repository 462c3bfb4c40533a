"""A tokenizer: text to ids and back; everything that it learned is in its state."""

from __future__ import annotations

import json
from collections.abc import Iterator

from llmkit import register
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError


@register("tokenizer", "template")
class Template(Tokenizer):
    """One token per character of the training text; any other character becomes the unknown token.

    Its behaviour may depend on the arguments and the state only: every checkpoint contains both.

    Args:
        min_count: how often a character must occur to get an id.
    """

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(6)  # characters get the ids from 6 on

    def __init__(self, min_count: int = 1) -> None:
        self.min_count = min_count
        self._set("")

    @property
    def vocab_size(self) -> int:
        """Number of ids, the six special ones included."""
        return 6 + len(self._characters)

    @property
    def trained(self) -> bool:
        """Whether it can encode."""
        return bool(self._characters)

    def train(self, texts: Iterator[str]) -> None:
        """Learn the characters of the texts. Raises UserError when there are none."""
        counts: dict[str, int] = {}
        for text in texts:
            for character in text:
                counts[character] = counts.get(character, 0) + 1
        self._set("".join(sorted(character for character, count in counts.items() if count >= self.min_count)))
        if not self.trained:
            raise UserError(f"no character occurs {self.min_count} times in the training text")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [[self._ids.get(character, self.unk_id) for character in text] for text in texts]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """Return the text of each list of ids; special ids are left out."""
        return ["".join(self._characters[i - 6] for i in row if i >= 6) for row in ids]

    def to_state(self) -> str:
        """Return the characters as JSON."""
        return json.dumps({"characters": self._characters})

    def from_state(self, state: str) -> None:
        """Restore what ``to_state`` returned. Raises UserError (a ValueError) for anything else."""
        try:
            characters = json.loads(state)["characters"]
        except (ValueError, KeyError, TypeError):
            characters = None
        if not isinstance(characters, str):
            raise UserError("not a state of the tokenizer 'template'")
        self._set(characters)

    def _set(self, characters: str) -> None:
        self._characters = characters
        self._ids = {character: number for number, character in enumerate(characters, 6)}

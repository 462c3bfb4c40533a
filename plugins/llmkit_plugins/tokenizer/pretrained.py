"""Tokenizers that others trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from llmkit.errors import UserError

from .base import ROLES, HuggingFace, byte_level, check_ids, hidden, line, parse, rust_errors

KNOWN = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
}
"""Names that special tokens have in published tokenizers, the preferred ones first."""


class Pretrained(HuggingFace):
    """A ready tokenizer: a tokenizer.json, a folder with one or with vocab.json and merges.txt, or a hub name.

    Source: the format of Hugging Face tokenizers; vocab.json and merges.txt are those of GPT-2. Special tokens are
    found by their usual names (``[CLS]``, ``<s>``, ``<|endoftext|>``, ...); the missing ones get ids after the last.
    It is read at first use, so that a checkpoint, which holds all of it, does without the path.

    Args:
        path: file, folder or hub name such as ``gpt2``.
    """

    lossless = False  # it depends on the file

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is not there yet: the special ids before the first use.
        if name.removesuffix("_id") in ROLES and name.endswith("_id") and self._hf is None:
            self._ready()
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def vocab_size(self) -> int:
        self._ready()
        return self._vocab_size

    @property
    def trained(self) -> bool:
        return True

    def train(self, texts: Iterator[str]) -> None:
        """Do nothing, not even read the texts: the vocabulary is given."""

    def to_state(self) -> str:
        model = json.loads(self._ready().to_str())
        ids = {role: getattr(self, f"{role}_id") for role in ROLES}
        return self._pack(model=model, vocab_size=self._vocab_size, special_ids=ids)

    def _ready(self) -> HFTokenizer:
        if self._hf is None:
            what = f"pretrained tokenizer '{self.path}'"
            hf = self._read()
            check_ids(hf, what)
            data = json.loads(hf.to_str())
            ids, size = _hide_specials(data)
            self._set(parse(data, what), ids, size)
        return super()._ready()

    def _read(self) -> HFTokenizer:
        path = Path(self.path).expanduser()
        what = f"pretrained tokenizer '{self.path}'"
        if path.is_dir():
            vocab, merges = path / "vocab.json", path / "merges.txt"
            if not (path / "tokenizer.json").is_file():
                if not (vocab.is_file() and merges.is_file()):
                    raise UserError(f"{what}: the folder has no tokenizer.json, and no vocab.json with merges.txt")
                with rust_errors(what):
                    return byte_level(models.BPE.from_file(str(vocab), str(merges)))
            path /= "tokenizer.json"
        if path.is_file():
            with rust_errors(f"{what} is not a tokenizer.json"):
                return HFTokenizer.from_file(str(path))
        if self.path.startswith((".", "/", "~")) or self.path.endswith(".json") or self.path.count("/") > 1:
            raise UserError(f"{what}: no such file or folder")
        try:
            return HFTokenizer.from_pretrained(self.path)
        except Exception as error:
            raise UserError(
                f"{what}: no such file or folder here, and its tokenizer.json could not be downloaded from the "
                f"Hugging Face hub ({line(error)})"
            ) from error

    def _restore(self, data: dict[str, Any]) -> HFTokenizer:
        hf = super()._restore(data)
        ids, size = data.get("special_ids"), data.get("vocab_size")
        needed = max(hf.get_vocab().values(), default=-1) + 1
        if (
            type(size) is not int
            or not needed <= size <= needed + len(ROLES)
            or not isinstance(ids, dict)
            or not all(type(ids.get(role)) is int and 0 <= ids[role] < size for role in ROLES)
        ):
            raise self._broken()
        self._set(hf, ids, size)
        return hf

    def _set(self, hf: HFTokenizer, ids: dict[str, int], size: int) -> None:
        self._hf, self._vocab_size = hf, size
        for role in ROLES:
            setattr(self, f"{role}_id", ids[role])


def _hide_specials(data: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Rename the special tokens of a ``tokenizer.json`` in place, so that no text equals them.

    Returns the id of each role, and the number of ids with those added for roles that the tokenizer lacks.
    """
    model, added = data["model"], data["added_tokens"]
    vocab: Any = model["vocab"]
    listed = isinstance(vocab, list)  # Unigram: pairs of a piece and its score
    merges: list[list[str]] = model.get("merges", [])
    ids: dict[str, int] = {entry[0]: i for i, entry in enumerate(vocab)} if listed else dict(vocab)
    ids |= {token["content"]: token["id"] for token in added}
    size = max(ids.values(), default=-1) + 1
    unknown = vocab[model["unk_id"]][0] if listed and model.get("unk_id") is not None else model.get("unk_token")

    # Without a flag (a bare vocab.json) the name decides, unless the model builds it from ordinary pieces.
    names = {unknown, *(name for known in KNOWN.values() for name in known)} - {"".join(pair) for pair in merges}
    names |= {token["content"] for token in added if token["special"]}
    specials = {name: ids[name] for name in names if name in ids}
    roles: dict[str, int] = {}
    for role in ROLES:
        known = (unknown, *KNOWN[role]) if role == "unk" else KNOWN[role]
        found = [specials[name] for name in known if name in specials]
        roles[role] = found[0] if found else size
        size += not found

    if listed:
        model["vocab"] = [[hidden(piece) if piece in specials else piece, score] for piece, score in vocab]
    else:
        model["vocab"] = {hidden(piece) if piece in specials else piece: i for piece, i in vocab.items()}
    if model.get("unk_token") in specials:
        model["unk_token"] = hidden(model["unk_token"])
    if merges:
        model["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & specials.keys()]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [token for token in added if token["content"] not in specials]
    added += [{"id": i, "content": hidden(name), **plain, "special": True} for name, i in specials.items()]
    data["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return roles, size

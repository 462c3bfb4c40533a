"""Tokenizers that others trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from llmkit.errors import UserError

from . import chat
from .base import ROLES, HuggingFace, byte_level, check_ids, hidden, line, parse, rust_errors
from .sentencepiece import source_tokenizer

KNOWN = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
}
"""Names that special tokens have in published tokenizers, the preferred ones first."""
MAX_AROUND = 64
"""Ids that may stand around a text."""


class Pretrained(HuggingFace):
    """A ready tokenizer: a tokenizer.json, a folder with one or with vocab.json and merges.txt, or a hub name.

    Source: the format of Hugging Face tokenizers; vocab.json and merges.txt are those of GPT-2, and source.spm
    with vocab.json those of Marian, which encode the source language and decode both. Special tokens are found by their
    usual names (``[CLS]``, ``<s>``, ``<|endoftext|>``, ...); the missing ones get ids after the last.
    It is read at first use, so that a checkpoint, which holds all of it, does without the path.

    Args:
        path: file, folder or hub name such as ``gpt2``.
        as_published: use it as its model was trained with it. What its post-processor puts around a text
            (``[CLS] x [SEP]``) is put there by heads that read whole texts; ``tokenizer_config.json`` next to it says
            which token has which role, if it is there; a role without a token shares the id of another one, since the
            model has no embedding for ids after the last.
    """

    lossless = False  # it depends on the file

    def __init__(self, path: str, as_published: bool = False) -> None:
        self.path, self.as_published = path, as_published
        self._template: str | None = None
        self._around: tuple[list[int], list[int], list[int]] = ([], [], [])

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
    def around(self) -> tuple[list[int], list[int], list[int]]:  # type: ignore[override]
        """What its post-processor puts around a text, if it is used as published."""
        self._ready()
        return self._around

    @property
    def chat_template(self) -> str | None:
        """The template of its conversations, in Jinja, if it is used as published and has one."""
        self._ready()
        return self._template

    def chat(self, messages: list[dict[str, str]], reply: bool = False) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation by its template, and which of them the assistant wrote.

        Args:
            messages: ``role`` and ``content`` of each.
            reply: whether the conversation ends where the assistant begins to write.

        Raises UserError when there is no template, or it refuses the messages.
        """
        template = self.chat_template
        if template is None:
            raise UserError("messages: this tokenizer has no chat template (a chat_template.jinja, say)")
        hf = self._ready()
        names = {f"{role}_token": hf.id_to_token(getattr(self, f"{role}_id")) or "" for role in ROLES}
        names = {role: name.removesuffix(hidden("")) for role, name in names.items()}
        return chat.encode(hf, template, messages, names, reply)

    @property
    def trained(self) -> bool:
        return True

    def train(self, texts: Iterator[str]) -> None:
        """Do nothing, not even read the texts: the vocabulary is given."""

    def to_state(self) -> str:
        model = json.loads(self._ready().to_str())
        ids = {role: getattr(self, f"{role}_id") for role in ROLES}
        around = {"around": self.around} if any(self.around) else {}
        chats = {} if self._template is None else {"chat_template": self._template}
        return self._pack(model=model, vocab_size=self._vocab_size, special_ids=ids, **around, **chats)

    def _ready(self) -> HFTokenizer:
        if self._hf is None:
            what = f"pretrained tokenizer '{self.path}'"
            hf = self._read()
            check_ids(hf, what)
            data = json.loads(hf.to_str())
            ids, size = _hide_specials(data, self._named() if self.as_published else {})
            if self.as_published:
                last = max(hf.get_vocab().values(), default=-1) + 1
                ids, size = shared(ids, last, what), last
                self._around = around(hf, what)
                self._template = self._conversations()
            self._set(parse(data, what), ids, size)
        return super()._ready()

    def _file(self, name: str) -> Path | None:
        """Return a file next to the tokenizer.json; None: there is none."""
        path = Path(self.path).expanduser()
        file = (path if path.is_dir() else path.parent) / name
        if not path.exists():
            try:
                file = Path(hf_hub_download(self.path, name))
            except Exception:  # it is optional, and tokenizer.json was there
                return None
        return file if file.is_file() else None

    def _config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json; {}: there is none. Raises UserError."""
        file = self._file("tokenizer_config.json")
        try:
            config = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not a mapping in JSON: {line(error)}") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} is not a mapping in JSON")
        return config

    def _conversations(self) -> str | None:
        """Return the chat template: chat_template.jinja, or the default one in tokenizer_config.json."""
        file = self._file("chat_template.jinja")
        template: Any = self._config().get("chat_template") if file is None else file.read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if template is not None and (not isinstance(template, str) or len(template) > chat.LONGEST):
            raise UserError(f"pretrained tokenizer '{self.path}': its chat_template should be text")
        return template

    def _named(self) -> dict[str, str]:
        """Return the token of each role, as far as a tokenizer_config.json next to the tokenizer.json says."""
        config = self._config()
        if not config:
            return {}
        tokens = {key: config.get(f"{key}_token") for key in (*ROLES, "cls")}
        texts = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
        named = {key: text for key, text in texts.items() if isinstance(text, str)}
        other = {"bos": "cls", "eos": "sep", "sep": "eos"}
        return {role: named.get(role) or named.get(other.get(role, ""), "") for role in ROLES}

    def _read(self) -> HFTokenizer:
        path = Path(self.path).expanduser()
        what = f"pretrained tokenizer '{self.path}'"
        if path.is_dir():
            vocab, merges = path / "vocab.json", path / "merges.txt"
            if not (path / "tokenizer.json").is_file():
                if vocab.is_file() and (path / "source.spm").is_file():
                    return source_tokenizer(path, what)
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
        around = data.get("around", ([], [], []))
        if (
            not (
                isinstance(around, list | tuple) and len(around) == 3 and all(isinstance(part, list) for part in around)
            )
            or sum(map(len, around)) > MAX_AROUND
            or not all(type(number) is int and 0 <= number < size for part in around for number in part)
        ):
            raise self._broken()
        template = data.get("chat_template")
        if template is not None and (not isinstance(template, str) or len(template) > chat.LONGEST):
            raise self._broken()
        self._around, self._template = (around[0], around[1], around[2]), template
        self._set(hf, ids, size)
        return hf

    def _set(self, hf: HFTokenizer, ids: dict[str, int], size: int) -> None:
        self._hf, self._vocab_size = hf, size
        for role in ROLES:
            setattr(self, f"{role}_id", ids[role])


def around(hf: HFTokenizer, what: str) -> tuple[list[int], list[int], list[int]]:
    """Return the ids that a post-processor puts before a text, between the two of a pair, and at the end.

    Nothing stands between the two where it treats a pair in another way than a text. Raises UserError for one that does
    more than put ids around a text.
    """
    hf.no_padding()
    hf.no_truncation()
    a, b = (hf.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    one, two = hf.encode("a").ids, hf.encode("a", "b").ids
    start = next((place for place in range(len(one)) if one[place : place + len(a)] == a), len(one))
    before, after = one[:start], one[start + len(a) :]
    if [*before, *a, *after] != one:
        raise UserError(f"{what}: what its post-processor does with a text is not supported")
    between = two[start + len(a) : len(two) - len(b) - len(after)]
    return before, between if [*before, *a, *between, *b, *after] == two else [], after


def shared(ids: dict[str, int], size: int, what: str) -> dict[str, int]:
    """Return the id of each role below ``size``: a role without a token shares that of another one."""
    found = {role: number for role, number in ids.items() if number < size}
    instead = next((found[role] for role in ("eos", "bos", "sep", "pad", "unk") if role in found), None)
    if instead is None:
        raise UserError(f"{what}: it has no special token")
    return {role: found.get(role, instead) for role in ROLES}


def _hide_specials(data: dict[str, Any], named: dict[str, str]) -> tuple[dict[str, int], int]:
    """Rename the special tokens of a ``tokenizer.json`` in place, so that no text equals them.

    Args:
        data: the parsed file.
        named: the token of a role, where it is known for certain.

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
    names |= {token["content"] for token in added if token["special"]} | set(named.values())
    specials = {name: ids[name] for name in names if name in ids}
    roles: dict[str, int] = {}
    for role in ROLES:
        known = (named.get(role), *((unknown, *KNOWN[role]) if role == "unk" else KNOWN[role]))
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

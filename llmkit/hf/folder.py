"""The files of a published model, as data: config.json, weights, tokenizer. Nothing in a folder is ever run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from llmkit.checkpoint import archive
from llmkit.errors import UserError

PREFIX = "hf:"
"""What a name of a published model begins with, where a checkpoint could be meant."""
MOST_LAYERS = 4096
LARGEST = 2**31
"""Of numbers in a config.json."""


@dataclass(frozen=True)
class Source:
    """A published model: ``hf:NAME_OR_FOLDER[@REVISION]``."""

    text: str
    """As the user wrote it."""
    name: str
    """A folder, or a name on the hub."""
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> Source:
        """Return what a text means. A folder that exists is one, whatever its name."""
        name = text.removeprefix(PREFIX)
        if Path(name).expanduser().is_dir():
            return cls(text, str(Path(name).expanduser()))
        name, _, revision = name.partition("@")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
            raise UserError(f"{text}: there is no such folder, and it is not a name on the Hugging Face hub")
        return cls(text, name, revision or None)

    def file(self, name: str) -> Path | None:
        """Return a file of it, downloaded if it is on the hub; None: there is none. Raises UserError."""
        if Path(self.name).is_dir():
            path = Path(self.name, name)
            if path.is_file() and not _stays(path):
                raise UserError(f"{self.text}: {name} is a link that leads out of the folder")
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except Exception as error:  # a dozen kinds: no network, no such model, no permission
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            cause = " ".join(str(error).split())[:200]
            text = f"there is no such folder here, and it could not be downloaded from the Hugging Face hub ({cause})"
            raise UserError(f"{self.text}: {text}") from error

    def text_of(self, name: str) -> str | None:
        """Return the text of a file; None: there is no such file. Raises UserError for one that is not UTF-8."""
        path = self.file(name)
        try:
            return None if path is None else path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.text}: {name} is not UTF-8") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the mapping in a JSON file; None: there is no such file. Raises UserError for anything else."""
        text = self.text_of(name)
        if text is None:
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.text}: {name} is not JSON") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.text}: {name} should be a mapping")
        return content

    def config(self) -> Config:
        """Return its config.json. Raises UserError when there is none, or it asks for code or quantised weights."""
        content = self.json("config.json")
        if content is None:
            raise UserError(f"{self.text}: it has no config.json")
        if content.get("auto_map") and content.get("model_type") != "llmkit":  # whose code is installed here
            raise UserError(f"{self.text}: its config.json names code of its own (auto_map), which llmkit does not run")
        if content.get("quantization_config"):
            raise UserError(f"{self.text}: its weights are quantised, which is not supported")
        return Config(self.text, content)

    def weights(self) -> dict[str, Tensor]:
        """Return its weights by their names, as they are stored.

        Raises UserError when there are none, a file is damaged or holds more than tensors, or the index names a file
        outside of the folder.
        """
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.json(f"{name}.index.json")
            files = [name] if index is None else self._parts(index, f"{name}.index.json")
            paths = [self.file(file) for file in files]
            if index is None and paths == [None]:
                continue
            if missing := [file for file, path in zip(files, paths, strict=True) if path is None]:
                raise UserError(f"{self.text}: {name}.index.json names {missing[0]}, which is not there")
            weights: dict[str, Tensor] = {}
            for path in filter(None, paths):
                part = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
                if twice := weights.keys() & part.keys():
                    raise UserError(f"{self.text}: {min(twice)} is in two of its files")
                weights |= part
            return weights
        raise UserError(f"{self.text}: it has neither model.safetensors nor pytorch_model.bin")

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of a safetensors file; None: there is none. Raises UserError when it is damaged."""
        path = self.file(name)
        return None if path is None else _safetensors(path)

    def _parts(self, index: Mapping[str, Any], name: str) -> list[str]:
        names = index.get("weight_map")
        files = list(dict.fromkeys(names.values())) if isinstance(names, dict) else []
        for file in files:
            if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", file):
                raise UserError(f"{self.text}: {name} names {str(file)[:100]!r}, which is not a file of the folder")
        if not files:
            raise UserError(f"{self.text}: {name} names no files")
        return files


def _stays(path: Path) -> bool:
    """Return whether a file is in its folder; a snapshot in the hub's cache is a folder of links to the blobs there."""
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return target.is_relative_to(folder) or target.is_relative_to(blobs)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError("reading models of Hugging Face needs safetensors: pip install 'llmkit[hf]'") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    content = archive.read(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds more than tensors by name")
    return {str(name): value for name, value in content.items()}


class Config:
    """A config.json, whose values are checked when they are asked for."""

    def __init__(self, source: str, content: Mapping[str, Any]) -> None:
        self.source, self.content = source, content

    @property
    def model_type(self) -> str:
        """The name of the architecture."""
        return str(self.content.get("model_type"))

    @property
    def where(self) -> str:
        """The place of its values."""
        return f"{self.source} config.json"

    def get(self, *names: str) -> Any:
        """Return the first value that is set, or None."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), None)

    def size(self, name: str, default: int | None = None) -> int:
        """Return a whole number above zero. Raises UserError for anything else."""
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= LARGEST:
            raise UserError(f"{self.where}: {name} should be a whole number from 1 to {LARGEST}, got {value!r:.60}")
        return value

    def layers(self, name: str) -> int:
        """Return a number of layers. Raises UserError for anything else; each has weights that are listed by name."""
        number = self.size(name)
        if number > MOST_LAYERS:
            raise UserError(f"{self.where}: {name} is {number}, and the most is {MOST_LAYERS}")
        return number

    def number(self, name: str, default: float) -> float:
        """Return a number above zero. Raises UserError for anything else."""
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
            raise UserError(f"{self.where}: {name} should be a number above 0, got {value!r:.60}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value. Raises UserError for anything else."""
        value = self.content.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} should be true or false, got {value!r:.60}")
        return value

    def refuse(self, text: str) -> UserError:
        """Return an error that says why this model cannot be taken."""
        return UserError(f"{self.source}: {self.model_type} {text}")

    def labels(self) -> Iterator[str]:
        """Yield the names of its labels in order. Raises UserError when they are not numbered from 0 on."""
        names = self.content.get("id2label")
        if isinstance(names, dict):
            if names.keys() != {str(number) for number in range(len(names))}:
                raise UserError(f"{self.where}: id2label should be names by number, from 0 on")
            yield from (str(names[str(number)]) for number in range(len(names)))

"""Checkpoint files as data: read without running anything, and refused when they claim more than they hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import UserError

DEEPEST = 60
"""Levels of nesting; a config has about ten."""
MOST = 500_000
"""Values in one file. Tensors are one each; a vocabulary is one text."""
LONGEST = 2**28
"""Characters of all texts together, counted as often as they are referred to."""


def file_of(path: str | Path, *names: str) -> Path:
    """Return the checkpoint that a path means: itself, or the first of ``names`` in a run folder.

    The folder of an experiment means its newest run that has one. Raises UserError for a folder without any.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    runs = [(int(match[1]), run) for run in folder.iterdir() if (match := re.fullmatch(r"version_(\d+)", run.name))]
    for place in (folder, folder / "checkpoints", *(run / "checkpoints" for _, run in sorted(runs, reverse=True))):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise UserError(f"{path} is a folder without a checkpoint: it has no {' or '.join(names)}")


def read(file: Path) -> Any:
    """Return what ``torch.save`` wrote to a file, loaded with ``weights_only=True``.

    Raises:
        UserError: a file that is missing, truncated, damaged (a checksum is wrong) or not a checkpoint, that holds more
            than plain data, or claims sizes that it does not have.
    """
    if not file.is_file():
        raise UserError(f"checkpoint {file} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        _check_members(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
        check(content)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {file} cannot be read: it is damaged, or holds more than plain data") from error
    except Exception as error:  # torch and zipfile raise a dozen kinds for damaged files
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {file} cannot be read: {cause[:160]}") from error
    return content


def _check_members(file: Path) -> None:
    """Raise ValueError for a file that is not whole, or would be larger in memory than it is on the disk."""
    if not zipfile.is_zipfile(file):
        raise ValueError("it is truncated or not a checkpoint")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        stored = all(m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members)
        names = {member.filename for member in members}
        if not stored or len(names) < len(members) or sum(m.file_size for m in members) > file.stat().st_size:
            raise ValueError("it claims to hold more than it does")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"it is damaged (the checksum of {damaged.rpartition('/')[2]} is wrong)")


def check(content: Any, strict: bool = False) -> None:
    """Raise ValueError unless a tree of values can be walked through, and its tensors are what they seem.

    Values that are referred to many times, a few bytes in a file, are counted each time.

    Args:
        content: dicts, lists and tuples of anything.
        strict: whether only plain values and tensors may be in them, and only text as keys.
    """
    values, characters = 0, 0
    stack: list[tuple[Any, int]] = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        items: list[Any] = []
        if isinstance(value, Mapping):
            items = [*value.keys(), *value.values()]
            if strict and not all(type(key) is str for key in value):
                raise ValueError("it has keys that are no text")
        elif isinstance(value, list | tuple | set):
            items = list(value)
        elif isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Tensor):
            _check_tensor(value)
        elif type(value) is int:
            if value.bit_length() > 64:
                raise ValueError("it holds a number that is too large")
        elif strict and not isinstance(value, bool | float | torch.dtype | torch.device | None):
            raise ValueError(f"it holds {type(value).__name__} where plain data belongs")
        values += len(items)
        if values > MOST or characters > LONGEST:
            raise ValueError("it holds more values than any checkpoint")
        if items and depth == DEEPEST:
            raise ValueError("it is nested too deeply")
        stack += [(item, depth + 1) for item in items]


def _check_tensor(tensor: Tensor) -> None:
    """Refuse anything but a plain tensor in memory that stores all the numbers it claims to have."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.__dict__ and tensor.device.type == "cpu"
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError("it holds a tensor of another kind than plain numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} claims more numbers than are stored")

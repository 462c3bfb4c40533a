"""Which checkpoint is meant by a path, by ``last`` or by ``best``."""

from __future__ import annotations

from pathlib import Path

from llmkit.checkpoint.archive import file_of
from llmkit.checkpoint.content import Stored, read
from llmkit.errors import UserError, note


def choose(wanted: str, folder: Path, command: str) -> Stored | None:
    """Return the checkpoint that is meant, read; None for ``last`` where there is none below ``folder`` yet.

    ``last`` is the newest checkpoint of the newest run, ``best`` the newest best one. One that cannot be read is
    skipped, with a note. A run folder means its last checkpoint to ``fit``, else its best one.

    Raises UserError when none can be read, or another command than ``fit`` has none.
    """
    if wanted not in ("best", "last"):
        names = ("best.ckpt", "last.ckpt")
        path = file_of(wanted, *(reversed(names) if command == "fit" else names))
        return Stored(path, read(path))
    found = sorted(
        folder.glob(f"version_*/checkpoints/{'best.ckpt' if wanted == 'best' else '*.ckpt'}"),
        key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"),
        reverse=True,
    )
    damaged: list[str] = []
    for path in found:
        try:
            stored = Stored(path, read(path))
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            what = (
                f"The last good one is used instead: {path}, of step {stored.content.get('global_step', '(unknown)')}"
            )
            note(f"--ckpt_path {wanted}: {'; '.join(damaged)}. {what}")
        return stored
    if damaged:
        raise UserError(f"--ckpt_path {wanted}: no checkpoint below {folder} can be read; the newest: {damaged[0]}")
    text = f"--ckpt_path {wanted}: no run below {folder} has a checkpoint"
    if wanted == "best" or command != "fit":
        raise UserError(f"{text}{' called best.ckpt' if wanted == 'best' else ''}")
    note(f"{text} yet: training begins at the start")
    return None

"""``llmkit config diff``: what differs between the configs of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.check import settled
from llmkit.checkpoint.content import read
from llmkit.commands import Parser
from llmkit.commands.config.tree import Tree, flat, inline, shortened
from llmkit.config.files import read_yaml
from llmkit.config.plan import plan
from llmkit.errors import UserError
from llmkit.run import record

OUTPUT_ONLY = ("ckpt_path", "weights_only", "config")
"""Keys that say how a run was started, not what it is."""
MADE = ("versions", "provenance")
"""Keys that say what made a run, and nothing about how to make one."""
ABSENT = "(none)"


def run(command: str, argv: list[str]) -> int:
    """Print what differs, a line for each key; returns the exit code, which is 0 in both cases."""
    parser = Parser(command, "Print how the configs of two runs differ, one line per key.")
    for name in ("RUN_A", "RUN_B"):
        parser.add_argument(name, help="a run folder, a checkpoint, or a config as for fit")
    parser.add_argument("--json", action="store_true", help="print JSON instead: for each key the two values")
    options = parser.parse(argv)
    a, b = (load(Path(name)) for name in (options.RUN_A, options.RUN_B))
    found = differences(a, b)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join(table(found)) or "no difference")
    return 0


def load(path: Path) -> Tree:
    """Return the config of a run folder or a checkpoint, each with what made it, or of a config file.

    Raises UserError when it is none of them or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".ckpt":
        part = read(path)["llmkit"]
        # A model trained from Python has no config, but every checkpoint describes its model and tokenizer.
        tree = part["config"] or {"model": part["model"], "data": {"tokenizer": part["tokenizer"]}}
        return {**tree, "versions": part.get("versions", {}), "provenance": {"sources": part.get("sources", {})}}
    if not path.is_dir():
        return plan("fit", [f"--config={path}"], "config diff").config.tree
    saved = path / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{path} is not a run folder: it has no config.yaml. Run folders are OUTPUT/NAME/version_N.")
    written: Tree = settled(read_yaml(saved).tree)
    made = record.read(path / record.PROVENANCE)
    return {**written, "provenance": {key: value for key, value in made.items() if key not in record.OF_THE_TRY}}


def differences(a: Tree, b: Tree) -> dict[str, dict[str, Any]]:
    """Return the keys that differ, in the order of a config, each with its values in ``a`` and in ``b``.

    A key that one of them lacks is as good as null; of what made them, versions and provenance, it is left out.
    """
    old, new = (flat(shortened(tree)) for tree in (a, b))
    for one, other in ((old, new), (new, old)):
        for key in [key for key in one if key.partition(".")[0] in MADE and key not in other]:
            del one[key]
    both = dict.fromkeys([*old, *new])
    parts = [key.split(".")[:2] for key in both]  # arguments of one plugin stay together
    keys = sorted(both, key=lambda key: parts.index(key.split(".")[:2]))
    return {
        key: {side: values[key] for side, values in (("a", old), ("b", new)) if key in values}
        for key in keys
        if key.partition(".")[0] not in OUTPUT_ONLY and old.get(key) != new.get(key)
    }


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for each difference, in columns."""
    cells = [
        (key, *(inline(pair[side]) if side in pair else ABSENT for side in ("a", "b"))) for key, pair in found.items()
    ]
    wide, old = (max((len(row[i]) for row in cells), default=0) for i in (0, 1))
    return [f"{key:<{wide}}  {before:<{min(old, 40)}} -> {after}" for key, before, after in cells]

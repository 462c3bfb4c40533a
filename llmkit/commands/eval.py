"""``llmkit eval``: judge a language model by minimal pairs."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, at_least, columns, imported
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.model.pairs import Accuracy


def run(command: str, argv: list[str]) -> int:
    """Print the accuracies; returns the exit code."""
    parser = Parser(command, "Judge a language model by pairs of sentences of which one is right (BLiMP).")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("--pairs", metavar="FILE", action="append", required=True, help="JSON lines; a pattern; may be repeated")
    add("--limit", type=at_least(1), metavar="N", help="the first N pairs of each file")
    add("--output", metavar="FOLDER", help="write pairs.json and pairs.png there")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--batch_size", type=at_least(1), default=64, metavar="N", help="sentences per batch; default: 64")
    parser.add_imports()
    args = parser.parse(argv)
    files = [Path(file) for pattern in args.pairs for file in sorted(glob.glob(pattern)) or [pattern]]
    from llmkit.model.language_model import load
    from llmkit.model.pairs import accuracies, judge, read_pairs
    from llmkit.run.figures import accuracy_bars

    pairs = [pair for file in files for pair in list(read_pairs(file))[: args.limit]]
    if not pairs:
        raise UserError(f"eval: there are no pairs in {', '.join(map(str, files))}")
    with imported(args.imports):
        right = judge(load(args.checkpoint, args.device), pairs, args.batch_size)
    by = {name: accuracies(pairs, right, name) for name in ("term", "uid")}
    mean = sum(one.share for one in by["uid"]) / len(by["uid"])
    facts = {"mean": mean, "pairs": len(pairs), **{name: _facts(found) for name, found in by.items()}}
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pairs.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        bars = [(one.name, one.share, one.interval) for one in by["term"]]
        accuracy_bars(bars, folder / "pairs.png")
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, title in {"uid": "paradigm", "term": "phenomenon"}.items():
        rows = [[title, "accuracy", "95 % interval", "pairs"], *map(_row, by[name])]
        print("\n".join(columns(rows)), end="\n\n")
    print(f"mean over paradigms: {mean:.3f}")
    return 0


def _row(one: Accuracy) -> list[str]:
    low, high = one.interval
    return [one.name, f"{one.share:.3f}", f"{low:.3f} to {high:.3f}", f"{one.pairs:,}"]


def _facts(found: list[Accuracy]) -> dict[str, Any]:
    return {
        one.name: {"accuracy": one.share, "interval": list(one.interval), "right": one.right, "pairs": one.pairs}
        for one in found
    }

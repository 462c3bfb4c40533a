"""``llmkit explain probe CHECKPOINT --data FILE --label COLUMN``: what a linear classifier reads off each layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from llmkit.commands import Parser, at_least, columns, imported
from llmkit.commands.inputs import device_of
from llmkit.data.opening import Format, Options
from llmkit.data.rows import Bad
from llmkit.data.sources import local
from llmkit.errors import UserError

DESCRIPTION = (
    "Fit a linear classifier to the states of each layer, and to a control task: random labels by word (Hewitt and "
    "Liang 2019). Labels of texts are read off mean states; a list of labels belongs to a list of words."
)


def run(command: str, argv: list[str]) -> int:
    """Print the accuracies; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("--data", metavar="FILE", required=True, help="rows: CSV, JSON lines, Parquet, or lines with --pattern")
    add("--label", metavar="COLUMN", required=True, help="the column of the labels")
    add("--text", metavar="COLUMN", default="text", help="the column of the texts, or of lists of words; default: text")
    add("--format", choices=get_args(Format), default="auto", help="of the file; default: by its name")
    add("--pattern", metavar="REGEX", help="named groups that a line is cut into, as data.pattern")
    add("--encoding", default="utf-8", help="of the file; default: utf-8")
    add("--limit", type=at_least(2), default=2000, metavar="N", help="the first N rows; default: 2000")
    add("--seed", type=int, default=0, metavar="N", help="of the split and of the control labels; default: 0")
    add("--output", metavar="FOLDER", help="write probe.json and probe.png there")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--batch_size", type=at_least(1), default=32, metavar="N", help="texts per batch; default: 32")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.analysis.explain import figures
    from llmkit.analysis.explain.probing import items_of, probe
    from llmkit.model.language_model import load

    options = Options(format=args.format, pattern=args.pattern, encoding=args.encoding)
    rows = _rows(command, args.data, options, args.limit)
    with imported(args.imports):
        model = load(args.checkpoint, device_of(command, args.device))
        items = items_of(model, rows, args.text, args.label, args.batch_size)
    found, most = probe(items, args.seed)
    facts = {
        "items": len(items.labels),
        "rows": len(rows),
        "labels": len(set(items.labels)),
        "most_frequent": most,
        "layers": [
            {
                "layer": one.layer,
                "accuracy": one.accuracy,
                "interval": list(one.interval),
                "control": one.control,
                "selectivity": one.selectivity,
            }
            for one in found
        ],
    }
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        figures.probes(found, most, folder / "probe.png")
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    table = [["layers passed", "accuracy", "95 % interval", "control", "selectivity"]]
    for one in found:
        low, high = one.interval
        cells = [f"{one.accuracy:.3f}", f"{low:.3f} to {high:.3f}", f"{one.control:.3f}", f"{one.selectivity:+.3f}"]
        table.append([str(one.layer), *cells])
    print("\n".join(columns(table)))
    print(f"most frequent label: {most:.3f}; {len(items.labels):,} labels of {len(set(items.labels))} kinds")
    return 0


def _rows(command: str, file: str, options: Options, limit: int) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for row in local("--data", file, options).read():
        if isinstance(row, Bad):
            raise UserError(f"{command}: {row.message(row.file)}")
        rows.append(row.data)
        if len(rows) == limit:
            break
    return rows

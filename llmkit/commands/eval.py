"""``llmkit eval``: judge a language model by minimal pairs, or by tasks of lm-evaluation-harness."""

from __future__ import annotations

import glob
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, at_least, columns, imported
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.model.language_model import LanguageModel
    from llmkit.model.pairs import Accuracy, Pair


def run(command: str, argv: list[str]) -> int:
    """Print the figures; returns the exit code."""
    parser = Parser(command, "Judge a language model by pairs of sentences (BLiMP), or tasks of lm-evaluation-harness.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("--pairs", metavar="FILE", action="append", default=[], help="JSON lines; a pattern; may be repeated")
    text = "tasks of lm-evaluation-harness by name, or YAML files of tasks"
    add("--tasks", metavar="NAME_OR_YAML", nargs="+", action="extend", default=[], help=text)
    add("--limit", type=at_least(1), metavar="N", help="the first N pairs of each file, or documents of each task")
    add("--output", metavar="FOLDER", help="write pairs.json and pairs.png, or tasks.json, there")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--batch_size", type=at_least(1), default=64, metavar="N", help="texts per batch; default: 64")
    parser.add_imports()
    args = parser.parse(argv)
    if not args.pairs and not args.tasks:
        raise UserError("eval: nothing to judge by: give --pairs FILE or --tasks NAME_OR_YAML")
    if args.tasks and find_spec("lm_eval") is None:
        raise UserError("eval: --tasks needs lm-evaluation-harness: pip install 'llmkit[eval]'")
    files = [Path(file) for pattern in args.pairs for file in sorted(glob.glob(pattern)) or [pattern]]
    from llmkit.model.language_model import load
    from llmkit.model.pairs import judge, read_pairs

    pairs = [pair for file in files for pair in list(read_pairs(file))[: args.limit]]
    if files and not pairs:
        raise UserError(f"eval: there are no pairs in {', '.join(map(str, files))}")
    folder = None if args.output is None else Path(args.output)
    facts: dict[str, Any] = {}
    tables: list[str] = []
    with imported(args.imports):
        model = load(args.checkpoint, args.device)
        if pairs:
            facts, found = _pairs(pairs, judge(model, pairs, args.batch_size), folder)
            tables += found
        if args.tasks:
            judged, found = _tasks(model, args.tasks, args.limit, args.batch_size, folder)
            facts, tables = {**facts, "tasks": judged}, [*tables, *found]
    print(json.dumps(facts, indent=2) if args.json else "\n\n".join(tables))
    return 0


def _write(folder: Path | None, name: str, facts: dict[str, Any]) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _pairs(pairs: list[Pair], right: list[bool], folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Write what was found about pairs into the folder; return it as facts and as tables."""
    from llmkit.model.pairs import accuracies
    from llmkit.run.figures import accuracy_bars

    by = {name: accuracies(pairs, right, name) for name in ("term", "uid")}
    mean = sum(one.share for one in by["uid"]) / len(by["uid"])
    facts = {"mean": mean, "pairs": len(pairs), **{name: _facts(found) for name, found in by.items()}}
    _write(folder, "pairs.json", facts)
    if folder is not None:
        accuracy_bars([(one.name, one.share, one.interval) for one in by["term"]], folder / "pairs.png")
    tables = []
    for name, title in {"uid": "paradigm", "term": "phenomenon"}.items():
        rows = [[title, "accuracy", "95 % interval", "pairs"], *map(_row, by[name])]
        tables.append("\n".join(columns(rows)))
    return facts, [*tables, f"mean over paradigms: {mean:.3f}"]


def _tasks(
    model: LanguageModel, names: list[str], limit: int | None, batch_size: int, folder: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Run tasks and write what was found into the folder; return it as facts and as a table."""
    from llmkit.interop.lm_eval import run_tasks

    facts = run_tasks(model, names, limit, batch_size)
    _write(folder, "tasks.json", facts)
    rows = [["task", "metric", "value", "standard error", "better", "documents"]]
    for task, metrics in facts["results"].items():
        for metric, value in metrics.items():
            if "_stderr" not in metric and isinstance(value, float):
                name, _, chosen = metric.partition(",")
                error = metrics.get(f"{name}_stderr,{chosen}")
                better = {True: "higher", False: "lower"}.get(facts["higher_is_better"].get(task, {}).get(name), "")
                documents = facts["n-samples"].get(task, {}).get("effective", "")
                rows.append(
                    [
                        task,
                        name if chosen == "none" else metric,
                        f"{value:.4f}",
                        f"{error:.4f}" if isinstance(error, float) else "",
                        better,
                        str(documents),
                    ]
                )
    return facts, ["\n".join(columns(rows))]


def _row(one: Accuracy) -> list[str]:
    low, high = one.interval
    return [one.name, f"{one.share:.3f}", f"{low:.3f} to {high:.3f}", f"{one.pairs:,}"]


def _facts(found: list[Accuracy]) -> dict[str, Any]:
    return {
        one.name: {"accuracy": one.share, "interval": list(one.interval), "right": one.right, "pairs": one.pairs}
        for one in found
    }

"""``llmkit runs``: the runs in a folder with their figures. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmkit import registry
from llmkit.commands import Parser, columns
from llmkit.errors import UserError, nearest
from llmkit.run import record

COLUMNS = ("run", "head", "attention", "parameters", "step", "result", "tokens", "time", "date", "commit")
"""What is shown without ``--columns``."""
KEYS = ("folder", "name", "version", "command", "status", "metric")
"""What else each run has."""
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    **{"!=": operator.ne, "<=": operator.le, ">=": operator.ge},
    **{"=": operator.eq, "<": operator.lt, ">": operator.gt},
}
EPILOG = """\
A KEY is a column (run, name, version, command, status, head, attention, parameters, step, metric, result, tokens, time,
date, commit), a figure of results.json (val_loss), a key of the config (model.dim) or of provenance.json
(packages.torch, machine.gpu, git.branch, seed). The runs of a study, in its folder
cells, are listed if FOLDER is that of the study.
"""

Row = dict[str, Any]
"""A run: the value of each key, for what is printed and compared."""


def run(command: str, argv: list[str]) -> int:
    """List the runs, or open the folder of one; returns the exit code."""
    parser = Parser(command, "List the runs in a folder with their figures, the newest first.")
    parser.epilog = EPILOG
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", default="runs", help="where run folders are; default: runs")
    add("--sort", metavar="KEY", help="order by a key, the smallest first")
    add("--reverse", action="store_true", help="the other way round")
    add("--where", metavar="COMPARISON", action="append", default=[], help="keep runs with KEY=VALUE, !=, <, <=, >, >=")
    add("--columns", metavar="KEY", action="append", help="show these keys, with commas between them")
    add("--json", action="store_true", help="print a JSON list instead")
    add("--open", metavar="RUN", help="open the folder of a run, by its number in the list or its name; print its path")
    options = parser.parse(argv)
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"runs: {folder} is not a folder. Runs are written to 'output' of the config, runs by default")
    rows = [_row(path, folder) for path in found(folder)]
    tests = [_test(text) for text in options.where]
    shown = [key for text in options.columns or () for key in text.split(",") if key] or list(COLUMNS)
    for key in [*filter(None, [options.sort]), *(key for key, _ in tests), *shown]:
        _check(key, rows)
    kept = [row for row in rows if all(test(_value(row, key)) for key, test in tests)]
    kept = _sorted(kept, options.sort or "date", options.reverse != (options.sort is None))
    if options.open is not None:
        return _open(_chosen(options.open, kept))
    if options.json:
        keys = shown if options.columns else None
        print(
            json.dumps([{key: _value(row, key) for key in keys or row} for row in kept], indent=2, ensure_ascii=False)
        )
    elif kept:
        head = ["", *shown]
        body = [[str(number), *(_text(row, key) for key in shown)] for number, row in enumerate(kept, 1)]
        print("\n".join(columns([head, *body])))
    else:
        print(f"none of the {len(rows)} runs in {folder} is like that" if rows else f"no runs in {folder}")
    return 0


def found(folder: Path) -> Iterator[Path]:
    """Yield the run folders below a folder, and the folder itself if it is one."""
    if re.fullmatch(r"version_\d+", folder.name) and _is_run(folder):
        yield folder
        return
    left = [folder]
    while left:
        above = left.pop()
        try:
            inside = [Path(item.path) for item in os.scandir(above) if item.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        for path in inside:
            if re.fullmatch(r"version_\d+", path.name) and _is_run(path):
                yield path
            elif path.name != "cells" or above == folder:
                left.append(path)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", record.RESULTS, record.PROVENANCE))


def _row(path: Path, folder: Path) -> Row:
    """Return a run by the keys that need only the records in its folder."""
    made, results = record.read(path / record.PROVENANCE), record.read(path / record.RESULTS)
    figures = {name: value for name, value in results.items() if name != "provenance"}
    made = {**results.get("provenance", {}), **made}
    place = path.relative_to(folder)
    started = made.get("started") or _changed(path)
    git = made.get("git") or {}
    row: Row = {
        "folder": str(path),
        "run": str(place) if place.parts else path.name,
        "name": str(place.parent) if len(place.parts) > 1 else path.absolute().parent.name,
        "version": int(path.name.rpartition("_")[2]),
        "status": made.get("status", "finished" if results else "unfinished"),
        "time": made.get("seconds"),
        "date": started,
        "commit": git.get("commit") and git["commit"][:9] + ("+" if git.get("dirty") else ""),
        **{key: made.get(key) for key in ("command", "head", "attention", "parameters", "step", "tokens")},
    }
    if not made:  # written by an older llmkit
        row["command"] = "fit" if (path / "config.yaml").is_file() else None
    metric: Any = made.get("metric") if made.get("command", "fit") == "fit" else None
    scores = [name for name in figures if name.startswith(("val_", "test_"))]
    name = next((name for name in (metric, "val_loss", *scores) if name in figures), metric)
    row |= {"metric": name, "result": figures.get(name, _best_so_far(path, made))}
    return {**made, **row, **{name: value for name, value in figures.items() if name not in row}}


def _changed(path: Path) -> str:
    """Return when a run of an older llmkit began, as far as the times of its files say."""
    file = path / "config.yaml"
    seconds = (file if file.exists() else path).stat().st_mtime
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _best_so_far(path: Path, made: dict[str, Any]) -> float | None:
    """Return the best value that a run without results has logged; None: none yet."""
    values = []
    try:
        with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
            values = [float(text) for line in csv.DictReader(file) if (text := line.get(made.get("metric", "")))]
    except (OSError, ValueError, csv.Error):
        return None
    return (min if made.get("better") == "min" else max)(filter(math.isfinite, values), default=None)


def _value(row: Row, key: str) -> Any:
    """Return the value of a key; None: the run has none."""
    value = _at(row, key)
    if value is not None or (key in COLUMNS and key not in ("head", "attention")):
        return value
    return _at(_config(row["folder"]), key if "." in key else f"model.{key}")


def _at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key; that of a plugin is its name, and its arguments are below it."""
    for word in key.split("."):
        if isinstance(tree, dict) and word not in tree:
            tree = tree.get("init_args")
        tree = tree.get(word) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and isinstance(tree.get("class_path"), str):
        return _names().get(tree["class_path"], tree["class_path"].rpartition(".")[2])
    return tree


@functools.cache
def _names() -> dict[str, str]:
    """Return the short name of every installed plugin's class path."""
    return {e.class_path: name for family in registry.DEFAULTS for name, e in registry.entries(family).items()}


@functools.cache
def _config(folder: str) -> dict[str, Any]:
    """Return the config of a run; nothing where it cannot be read."""
    try:
        text = Path(folder, "config.yaml").read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _check(key: str, rows: Sequence[Row]) -> None:
    """Raise UserError for a key that no run has."""
    if not rows or key in (*COLUMNS, *KEYS) or any(_value(row, key) is not None for row in rows):
        return
    known = {*COLUMNS, *KEYS, *(name for row in rows for name in row)}
    raise UserError(f"runs: no run has '{key}'.{nearest(key, known)} See 'llmkit runs --help'.")


def _test(text: str) -> tuple[str, Callable[[Any], bool]]:
    """Return the key of a comparison and the test of its value. Raises UserError for anything else."""
    match = re.fullmatch(r"([\w./-]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)", text)
    if match is None:
        raise UserError(f"runs: --where takes KEY=VALUE, or one of {', '.join(COMPARISONS)} between them, got '{text}'")
    key, sign, wanted = match.groups()

    def test(value: Any) -> bool:
        if value is None:
            return sign == "!="
        pair = (str(value).lower(), wanted.lower())
        with contextlib.suppress(ValueError):
            return COMPARISONS[sign](float(value), float(wanted))
        return COMPARISONS[sign](*pair)

    return key, test


def _sorted(rows: list[Row], key: str, reverse: bool) -> list[Row]:
    """Return the rows in the order of a key, numbers before texts and those without it at the end."""

    def rank(row: Row) -> tuple[bool, Any]:
        value = _value(row, key)
        return (False, value) if isinstance(value, int | float) else (True, str(value))

    having = [row for row in rows if _value(row, key) is not None]
    lacking = [row for row in rows if _value(row, key) is None]
    return [*sorted(having, key=rank, reverse=reverse), *lacking]


def _text(row: Row, key: str) -> str:
    """Return a value as the table shows it."""
    value = _value(row, key)
    if key == "result":
        shown = f"{row['metric']} {value:.4f}" if isinstance(value, float) else ""
        return shown if row["status"] == "finished" else f"{shown} ({row['status'][:40]})".strip()
    if value is None:
        return "-"
    if key == "time":
        return str(datetime.timedelta(seconds=int(value)))
    if key == "date":
        return str(value)[:16].replace("T", " ")
    if key in ("parameters", "tokens"):
        return _count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(count: int) -> str:
    """Return a count as ``1.23M``."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _chosen(text: str, rows: list[Row]) -> Row:
    """Return the run that ``--open`` means. Raises UserError where there is none."""
    if text.isdigit() and 1 <= int(text) <= len(rows):
        return rows[int(text) - 1]
    newest = _sorted([row for row in rows if text in (row["run"], row["name"])], "date", True)
    if not newest:
        names = {name: None for row in rows for name in (row["run"], row["name"])}
        hint = f" Did you mean one of 1 to {len(rows)}?" if text.isdigit() else nearest(text, names)
        raise UserError(f"runs: there is no run '{text}' in the list.{hint}")
    return newest[0]


def _open(row: Row) -> int:
    """Open a folder in the file manager, where there is one, and print its path."""
    print(row["folder"])
    on_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open") if on_screen else None
    if opener is not None:
        subprocess.Popen([opener, row["folder"]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 0

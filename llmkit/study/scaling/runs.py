"""Anybody's runs: a table with a row for each, or a file of TensorBoard's for each."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import UserError, nearest, unknown
from llmkit.study.scaling.isoflop import distinct
from llmkit.study.scaling.surface import Floats
from llmkit.study.scaling.uncertainty import PARAMETERS

KEYS = {
    "N": "params",
    "D": "tokens",
    "L": "loss",
    "C": "flops",
    "N_total": "total_params",
    "N_non_embedding": "non_embedding_params",
    "budget": "budget",
    "V": "variant",
}
"""What a column can be, and the name of the column that is taken for it where ``--columns`` names none."""
SIZES = ("N", "N_total", "N_non_embedding")
TENSORBOARD = ["Wall time", "Step", "Value"]
D_OF_STEPS = "D={}*TOKENS_A_STEP"
LEAST = 3
"""A surface needs so many sizes, and so many numbers of tokens."""


@dataclass
class Runs:
    """Runs of one variant, an array of each kind."""

    N: Floats
    D: Floats
    L: Floats
    C: Floats
    """FLOPs as the table has them, or 6 N D."""
    counted: bool
    """Whether the table has FLOPs next to N and D."""
    sizes: dict[str, Floats] = field(default_factory=dict)
    """N by the other conventions."""
    budget: Floats | None = None
    places: list[str] = field(default_factory=list)
    """FILE:LINE of each, or the name of its cell."""
    bits: Floats | None = None
    """Bits per byte of each."""

    def __len__(self) -> int:
        return len(self.L)

    def take(self, rows: Any) -> Runs:
        """Return some of the runs: a mask or indices."""
        kept = np.arange(len(self))[rows]
        sizes = {name: values[kept] for name, values in self.sizes.items()}
        budget, bits = (None if values is None else values[kept] for values in (self.budget, self.bits))
        arrays = (self.N[kept], self.D[kept], self.L[kept], self.C[kept])
        return Runs(*arrays, self.counted, sizes, budget, [self.places[index] for index in kept], bits)


def read(files: Sequence[str], columns: str | None, where: Sequence[str] = ()) -> dict[str, Runs]:
    """Return the runs of each variant; without a column for it there is one, named "runs".

    Args:
        files: FILE, or FILE:KEY=NUMBER,... with values that hold for the file.
        columns: KEY=COLUMN, KEY=COLUMN*NUMBER or KEY=NUMBER, with commas between them.
        where: COLUMN=TEXT, COLUMN!=TEXT, or COLUMN and <, <=, > or >= and a number: rows to keep.

    Raises:
        UserError: everything that keeps the runs from being fitted, a line each.
    """
    asked = _assignments(columns or "", "--columns")
    conditions = [_condition(text) for text in where]
    rows: list[dict[str, Any]] = []
    for file in files:
        path, own = _split(file)
        rows += _rows(path, {**asked, **own}, columns is None, conditions)
    if not rows:
        raise UserError("no runs are left: see --where" if where else f"{files[0]}: no rows below the header")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("V", "runs"), []).append(row)
    found = {name: _runs(group) for name, group in groups.items()}
    for name, runs in found.items():
        check(runs, f"variant {name}: " if len(found) > 1 else "")
    return found


def check(runs: Runs, prefix: str = "") -> None:
    """Raise UserError for runs that no surface can be fitted to, whatever their losses."""
    if len(runs) <= PARAMETERS:
        raise UserError(
            f"{prefix}{len(runs)} run{'s' * (len(runs) != 1)}; a surface has {PARAMETERS} parameters and needs more"
        )
    for key, values in (("N", runs.N), ("D", runs.D)):
        if (count := distinct(values)) < LEAST:
            what = {"N": "size", "D": "number of tokens"}[key]
            plural = what if count == 1 else {"N": "sizes", "D": "numbers of tokens"}[key]
            raise UserError(f"{prefix}{key}: the runs have {count} {plural}; a surface needs at least {LEAST}")


def _split(file: str) -> tuple[Path, dict[str, str]]:
    path, colon, values = file.rpartition(":")
    if colon and "=" in values and not Path(file).exists():
        own = _assignments(values, file)
        return Path(path), own
    return Path(file), {}


def _assignments(text: str, where: str) -> dict[str, str]:
    found = {}
    for item in next(csv.reader([text], skipinitialspace=True), []):
        key, equals, column = item.partition("=")
        if not equals or not column.strip():
            raise UserError(f"{where}: expected KEY=COLUMN,..., as in N=params,D=tokens,L=loss, got '{item}'")
        if key.strip() not in KEYS:
            raise UserError(f"{where}: {unknown('key', key.strip(), KEYS)}")
        found[key.strip()] = column.strip()
    return found


def _condition(text: str) -> tuple[str, Callable[[str], bool], str]:
    match = re.fullmatch(r"\s*(.+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
    if match is None:
        raise UserError(f"--where {text}: expected COLUMN and =, !=, <, <=, > or >= and a value, as in 'loss<5'")
    column, sign, value = match.groups()
    if sign in ("=", "!="):
        return column, lambda cell: (cell == value) == (sign == "="), text
    try:
        limit = float(value)
    except ValueError:
        raise UserError(f"--where {text}: expected a number after {sign}, got '{value}'") from None
    compare = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}[sign]
    return column, lambda cell: compare(_number(cell), limit), text


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _rows(path: Path, asked: Mapping[str, str], by_name: bool, conditions: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the values of each row by their keys. Raises UserError at the first that is not a number above 0."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            table = csv.DictReader(handle)
            names = list(table.fieldnames or [])
            lines = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a CSV file in UTF-8"
        raise UserError(f"{path}: {reason}") from error
    if not names:
        raise UserError(f"{path}: the file is empty")
    if names == TENSORBOARD:  # the curve of one run: its end counts
        lines = lines[-1:]
    elif curves := _curves(names):  # those of several runs: the end of the one that is named counts
        run = asked.get("L", "")
        if run not in curves:
            raise UserError(
                f"{path}: a chart of W&B: {len(curves)} curves, without sizes. Export the table of runs instead, or "
                f"give each run as '{path}:N=PARAMS,L={curves[0]}', with --columns '{D_OF_STEPS.format(names[0])}'"
            )
        if not (lines := [(number, row) for number, row in lines if (row[run] or "").strip()][-1:]):
            raise UserError(f"{path}: the column '{run}' (L) is empty")
    for column, _, text in conditions:
        if column not in names:
            raise UserError(f"--where {text}: {path}: {unknown('column', column, names)}")
    kept = [(n, row) for n, row in lines if all(test((row[column] or "").strip()) for column, test, _ in conditions)]
    sources = _sources(path, names, asked if not by_name else {**_known(names), **asked})
    for key, (column, _) in sources.items():
        if kept and column and not any((row[column] or "").strip() for _, row in kept):
            raise UserError(f"{path}: the column '{column}' ({key}) is empty")
    for number, row in kept:
        values: dict[str, Any] = {"place": f"{path.name}:{number}"}
        for key, (column, factor) in sources.items():
            cell = (row[column] or "").strip() if column else ""
            if key == "V":
                values[key] = cell or "(none)"
                continue
            value = _number(cell) * factor if column else factor
            if not (math.isfinite(value) and value > 0):
                bad = sum(not 0 < _number(other[column] or "") * factor < math.inf for _, other in kept)
                more = f", as in {bad - 1} more row{'s' if bad > 2 else ''}" if bad > 1 else ""
                raise UserError(
                    f"{path}:{number}: {column} ({key}): expected a number above 0, got '{cell}'{more}; "
                    f"--where '{column}>0' leaves such rows out"
                )
            values[key] = value
        yield values


def _curves(names: Sequence[str]) -> list[str]:
    """Return the columns of a chart of W&B that are curves, ``RUN - METRIC``; none: it is another table."""
    if len(names) < 2 or not all(" - " in name for name in names[1:]):
        return []
    return [name for name in names[1:] if not name.endswith(("__MIN", "__MAX"))]


def _known(names: Sequence[str]) -> dict[str, str]:
    return {key: name for key, name in KEYS.items() if name in names}


def _sources(path: Path, names: Sequence[str], asked: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Return the column of each key and what it is multiplied by; without a column the number itself."""
    found: dict[str, tuple[str, float]] = {}
    for key, text in asked.items():
        column, star, factor = text.rpartition("*")
        if text in names:
            found[key] = (text, 1.0)
        elif star and column.strip() in names and math.isfinite(_number(factor)):
            found[key] = (column.strip(), float(factor))
        elif math.isfinite(_number(text)):
            found[key] = ("", float(text))
        else:
            raise UserError(f"{path}: {key}: {unknown('column', text, names)}")
    if "N" not in found and (other := next((key for key in SIZES if key in found), None)):
        found["N"] = found[other]
    missing = "L" if "L" not in found else next((k for k in ("N", "D") if k not in found and "C" not in found), None)
    if missing is None and not {"N", "D"} & found.keys():
        missing = "N"
    if missing:
        hint = nearest(KEYS[missing], names)
        raise UserError(f"{path}: no column for {missing}: name it by --columns {missing}=COLUMN.{hint}")
    return found


def _runs(rows: list[dict[str, Any]]) -> Runs:
    def column(key: str) -> Floats | None:
        values = [row.get(key) for row in rows]
        return None if None in values else np.array(values, float)

    N, D, C = column("N"), column("D"), column("C")
    counted = N is not None and D is not None and C is not None
    if N is None:
        assert C is not None and D is not None
        N = C / 6 / D
    if D is None:
        assert C is not None
        D = C / 6 / N
    if C is None:
        C = 6 * N * D
    loss = column("L")
    assert loss is not None
    sizes = {name: values for name in SIZES[1:] if (values := column(name)) is not None}
    return Runs(N, D, loss, C, counted, sizes, column("budget"), [row["place"] for row in rows])

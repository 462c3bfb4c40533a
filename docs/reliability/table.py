"""Write the tables of ``docs/reliability.md`` from what the other scripts of this folder recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "reliability.md"


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return a Markdown table.

    Args:
        rows: its content.
        columns: key of a row -> heading of the column.
    """
    lines = [list(columns.values()), ["---"] * len(columns), *([str(row[key]) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def kills(rows: list[dict[str, Any]]) -> str:
    """Return the table of the kills."""
    sums: Counter[str] = Counter()
    for row in rows:
        sums.update({key: value for key, value in row.items() if isinstance(value, int)})
        row["differences"] = len(row["differences"])
        sums["differences"] += row["differences"]
    columns = {"configuration": "configuration", "attention": "attention", "workers": "workers"}
    columns |= {
        "accumulation": "batches a step",
        "kills_step": "killed in a step",
        "kills_validation": "in a validation",
    }
    columns |= {"kills_writing": "while writing", "from_the_start": "before a checkpoint", "losses": "losses compared"}
    columns |= {"tensors": "tensors compared", "differences": "differences"}
    total = {**dict.fromkeys(columns, ""), **sums, "configuration": "**all**", "workers": "", "accumulation": ""}
    summary = f"{sums['kills']} kills over {len(rows)} configurations, {sums['differences']} differences.\n\n"
    return summary + table([*rows, total], columns)


def soak(found: dict[str, Any]) -> str:
    """Return the table of the soak."""
    last, ratio = found["last"], found["second_half_to_first"]
    names = {"memory": "resident memory, MiB", "open_files": "open files", "disk": "checkpoints on disk, MiB"}
    rows = [{"what": name, "end": f"{last[key]:.0f}", "ratio": f"{ratio[key]:.3f}"} for key, name in names.items()]
    summary = (
        f"{last['minutes']:.0f} minutes, {found['steps']:,} steps, {found['saved']:,} checkpoints written, "
        f"{last['checkpoints']} names kept. Medians of the second half of the time against the first, without "
        "the first tenth:\n\n"
    )
    return summary + table(rows, {"what": "", "end": "at the end", "ratio": "second half to first"})


def fuzz(rows: list[dict[str, Any]]) -> str:
    """Return the table of the damaged files."""
    heads = {"kind": "files", "files": "number", "loaded": "loaded", "refused": "refused in one line"}
    return table(rows, {**heads, "failed": "crashed, hung or ran code", "slowest": "slowest"})


def configs(found: dict[str, Any]) -> str:
    """Return the sentence on broken configs."""
    return (
        f"Tested with {found['cases']} configs and command lines, each broken in one way "
        f"(`docs/reliability/configs.py`): for {found['right']} the message named the right key, place and remedy; "
        "none was accepted, none caused a traceback."
    )


def kill_study(found: dict[str, Any]) -> str:
    """Return the sentence on the study that was killed."""
    kills, same = found["kills"], found["files"] - len(found["differences"])
    victims = ", ".join(f"{kind} {number}" for kind, number in sorted(kills.items()))
    return (
        f"{sum(kills.values())} kills ({victims}) in a study of {found['runs']} real runs, {found['resumed']} of which "
        f"were resumed from a checkpoint: {same} of {found['files']} files of the report have the same bytes as "
        f"without kills. In another study, which ran in the same output folder at the same time, "
        f"{len(found['other'])} of {found['runs']} results differ."
    )


def kill_scale(found: dict[str, Any]) -> str:
    """Return the sentence on the study of sizes that was killed."""
    kills, same = found["kills"], found["files"] - len(found["differences"])
    victims = ", ".join(f"{kind} {number}" for kind, number in sorted(kills.items()))
    return (
        f"{sum(kills.values())} kills ({victims}) in a study of sizes with trunks, {found['runs']} real cells, "
        f"{found['resumed']} of which were resumed from a checkpoint of their own: {same} of {found['files']} files of "
        f"the report have the same bytes as without kills, and {len(found['other'])} cells have another result."
    )


def same(found: dict[str, Any]) -> str:
    """Return the sentence on experiments in which nothing differs."""
    return (
        f"{found['experiments']} real experiments of two arms with {found['seeds']} seeds each, in which nothing but "
        f"the seeds differed (standard deviation of a run {found['deviation']}): {found['false']} claimed a difference."
    )


WRITERS: dict[str, Callable[[Any], str]] = {
    **{"kills": kills, "soak": soak, "soak_multi30k": soak},
    **{"fuzz": fuzz, "configs": configs, "kill_study": kill_study, "kill_scale": kill_scale, "same": same},
}


def main() -> None:
    """Put each table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    for name, write in WRITERS.items():
        path = HERE / f"{name}.json"
        if path.exists():
            before, _, rest = page.partition(f"<!-- {name} -->")
            after = rest.partition(f"<!-- /{name} -->")[2]
            page = f"{before}<!-- {name} -->\n{write(json.loads(path.read_text()))}\n<!-- /{name} -->{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

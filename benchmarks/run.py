"""Run all CPU benchmarks one after the other and write their tables into ``docs/performance.md``.

python benchmarks/run.py                  all (make bench)
python benchmarks/run.py train lstm       these
python benchmarks/run.py --tables         only write the tables, of what was recorded
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

from kit import ROOT, Line, table

SCRIPTS = (
    "startup", "loader", "tokenization", "trainer", "train", "memory", "quality", "seq2seq", "lstm", "generation",
    "beam", "growth",
)  # fmt: skip
"""In this order."""
RECORDED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    """Run what is asked for; returns how many scripts failed."""
    asked = [word for word in sys.argv[1:] if not word.startswith("-")]
    failed, begin = 0, time.monotonic()
    RECORDED.mkdir(exist_ok=True)
    for name in () if "--tables" in sys.argv else asked or SCRIPTS:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        script = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", str(RECORDED / f"{name}.json")]
        failed += subprocess.run(script).returncode != 0
        print(f"== {name}: {time.monotonic() - start:.0f} s\n", flush=True)
    PAGE.write_text(page(PAGE.read_text()))
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes; the tables are in {PAGE.relative_to(ROOT)}")
    return failed


def page(text: str) -> str:
    """Return a page with the table of each recorded script between its marks."""
    for file in sorted(RECORDED.glob("*.json")):
        found = json.loads(file.read_text())
        lines = [Line(**{**line, "spread": line["spread"] and tuple(line["spread"])}) for line in found["lines"]]
        machine = ", ".join(f"{name} {value}" if name != "cpu" else value for name, value in found["machine"].items())
        told = f"<!-- {file.stem} -->\n{table(lines)}\n\n{notes(lines)}Measured with {machine}.\n<!-- /{file.stem} -->"
        text = re.sub(rf"<!-- {file.stem} -->.*?<!-- /{file.stem} -->", lambda _, told=told: told, text, flags=re.S)  # type: ignore[misc]
    return text


def notes(lines: list[Line]) -> str:
    """Return what a table's reader has to know besides, each once."""
    told = dict.fromkeys(line.note for line in lines if line.note and line.value is not None)
    return "".join(f"{note[0].upper()}{note[1:]}. " for note in told)


if __name__ == "__main__":
    sys.exit(main())

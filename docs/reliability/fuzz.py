"""Load thousands of damaged checkpoints, tokenizers and data files, and print what came of it.

    python docs/reliability/fuzz.py                    10,000 files in two worker processes
    python docs/reliability/fuzz.py --json docs/reliability/fuzz.json
    python docs/reliability/fuzz.py --files 500 --seed 7
    python docs/reliability/fuzz.py --case 1234        one of them, here, with its traceback

Each file is loaded as a user would: ``llmkit.load`` and a prediction, ``model.init_from``, ``llmkit fit --ckpt_path``,
``from_state``, or a ``DataModule`` that reads all rows. What counts as a failure is said in ``tests/fuzzing.py``, and
what damage there is in ``tests/mutations.py``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import Fuzz, Result, results  # noqa: E402


def table(found: list[Result]) -> list[dict[str, Any]]:
    """Return the rows of the results, by kind of file."""
    rows = []
    for kind in ("checkpoint", "tokenizer", "data", "all"):
        own = [result for result in found if kind in (result.kind, "all")]
        counts = collections.Counter(result.outcome for result in own)
        row = {"kind": kind, "files": len(own), "loaded": counts["loaded"], "refused": counts["refused"]}
        slowest = max((result.seconds for result in own), default=0.0)
        rows.append({**row, "failed": len(failed(own)), "slowest": f"{slowest:.1f} s"})
    return rows


def failed(found: list[Result]) -> list[Result]:
    """Return the failures."""
    return [result for result in found if result.outcome not in ("loaded", "refused")]


def main() -> int:
    """Run the files and print the table; returns 1 when there are failures."""
    parser = argparse.ArgumentParser(description="Load damaged files and print what came of it.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="load this file only, here, with its traceback")
    parser.add_argument("--json", help="write the rows of the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stdout(io.StringIO()):
            fuzz = Fuzz(Path(name), args.seed)
        if args.case is not None:
            print(fuzz.run(args.case, Path(name) / "work" / "0"))
            return 0
        start, found = time.monotonic(), []
        for result in results(fuzz, args.files, args.workers):
            found.append(result)
            if failed([result]):
                print(f"{result.number} {result.kind} ({result.what}): {result.outcome} {result.detail}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(table(found), indent=1) + "\n")
    for row in table(found):
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"\nseed {args.seed}, {(time.monotonic() - start) / 60:.1f} minutes, {args.workers} processes")
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(main())

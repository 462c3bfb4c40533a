"""Record for how many configs of ``tests/test_broken_configs.py`` the message has the right key, place and remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEST = "tests/test_broken_configs.py::test_every_mistake_is_told_by_key_place_and_remedy"


def main() -> None:
    """Run the test, which fails if a config is accepted or shows a traceback, and write ``configs.json``."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", TEST]
    run = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) of (\d+) told", run.stdout)
    assert found, run.stdout
    right, cases = map(int, found.groups())
    (HERE / "configs.json").write_text(json.dumps({"cases": cases, "right": right}) + "\n")
    print(found[0])


if __name__ == "__main__":
    main()

"""The notebooks of the examples run, and what they show is saved in them, with nothing of the machine that ran them."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest

from llmkit.run.throughput import LOGGED

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell shows, by kind; a note may come or not, with the machine."""
    found = [output.get("name") or sorted(output.get("data", {"error": 0}))[0] for output in cell["outputs"]]
    return [kind for kind in found if kind != "stderr"]


class Kernel(forked.Popen):
    """A kernel in a fork: as much of ``subprocess.Popen`` as jupyter_client uses of it."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict[str, str], cwd: str, **more: object) -> None:
        inline = "--matplotlib=inline"  # a variable of the environment says so to the import, which has been
        super().__init__([*command, inline], stdout=forked.DEVNULL, stderr=forked.DEVNULL, env=env, cwd=cwd)
        while os.getpgid(self.pid) != self.pid:  # it is about to lead a group of its own, to which signals go
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, one after the other; a cell that fails is an error."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("LLMKIT_CACHE", "")  # which the script sets
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", Kernel)
    found = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))["executed"](tmp_path)
    for path, notebook in found.items():
        saved = json.loads(path.read_text("utf-8"))
        assert [kinds(cell) for cell in code(notebook)] == [kinds(cell) for cell in code(saved)], path.name
    (run,) = (tmp_path / "examples" / "notebooks" / "runs").glob("lstm/*/metrics.csv")
    assert set(LOGGED) < set(run.read_text().splitlines()[0].split(","))


def test_what_they_show_is_saved() -> None:
    assert len(NOTEBOOKS) == 3 and sum(path.stat().st_size for path in NOTEBOOKS) < 300_000
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert not re.search(r"/(home|root|tmp|work|Users)/|ipykernel_\d", text), path.name
        cells = code(json.loads(text))
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
        for cell in cells:
            failed = [output for output in cell["outputs"] if output["output_type"] == "error"]
            assert bool(failed) == ("raises-exception" in cell["metadata"].get("tags", []))
            assert all(len(output["traceback"]) == 1 for output in failed)  # the mistake, without frames

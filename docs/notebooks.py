"""Execute the notebooks of ``examples/notebooks`` and save what their cells show: ``python docs/notebooks.py``.

They run in a copy, one after the other in one kernel, so that nothing is left behind and torch is imported once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def executed(folder: Path) -> dict[Path, Any]:
    """Return each notebook with the outputs that it has now. Raises CellExecutionError for a cell that fails.

    Args:
        folder: an empty folder for what they write.
    """
    where = folder / "examples" / "notebooks"
    where.mkdir(parents=True)
    (folder / "docs").symlink_to(ROOT / "docs")
    os.environ["LLMKIT_CACHE"] = str(folder / "cache")  # the kernel's too
    found = {path: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    forget = nbformat.v4.new_code_cell("%reset -f")
    whole = nbformat.v4.new_notebook(cells=[cell for one in found.values() for cell in (*one.cells, forget)])
    place = {"metadata": {"path": str(where)}}
    NotebookClient(whole, resources=place, record_timing=False, coalesce_streams=True, timeout=600).execute()
    for notebook in found.values():
        tidy(notebook)
    return found


def tidy(notebook: Any) -> None:
    """Number the cells of a notebook from 1, and leave out of it what differs from machine to machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for path, notebook in executed(Path(folder)).items():
            nbformat.write(notebook, path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")

"""``llmkit export``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, imported


def run(command: str, argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    parser = Parser(command, "Write a checkpoint as a folder in the format of Hugging Face.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, or a run folder: its best one")
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write, which must not exist")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.checkpoint.archive import file_of
    from llmkit.checkpoint.content import section
    from llmkit.hf.export import export
    from llmkit.model.language_model import load

    with imported(args.imports):
        path = file_of(args.checkpoint, "best.ckpt", "last.ckpt")
        model = load(path)
        assert model.tokenizer is not None
        part = section(model.spec, model.tokenizer, model.head, model.config)
        card = _card(path, part, model.size)
        written = export(Path(args.folder), part, model.state_dict(), model.tokenizer, card)
    print(f"{args.folder}: {written.architecture}{model.size}")
    if written.reason is not None:
        print(f"transformers needs llmkit to load it: {written.reason}")
    return 0


def _card(checkpoint: Path, part: dict[str, Any], size: str) -> str:
    """Return a model card: what it is, what it was trained on, and the figures next to its checkpoint."""
    config = part["config"]
    data = {key: value for key, value in (config.get("data") or {}).items() if key in ("train", "source", "validation")}
    results = checkpoint.parent.parent / "results.json"
    figures = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    head = part["model"]["head"]["class_path"].rpartition(".")[2]
    made = f"{head}{size}, trained with llmkit {part['versions']['llmkit']}. The licence is for the author to choose."
    lines = [
        *("---", "library_name: transformers", "---", "", f"# {config.get('name') or checkpoint.stem}", "", made),
        *("", "## Data", "", *(f"- {key}: `{value}`" for key, value in data.items() if value), ""),
        *("## Figures", "", *(f"- {name}: {value}" for name, value in figures.items()), ""),
        *("## Training", "", "```sh", "llmkit fit --config config.yaml", "```", ""),
    ]
    return "\n".join(lines)

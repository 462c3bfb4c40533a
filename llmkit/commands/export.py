"""``llmkit export``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.commands import Parser, imported
from llmkit.errors import UserError
from llmkit.run import record


def run(command: str, argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    parser = Parser(command, "Write a checkpoint as a folder in the format of Hugging Face.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, or a run folder: its best one")
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write, which must not exist")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of model.lora alone, for peft")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.checkpoint.archive import file_of

    with imported(args.imports):
        path = file_of(args.checkpoint, "best.ckpt", "last.ckpt")
        write = _adapters if args.adapter else _whole
        lines = write(path, Path(args.folder))
    print(f"{args.folder}: {lines[0]}", *lines[1:], sep="\n")
    return 0


def _whole(path: Path, folder: Path) -> list[str]:
    """Write a model; returns what to print: its architecture and size, and what transformers needs for it."""
    from llmkit.checkpoint.content import section
    from llmkit.hf.export import export
    from llmkit.model.compressed import expanded
    from llmkit.model.language_model import load

    model = load(path)
    if model.compression:
        expanded(model, f"checkpoint {path}")
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, model.config)
    card = _card(path, part, model.size)
    written = export(folder, part, model.state_dict(), model.tokenizer, card)
    needs = [] if written.reason is None else [f"transformers needs llmkit to load it: {written.reason}"]
    return [f"{written.architecture}{model.size}", *needs]


def _adapters(path: Path, folder: Path) -> list[str]:
    """Write the adapters of a checkpoint; returns what to print. Raises UserError when it has none."""
    from llmkit.checkpoint.content import Stored, check_classes, read
    from llmkit.checkpoint.weights import without_adapters
    from llmkit.hf.adapter import write_adapter
    from llmkit.hf.folder import PREFIX, Config
    from llmkit.hf.native import native
    from llmkit.hf.start import architecture_of, is_published

    stored = Stored(path, read(path))
    check_classes(stored.part, f"checkpoint {path}")
    if stored.part["model"].get("lora") is None:
        raise UserError(f"{path} was trained without model.lora: it has no adapters")
    whole = without_adapters(stored)
    labels = list(stored.part["head_info"].get("labels", []))
    content, _ = native(whole.part["model"], whole.content["state_dict"], labels)
    begun = (stored.part["config"].get("model") or {}).get("init_from")
    base = str(begun).removeprefix(PREFIX) if is_published(begun) else None
    architecture = architecture_of(Config("the export", content))
    count = write_adapter(folder, architecture, stored.part["model"]["lora"], stored.content["state_dict"], base)
    return [f"adapters of {count} linear maps"]


def _card(checkpoint: Path, part: dict[str, Any], size: str) -> str:
    """Return a model card: what it is, what it was trained on, and the figures next to its checkpoint."""
    config = part["config"]
    data = {key: value for key, value in (config.get("data") or {}).items() if key in ("train", "source", "validation")}
    results = record.read(checkpoint.parent.parent / record.RESULTS)
    figures = {name: value for name, value in results.items() if name != "provenance"}
    head = part["model"]["head"]["class_path"].rpartition(".")[2]
    made = f"{head}{size}, trained with llmkit {part['versions']['llmkit']}. The licence is for the author to choose."
    lines = [
        *("---", "library_name: transformers", "---", "", f"# {config.get('name') or checkpoint.stem}", "", made),
        *("", "## Data", "", *(f"- {key}: `{value}`" for key, value in data.items() if value), ""),
        *("## Figures", "", *(f"- {name}: {value}" for name, value in figures.items()), ""),
        *("## Training", "", "```sh", "llmkit fit --config config.yaml", "```", ""),
    ]
    return "\n".join(lines)

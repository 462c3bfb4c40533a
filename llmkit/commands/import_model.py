"""``llmkit import``: a model of Hugging Face as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from llmkit.commands import Parser, imported
from llmkit.errors import UserError


def run(command: str, argv: list[str]) -> int:
    """Write the checkpoint; returns the exit code."""
    parser = Parser(command, "Turn a model of Hugging Face into a checkpoint of llmkit.")
    add = parser.add_argument
    add("model", metavar="hf:NAME_OR_FOLDER[@REVISION]", help="a folder, or a name on the hub")
    add("checkpoint", metavar="OUT.ckpt", help="the file to write")
    add("--head", metavar="NAME", help="another head than the published one: its name, or {name: ..., arguments}")
    add(
        "--adapter",
        metavar="FOLDER",
        help="an adapter of peft (LoRA) that is merged into the weights",
    )
    parser.add_imports()
    args = parser.parse(argv)
    path = Path(args.checkpoint)
    if path.exists():
        raise UserError(f"import: {path} exists already")
    if path.suffix != ".ckpt" or not path.parent.is_dir():
        raise UserError(f"import: {path} should be a file in a folder that exists, with the suffix .ckpt")
    import yaml

    from llmkit.check import settled
    from llmkit.config.files import parse_yaml
    from llmkit.hf.start import is_published
    from llmkit.model.language_model import LanguageModel
    from llmkit.run.saving import save_model

    if not is_published(args.model):
        raise UserError(f"import: {args.model} does not begin with hf:, as in hf:gpt2 or hf:./folder")
    with imported(args.imports):
        try:
            head = None if args.head is None else settled(parse_yaml(args.head))
        except yaml.YAMLError as error:
            raise UserError(f"import: --head {args.head!r} is neither a name nor {{name: ..., arguments}}") from error
        model = LanguageModel.published(args.model, head, args.adapter)
        save_model(model, path)
    print(f"{path}: {type(model.head).__name__}{model.size}")
    return 0

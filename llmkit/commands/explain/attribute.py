"""``llmkit explain attribute CHECKPOINT TEXT ...``: what each token contributes to the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least, columns, imported
from llmkit.commands.explain.rows import file_rows, text_row
from llmkit.commands.inputs import add_rows, device_of
from llmkit.errors import UserError, note

DESCRIPTION = (
    "Attribute the answer to the tokens: the score of the class, or the log probability of the next token or of the "
    "row's targets. Integrated gradients add up to the difference from a text of mask tokens, which is checked."
)


def run(command: str, argv: list[str]) -> int:
    """Print the contributions; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add_rows(parser, 20)
    add = parser.add_argument
    methods = ("integrated_gradients", "occlusion", "jacobian", "map", "rollout")
    add("--method", choices=methods, default=methods[0], help="default: integrated_gradients")
    add("--layers", action="store_true", help="integrated gradients at the output of each layer too")
    add("--at", type=at_least(0), metavar="N", help="explain the target at this position alone, from 0")
    add("--output", metavar="FOLDER", help="write attribute.json, and of the first row attribute.png, there")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    parser.add_imports()
    args = parser.parse(argv)
    if args.layers and args.method != methods[0]:
        raise UserError(f"{command}: --layers is for integrated_gradients, and --method is {args.method}")
    from llmkit.analysis.explain import figures
    from llmkit.analysis.explain.contributions import contributions
    from llmkit.model.language_model import load

    found = []
    with imported(args.imports):
        model = load(args.checkpoint, device_of(command, args.device)).requires_grad_(False)
        rows = [text_row(text, model.head) for text in args.texts] + file_rows(args.input, model.head)
        if not rows:
            raise UserError(f"{command}: no text given: add it to the command line, or use --input FILE")
        for row in rows[: args.limit]:
            found.append(contributions(model, row, args.method.replace("_", " "), args.layers, args.at))
    if missed := sum(not one.get("complete", True) for one in found):
        note(f"{command}: in {missed} of {len(found)} rows the contributions do not add up to 1 % of the difference")
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, indent=2)
        (folder / "attribute.json").write_text(text + "\n", encoding="utf-8")
        figures.contributions(found[0]["tokens"], found[0]["values"], folder / "attribute.png")
    print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else "\n\n".join(map(_text, found)))
    return 0


def _text(facts: Mapping[str, Any]) -> str:
    """Return the contributions of one row as a table, a token a line."""
    table = [["token", *facts["values"]]]
    for token, *values in zip(facts["tokens"], *facts["values"].values(), strict=True):
        table.append([repr(token), *(f"{value:+.4f}" for value in values)])
    lines = [f"{facts['method']} of: {facts['explained']}", *columns(table)]
    if "difference" in facts:
        for name, missed in facts["missed"].items():
            total = sum(facts["values"][name])
            lines.append(f"{name}: sum {total:+.4f}, difference {facts['difference']:+.4f}, missed by {missed:.1e}")
    return "\n".join(lines)

"""``llmkit explain lens CHECKPOINT TEXT ...``: what each layer would answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import Parser, columns, imported
from llmkit.commands.explain.rows import file_rows, text_row
from llmkit.commands.inputs import add_rows, device_of
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.contracts import Batch
    from llmkit.model.language_model import LanguageModel

DESCRIPTION = (
    "Let the head read the states of each layer as if they were the last ones (the logit lens): the loss and, if the "
    "head predicts tokens, the token that each layer would predict. Rows need their targets."
)
LONGEST = 200
"""Most positions whose tokens are printed."""


def run(command: str, argv: list[str]) -> int:
    """Print the losses by layer; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add_rows(parser, 200)
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="write lens.json and lens.png there")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.analysis.explain import figures
    from llmkit.analysis.explain.lens import losses_by_layer
    from llmkit.analysis.explain.reading import row_batch
    from llmkit.model.language_model import load
    from llmkit.model.use import evaluating

    with imported(args.imports):
        model = load(args.checkpoint, device_of(command, args.device))
        head, fields = model.head, (*model.head.inputs, *model.head.targets)
        rows = [text_row(text, head) for text in args.texts] + file_rows(args.input, head)
        if not rows:
            raise UserError(f"{command}: no text given: add it to the command line, or use --input FILE")
        totals, count, shown = list[float](), 0, list[list[dict[str, Any]]]()
        with evaluating(model):
            for number, row in enumerate(rows[: args.limit]):
                if missing := [name for name in head.targets if isinstance(row, str) or name not in row]:
                    shape = json.dumps(dict.fromkeys(fields, "..."))
                    raise UserError(
                        f"{command}: row {number + 1} has no {' and no '.join(missing)}: expected '{shape}'"
                    )
                batch = row_batch(model, row if isinstance(row, dict) else {fields[0]: row}, fields)
                losses = losses_by_layer(model, batch)
                totals = [a + b for a, b in zip(totals or [0.0] * len(losses), losses, strict=True)]
                count += int(head.loss(model.network, batch).count)
                if number == 0 and "targets" in batch and model.network.topology != "encoder":
                    shown = _guesses(model, batch)
    if not count:
        raise UserError(f"{command}: {type(head).__name__} predicts nothing in these rows")
    means = [total / count for total in totals]
    facts = {"rows": min(len(rows), args.limit), "targets": count, "losses": means, "first_row": shown}
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lens.json").write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        figures.by_layer("What the head makes of each layer", "loss (nats)", {"loss": means}, folder / "lens.png")
    print(json.dumps(facts, ensure_ascii=False, indent=2) if args.json else _text(means, count, shown))
    return 0


def _guesses(model: LanguageModel, batch: Batch) -> list[list[dict[str, Any]]]:
    """Return what each layer would predict at each position with a target, with the probabilities of both."""
    from llmkit.analysis.explain.lens import guesses_by_layer
    from llmkit.analysis.explain.tokens import labels
    from llmkit.contracts import IGNORE

    assert model.tokenizer is not None
    targets = batch["targets"][0].tolist()
    places = [place for place, target in enumerate(targets) if target != IGNORE]
    names = labels(model.tokenizer, [targets[place] for place in places])
    found = []
    for one in guesses_by_layer(model, batch):
        ids, probabilities = one.ids_BTK[0, :, 0].tolist(), one.probabilities_BTK[0, :, 0].tolist()
        own = one.target_BT[0].tolist()
        found.append(
            [
                {
                    "target": name,
                    "guess": labels(model.tokenizer, [ids[place]])[0],
                    "probability": probabilities[place],
                    "of_target": own[place],
                }
                for place, name in zip(places, names, strict=True)
            ]
        )
    return found


def _text(means: list[float], count: int, shown: list[list[dict[str, Any]]]) -> str:
    rows = [["layers passed", "loss"], *([str(layer), f"{loss:.4f}"] for layer, loss in enumerate(means))]
    text = "\n".join([*columns(rows), f"mean over {count:,} targets"])
    if not shown:
        return text
    table = [["target", *(f"layer {layer}" for layer in range(len(shown)))]]
    for cells in list(zip(*shown, strict=True))[:LONGEST]:
        table.append([repr(cells[0]["target"]), *(f"{cell['guess']!r} {cell['probability']:.2f}" for cell in cells)])
    return "\n".join([text, "", *columns(table)])

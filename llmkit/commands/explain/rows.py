"""``llmkit explain CHECKPOINT TEXT ...``: show what each answer rests on, token by token, as a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands import VERBS, Parser, at_least, imported
from llmkit.commands.explain import faithfulness
from llmkit.commands.inputs import add_rows, device_of, lines_of, row_of
from llmkit.errors import UserError, note

if TYPE_CHECKING:
    from llmkit.contracts import Head
    from llmkit.sequence import DecodingOptions

DESCRIPTION = (
    "Show what each answer of a checkpoint rests on: a map of tokens by tokens for every layer and head, as one page "
    "that opens without a network. Attention has weights; so have linear attention, retention, min_gru and low_rank, "
    "by the matrix that they apply; of lstm and gru the norm of the Jacobian is shown."
)


def run(command: str, argv: list[str]) -> int:
    """Write the page, a picture and the numbers; returns the exit code."""
    verbs = "".join(f" 'llmkit explain {verb} --help': {text}." for verb, text in VERBS["explain"].items())
    parser = Parser(command, DESCRIPTION + verbs)
    add_rows(parser, 20)
    add = parser.add_argument
    add("--output", default="explain", metavar="FOLDER", help="where explain.html, .png and .json go; default: explain")
    text = "most tokens to write; 0: explain texts, or rows with targets, as they are; default: 32 of a language model"
    add("--max_new_tokens", type=at_least(0), metavar="N", help=text)
    add("--greedy", action="store_true", help="always take the most probable token")
    add("--seed", type=int, metavar="N", help="seed for sampling")
    add("--layer", type=at_least(0), metavar="N", help="the picture shows this layer alone, from 0")
    add("--head", type=at_least(0), metavar="N", help="the picture shows this head alone, from 0")
    text = "what each token contributes on the page too, by integrated gradients and occlusion: takes captum, and time"
    add("--contributions", action="store_true", help=text)
    text = "measure over all rows how far each method can be trusted: deletion, insertion, random weights"
    add("--faithfulness", action="store_true", help=text)
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    parser.add_imports()
    args = parser.parse(argv)
    if "" in args.texts:
        raise UserError("explain: the text is empty")
    if not args.texts and args.input is None:
        raise UserError("explain: no text given: add it to the command line, or use --input FILE (- for stdin)")
    from llmkit.analysis.explain import page, picture
    from llmkit.analysis.explain.explanation import explain
    from llmkit.model.language_model import load

    with imported(args.imports):
        model = load(args.checkpoint, device_of("explain", args.device))
        rows = [text_row(text, model.head) for text in args.texts] + file_rows(args.input, model.head)
        if not rows:
            raise UserError(f"explain: --input {args.input} has no texts")
        if len(rows) > args.limit:
            note(f"explain: the first {args.limit} of {len(rows):,} rows; --limit N explains more")
    if args.faithfulness:
        return faithfulness.report(model, rows[: args.limit], Path(args.output), args.seed or 0)
    if args.contributions:
        from llmkit.analysis.explain.attribution import captum
        from llmkit.analysis.explain.contributions import ON_THE_PAGE, contributions

        captum()  # refuses before anything is computed
    options = _options(args, model.head.decoding)
    found = explain(model, rows[: args.limit], options=options, write=args.max_new_tokens != 0)
    if args.contributions:
        model.requires_grad_(False)
        for row, one in zip(rows, found, strict=False):
            # Of a text that is continued the first token that is written; of other heads the answer as it was given.
            read = one.row if model.head.targets else row
            one.contributions.extend(contributions(model, read, method) for method in ON_THE_PAGE)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    picture.draw(found[0], folder / "explain.png", args.layer, args.head)
    facts = {"checkpoint": str(args.checkpoint), "rows": [one.facts() for one in found]}
    (folder / "explain.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "explain.html").write_text(page.page_of(found, str(args.checkpoint)), encoding="utf-8")
    for one in found:
        if one.shown:
            print(one.shown)
    print(folder / "explain.html")
    return 0


def _options(args: Any, default: DecodingOptions) -> DecodingOptions:
    """Return how text is written: as the checkpoint says, but not too long. Raises UserError where out of range."""
    from llmkit.analysis.explain.reading import shortened

    given: dict[str, Any] = {}
    if args.max_new_tokens:
        least = min(default.min_new_tokens, args.max_new_tokens)
        given |= {"max_new_tokens": args.max_new_tokens, "min_new_tokens": least}
    if args.greedy:
        given |= {"temperature": 0.0, "num_beams": 1, "num_return_sequences": 1}
    if args.seed is not None:
        given["seed"] = args.seed
    try:
        return dataclasses.replace(default if args.max_new_tokens else shortened(default), **given)
    except ValueError as error:
        raise UserError(f"explain: {error}") from error


def text_row(text: str, head: Head) -> str | dict[str, Any]:
    """Return a text as a row: a JSON object with the head's fields, or a text for a head that reads one."""
    try:
        row = json.loads(text) if text.lstrip().startswith("{") else None
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict) and all(row.get(field) for field in head.inputs):
        return row
    return text if len(head.inputs) == 1 else row_of("explain", text, head.inputs)


def file_rows(source: str | None, head: Head) -> list[Any]:
    """Return the rows of a file; a table or JSON has the head's fields as its columns."""
    from llmkit.data.opening import Options
    from llmkit.data.rows import Bad
    from llmkit.data.sources import SUFFIXES, local

    if source is None:
        return []
    if not SUFFIXES.keys() & set(Path(source).suffixes):
        return [text_row(text, head) for text in lines_of("explain", source) if text]
    rows: list[Mapping[str, Any]] = []
    for row in local("--input", source, Options()).read():
        if isinstance(row, Bad):
            raise UserError(f"explain: {row.message(row.file)}")
        if missing := [field for field in head.inputs if not row.data.get(field)]:
            columns = ", ".join(map(str, row.data)) or "none"
            raise UserError(f"explain: {row.file}:{row.number}: no {' and no '.join(missing)}; columns: {columns}")
        rows.append(row.data)
    return rows

"""``llmkit explain heads CHECKPOINT ...``: what each head looks at on repeated random tokens."""

from __future__ import annotations

import csv
import json
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.commands import Parser, at_least, columns, imported
from llmkit.commands.inputs import device_of
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.analysis.explain.patterns import HeadScores, Scored

DESCRIPTION = (
    "Score each head on repeated random tokens: induction, previous token, duplicate token, first token, fixed offset "
    "(Olsson et al. 2022). Several checkpoints of a run, or its folder: the scores over its steps."
)


def run(command: str, argv: list[str]) -> int:
    """Print the table and write it; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add = parser.add_argument
    add(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="a .ckpt file, hf:NAME_OR_FOLDER, or a run folder: all of its",
    )
    add("--rows", type=at_least(1), default=8, metavar="N", help="random texts; default: 8")
    text = "tokens that each text repeats; default: 32, or half of the context"
    add("--length", type=at_least(3), metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="seed of the random tokens; default: 0")
    add("--output", metavar="FOLDER", help="write heads.json, heads.csv and heads.png there")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    parser.add_imports()
    args = parser.parse(argv)
    from llmkit.analysis.explain import figures
    from llmkit.analysis.explain.patterns import even_scores, random_ids, score_heads
    from llmkit.model.language_model import load

    found: list[tuple[str, int | None, Scored]] = []
    with imported(args.imports):
        device = device_of(command, args.device)
        for path in [file for given in args.checkpoints for file in _files(given)]:
            model = load(path, device)
            assert model.tokenizer is not None
            length = args.length or min(32, model.context // 2)
            if 2 * length > model.context:
                raise UserError(
                    f"{command}: --length {length}: twice as many tokens are more than the context of {path}"
                )
            ids_BT = random_ids(model.tokenizer, args.rows, length, args.seed)
            found.append((str(path), _step(path), score_heads(model, ids_BT)))
    found.sort(key=lambda one: -1 if one[1] is None else one[1])
    even = even_scores(length, causal=model.network.topology == "decoder")
    if len({tuple((one.layer, one.head) for one in scored.scores) for *_, scored in found}) > 1:
        raise UserError(f"{command}: the checkpoints have other layers or heads: compare those of one run")
    facts = {
        "length": length,
        "rows": args.rows,
        "even": even._asdict(),
        "checkpoints": [
            {
                "checkpoint": path,
                "step": step,
                "kind": scored.kind,
                "losses": scored.losses,
                "heads": [one._asdict() for one in scored.scores],
            }
            for path, step, scored in found
        ],
    }
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "heads.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        with (folder / "heads.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["checkpoint", "step", *even._fields])
            writer.writerows([path, step, *one] for path, step, scored in found for one in scored.scores)
        if len(found) == 1:
            figures.heads_of_one(found[0][2].scores, folder / "heads.png")
        else:
            steps = [number if step is None else step for number, (_, step, _) in enumerate(found)]
            figures.heads_over_steps(steps, [one for *_, one in found], even, folder / "heads.png")
    print(json.dumps(facts, indent=2) if args.json else _text(found, even))
    return 0


def _files(given: str) -> list[Path | str]:
    """Return the checkpoint, or all of a run folder."""
    folder = Path(given)
    if not folder.is_dir():
        return [given if given.startswith("hf:") else folder]
    from llmkit.checkpoint.archive import file_of

    last = file_of(folder, "last.ckpt", "best.ckpt")
    steps = [path for path in last.parent.glob("step_*.ckpt") if re.fullmatch(r"step_\d+", path.stem)]
    kept = {path.stat().st_ino: path for path in [*steps, last]}  # the same file may have two names
    return list(kept.values())


def _step(path: Path | str) -> int | None:
    """Return the optimizer steps that a checkpoint has seen; None for a model of Hugging Face."""
    from llmkit.checkpoint.archive import file_of, read

    if str(path).startswith("hf:"):
        return None
    step: int | None = read(file_of(path, "best.ckpt", "last.ckpt")).get("global_step")
    return step


def _text(found: list[tuple[str, int | None, Scored]], even: HeadScores) -> str:
    """Return the table of one checkpoint, or the best head of each pattern by step."""
    from llmkit.analysis.explain.patterns import PATTERNS

    if len(found) == 1:
        scored = found[0][2]
        rows = [["layer", "head", *PATTERNS, "offset"]]
        rows += [_row(one) for one in scored.scores] + [["", *_row(even)[1:-1], ""]]
        end = f"from: {scored.kind}"
        if scored.losses is not None:
            end += "\nloss: {:.3f} in the first copy, {:.3f} in the second".format(*scored.losses)
        return "\n".join([*columns(rows), end])
    rows = [["step", *PATTERNS, "loss of first", "second copy"]]
    for _, step, scored in found:
        cells = []
        for name in PATTERNS:
            best = max(scored.scores, key=operator.attrgetter(name))
            cells.append(f"{getattr(best, name):.3f} ({best.layer}, {best.head})")
        losses = ("", "") if scored.losses is None else [f"{loss:.3f}" for loss in scored.losses]
        rows.append(["" if step is None else f"{step:,}", *cells, *losses])
    rows.append(["even", *(f"{getattr(even, name):.3f}" for name in PATTERNS), "", ""])
    return "\n".join([*columns(rows), "the highest score of a head, with (layer, head)"])


def _row(one: HeadScores) -> list[str]:
    from llmkit.analysis.explain.patterns import PATTERNS

    scores = [f"{getattr(one, name):.3f}" for name in PATTERNS]
    return [str(one.layer), one.head, *scores, f"-{one.offset}: {one.at_offset:.3f}"]

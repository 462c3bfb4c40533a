"""``llmkit verify mup``: check that a network's parts change as much at every width (the coordinate check of muP)."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmkit.commands import Parser, at_least, columns
from llmkit.commands.fit import run_instead
from llmkit.errors import UserError
from llmkit.run.cli import CLI
from llmkit.run.figures import coordinates as draw
from llmkit.testing.coordinates import SLOPE, Part, check, title

DESCRIPTION = (
    "Train a config's model for a few steps at several widths (model.dim), and compare how far the outputs of each "
    "part have moved: the coordinate check of muP (model.mup_base_dim). A part passes if the slope of the change "
    f"against the width, in logarithms, is below {SLOPE}. A model of muP is compared with the standard "
    "parametrization, whose changes grow. Other settings, also the number of heads, stay as they are, and the learning "
    "rate is the optimizer's, without a schedule. Exit code 0: all parts pass; 1: some fail."
)


def run(command: str, argv: list[str]) -> int:
    """Run the check. Returns 0 if every part passes, else 1."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    add = functools.partial(parser.add_argument, metavar="N")
    text = "two or more widths with commas between them; default: 64,128,256"
    parser.add_argument("--widths", type=widths_of, default=[64, 128, 256], metavar="N,N", help=text)
    add("--steps", type=at_least(1), default=4, help="optimizer steps at each width; default: 4")
    add("--seeds", type=at_least(1), default=3, help="initial weights that are averaged over; default: 3")
    text = "where the picture is written; default: mup.png in the config's folder of runs"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=text)
    options, argv = parser.parse_known_args(argv)
    return run_instead(functools.partial(_check, options), argv, command)


def widths_of(text: str) -> list[int]:
    """Return the numbers of ``64,128``, ascending; the argparse type of ``--widths``."""
    try:
        widths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[0] < 1:
        raise argparse.ArgumentTypeError(f"must be two or more widths with commas between them, got '{text}'")
    return widths


def _check(options: argparse.Namespace, cli: CLI) -> int:
    start = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s: {line}", file=sys.stderr, flush=True)

    picture = options.picture or Path(cli.config_init["output"]) / cli.config_init["name"] / "mup.png"
    try:  # now rather than after the work
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.touch()
    except OSError as error:
        raise UserError(f"the picture cannot be written: {error}") from error
    model = cli.model.to(cli.trainer.strategy.root_device)
    found = check(model, cli.datamodule, options.widths, options.steps, options.seeds, log)
    panels = {title(base): {part.name: part.moved for part in parts} for base, parts in found.items()}
    draw(options.widths, panels, picture)
    (base, parts), *rest = found.items()
    contrast = rest[0][1] if rest else ()
    head = f"{title(base)}, {options.steps} steps, on {model.device.type}"
    print(f"{head}\n\n{table(options.widths, parts, contrast)}\n\npicture: {picture}")
    return int(not all(part.passed for part in parts))


def table(widths: Sequence[int], parts: Sequence[Part], contrast: Sequence[Part] = ()) -> str:
    """Return the changes as a table for people, with the slopes of the standard parametrization for ``contrast``."""
    standard = {part.name: part for part in contrast}
    last = ("without muP",) if contrast else ()
    rows = [("mean change of", *(f"width {width}" for width in widths), "slope", "verdict", *last)]
    for part in parts:
        changes = (f"{change:.3g}" for change in part.moved)
        other = (_slope(standard[part.name]),) if contrast else ()
        rows.append((part.name, *changes, _slope(part), "flat" if part.passed else "NOT FLAT", *other))
    flat = sum(part.passed for part in parts)
    lines = [f"{flat} of {len(parts)} parts are flat: their change grows with a slope below {SLOPE}"]
    if doubtful := [part.name for part in parts if part.doubtful]:
        lines.append(f"other initial weights could give another verdict on {', '.join(doubtful)}: use more --seeds")
    if contrast:
        grown = sum(not part.passed for part in contrast)
        lines.append(f"without muP {len(contrast) - grown} of {len(contrast)} parts are flat")
        if not grown:
            lines.append("so this check does not show that muP is needed: use wider widths, or a higher learning rate")
    return "\n".join([*columns(rows), "", *lines])


def _slope(part: Part) -> str:
    """Return ``+0.05 ± 0.02``."""
    return f"{part.slope:+.2f}" + ("" if math.isnan(part.error) else f" ± {part.error:.2f}")

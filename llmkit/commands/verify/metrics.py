"""``llmkit verify metrics``: check that a model's numbers do not depend on how its rows are batched."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence

from llmkit.commands import Parser, at_least, columns
from llmkit.commands.fit import run_instead
from llmkit.run.cli import CLI
from llmkit.testing.invariance import Finding, build, compare

DESCRIPTION = (
    "Compute the loss, metrics, answers and gradients of a config's model on some rows, one row at a time and in many "
    "kinds of batches (sizes 1 to 64, other orders, more padding, by batch_tokens, accumulated), and compare them; the "
    "metrics also under each precision plugin of Lightning, texts also sampled. Check that the first half of the "
    "validation batches represents all (limit_val_batches). The weights are new, or those of --ckpt_path. Exit code 0: "
    "all numbers pass; 1: some fail."
)


def run(command: str, argv: list[str]) -> int:
    """Run the check. Returns 0 if every number passes, else 1."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    text = "number of rows, or of blocks of text; default: 64"
    parser.add_argument("--rows", type=at_least(2), default=64, metavar="N", help=text)
    options, argv = parser.parse_known_args(argv)
    return run_instead(functools.partial(_check, options.rows), argv, command)


def _check(rows: int, cli: CLI) -> int:
    model, data = cli.model, cli.datamodule
    model.spec["compile"] = False  # otherwise each batch width would be compiled again
    build(model, data)
    weights = "new weights"
    if cli.stored is not None:
        model.load_state_dict(cli.stored.content["state_dict"])
        weights = f"weights of {cli.stored.path}"
    model.to(cli.trainer.strategy.root_device)
    start = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s: {line}", file=sys.stderr, flush=True)

    log("this takes from seconds to a few minutes, the more the larger the model; fewer --rows take less")
    findings = compare(model, data, rows, log)
    print(f"{weights}, at most {rows} rows, in single precision on {model.device.type}\n\n{table(findings)}")
    return int(not all(finding.passed for finding in findings))


def table(findings: Sequence[Finding]) -> str:
    """Return findings as a table for people."""
    titles = ("number", "row by row", "largest difference", "verdict")
    lines = columns([titles, *((f.what, f.reference, f"{f.difference:.1e}", verdict(f)) for f in findings)])
    failed = [finding for finding in findings if not finding.passed]
    lines += ["", *(f"FAIL {finding.what}: first at {finding.first}" for finding in failed)]
    passed = len(findings) - len(failed)
    return "\n".join([*lines, f"{passed} of {len(findings)} numbers do not depend on how rows are batched"])


def verdict(finding: Finding) -> str:
    """Return pass or FAIL; for a pass by double precision only, the difference there."""
    if finding.exact is not None:
        return f"pass (rounding: {finding.exact:.1e} in double precision)"
    return "pass" if finding.passed else "FAIL"

"""``llmkit verify metrics``: do the numbers of a config's model depend on how its rows are batched?"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.commands import Parser
from llmkit.commands.fit import run as launch
from llmkit.errors import UserError
from llmkit.run.cli import CLI
from llmkit.testing.invariance import Finding, build, compare

DESCRIPTION = (
    "Compute loss, metrics, answers and gradients of a config's model on some of its rows, one row at a time and in "
    "many kinds of batches (sizes 1 to 64, other orders, more padding, by batch_tokens, accumulated), and compare. "
    "The model has new weights, or those of --ckpt_path. All further options are those of fit. Exit code 0: nothing "
    "depends on the batches, 1: something does."
)


class MetricsCLI(CLI):
    """Builds everything that ``fit`` would, and compares its numbers instead of training."""

    rows = 64
    failed = False

    def _run_subcommand(self, subcommand: str) -> None:
        model, data = self.model, self.datamodule
        model.spec["compile"] = False  # every width of a batch would be compiled anew
        build(model, data)
        weights = "new weights"
        if self.stored is not None:
            model.load_state_dict(self.stored.content["state_dict"])
            weights = f"weights of {self.stored.path}"
        model.to(self.trainer.strategy.root_device)
        findings = compare(model, data, self.rows)
        print(f"{weights}, at most {self.rows} rows, in single precision on {model.device.type}\n\n{table(findings)}")
        type(self).failed = not all(finding.passed for finding in findings)


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("verify metrics", DESCRIPTION)
    parser.add_argument("--rows", type=int, default=64, help="how many rows, or blocks of text (default 64)")
    options, rest = parser.parse_known_args(argv)
    if options.rows < 2:
        raise UserError(f"verify metrics: --rows must be at least 2, got {options.rows}")
    MetricsCLI.rows, MetricsCLI.failed = options.rows, False
    launch("fit", rest, MetricsCLI, "verify metrics")
    return int(MetricsCLI.failed)


def table(findings: Sequence[Finding]) -> str:
    """Return findings as a person reads them."""
    titles = ("number", "row by row", "largest difference", "verdict")
    rows = [titles, *((f.what, f.reference, f"{f.difference:.1e}", verdict(f)) for f in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
    failed = [finding for finding in findings if not finding.passed]
    lines += ["", *(f"FAIL {finding.what}: first at {finding.first}" for finding in failed)]
    passed = len(findings) - len(failed)
    return "\n".join([*lines, f"{passed} of {len(findings)} numbers do not depend on how rows are batched"])


def verdict(finding: Finding) -> str:
    """Return one word, and what stands behind it where the precision decides."""
    if finding.exact is not None:
        return f"pass (rounding: {finding.exact:.1e} in double precision)"
    return "pass" if finding.passed else "FAIL"

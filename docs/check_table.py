"""Write ``docs/plugin-check.md``: what plugins are examined for, and which property notices which sown bug.

    python docs/check_table.py

Every bug of ``tests/bugs.py`` is sown into its variant and examined for every property; the table shows what failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import bugs  # noqa: E402
import plain_attention  # noqa: E402

from llmkit import registry, testing  # noqa: E402

HEAD = """\
# What plugins are examined for

Written by `docs/check_table.py`; do not edit.

`llmkit plugins check TARGET` examines a plugin for everything its family owes its users, and so does
`llmkit.testing.examination(family, plugin)` in a test suite. Inputs are random, and the smallest cases come first, so
that a failure shows the smallest one. What does not apply to a plugin (decoding without a state, say) is told so.
"""
BUGS = """\
## Bugs sown, properties that notice them

Each bug is one change of the source of a correct variant (`tests/bugs.py`): of plain multi-head attention written out,
or of a first-party variant. The first property is the bug's own, which a test asks for; one mistake often breaks
several promises. The variants without the bugs pass everything, and so do the unusual but correct designs of
`tests/test_kit_attention.py`: a filter by FFT, a hard choice of one value, attention to the strict past, an output that
starts at zero, no parameters at all. `reference` compares with a slow form that the author gives: a wrong scale or head
order cannot be told otherwise, for it is still some attention.
"""


def main() -> None:
    """Examine and write."""
    lines = [HEAD]
    for family in registry.DEFAULTS:
        lines += [
            f"## {family.capitalize()}",
            "",
            "| property | what holds | what its failure means |",
            "|---|---|---|",
        ]
        lines += [f"| `{item.name}` | {item.claim} | {item.meaning} |" for item in testing.properties(family)]
        lines.append("")
    lines += [BUGS, "| bug | variant | noticed by | also by |", "|---|---|---|---|"]
    for bug in bugs.BUGS:
        reference = plain_attention.reference if bug.source is plain_attention else None
        report = testing.check("attention", bugs.sown(bug), compile_backend=None, reference=reference)
        failed = [result.name for result in report.failed]
        assert bug.caught_by in failed, bug.name
        others = ", ".join(f"`{name}`" for name in failed if name != bug.caught_by) or "-"
        lines.append(f"| {bug.name} | {bug.cls} | `{bug.caught_by}` | {others} |")
    (ROOT / "docs" / "plugin-check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

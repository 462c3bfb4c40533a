"""What a report says in sentences: the methods, what was not equal, and the summary of the command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmkit.run.drawing import signed
from llmkit.study import statistics, tables, verdicts
from llmkit.study.looks import COSTS, EQUAL, label
from llmkit.study.verdicts import Results, Verdict


def summary(results: Results, found: Mapping[str, list[Verdict]]) -> str:
    """Return a line for each variant, in the setting that counts, and one for what its other setting says instead."""
    setting = next(iter(found))
    decimals = verdicts.decimals(row for rows in found.values() for row in rows)
    base = verdicts.sample(results, results["baseline"], setting)
    mean = tables.number(base.mean, decimals) or "no finished run"
    where = f", {label(results, setting)}" if len(found) > 1 else ""
    lines = [f"{results['metric']} against {results['baseline']} ({mean}){where}, {_seeds(results['seeds'])}:"]
    width = max((len(row.variant) for row in found[setting]), default=0)
    for row in found[setting]:
        numbers = ""
        if row.difference is not None:
            numbers = f"{signed(row.difference, decimals)} {tables.interval(row, decimals)}".strip() + ", "
        lines.append(f"  {row.variant:{width}}  {numbers}{verdicts.sentence(row, results['margin'], decimals)}")
        lines += [f"  {'':{width}}  {line}" for line in other_settings(row, results, found)]
    return "\n".join(lines)


def other_settings(row: Verdict, results: Results, found: Mapping[str, list[Verdict]]) -> list[str]:
    """Return what the other settings say of the same variant, where that is another verdict."""
    rows = [other for rows in found.values() for other in rows if other.variant == row.variant]
    return [f"{label(results, other.setting)}: {other.word}" for other in rows if other.word != row.word]


def listed(items: list[str]) -> str:
    """Return ``a, b and c``."""
    return ", ".join(items[:-1]) + f" and {items[-1]}" if len(items) > 1 else "".join(items)


def _seeds(seeds: list[int]) -> str:
    return f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}"


def _sequence(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    run = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return "seeds " + (f"{seeds[0]} to {seeds[-1]}" if run else listed([str(seed) for seed in seeds]))


def methods(results: Results, found: Mapping[str, list[Verdict]]) -> list[str]:
    """Return the paragraphs that say what was done, written from the results alone."""
    return [_setup(results), _statistics(results, found)]


def _setup(results: Results) -> str:
    names, baseline, metric = list(results["variants"]), results["baseline"], results["metric"]
    facts = [f"{key.replace('_', ' ')}: {_fact(value)}" for key, value in results["data"].items()]
    base = " ".join([results["base"] or "the default settings", *results.get("options", [])])
    text = f"{len(names)} variants of {base} were trained with llmkit {results['llmkit']}"
    text += f" ({'; '.join(facts)}). " if facts else ". "
    changes = [
        f"{name} ({', '.join(f'{key}: {_fact(value)}' for key, value in variant['overrides'].items())})"
        for name, variant in results["variants"].items()
        if variant["overrides"]
    ]
    if changes:
        text += f"They differ in these settings only: {'; '.join(changes)}. "
    text += _matching(results["match"], [variant["left"] for variant in results["variants"].values()], baseline)
    if also := results.get("also"):
        more = _matching(also, [variant["also"]["left"] for variant in results["variants"].values()], baseline)
        tuned = " with the values that were tuned before" if results["tuned"] else ""
        text += f"The verdicts {EQUAL[also]} are those of further runs{tuned}: {more[0].lower()}{more[1:]}"
    if tuned := results["tuned"]:
        counts = {len(variant["tuning"] or []) for variant in results["variants"].values()}
        span = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        text += (
            f"For each variant {tuned['key']} was chosen among {span} values, each {tuned['factor']:g} times the one "
            f"before, by the mean of {metric} over {_sequence(tuned['seeds'])}, not used again. "
        )
    return text + (
        f"The results are those of {_sequence(results['seeds'])}: {metric} after the last step, never of the "
        "best checkpoint. A seed gives every variant the same order of data, the same stream of dropout and the same "
        "initial values of all parameters that have the same name and shape."
    )


def _matching(match: str, left: list[float | None], baseline: str) -> str:
    """Return the sentence on what was made equal, and how exactly."""
    off = f"within {100 * max(abs(value or 0) for value in left):.2g} % of {baseline}'s"
    if match == "none":
        return "Their sizes were not matched. "
    if match == "time":
        how = "steps of each variant were timed by turns with the baseline's before any run"
        return f"The numbers of steps were set for equal training times, {off}: {how}. "
    return f"Sizes were matched as listed above: {COSTS[match]} are {off}. "


def _statistics(results: Results, found: Mapping[str, list[Verdict]]) -> str:
    rows = [row for rows in found.values() for row in rows]
    compared = max((sum(row.p is not None for row in rows) for rows in found.values()), default=0)
    text = (
        f"Each variant is compared with {results['baseline']} by the mean of the paired differences over the common "
        "seeds, with its 95 % t interval. "
    )
    if compared > 1:
        text += f"The p-values are corrected for {compared} comparisons by Holm's method. "
    if results["margin"] is not None:
        text += (
            f"A variant is equivalent if two one-sided t tests, corrected in the same way, exclude differences of "
            f"{results['margin']:g} or more. "
        )
    if any(row.p_sign_flip is not None for row in rows):
        text += "The exact sign-flip test is reported as a check and does not decide. "
    if any(row.visible is not None for row in rows):
        text += (
            "What a comparison would have seen is the smallest true difference that it finds in 80 % of studies, from "
            "the noncentral t distribution. "
        )
    if any(verdicts.sample(results, name, setting).diverged for name in results["variants"] for setting in found):
        text += (
            "A diverged run counts as the worst result: its variant can be neither better nor equivalent by its other "
            "runs. Fisher's exact test compares how often runs diverge; the sign-flip test takes their pairs as the "
            "largest differences. "
        )
    if any(row.word == statistics.NONE for row in rows):
        text += f"Fewer than {statistics.MIN_SEEDS} common seeds give no verdict. "
    return text.strip()


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def unequal(results: Results, found: Mapping[str, list[Verdict]]) -> list[str]:
    """Return what was not equal between the variants, a sentence each."""
    lines, base = [], results["variants"][results["baseline"]]
    if results["match"] == "none":
        lines.append("Sizes were not matched.")
    for name, variant in results["variants"].items():
        parts = _matched(variant, results["match"])
        lines += [f"{name}: {'; '.join([*parts, *variant['notes']])}."] if parts or variant["notes"] else []
        if results.get("also") and (parts := [*_matched(variant["also"], results["also"]), *variant["also"]["notes"]]):
            lines.append(f"{name}, {EQUAL[results['also']]}: {'; '.join(parts)}.")
    for key in base["costs"]:
        gaps = {name: _ratio(variant, base, key) for name, variant in results["variants"].items()}
        far = [f"{name} {signed(100 * gap, 0)} %" for name, gap in gaps.items() if gap is not None and abs(gap) > 0.01]
        if far:
            what = COSTS.get(key, key)
            lines.append(f"{what[0].upper()}{what[1:]}, against {results['baseline']}: {', '.join(far)}.")
    return [*lines, *_unequal_tuning(results), *_unequal_runs(results, found)]


def _matched(variant: Mapping[str, Any], match: str) -> list[str]:
    """Return what was set to make a variant equal to the baseline, and what is left of the difference."""
    parts = [f"{key} = {_fact(value)}" for key, value in variant["matched"].items()]
    what = "training time" if match == "time" else COSTS.get(match, "")
    return [*parts, f"{signed(100 * (variant['left'] or 0), 2)} % {what}".strip()] if parts else []


def _ratio(variant: Mapping[str, Any], base: Mapping[str, Any], key: str) -> float | None:
    mine, other = variant["costs"].get(key), base["costs"].get(key)
    return mine / other - 1 if mine is not None and other else None


def _unequal_tuning(results: Results) -> list[str]:
    if not (tuned := results["tuned"]):
        return []
    variants, name_of = results["variants"], verdicts.short(tuned["key"])
    lines = []
    counts = {name: sum(len(p["results"]) for p in variant["tuning"] or []) for name, variant in variants.items()}
    if len({*counts.values()}) > 1:
        lines.append("Tuning runs: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".")
    edge = [name for name, variant in variants.items() if variant["at_edge"]]
    if edge:
        lines.append(f"The best {name_of} lies at the edge of the tuned values, others may be better: {listed(edge)}.")
    lost = {n: sum(p["results"].count(None) for p in variant["tuning"] or []) for n, variant in variants.items()}
    if any(lost.values()):
        lines.append("Diverged tuning runs: " + ", ".join(f"{n} {count}" for n, count in lost.items() if count) + ".")
    windows = {name: window for name in variants if (window := verdicts.window(results, name))}
    widths = [f"{name} {high / low:.3g}×" for name, (low, high) in windows.items()]
    if widths:
        lines.append(f"Usable window of the {name_of} (largest by smallest value): {', '.join(widths)}.")
    return lines


def _unequal_runs(results: Results, found: Mapping[str, list[Verdict]]) -> list[str]:
    lines = []
    for setting in found:
        where = f" ({label(results, setting)})" if len(found) > 1 else ""
        for name in results["variants"]:
            values = verdicts.sample(results, name, setting).values
            diverged = [seed for seed, value in values.items() if math.isinf(value)]
            missing = [seed for seed in results["seeds"] if seed not in values]
            for kind, seeds in (("diverged", diverged), ("without a result", missing)):
                if seeds:
                    lines.append(f"{name}{where}: {_sequence(seeds)} {kind}.")
    if len(results["seeds"]) < 6:
        lines.append(f"Only {_seeds(results['seeds'])}: the exact sign-flip test needs 6.")
    return lines

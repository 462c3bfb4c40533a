"""The report of a study, from made-up results."""

from __future__ import annotations

import copy
import csv
import html.parser
import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from study_results import study

from llmkit.run import drawing
from llmkit.study import figures, report, sentences, statistics, tables, verdicts

pytest.importorskip("scipy")
ELEVEN = [
    *("multi_head", "standard", "grouped_query", "sliding_window", "latent", "differential"),
    *("linear", "retention", "low_rank", "lstm", "gru"),
]


@pytest.fixture(scope="module")
def tuned() -> dict[str, Any]:
    """Four variants with every blemish: a diverged run, a missing one, a rate at the edge, a name to escape."""
    results = study({"multi_head": 0, "lstm": -0.03, "a_<b>&$c": 0.001, "linear": 0.05}, tuned=True)
    variants = results["variants"]
    variants["linear"]["runs"]["tuned"]["3"] = None
    variants["linear"]["curves"]["tuned"]["3"][-3:] = [[500, None], [550, float("nan")]]
    del variants["lstm"]["runs"]["base"]["2"]
    variants["lstm"]["costs"]["cache"] = None
    results["failed"] = [{"cell": "final/lstm/seed2", "message": "out of memory <x>"}]
    return results


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report(tuned: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(tuned)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "unrelated.txt").touch()
    report.write(tuned, tmp_path)
    assert tuned == before
    names = ["differences", "curves", "curves_flops", "curves_difference", "seeds", "tuning", "costs"]
    pictures = [f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"report.html", "table.csv", "table.tex", "figures/unrelated.txt", *pictures}
    text = (tmp_path / "report.html").read_text("utf-8")
    check_page(Page(text), names)
    check_tables(tmp_path)

    with drawing.style():  # the same results give the same bytes
        found = {setting: verdicts.of(tuned, setting) for setting in ("tuned", "base")}
        again = figures.draw(tuned, found)["costs"]
        drawing.save(again, tmp_path / "again.png")
        assert drawing.svg(again, "costs", "Quality and cost") in text
    for kind in ("png", "pdf"):
        assert (tmp_path / f"again.{kind}").read_bytes() == (tmp_path / "figures" / f"costs.{kind}").read_bytes()


def check_page(page: Page, names: list[str]) -> None:
    attributes = [(tag, key, value or "") for tag, found in page.seen for key, value in found.items()]
    assert not [tag for tag, _ in page.seen if tag in ("script", "link", "img", "iframe")]
    links = [value for _, key, value in attributes if key in ("href", "xlink:href", "src")]
    assert {link for link in links if not link.startswith("#")} == {
        *("table.csv", "table.tex"),
        *(f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")),
    }
    ids = [value for _, key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len([tag for tag, found in page.seen if tag == "svg" and found.get("aria-label")]) == len(names)
    headings = [
        *("Verdicts", "Difference to the baseline", "Learning curves", "Seeds", "Tuning", "Quality and cost"),
        *("What was not equal", "Methods", "Failed runs", "Files"),
    ]
    places = [page.text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    for sentence in (
        "a_<b>&$c: as in the base config: worse, tuned: not distinguishable.",
        "linear (tuned): seed 3 diverged.",
        "lstm (as in the base config): seed 2 without a result.",
        "The best learning rate lies at the edge of the tuned values, others may be better: a_<b>&$c.",
        "final/lstm/seed2: out of memory <x>",
        "FLOPs for a training token, against multi_head: lstm +10 %, a_<b>&$c +20 %, linear +30 %.",
        "Sizes were matched as listed above: parameters without embeddings are within 0.12 % of multi_head's.",
        "The p-values are corrected for 3 comparisons by Holm's method.",
        "worse; 1 of 6 runs diverged",
        "< .001",
    ):
        assert sentence in page.text


def check_tables(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    assert [(row["setting"], row["variant"]) for row in rows[:5]] == [
        *(("tuned", name) for name in ("multi_head", "lstm", "a_<b>&$c", "linear")),
        ("base", "multi_head"),
    ]
    assert [row["verdict"] for row in rows[:4]] == ["baseline", "better", "not distinguishable", "worse"]
    assert float(rows[1]["low"]) < float(rows[1]["difference"]) < float(rows[1]["high"]) < 0
    assert (rows[3]["diverged"], rows[3]["pairs"], rows[1]["cache"]) == ("1", "5", "")
    latex = (folder / "table.tex").read_text("utf-8")
    assert r"a\_$<$b$>$\&\$c & 1.70 M & 4.00" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {6}
    assert len(re.findall(r"(?<!\\)\$", latex)) % 2 == 0
    assert latex.isascii()


SMALL: dict[str, tuple[dict[str, float], dict[str, Any], set[str]]] = {
    "one": ({"multi_head": 0}, {}, {"curves", "curves_flops", "seeds", "costs"}),
    "eleven": (
        {name: 0.004 * (-1) ** i * i for i, name in enumerate(ELEVEN)} | {"gru": 2.0},
        {"better": "max", "margin": None},
        {"differences", "curves", "curves_flops", "curves_difference", "seeds", "costs"},
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_figures_of_few_and_of_many_variants(case: str) -> None:
    shifts, options, names = SMALL[case]
    results = study(shifts, **options)
    found = {"base": verdicts.of(results, "base")}
    with drawing.style():
        drawn = figures.draw(results, found)
    assert set(drawn) == names
    if case == "eleven":  # one variant is so far off that the others would be one line
        titles = [axes.get_title() for axes in drawn["curves_difference"].axes]
        assert titles == [*ELEVEN[1:-1], "gru (off the scale)"]
        assert drawn["seeds"].axes[0].get_ylim()[1] < 4.2
    assert len(found["base"]) == len(shifts) - 1
    assert len(report.summary(results).splitlines()) == len(shifts)


def test_a_win_by_one_cost_alone_is_said_to_depend_on_it() -> None:
    results = study({"multi_head": 0, "lstm": -0.05, "linear": 0.05}, margin=None)
    other = study({"multi_head": 0, "lstm": 0.05, "linear": 0.06}, margin=None)
    results["also"] = "time"
    for name, variant in results["variants"].items():
        variant["runs"]["time"] = other["variants"][name]["runs"]["base"]
        variant["also"] = {"matched": {"trainer.max_steps": 480} if name == "lstm" else {}, "left": 0.001, "notes": []}
        variant["also"]["costs"] = {"params": 2e6}
        variant["costs"]["time"] = 0.02 if name == "lstm" else 0.016
    found = verdicts.everything(results)
    assert [[row.word for row in rows] for rows in found.values()] == [["better", "worse"], ["worse", "worse"]]
    lines = report.summary(results).splitlines()
    assert lines[0].startswith("val_loss against multi_head (4.00") and "at equal parameters, 6 seeds" in lines[0]
    assert lines[1].endswith("better; depends on what is made equal")
    assert lines[2].strip() == "at equal training time: worse"
    assert lines[3].endswith(" worse")
    text = "\n".join([*sentences.unequal(results, found), *sentences.methods(results, found)])
    assert "lstm, at equal training time: trainer.max_steps = 480; +0.10 % training time.\n" in text
    assert "verdicts at equal training time are those of further runs: the numbers of steps were set for" in text
    table = list(csv.DictReader(tables.as_csv(results, found).splitlines()))
    assert [(row["setting"], row["params"]) for row in table[2:4]] == [("base", "1704000.0"), ("time", "2000000.0")]
    with drawing.style():
        drawn = figures.draw(results, found)
    assert drawn["curves_seconds"].axes[0].get_lines()[1].get_xdata()[-1] == 12.0
    assert [axes.get_title(loc="left") for axes in drawn["differences"].axes] == [
        *("at equal parameters", "at equal training time"),
    ]


def test_nothing_finished() -> None:
    """All runs diverged or failed: there is a report, without figures, that says so."""
    results = study({"multi_head": 0, "lstm": 0.1}, seeds=4)
    for variant in results["variants"].values():
        variant["runs"], variant["curves"] = {"base": dict.fromkeys("0123")}, {"base": {}}
    (verdict,) = verdicts.of(results, "base")
    assert (verdict.word, verdict.difference, verdict.pairs) == (statistics.UNCLEAR, None, 0)
    with drawing.style():
        assert figures.draw(results, {"base": [verdict]}) == {}
    assert report.summary(results).splitlines() == [
        "val_loss against multi_head (no finished run), 4 seeds:",
        "  lstm  not distinguishable; 4 of 4 runs diverged; 4 of 4 runs of the baseline diverged",
    ]
    for variant in results["variants"].values():
        variant["runs"] = {}
    assert report.summary(results).endswith("  lstm  no verdict (0 common seeds, at least 4 are needed)")
    assert sentences.unequal(results, {"base": verdicts.of(results, "base")})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shift": -0.03}, "better"),
        ({"shift": 0.03}, "worse"),
        ({"shift": 0.03, "better": "max"}, "better"),
        ({"shift": 0.0, "sd": 0.002}, "equivalent within ±0.01"),
        ({"shift": 0.006, "sd": 0.001}, "equivalent within ±0.01 (a smaller difference is visible)"),
        ({"shift": 0.0, "sd": 0.02}, "not distinguishable (would have seen at least 0.030)"),
        ({"shift": 0.0, "sd": 0.0, "margin": None}, "not distinguishable (all pairs are exactly equal)"),
        ({"shift": -0.03, "seeds": 3}, "no verdict (3 common seeds, at least 4 are needed)"),
    ],
)
def test_verdicts_in_words(change: dict[str, Any], sentence: str) -> None:
    shift = change.pop("shift")
    results = study({"multi_head": 0, "lstm": shift}, **change)
    (verdict,) = verdicts.of(results, "base")
    assert verdicts.sentence(verdict, results["margin"], verdicts.decimals([verdict])) == sentence


def test_what_a_comparison_would_have_seen_grows_with_the_comparisons() -> None:
    many = study(dict.fromkeys(ELEVEN, 0.0), margin=None)
    few = copy.deepcopy(many)
    few["variants"] = {name: many["variants"][name] for name in ELEVEN[:2]}
    (alone,), first = verdicts.of(few, "base"), verdicts.of(many, "base")[0]
    assert first.sd == alone.sd
    assert alone.visible == pytest.approx(1.4345 * (alone.sd or 0), rel=1e-3)
    assert first.visible and alone.visible
    assert first.visible > 1.5 * alone.visible


def test_the_usable_window_lies_around_the_best_value() -> None:
    results = study({"multi_head": 0}, margin=0.02, tuned=True)
    points = [(1, 4.0), (2, 4.3), (4, 4.01), (8, 3.99), (16, 4.005), (32, None)]
    results["variants"]["multi_head"]["tuning"] = [{"value": value, "results": [found]} for value, found in points]
    assert verdicts.window(results, "multi_head") == (4, 16)
    results["margin"] = None
    assert verdicts.window(results, "multi_head") == (4, 16)  # within 1 % of 3.99
    results["better"] = "max"
    assert verdicts.window(results, "multi_head") == (2, 2)


def test_a_figure_is_valid_xml_by_itself() -> None:
    results = study({"multi_head": 0, "a & <b>": 0.1})
    with drawing.style():
        picture = figures.draw(results, {"base": verdicts.of(results, "base")})["seeds"]
        root = ElementTree.fromstring(drawing.svg(picture, "seeds", "Seeds"))
    assert root.get("aria-label") == "Seeds"
    assert all(element.get("id", "seeds-").startswith("seeds-") for element in root.iter())


def test_tuning_panels_leave_room_for_their_labels() -> None:
    """Seven values, a factor of 3 apart, that are not round."""
    results = study({"multi_head": 0, "lstm": 0.1, "gru": -0.1}, tuned=True)
    for variant in results["variants"].values():
        variant["tuning"] = [{"value": 0.001 / 3 * 3**k, "results": [3 - 0.3 * k]} for k in range(7)]
    with drawing.style(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a figure that could not be laid out
        figure = figures._tuning(results)
        figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0.00033", "0.009", "0.24"]

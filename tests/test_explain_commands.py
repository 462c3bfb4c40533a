"""``llmkit explain attribute, heads, lens, probe`` and ``--faithfulness``: what they print and write."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from command import done, llmkit
from matplotlib.figure import Figure
from test_explain_measures import tiny

from llmkit import load
from llmkit.analysis.explain import picture
from llmkit.commands import VERBS
from llmkit.run.saving import save_model

OLD = Path(__file__).parent / "old_checkpoints"
GENERATION, TRANSLATION = OLD / "generation.ckpt", OLD / "translation.ckpt"
PNG = b"\x89PNG"


def test_attributions(tmp_path: Path) -> None:
    """They add up to the difference that is printed, at each layer."""
    pytest.importorskip("captum")
    words = ("explain", "attribute", GENERATION, "the cat", "--layers", "--output", tmp_path)
    printed = done(*words).out
    (facts,) = json.loads((tmp_path / "attribute.json").read_text())
    assert facts == json.loads(done(*words, "--json").out)[0]
    assert list(facts["values"]) == ["embedding", "layer 0"] and facts["complete"]
    assert facts["tokens"] == list("the cat") and f"integrated gradients of: {facts['explained']}" in printed
    for name, values in facts["values"].items():
        assert sum(values) == pytest.approx(facts["difference"], abs=0.011 * abs(facts["difference"]))
        assert f"{name}: sum {sum(values):+.4f}, difference {facts['difference']:+.4f}" in printed
    assert (tmp_path / "attribute.png").read_bytes()[:4] == PNG
    (found,) = json.loads(
        done("explain", "attribute", GENERATION, "the cat", "--method", "map", "--at", 3, "--json").out
    )
    assert found["explained"] == " " or found["explained"] == "c", found["explained"]
    values = found["values"]["map"]
    assert sum(values) == pytest.approx(1, abs=1e-5) and values[4:] == [0.0] * 3  # position 3 sees no later one


@pytest.mark.parametrize("checkpoint", [GENERATION, TRANSLATION], ids=["generation", "translation"])
def test_attributions_on_the_page(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of ``attribute``: of the first written token, and of the whole translation."""
    pytest.importorskip("captum")
    monkeypatch.setattr(picture, "_figure", lambda *args: Figure((1, 1)))
    done("explain", checkpoint, "the cat", "--contributions", "--greedy", "--output", tmp_path)
    (row,) = json.loads((tmp_path / "explain.json").read_text())["rows"]
    page = (tmp_path / "explain.html").read_text().split('<script type="application/json" id="data">')[1]
    (shown,) = json.loads(page.split("</script>")[0])["rows"]
    assert [one["name"] for one in shown["contributions"]] == ["integrated gradients", "occlusion"]
    given = "the cat" if checkpoint == GENERATION else json.dumps(row["row"])
    for one, stored in zip(shown["contributions"], row["contributions"], strict=True):
        words = ("explain", "attribute", checkpoint, given, "--json", "--method", one["name"].replace(" ", "_"))
        (facts,) = json.loads(done(*words).out)
        assert stored == facts and one["tokens"] == facts["tokens"]
        (values,) = facts["values"].values()
        assert one["values"] == pytest.approx(values, rel=6e-3) and facts["explained"] in one["says"]


def test_heads(tmp_path: Path) -> None:
    """One checkpoint, and a folder with two: each once, in the order of their steps."""
    table = done("explain", "heads", GENERATION, "--output", tmp_path / "one").out
    facts = json.loads((tmp_path / "one" / "heads.json").read_text())
    (one,) = facts["checkpoints"]
    assert [(head["layer"], head["head"]) for head in one["heads"]] == [(0, "head 0"), (0, "head 1")]
    assert f"{one['heads'][1]['induction']:.3f}" in table and "from: weights" in table and "loss: " in table
    run = tmp_path / "checkpoints"
    run.mkdir()
    content = torch.load(GENERATION, weights_only=True)
    for step in (20, 3):
        torch.save({**content, "global_step": step}, run / f"step_{step}.ckpt")
    (run / "last.ckpt").hardlink_to(run / "step_20.ckpt")
    table = done("explain", "heads", tmp_path, "--output", tmp_path / "run").out
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["3", "20", "even"]
    rows = list(csv.DictReader((tmp_path / "run" / "heads.csv").open()))
    assert [row["step"] for row in rows] == ["3", "3", "20", "20"]
    assert float(rows[0]["induction"]) == one["heads"][0]["induction"]
    for folder in ("one", "run"):
        assert (tmp_path / folder / "heads.png").read_bytes()[:4] == PNG
    result = llmkit("explain", "heads", GENERATION, TRANSLATION)
    assert result.code == 2 and "the checkpoints have other layers or heads: compare those of one run" in result.err
    result = llmkit("explain", "heads", GENERATION, "--length", 1000)
    assert result.code == 2 and "--length 1000: twice as many tokens are more than the context" in result.err


def test_the_lens(tmp_path: Path) -> None:
    row = json.dumps({"source": "a cat", "target": "a mat"})
    printed = done("explain", "lens", TRANSLATION, row, "--output", tmp_path).out
    facts = json.loads((tmp_path / "lens.json").read_text())
    assert len(facts["losses"]) == len(facts["first_row"]) >= 2 and f"{facts['losses'][-1]:.4f}" in printed
    (score,) = [json.loads(line) for line in done("infer", TRANSLATION, row, "--score", "--json").out.splitlines()]
    assert facts["targets"] == score["tokens"]
    total = sum(torch.tensor(cell["of_target"]).log().item() for cell in facts["first_row"][-1])
    assert total == pytest.approx(score["log_probability"], rel=1e-3)
    assert (tmp_path / "lens.png").read_bytes()[:4] == PNG
    result = llmkit("explain", "lens", TRANSLATION, json.dumps({"source": "a cat"}))
    assert result.code == 2 and 'row 1 has no target: expected \'{"source": "...", "target": "..."}\'' in result.err


def test_a_probe(tmp_path: Path) -> None:
    """The first letter can be read off; a list of labels belongs to a list of words."""
    texts = [f"{'abcd'[n % 4] * 3} e {'fgh'[n % 3]}" for n in range(120)]
    lines = [json.dumps({"text": text, "label": text[0]}) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = ("explain", "probe", GENERATION, "--data", tmp_path / "rows.jsonl", "--label", "label")
    table = done(*words, "--output", tmp_path).out
    facts = json.loads((tmp_path / "probe.json").read_text())
    assert facts["items"] == 120 and facts["labels"] == 4 and len(facts["layers"]) == 2
    assert facts["layers"][0]["accuracy"] == 1.0 and "most frequent label: " in table
    assert (tmp_path / "probe.png").read_bytes()[:4] == PNG
    assert json.loads(done(*words, "--json", "--limit", 40).out)["items"] == 40
    (tmp_path / "tags.conll").write_text("".join(f"{word} {word[0]}\n" for word in texts[0].split()) * 20 + "\n")
    result = llmkit(
        *words[:3], "--data", tmp_path / "tags.conll", "--format", "conll", "--text", "tokens", "--label", "tags"
    )
    assert result.code == 2 and "rows to fit and rows to judge by" in result.err  # one sentence cannot be split
    result = llmkit(*words[:-1], "lable")
    assert result.code == 2 and "row 1 has no column lable; it has text, label" in result.err


def test_faithfulness(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    printed = done("explain", GENERATION, "the cat", "on a mat", "x", "--faithfulness", "--output", tmp_path).out
    assert "integrated gradients" in printed and str(tmp_path / "faithfulness.json") in printed
    facts = json.loads((tmp_path / "faithfulness.json").read_text())
    assert list(facts) == ["map", "rollout", "integrated gradients", "occlusion", "jacobian"]
    assert all(one["texts"] == 2 and 0 <= one["deletion"][0] <= 1 for one in facts.values())


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    options = ("--faithfulness", "--contributions")
    for words in (
        ("explain", "attribute", GENERATION, "a cat"),
        *(("explain", GENERATION, "a", one) for one in options),
    ):
        result = llmkit(*words)
        assert (result.code, result.err) == (
            2,
            "llmkit: error: attributions need the package captum: pip install 'llmkit[explain]'\n",
        )


def test_the_recipes_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/explaining.md but those of its first block."""
    pytest.importorskip("captum")
    guide = (Path(__file__).parent.parent / "docs" / "explaining.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for run, model in {"quickstart": load(GENERATION), "reviews": tiny("classification")}.items():
        save_model(model, tmp_path / "runs" / run / "checkpoints" / "best.ckpt")
    reviews = [f"a {word} film,{'good' if i % 2 else 'bad'}" for i, word in enumerate(["dull", "moving"] * 20)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,verdict", *reviews]) + "\n")
    (tmp_path / "new_reviews.txt").write_text("a dull film\na moving film\n")
    ran = set()
    for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)[1:]:
        for _, *words in (shlex.split(line) for line in block.splitlines() if line.startswith("llmkit ")):
            done(*words)
            ran |= {*words} & {*VERBS["explain"], "--faithfulness"}
    assert ran == {*VERBS["explain"], "--faithfulness"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("attribute.json", "attribute.png", "attribute.pdf", "faithfulness.json", "heads.json", "heads.csv"),
        *("heads.png", "heads.pdf", "probe.json", "probe.png", "probe.pdf"),
    }

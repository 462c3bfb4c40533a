"""Searches: what they are asked, what is suggested after a stop, and a best config that runs."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from command import done, llmkit

from llmkit.commands import tune as command
from llmkit.commands.cell import fit_cell
from llmkit.errors import Stopped, UserError
from llmkit.run import drawing
from llmkit.study import match
from llmkit.study.outcomes import OUTCOME, Cell
from llmkit.study.search import figures, trials
from llmkit.study.search.spec import SAMPLERS, Choice, Range, read
from llmkit.study.search.suggest import Suggester, importances

EXPERIMENT = """
data: {train: text.txt, validation_share: 0.1, tokenizer: char, batch_size: 4}
model: {dim: 32, num_layers: 1, context: 16, attention: {name: multi_head, num_heads: 4}}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
"""
STUDY = """
base: experiment.yaml
space:
  model.optimizer.lr: {low: 1e-4, high: 1e-1, log: true}
  model.dropout: [0.0, 0.1, 0.2]
  model.num_layers: {low: 1, high: 4}
trials: 10
"""
SPACE: dict[str, Range | Choice] = {
    "x": Range(1e-4, 1e-1, log=True),
    "n": Range(1, 4),
    "c": Choice({"a": "a", "[1]": [1]}),
}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    Path("experiment.yaml").write_text(EXPERIMENT)
    Path("study.yaml").write_text(STUDY)
    return tmp_path


def test_a_search_is_read(experiment: Path) -> None:
    search = read("study.yaml", {"trials": 3}, ["--data.batch_size=2"])
    assert search.space == {
        "model.optimizer.lr": Range(1e-4, 1e-1, log=True),
        "model.dropout": Choice({"0.0": 0.0, "0.1": 0.1, "0.2": 0.2}),
        "model.num_layers": Range(1, 4),
    }
    assert search.space["model.num_layers"].whole and not search.space["model.optimizer.lr"].whole  # type: ignore[union-attr]
    assert (search.trials, search.round, search.folder) == (3, 4, Path("runs/study"))
    assert search.base == ("--config=experiment.yaml", "--data.batch_size=2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trials: 10": "trails: 10"}, "study.yaml:7: trails: unknown key 'trails'. Did you mean 'trials'?"),
        ({"trials: 10": "trials: 0"}, "study.yaml:7: trials: expected a whole number of at least 1, got 0"),
        ({"trials: 10": "sampler: tpa"}, "sampler: unknown sampler 'tpa'. Did you mean 'tpe'?"),
        ({"trials: 10": "name: ../x"}, "name: expected a relative path without '..', got '../x'"),
        ({"low: 1e-4": "low: 1"}, "space.model.optimizer.lr: expected low below high, got 1 and 0.1"),
        ({"low: 1e-4": "low: 0"}, "space.model.optimizer.lr: expected low above 0 with log: true, got 0"),
        ({"low: 1e-4, ": ""}, "space.model.optimizer.lr: expected a number for low, got None"),
        ({"log: true": "lag: true"}, "space.model.optimizer.lr: unknown key 'lag'. Did you mean 'log'?"),
        ({"[0.0, 0.1, 0.2]": "[0.1]"}, "space.model.dropout: expected at least two values, all different"),
        ({"[0.0, 0.1, 0.2]": "0.1"}, "space.model.dropout: expected a list of values, or {low: NUMBER"),
        ({"high: 4": "high: 4.0"}, "study.yaml:6: space.model.num_layers: expected a whole number, got"),
        ({"[0.0, 0.1, 0.2]": "[0.1, much]"}, "study.yaml:5: space.model.dropout: expected a number, got 'much'"),
        ({"model.dropout": "model.dropuot"}, "unknown key 'model.dropuot'. Did you mean 'dropout'?"),
        ({"model.dropout": "seed"}, "space.seed: seed is set by the study"),
        ({STUDY.split("space:")[1].split("trials")[0]: " {}\n"}, "space: expected keys and their values"),
        ({"experiment.yaml": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_search_is_checked(change: dict[str, str], says: str, experiment: Path) -> None:
    text = STUDY
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    Path("study.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read("study.yaml", {}, [])
    assert len(caught.value.problems) == 1
    assert says in str(caught.value), str(caught.value)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = llmkit("tune", "--config", "study.yaml")
    assert (result.code, result.err) == (
        2,
        "llmkit: error: tune needs the package optuna: pip install 'llmkit[tune]'\n",
    )


# Suggestions


def bowl(values: dict[str, Any]) -> float | None:
    """The lower the nearer x is to 0.003 and n to 1; some diverge."""
    if values["x"] > 0.05:
        return None
    x = math.log10(values["x"])
    return (x + 2.5) ** 2 + 0.1 * int(values["n"]) + (0.3 if values["c"] == "a" else 0)


def suggested(sampler: str, rounds: Sequence[int]) -> list[dict[str, Any]]:
    suggester = Suggester(SPACE, sampler, 0, "min")
    found = []
    for count in rounds:
        asked = suggester.ask(count)
        found += asked
        suggester.tell(list(map(bowl, asked)))
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_suggestions_depend_on_results_alone(sampler: str) -> None:
    """A study that is rebuilt from its results resumes with the same suggestions, diverged trials included."""
    pytest.importorskip("optuna")
    pytest.importorskip("scipy")
    rounds = [4, 4] if sampler == "gp" else [4, 4, 4, 4]
    found = suggested(sampler, rounds)
    assert suggested(sampler, rounds) == found
    assert suggested(sampler, [*rounds[:-1], 2]) == found[:-2], "fewer trials are the first ones of more"
    assert any(bowl(values) is None for values in suggested("random", [16]))
    for values in found:
        assert 1e-4 <= values["x"] <= 1e-1 and values["n"] in range(1, 5) and values["c"] in ("a", [1])
        assert float(f"{values['x']:.4g}") == values["x"]


def test_importance() -> None:
    pytest.importorskip("optuna")
    found = [(values, bowl(values)) for values in suggested("random", [40])]
    shares = importances(SPACE, "min", found)
    assert sum(shares.values()) == pytest.approx(1) and max(shares, key=lambda key: shares[key]) == "x"
    mirrored = [(values, None if value is None else -value) for values, value in found]
    assert importances(SPACE, "max", mirrored) == pytest.approx(shares)
    assert importances(SPACE, "min", found[:2]) == {}
    assert importances(SPACE, "min", [(values, 1.0) for values, _ in found]) == {}


# Searches

BUILT: dict[str, Any] = {}
"""Configs that were built, by their words."""


class Fake:
    """An executor that trains nothing: the best are a learning rate of 0.003, no dropout, one layer."""

    stop_after = 10**9
    asked: ClassVar[list[str]] = []

    def __init__(self, plan: Any) -> None:
        self.plan, self.failed = plan, dict[str, str]()

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        for cell in cells:
            if len(Fake.asked) == Fake.stop_after:
                raise Stopped(15)
            given = dict(word.removeprefix("--").split("=", 1) for word in cell.words)
            if "fails" in Path("study.yaml").read_text() and len(Fake.asked) == 5:
                self.failed[cell.name] = "out of memory"
                continue
            Fake.asked.append(cell.name)
            rate = float(given["model.optimizer.lr"])
            loss = (math.log10(rate) + 2.5) ** 2 + float(given["model.dropout"]) + 0.1 * int(given["model.num_layers"])
            run = self.plan.root / cell.name / "version_0"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(f"step,val_loss\n1,{loss + 1}\n3,{loss}\n")
            outcome = {"diverged": rate > 0.02, "run": "version_0", "metrics": ["val_loss"]}
            (run.parent / OUTCOME).write_text(json.dumps(outcome))


@pytest.fixture
def faked(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell trains, figures are empty, and a config is built once."""
    pytest.importorskip("optuna")
    pytest.importorskip("scipy")
    build = match.variants

    def once(study: Any, how: Any) -> Any:
        key = json.dumps([study.base, study.variants])
        if key not in BUILT:
            BUILT[key] = build(study, how)
        return BUILT[key]

    def touch(figure: Any, path: Path) -> None:
        for kind in ("png", "pdf"):
            path.with_suffix(f".{kind}").touch()

    monkeypatch.setattr(command, "executor", Fake)
    monkeypatch.setattr(trials, "variants", once)
    monkeypatch.setattr(drawing, "save", touch)
    monkeypatch.setattr(Fake, "asked", [])
    monkeypatch.setattr(Fake, "stop_after", 10**9)


def test_a_search_that_is_stopped(faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan; stopped in two rounds, and resumed: the same trials and the same report as without."""
    printed = done("tune", "--config", "study.yaml", "--plan").out
    assert re.search(r"^model.optimizer.lr +0.0001 to 0.1, by logarithm$", printed, re.M)
    assert "10 trials in rounds of 4, suggested by tpe; lowest val_loss wins" in printed
    assert "256 tokens and" in printed and re.search(r"^3 +[\d.]+ +0.\d +\d$", printed, re.M)
    assert not Path("runs").exists()

    folder = Path("runs/study")
    for stop in (2, 6):
        monkeypatch.setattr(Fake, "stop_after", stop)
        assert llmkit("tune", "--config", "study.yaml").code == 143
    assert not (folder / "results.json").exists()
    monkeypatch.setattr(Fake, "stop_after", 10**9)
    printed = done("tune", "--config", "study.yaml").out
    assert len(Fake.asked) == len(set(Fake.asked))

    results = json.loads((folder / "results.json").read_text())
    rows = results["trials"]
    assert [row["trial"] for row in rows] == list(range(10))
    losses = {row["trial"]: row["value"] for row in rows if row["state"] == "ended"}
    assert results["best"] == min(losses, key=lambda trial: losses[trial]) and len(losses) < 10
    assert {row["state"] for row in rows if row["values"]["model.optimizer.lr"] > 0.02} == {"diverged"}
    ran = [row for row in rows if row["same_as"] is None]
    assert len(ran) == len(Fake.asked)
    assert [row["tokens"] for row in ran] == [4 * 4 * 16] * len(ran)
    assert f"Budget: 10 of 10 trials, {256 * len(ran):,} training tokens" in printed
    assert f"Best of 10 trials: {results['best']}, val_loss {losses[results['best']]:.4g}." in printed
    with (folder / "trials.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert [float(row["model.optimizer.lr"]) for row in table] == [row["values"]["model.optimizer.lr"] for row in rows]
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 3 and "The test data were not read." in page
    assert not re.search(r'(src|href)="(https?:)?//', page)

    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    done("tune", "--report", folder)
    done("tune", "--config", "study.yaml", "--name", "other")
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    other = json.loads(Path("runs/other/results.json").read_text())
    assert {**other, "name": "study", "config": results["config"]} == results


def test_a_failed_run_stops_the_search(faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda results: {})
    Path("study.yaml").write_text(STUDY + "# fails\n")
    result = llmkit("tune", "--config", "study.yaml")
    assert result.code == 1
    assert "The search stopped because 3 run(s) failed; the same command tries them again." in result.out
    assert "Budget: 5 of 10 trials" in result.out
    assert "out of memory" in Path("runs/study/report.html").read_text()
    Path("study.yaml").write_text(STUDY)
    rows = json.loads(Path("runs/study/results.json").read_text())["trials"]
    assert "Budget: 10 of 10 trials" in done("tune", "--config", "study.yaml").out
    assert json.loads(Path("runs/study/results.json").read_text())["trials"][: len(rows)] == rows


def test_values_that_cannot_be_built(faked: None) -> None:
    """A width that the heads do not divide is no failure of a run: such trials count as the worst."""
    text = STUDY.replace("model.num_layers: {low: 1, high: 4}", "model.num_layers: [1]\n  model.dim: [32, 30]")
    Path("study.yaml").write_text(text.replace("model.num_layers: [1]", "model.num_layers: [1, 2]"))
    done("tune", "--config", "study.yaml", "--trials", "4", "--metric", "val_loss")
    rows = json.loads(Path("runs/study/results.json").read_text())["trials"]
    refused = [row for row in rows if row["state"] == "refused"]
    assert refused and all(row["values"]["model.dim"] == 30 and row["tokens"] == 0 for row in refused)
    assert all("num_heads" in row["why"] for row in refused)
    assert len(Fake.asked) == len([row for row in rows if row["state"] != "refused" and row["same_as"] is None])


def test_mistakes_in_the_base_config(faked: None) -> None:
    for words, says in (
        (("--metric", "val_los"), "metric: unknown metric 'val_los'. Did you mean 'val_loss'?"),
        (("--data.validation_share", "0"), "tune needs validation data: see data.validation"),
        (("--model.dmi", "3"), "unknown key 'model.dmi'. Did you mean 'dim'?"),
        (("--trials", "0"), "must be at least 1, got 0"),
    ):
        result = llmkit("tune", "--config", "study.yaml", *words)
        assert result.code == 2 and result.err.count("error:") == 1 and says in result.err
    assert not Path("runs").exists()
    assert "tune needs a study: --config FILE" in llmkit("tune").err
    assert "--report nowhere: no results.json of a search there" in llmkit("tune", "--report", "nowhere").err


class Here:
    """An executor that trains in this process."""

    def __init__(self, plan: Any) -> None:
        self.root, self.failed = plan.root, dict[str, str]()

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        assert [fit_cell(self.root / cell.name, cell, 1) for cell in cells] == [0] * len(cells)


def test_a_search_that_trains(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best config runs, and with its seed it gives the best trial's result to the last bit."""
    pytest.importorskip("optuna")
    pytest.importorskip("scipy")
    monkeypatch.setattr(command, "executor", Here)
    shipped = yaml.safe_load((Path(__file__).parent.parent / "configs" / "tune.yaml").read_text())
    shipped.update(base="experiment.yaml", overrides={"trainer.limit_val_batches": 1}, trials=3)
    shipped["space"]["model.num_layers"]["high"] = 2
    Path("study.yaml").write_text(yaml.safe_dump(shipped))
    done("tune", "--config", "study.yaml", "--round", "2")
    folder = Path("runs/study")
    results = json.loads((folder / "results.json").read_text())
    assert [row["state"] for row in results["trials"]] == ["ended"] * 3
    assert [row["steps"] for row in results["trials"]] == [4] * 3
    best = results["trials"][results["best"]]
    done("fit", "--config", folder / "best.yaml")
    (run,) = Path("runs/study-best").glob("version_*")
    with (run / "metrics.csv").open() as handle:
        values = [row["val_loss"] for row in csv.DictReader(handle) if row["val_loss"]]
    assert float(values[-1]) == best["value"]
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}

"""Studies of sizes: what they are asked, their grid, their stages, and that they can be stopped anywhere."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command import done, llmkit, once

from llmkit.commands.cell import fit_cell
from llmkit.commands.scale import study as command
from llmkit.errors import Stopped, UserError
from llmkit.study.outcomes import OUTCOME, Cell
from llmkit.study.scaling import figures, grid
from llmkit.study.scaling.spec import Power, ScaleStudy, read
from llmkit.study.scaling.surface import Surface
from llmkit.study.spec import Tune

pytest.importorskip("scipy")
EXPERIMENT = """
data: {train: text.txt, validation_share: 0.1, tokenizer: char, batch_size: 4}
model: {dim: 32, num_layers: 1, context: 16, attention: {name: multi_head, num_heads: 4}}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
"""
STUDY = """
base: experiment.yaml
widths: [8, 16, 32]
head_width: 8
budgets: [1.0e+8, 3.0e+8, 1.0e+9]
hold_out: 4.0e+9
ratio: [0.01, 10000]
repeat: true
"""
SURFACE = Surface(1.2, 6.0, 40.0, 0.3, 0.35)
BUILT: dict[str, list[grid.Size]] = {}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    Path("experiment.yaml").write_text(EXPERIMENT)
    Path("study.yaml").write_text(STUDY)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head_width": "head_widt"}, "head_widt: unknown key 'head_widt'. Did you mean 'head_width'?"),
        ({"widths: [8, 16, 32]": ""}, "widths: expected widths or params, one of the two: the sizes"),
        (
            {"widths: [8, 16, 32]": "widths: [8, 12]"},
            "widths: expected whole numbers that head_width 8 divides, got 12",
        ),
        ({"widths: [8, 16, 32]": "params: [1e5]"}, "params: sizes by parameters need a depth"),
        ({"budgets": "tokens_per_param: [20]\nbudgets"}, "budgets: expected budgets or tokens_per_param"),
        ({"3.0e+8": "x"}, "budgets: expected numbers above 0"),
        ({"ratio: [0.01, 10000]": "ratio: [5, 1]"}, "ratio: expected the fewest and the most tokens a parameter"),
        ({"repeat: true": "repeat: 3"}, "repeat: expected true or false, got 3"),
        ({"repeat: true": "learning_rate: best"}, "learning_rate: expected a rule: fixed, power, tune"),
        ({"repeat: true": "learning_rate: power"}, "learning_rate: power needs the width"),
        ({"repeat: true": "learning_rate: {rule: tune, point: 3}"}, "learning_rate: unknown key 'point'. Did you mean"),
        (
            {"repeat: true": "variants: {a: {data.train: x}}"},
            "data.train would change the tokens or the validation text",
        ),
        ({"repeat: true": "depth: {by_width: 3}"}, "depth: expected a number of layers or {per_width: NUMBER}"),
        ({"repeat: true": "schedule: branches"}, "schedule: expected run (each run has its own) or trunk"),
        ({"repeat: true": "warmup: 2"}, "warmup: expected a share of the steps from 0 to 1, got 2"),
        ({"repeat: true": "seeds: 0"}, "seeds: expected a whole number of at least 1, got 0"),
    ],
)
def test_a_study_is_checked(change: dict[str, str], says: str, experiment: Path) -> None:
    text = STUDY
    for old, new in change.items():
        text = text.replace(old, new)
    Path("study.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read("study.yaml", {}, [])
    assert len(caught.value.problems) == 1
    assert re.match(r"study.yaml(:\d+)?: ", str(caught.value)) and says in str(caught.value)


def test_sizes_from_parameters_and_learning_rates(experiment: Path) -> None:
    text = STUDY.replace("widths: [8, 16, 32]", "params: [1.0e+5, 1.0e+6]\ndepth: {per_width: 16}")
    Path("study.yaml").write_text(text + "learning_rate: {rule: power, width: 64, exponent: -1}\n")
    found = read("study.yaml", {"seeds": 3}, [])
    # 12 x 3 layers x 48^2 = 82,944 and 12 x 7 layers x 112^2 = 1,053,696
    assert [(width, found.layers(width)) for width in found.widths] == [(48, 3), (112, 7)]
    assert (found.learning_rate, found.seeds, found.hold_out) == (Power(64, -1), 3, (4e9,))
    shipped = read(str(Path(__file__).parent.parent / "docs" / "studies" / "scaling" / "sizes.yaml"), {}, [])
    assert shipped.folder == Path("runs/sizes")
    rule = grid.interpolated({1e4: 0.01, 1e6: 0.001})
    assert rule(1e5) == pytest.approx(math.sqrt(0.01 * 0.001))


class Fake:
    """An executor that trains nothing: a cell's loss is that of a surface, at its best learning rate of 0.002."""

    stop_after = 10**9
    asked: ClassVar[list[str]] = []
    begun: ClassVar[dict[str, str]] = {}
    broken = r"-d8-1e.08"

    def __init__(self, plan: Any) -> None:
        self.plan, self.failed = plan, dict[str, str]()

    def __call__(self, cells: Sequence[Cell], total: int) -> None:
        for cell in cells:
            if len(Fake.asked) >= Fake.stop_after:
                raise Stopped(15)
            Fake.asked.append(cell.name)
            if cell.begins is not None:
                Fake.begun[cell.name] = cell.begins
            if "-4e+09" in cell.name:
                assert Path("runs/study/predictions.json").is_file(), "predicted before it runs"
            given = dict(word.removeprefix("--").split("=", 1) for word in cell.words)
            width, steps = int(given["model.dim"]), int(given["trainer.max_steps"])
            loss = SURFACE.loss(12 * width**2 + 2 * width, steps * 64)
            if cell.begins is not None:
                share = "0" if cell.name.startswith("trunk/") else "0.2"
                assert given["model.scheduler.decay_share"] == share, "not that of the trunk's checkpoint"
            rate = float(given.get("model.optimizer.lr", 0.002))
            loss += 0.05 * math.log(rate / 0.002) ** 2
            run = self.plan.root / cell.name / "version_0"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(f"step,val_loss,val_bits_per_byte\n{steps - 1},{loss},{loss / 2}\n")
            outcome = {"diverged": bool(re.search(Fake.broken, cell.name)), "run": "version_0", "metrics": ["val_loss"]}
            (run.parent / OUTCOME).write_text(json.dumps(outcome))


@pytest.fixture
def faked(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell trains, nothing is drawn (test_scaling looks at figures), and the same sizes are built once."""
    build = grid.sizes

    def once(study: ScaleStudy, how: Any) -> list[grid.Size]:
        layers = [study.layers(width) for width in study.widths]
        key = repr((study.base, study.variants, study.widths, study.head_width, layers))
        if key not in BUILT:
            BUILT[key] = build(study, how)
        return copy.deepcopy(BUILT[key])

    monkeypatch.setattr(command, "executor", Fake)
    monkeypatch.setattr(command, "DRAWS", 10)
    monkeypatch.setattr(grid, "sizes", once)
    monkeypatch.setattr(figures, "draw", lambda results: {})
    monkeypatch.setattr(Fake, "asked", [])
    monkeypatch.setattr(Fake, "begun", {})
    monkeypatch.setattr(Fake, "stop_after", 10**9)


def test_a_study_of_sizes(faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan; stopped within the grid and within the hold-out, and resumed: the same report as without."""
    plan = done("scale", "--config", "study.yaml", "--plan").out
    assert re.search(r"^1e\+08 +3 +8 to 32 +\d+ to \d+ ", plan, re.M)
    assert re.search(r"^4e\+09 \(held out\) +3 ", plan, re.M)
    assert "12 runs, " in plan and " hours, one run at a time" in plan
    assert re.search(
        r"^model: exponent of N\* 0.\d+ \(truly 0.\d+\), 90 % interval 0.\d+ to 0.\d+, if alpha is 0.34", plan, re.M
    )
    assert not Path("runs").exists()

    folder = Path("runs/study")
    for stop in (4, 10):
        monkeypatch.setattr(Fake, "stop_after", stop)
        assert llmkit("scale", "--config", "study.yaml").code == 143
        assert (folder / "predictions.json").is_file() == (stop == 10)
    monkeypatch.setattr(Fake, "stop_after", 10**9)
    foretold = (folder / "predictions.json").read_bytes()
    printed = done("scale", "--config", "study.yaml").out
    assert len(Fake.asked) == len(set(Fake.asked)) == 12
    assert printed.startswith("size ") and "Of 3 runs that were held out: " in printed
    assert (folder / "predictions.json").read_bytes() == foretold

    results = json.loads((folder / "results.json").read_text())
    variant = results["variants"]["model"]
    assert results["failed"] == [next(name for name in Fake.asked if "d8-1e+08" in name) + ": diverged"]
    assert variant["runs"] == 8
    assert {point["bits_per_byte"] / point["loss"] for point in variant["points"]} == {0.5}
    rows = json.loads(foretold)
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in variant["held_out"]]
    assert [row["C"] for row in rows] == pytest.approx([4e9] * 3, rel=0.01)

    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    done("scale", "--report", folder)
    done("scale", "--config", "study.yaml", "--name", "other")
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    other = json.loads(Path("runs/other/results.json").read_text())
    assert {**other, "name": "study"} == results


TRUNK = STUDY.replace("repeat: true", "repeat: true\nschedule: trunk\noverrides: {model.scheduler: wsd}")


def test_a_study_on_trunks(faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size has one trunk, which is trained and counted once; a study that was stopped runs no cell twice."""
    Path("study.yaml").write_text(TRUNK)
    plan = done("scale", "--config", "study.yaml", "--plan").out
    found = re.search(r"12 runs, decays of 3 trunks \(runs of their own would be (\S+) FLOPs\), (\S+) FLOPs;", plan)
    assert found and float(found[1]) == pytest.approx(3 * 5.4e9, rel=0.02)
    # The trunks are 0.8 of the longest run, and each run's decay is 0.2 of it.
    assert float(found[2]) == pytest.approx(3 * (0.8 * 4e9 + 0.2 * 5.4e9), rel=0.03)

    monkeypatch.setattr(Fake, "stop_after", 17)
    assert llmkit("scale", "--config", "study.yaml").code == 143
    monkeypatch.setattr(Fake, "stop_after", 10**9)
    done("scale", "--config", "study.yaml")
    assert len(Fake.asked) == len(set(Fake.asked)) == 24
    assert json.loads(Path("runs/study/results.json").read_text())["variants"]["model"]["runs"] == 8
    assert "share one trunk" in Path("runs/study/report.html").read_text()


def test_runs_begin_from_their_trunk(faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it, and on one of their size; what begins from a trunk that diverged is listed and not run."""
    Path("study.yaml").write_text(TRUNK.replace("widths: [8, 16, 32]", "widths: [8, 16, 24, 32]"))
    monkeypatch.setattr(Fake, "broken", "trunk/model-d24-")
    result = llmkit("scale", "--config", "study.yaml")
    failed = json.loads(Path("runs/study/results.json").read_text())["failed"]
    assert result.code == 0 and len(failed) == 4, (result, failed)
    assert all(re.fullmatch(r"final/model-d24-\S+: diverged", line) for line in failed), failed
    assert sum(name.startswith("trunk/") for name in Fake.asked) == 3 * 4 + 1
    assert Fake.begun.keys() <= set(Fake.asked) and len(Fake.begun) == 3 * (3 + 4)
    for name, begins in Fake.begun.items():
        assert Fake.asked.index(begins) < Fake.asked.index(name) and begins.startswith("trunk/")
        widths = {re.split("[/-]", path)[2] for path in (name, begins)}
        assert len(widths) == 1, (name, begins)
    Path("study.yaml").write_text(f"{TRUNK}warmup: 0.9\n")
    result = llmkit("scale", "--config", "study.yaml")
    assert result.code == 2 and re.search(
        r"error: warmup: the decay of model-d8-1e\+08 begins at step \d+, within the warmup", result.err
    )


def test_a_branch_is_a_run_of_its_own(experiment: Path) -> None:
    """Cells of a trunk and a branch of it, a fit that is resumed by hand, and one without a trunk: the same weights."""
    words = ("--config=experiment.yaml", "--model.dim=8", "--model.scheduler=wsd", "--model.scheduler.warmup_steps=2")
    constant, decays, seed = "--model.scheduler.decay_share=0", "--model.scheduler.decay_share=0.2", "--seed=0"
    cells = [
        Cell("trunk/a/seed0", (*words, constant, seed, "--trainer.max_steps=8"), "a", 0),
        Cell("trunk/b/seed0", (*words, constant, seed, "--trainer.max_steps=16"), "b", 0, begins="trunk/a/seed0"),
        Cell("final/c/seed0", (*words, decays, seed, "--trainer.max_steps=20"), "c", 0, begins="trunk/b/seed0"),
    ]
    with once():
        for cell in cells:
            assert fit_cell(Path("cells", cell.name), cell, 1) == 0
    last = Path("version_0", "checkpoints", "last.ckpt")
    trunk = Path("cells", cells[1].name) / last
    by_hand = done("fit", *cells[-1].words, "--ckpt_path", trunk, "--name", "hand").folder.parent / last
    alone = done("fit", *cells[-1].words, "--name", "alone").folder.parent / last
    files = (Path("cells", cells[-1].name) / last, by_hand, alone)
    branch, *others = (torch.load(file, weights_only=True) for file in files)
    assert branch["global_step"] == 20 and torch.load(trunk, weights_only=True)["global_step"] == 16
    for other in others:
        assert all(torch.equal(value, other["state_dict"][name]) for name, value in branch["state_dict"].items())
        assert str(branch["optimizer_states"]) == str(other["optimizer_states"])


def test_learning_rates_are_tuned_at_two_sizes(faked: None) -> None:
    text = STUDY.replace("hold_out: 4.0e+9", "learning_rate: {rule: tune, points: 3, factor: 2}")
    Path("study.yaml").write_text(text)
    assert isinstance(read("study.yaml", {}, []).learning_rate, Tune)
    done("scale", "--config", "study.yaml")
    tuned = json.loads(Path("runs/study/results.json").read_text())["learning_rates"]
    assert [row["point"] for row in tuned] == ["model-d8-3e+08", "model-d32-3e+08"]
    assert all(row["value"] == pytest.approx(0.002, rel=0.5) and not row["at_edge"] for row in tuned)
    final = [name for name in Fake.asked if name.startswith("final/")]
    assert len(final) == 9 and len(Fake.asked) >= 9 + 2 * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({", 1.0e+9]": "]", "16, 32": "16"}, "4 runs; a surface has 5 parameters and needs more"),
        ({"1.0e+8": "1.0e+5"}, "budgets: 1e+05 FLOPs are less than 10 steps of every size; the smallest makes 0"),
        ({"0.01, 10000": "5000, 10000"}, "tokens a parameter, and ratio allows 5000 to 10000: no size fits"),
        (
            {"repeat: true": ""},
            "times; repeated tokens are worth less than new ones: give more data or smaller budgets",
        ),
        (
            {"repeat: true": "repeat: true\nmetric: val_los"},
            "metric: unknown metric 'val_los'. Did you mean 'val_loss'?",
        ),
        (
            {"budgets: [1.0e+8, 3.0e+8, 1.0e+9]": "tokens_per_param: [1.0e-3]"},
            "steps of width 8; a run has at least 10",
        ),
        (
            {"repeat: true": "repeat: true\nschedule: trunk"},
            "schedule: trunk needs model.scheduler: wsd with a decay, but the schedule is WarmupCosine; set it in",
        ),
    ],
)
def test_a_grid_that_does_not_fit(change: dict[str, str], says: str, faked: None) -> None:
    text = STUDY
    for old, new in change.items():
        text = text.replace(old, new)
    Path("study.yaml").write_text(text)
    result = llmkit("scale", "--config", "study.yaml")
    assert result.code == 2 and result.err.count("error:") == 1
    assert says in result.err
    assert not Path("runs").exists()


def test_no_study() -> None:
    assert "scale needs a study: --config FILE, or a table of runs" in llmkit("scale").err
    assert "--report nowhere: no results.json of scaling laws there" in llmkit("scale", "--report", "nowhere").err

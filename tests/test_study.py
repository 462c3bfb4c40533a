"""Studies: what they are asked, what their variants cost, and cells that survive being killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import study_fakes
from command import parser_once
from study_fakes import STEPS, cells, count, descendants, everything
from torch import nn

from llmkit.commands import compare
from llmkit.commands.cell import devices, one_device
from llmkit.commands.fit import run_instead
from llmkit.config.plan import plan
from llmkit.errors import Stopped, UserError, each_note_once, note
from llmkit.main import main
from llmkit.run.cli import CLI
from llmkit.study import calibrate, figures
from llmkit.study.calibrate import Timing
from llmkit.study.cells import StudyPlan
from llmkit.study.execute import Local, locked
from llmkit.study.match import Variant, better_side, variants
from llmkit.study.outcomes import OUTCOME, outcome_of
from llmkit.study.spec import Study, Tune, read, words
from llmkit.testing.invariance import build

ROOT = Path(__file__).parent.parent
EXPERIMENT = """
data: {train: text.txt, validation_share: 0.1, tokenizer: char, batch_size: 4}
model: {dim: 32, num_layers: 2, context: 16, attention: {name: multi_head, num_heads: 4}}
trainer: {max_steps: 4, val_check_interval: 2, accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture(autouse=True)
def _parser_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "setup_parser", parser_once)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    Path("experiment.yaml").write_text(EXPERIMENT)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("variants: {a: {}}", "study.yaml:1: variants: expected 2 to 50 variants"),
        (
            "variants: {a: {}, b: {}}\nbaselin: a",
            "study.yaml:2: baselin: unknown key 'baselin'. Did you mean 'baseline'?",
        ),
        ("variants: {a: {}, b: {}}\nbaseline: c", "study.yaml:2: baseline: unknown variant 'c'."),
        ("variants: {a: {}, b: lstm}", "study.yaml:1: variants.b: expected the keys that it sets"),
        ("variants: {a/b: {}, b: {}}", "variants.a/b: the name becomes a folder"),
        ("variants: {a: {}, b: {}}\nmatch: parameters", "match: unknown match 'parameters'. Did you mean 'params'?"),
        ("variants: {a: {}, b: {}}\nalso: params", "also: unknown match 'params'. Allowed: flops, none, time."),
        ("variants: {a: {}, b: {}}\nseeds: 0", "study.yaml:2: seeds: expected a whole number of at least 1, got 0"),
        ("variants: {a: {}, b: {}}\nmargin: -1", "margin: expected a number above 0, got -1"),
        (
            "variants: {a: {}, b: {}}\ntune: {model.optimizer.lr: {point: 5}}",
            "key 'point'. Did you mean 'points'?",
        ),
        ("variants: {a: {}, b: {}}\ntune: 3", "tune: expected one key and how it is tuned"),
        ("variants: {a: {}, b: {}}\nexecutor: slurn", "executor: unknown executor 'slurn'. Did you mean 'slurm'?"),
        ("variants: {a: {}, b: {}}\nexecutor: {partition: gpu}", "executor: expected local, slurm, ray, or a name and"),
        (
            "variants: {a: {}, b: {}}\nexecutor: {name: ray, adress: x}",
            "study.yaml:2: executor.adress: unknown key 'adress'. Did you mean 'address'?",
        ),
        ("variants: {a: {}, b: {}}\ncells_per_gpu: 0", "cells_per_gpu: expected a whole number of at least 1, got 0"),
        ("variants: {a: {}, b: {}}\nname: ../x", "name: expected a relative path without '..', got '../x'"),
    ],
)
def test_a_study_is_checked(text: str, says: str, experiment: Path) -> None:
    Path("study.yaml").write_text(f"{text}\nbase: experiment.yaml\n")
    with pytest.raises(UserError) as caught:
        read("study.yaml", None, {}, [])
    assert len(caught.value.problems) == 1
    assert says in str(caught.value)


def test_a_study_without_a_file(experiment: Path) -> None:
    study = read("experiment.yaml", "model.dim=16,32", {"seeds": 3}, ["--data.batch_size=2"])
    assert study.variants == {"16": {"model.dim": 16}, "32": {"model.dim": 32}}
    assert (study.baseline, study.seeds, study.name) == ("16", 3, "compare")
    assert study.base == ("--config=experiment.yaml", "--data.batch_size=2")
    with pytest.raises(UserError, match="^command line: match: unknown match 'flop'"):
        read("experiment.yaml", "model.dim=16,32", {"match": "flop"}, [])
    for vary in (None, "model.dim", "model.dim=16"):
        with pytest.raises(UserError, match="KEY="):
            read("experiment.yaml", vary, {}, [])


# Cells


def test_cells_that_are_killed_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Parent, fork server and cells get SIGKILL by turns; the same command is given again each time.

    Another study runs in the same folder, undisturbed. A step waits for a kill that comes first, however slow this
    process is; and as each fifth kill begins a new parent, no cell is lost as often as it may be.
    """
    undisturbed, root, other = tmp_path / "undisturbed", tmp_path / "runs" / "killed", tmp_path / "runs" / "other"
    assert study_fakes.study(undisturbed) == {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def steps() -> int:
        return sum(len(path.read_text().splitlines()) for path in root.rglob("steps.txt"))

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, study_fakes.__file__, str(folder)], env=environment)

    def allow(more: float) -> None:
        (root.parent / "part").write_text(str(more))
        (root.parent / "part").replace(root / study_fakes.ALLOWED)

    root.mkdir(parents=True)
    allow(0)
    kills, parent, neighbour = 0, start(root), start(other)
    while parent.poll() != 0:
        before = steps()
        allow(before + 1 if kills < 10 else math.inf)
        while parent.poll() is None and (steps() == before or kills == 10):
            time.sleep(0.01)
        if parent.poll() is None:
            kills += 1
            alive = [parent.pid, *descendants(parent.pid)]
            for victim in alive if kills % 5 == 0 else [alive[kills % len(alive)]]:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        elif parent.returncode:
            assert parent.returncode == -signal.SIGKILL
            parent = start(root)
    assert kills == 10
    assert neighbour.wait() == 0
    assert everything(root) == everything(other) == everything(undisturbed)
    assert len(everything(root)) == 3 * 12


def test_a_failed_cell_is_named_and_the_rest_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(tmp_path, workers=2, threads=1, run=count, preload=["study_fakes"])
    wanted = cells("a", "broken", seeds=1)
    local(wanted, len(wanted))
    assert local.failed == {"final/broken/seed0-0": "nothing to count"}
    assert "final/broken/seed0-0 failed: nothing to count" in capsys.readouterr().err
    assert outcome_of(tmp_path / wanted[0].name, "val_loss") == (0.1, [(STEPS, 0.1)])
    assert outcome_of(tmp_path / wanted[1].name, "val_loss") is None


def test_cells_are_asked_once_to_stop(tmp_path: Path) -> None:
    """A second signal would stop them at once, without saving."""
    wanted = cells("a", seeds=2)

    def interrupt() -> None:
        while len(list(tmp_path.rglob("begun.txt"))) < len(wanted):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped):
        Local(tmp_path, 2, 1, study_fakes.patient, ["study_fakes"])(wanted, len(wanted))
    assert [(tmp_path / cell.name / "asked.txt").read_text() for cell in wanted] == ["1", "1"]


def test_a_study_runs_once(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_each_cell_gets_a_device(tmp_path: Path) -> None:
    """None has more cells at once than it may have, and each has some."""
    for share in (1, 2):
        root = tmp_path / str(share)
        where = partial(study_fakes.where, together=2 * share)
        local = Local(root, None, 3, where, ["study_fakes"], devices=["4", "7"], share=share)
        local(cells("a", "bb", seeds=3), 6)
        rows = [json.loads(file.read_text()) for file in root.rglob("where.json")]
        assert {row["threads"] for row in rows} == {3}
        for device in ("4", "7"):
            spans = [(row["begin"], row["end"]) for row in rows if row["device"] == device]
            at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
            assert max(at_once) == share
        assert len(rows) == 6
    with pytest.raises(UserError, match=r"workers: 5 cells at once, but 2 GPU\(s\) hold 4: see cells_per_gpu"):
        Local(tmp_path, 5, 1, count, [], devices=["4", "7"], share=2)


def test_a_run_sees_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, one in (("4,7", "4"), ("GPU-1", "GPU-1"), ("", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with one_device():
            assert os.environ["CUDA_VISIBLE_DEVICES"] == one
        assert os.environ["CUDA_VISIBLE_DEVICES"] == given
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices() == ["0", "1"]
    with one_device():
        assert devices() == ["0"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ

    with pytest.raises(UserError, match=r"trainer.devices: 2 processes; in a study each run is one process"):
        compare.one_process(lambda cli: 0)(SimpleNamespace(trainer=SimpleNamespace(world_size=2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_executor_that_is_not_installed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"executor: {name} needs {package}: pip install 'llmkit\[{name}\]'"):
        compare.executor(planned(tmp_path, executor={"name": name}))


# Tuning


def planned(tmp_path: Path, **changes: Any) -> StudyPlan:
    values: dict[str, Any] = {
        "name": "s", "output": str(tmp_path), "base": (), "variants": {"a": {}, "b": {}}, "baseline": "a",
        "match": "none", "tune": Tune("model.optimizer.lr", points=3), "seeds": 2, "metric": None, "margin": None,
        "workers": 1, "threads": 1, "cells_per_gpu": 1, "executor": {"name": "local"}, "also": None,
    }  # fmt: skip
    study = Study(**{**values, **changes})
    tree = {"model": {"optimizer": {"class_path": "x", "init_args": {"lr": 0.004}}}, "data": {}}
    facts = {"metric": "val_loss", "sides": {"val_loss": "min", "val_bleu": "max"}, "steps": 4}
    return StudyPlan(study, {name: Variant(name, [], tree, facts=facts) for name in study.variants})


def end(plan: StudyPlan, result: Any) -> list[str]:
    """Let all cells that have not ended end with ``result(cell)``, until there are no more; returns their names."""
    ended = []
    while left := [cell for cell in plan.cells() if plan.outcome(cell) is None]:
        for cell in left:
            run = plan.root / cell.name / "version_0"
            run.mkdir(parents=True)
            value = result(cell)
            (run / "metrics.csv").write_text(f"step,val_loss\n3,{value}\n")
            outcome = {"diverged": value is None, "run": "version_0", "metrics": ["val_loss"]}
            (run.parent / OUTCOME).write_text(json.dumps(outcome))
            ended.append(cell.name)
    return ended


def test_tuning_goes_past_an_edge_and_final_seeds_are_fresh(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    # a is best at 0.016, which is past the first grid of 0.002, 0.004, 0.008; b at 0.004, and diverges at 0.008.
    best = {"a": 0.016, "b": 0.004}

    def result(cell: Any) -> float | None:
        value = cell.value or 0.004
        return None if cell.variant == "b" and value == 0.008 else abs(value / best[cell.variant] - 1)

    names = end(plan, result)
    assert plan.values("a") == pytest.approx([0.002, 0.004, 0.008, 0.016, 0.032])
    assert plan.values("b") == pytest.approx([0.002, 0.004, 0.008])
    assert [plan.chosen(name)[0] for name in "ab"] == pytest.approx([0.016, 0.004])
    assert not any(plan.chosen(name)[1] for name in "ab")
    assert plan.tried("b", plan.values("b")[-1]) == [None]
    tuning = {int(name.partition("seed")[2].partition("-")[0]) for name in names if name.startswith("tune")}
    final = {int(name.partition("seed")[2].partition("-")[0]) for name in names if name.startswith("final")}
    assert tuning == {1000}
    assert final == {0, 1}
    assert len([name for name in names if name.startswith("tune")]) == 5 + 3
    assert len([name for name in names if name.startswith("final/a")]) == 4


def test_a_value_at_the_edge_is_reported(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    end(plan, lambda cell: -(cell.value or 0.004))
    assert len(plan.values("a")) == 3 + 2 * 3
    assert plan.chosen("a") == (max(plan.values("a")), True)


def test_of_equally_good_values_the_one_of_the_base_config_is_taken(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    end(plan, lambda cell: 1.0)
    assert plan.values("a") == pytest.approx([0.002, 0.004, 0.008])  # an edge that is no better is not followed
    assert plan.chosen("a") == (0.004, False)


def test_a_changed_config_gives_other_cells(tmp_path: Path) -> None:
    one, other = planned(tmp_path), planned(tmp_path)
    other.variants["b"].tree = {**other.variants["b"].tree, "trainer": {"max_steps": 5}}
    names = [{cell.name for cell in plan.cells() if cell.variant == "b"} for plan in (one, other)]
    assert not names[0] & names[1]
    assert {c.name for c in one.cells() if c.variant == "a"} == {c.name for c in other.cells() if c.variant == "a"}


def test_a_missing_metric_is_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, metric="val_bleu", tune=None)
    with pytest.raises(UserError, match="has no val_bleu; it has val_loss"):
        end(plan, lambda cell: 1.0)


# Variants


def test_variants_cost_the_same(experiment: Path) -> None:
    """Counted on networks that were built, not by the formula that matched them."""
    vary = "model.attention=multi_head,grouped_query,latent,linear,low_rank,lstm"
    given = {"match": "params", "also": "flops"}
    study = read("experiment.yaml", vary, given, ["--model.dim=64", "--model.num_layers=1"])
    found = variants(study, lambda work, argv: run_instead(work, argv, "compare"))
    base = sizes_of(found["multi_head"].words)
    for name, variant in found.items():
        assert variant.also is not None
        for match, one in (("params", variant), ("flops", variant.also)):
            ratio = sizes_of(one.words)[match] / base[match]
            assert ratio == pytest.approx(1, rel=0.01), name
            assert ratio - 1 == pytest.approx(one.left, abs=1e-9)


def sizes_of(argv: list[str]) -> dict[str, float]:
    """Return the parameters outside of tables, and three times torch's count of a forward pass's FLOPs a token."""
    found: dict[str, float] = {}

    def look(cli: Any) -> int:
        build(cli.model, cli.datamodule)
        net = cli.model.net
        tables = {id(p) for module in net.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        found["params"] = float(sum(p.numel() for p in net.parameters() if id(p) not in tables))
        found["flops"] = 3 * net.flops_per_position(cli.model.context)  # held to torch's counter by test_inspect
        return 0

    run_instead(look, argv, "compare")
    return found


def test_equal_time_by_the_number_of_steps(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once, kept in the study's folder; the second cost has variants of its own."""
    asked = []

    def measured(base: Any, other: Any) -> Timing:
        base()
        other()
        asked.append((base, other))
        return Timing(0.8, 0.02)

    monkeypatch.setattr(calibrate, "compared", measured)
    words = ["--trainer.max_steps=400", "--model.num_layers=1"]
    study = read("experiment.yaml", "model.attention=multi_head,lstm", {"match": "time", "also": "params"}, words)
    for times in (2, 2):
        found = variants(study, lambda work, argv: run_instead(work, argv, "compare"))
        assert len(asked) == times
        assert (found["multi_head"].matched, found["lstm"].matched) == ({}, {"trainer.max_steps": 500})
        assert found["lstm"].tree["trainer"]["max_steps"] == 500
        assert found["lstm"].left == 0
        assert [variant.costs["time"] for variant in found.values()] == [0.02, 0.02]
        also = {name: variant.also for name, variant in found.items()}
        assert also["multi_head"] and also["multi_head"].tree == found["multi_head"].tree
        assert also["lstm"] and also["lstm"].matched.keys() == {"model.feedforward.hidden_multiple"}
        assert also["lstm"].costs["params"] == pytest.approx(found["multi_head"].costs["params"], rel=0.01)
    assert len(json.loads((study.folder / "calibration.json").read_text())) == 2
    short = dataclasses.replace(study, base=(*study.base, "--trainer.max_steps=30"))
    with pytest.raises(UserError, match=r"variant lstm: cannot be matched in time: 38 steps take \+1.3%"):
        variants(short, lambda work, argv: run_instead(work, argv, "compare"))


def test_steps_are_timed_by_turns() -> None:
    """A machine that becomes ten times as slow meanwhile changes nothing; nor does a single hiccup."""
    now, calls = 0.0, 0

    def step(seconds: float) -> Any:
        def run() -> None:
            nonlocal now, calls
            calls += 1
            now += seconds * 1.0005**calls + (5 if calls == 40 else 0)

        return run

    timing = calibrate.compared(step(0.03), step(0.045), lambda: now)
    assert timing.ratio == pytest.approx(1.5, rel=0.01)
    assert timing.seconds == pytest.approx(0.046, rel=0.05)


def test_a_second_cost_has_runs_of_its_own(tmp_path: Path) -> None:
    """They are as many as differ in their config, and take the value that was tuned with the first."""
    plan = planned(tmp_path, also="flops")
    for name, variant in plan.variants.items():
        tree = variant.tree if name == "a" else {**variant.tree, "trainer": {"max_steps": 3}}
        variant.also = Variant(name, ["--other"], tree)
    names = end(plan, lambda cell: abs((cell.value or 0.004) / 0.008 - 1))
    assert sum(name.startswith("final/") for name in names) == 2 * 2 * 2
    assert [name.partition("-")[0] for name in names if name.startswith("final_flops/")] == [
        *("final_flops/b/seed0", "final_flops/b/seed1"),
    ]
    assert plan.final("a", "flops") == plan.final("a", "tuned")
    cell = plan.final("b", "flops")[0]
    assert (cell.words[0], cell.value) == ("--other", plan.chosen("b")[0])


def test_the_head_says_which_side_of_a_metric_is_better(experiment: Path) -> None:
    study = read("experiment.yaml", "model.dim=32,16", {"match": "none"}, [])
    sides = variants(study, lambda work, argv: run_instead(work, argv, "compare"))["32"].facts["sides"]
    assert {name: better_side(name, sides) for name in ("val_loss", "val_bits_per_byte", "train_loss")} == {
        **{"val_loss": "min", "val_bits_per_byte": "min", "train_loss": "min"},
    }
    with pytest.raises(UserError, match="metric: the head does not say whether more or less of val_unknown_share is"):
        better_side("val_unknown_share", sides)
    with pytest.raises(UserError, match="metric: unknown metric 'val_los'. Did you mean 'val_loss'?"):
        better_side("val_los", sides)
    sides = {"val_accuracy": "max", "val_accuracy_to_*": "max", "val_mse": "min"}
    assert better_side("val_accuracy_to_128", sides) == "max"


def test_a_variant_that_cannot_be_matched_is_refused(experiment: Path) -> None:
    study = read("experiment.yaml", "model.num_layers=2,40", {}, [])
    with pytest.raises(UserError, match="variant 40: cannot be matched in params: even at a feedforward of width 1 it"):
        variants(study, lambda work, argv: run_instead(work, argv, "compare"))


def test_mistakes_of_all_variants_are_reported_together(experiment: Path) -> None:
    study = read("experiment.yaml", "model.attention=multi_head,lstn,grv", {}, [])
    with pytest.raises(UserError) as caught:
        variants(study, lambda work, argv: run_instead(work, argv, "compare"))
    assert [str(problem)[:13] for problem in caught.value.problems] == ["variant lstn:", "variant grv: "]
    assert "Did you mean 'lstm'?" in str(caught.value)


def test_a_comparison(experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to its report; a cell is a fit, bit for bit; a second call has nothing left to run."""
    monkeypatch.setattr(figures, "draw", lambda *results: {})  # three times the same; test_study_report looks at them
    argv = ["compare", "--config", "experiment.yaml", "--vary", "model.attention=multi_head,lstm", "--seeds", "2"]
    assert main([*argv, "--cells"]) == 0
    assert main(["cell", "runs/compare", "9"]) == 2
    with os.fdopen(os.dup(1)) as stdout, os.fdopen(os.dup(2)) as stderr:  # a cell's output goes to its log
        assert main(["cell", "runs/compare", "0"]) == 0
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "4 final cells (1 done), matched by params" in printed.out
    assert "cells: 3 of 4 done" in printed.err
    results = json.loads(Path("runs/compare/results.json").read_text())
    width = results["variants"]["lstm"]["matched"]["model.feedforward.hidden_multiple"]
    fit = ["fit", "--config", "experiment.yaml", "--model.attention", "lstm", "--seed", "1", "--name", "alone"]
    assert main([*fit, "--model.feedforward.hidden_multiple", str(width)]) == 0
    curves = [
        curve(Path("runs/alone/version_0")),
        curve(*Path("runs/compare/cells/final/lstm").glob("seed1*/version_0")),
    ]
    assert curves[0] == curves[1]
    assert curves[0][-1][1] == results["variants"]["lstm"]["runs"]["base"]["1"]

    before = Path("runs/compare/report.html").read_bytes()
    assert main([*argv, "--workers", "2"]) == 0
    assert "4 final cells (4 done)" in capsys.readouterr().out
    assert main(["compare", "--report", "runs/compare"]) == 0
    assert Path("runs/compare/report.html").read_bytes() == before
    assert main([*argv, "--data.batch_size=2", "--plan"]) == 0
    assert "4 final cells (0 done)" in capsys.readouterr().out


def test_the_shipped_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Path(f"m{number}.py").write_text("def main(self):\n    return [1, 2, 3]\n" * 30)
    monkeypatch.setenv("STDLIB", str(tmp_path))
    assert main(["compare", "--config", str(ROOT / "configs" / "compare.yaml"), "--plan"]) == 0
    assert "18 final cells (0 done)" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_recorded_studies(file: Path) -> None:
    study = read(str(file), None, {}, [])
    for keys in study.variants.values():
        config = plan("fit", [*study.base, *words(keys)], "compare").config.tree
        assert config["model"]["dim"] == 64
        assert config["trainer"]["max_steps"] == {"mqar": 600, "parity": 400}.get(file.stem, 300)


def test_notes_on_the_base_config_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    with each_note_once():
        for text in ("a", "b", "a"):
            note(text)
    note("a")
    assert capsys.readouterr().err.splitlines() == [f"llmkit: note: {text}" for text in "aba"]


def curve(folder: Path) -> list[tuple[str, float]]:
    """Return the steps and validation losses of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], float(row["val_loss"])) for row in csv.DictReader(file) if row["val_loss"]]

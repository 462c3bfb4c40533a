"""What the benchmarks print, from figures that are known. They are run by ``make bench``, not here."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import kit  # noqa: E402
import run  # noqa: E402


def test_ratios_are_medians_of_those_within_a_cycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = kit.Report("x", str(tmp_path / "x.json"))
    times = {"llmkit": [1.0, 2.0, 4.0], "other": [3.0, 3.0, 4.0], "slow": [1.0, 1.0, 1.0]}
    report.compare("case", times, "ms", 1e3, {"other": 1.25, "slow": 1.25}, {"llmkit": 1.0}, {"absent": "gone"})
    report.close()
    own, other, slow, absent = report.lines
    assert (own.value, own.ratio, own.limit) == (2000.0, None, 0.5)
    assert (other.value, other.ratio, other.spread, other.met) == (3000.0, 1.5, (1.0, 3.0), True)
    assert (slow.ratio, slow.spread, slow.met) == (0.5, (0.25, 1.0), False)
    assert (absent.value, absent.note) == (None, "missing: gone")
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[1])["ratio"] == 1.5
    assert "| case | other | 3,000 ms | 1.50 (1.00 to 3.00) |  | at least 1.25, reached |" in printed
    assert "at least 1.25, **missed**" in printed
    assert len(json.loads((tmp_path / "x.json").read_text())["lines"]) == 4


def test_contestants_take_turns() -> None:
    order: list[str] = []
    times = kit.interleave({name: lambda name=name: order.append(name) for name in "ab"}, cycles=2, warm=1)  # type: ignore[misc]
    assert order == [*"ab", *"ab", *"ba"]
    assert [len(seconds) for seconds in times.values()] == [2, 2]


def test_limits_come_from_the_rates_of_the_same_run() -> None:
    gemm = kit.Gemm(size=10, repeats=5)
    assert gemm.seconds(flops=2000.0, times=[0.5, 1.0]) == pytest.approx(0.1)  # 10,000 FLOPs took half a second
    bandwidth = kit.Bandwidth(mebibytes=1)
    assert bandwidth.seconds(2**19, [0.2, 0.1]) == pytest.approx(0.05)


def test_a_check_of_the_gpu_script_that_does_not_end_is_stopped() -> None:
    def endless(at: gpu.Setting) -> Iterator[gpu.Row]:
        yield "case", "first", 1.0, "", {}
        time.sleep(60)

    before = signal.getsignal(signal.SIGALRM)
    rows = gpu.limited(endless, gpu.Setting("cpu", True), 1.0)
    assert next(iter(rows))[1] == "first"
    with pytest.raises(TimeoutError):
        next(iter(rows))
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert gpu.goal(1.2, least=1.15) == {"goal": "at least 1.15", "met": True}
    assert gpu.goal(9.0, most=8.0) == {"goal": "at most 8", "met": False}


def test_the_tables_of_the_page_are_those_recorded() -> None:
    text = run.PAGE.read_text()
    assert run.page(text) == text


def test_every_script_is_run_and_has_its_place_on_the_page() -> None:
    helpers = {"kit", "peers", "turns", "run", "gpu"}  # gpu.py runs where there is one, and dry in CI
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - helpers == set(run.SCRIPTS)
    marks = set(re.findall(r"<!-- (\w+) -->", run.PAGE.read_text()))
    assert marks == {*run.SCRIPTS, "ablation"}
    assert {path.stem for path in run.RECORDED.glob("*.json")} <= marks

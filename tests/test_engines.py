"""Cells on real clusters: a Slurm and a Ray of two nodes each on this machine, whose processes and nodes are killed."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from study_fakes import ALLOWED, begun, cells, count, everything

from llmkit.commands.cell import fit_cell
from llmkit.errors import Stopped, UserError
from llmkit.study import slurm as slurm_module
from llmkit.study.execute import Executor, Local
from llmkit.study.outcomes import Cell
from llmkit.study.ray import Ray
from llmkit.study.slurm import Slurm

SLOW = partial(count, pause=0.4)
"""A cell of five seconds."""
CELLS = cells("a", "bb", seeds=2)
(BROKEN,) = cells("broken", seeds=1)
REAL = (
    *("--data.train=text.txt", "--data.validation_share=0.1", "--data.tokenizer=char", "--model.head=generation"),
    *("--model.attention=multi_head", "--model.dim=16", "--model.num_layers=1", "--model.context=16"),
    *("--trainer.max_steps=3", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"),
)
"""The words of a small training."""


def undisturbed(root: Path) -> dict[str, bytes]:
    """Return what all cells leave that run on this machine, undisturbed."""
    Local(root, workers=4, threads=1, run=count, preload=["study_fakes"])(CELLS, len(CELLS))
    return everything(root)


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Return the first true value of a condition."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited for too long"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Meanwhile(threading.Thread):
    """Does something while this thread waits for an executor; raises at the end what was raised in it."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Meanwhile:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.join(300)
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Processes of a cluster import what this one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        yield patch


def check_real_cell(execute: Callable[[Path], Executor], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A cell trains the same there as in this process; paths are relative to the folder of the command."""
    monkeypatch.chdir(folder)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    cell = Cell("final/a/seed0-0", REAL, "a", 0)
    run = execute(Path("real/cells"))
    run([cell], 1)
    assert run.failed == {}
    assert fit_cell(Path("here") / cell.name, cell, 1) == 0
    there, here = everything(Path("real/cells")), everything(Path("here"))
    assert there == here
    assert len(there) == 2


# Slurm


@pytest.fixture(scope="module")
def slurm(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # It closes the handlers of all loggers when it is imported, and absl's closes a stream that is not stderr just now:
    # pytest's own, if a test had its output captured apart.
    pytest.importorskip("submitit", reason="needs submitit: pip install 'llmkit[slurm]'")
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    environment.setattr(slurm_module, "PAUSE", 0.5)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with slurm_cluster.cluster(folder):
        yield folder


def test_slurm(slurm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command is stopped and repeated; a cell is preempted by an urgent job, one gets SIGKILL, a node is lost."""
    root = tmp_path / "study" / "cells"

    def on(node: str) -> list[int]:
        return [rows[-1][0] for cell in CELLS if (rows := begun(root / cell.name)) and rows[-1][2] == node]

    def interrupt() -> None:
        wait_for(lambda: len(on("n1")) == len(on("n2")) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    def disturb() -> None:
        first = on("n1")
        slurm_cluster.call("sbatch", "--partition=urgent", "--nodelist=n1", "--output=/dev/null", "--wrap=sleep 0.2")
        preempted = wait_for(lambda: [pid for pid in first if not alive(pid)])
        kill(*set(first) - set(preempted))
        lost = on("n2")  # with the daemons above them
        daemons = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in lost]
        kill(slurm_cluster.pid_of(slurm, "slurmd.n2"), *daemons, *lost)
        slurm_cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")  # without SlurmdTimeout
        (root / ALLOWED).unlink()

    root.mkdir(parents=True)
    (root / ALLOWED).write_text("8")  # so that no cell ends before it is disturbed
    with Meanwhile(interrupt), pytest.raises(Stopped):
        Slurm(root, None, 1, count, {"setup": ["true"]})(CELLS, len(CELLS))
    submitted = (root.parent / "slurm" / "jobs.json").read_text()
    again = Slurm(root, None, 1, count, {})
    with Meanwhile(disturb):
        again([*CELLS, BROKEN], len(CELLS) + 1)
    said = capfd.readouterr().err
    assert "the jobs stay in the queue" in said
    assert submitted[:-1] in (root.parent / "slurm" / "jobs.json").read_text()  # none was submitted twice
    assert again.failed == {BROKEN.name: "nothing to count"}
    assert f"{BROKEN.name} failed: nothing to count (job " in said
    assert len(begun(root / BROKEN.name)) == 1
    assert [len(begun(root / cell.name)) for cell in CELLS] == [2, 2, 2, 2]
    assert everything(root) == undisturbed(tmp_path / "undisturbed")

    with pytest.raises(UserError, match="executor: slurm: .*invalid partition"):
        Slurm(tmp_path / "y" / "cells", None, 1, SLOW, {"partition": "mian"})(CELLS, len(CELLS))


def test_a_real_cell_on_slurm(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_real_cell(lambda root: Slurm(root, None, 1, fit_cell, {}), monkeypatch, tmp_path)


# Ray


@pytest.fixture(scope="module")
def cluster(environment: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes with two CPUs each."""
    pytest.importorskip("ray", reason="needs ray: pip install 'llmkit[ray]'")
    for name, value in {"period_ms": "500", "failure_threshold": "2", "initial_delay_ms": "500"}.items():
        environment.setenv(f"RAY_health_check_{name}", value)
    environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
    module = importlib.import_module("ray.cluster_utils")
    node = {"num_cpus": 2, "object_store_memory": 80_000_000}
    cluster = module.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    environment.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def ray(cluster: Any) -> Iterator[Any]:
    """The cluster; nothing is connected to it."""
    yield cluster
    importlib.import_module("ray").shutdown()


def test_ray(ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command is stopped and repeated, a process gets SIGKILL, and a node is lost; a cell that fails is named."""
    root = tmp_path / "study" / "cells"

    def on(node: Any) -> list[int]:
        raylet = node.all_processes["raylet"][0].process.pid
        return [rows[-1][0] for cell in CELLS if (rows := begun(root / cell.name)) and rows[-1][1] == raylet]

    def all_begun(times: int) -> bool:
        return all(len(begun(root / cell.name)) == times for cell in CELLS)

    def interrupt() -> None:
        wait_for(lambda: all_begun(1))
        os.kill(os.getpid(), signal.SIGINT)

    lost: list[int] = []

    def disturb() -> None:
        wait_for(lambda: all_begun(2))
        lost.extend([on(ray.head_node)[0], *on(ray.second)])
        kill(lost[0])
        ray.remove_node(ray.second, allow_graceful=False)
        kill(*lost)

    execute = Ray(root, None, 1, SLOW, "auto")
    with Meanwhile(interrupt), pytest.raises(Stopped):
        execute(CELLS, len(CELLS))
    with Meanwhile(disturb):
        execute([*CELLS, BROKEN], len(CELLS) + 1)
    assert execute.failed == {BROKEN.name: "nothing to count"}
    assert len(lost) >= 2
    assert sum(len(begun(root / cell.name)) for cell in CELLS) == 8 + len(lost)
    assert everything(root) == undisturbed(tmp_path / "undisturbed")


def test_a_real_cell_on_ray(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_real_cell(lambda root: Ray(root, None, 1, fit_cell, "auto"), monkeypatch, tmp_path)

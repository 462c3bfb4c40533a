"""What all tests share: no network, one torch thread, caches in a temporary folder, and where real data is."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest

# Before anything imports the Hugging Face libraries: no test may need the network or wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Numbers, times and memory are compared with those of a CPU. With this variable tests meet a GPU, where there is one.
if not os.environ.get("LLMKIT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are interpreted; Triton reads this when it is imported
# inductor's helper processes each import torch, which costs more than they bring.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Import what takes seconds, except where other processes run the tests, which wait for this one to start them."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    from llmkit import lazy

    lazy.defer({})  # as each command does: a third of the import
    import command
    import torch

    import llmkit.commands.fit
    import llmkit.testing.resume  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        command.draw_a_curve(Path(folder))
    forked.serve()  # before anything has run: only one thread exists


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over modules and tests, which stay to the end: a fifth of a fit's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Spare pytest's last garbage collections, ten in a row, all that is alive: they take a second each."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        forked.serve_cells()  # which have this cache too
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """Return a function from the name of a data set to its folder; the test is skipped where there is none."""
    base = Path(os.environ.get("LLMKIT_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        folder = base / name
        if not folder.is_dir():
            pytest.skip(f"needs the data set '{name}': {folder} does not exist (LLMKIT_DATA says where data sets are)")
        return folder

    return find


@pytest.fixture
def no_jacobians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what torch adds to the report of a wrong gradient: it differentiates by every single weight."""
    # By this name ``torch.autograd`` has the function.
    module = sys.modules["torch.autograd.gradcheck"]
    monkeypatch.setattr(module, "_run_slow_mode_and_get_error", lambda *args, **more: "", raising=False)


@pytest.fixture
def no_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile make the graphs and nothing of C++; the README's check of a plugin makes that too."""
    import torch

    compile, eager = torch.compile, {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **{**options, **eager}))

"""``llmkit plugins new``: what it writes works at once, by the commands that it prints."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import done, llmkit

from llmkit import imports, registry
from llmkit.model.groups import fused_maps
from llmkit.registry import DEFAULTS
from llmkit.testing import attention, properties
from llmkit.testing.facts import differences

FAMILIES = list(DEFAULTS)
QUICK = ("-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
"""Options of pytest within pytest; without the last one it would collect the garbage of this process five times."""
SMALL = ("--data.batch_size", "4", "--model.context", "32", "--model.decoding.max_new_tokens", "8")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library to train on."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(6):
        (folder / f"m{number}.py").write_text("def main(self):\n    return [1, 2, 3]\n\n" * 30)
    return folder


@pytest.fixture(autouse=True)
def _clean(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no trace of the plugins that a test imports."""
    before = set(sys.modules)
    monkeypatch.setenv("STDLIB", str(library))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(imports, "imported", {*imports.imported})
    monkeypatch.setattr(registry, "_local", {family: {**registry._local[family]} for family in DEFAULTS})
    yield
    for name in set(sys.modules) - before:
        if "fresh_" in name:
            del sys.modules[name]
    registry._installed.cache_clear()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with a new plugin of each family, and the commands that were printed for it."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, {family: commands(done("plugins", "new", family, f"fresh_{family}").out) for family in FAMILIES}


def commands(printed: str) -> list[str]:
    """Return the lines behind ``Next:``."""
    return [line.strip() for line in printed.partition("\nNext:\n")[2].splitlines()]


def python(*words: object, folder: Path, **environment: object) -> str:
    """Run Python in a folder and return what it printed."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    line = [sys.executable, *map(str, words)]
    answer = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.usefixtures("no_cpp")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_printed_commands_work(
    family: str, written: tuple[Path, dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, printed = written
    monkeypatch.chdir(folder)
    name, cls = f"fresh_{family}", f"Fresh{family.capitalize()}"
    check, test, fit, *compress = printed[family]
    assert check == f"llmkit plugins check {name}.py:{cls}"
    assert test == f"python -m pytest test_{name}.py"
    assert fit == f"llmkit fit --config {name}.yaml"

    report = done(*shlex.split(check)[1:], "--only", properties(family)[0].name).out  # pytest runs all
    assert "1 passed, 0 failed" in report and f"{family}: {name}.{cls}()" in report

    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert pytest.main([*shlex.split(test)[3:], *QUICK]) == 0, told.getvalue()
    assert f"{len(properties(family))} passed" in told.getvalue()

    few = ["--trainer.max_steps", "12", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1"]
    fast = ["--model.optimizer.lr", "0.003", "--model.scheduler.warmup_steps", "1"]
    run = done(*shlex.split(fit)[1:], *SMALL, *few, *fast)
    if family == "compression":
        (line,) = compress
        assert name in done(*shlex.split(line)[1:], "--rows", "4", "--rounds", "2", "--no_memory").out
    else:
        assert f"{name}.{cls}" in (run.folder / "config.yaml").read_text() and not compress
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_written_is_formatted(written: tuple[Path, dict[str, list[str]]], tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    folder, _ = written
    for family in FAMILIES:
        done("plugins", "new", family, f"fresh_{family}", "--package", "--folder", tmp_path)
    ruff = ("-m", "ruff", "--isolated")
    for where in (folder, tmp_path):
        python(*ruff, "format", "--check", "--line-length", "120", ".", folder=where)
        python(*ruff, "check", "--line-length", "120", "--select", "E,F,W,UP,B,SIM,C4,RUF", ".", folder=where)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_a_package(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = done("plugins", "new", family, "fresh_thing", "--package").out
    assert commands(printed) == [
        "pip install -e fresh_thing",
        f"llmkit plugins check {family}/fresh_thing",
        "python -m pytest fresh_thing/tests/test_fresh_thing.py",
        "llmkit fit --config fresh_thing/fresh_thing.yaml",
        *(["llmkit compress runs/fresh_thing --to fresh_thing --output fresh_thing_small"] * (family == "compression")),
    ]
    files = {path.relative_to(tmp_path / "fresh_thing").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    module = "llmkit_fresh_thing"
    assert files == {
        *("pyproject.toml", "README.md", "fresh_thing.yaml", "tests/test_fresh_thing.py"),
        *(f"{module}/__init__.py", f"{module}/py.typed"),
    }
    for file in files:
        assert f"fresh_thing/{file}" in printed

    table = tomllib.loads((tmp_path / "fresh_thing" / "pyproject.toml").read_text())
    assert table["project"]["name"] == "llmkit-fresh_thing"
    assert table["project"]["dependencies"] == ["llmkit"]
    assert table["project"]["entry-points"] == {f"llmkit.{family}": {"fresh_thing": f"{module}:FreshThing"}}
    source = (tmp_path / "fresh_thing" / module / "__init__.py").read_text()
    assert "class FreshThing(" in source and "register" not in source
    assert "imports" not in (tmp_path / "fresh_thing" / "fresh_thing.yaml").read_text()


def test_a_package_installs_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    install, check, test, fit = commands(done("plugins", "new", "norm", "fresh_scale", "--package").out)
    # Not into the environment of these tests, but beside it.
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q", "--target", "site"]
    assert install == "pip install -e fresh_scale"
    python("-m", "pip", "install", *words, "./fresh_scale", folder=tmp_path)
    assert (tmp_path / "site" / "llmkit_fresh_scale" / "py.typed").is_file()

    monkeypatch.syspath_prepend(tmp_path / "site")
    registry._installed.cache_clear()
    assert registry.find("norm", "fresh_scale").distribution == "llmkit-fresh_scale"
    assert "1 passed, 0 failed" in done(*shlex.split(check)[1:], "--only", "builds").out
    run = done(*shlex.split(fit)[1:], *SMALL, "--trainer.max_steps", "1")
    assert "llmkit_fresh_scale.FreshScale" in (run.folder / "config.yaml").read_text()
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert pytest.main([*shlex.split(test)[3:], *QUICK]) == 0, told.getvalue()
    assert f"{len(properties('norm'))} passed" in told.getvalue()


def test_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check, _, fit = commands(done("plugins", "new", "norm", "fresh_scale", "--folder", "a/b").out)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        *("fresh_scale.py", "fresh_scale.yaml", "test_fresh_scale.py"),
    ]
    assert done(*shlex.split(check)[1:], "--only", "builds").code == 0
    assert done(*shlex.split(fit)[1:], *SMALL, "--trainer.max_steps", "1").code == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documentation_of_a_class_is_its_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done("plugins", "new", family, "fresh_a1_b")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("fresh_a1_b")
    assert registry.find(family, "fresh_a1_b").target == "fresh_a1_b:FreshA1B"
    assert module.FreshA1B.__doc__.partition("\n")[0].endswith(".")
    for file in tmp_path.iterdir():
        if file.is_file():
            assert "template" not in file.read_text().lower()


def test_new_attention_starts_as_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the same names and maps give the same numbers: only what a user changes differs."""
    monkeypatch.chdir(tmp_path)
    done("plugins", "new", "attention", "fresh_start")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("fresh_start").FreshStart
    default = registry.find("attention", registry.default("attention")).load()
    for init_args in ({}, {"num_heads": 2, "qk_norm": False, "bias": True}):
        for usage in attention.subject(functools.partial(default, **init_args)).usages:
            built_in = usage.build()
            mine = own(built_in.dim, usage.role, **init_args).double().eval()
            mine.load_state_dict(built_in.state_dict())
            assert fused_maps(mine) == fused_maps(built_in) and mine.mixing_flops(7) == built_in.mixing_flops(7)
            for inputs, name in itertools.product(usage.kinds(), ("none", "rotary", "alibi")):
                inputs.seq.position = registry.plugin("position", name)(built_in.dim, 40)
                found, right = (usage.outputs(module, inputs)["forward"] for module in (mine, built_in))
                torch.testing.assert_close(inputs.select(found), inputs.select(right))
    assert differences("attention", functools.partial(own), 64, 8) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("atention", "mine"), ("unknown family 'atention'", "'attention'")),
        (("norm", "My-Norm"), ("'My-Norm'", "lower-case letters, digits and underscores")),
        (("norm", "2norm"), ("'2norm'", "starting with a letter")),
        (("norm", "_norm"), ("'_norm'", "starting with a letter")),
        (("norm", "näher"), ("'näher'", "lower-case letters")),
        (("norm", "class"), ("'class'", "not a Python keyword")),
        (("norm", "rms"), ("norm 'rms' already exists", "of llmkit")),
        (("attention", "json"), ("'json'", "already exists")),
        (("attention", "torch"), ("'torch'", "already exists")),
        (("attention", "sys"), ("'sys'", "already exists")),
        (("attention", "plugins", "--package"), ("'llmkit_plugins'", "already exists")),
        (("norm", "norm"), ("'norm'", "class Norm")),
        (("attention", "tensor"), ("'tensor'", "class Tensor")),
        (("head", "loss", "--package"), ("'loss'", "class Loss")),
        (("norm", "mine", "--folder", "file"), ("file", "folder")),
        (("norm",), ("name",)),
        (("norm", "mine", "--pakage"), ("'--pakage'", "'--package'")),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused(
    words: tuple[str, ...], says: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = llmkit("plugins", "new", *words)
    assert result.code == 2 and len(result.err.splitlines()) == 1, result
    for text in says:
        assert text in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["template", "fresh_xtemplate", "fresh_register", "match"])
def test_names_with_words_of_the_templates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done("plugins", "new", "norm", name, "--package")
    done("plugins", "new", "norm", name)
    cls = "".join(part.capitalize() for part in name.split("_"))
    source = (tmp_path / f"{name}.py").read_text()
    decorator, start = f'@register("norm", "{name}")\n', f"class {cls}(Norm):\n"
    assert decorator + start in source
    installed = (tmp_path / name / f"llmkit_{name}" / "__init__.py").read_text()
    assert installed == source.replace(decorator, "").replace("from llmkit import register\n", "")


@pytest.mark.parametrize("file", ["mine.py", "test_mine.py", "mine.yaml"])
def test_nothing_is_overwritten(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text("mine")
    result = llmkit("plugins", "new", "norm", "mine")
    assert result.code == 2 and f"{file} already exists" in result.err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, "mine")]


def test_no_package_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "tests").mkdir(parents=True)
    (tmp_path / "mine" / "README.md").write_text("mine")
    result = llmkit("plugins", "new", "norm", "mine", "--package")
    assert result.code == 2 and "mine/README.md already exists" in result.err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["README.md"]

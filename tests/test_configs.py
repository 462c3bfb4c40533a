"""Every shipped config, whatever there will be: it trains, its checkpoint answers, and its saved config is a config."""

from __future__ import annotations

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_folder
import pytest
import torch
import yaml
from command import Result, done, llmkit

from llmkit import registry

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [name for name in CONFIGS if name not in ("compare.yaml", "tune.yaml")]  # studies
PROBES = [name for name in CONFIGS if name.startswith("probes/")]  # which test_probes trains
CONFIGS = [name for name in CONFIGS if name not in PROBES]
FIRST_OF_A_HEAD = {Path(name).parts[0]: name for name in reversed(CONFIGS)}.values()
LINES = 200  # of each file; spread over the whole file, so that every label is among them


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a config's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def cut(source: Path, target: Path) -> None:
    """Write a file's first line and others at equal distances; parallel files stay parallel.

    Of tagged sentences whole ones are kept, of questions those of two paragraphs an article.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    if source.suffix == ".json" and content.lstrip().startswith(b"{"):
        articles = json.loads(content)["data"][:4]
        data = [{**article, "paragraphs": article["paragraphs"][:2]} for article in articles]
        target.write_text(json.dumps({"data": data}), encoding="utf-8")
        return
    most = 1000 if source.parent.name == "trec" else LINES  # it has fifty labels
    content = content.replace(b"\n\t\n", b"\n\n")  # between sentences of WNUT
    sentences = content.split(b"\n\n")
    separator, parts = (b"\n\n", sentences) if len(sentences) > LINES / 2 else (b"\n", content.split(b"\n"))
    target.write_bytes(separator.join(parts[:: max(1, len(parts) // most)]))


def small_data(content: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write small copies of the files that a config reads; returns the variables that lead to them."""
    real = {
        "LLMKIT_DATA": Path(os.environ.get("LLMKIT_DATA") or ROOT.parent / "shared" / "data"),
        "STDLIB": Path(sysconfig.get_path("stdlib")),
    }
    used: dict[str, str] = {}
    for text in strings(content["data"]):
        found = re.match(r"\$\{(\w+)\}/(.*)", text)
        if found is None:
            continue
        variable, rest = found.groups()
        matches = sorted(glob.glob(str(real[variable] / rest)))[:20]
        if not matches:
            pytest.skip(f"needs the data set file {real[variable] / rest} (LLMKIT_DATA says where data sets are)")
        for path in map(Path, matches):
            cut(path, folder / variable / path.relative_to(real[variable]))
        used[variable] = str(folder / variable)
    return used


@pytest.fixture(scope="module", params=CONFIGS)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Result]]:
    """A config's name and what fitting it for two steps on small data printed."""
    name: str = request.param
    folder = tmp_path_factory.mktemp("run")
    begin = started(name, folder)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in small_data(read(name), folder).items():
            patch.setenv(variable, value)
        yield name, fit(name, folder, *begin)


def fit(name: str, folder: Path, *words: object) -> Result:
    """Fit a config for two steps."""
    batch = "--data.batch_tokens=300" if read(name)["data"].get("batch_tokens") else "--data.batch_size=2"
    sized = str(read(name)["model"].get("init_from")).startswith("hf:")
    short = (*SHORT, *(() if sized else ("--model.num_layers", "1")))  # everything else is the config's own
    return done("fit", "--config", ROOT / "configs" / name, batch, *short, "--output", folder / "runs", *words)


def started(name: str, folder: Path) -> list[object]:
    """Return the option that names the weights to begin with, after a fit of the config that they come from."""
    given = read(name)["model"].get("init_from")
    if given is None:
        return []
    if given.startswith("hf:"):  # a tiny model of the same architecture
        return ["--model.init_from", f"hf:{hf_folder.write_bert(folder / 'published')}"]
    (source,) = (other for other in CONFIGS if Path(other).stem == Path(given).parts[1])
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in small_data(read(source), folder / "before").items():
            patch.setenv(variable, value)
        return ["--model.init_from", fit(source, folder / "before").checkpoint]


ASKED = {
    "masked_lm": "a good [MASK]",
    "question_answering": '{"question": "What is it?", "context": "It is a good day. A good day it is."}',
}
"""What is asked of a checkpoint that answers more than texts."""

SHORT = (
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.decoding.max_new_tokens", "3"),
)


def test_there_is_one_for_every_head() -> None:
    heads = [read(name)["model"]["head"] for name in [*CONFIGS, *PROBES]]
    assert {head["name"] if isinstance(head, dict) else head for head in heads} == set(registry.entries("head"))
    assert "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("name", [name for name in [*CONFIGS, *PROBES] if name != "quickstart.yaml"])
def test_a_comment_says_where_the_data_comes_from(name: str) -> None:
    path = ROOT / "configs" / name
    comments = "\n".join(re.findall(r"^#.*", path.read_text(encoding="utf-8"), re.MULTILINE))
    other = re.search(r"Data: as in ([\w/]+\.yaml)", comments)
    if other:
        comments = (path.parent / other[1]).read_text(encoding="utf-8")
    assert "# Data: " in comments
    assert "# Elsewhere" in comments


def test_fit(fitted: tuple[str, Result]) -> None:
    name, result = fitted
    folder = result.folder
    assert folder.parent.name == Path(name).stem  # a run is called like its config
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["val_loss"] < 20
    assert result.err == "" or all(line.startswith(("llmkit: ", "Note: ")) for line in result.err.splitlines())


def test_infer(fitted: tuple[str, Result]) -> None:
    name, result = fitted
    asked = ASKED.get(Path(name).parts[0], "a good day")
    answer = done("infer", result.checkpoint, asked, "--json", "--max_new_tokens", "3").out
    assert answer.count("\n") == 1
    assert json.loads(answer)


def test_test(fitted: tuple[str, Result]) -> None:
    name, result = fitted
    if not read(name)["data"].get("test"):
        refused = llmkit("test", "--ckpt_path", result.checkpoint)
        assert refused.code == 2 and "data.test is not set" in refused.err
        return
    done(
        *("test", "--ckpt_path", result.checkpoint, "--output", result.folder.parent.parent / "tested"),
        *("--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar=false"),
        *("--data.batch_tokens", "null", "--data.batch_size", "2"),
    )
    (found,) = (result.folder.parent.parent / "tested").rglob("results.json")
    assert json.loads(found.read_text())["test_loss"] > 0


def test_the_saved_config_is_a_config(fitted: tuple[str, Result]) -> None:
    name, result = fitted
    if name not in FIRST_OF_A_HEAD:
        return  # another config of this head is trained a second time
    again = done("fit", "--config", result.folder / "config.yaml", "--output", result.folder.parent.parent / "again")
    first, second = (yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (result, again))
    assert first.pop("output") != second.pop("output")
    assert first == second
    weights = [torch.load(run.checkpoint, weights_only=True)["state_dict"] for run in (result, again)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key

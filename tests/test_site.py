"""The documentation site: every command and snippet of its pages runs, in the order of the page, and nothing is stale.

``make docs`` builds it, and fails on a dead link or anchor.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from command import Result, done, parser_once, save_empty
from test_readme import README, ROOT, TINY, blocks, forget, lines, workspace

from llmkit import __version__, main
from llmkit.commands import VERBS
from llmkit.run import drawing
from llmkit.run.cli import CLI
from llmkit.study.scaling.spec import read as read_sizes

__all__ = ["workspace"]
DOCS = ROOT / "docs"
TRAINER = TINY[-10:]  # for a model of Hugging Face, which has sizes of its own


def small(words: list[str]) -> list[str]:
    """A command of a page, made small. Of what needs many GPUs, or is tested elsewhere, only the config is checked."""
    if "--trainer.devices" in words or "--find_lr" in words:
        words = [word for word in words if word != "--find_lr"]
        return ["config", "show", *words[1:]]
    if words[:2] == ["plugins", "check"]:
        return [*words, "--no_compile"]
    if any("hf:" in word for word in words):
        return [*words, *TRAINER, "--model.context", "16"]
    if words[0] in ("fit", "inspect"):
        return [*words, *TINY]
    if words[0] == "compare" and "--report" not in words:
        # The server that cells are forked from was started before this test, and knows another STDLIB.
        more = ("--model.dim", "64", "--data.train", "library/*.py", "--data.tokenizer.vocab_size", "300")
        return [*words, *TINY, *more, *(() if "--plan" in words else ("--seeds", "1"))]
    return words


def walk(page: Path, done_before: tuple[str, ...] = ()) -> dict[str, Result]:
    """Run all commands of a page, with the files that it shows, but those that another test runs."""
    for block in blocks(page):
        if name := re.match(r"# (\w+\.(?:yaml|py))\n", block.text):
            Path(name[1]).write_text(block.text)
    found = {}
    for line in lines(page):
        words = shlex.split(line, comments=True)
        if words[0] == "llmkit" and line not in done_before:
            found[line] = done(*small(words[1:]))
        else:
            assert words[0] in ("llmkit", "git", "make", "pip", "source"), line
    return found


def test_first_steps(workspace: Path) -> None:
    found = walk(DOCS / "first-steps.md")
    assert found["llmkit fit --config configs/quickstart.yaml"].folder == Path("runs/quickstart/version_0")
    (shown,) = (yaml.safe_load(block.text) for block in blocks(DOCS / "first-steps.md", "yaml"))
    shipped = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert {**shipped, **{key: {**shipped[key], **value} for key, value in shown.items()}} == shipped


def test_the_tutorial(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "save", save_empty)  # test_study_report looks at the figures of a comparison
    try:
        found = walk(DOCS / "tutorial.md")
    finally:
        forget("decay")
    assert " 0 failed" in found["llmkit plugins check decay.py:Decay"].out
    assert Path("runs/paper/figures/differences.pdf").is_file() and Path("runs/paper/table.tex").is_file()
    assert Path("decay_hf/config.json").is_file()


def test_the_recipes(workspace: Path) -> None:
    try:
        found = walk(DOCS / "recipes.md")
    finally:
        forget("my_tokenizer")
    peaks = [result.out for line, result in found.items() if line.startswith("llmkit inspect")]
    assert peaks and all("peak" in text for text in peaks)


def test_questions_and_concepts(workspace: Path) -> None:
    readme = [line.replace("variant.yaml", "configs/quickstart.yaml") for line in lines(README)]
    before = (*lines(DOCS / "recipes.md"), *readme)
    found = walk(DOCS / "faq.md", before) | walk(DOCS / "concepts.md")
    assert any("3 passed, 0 failed" in result.out for result in found.values())


GUIDES = (
    "comparing",
    "tuning",
    "scaling",
    "scaling-out",
    "reliability",
    "configuration",
    "performance",
    "serving",
)
ELSEWHERE = ("verify", "infer", "scale", "serve", "chat", "export", "test")
"""Commands that the README's test and their own run; the guides repeat them with the checkpoint of the page."""


def checked(words: list[str]) -> list[str]:
    """A command that would train, as one that finds every mistake in it without training."""
    if words[0] == "fit":
        return ["config", "show", *(word for word in words[1:] if word != "--find_lr")]
    return [*words, "--plan"] if words[0] in ("compare", "tune") and "--plan" not in words else words


def test_the_commands_of_the_guides_are_right(workspace: Path) -> None:
    """Those of the studies in ablations.md are planned by test_study, those of other pages run in their own tests."""
    for name in ("x.yaml", "mr.yaml"):
        Path(name).write_text("data: {train: library/*.py}\n")
    for name in ("train.txt", "val.txt"):
        shutil.copy("notes.txt", name)
    ran = []
    for page in GUIDES:
        for block in blocks(DOCS / f"{page}.md", "yaml"):
            if file := re.match(r"# (\w+\.yaml)\n", block.text):
                Path(file[1]).write_text(block.text)
        for line in lines(DOCS / f"{page}.md"):
            line = line.replace("$config", "configs/probes/mqar.yaml").replace("$fold", "3")
            line = line.replace("$(basename configs/probes/mqar.yaml .yaml)", "mqar").replace("runs/search/best", "x")
            words = shlex.split(line.partition("llmkit ")[2], comments=True)
            if not line.startswith(("llmkit ", "torchrun", "srun")) or words[0] in ELSEWHERE:
                continue
            if any(word.startswith("runs/") for word in words):  # of a run that the page has trained
                assert words[0] in ("fit", "config"), line
                words = [word for word in words if not word.startswith("runs/") and word != "--ckpt_path"]
            if words[:2] != ["config", "diff"]:
                done(*checked(words))
                ran.append(words[0])
    assert {"compare", "tune", "fit", "config"} <= set(ran)
    assert read_sizes("sizes.yaml", {}, []).widths == (64, 96, 128, 192, 256)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__ and citation["authors"] == [{"name": "The llmkit authors"}]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r"[\w/-]+\.md", text.partition("\nnav:")[2].partition("\ntheme:")[0]))
    assert named == {path.name for path in DOCS.glob("*.md")} | set(reference().PAGES)


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "setup_parser", parser_once)
    made = reference()
    keys, commands, python = (write() for write in made.PAGES.values())
    for key in ("dim", "init_from", "batch_tokens", "max_steps", "every_n_steps", "rank", "temperature"):
        assert re.search(rf"^\| `{key}` \| [\w \[]", keys, re.M), key
    assert "### `attention/lstm`" in keys and "### `dataset/mqar`" in keys
    for command in main.COMMANDS:
        for words in [command, *(f"{command} {verb}" for verb in VERBS.get(command, {}))]:
            assert f"## `llmkit {words}`" in commands
    assert "--find_lr" in commands and "--model.dim DIM" not in commands
    assert "::: llmkit.model.language_model.LanguageModel\n" in python and "::: llmkit.testing\n" in python


def test_the_figures_about_other_libraries_are_those_that_were_measured() -> None:
    measured = (DOCS / "performance.md").read_text("utf-8")
    page = (DOCS / "peers.md").read_text("utf-8").partition("## How fast")[2]
    sections = {
        "training step, 6 layers, 384 wide, vocabulary 65": ("train", "6L 384 wide.*vocabulary 65 "),
        "the same, vocabulary 8,192": ("train", "6L 384 wide.*vocabulary 8192 "),
        "training step, 4 layers, 128 wide": ("train", "4L 128 wide.*"),
        "memory, vocabulary 8,192": ("memory", "6L.*vocabulary 8192 "),
        "memory, vocabulary 50,304": ("memory", "6L.*vocabulary 50304 "),
        "generation, 1 row": ("generation", "batch 1, the network of.*"),
        "generation, 8 rows": ("generation", "batch 8, the network of.*"),
        "beam search of 5": ("beam", "3.3L.*"),
        "CPU time to a loss of 1.88 on Shakespeare": ("quality", "4L.*"),
    }
    libraries = ["HF [\\w-]+", "litgpt", "x-transformers", "nn.TransformerEncoder", "nanoGPT's recipe.*"]
    rows = {name: cells.split("|") for name, cells in re.findall(r"^\| ([^|]+?) \|((?: [^|\n]*\|){5})$", page, re.M)}
    for name, (section, case) in sections.items():
        part = measured.partition(f"<!-- {section} -->")[2].partition(f"<!-- /{section} -->")[0]
        for library, cell in zip(libraries, rows[name], strict=False):
            if value := cell.strip(" *"):
                assert re.search(rf"^\| {case}\| {library} \| [^|]* \| {re.escape(value)}\b", part, re.M), (
                    name,
                    library,
                )

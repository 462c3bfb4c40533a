"""What the README and the guides say: every command and snippet runs, every path and key exists."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forked
import hf_folder
import lightning.pytorch as pl
import pytest
import torch
import yaml
from bugs import BUGS
from command import Result, cheap, done, llmkit
from test_structure import ROOMS

from llmkit import imports, main, registry, testing
from llmkit.analysis.compress import measure
from llmkit.check import settled
from llmkit.config.files import parse_yaml
from llmkit.config.plan import TOP_KEYS
from llmkit.data import DataModule
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import TRAINER_DEFAULTS
from llmkit.run.process import as_found
from llmkit.sequence import DecodingOptions
from llmkit.testing import resume

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in ("results.md", "plugin-check.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *GUIDES]
TINY = (
    *("--model.dim", "16", "--model.num_layers", "1", "--model.context", "16", "--model.decoding.max_new_tokens", "4"),
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)

PAIRS = list(zip(TINY[::2], TINY[1::2], strict=True))


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path, language: str = "") -> list[Block]:
    found = [Block(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)]
    return [block for block in found if language in ("", block.language)]


def lines(page: Path, language: str = "sh") -> list[str]:
    """The commands of a page, one string each."""
    text = "\n".join(block.text for block in blocks(page, language)).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as a reader would have it: the configs, the files that the README names, its snippets."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    library = tmp_path / "library"
    library.mkdir()
    for number in range(4):
        (library / f"m{number}.py").write_text("def main(self):\n    return [1, 2, 3]\n" * 30)
    reviews = [f"a {word} film,{'good' if i % 2 else 'bad'}" for i, word in enumerate(["dull", "moving"] * 20)]
    for name in ("reviews.csv", "reviews_test.csv"):
        (tmp_path / name).write_text("\n".join(["review,verdict", *reviews]) + "\n")
    (tmp_path / "new_reviews.txt").write_text("a dull film\na moving film\na new film\n")
    (tmp_path / "letters.en").write_text("Good morning.\nGood night.\n" * 20)
    (tmp_path / "letters.de").write_text("Guten Morgen.\nGute Nacht.\n" * 20)
    hf_folder.write(tmp_path / "gpt2")
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "A b", "sentence_bad": "B a"}\n' * 3)
    sizes = [(N, D) for N in (1e6, 4e6, 1.6e7) for D in (1e7, 5e7, 2.5e8)]
    losses = [f"{N},{D},{1.5 + 90 * N**-0.3 + 200 * D**-0.3}" for N, D in sizes]
    (tmp_path / "runs.csv").write_text("\n".join(["size,seen,val_loss", *losses]) + "\n")
    (tmp_path / "notes.txt").write_text("Once upon a time there was a note. " * 60)
    for block in blocks(README, "yaml"):
        file = re.match(r"# (\w+\.yaml)\n", block.text)
        assert file, f"the first line must name the file: {block.text}"
        (tmp_path / file[1]).write_text(block.text)
    (tmp_path / "running_mean.py").write_text(plugin_snippet())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STDLIB", str(library))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget("running_mean")
    forget("my_attention")


def forget(module: str) -> None:
    """Undo the import of a local plugin, so that other tests do not see it."""
    sys.modules.pop(module, None)
    imports.imported.discard(module)
    for entries in registry._local.values():
        for name in [name for name, entry in entries.items() if entry.target.startswith(f"{module}:")]:
            del entries[name]


def plugin_snippet() -> str:
    (snippet,) = (block.text for block in blocks(README, "python") if "@register" in block.text)
    return snippet


def test_every_command_of_the_readme_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "subprocess", forked)
    monkeypatch.setattr(measure, "subprocess", types.SimpleNamespace(run=in_a_fork))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())  # it would wait for clients
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main(\n"))
    # What `make quickstart` leaves behind comes first: the commands after it use its checkpoint.
    done("fit", "--config", "configs/quickstart.yaml", *TINY)
    commands = [shlex.split(line, comments=True) for line in lines(README)]
    ran = []
    for command, *words in commands:
        if command != "llmkit":
            assert command in ("git", "make"), command
            continue
        tiny = TINY if "--config" in words else ()  # a checkpoint knows its own sizes
        longer = ("--trainer.max_steps", "4") if words[0] == "fit" and "--ckpt_path" in words else ()
        fewer = ("--kills", "1") if words[:2] == ["verify", "resume"] else ()
        fewer = ("--draws", "20") if words[:2] == ["scale", "fit"] else fewer
        fewer = ("--port", "0") if words[0] == "serve" else fewer
        # The snippet above is checked whole, and test_plugins_new checks all that `plugins new` writes.
        fewer = ("--only", "builds") if words[-1] == "my_attention.py:MyAttention" else fewer
        result = done(*words, *tiny, *longer, *fewer)
        check(words, result)
        ran.append(words[0])
    assert set(ran) == set(main.COMMANDS) - {"validate", "cell"}
    rows = [json.loads(line) for line in next(workspace.glob("runs/*/*/predictions.jsonl")).read_text().splitlines()]
    assert [row["label"] in ("good", "bad") for row in rows] == [True] * 3


def in_a_fork(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -c CODE`` in a fork."""
    python, _, code = command
    Path("code.py").write_text(code)
    return forked.run([python, "code.py"])


def check(words: list[str], result: Result) -> None:
    """What a command printed fits what the README says that it does."""
    text = result.out
    if words[0] == "infer" and "--json" in words:
        assert [json.loads(line)["label"] for line in text.splitlines()]
    elif words[0] == "infer":
        assert text.strip() or "letters" in words[1]  # an untrained translator may say nothing
    elif words[:2] == ["plugins", "check"]:
        assert " 0 failed" in text
    elif words[:2] == ["plugins", "new"]:
        assert all(f"\n  {command}\n" in text for command in lines(README) if f"{words[3]}." in command)
    elif words[:2] == ["plugins", "show"]:
        assert "arXiv" in text and "FLOPs" in text
    elif words[0] == "plugins":
        assert all(name in text for name in registry.entries("attention"))
    elif words[0] == "inspect":
        assert "flops per token" in text
    elif words[0] == "fit":
        assert result.folder.joinpath("config.yaml").is_file()
        assert result.folder.joinpath("checkpoints", "best.ckpt").is_file()


def test_the_shown_examination_is_what_check_prints(workspace: Path) -> None:
    passed, failed = (block.text for block in blocks(README, "text") if "causal_by_gradient" in block.text)
    printed = done("plugins", "check", "running_mean.py:RunningMean", "--no_compile").out
    for line in passed.splitlines():
        assert line.removesuffix("...)") in printed, line
    (count,) = re.findall(r"there are (\d+) properties", README.read_text("utf-8"))
    assert int(count) == len(testing.properties("attention"))
    wrong = plugin_snippet().replace("causal=True", "causal=False").replace("running_mean", "wrong_mean")
    (workspace / "wrong_mean.py").write_text(wrong)
    result = llmkit("plugins", "check", "wrong_mean.py:RunningMean", "--no_compile")
    forget("wrong_mean")
    assert result.code == 1 and failed in result.out


def test_the_shown_output_is_what_a_fit_prints(workspace: Path) -> None:
    result = done("fit", "--config", "configs/quickstart.yaml", *TINY)
    (shown,) = (block.text for block in blocks(README, "text") if "Run folder:" in block.text)
    paths = re.findall(r"^  [\w ()]+: +(\S+)$", shown, re.M)
    assert len(paths) == 6
    for path in paths:
        assert Path(path).exists(), path
        assert path in result.out
    headings = [line for line in shown.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert len(headings) == 3
    assert [line for line in result.out.splitlines() if line in headings] == headings


def test_the_plugin_snippet_is_the_example_and_short() -> None:
    snippet = plugin_snippet()
    assert snippet == (ROOT / "examples" / "local_plugin" / "running_mean.py").read_text("utf-8")
    assert len(snippet.splitlines()) < 30


SHORT = {
    '"trainer.max_steps": 200': '"trainer.max_steps": 3, **TINY',
    'trainer={"max_steps": 200': 'trainer={"max_steps": 3, "accelerator": "cpu", "precision": "32-true"',
    "max_steps=200": "max_steps=3, accelerator='cpu', logger=False, enable_progress_bar=False",
    "val_check_interval=200": "val_check_interval=3",
    '"trainer.max_steps": 300': '"trainer.max_steps": 4',
}
"""What makes the snippets short."""


def run_snippets(page: Path) -> dict[str, Any]:
    """Run the Python of a page, without plugins, from top to bottom; returns its variables."""
    names: dict[str, Any] = {"TINY": {word.removeprefix("--"): yaml.safe_load(value) for word, value in PAIRS}}
    for block in blocks(page, "python"):
        code = functools.reduce(lambda text, pair: text.replace(*pair), SHORT.items(), block.text)
        if "@register" not in code:
            with cheap(), as_found():
                exec(compile(code, page.name, "exec"), names)
    return names


def test_the_python_snippets_run(workspace: Path) -> None:
    names = run_snippets(README)
    assert names["run"].best.is_file() and names["answer"]["text"]


def test_the_python_page_runs(workspace: Path) -> None:
    """A plain Trainer with the arguments that the page gives trains as ``llmkit.fit`` does."""
    (workspace / "new_notes.txt").write_text("Once upon\nthere was\n")
    names = run_snippets(ROOT / "docs" / "python.md")
    assert (workspace / "loss.png").is_file() and (workspace / "notes.ckpt").is_file()
    assert names["steps"] == [1, 2, 3] and [one["prompt"] for one in names["answers"]] == ["Once upon", "there was"]
    assert names["longer"].history[-1]["step"] == 3 and "val_loss" in names["measured"].metrics
    fitted = torch.load(names["run"].last, weights_only=True)["state_dict"]
    assert all(torch.equal(value, fitted[name]) for name, value in names["model"].state_dict().items())


def test_the_entry_point_lines_are_what_llmkit_looks_for() -> None:
    for page in PAGES:
        for block in blocks(page, "toml"):
            (group,) = re.findall(r'\[project\.entry-points\."llmkit\.(\w+)"\]', block.text)
            assert group in registry.DEFAULTS


def test_quick_start_is_what_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    recipes = dict(re.findall(r"^([a-z]+):.*\n((?:\t.*\n)*)", makefile, re.M))
    assert "llmkit fit --config configs/quickstart.yaml" in recipes["quickstart"]
    assert "pytest" in recipes["test"]
    first = lines(README)[:3]
    assert first[0].startswith("git clone ")
    assert first[1:] == ["make quickstart", "make test"]
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text("utf-8"), re.M):
            assert target in recipes, f"{page.name}: make {target}"


def tree() -> dict[str, str]:
    """Path -> purpose, from the README's file tree."""
    (block,) = (block.text for block in blocks(README, "text") if "contracts.py" in block.text)
    found, folder = {}, ""
    for line in block.splitlines():
        name, purpose = re.fullmatch(r"((?:  )?\S+) {2,}(\S.*)", line).groups()  # type: ignore[union-attr]
        if not name.startswith(" "):
            folder = name
        found[name if name == folder else folder + name.strip()] = purpose
    return found


def test_the_file_tree_is_the_real_one() -> None:
    named = tree()
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    for folder in ("llmkit", "plugins/llmkit_plugins", "examples", "configs"):
        for entry in (ROOT / folder).iterdir():
            if not entry.name.startswith(("_", ".")) and entry.name != "py.typed":
                assert f"{folder}/{entry.name}{'/' * entry.is_dir()}" in named, (
                    f"{folder}/{entry.name} is not in the tree"
                )


def test_the_rooms_are_shown_in_their_reading_order() -> None:
    order = [name for name in ROOMS if name != "__main__"]
    entries = [path.removeprefix("llmkit/") for path in tree() if path.startswith("llmkit/") and path != "llmkit/"]
    assert [entry.removesuffix("/").removesuffix(".py") for entry in entries] == order
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    assert [name.removesuffix("/") for name in re.findall(r"^\| `(\S+)` \|", page, re.M)] == order


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text, site = page.read_text("utf-8"), (ROOT / "docs" / "reference.py").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        made = page.parent == ROOT / "docs" and re.search(rf'^    "{target}": ', site, re.M)  # when the site is built
        assert made or target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|examples|configs|tests|llmkit|llmkit_plugins|plugins)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "plugins" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    owners: dict[str, Callable[..., Any]] = {"model": LanguageModel, "data": DataModule, "trainer": pl.Trainer}
    for group, key in re.findall(r"--(model|data|trainer)\.(\w+)", page.read_text("utf-8")):
        assert key in inspect.signature(owners[group]).parameters, f"--{group}.{key}"
    for line in lines(page):
        words = shlex.split(line, comments=True)
        if "llmkit" in words and words[0] != "git":
            assert words[words.index("llmkit") + 1] in main.COMMANDS, line


# docs/configuration.md


def table(heading: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table below a heading."""
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8").partition(f"\n{heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert rows, heading
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in rows[0].splitlines()[2:]]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in cells}


def written(value: Any) -> Any:
    """A default as it is read from the table."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("heading", "cls"), [("## `model`", LanguageModel), ("## `data`", DataModule)])
def test_every_key_is_documented_with_its_default(heading: str, cls: type) -> None:
    found = table(heading)
    parameters = inspect.signature(cls).parameters
    assert list(found) == list(parameters)
    families = {
        key.partition(".")[2]: family for key, family in registry.FAMILY_OF.items() if key != "model.cross_attention"
    }
    names = {key: registry.default(family) for key, family in families.items()}
    for key, (_, default, meaning) in found.items():
        expected = names[key] if key in names else parameters[key].default
        assert yaml.safe_load(default.strip("`")) == expected, key
        assert meaning


def test_top_level_keys_are_documented() -> None:
    assert sorted(table("## Top level")) == sorted(TOP_KEYS)


def test_decoding_keys_are_documented() -> None:
    found = table("### `model.decoding`")
    assert {key: yaml.safe_load(cells[0].strip("`")) for key, cells in found.items()} == vars(DecodingOptions())


def test_trainer_defaults_are_documented() -> None:
    found = {key: cells[0].strip("`") for key, cells in table("## `trainer`").items()}
    for key, value in TRAINER_DEFAULTS.items():
        assert yaml.safe_load(found[key]) == value, key


def test_plugin_arguments_are_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `((?:model|data)\.\w+)` \| `(\w+)` \| (.+) \|$", text, re.M)
    own = registry.PASSED
    classes: dict[tuple[str, str], type] = {}
    for key, family in (registry.FAMILY_OF | {"data.train": "dataset"}).items():
        if key != "model.cross_attention":
            for name, entry in registry.entries(family).items():
                if entry.distribution == "llmkit":
                    classes[key, name] = entry.load()
    assert {(key, name) for key, name, _ in rows} == set(classes)
    for key, name, cells in rows:
        given: dict[str, Any] = {}
        for cell in re.findall(r"`([^`]+)`", cells):
            argument, colon, default = cell.partition(": ")
            given[argument] = settled(parse_yaml(default)) if colon else inspect.Parameter.empty
        parameters = inspect.signature(classes[key, name]).parameters.values()
        plain = [p for p in parameters if p.name not in own and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert given == {p.name: written(p.default) for p in plain}, (key, name)


# docs/huggingface.md


def test_the_recipes_for_hugging_face_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "huggingface.md"
    for block in blocks(page, "yaml"):
        (workspace / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text)
    hf_folder.write_bert(workspace / "bert")
    talking = hf_folder.write(workspace / "talking")
    template = {"chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }}<|endoftext|>{% endfor %}"}
    roles = json.loads((talking / "tokenizer_config.json").read_text())
    (talking / "tokenizer_config.json").write_text(json.dumps(roles | template))
    (talk,) = (block.text for block in blocks(page, "json"))
    (workspace / "talks.jsonl").write_text(talk * 9)
    words = ("--model.init_from", "hf:./talking", "--model.context", "24", "--model.decoding.max_new_tokens", "4")
    done("fit", "--config", "chat.yaml", *words, *TINY[-10:], "--output", "chats")
    for name in ("train.csv", "dev.csv"):
        (workspace / name).write_text("sentence,label\n" + "A good film,1\nA bad one,0\n" * 8)
    (row,) = re.findall(r"`(\{\"country.*\})`", page.read_text("utf-8"))
    (workspace / "capitals.jsonl").write_text(f"{row}\n" * 2)
    published = ("--model.init_from", "hf:./bert")
    done("fit", "--config", "sst2.yaml", *published, *TINY[-10:], "--model.context", "16")
    for line in lines(page):
        if "--tasks" not in line or importlib.util.find_spec("lm_eval"):
            done(*shlex.split(line)[1:])
    (block,) = blocks(page, "python")
    exec(block.text, {})
    answers = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert answers[0]["label"] in ("0", "1")


# docs/plugins.md


def test_the_norm_of_the_guide_trains(workspace: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "@register" in block.text)
    (workspace / "guide_norm.py").write_text(block.text)
    try:
        done("fit", "--config", "configs/quickstart.yaml", "--imports", "guide_norm.py", "--model.norm", "l2", *TINY)
    finally:
        forget("guide_norm")


def test_the_examination_of_the_guide() -> None:
    (block,) = (block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "examination" in block.text)
    names: dict[str, Any] = {}
    exec(block.text, names)
    names["test_multi_head"]("causal_by_gradient")


def test_every_sown_bug_is_in_the_table() -> None:
    text = (ROOT / "docs" / "plugin-check.md").read_text("utf-8")
    for bug in BUGS:
        assert f"| {bug.name} | {bug.cls} | `{bug.caught_by}` |" in text, "run docs/check_table.py"
    for family in registry.DEFAULTS:
        for found in testing.properties(family):
            assert f"| `{found.name}` | {found.claim} |" in text, "run docs/check_table.py"


def test_the_guide_names_every_member_of_the_contracts() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    contracts = importlib.import_module("llmkit.contracts")
    for name in ("Tokenizer", "Attention", "Position", "Feedforward", "Norm", "Head", "Dataset"):
        for member in getattr(getattr(contracts, name), "__abstractmethods__", ()):
            assert re.search(rf"`[^`]*\b{member}\b", text), f"{name}.{member}"


def test_shell_scripts_of_the_guides_are_valid() -> None:
    for page in PAGES:
        for block in blocks(page, "sh"):
            answer = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            assert answer.returncode == 0, f"{page.name}: {answer.stderr}"

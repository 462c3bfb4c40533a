"""What a user does wrong: one line on stderr that names key and remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import copy
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command import TINY, Result, done, llmkit

from llmkit.config.plan import plan

JARGON = (
    "Traceback",
    "Parser key",
    "subtypes",
    "NestedArg",
    "Namespace(",
    "<class",
    "collections.abc",
    "\x1b",
    "config.",
)
"""What no user should have to read."""


class Case(NamedTuple):
    """A mistake and what its message has to say."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    yaml: str = ""


def write_files(folder: Path) -> None:
    """Write the data that the cases name."""
    texts = {
        "text.txt": "".join(f"line {i} of the text has words {i * 7 % 13}\n" for i in range(60)),
        "labels.csv": "text,label\n" + "".join(f"word {i},{'yes' if i % 2 else 'no'}\n" for i in range(30)),
        "other.csv": "text,label\nword 1,maybe\n",
        "same.csv": "text,label\na,x\nb,x\n",
        "long.csv": "text,label\n" + "".join(f"{'word ' * (9 + i)},{'yes' if i % 2 else 'no'}\n" for i in range(30)),
        "empty.txt": "",
        "syntax.yaml": "model:\n  dim: 16\n dim: [\n",
        "tab.yaml": "data: {train: text.txt}\n\tmodel: 3\n",
        "twice.yaml": "model:\n  dim: 16\n  dim: 8\n",
    }
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / "bytes.txt").write_bytes(b"good\nbad \xff\xfe\n")
    (folder / "folder").mkdir()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all cases, with their data."""
    path = tmp_path_factory.mktemp("errors")
    write_files(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.delenv("LLMKIT_UNSET", raising=False)
        yield path


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of a generation and a classification model."""
    output = tmp_path_factory.mktemp("good")
    label = ("--data.train", "labels.csv", "--model.head", "classification")
    return {
        "GEN": str(done("fit", "--data.train", "text.txt", *TINY, "--output", output).checkpoint),
        "CLS": str(done("fit", *label, *TINY, "--output", output).checkpoint),
    }


def check(result: Result, says: tuple[str, ...], several: bool = False) -> None:
    """Assert that a command ended in the lines that it should: one, or ``several`` with one of ``says`` each."""
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if not re.match(r"llmkit: (note|warning)", line)]
    assert len(lines) == (len(says) if several else 1), result.err
    assert all(line.startswith("llmkit: error: ") for line in lines)
    for text in says:
        assert sum(text in line for line in lines) == 1, result.err
    for text in JARGON:
        assert text not in result.err


def run(folder: Path, case: Case, tiny: bool = True, several: bool = False) -> None:
    before = sorted(folder.rglob("*"))
    command, *words = case.words
    start = ["--output", "runs"] if command in ("fit", "validate", "test", "predict", "inspect") else []
    if command in ("fit", "inspect") and tiny:
        start += TINY
    if case.yaml:
        (folder / "case.yaml").write_text(case.yaml)
        start += ["--config", "case.yaml"]
    try:
        check(llmkit(command, *start, *words), case.says, several)
    finally:
        (folder / "case.yaml").unlink(missing_ok=True)
        after = sorted(folder.rglob("*"))
        for path in reversed([path for path in after if path not in before]):
            path.rmdir() if path.is_dir() else path.unlink()
    assert after == before, "something was left behind"


def name(case: Case) -> str:
    return " ".join([*case.words, case.yaml.strip().replace("\n", "; ")]).strip()[:90]


def fit(*words: str, says: tuple[str, ...]) -> Case:
    return Case(("fit", "--data.train", "text.txt", *words), says)


def config(content: str, *says: str) -> Case:
    return Case(("fit",), says, content if "data:" in content else f"data: {{train: text.txt}}\n{content}\n")


UNKNOWN_NAMES = [
    fit("--model.attention", "lsmt", says=("model.attention", "'lsmt'", "Did you mean 'lstm'?", "Allowed: ", "gru")),
    fit("--model.attention=lsmt", says=("model.attention", "Did you mean 'lstm'?")),
    fit("--model.attention", "{name: multihead}", says=("model.attention", "Did you mean 'multi_head'?")),
    fit("--model.head", "generatoin", says=("model.head", "Did you mean 'generation'?", "translation")),
    fit("--model.cross_attention", "mutli_head", says=("model.cross_attention", "Did you mean 'multi_head'?")),
    fit("--model.position", "rotray", says=("model.position", "Did you mean 'rotary'?", "alibi")),
    fit("--model.feedforward", "swigul", says=("model.feedforward", "Did you mean 'swiglu'?", "gelu")),
    fit("--model.norm", "rmss", says=("model.norm", "Did you mean 'rms'?", "layer")),
    fit("--data.tokenizer", "bbpe", says=("data.tokenizer", "Did you mean 'bpe'?", "unigram")),
    fit("--model.optimizer", "adamww", says=("model.optimizer", "Did you mean 'adamw'?", "muon", "sgd")),
    fit("--model.scheduler", "cosin", says=("model.scheduler", "Did you mean 'cosine'?", "steplr")),
    fit("--trainer.accelerator", "quantum", says=("accelerator", "'quantum'", "cpu")),
    fit("--trainer.strategy", "ddpp", says=("strategy", "'ddpp'", "ddp")),
    config("model: {attention: multihaed}", "case.yaml", "model.attention", "Did you mean 'multi_head'?", "gru"),
    config("model: {optimizer: admw}", "case.yaml", "model.optimizer", "Did you mean 'adamw'?"),
    config("data: {train: text.txt, tokenizer: bpee}", "case.yaml", "data.tokenizer", "Did you mean 'bpe'?"),
    config("model: {attention: llmkit_plugins.attention.softmax.Nope}", "case.yaml", "model.attention", "'Nope'"),
    config("model: {attention: {class_path: lstm}}", "case.yaml", "model.attention", "lstm"),
    Case(("plugins", "atention"), ("'atention'", "Did you mean 'attention'?", "tokenizer")),
    Case(("fitt",), ("'fitt'", "Did you mean 'fit'?", "predict")),
]

UNKNOWN_KEYS = [
    fit("--modle.dim", "2", says=("'modle'", "Did you mean 'model'?", "Allowed: ", "trainer")),
    fit("--outptu", "x", says=("'outptu'", "Did you mean 'output'?")),
    fit("--model.dimm", "2", says=("'model.dimm'", "Did you mean 'dim'?", "num_layers")),
    fit("--data.batchsize", "2", says=("'data.batchsize'", "Did you mean 'batch_size'?", "tokenizer")),
    fit("--trainer.maxsteps", "2", says=("'trainer.maxsteps'", "Did you mean 'max_steps'?", "precision")),
    fit("--trainer.max_step", "2", says=("'trainer.max_step'", "Did you mean 'max_steps'?")),  # no abbreviations
    fit("--model.attention.num_haeds", "2", says=("model.attention", "Did you mean 'num_heads'?", "qk_norm")),
    fit("--model.attention.init_args.num_haeds", "2", says=("model.attention", "Did you mean 'num_heads'?")),
    fit("--model.attention", "{name: multi_head, haeds: 2}", says=("model.attention", "'haeds'", "num_heads")),
    fit("--model.attention", "lstm", "--model.attention.num_heads", "2", says=("LSTM", "'num_heads'")),
    fit("--data.tokenizer", "bpe", "--data.tokenizer.vocab", "300", says=("data.tokenizer", "'vocab_size'")),
    fit("--model.optimizer.lrr", "3", says=("model.optimizer", "Did you mean 'lr'?", "weight_decay")),
    fit("--model.scheduler", "{name: cosine, warmup: 3}", says=("model.scheduler", "Did you mean 'warmup_steps'?")),
    fit("--model.decoding.temprature", "1", says=("model.decoding", "Did you mean 'temperature'?", "top_k")),
    config("modle: {dim: 3}", "case.yaml", "'modle'", "Did you mean 'model'?", "trainer"),
    config("1: 2", "case.yaml", "'1'", "Allowed: "),
    config("model: {dimm: 3}", "case.yaml", "'model.dimm'", "Did you mean 'dim'?", "num_layers"),
    config("data: {trian: text.txt}", "case.yaml", "'data.trian'", "Did you mean 'train'?", "validation"),
    config("trainer: {max_stps: 3}", "case.yaml", "'trainer.max_stps'", "Did you mean 'max_steps'?"),
    config("model: {attention: {name: multi_head, num_haeds: 2}}", "case.yaml", "model.attention", "'num_heads'"),
    config("model: {attention: {name: lstm, num_heads: 2}}", "case.yaml", "model.attention", "LSTM", "num_heads"),
    config("model: {head: {name: generation, labels: 2}}", "case.yaml", "model.head", "'labels'"),
    config("model: {optimizer: {name: adamw, lrr: 3}}", "case.yaml", "model.optimizer", "Did you mean 'lr'?"),
    config("model: {decoding: {temprature: 1}}", "model.decoding", "Did you mean 'temperature'?", "top_k"),
    Case(("plugins", "--jsno"), ("'--jsno'", "Did you mean '--json'?")),
    Case(("inspect", "--data.train", "text.txt", "--model.dimm", "3"), ("'model.dimm'", "Did you mean 'dim'?")),
]

WRONG_VALUES = [
    fit("--model.dim", "abc", says=("model.dim", "whole number", "'abc'")),
    fit("--model.dim", "1.5", says=("model.dim", "whole number", "'1.5'")),
    fit("--model.dim", says=("command line: --model.dim needs a value",)),
    fit("--model.norm_first", "maybe", says=("model.norm_first", "true or false", "'maybe'")),
    fit("--data.documents", "lines", says=("data.documents", "file, line or every_line", "Did you mean 'line'?")),
    fit("--model.attention.num_heads", "two", says=("model.attention.num_heads", "whole number", "'two'")),
    fit("--model.optimizer.lr", "fast", says=("model.optimizer.lr", "a number", "'fast'")),
    fit("--model.optimizer.lr", "-1", says=("optimizer", "learning rate", "-1")),
    fit("--model.scheduler", "OneCycleLR", says=("model.scheduler", "max_lr")),  # an argument that it must have
    fit("--data.tokenizer", "pretrained", says=("data.tokenizer", "path")),
    fit("--model.optimizer", "LBFGS", says=("optimizer", "LBFGS")),
    fit("--trainer.max_steps", "many", says=("trainer.max_steps", "whole number", "'many'")),
    fit("--trainer.max_steps", "-5", says=("max_steps", "-5")),
    fit("--trainer.precision", "17", says=("trainer.precision", "bf16-mixed", "'17'")),
    fit("--trainer.devices", "0", says=("devices", "0")),
    fit("--trainer.accumulate_grad_batches", "0", says=("trainer.accumulate_grad_batches", "at least 1")),
    fit("--trainer.val_check_interval", "0", says=("trainer.val_check_interval",)),
    fit("--trainer.log_every_n_steps", "0", says=("command line: trainer.log_every_n_steps: must be at least 1",)),
    fit("--trainer.gradient_clip_val", "-3", says=("command line: trainer.gradient_clip_val: must be 0 or more",)),
    fit("--data.encoding", "utf9", says=("command line: data.encoding: unknown encoding: utf9",)),
    fit(
        *("--data.pack", "true", "--model.head", "classification"),
        says=("data.pack: is for completion and heads that join their rows, and Classification does not",),
    ),
    fit("--model.num_layers", "0", says=("model.num_layers", "at least 1")),
    fit("--model.context", "1", says=("model.context", "at least 2")),  # the next token of one token is in no block
    fit("--model.dropout", "1.5", says=("model.dropout", "below 1")),
    fit("--model.attention.dropout", "2", says=("attention", "dropout", "2")),
    fit("--data.batch_size", "0", says=("data.batch_size", "at least 1")),
    fit("--data.validation_share", "2", says=("data.validation_share", "below 1")),
    fit("--data.num_workers", "-1", says=("data.num_workers", "at least 0")),
    fit("--data.tokenizer", "{name: bpe, vocab_size: 10}", says=("vocab_size 10", "262")),
    fit("--model.decoding.temperature", "-1", says=("temperature", "-1")),
    fit("--model.decoding.top_p", "x", says=("decoding", "top_p", "'x'")),
    fit("--model.head", "{name: generation", says=("model.head", "{name: generation")),  # a brace is missing
    fit("--output", "text.txt", says=("text.txt",)),  # a file
    fit("--config", says=("--config",)),
    fit("stray", says=("'stray'", "--key value")),
    config("model: {dim: abc}", "model.dim", "whole number", "'abc'"),
    config("data: {train: 3}", "data.train", "'3'"),
    config("data: {train: text.txt, batch_size: 2.5}", "data.batch_size", "whole number", "'2.5'"),
    config("data: {train: text.txt, columns: text}", "data.columns", "mapping", "'text'"),
    config("data: {train: text.txt, format: cvs}", "data.format", "Did you mean 'csv'?", "parquet"),
    config("data: {train: text.txt, format: lines, pattern: '('}", "data.pattern", "regular expression"),
    config("data: {train: text.txt, encoding: utf9}", "data.encoding", "utf9"),
    config("seed: 3", "seed", "Did you mean 'seed_everything'?", "unknown key 'seed'"),
    config("seed_everything: abc", "seed_everything", "whole number", "'abc'"),
    config("name: [a]", "name", "expected text"),
    config("imports: 3", "case.yaml", "imports", "3"),
    config("model: 3", "case.yaml", "model: expected a mapping", "3"),
    config("model: {attention: 3}", "case.yaml", "model.attention", "name", "3"),
    config("model: {attention: [[lstm]]}", "case.yaml", "model.attention", "name", "lstm"),
    config("model: {position: [rotary]}", "case.yaml", "model.position", "name", "rotary"),
    config("model: {attention: {num_haeds: 3}}", "case.yaml", "model.attention", "MultiHead", "num_heads"),
    config("model: {attention: {name: lstm, class_path: torch.nn.LSTM}}", "case.yaml", "model.attention", "class_path"),
    config("model: {attention: {name: multi_head, num_heads: two}}", "model.attention.num_heads", "whole number"),
    config("model: {attention: torch.nn.Identity}", "case.yaml", "model.attention", "Identity", "contracts.Attention"),
    config("trainer: {callbacks: Nope}", "trainer.callbacks", "'Nope'"),
]

COMBINATIONS = [
    fit("--model.attention.num_heads", "3", says=("num_heads 3", "dim 16", "15, 18")),
    fit("--model.attention", "{name: grouped_query, num_kv_heads: 3}", says=("num_kv_heads 3", "1, 2, 4")),
    fit("--model.attention.num_heads", "0", says=("num_heads", "at least 1")),
    fit("--model.attention.num_heads", "16", says=("rotary", "even width")),
    fit("--model.dim", "15", "--model.attention", "lstm", "--model.head", "translation", says=("dim 15", "14, 16")),
    fit("--model.head", "translation", "--model.cross_attention", "lstm", says=("model.cross_attention", "'cross'")),
]

FILES = [
    Case(("fit",), ("--config", "--data.train")),
    Case(("inspect",), ("inspect", "--config")),
    Case(("fit", "--config", "nope.yaml"), ("--config nope.yaml", "does not exist")),
    Case(("fit", "--config", "folder"), ("--config folder", "is a folder")),
    Case(("fit", "--data.train", "nope.txt"), ("data.train", "'nope.txt'")),
    Case(("fit", "--data.train", "nope/*.txt"), ("data.train", "'nope/*.txt'")),
    Case(("fit", "--data.train", "[text.txt, nope.txt]"), ("data.train", "'nope.txt'")),
    fit("--data.validation", "nope.txt", says=("data.validation", "'nope.txt'")),
    Case(("fit", "--data.train", "empty.txt"), ("data.train", "no rows", "empty.txt")),
    Case(("fit", "--data.train", "bytes.txt"), ("data.train", "bytes.txt:2", "utf-8", "data.encoding")),
    Case(("fit", "--data.train", "{text: text.txt, b: empty.txt}"), ("data.train", "text.txt: 60", "empty.txt: 0")),
    fit("--imports", "nope.py", says=("imports", "nope.py", "does not exist")),
    fit("--imports", "nope_module", says=("imports", "nope_module")),
    fit("--ckpt_path", "nope.ckpt", says=("nope.ckpt", "does not exist")),
    Case(("validate", "--ckpt_path", "last"), ("--ckpt_path last", "runs/run")),
    fit("--ckpt_path", "best", says=("--ckpt_path best", "runs/run")),
    config("ckpt_path: nope.ckpt", "nope.ckpt", "does not exist"),
    config("imports: [nope.py]", "imports", "nope.py", "does not exist"),
    *(Case((command, "--ckpt_path", "nope.ckpt"), ("nope.ckpt",)) for command in ("validate", "test", "predict")),
    *(Case((command,), (command, "--ckpt_path")) for command in ("validate", "test", "predict")),
    Case(("infer", "nope.ckpt", "x"), ("nope.ckpt", "does not exist")),
    Case(("infer", "folder", "x"), ("folder",)),
    Case(("infer",), ("infer", "CHECKPOINT")),
]

LABELS = ("fit", "--model.head", "classification", "--data.train")
COLUMNS = [
    Case((*LABELS, "labels.csv", "--data.columns", "{text: txet}"), ("'txet'", "labels.csv", "Did you mean 'text'?")),
    Case((*LABELS, "labels.csv", "--data.columns", "{txt: text}"), ("'txt'", "Did you mean 'text'?", "label")),
    Case((*LABELS, "text.txt"), ("'label'", "text.txt", "Columns: text")),
    Case((*LABELS, "labels.csv", "--data.validation", "other.csv"), ("'maybe'", "no, yes", "other.csv")),
    Case((*LABELS, "same.csv"), ("label", "['x']")),
]

YAML = [
    Case(("fit", "--config", "syntax.yaml"), ("syntax.yaml:3", "YAML")),
    Case(("fit", "--config", "tab.yaml"), ("tab.yaml:2", "YAML")),
    Case(("fit", "--config", "twice.yaml"), ("twice.yaml:3", "'dim'", "twice")),
    Case(("fit",), ("case.yaml", "${LLMKIT_UNSET}", "not set"), "data: {train: '${LLMKIT_UNSET}/a.txt'}\n"),
    Case(("fit",), ("case.yaml", "mapping", "list"), "- a\n- b\n"),
]

SEVERAL = [
    config("modle: {}\nmodel: {dimm: 3}\ntrainer: {max_stps: 1}", "'modle'", "'model.dimm'", "'trainer.max_stps'"),
    fit("--modle.dim", "1", "--data.trian", "x", says=("'modle'", "'data.trian'")),
    config("model: {attention: lsmt, norm: rmss}", "'lsmt'", "'rmss'"),
    config("model: {attention: lsmt, dimm: 3}", "'lsmt'", "'model.dimm'"),
    Case(
        ("fit", "--model.optimizer.lr", "fast"),
        ("'num_haeds'", "command line: model.optimizer.lr: expected a number", "case.yaml:2: model.dim: expected"),
        "data: {train: text.txt}\nmodel: {dim: big, attention: {name: multi_head, num_haeds: 3}}\n",
    ),
    Case(("fit", "--model.dimm", "3"), ("'model.dimm'", "'data.trian'"), "data: {trian: text.txt}\n"),
    config(
        "model: {dimm: 3, dim: big, attention: {name: multi_head, num_haeds: 3, dropout: x}}\n"
        "trainer: {max_steps: few}",
        *("case.yaml:2: unknown key 'model.dimm'", "case.yaml:2: model.dim: expected a whole number, got 'big'"),
        *("'num_haeds'", "case.yaml:2: model.attention.dropout: expected a number, got 'x'"),
        "case.yaml:3: trainer.max_steps: expected a whole number, got 'few'",
    ),
    fit(
        *("--model.dim", "big", "--model.norm", "rmss", "--model.optimizer.lr", "fast", "--data.batch_size", "x"),
        says=(
            "model.dim: expected",
            "'rmss'",
            "command line: model.optimizer.lr: expected a number",
            "data.batch_size",
        ),
    ),
]


@pytest.mark.parametrize("case", UNKNOWN_NAMES, ids=name)
def test_unknown_name(case: Case, folder: Path) -> None:
    run(folder, case, tiny="bpee" not in case.yaml)  # of one key only the topmost value counts


@pytest.mark.parametrize("case", UNKNOWN_KEYS, ids=name)
def test_unknown_key(case: Case, folder: Path) -> None:
    run(folder, case)


@pytest.mark.parametrize("case", WRONG_VALUES, ids=name)
def test_wrong_value(case: Case, folder: Path) -> None:
    # The options that make a run small would hide the same keys of a file.
    hidden = {"model: {dim: abc}", "data: {train: text.txt, batch_size: 2.5}"}
    run(folder, case, tiny=not any(text in case.yaml for text in hidden))


@pytest.mark.parametrize("case", COMBINATIONS, ids=name)
def test_parts_that_do_not_fit(case: Case, folder: Path) -> None:
    run(folder, case)


@pytest.mark.parametrize("case", FILES, ids=name)
def test_missing_file(case: Case, folder: Path) -> None:
    run(folder, case, tiny=len(case.words) > 1)


@pytest.mark.parametrize("case", COLUMNS, ids=name)
def test_columns_and_labels(case: Case, folder: Path) -> None:
    run(folder, case)


@pytest.mark.parametrize("case", YAML, ids=name)
def test_yaml(case: Case, folder: Path) -> None:
    run(folder, case)


@pytest.mark.parametrize("case", SEVERAL, ids=name)
def test_several_mistakes_are_told_together(case: Case, folder: Path) -> None:
    run(folder, case, tiny=False, several=True)


def test_an_empty_group_is_no_group(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("data:\n  train: text.txt\nmodel:\ntrainer:\n")
    done("fit", "--config", tmp_path / "empty.yaml", *TINY, "--output", tmp_path)


def test_without_validation_data(folder: Path, tmp_path: Path) -> None:
    result = done("fit", "--data.train", "text.txt", "--data.validation_share", "0", *TINY, "--output", tmp_path)
    assert result.checkpoint.is_file()


LOCAL = """\
from llmkit import Attention, register


@register("attention", "ahead_only")
class AheadOnly(Attention):
    \"\"\"Mixes nothing, and knows no direction but one.\"\"\"

    def forward(self, x_BTD, seq, *, memory=None, state=None):
        return x_BTD
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plugin file that is not beside the data."""
    path = tmp_path_factory.mktemp("local") / "ahead_only_plugin.py"
    path.write_text(LOCAL)
    return str(path)


@pytest.mark.parametrize("head", ["classification", "translation"])
def test_head_that_the_attention_does_not_support(head: str, folder: Path, local: str) -> None:
    words = ("--imports", local, "--model.attention", "ahead_only", "--model.head", head)
    run(folder, fit(*words, says=("model.attention", "AheadOnly", "'bidirectional'", "It supports: causal")))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nothing_of_this_name\n", ("nothing_of_this_name",)),
        ("def f(:\n", ("SyntaxError",)),
        ("from llmkit import register\n@register('attention', 'x')\nclass X: pass\n", ("'x'", "contracts.Attention")),
        (LOCAL.replace("ahead_only", "lstm"), ("'lstm'", "taken")),
        (LOCAL.replace("attention", "atention"), ("'atention'", "Did you mean 'attention'?")),
        (LOCAL.replace("forward", "foward"), ("AheadOnly", "abstract", "forward")),
    ],
)
def test_broken_local_plugin(code: str, says: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"broken_{zlib.crc32(code.encode())}.py"
    path.write_text(code)
    run(folder, fit("--imports", str(path), says=says))


@pytest.mark.parametrize("head", ["classification", "translation"])
def test_longer_than_the_context(head: str, folder: Path, tmp_path: Path) -> None:
    """A text that is cut is not cut silently: how many, and which option is to be set."""
    columns = ("--data.columns", "{source: text, target: text}") if head == "translation" else ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = ("--data.train", "long.csv", "--model.head", head, "--data.validation_share", "0.1")
        result = done("fit", *words, *columns, *TINY, "--output", tmp_path)
    told = result.out + result.err + " ".join(str(item.message) for item in caught)
    assert re.search(r"(27 of 27|27 rows|all 27)", told), told
    assert "model.context" in told


# Checkpoints


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("",), ("empty",)),
        ((), ("no text",)),
        (("--input", "nope.txt"), ("--input", "nope.txt")),
        (("--input", "bytes.txt"), ("--input", "bytes.txt")),
        (("--input", "empty.txt"), ("no text",)),
        (("x", "--temprature", "1"), ("--temprature", "Did you mean '--temperature'?")),
        (("x", "--temperature", "-1"), ("temperature", "-1")),
        (("x", "--temperature", "nan"), ("temperature", "nan")),
        (("x", "--temperature", "warm"), ("temperature", "warm")),
        (("x", "--top_k", "-1"), ("top_k", "-1")),
        (("x", "--top_p", "0"), ("top_p", "above 0")),
        (("x", "--top_p", "1.1"), ("top_p", "at most 1")),
        (("x", "--num_beams", "0"), ("num_beams", "at least 1")),
        (("x", "--length_penalty", "nan"), ("length_penalty", "nan")),
        (("x", "--max_new_tokens", "0"), ("max_new_tokens", "at least 1")),
        (("x", "--batch_size", "0"), ("batch_size", "at least 1")),
        (("x", "--device", "cudaa"), ("--device", "cudaa")),
        (("x", "--imports", "nope.py"), ("imports", "nope.py")),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_infer(words: tuple[str, ...], says: tuple[str, ...], good: dict[str, str], folder: Path) -> None:
    run(folder, Case(("infer", good["GEN"], *words), says))


def newer(content: dict[str, Any]) -> None:
    content["llmkit"] |= {"format": 99, "versions": {"llmkit": "9.1"}}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "foreign": (lambda content: content.pop("llmkit"), ("not an llmkit checkpoint",)),
    "newer": (newer, ("format 99", "9.1", "Upgrade")),
    "no_tokenizer": (lambda content: content["llmkit"].pop("tokenizer_state"), ("incomplete", "tokenizer_state")),
    "no_weights": (lambda content: content.pop("state_dict"), ("weights",)),
    "fewer_weights": (lambda content: content["state_dict"].popitem(), ("weights",)),
}


@pytest.fixture(scope="module")
def damaged(good: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Paths of damaged checkpoints and what is said of them."""
    path = tmp_path_factory.mktemp("damaged")
    whole = Path(good["GEN"]).read_bytes()
    says = ("cannot be read",)
    raw = {"empty": b"", "start": whole[:10], "half": whole[: len(whole) // 2], "text": b"hello\n"}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, content in raw.items():
        (path / f"{key}.ckpt").write_bytes(content)
        found[key] = (str(path / f"{key}.ckpt"), says)
    checkpoint = torch.load(good["GEN"], weights_only=True)
    for key, (damage, told) in DAMAGE.items():
        content = copy.deepcopy(checkpoint)
        damage(content)
        torch.save(content, path / f"{key}.ckpt")
        found[key] = (str(path / f"{key}.ckpt"), told)
    torch.save({"llmkit": {"format": 1}, "code": Path("x")}, path / "code.ckpt")
    found["code"] = (str(path / "code.ckpt"), says)
    return found


@pytest.mark.parametrize("command", ["infer", "fit", "validate"])
@pytest.mark.parametrize("kind", ["empty", "start", "half", "text", "code", *DAMAGE])
def test_damaged_checkpoint(
    kind: str, command: str, damaged: dict[str, tuple[str, tuple[str, ...]]], folder: Path
) -> None:
    path, says = damaged[kind]
    words = ("infer", path, "x") if command == "infer" else (command, "--ckpt_path", path)
    run(folder, Case(words, (path, *says)), tiny=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("validate", "--model.dim", "32"), ("model.dim",)),
        (("fit", "--model.dim", "32"), ("model.dim",)),
        (("fit", "--model.attention", "lstm"), ("model.attention",)),
        (("fit", "--model.head", "classification"), ("model.head",)),
        (("fit", "--data.tokenizer", "byte"), ("data.tokenizer",)),
        (("validate", "--model.dimm", "32"), ("'model.dimm'", "Did you mean 'dim'?")),
        (("test",), ("data.test", "not set")),
        (("predict",), ("data.predict", "not set")),
        (("predict", "--data.predict", "nope.txt"), ("data.predict", "'nope.txt'")),
        (("predict", "--data.predict", "empty.txt"), ("data.predict", "empty.txt")),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_checkpoint_and_options(
    words: tuple[str, ...], says: tuple[str, ...], good: dict[str, str], folder: Path
) -> None:
    command, *rest = words
    run(folder, Case((command, "--ckpt_path", good["GEN"], *rest), says), tiny=False)


def test_the_last_checkpoint_before_there_is_one(folder: Path, tmp_path: Path) -> None:
    """A job whose command is always the same one may be killed before its first checkpoint."""
    result = done("fit", "--data.train", "text.txt", *TINY, "--output", tmp_path, "--ckpt_path", "last")
    assert "no run below" in result.err and "training begins at the start" in result.err


def test_the_last_good_checkpoint(folder: Path, tmp_path: Path) -> None:
    words = ("--output", tmp_path, "--trainer.enable_progress_bar", "false")
    first = done("fit", "--data.train", "text.txt", *TINY, *words)
    older, newer = first.folder / "checkpoints" / "best.ckpt", first.folder / "checkpoints" / "last.ckpt"
    assert older.is_file() and newer.is_file()
    start = newer.read_bytes()[:5000]
    newer.unlink()  # the two may be one file
    newer.write_bytes(start)
    os.utime(older, (1000, 1000))
    result = done("validate", "--ckpt_path", "last", *words, "--trainer.limit_val_batches", "1")
    note = next(line for line in result.err.splitlines() if "note: --ckpt_path last" in line)
    assert f"{newer} cannot be read" in note and f"{older}, of step 2" in note
    older.write_bytes(b"")
    os.utime(older, (1000, 1000))
    check(
        llmkit("fit", "--ckpt_path", "last", *words), ("--ckpt_path last", "no checkpoint", f"{newer} cannot be read")
    )


def test_where_values_come_from(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    attention = "  attention:\n    dropout: 0.1\n    name: multi_head\n    num_heads: 4\n"
    first.write_text(f"data: {{train: text.txt}}\nmodel:\n{attention}  norm: rms\n  dim: 16\n")
    second.write_text("model:\n  norm: layer\n  attention: {class_path: llmkit_plugins.attention.softmax.MultiHead}\n")
    words = ["--config", str(first), "--config", str(second), "--model.dim", "8", "--model.optimizer.lr", "0.1"]
    of = plan("fit", words).config.of
    assert of("model.dim") == of("model.optimizer.init_args.lr") == "command line"
    assert of("model.norm") == f"{second}:2"
    assert of("model.attention.class_path") == f"{second}:3"
    assert of("model.attention.init_args.num_heads") == f"{first}:6"
    assert of("model.attention.dropout") == f"{first}:4"
    assert of("model.position") == of("model.dropout") == of("model.attention.qk_norm") == "default"
    assert of("model.decoding.top_k") == "default of Generation"
    second.write_text("model: {attention: gru}\n")
    of = plan("fit", words).config.of
    assert of("model.attention") == f"{second}:1"
    assert of("model.attention.dropout") == "default"  # what the other class was given is gone


def test_predict_column(good: dict[str, str], folder: Path) -> None:
    words = ("--data.predict", "labels.csv", "--data.columns", "{text: txet}")
    run(folder, Case(("predict", "--ckpt_path", good["CLS"], *words), ("'txet'", "labels.csv", "Did you mean 'text'?")))


def test_test_label(good: dict[str, str], folder: Path) -> None:
    words = ("test", "--ckpt_path", good["CLS"], "--data.test", "other.csv")
    run(folder, Case(words, ("'maybe'", "no, yes", "other.csv")))

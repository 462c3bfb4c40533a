"""What is told when a plugin raises, wherever that is: the plugin, its file and line, its own frames, nothing else."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import TINY, Result, llmkit

from llmkit import imports, main, registry
from llmkit.errors import UserError
from llmkit.run import failures

PLUGINS = """\
import torch
import beside
from torch import nn
from llmkit import register
from llmkit.contracts import Attention, Feedforward
from llmkit_plugins.head.classification import Classification
from llmkit_plugins.tokenizer import Char


class Inner(nn.Module):
    def forward(self, x):
        raise LookupError("in a\\npart")  # part


@register("attention", "faulty")
class Faulty(Attention):
    roles = ("causal", "bidirectional")

    def __init__(self, dim, role, at=""):
        super().__init__(dim, role)
        self.at, self.inner = at, Inner()
        if at == "init":
            raise AttributeError("while it is built")  # init

    def forward(self, x, seq, *, memory=None, state=None):
        if x.is_meta and self.at != "device":
            return x
        if self.at == "part":
            return self.inner(x)  # call of the part
        if self.at == "torch":
            return x @ x[0, :3]  # torch
        if self.at == "beside":
            beside.fail()  # beside


        if self.at == "device":
            return x + torch.arange(x.shape[1])[None, :, None]  # device
        return x


class Twisted(Faulty):
    def forward(self, x, seq, *, memory=None, state=None):  # twisted
        return {"tuple": (x, None), "nothing": None, "shape": x[:, :1]}[self.at]


class Signature(Faulty):
    def forward(self, x, mask=None):  # signature
        return x


class Pair(Feedforward):
    def forward(self, x):  # pair
        return x, x


@register("head", "faulty")
class FaultyHead(Classification):
    def __init__(self, at=""):
        super().__init__()
        self.at = at

    def encode(self, rows, tokenizer, max_length):  # list
        if self.at == "encode":
            raise KeyError("text")  # encode
        found = super().encode(rows, tokenizer, max_length)
        return {"list": list(found), "short": {**found, "ids": found["ids"][1:]}}.get(self.at, found)

    def loss(self, net, batch):  # loss
        return super().loss(net, batch).total

    def metrics(self, stage):  # metrics
        found = super().metrics(stage)
        return list(found) if self.at == "metrics" else found

    def info(self):  # info
        return {"labels": set(self.labels)} if self.at == "info" else super().info()

    def collate(self, features, tokenizer):  # tuple
        if self.at == "tuple":
            return tuple(features)
        if self.at == "collate":
            raise ZeroDivisionError("in a batch")  # collate
        return super().collate(features, tokenizer)


@register("tokenizer", "faulty")
class FaultyTokenizer(Char):
    def train(self, texts):
        next(iter(texts))
        raise IndexError("in training")  # train
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with the plugins and data; the plugins are forgotten after the tests."""
    path = tmp_path_factory.mktemp("failure")
    (path / "faulty_plugins.py").write_text(PLUGINS)
    (path / "beside.py").write_text('def fail():\n    raise RuntimeError("beside")  # in beside\n')
    (path / "data.csv").write_text(
        "text,label\n" + "".join(f"word {i},{'yes' if i % 2 else 'no'}\n" for i in range(30))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", [*sys.path])
        yield path
    for module in ("faulty_plugins", "beside"):
        sys.modules.pop(module, None)
    imports.imported.discard("faulty_plugins")
    for entries in registry._local.values():
        entries.pop("faulty", None)


def fit(*words: str) -> Result:
    head = () if "--model.head" in words else ("--model.head", "classification")
    return llmkit("fit", "--data.train", "data.csv", "--imports", "faulty_plugins.py", *TINY, *head, *words)


def line_of(mark: str) -> int:
    return next(number for number, line in enumerate(PLUGINS.splitlines(), 1) if line.endswith(f"# {mark}"))


ATTENTION = ("--model.attention", "faulty", "--model.attention.at")
HEAD = ("--model.head", "faulty", "--model.head.at")


@pytest.mark.parametrize(
    ("words", "who", "mark", "message"),
    [
        ((*ATTENTION, "init"), "attention", "init", "AttributeError: while it is built"),
        ((*ATTENTION, "part"), "attention", "part", "LookupError: in a part"),
        ((*ATTENTION, "torch"), "attention", "torch", "RuntimeError: "),
        ((*ATTENTION, "beside"), "attention", "beside", "RuntimeError: beside"),
        ((*HEAD, "encode"), "head", "encode", "KeyError: 'text'"),
        ((*HEAD, "collate"), "head", "collate", "ZeroDivisionError: in a batch"),
        ((*HEAD, "collate", "--data.num_workers", "1"), "head", "collate", "ZeroDivisionError: in a batch"),
        (("--data.tokenizer", "faulty"), "tokenizer", "train", "IndexError: in training"),
    ],
    ids=lambda value: "_".join(value[2:]).replace("--", "") or "tokenizer" if isinstance(value, tuple) else "",
)
def test_a_plugin_that_raises(folder: Path, words: tuple[str, ...], who: str, mark: str, message: str) -> None:
    result = fit(*words)
    assert result.code == 1
    head, *rest = result.err[result.err.index("llmkit: error: ") :].splitlines()
    assert head.startswith(
        f"llmkit: error: {who} faulty (file faulty_plugins.py, line {line_of(mark)}) raised {message}"
    )
    files = [Path(file).name for file in re.findall(r'File "(.+)", line', "\n".join(rest))]
    assert files == {"part": ["faulty_plugins.py"] * 2, "beside": ["faulty_plugins.py", "beside.py"]}.get(
        mark, ["faulty_plugins.py"]
    )
    assert any(line.strip().endswith(f"# {mark}") for line in rest)
    assert all(re.match(r'  File "|    ', line) for line in rest)  # frames, and nothing else


def chosen(name: str, at: str = "") -> tuple[str, ...]:
    return ("--model.attention", f"faulty_plugins.{name}", *(("--model.attention.at", at) if at else ()))


SHAPE = "; the contract wants a tensor of the input's shape, (B, T, D) = (1, 2, 16)"


@pytest.mark.parametrize(
    ("words", "key", "what", "mark", "message"),
    [
        (chosen("Twisted", "tuple"), "attention", "Twisted.forward", "twisted", f" returned a tuple{SHAPE}"),
        (chosen("Twisted", "nothing"), "attention", "Twisted.forward", "twisted", f" returned nothing{SHAPE}"),
        (
            chosen("Twisted", "shape"),
            *("attention", "Twisted.forward", "twisted", f" returned a Tensor of the shape (1, 1, 16){SHAPE}"),
        ),
        (
            chosen("Signature"),
            *("attention", "Signature.forward", "signature"),
            ": got an unexpected keyword argument 'state'; the contract calls it as forward(self, x_BTD, seq, *,",
        ),
        (
            ("--model.feedforward", "faulty_plugins.Pair"),
            "feedforward",
            "Pair.forward",
            "pair",
            f" returned a tuple{SHAPE}",
        ),
        (
            (*HEAD, "loss"),
            "",
            "FaultyHead.loss",
            "loss",
            " returned a Tensor of the shape (); the contract wants a Loss",
        ),
        ((*HEAD, "metrics"), "", "FaultyHead.metrics", "metrics", " returned a list; the contract wants a mapping of"),
        ((*HEAD, "info"), "", "FaultyHead.info", "info", " returned a dict; the contract wants plain data for JSON"),
        ((*HEAD, "list"), "", "FaultyHead.encode", "list", " returned a list; the contract wants a dict of columns"),
        ((*HEAD, "short"), "", "FaultyHead.encode", "list", " returned 26 values as the feature 'ids' of 27 rows; the"),
        (
            (*HEAD, "tuple"),
            "",
            "FaultyHead.collate",
            "tuple",
            " returned a tuple; the contract wants a dict of tensors",
        ),
    ],
)
def test_a_broken_contract(folder: Path, words: tuple[str, ...], key: str, what: str, mark: str, message: str) -> None:
    """One line names the method, its file and line, and what the contract wants."""
    result = fit(*words)
    assert result.code == 2
    line = next(line for line in result.err.splitlines() if line.startswith("llmkit: error: "))
    assert f"{what} (file faulty_plugins.py, line {line_of(mark)}){message}" in line
    assert f"model.{key}: " in line if key else "model." not in line


def test_a_tensor_on_another_device(folder: Path) -> None:
    result = fit(*ATTENTION, "device")
    assert result.code == 1 and f"attention faulty (file faulty_plugins.py, line {line_of('device')})" in result.err
    assert "Make new tensors where the input is: torch.arange(n, device=x.device)" in result.err


def test_a_class_without_a_name(folder: Path) -> None:
    result = fit("--model.attention", "twisted")
    assert result.code == 2
    assert "unknown attention 'twisted'. Twisted (file faulty_plugins.py, line " in result.err
    assert "put @register('attention', 'twisted') above it, or give its path, faulty_plugins.Twisted." in result.err


def test_debug_shows_everything(folder: Path) -> None:
    result = fit(*HEAD, "encode", "--debug")
    assert result.code == 1
    before, _, after = result.err.partition("llmkit: error: head faulty")
    assert "Traceback (most recent call last)" in before and f"{Path('llmkit', 'run', 'cli.py')}" in before
    assert 'raise KeyError("text")' in after


# what the command line makes of other errors


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function from an error that a command raises to the exit code and what is told."""

    def of(error: BaseException, *words: str) -> tuple[int, str]:
        def command(_: str, argv: list[str]) -> int:
            raise error

        monkeypatch.setitem(main.COMMANDS, "raise", (f"{__name__}:command", ""))
        monkeypatch.setattr(sys.modules[__name__], "command", command, raising=False)
        return main.main(["raise", *words]), capsys.readouterr().err

    return of


@pytest.mark.parametrize(("number", "what"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota")])
def test_a_full_disk(number: int, what: str, outcome: Callable[..., tuple[int, str]]) -> None:
    inner = OSError(number, "No space", "runs/last.ckpt")
    outer = RuntimeError("writing failed")
    outer.__cause__ = inner
    for error in (inner, outer):
        code, told = outcome(error)
        assert code == 2
        assert told.startswith(f"llmkit: error: {what}") and told.count("\n") == 1
        assert "while writing runs/last.ckpt" in told and "Checkpoints that were written before are intact" in told
    assert "while writing" not in outcome(OSError(number, "No space"))[1]
    assert "Traceback" in outcome(inner, "--debug")[1]


def test_a_really_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs the device /dev/full")
    assert main.main(["config", "schema", "--output", "/dev/full"]) == 2
    assert capsys.readouterr().err.startswith("llmkit: error: the disk is full")


def test_an_error_of_the_framework_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, outcome: Callable[..., tuple[int, str]]
) -> None:
    with pytest.raises(OSError, match="other"):
        outcome(OSError(errno.EIO, "other"))
    # A plugin is in the traceback, but what raised is the framework that it called.
    files = (registry.__file__, "/p/mine.py", registry.__file__)
    monkeypatch.setattr(failures, "plugin_roots", lambda: [Path("/p")])
    trace = "".join(f'  File "{file}", line 1, in f\n    f()\n' for file in files)
    text = f"Caught\nTraceback (most recent call last):\n{trace}ValueError: x"
    assert failures.explain(RuntimeError(text)) is None
    # The other way round it is the plugin; what it called of torch is left out, its helpers of llmkit are not.
    helper = Path(registry.__file__).with_name("ops") / "losses.py"
    trace += f'  File "/p/mine.py", line 7, in g\n    g()\n  File "{helper}", line 1, in h\n    h()\n'
    trace += f'  File "{sys.modules["torch"].__file__}", line 1, in t\n    t()\n'
    found = failures.explain(RuntimeError(f"Traceback (most recent call last):\n{trace}ValueError: x\ny"))
    assert found == failures.Failure(
        "llmkit: error: plugin (file mine.py, line 7) raised ValueError: x y\n"
        '  File "/p/mine.py", line 1, in f\n    f()\n'
        '  File "/p/mine.py", line 7, in g\n    g()\n'
        f'  File "{helper}", line 1, in h\n    h()',
        1,
    )


def test_a_users_mistake_in_a_worker_process_is_one_line(outcome: Callable[..., tuple[int, str]]) -> None:
    text = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in loop\n    fetch()\nllmkit.errors.UserError: data.csv:3: no text\n'
    )
    assert outcome(UserError(text)) == (2, "llmkit: error: data.csv:3: no text\n")


def test_frames_of_installed_packages_are_plugins() -> None:
    roots = failures.plugin_roots()
    registry.find("attention", "lstm").load()
    names: list[Any] = [path.name for path in failures.plugin_roots()]
    assert "llmkit_plugins" in names and "llmkit" not in names and len(roots) <= len(names)

"""The command line's front door: help, the table of commands, and how errors leave."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import __version__, commands, main
from llmkit.commands import Parser, imported
from llmkit.errors import UserError

seen: list[tuple[str, list[str]]] = []


def record(command: str, argv: list[str]) -> int:
    seen.append((command, argv))
    return 3


def user_error(command: str, argv: list[str]) -> int:
    raise UserError("model.dim: must be\n  above 0")


def bug(command: str, argv: list[str]) -> int:
    raise ValueError("a bug")


def interrupted(command: str, argv: list[str]) -> int:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (record, user_error, bug, interrupted):
        monkeypatch.setitem(main.COMMANDS, function.__name__, (f"{__name__}:{function.__name__}", ""))
    seen.clear()


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in main.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines)
    assert sum(line.startswith("  llmkit ") for line in lines) == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmkit {__version__}\n"


def test_a_command_gets_its_name_and_the_rest_without_debug() -> None:
    assert main.main(["record", "--config", "x.yaml", "--debug", "--help"]) == 3
    assert main.main(["--debug", "record"]) == 3
    assert seen == [("record", ["--config", "x.yaml", "--help"]), ("record", [])]


def test_user_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["user_error"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "llmkit: error: model.dim: must be above 0\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["user_error", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("\nllmkit: error: model.dim: must be above 0\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        main.main(["bug"])


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["interrupted"]) == 130
    assert capsys.readouterr().err == "llmkit: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["fti"], "unknown command 'fti'. Did you mean 'fit'? Allowed: "),
        (["xyz"], "unknown command 'xyz'. Allowed: "),
        (["--config", "x.yaml"], "the command comes first, before '--config'. Allowed: fit, "),
    ],
)
def test_unknown_command(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llmkit: error: {text}")
    assert error.count("\n") == 1


def test_every_target_exists() -> None:
    for target, _ in main.COMMANDS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from llmkit.main import main; sys.exit(main(['-h']))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr and process.stdin
    process.stdout.close()  # before it writes: it is still reading
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--jsno"], "unknown toy option '--jsno'. Did you mean '--json'? Allowed: --count, --help, --json, -h."),
        (["--js"], "unknown toy option '--js'."),
        (["--count", "x"], "toy: argument --count: invalid int value: 'x'"),
        (["extra"], "toy: unexpected argument 'extra'. See 'llmkit toy --help'."),
    ],
)
def test_parser_tells_mistakes_in_one_line(argv: list[str], text: str) -> None:
    parser = Parser("toy", "A toy.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError) as caught:
        parser.parse(argv)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "imports", "texts"),
    [
        (["--imports", "a.py", "b.py"], ["a.py", "b.py"], []),
        (["--imports", "a.py", "--imports", "b.py"], ["a.py", "b.py"], []),
        (["--imports=a.py", "b.py", "c.py", "--json", "d.py"], ["a.py", "b.py", "c.py"], ["d.py"]),
        (["one", "--imports", "a.py", "two", "three"], ["a.py"], ["one", "two", "three"]),
        (["--imports", "package.module", "two"], ["package.module"], ["two"]),
        (["--imports", "a.py", "b.py", "--imports", "m", "two"], ["a.py", "b.py", "m"], ["two"]),
        (["one"], [], ["one"]),
    ],
)
def test_imports_and_texts(argv: list[str], imports: list[str], texts: list[str]) -> None:
    parser = Parser("toy", "A toy.")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_imports()
    options = parser.parse(argv)
    assert (options.imports, options.texts) == (imports, texts)


@pytest.mark.parametrize("names", [["one_import.py", "two_imports"], ["one_import.py,two_imports"]])
def test_imported_plugins_print_to_stderr(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("one_import", "two_imports"):
        Path(f"{name}.py").write_text(f"print('{name}')\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    with imported(names):
        print("within")
    print("after")
    captured = capsys.readouterr()
    assert captured.err.split() == ["one_import", "two_imports", "within"]
    assert captured.out == "after\n"


@pytest.mark.parametrize("command", ["config", "verify", "plugins"])
def test_verbs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = commands.VERBS[command]
    for verb in verbs:
        with contextlib.suppress(SystemExit):  # as argparse ends
            main.main([command, verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: llmkit {command} {verb} ")
    assert main.main([command, f"{next(iter(verbs))}z", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"llmkit: error: unknown {command} command '{next(iter(verbs))}z'. Did")
    if command != "plugins":  # which lists them
        assert main.main([command]) == main.main([command, "--config", "x"]) == 2
        assert capsys.readouterr().err.count(f"llmkit: error: {command} needs a command: {', '.join(verbs)}. See") == 2
    with contextlib.suppress(SystemExit):
        main.main([command, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: llmkit {command} ")
    if command != "plugins":
        assert all(f"  {verb} " in printed and text in printed for verb, text in verbs.items())

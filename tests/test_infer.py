"""``llmkit infer``: line by line, on terminals and in pipes of any encoding."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import done, llmkit

from llmkit import main
from llmkit.data.opening import Options
from llmkit.data.prepare import Fields
from llmkit.data.rows import Skipped
from llmkit.data.sources import local
from llmkit_plugins.head.generation import Generation

OLD = Path(__file__).parent / "old_checkpoints"
GENERATION, TRANSLATION = OLD / "generation.ckpt", OLD / "translation.ckpt"


def test_sampled_texts_do_not_depend_on_the_batch() -> None:
    words = ("infer", GENERATION, *["the cat"] * 6, "on", "a mat", "--max_new_tokens", "12", "--json")
    texts = [json.loads(line)["text"] for line in done(*words).out.splitlines()]
    assert len(set(texts[:6])) == 6
    assert done(*words, "--batch_size", "3").out == done(*words).out
    assert done(*words, "--seed", "1").out != done(*words).out


class Terminal(io.StringIO):
    """Text that is printed on a terminal."""

    def isatty(self) -> bool:
        """Return true."""
        return True


@pytest.mark.parametrize("stop", [[], ["--stop_strings", "e", "--stop_strings", "at"]])
def test_a_terminal_shows_what_a_pipe_gets(stop: list[str]) -> None:
    words = ["infer", str(GENERATION), "the cat", "  a mat", "--max_new_tokens", "30", *stop]
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert main.main(words) == 0
    assert terminal.getvalue() == done(*words).out


@pytest.mark.parametrize("checkpoint", [GENERATION, TRANSLATION])
def test_line_n_of_the_answers_is_of_line_n_of_the_input(checkpoint: Path, tmp_path: Path) -> None:
    """Blank lines too; a byte order mark and carriage returns are not part of the text."""
    texts = ["the cat", "", "a mat", "  ", "on", ""]
    options = ("--max_new_tokens", "5", "--batch_size", "2", "--json")
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{text}\r\n" for text in texts).encode())
    alone = iter(done("infer", checkpoint, *(text for text in texts if text.strip()), *options).out.splitlines())
    expected = [next(alone) if text.strip() else "{}" for text in texts]
    assert done("infer", checkpoint, "--input", path, *options).out.splitlines() == expected
    assert done("infer", checkpoint, "--input", path, *options[:-1]).out.count("\n") == len(texts)


@pytest.mark.parametrize(("checkpoint", "size"), [(GENERATION, 1), (GENERATION, 3), (TRANSLATION, 4)])
def test_predict_writes_what_infer_prints(checkpoint: Path, size: int, tmp_path: Path) -> None:
    """Line by line, sampled texts and blank lines too, at any batch size."""
    path = tmp_path / "lines.txt"
    path.write_text("\nthe cat\nthe cat\n\n \nthe cat\na mat\n\n")
    limit = ("--model.decoding.max_new_tokens", "9") if checkpoint == GENERATION else ()
    given: tuple[object, ...] = (path,) if checkpoint == GENERATION else (f"{{source: {path}}}",)
    done(
        *("predict", "--ckpt_path", checkpoint, "--data.predict", *given, "--data.batch_size", size, *limit),
        *("--output", tmp_path, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    )
    (found,) = tmp_path.rglob("predictions.jsonl")
    words = ("infer", checkpoint, "--input", path, "--json", *(("--max_new_tokens", "9") if limit else ()))
    assert found.read_text() == done(*words).out
    assert [line == "{}" for line in found.read_text().splitlines()] == [
        True,
        False,
        False,
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "content", "blank"),
    [
        ("a.txt", "the\n\ncat\n \n", [1, 3]),
        ("a.log", "1 the\n\n2 cat\n\n", [1, 3]),
        ("a.jsonl", '{"text": "the"}\n\n{"text": "cat"}\n \n', [1, 3]),
        ("a.csv", "text\nthe\n\ncat\n\n", [1, 3]),
        ("a.tsv", "text\r\nthe\r\n\r\ncat\r\n \r\n", [1, 3]),
        ("a.csv", '\ntext\nthe\n""\ncat\n', [1]),
        ("b.csv", "text,more\nthe,1\n\ncat,2\n\n,\n", [2]),  # an empty line is no record of two cells
        ("a.json", '[{"text": "the"},\n\n{"text": "cat"}]\n\n', []),
    ],
)
def test_a_blank_line_is_a_row_to_predict_and_no_other(
    name: str, content: str, blank: list[int], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    head, found = Generation(), dict[bool, list[Any]]()
    for predict in (False, True):
        options = Options("lines" if name == "a.log" else "auto", r"\d (?P<text>.*)" if name == "a.log" else None)
        source = local("data.predict", str(path), replace(options, blanks=predict))
        items = Fields.of(head, {}, predict, source).items(source.read(), Skipped(source.key, "error"))
        found[predict] = [item.fields.get("text") for item in items]
    expected: list[Any] = ["the", "cat"]
    for number in blank:
        expected.insert(number, None)
    assert found[True] == expected
    assert [text for text in found[False] if text.strip()] == ["the", "cat"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_pipe_that_is_not_utf_8_gets_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmkit.model.language_model as module

    def infer(*words: str) -> str:
        raw = io.BytesIO()
        stdout = io.TextIOWrapper(raw, encoding=encoding)
        with contextlib.redirect_stdout(stdout):
            assert main.main(["infer", str(GENERATION), "the", *words]) == 0
            assert stdout.errors == "strict"  # as it was
            return raw.getvalue().decode("ascii")

    answer = {"prompt": "the", "text": " 你 é 😀"}
    monkeypatch.setattr(module.LanguageModel, "predict", lambda *rest, **extra: [answer])
    assert json.loads(infer("--json")) == answer
    if encoding == "ascii":
        assert infer() == "the \\u4f60 \\xe9 \\U0001f600\n"


def test_scores() -> None:
    answer = json.loads(done("infer", GENERATION, "the cat sat", "--score", "--json").out)
    assert answer.keys() == {"log_probability", "tokens", "perplexity"} and answer["tokens"] == 10
    row = json.dumps({"source": "the cat", "target": "THE CAT"})
    line = done("infer", TRANSLATION, row, "--score").out
    assert line.startswith("log probability -") and ", 8 tokens, perplexity " in line


@pytest.mark.parametrize(
    ("checkpoint", "words", "says"),
    [
        (GENERATION, ["--seed", "9" * 20], "seed must be below 2**63"),
        (GENERATION, ["--num_beams", "3", "--top_k", "5"], "--top_k is for sampling, and num_beams is 3"),
        (TRANSLATION, ["--top_p", "0.5"], "--top_p is for sampling, and num_beams is 5"),
        (TRANSLATION, ["--temperature", "0.7"], "--temperature is for sampling, and num_beams is 5: add --num_beams 1"),
        (GENERATION, ["--length_penalty", "2"], "--length_penalty is for beam search"),
        (GENERATION, ["--num_return_sequences", "2"], "num_return_sequences must be at least 1 and at most num_beams"),
        (GENERATION, ["--min_new_tokens", "201"], "min_new_tokens must be at most max_new_tokens"),
        (GENERATION, ["--score", "--greedy"], "--score generates nothing: leave out --greedy"),
        (TRANSLATION, ["--score"], "reads source and target"),
    ],
)
def test_options_that_would_do_nothing(checkpoint: Path, words: list[str], says: str) -> None:
    refused = llmkit("infer", checkpoint, "the", *words)
    assert refused.code == 2 and says in refused.err and refused.err.count("\n") == 1


def test_the_smallest_temperature_is_greedy() -> None:
    words = ("infer", GENERATION, "the", "--max_new_tokens", "8")
    assert done(*words, "--temperature", "1e-40").out == done(*words, "--greedy").out


def test_beams_are_listed() -> None:
    lines = done("infer", TRANSLATION, "the cat", "--num_return_sequences", "3").out.splitlines()
    scores = [float(line.split("\t")[0]) for line in lines]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)

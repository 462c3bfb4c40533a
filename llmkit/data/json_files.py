"""Rows of JSON: objects one a line or in one list, and the questions of SQuAD's files."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

from llmkit.data.opening import Options, numbered, open_text
from llmkit.data.rows import BLANK, REPEATED, Bad, RawRows, Row, flaw
from llmkit.errors import UserError


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found |= {name: REPEATED for name in names if names.count(name) > 1}
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_mapping)


def json_rows(path: str, options: Options) -> RawRows:
    """Yield objects, one a line or from one list."""
    with open_text(path, options) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start == "[":
        for number, item in enumerate(_document(path, options), 1):
            yield _object(item, path, number)
        return
    for number, line, wrong in numbered(path, options):
        if not line.strip():
            if options.blanks:
                yield Row(BLANK, path, number)
            continue
        try:
            item = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            expected = ". Expected one object a line, or one list of objects; for SQuAD's files set data.format: squad"
            wrong = wrong or f"is not JSON: {_cause(error)}{expected if number == 1 else ''}"
        yield Bad(wrong, path, number) if wrong else _object(item, path, number)


def _object(item: Any, path: str, number: int) -> Row | Bad:
    if isinstance(item, dict):
        return Row(item, path, number)
    return Bad(f"holds {type(item).__name__}, expected an object", path, number)


def _document(path: str, options: Options) -> Any:
    """Return the content of a whole JSON file. Raises UserError, with the line, for invalid JSON."""
    with open_text(path, options) as file:
        text = file.read()
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        wrong = flaw(text.split("\n")[error.lineno - 1], options.encoding) or f"is not JSON: {error.msg}"
        raise UserError(f"{path}:{error.lineno} {wrong}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)  # a number of too many digits


def squad_rows(path: str, options: Options) -> RawRows:
    """Yield the questions of a SQuAD file (v1.1, or v2.0 with unanswerable ones); each paragraph is a document."""
    content = _document(path, options)
    if lack := _lack(content, data=list):
        raise UserError(f"{path}: expected SQuAD's format, but the file {lack}")
    numbers = count(1)
    for a, article in enumerate(content["data"]):
        place = f"data[{a}]"
        if lack := _lack(article, paragraphs=list):
            yield Bad(f"({place}) {lack}", path, next(numbers))
            continue
        title = article.get("title")
        for p, paragraph in enumerate(article["paragraphs"]):
            place = f"data[{a}].paragraphs[{p}]"
            if lack := _lack(paragraph, context=str, qas=list):
                yield Bad(f"({place}) {lack}", path, next(numbers))
                continue
            first = True
            for q, question in enumerate(paragraph["qas"]):
                number = next(numbers)
                if lack := _question_lack(question):
                    yield Bad(f"({place}.qas[{q}]) {lack}", path, number)
                    continue
                name = question.get("id")
                row = {
                    "id": str(name if isinstance(name, str | int) else number),
                    "title": title if isinstance(title, str) else "",
                    "context": paragraph["context"],
                    "question": question["question"],
                }
                if "answers" in question:
                    row["answers"] = {key: [answer[key] for answer in question["answers"]] for key in _ANSWER}
                yield Row(row, path, number, first)
                first = False


_ANSWER = {"text": str, "answer_start": int}


def _question_lack(question: Any) -> str | None:
    lack = _lack(question, question=str)
    if lack is None and "answers" in question:  # they are left out where they are to be predicted
        lack = _lack(question, answers=list)
        lack = lack or next(filter(None, (_lack(answer, **_ANSWER) for answer in question["answers"])), None)
    return lack


def _lack(part: Any, **expected: type) -> str | None:
    """Return which of the expected keys a part of a SQuAD file lacks, or holds with another type; None: all right."""
    for key, kind in expected.items():
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"has no {kind.__name__} '{key}'"
    return None

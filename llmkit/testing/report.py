"""What an examination is made of: properties that hold or do not, and what is said of each."""

from __future__ import annotations

import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

Status = Literal["pass", "fail", "n/a"]
S = TypeVar("S")


class Violation(AssertionError):  # noqa: N818
    """A property does not hold; the text is the smallest case that shows it."""


class NotApplicable(Exception):  # noqa: N818
    """A property says nothing about this plugin; the text says why."""


@dataclass(frozen=True)
class Property(Generic[S]):
    """One thing a plugin of a family owes its users.

    Attributes:
        name: its name in reports and tests.
        claim: what holds, in a few words.
        meaning: what it means for a user when it does not.
        run: examines a subject; returns a figure worth showing, or nothing. Raises Violation or NotApplicable.
        essential: whether the others make no sense without it.
    """

    name: str
    claim: str
    meaning: str
    run: Callable[[S], str | None]
    essential: bool = False

    def examine(self, subject: S) -> Result:
        """Return what this property says of a subject. Whatever the plugin raises is a failure, told with its place."""
        start = time.perf_counter()
        status: Status = "pass"
        try:
            detail = self.run(subject) or ""
        except NotApplicable as reason:
            status, detail = "n/a", str(reason)
        except Violation as violation:
            status, detail = "fail", str(violation)
        except Exception as error:
            status, detail = "fail", f"raised {type(error).__name__}: {_one_line(error)}{_place(error)}"
        return Result(self.name, self.claim, self.meaning, status, detail, time.perf_counter() - start)


@dataclass(frozen=True)
class Result:
    """What one property said."""

    name: str
    claim: str
    meaning: str
    status: Status
    detail: str
    """pass: a figure, if any; fail: the smallest case; n/a: why."""
    seconds: float

    def told(self) -> str:
        """Return the failure as a person reads it."""
        return f"{self.name}: {self.meaning} Shown by: {self.detail}"


@dataclass(frozen=True)
class Report:
    """What all properties of a family said of one plugin."""

    title: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> list[Result]:
        """The properties that do not hold."""
        return [result for result in self.results if result.status == "fail"]

    def __str__(self) -> str:
        """Return a table, and below it what each failure means."""
        width = max((len(result.name) for result in self.results), default=0)
        lines = [self.title, ""]
        left = [result for result in self.results if result.detail.startswith("not examined")]
        for result in self.results:
            if result in left:
                continue
            extra = f" ({result.detail})" if result.detail and result.status != "fail" else ""
            lines.append(f"  {result.name:{width}}  {result.status:4}  {result.claim}{extra}")
        if left:
            lines.append(f"  ({len(left)} more {left[0].detail})")
        for result in self.failed:
            body = f"{result.meaning}\nShown by: {result.detail}"
            lines += ["", f"FAIL {result.name}"]
            lines += [
                textwrap.fill(line, 116, initial_indent="  ", subsequent_indent="    ") for line in body.split("\n")
            ]
        count = {status: sum(result.status == status for result in self.results) for status in ("pass", "fail", "n/a")}
        lines += ["", f"{count['pass']} passed, {count['fail']} failed, {count['n/a']} not applicable"]
        return "\n".join(lines)


class Properties(Generic[S]):
    """The properties of a family, in the order they are examined."""

    def __init__(self, *parts: Properties[S]) -> None:
        self.all: list[Property[S]] = [found for part in parts for found in part.all]

    def __call__(
        self, claim: str, meaning: str, essential: bool = False
    ) -> Callable[[Callable[[S], str | None]], Property[S]]:
        """Decorate a function as a property named after it."""

        def decorate(function: Callable[[S], str | None]) -> Property[S]:
            found = Property(function.__name__, claim, meaning, function, essential)
            self.all.append(found)
            return found

        return decorate

    def examine(self, title: str, subject: S, only: Sequence[str] | None = None) -> Report:
        """Return the report of all properties, or of those named."""
        results: list[Result] = []
        broken = ""
        for found in self.all:
            if only is not None and found.name not in only:
                continue
            if broken:
                results.append(
                    Result(found.name, found.claim, found.meaning, "n/a", f"not examined: {broken} fails", 0.0)
                )
                continue
            results.append(found.examine(subject))
            if found.essential and results[-1].status == "fail":
                broken = found.name
        return Report(title, tuple(results))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _place(error: BaseException) -> str:
    """Return where the plugin raised: the innermost frame that is neither ours nor torch's."""
    own = Path(__file__).parent
    frames: list[Any] = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if own not in path.parents and not {"torch", "torchmetrics", "tokenizers"} & set(path.parts):
            return f" (at {path.name}:{frame.lineno})" if path.exists() else ""
    return ""

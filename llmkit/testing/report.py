"""Properties, each of which holds for a plugin or does not, and the report of their results."""

from __future__ import annotations

import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

Status = Literal["pass", "fail", "n/a"]
S = TypeVar("S", contravariant=True)
SKIPPED = "not checked"


class Violation(AssertionError):  # noqa: N818
    """A property does not hold; the text is the smallest case that shows it."""


class NotApplicable(Exception):  # noqa: N818
    """A property does not apply to this plugin; the text says why."""


@dataclass(frozen=True)
class Property(Generic[S]):
    """One thing that users of a plugin rely on.

    Attributes:
        name: its name in reports and tests.
        claim: what holds, in a few words.
        meaning: what happens to a user when it does not hold.
        run: checks a plugin; returns a figure worth showing, or None. Raises Violation or NotApplicable.
        essential: whether the properties after it are skipped when it fails.
    """

    name: str
    claim: str
    meaning: str
    run: Callable[[S], str | None]
    essential: bool = False

    def examine(self, subject: S) -> Result:
        """Check a plugin. Any exception that the plugin raises is a failure, reported with its file and line."""
        start = time.perf_counter()
        status: Status = "pass"
        try:
            detail = self.run(subject) or ""
        except NotApplicable as reason:
            status, detail = "n/a", str(reason)
        except Violation as violation:
            status, detail = "fail", str(violation)
        except Exception as error:
            status, detail = "fail", f"{raised(error, 300)}{_place(error)}"
        return Result(self.name, self.claim, self.meaning, status, detail, time.perf_counter() - start)


@dataclass(frozen=True)
class Result:
    """The result of one property."""

    name: str
    claim: str
    meaning: str
    status: Status
    detail: str
    """pass: a figure, if any; fail: the smallest case; n/a: why."""
    seconds: float

    def summary(self) -> str:
        """Return the failure as one paragraph."""
        return f"{self.name}: {self.meaning} Shown by: {self.detail}"


@dataclass(frozen=True)
class Report:
    """The results of all properties of a family for one plugin."""

    title: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> list[Result]:
        """The properties that do not hold."""
        return [result for result in self.results if result.status == "fail"]

    def __str__(self) -> str:
        """Return a table, followed by an explanation of each failure."""
        width = max((len(result.name) for result in self.results), default=0)
        lines = [self.title, ""]
        skipped = [result for result in self.results if result.detail.startswith(SKIPPED)]
        for result in self.results:
            if result in skipped:
                continue
            extra = f" ({result.detail})" if result.detail and result.status != "fail" else ""
            lines.append(f"  {result.name:{width}}  {result.status:4}  {result.claim}{extra}")
        if skipped:
            lines.append(f"  ({len(skipped)} more {skipped[0].detail})")
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
    """The properties of a family, in the order in which they are checked."""

    def __init__(self, *parts: Properties[S] | Property[S]) -> None:
        """Start with other properties: those of a whole collection, or single ones."""
        self.all: list[Property[S]] = []
        for part in parts:
            self.all += part.all if isinstance(part, Properties) else [part]

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
                results.append(Result(found.name, found.claim, found.meaning, "n/a", f"{SKIPPED}: {broken} fails", 0.0))
                continue
            results.append(found.examine(subject))
            if found.essential and results[-1].status == "fail":
                broken = found.name
        return Report(title, tuple(results))


def one_line(text: object, most: int = 200) -> str:
    """Return a text, or an exception's message, on one line and not too long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def raised(error: BaseException, most: int = 200) -> str:
    """Return how messages name an exception: ``raised ValueError: its text``."""
    return f"raised {type(error).__name__}: {one_line(error, most)}"


def _place(error: BaseException) -> str:
    """Return where the plugin raised: the innermost frame that belongs neither to the kit nor to a library."""
    own = Path(__file__).parent
    frames: list[Any] = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if own not in path.parents and not {"torch", "torchmetrics", "tokenizers"} & set(path.parts):
            return f" (at {path.name}:{frame.lineno})" if path.exists() else ""
    return ""

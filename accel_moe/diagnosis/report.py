"""The doctor's lines: a tick or a cross, the subject, the finding, and the mend of a failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PASSED, FAILED, SKIPPED = "✓", "✗", "-"


@dataclass(frozen=True)
class Line:
    """One check.

    Attributes:
        mark: PASSED, FAILED or SKIPPED.
        finding: the value that was found; of a failure, the difference.
        mend: what to do about a failure; "" for a line that has not failed.
        detail: a traceback, printed below the line; "" if there is none.
    """

    mark: str
    subject: str
    finding: str
    mend: str = ""
    detail: str = ""

    def text(self) -> str:
        mend = f" {self.mend}" if self.mend else ""
        detail = "".join(f"\n      {row}" for row in self.detail.splitlines())
        return f"  {self.mark} {self.subject:<26} {self.finding}{mend}{detail}"


def passed(subject: str, finding: str) -> Line:
    return Line(PASSED, subject, finding)


def skipped(subject: str, why: str) -> Line:
    return Line(SKIPPED, subject, why)


def failed(subject: str, finding: str, mend: str, detail: str = "") -> Line:
    return Line(FAILED, subject, finding.rstrip().rstrip(".") + ".", mend, detail)


def judged(subject: str, wrong: str | None, right: str, mend: str) -> Line:
    """Passed with `right` if nothing is wrong, else failed."""
    return failed(subject, wrong, mend) if wrong else passed(subject, right)


def one_line(error: BaseException) -> str:
    """An error's class and text on one line; of a ValueError, the text alone."""
    text = " ".join(str(error).split()) or "no text"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def print_lines(title: str, lines: Iterable[Line], say: Callable[[str], None] = print) -> int:
    """Says each line as soon as it is known. Returns the number of failures."""
    began, failures = time.monotonic(), 0
    say(title)
    for line in lines:
        failures += line.mark == FAILED
        say(line.text())
    say(f"  ({time.monotonic() - began:.0f} s)")
    return failures

"""The versions that this package asks for, and those that it was tested with: the one place that says them.

A newer version than was tested is no error. Whatever is patched is on a leash, and a target that moved is refused
(patching.py); one warning says all else, and `python -m accel_moe.families --check` looks at it. pyproject.toml has the
floors, too, since pip must know them, and nothing that shuts out a version to come.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass

CHECK_COMMAND = "python -m accel_moe.families --check"


@dataclass(frozen=True)
class Range:
    """One row. Versions are MAJOR.MINOR; a patch release counts as its minor version.

    Attributes:
        oldest: the floor; "" where any version does, and none at all, too.
        newest: the newest that was tested; "" where no version is told from another.
    """

    name: str
    oldest: str
    newest: str

    def __str__(self) -> str:
        if not self.newest:
            return f"{self.oldest} and newer" if self.oldest else "any"
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def verdict(self, found: str | None) -> str:
        """ "ok", or what is off: "missing", "too old" or "untested" (newer than was tried)."""
        if found is None:
            return "missing" if self.oldest else "ok"
        if self.oldest and _minor(found) < _minor(self.oldest):
            return "too old"
        return "untested" if self.newest and _minor(found) > _minor(self.newest) else "ok"


VERSIONS = (
    Range("python", "3.11", ""),
    Range("torch", "2.11", "2.15"),
    Range("triton", "", ""),
    Range("accelerate", "1.15", "1.15"),
    Range("transformers", "5.17", "5.24"),
)


def installed(name: str) -> str | None:
    """The version that runs here; None if there is none."""
    if name == "python":
        return platform.python_version()
    if version := getattr(sys.modules.get(name), "__version__", None):
        return str(version)  # what was imported, wherever it lies
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def words(*names: str) -> str:
    """What something was tested with: "transformers 5.17 to 5.24, accelerate 1.15"."""
    rows = {row.name: row for row in VERSIONS}
    return ", ".join(f"{name} {rows[name]}" for name in names)


def warning() -> str | None:
    """What to say before a run with versions that were not tested; None if all were."""
    found = {row: installed(row.name) for row in VERSIONS}
    off = [f"{row.name} {found[row]} (tested: {row})" for row in VERSIONS if row.verdict(found[row]) != "ok"]
    if not off:
        return None
    return (
        f"accel_moe was not tested with {', '.join(off)}. What it patches there is as expected, so it goes on. "
        f"`{CHECK_COMMAND}` looks at the rest. If training goes wrong, install a tested version, or update accel_moe."
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", f"{version}.0")[:2]
    return int(major), int(minor)

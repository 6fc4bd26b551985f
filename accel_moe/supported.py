"""The required and the tested versions of Python, torch, accelerate and transformers, in one place.

A version newer than the tested ones is no error. patching.py refuses a target whose parameters changed. For the
rest one warning is given, and `python -m accel_moe.families --check` tries it. pyproject.toml repeats the oldest
versions, because pip needs them, and excludes no future version.
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
        oldest: the oldest supported version; "" if any version works, or none.
        newest: the newest tested version; "" if versions are not told apart.
    """

    name: str
    oldest: str
    newest: str

    def __str__(self) -> str:
        if not self.newest:
            return f"{self.oldest} and newer" if self.oldest else "any"
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def verdict(self, found: str | None) -> str:
        """ "ok", "missing", "too old" or "untested" (newer than the tested versions)."""
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
    """The installed version; None if it is not installed."""
    if name == "python":
        return platform.python_version()
    if version := getattr(sys.modules.get(name), "__version__", None):
        return str(version)  # of the imported package, wherever it is installed
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def words(*names: str) -> str:
    """The tested versions in words: "transformers 5.17 to 5.24, accelerate 1.15"."""
    rows = {row.name: row for row in VERSIONS}
    return ", ".join(f"{name} {rows[name]}" for name in names)


def warning() -> str | None:
    """A warning that names installed versions that were not tested; None if all were."""
    found = {row: installed(row.name) for row in VERSIONS}
    off = [f"{row.name} {found[row]} (tested: {row})" for row in VERSIONS if row.verdict(found[row]) != "ok"]
    if not off:
        return None
    return (
        f"accel_moe was not tested with {', '.join(off)}. The functions it patches have the expected parameters, so it "
        f"goes on. `{CHECK_COMMAND}` checks the rest. If training goes wrong, install a tested version, or update "
        "accel_moe."
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", f"{version}.0")[:2]
    return int(major), int(minor)

"""The errors of files: checkpoints that must not be used, base models that do not fit; and lists for their texts."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that must not be used, or a save that did not happen; the text says which file and what to do."""


class HubFormatError(ValueError):
    """A base model that cannot serve as the authority, or a model that does not fit it."""


def first_few(lines: Sequence[str], *, shown: int = 3, separator: str = "; ") -> str:
    """The first lines, joined, and how many more there are: "a; b; c (and 2 more)"."""
    more = f" (and {len(lines) - shown} more)" if len(lines) > shown else ""
    return separator.join(lines[:shown]) + more

"""The errors of files: checkpoints that must not be used, base models that do not fit; and long lists cut for them."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that must not be used, or a save that did not happen; the text names file and mend."""


class HubFormatError(ValueError):
    """A base model that cannot serve as the authority, or a model that does not fit it."""


def first_few(lines: Sequence[str], separator: str = "; ", shown: int = 3) -> str:
    """The first of many lines, for one message: "a; b; c (and 2 more)"."""
    return separator.join(lines[:shown]) + (f" (and {len(lines) - shown} more)" if len(lines) > shown else "")

"""The errors of files: checkpoints that must not be used, base models that do not fit."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that must not be used, or a save that did not happen; the text says which file and what
    to do."""


class HubFormatError(ValueError):
    """A base model that cannot serve as the authority, or a model that does not fit it."""

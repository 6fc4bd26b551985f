"""Names of modules, parameters and files."""

from __future__ import annotations

WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
MANIFEST_NAME = "accel_moe_manifest.json"
"""A checkpoint's manifest: written last, it commits the checkpoint."""


def plain_name(name: str) -> str:
    """A module's or parameter's name without what activation checkpointing, torch.compile and FSDP1 wrap into it."""
    for segment in WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name

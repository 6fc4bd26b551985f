"""Checkpoints: DCP folders with a manifest beside them, and the road from there to Hub-format safetensors.

docs/architecture.md lists the files. Nothing is imported here: consolidate runs on a login node and imports only the
files that it needs.
"""

"""Weights in files: Hub-format checkpoints, read into shards and written back."""

"""Shared by tests of loads."""

import pytest

from accel_moe import hooks


@pytest.fixture
def many_ranks(monkeypatch):
    """As on one rank of a launch, before the process group: nothing needs the others."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: False)
    yield
    hooks.uninstall()

"""`python -m accel_moe.families --check`: it passes with what is installed, and sees each kind of thing that moves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from accel_moe import check, families, hooks, supported

REPOSITORY = Path(__file__).resolve().parents[2]


def lines_of(*arguments: str, capsys) -> tuple[int, dict[str, str]]:
    """Exit status, and each line by what it is of."""
    status = families.main(["--check", *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    return status, {line.split("  ")[0]: line for line in lines}


@pytest.mark.core
def test_what_is_installed_fits_and_the_command_says_so_within_a_minute():
    command = [sys.executable, "-m", "accel_moe.families", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "The installed versions fit accel_moe."
    for name in ("python", "torch", "triton", "accelerate", "transformers"):
        assert any(line.startswith(f"{name} ") and line.endswith(" ok") for line in lines)
    for patch in (*hooks.TABLE, *hooks.CPU_TABLE, *hooks.LOAD_TABLE):
        assert any(line.startswith(patch.target) and line.endswith(" ok") for line in lines)
    for family in check.PROBED:
        for kernel in check.KERNELS:
            assert any(line.startswith(f"experts of {family} {kernel} ") and line.endswith(" ok") for line in lines)


def test_a_patch_whose_target_has_other_parameters_is_named_with_its_reason(monkeypatch, capsys):
    moved = dataclasses.replace(hooks.TABLE[3], function=lambda original, module, something_new: None)
    monkeypatch.setattr(hooks, "TABLE", (*hooks.TABLE[:3], moved, *hooks.TABLE[4:]))
    status, lines = lines_of("qwen3_moe", capsys=capsys)
    assert status == 1
    off = [line for line in lines.values() if not line.endswith(" ok")]
    assert len(off) == 1 and off[0].startswith(moved.target)
    assert "where it expected ('module', 'something_new')" in off[0] and moved.why in off[0]


def test_a_patch_whose_target_is_gone_is_named(monkeypatch, capsys):
    gone = dataclasses.replace(hooks.TABLE[0], target="accelerate.Accelerator.prepared")
    monkeypatch.setattr(hooks, "TABLE", (gone,))
    status, lines = lines_of("qwen3_moe", capsys=capsys)
    assert status == 1 and "which this version does not have" in lines[gone.target]


def test_patches_that_are_in_place_are_seen_through(capsys):
    hooks.install()
    try:
        status, _ = lines_of("qwen3_moe", capsys=capsys)
    finally:
        hooks.uninstall()
    assert status == 0


def test_an_experts_function_that_computes_something_else_is_seen(monkeypatch, capsys):
    right = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *args: right(*args) * 1.001)
    status, lines = lines_of("qwen3_moe", capsys=capsys)
    assert status == 1 and "the output is off by" in lines["experts of qwen3_moe grouped_mm"]
    assert lines["experts of qwen3_moe eager"].endswith(" ok")


class WithoutGradients:
    """A view of a module that gives its parameters to no autograd."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        value = getattr(self._module, name)
        return value.detach() if isinstance(value, torch.Tensor) else value


def test_an_experts_function_that_gives_the_experts_no_gradient_is_seen(monkeypatch, capsys):
    right = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda module, *args: right(WithoutGradients(module), *args)
    )
    status, lines = lines_of("qwen3_moe", capsys=capsys)
    assert status == 1
    said = "only one of the two has the gradient of gate_up_proj"
    assert said in lines["experts of qwen3_moe grouped_mm"]


def test_an_experts_function_whose_call_changed_is_seen(monkeypatch, capsys):
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda module, hidden_states: hidden_states)
    status, lines = lines_of("qwen3_moe", capsys=capsys)
    assert status == 1 and "TypeError" in lines["experts of qwen3_moe grouped_mm"]


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (None, 1, "missing"),
        ("1.14.2", 1, "too old"),
        ("1.15.9", 0, "ok"),
        ("1.99.0", 0, "newer than the tested versions"),
    ],
)
def test_a_version_outside_the_range_is_told(found, status, words, monkeypatch, capsys):
    here = supported.installed
    monkeypatch.setattr(supported, "installed", lambda name: found if name == "accelerate" else here(name))
    got, lines = lines_of("qwen3_moe", capsys=capsys)
    assert got == status and lines["accelerate"].endswith(words)

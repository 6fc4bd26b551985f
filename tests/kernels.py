"""What tests of kernels share: compiling ahead of time, for a GPU that is not there, and counting launches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def compiled_by(module: str) -> list[str]:
    """The lines that `python -m module` prints: the kernels that it compiled.

    A process of its own: in this one Triton was imported for the interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")[:-1]


def arguments_of(kernel: Any, constants: dict[str, Any], type_of: Callable[[str], str]):
    """-> the signature and the constants of a kernel as Triton's sources take them, and each parameter's place."""
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(p.name) for p in kernel.params}
    places = {p.name: i for i, p in enumerate(kernel.params)}
    return signature, {(places[name],): value for name, value in constants.items()}, places


def count_launches(monkeypatch, module: Any, name: str) -> list[tuple[int, ...]]:
    """The grids that module.name is launched with from now on."""
    kernel, grids = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return grids

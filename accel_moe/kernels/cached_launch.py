"""Launching a compiled kernel again without asking Triton which one it is.

At every launch Triton works out from all arguments and options which compiled variant they need, in Python: 30 to 100
microseconds, a hundred times a step, while the GPU waits. Here the arguments are reduced to what can decide, and the
variant that Triton chose for them the first time is launched by `compiled.run`, as torch's Inductor does.

Tensors go as the numbers of their addresses. Triton's launcher would ask each tensor for it, and then the driver
whether that is the GPU's memory: a second time, for the address decides here, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_INT32 = range(-(2**31), 2**31)


class CachedLaunch:
    """A kernel `fn` of triton.jit, launched as one: `kernel[grid](*arguments, **constants_and_options)`.

    Every parameter that is not a constexpr is given by position, and comes before those that are; these are given by
    name, each of them.
    """

    def __init__(self, fn: Any):
        self.fn = fn
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
        given = [p for p in fn.params if not p.is_constexpr]
        assert fn.params[: len(given)] == given, f"{fn}: constexpr parameters come last"
        self._any_value = [p.do_not_specialize for p in given]
        self._constants = [p.name for p in fn.params[len(given) :]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            device, (deciding, passed) = torch.cuda.current_device(), self._reduced(arguments)
            key = device, *options.values(), *deciding
            found = self._compiled.get(key)
            if found is not None:
                compiled, constants = found
                _run(compiled, (*grid, 1, 1)[:3], device, [*passed, *constants])
            elif (compiled := self.fn[grid](*arguments, **options)) is not None:
                self._compiled[key] = compiled, [options[name] for name in self._constants]

        return launch

    def _reduced(self, arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        """Of each argument, whatever Triton specialises a kernel on, or more; and the arguments as they are passed."""
        deciding, passed = [], []
        for argument, any_value in zip(arguments, self._any_value, strict=True):
            kind = type(argument)
            if kind is int:
                deciding.append(argument in _INT32 if any_value else argument)
            elif isinstance(argument, Tensor):
                dtype, argument = argument.dtype, argument.data_ptr()
                deciding.append((dtype,) if argument % 16 else dtype)
            elif kind is float:
                deciding.append((float, any_value or argument))
            else:  # a TensorDescriptor, Triton's or Gluon's
                deciding.append((argument.base.dtype, *argument.block_shape))
            passed.append(argument)
        return deciding, passed


def _run(compiled: Any, grid: tuple[int, ...], device: int, arguments: list[Any]) -> None:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # somebody looks on, a profiler say
        compiled[grid](*arguments)
    else:
        stream = driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def cached_launch(fn: Any) -> Any:
    """Decorator of a triton.jit function that is launched, not called by others. The interpreter has no variants, and
    AMD's are specialised on more than is looked at here."""
    return fn if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip else CachedLaunch(fn)

"""Launching a compiled kernel again without asking Triton which one it is.

At every launch Triton works out from all arguments and options which compiled variant they need, in Python: 30 to 100
microseconds, a hundred times a step, while the GPU waits. Here the arguments are reduced to what can decide, and the
variant that Triton chose for them the first time is launched by its own public way, `compiled[grid](*arguments)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
            key = torch.cuda.current_device(), *options.values(), *self._deciding(arguments)
            found = self._compiled.get(key)
            if found is not None:
                compiled, constants = found
                compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
            elif (compiled := self.fn[grid](*arguments, **options)) is not None:
                self._compiled[key] = compiled, [options[name] for name in self._constants]

        return launch

    def _deciding(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Whatever of the arguments Triton specialises a kernel on, or more."""
        found = []
        for argument, any_value in zip(arguments, self._any_value, strict=True):
            if isinstance(argument, Tensor):
                found += argument.dtype, argument.data_ptr() % 16 == 0
            elif type(argument) is int or type(argument) is float:
                found += type(argument), argument in _INT32 if any_value else argument
            else:  # a TensorDescriptor, Triton's or Gluon's
                found += argument.base.dtype, *argument.block_shape
        return found


def cached_launch(fn: Any) -> Any:
    """Decorator of a triton.jit function that is launched, not called by others. The interpreter has no variants, and
    AMD's are specialised on more than is looked at here."""
    return fn if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip else CachedLaunch(fn)

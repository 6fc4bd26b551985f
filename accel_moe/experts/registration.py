"""The name `scattermoe` in transformers' experts interface, at no cost to a process that never opens the interface.

The interface brings torch, accelerate and FSDP with it: seconds of import. So the name is registered at once only if
the interface is imported already. Otherwise an import hook waits for the interface, registers, and goes. Nothing of
transformers is replaced. The registered function imports Triton at its first call.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType

INTERFACE = "transformers.integrations.moe"


def register_scattermoe() -> None:
    """Register our kernels under the name `scattermoe`, now or as soon as transformers' interface is imported."""
    if (interface := sys.modules.get(INTERFACE)) is not None:
        _register(interface)
    else:
        sys.meta_path.insert(0, _InterfaceFinder())


def _register(interface: ModuleType) -> None:
    from accel_moe.kernels.scattermoe import scattermoe_experts_forward

    interface.ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe_experts_forward)


class _InterfaceFinder(importlib.abc.MetaPathFinder):
    """Finds the interface as the other finders do, with a loader that registers once it has run the module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != INTERFACE:
            return None
        self.remove()
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # until it was run: a failed import may be tried again
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec

    def remove(self) -> None:
        with suppress(ValueError):
            sys.meta_path.remove(self)


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: _InterfaceFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader  # the module looks as it does without us
        self._loader.exec_module(module)
        _register(module)
        self._finder.remove()

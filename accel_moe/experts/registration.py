"""Our names in transformers' interfaces, at no cost to a process that never opens them: the kernels `scattermoe` among
the experts functions, and the exchange `accel_moe` among the implementations of its own expert parallelism (5.23 on).

The interfaces bring torch, accelerate and FSDP with them: seconds of import. So a name is registered at once only if
its interface is imported already. Otherwise an import hook waits for the interface, registers, and goes. Nothing of
transformers is replaced. What is registered is imported at its first call.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Register = Callable[[ModuleType], None]


def register_names() -> None:
    """Register ours now, or as soon as transformers' interfaces are imported."""
    for name, register in _INTERFACES.items():
        if (interface := sys.modules.get(name)) is not None:
            register(interface)
        else:
            sys.meta_path.insert(0, _InterfaceFinder(name, register))


def _register_kernels(interface: ModuleType) -> None:
    from accel_moe.kernels.scattermoe import scattermoe_experts_forward

    interface.ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe_experts_forward)


def _register_exchange(interface: ModuleType) -> None:
    if hasattr(interface, "EPImplementationInterface"):  # 5.17 has none
        interface.EPImplementationInterface.register("accel_moe", _exchange)


def _exchange(*arguments: Any) -> Any:
    from accel_moe.dispatch.transformers_ep import AccelMoEExchange

    return AccelMoEExchange(*arguments)


_INTERFACES: dict[str, Register] = {
    "transformers.integrations.moe": _register_kernels,
    "transformers.distributed.expert_parallel": _register_exchange,
}


class _InterfaceFinder(importlib.abc.MetaPathFinder):
    """Finds one interface as the other finders do, with a loader that registers once it has run the module."""

    def __init__(self, name: str, register: Register) -> None:
        self._name, self.register = name, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
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
        self._finder.register(module)
        self._finder.remove()

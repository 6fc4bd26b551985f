"""The next layer's casts, made before it asks for them.

A layer's fp32 master weights are cast for its forward, and again for its backward. A cast waits for memory alone, so it
runs beside what waits for something else: the last collective of the layer before, and the attention between the two.
The order of layers is learned from the first forward. Only one layer's casts are ever made ahead, and none outlives the
model's forward, or the backward, that made it: weights may change after it. A local tensor's version does not tell,
for optimizers change it through its DTensor.

Not ahead: layers that FSDP gathers (it casts them), packed weights, chunks, forwards that activation checkpointing
runs again, and layers that are called outside of their model's forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from accel_moe.experts.state import LayerState
from accel_moe.kernels.casts import Casts, begin_forward, current_pass, end_forward

_after: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""By layer, the one that ran after it."""
_last: tuple[weakref.ref[Any], weakref.ref[Casts]] | None = None
"""The layer whose forward ran last, and its casts."""
_ahead: tuple[weakref.ref[Any], Casts] | None = None
"""What is made ahead, and for whom."""


def within_forwards_of(model: nn.Module) -> None:
    """From now on, casts are made ahead in this model's forward."""
    model.register_forward_pre_hook(_begin, prepend=True)
    model.register_forward_hook(_end, always_call=True)


@torch.compiler.disable
def _begin(module: nn.Module, args: Any) -> None:
    begin_forward()


@torch.compiler.disable
def _end(module: nn.Module, args: Any, output: Any) -> None:
    global _ahead, _last
    end_forward()
    _ahead = _last = None


def started(module: Any, parameters: list[torch.Tensor], dtype: torch.dtype) -> Casts:
    """The casts of a layer that begins its forward: those made ahead, or new ones."""
    global _ahead, _last
    if not _takes_part(module._accel_moe_layer):
        return Casts(parameters, dtype, of_module=module._accel_moe_layer.ep > 1)
    made = _ahead[1] if _ahead is not None and is_ahead(module, dtype) else None
    casts, _ahead = made or Casts(parameters, dtype, of_module=True), None
    before = None if _last is None else _last[0]()
    if _last is not None and before is not None and _follows(module, before):
        _after[before] = weakref.ref(module)
        # what hooks save is checkpointing's or offloading's: backward then runs forwards again, with casts of their own
        if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            casts.before = _last[1]
    _last = weakref.ref(module), weakref.ref(casts)
    return casts


def make_next(
    module: Any, dtype: torch.dtype, parameters_to_cast: Callable[[Any, torch.dtype], list[torch.Tensor] | None]
) -> None:
    """In a layer's forward: make those of the layer that comes next, beside what this one has left to do."""
    global _ahead
    follower = _after.get(module)
    follower = None if follower is None else follower()
    if follower is None or not _takes_part(module._accel_moe_layer):
        return
    parameters = parameters_to_cast(follower, dtype)
    if parameters is not None:
        casts = Casts(parameters, dtype, of_module=True)
        casts.prepare_aside()
        _ahead = weakref.ref(follower), casts


def is_ahead(module: Any, dtype: torch.dtype) -> bool:
    """Whether its casts lie in memory already."""
    return _ahead is not None and _ahead[0]() is module and _ahead[1].dtype == dtype


def _takes_part(layer: LayerState) -> bool:
    plain = layer.fsdp_ignores_it and not layer.packed and not layer.chunk_tokens
    now = current_pass()
    return plain and now.forward != 0 and now.backward == -1


def _follows(module: Any, before: Any) -> bool:
    one, other = before._accel_moe_layer, module._accel_moe_layer
    return one.prepared is other.prepared and one.position < other.position

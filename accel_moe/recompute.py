"""Activation checkpointing of layers that hold experts: tokens are exchanged once, and dropout repeats itself.

accelerate's `fsdp_activation_checkpointing` wraps the decoder layers. transformers' `gradient_checkpointing_enable`
gives them a function. Both end in torch.utils.checkpoint, which takes a `context_fn`: it gets the one of
dispatch/replay.py, unless the user gave another. Reentrant checkpointing takes none, and exchanges tokens twice.

torch.compile compiles such a layer inside its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from accel_moe.dispatch.replay import kept_exchanges
from accel_moe.experts.state import holds_experts, prepared_state
from accel_moe.patching import ACCELERATE, patch


def keep_random_numbers(model: nn.Module) -> None:
    """From now on, accelerate's checkpointed layers of `model` drop out the same values when they are run again.

    accelerate asks for new random numbers (preserve_rng_state=False): the gradients would belong to another forward,
    and a token could be routed elsewhere, which no rank expects.
    """
    for module in _holders(model):
        if isinstance(module, CheckpointWrapper) and _is_checkpoint(module.checkpoint_fn):
            module.checkpoint_fn = partial(module.checkpoint_fn, preserve_rng_state=True)


def keep_exchanges(model: nn.Module) -> None:
    """From now on, checkpointed layers of `model` keep the rows that were exchanged. Call it after sharding."""
    holders = _holders(model)
    for module in holders:
        if isinstance(module, CheckpointWrapper):
            module.checkpoint_fn = _keeping(module.checkpoint_fn)
    # transformers' checkpointing may be switched on at any time
    switches = [m for m in holders if hasattr(m, "gradient_checkpointing")]

    def look(*_: Any) -> None:
        for module in switches:
            if module.gradient_checkpointing:
                module._gradient_checkpointing_func = _keeping(module._gradient_checkpointing_func)

    model.register_forward_pre_hook(look)


@contextmanager
def compiled_inside(model: nn.Module) -> Iterator[None]:
    """Within it, `compile()` of a checkpointed layer that holds experts compiles the layer inside the checkpoint.

    torch.compile cannot break its graph inside a checkpoint: it would give up the whole layer.
    """
    wrappers = [m for m in _holders(model) if isinstance(m, CheckpointWrapper)]
    for wrapper in wrappers:
        wrapper.compile = wrapper._checkpoint_wrapped_module.compile
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.compile


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold experts."""
    return [m for m in model.modules() if holds_experts(m)]


def _is_checkpoint(function: Callable[..., Any]) -> TypeGuard[partial[Any]]:
    return isinstance(function, partial) and function.func is checkpoint


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same checkpoint function, with our contexts where it has none."""
    if not _is_checkpoint(function):
        return function
    if function.keywords.get("use_reentrant") is not False or {"context_fn", "debug"} & set(function.keywords):
        return function
    return partial(function, context_fn=kept_exchanges)


@patch(
    "accelerate.accelerator.compile_regions_fsdp2",
    why="It compiles a checkpointed layer from outside, where the graph cannot break for the exchange: such layers "
    "would run uncompiled. With fullgraph it compiles FSDP's hooks too, which no graph can hold.",
    tested=ACCELERATE,
)
def compile_regions_fsdp2(original, module, **compile_kwargs):
    state = prepared_state(module)
    if state is None or state.config.moe_ep_degree == 1:
        return original(module, **compile_kwargs)
    if compile_kwargs.get("fullgraph"):
        for block in _repeated_blocks(module):
            block.compile = _compiles_forward(block)  # pyright: ignore[reportAttributeAccessIssue]
        compile_kwargs = compile_kwargs | {"fullgraph": False}  # for the rest: FSDP's hooks break its graphs
    with compiled_inside(module):
        compiled = original(module, **compile_kwargs)
    for block in _repeated_blocks(module):
        vars(block).pop("compile", None)
    return compiled


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, as accelerate finds them; where they are checkpointed, what is checkpointed."""
    lists = [m for m in model.modules() if is_repeated_blocks(m)]
    blocks = [block for found in lists for block in cast(nn.ModuleList, found)]
    return [b._checkpoint_wrapped_module if isinstance(b, CheckpointWrapper) else b for b in blocks]


def _compiles_forward(block: nn.Module) -> Callable[..., None]:
    """In place of `block.compile`: its forward becomes one graph, inside the hooks that FSDP puts around it."""

    def compile(**kwargs: Any) -> None:
        block.forward = torch.compile(block.forward, **kwargs | {"fullgraph": True})

    return compile

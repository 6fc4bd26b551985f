"""A forward does not ask the GPU about positions that the model counted itself.

Given neither positions nor a mask, a text model of transformers counts its tokens' positions. Its masking then asks the
GPU whether they start again somewhere, as the positions of packed sequences do. The host waits there for everything
that was launched before, the optimizer's step included, and the GPU idles while the host launches the first layers.
Counted positions depend on their shape only, so one answer for each shape is enough. For all other positions the
masking asks as before.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from accel_moe import long_context
from accel_moe.experts.state import holds_experts
from accel_moe.patching import TRANSFORMERS, patch


class _Running(threading.local):
    plain: set[torch.Size] | None = None
    """In a forward that counts its positions itself: the shapes whose rows were found to be one sequence each."""


_running = _Running()


def trust_own_positions(model: nn.Module) -> None:
    """From now on, text models in `model` that hold experts and are given no positions ask once for each shape."""
    for module in _that_count_positions(model):
        ours = module.register_forward_pre_hook(functools.partial(_enter, set()), with_kwargs=True)
        module._accel_moe_positions_hook = ours.id  # pyright: ignore[reportArgumentType]
        module.register_forward_hook(_leave, always_call=True)


def _that_count_positions(model: nn.Module) -> Iterator[nn.Module]:
    """The text models that transformers defines, and that hold the decoder layers themselves.

    A model with images, sound or video is none: it gives its text model positions.
    """
    for module in model.modules():
        if not any(isinstance(child, nn.ModuleList) and holds_experts(child) for child in module.children()):
            continue
        config = getattr(module, "config", None)
        text_config = getattr(config, "get_text_config", None)
        if text_config is None or text_config() is not config:
            continue
        if type(module).__module__.startswith("transformers.models."):
            yield module


def _enter(plain: set[torch.Size], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    long_context.check_positions_given(kwargs if len(args) < 3 else {"position_ids": args[2]})
    given = (kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "cache_position"))
    # a later hook, or a forward of the user's, may give what the caller did not
    last = next(reversed(module._forward_pre_hooks)) == module._accel_moe_positions_hook
    own = "forward" not in vars(module) and _is_transformers(type(module).forward)
    ours = last and own and len(args) < 2 and not any(given)
    _running.plain = plain if ours else None


@functools.cache
def _is_transformers(function: Any) -> bool:
    """Whether it, and what it wraps, is code of transformers, and not put in its place."""
    folder = os.path.join(os.path.dirname(transformers.__file__), "")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(folder):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _leave(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.plain = None


@patch(
    "transformers.masking_utils.find_packed_sequence_indices",
    why="It asks the GPU in every forward whether the positions are those of packed sequences, also where the model "
    "has just counted them; the host waits for the whole step before.",
    tested=TRANSFORMERS,
)
def find_packed_sequence_indices(original, position_ids):
    if long_context.running() is not None:  # a part of a sequence has two chunks; packed ones were refused before
        return None
    plain = None if torch.compiler.is_compiling() else _running.plain
    if plain is None:
        return original(position_ids)
    if position_ids.shape in plain:
        return None
    packed = original(position_ids)
    if packed is None:
        plain.add(position_ids.shape)
    return packed

"""Positions that a model made itself are not looked at in every forward: the host would wait for its GPU there.

Given neither positions nor a mask, a text model of transformers counts its tokens' positions, and its masking then asks
the GPU whether they start again somewhere, as those of packed sequences do. The answer waits for all that was launched
before, the optimizer's step included, and the GPU idles while the host launches the first layers. Positions that were
counted depend on their shape alone: one answer for each shape is enough. Positions that were given are looked at as
before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Running(threading.local):
    plain: set[torch.Size] | None = None
    """Of a forward that counts its positions itself: shapes in which they were found to be of one sequence a row."""


_running = _Running()


def trust_own_positions(model: nn.Module) -> None:
    """From now on, forwards of `model` that are given no positions ask once for each shape. Not of a model with images,
    sound or video, whose positions depend on where in the text those are."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    if text_config is None or text_config() is not config:
        return
    model.register_forward_pre_hook(functools.partial(_enter, set()), with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)


def _enter(plain: set[torch.Size], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "cache_position"))
    _running.plain = None if len(args) > 1 or any(given) else plain


def _leave(*_: Any) -> None:
    _running.plain = None


def asking_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of transformers' find_packed_sequence_indices."""

    @functools.wraps(original)
    def find_packed_sequence_indices(position_ids):
        plain = None if torch.compiler.is_compiling() else _running.plain
        if plain is None:
            return original(position_ids)
        if position_ids.shape in plain:
            return None
        packed = original(position_ids)
        if packed is None:
            plain.add(position_ids.shape)
        return packed

    return find_packed_sequence_indices

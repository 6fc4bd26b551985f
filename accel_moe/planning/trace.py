"""The bytes that a forward keeps for its backward, outside of the experts: counted, not guessed.

The model runs once on meta, in bf16, as it runs under FSDP2's mixed precision. Nothing is computed; autograd says which
tensors it saves. Two parts are replaced, because on a GPU they run as fused kernels, and on meta they would not:

* attention keeps its inputs and its output, as the flash kernels do;
* the experts keep nothing here. memory.py counts theirs, which depend on the mesh.

The loss is left out, too: memory.py counts it from the size of the logits.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel_moe.experts.recognise import find_experts
from accel_moe.planning.shapes import Shapes, attention_linears

_ATTENTION = "accel_moe_plan"
_UNITS_BY_RULE = 20
"""Of [tokens, hidden] in bf16 a layer, where a model cannot be traced: 19.7 for Qwen3-MoE in eager transformers."""

_SHORT = 64
"""Tokens of a short forward; a multiple of the chunks that linear attention works in."""


@dataclass(frozen=True)
class Traced:
    """Bytes kept for backward by one rank, of all layers together.

    Attributes:
        tokens: of the forward that was traced; saved_bytes are for the whole batch, whatever this is. 0 for a model
            that does not run on meta: the number is a rule of thumb.
        why: the error that stopped the trace, or "".
    """

    saved_bytes: int
    tokens: int
    why: str = ""


def saved_outside_experts(model: nn.Module, shapes: Shapes, sequences: int, length: int, lora_rank: int = 0) -> Traced:
    """Trace one forward of [sequences, length] tokens. `model` is on meta, and is changed: give one of its own.

    Args:
        lora_rank: of adapters on attention, with everything else frozen; 0 if all weights train.
    """
    model.to(torch.bfloat16).train()
    if lora_rank:
        _adapt(model, lora_rank)
    for module in find_experts(model).values():
        module.forward = types.MethodType(_experts_forward, module)
    try:
        with _fused_attention(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _trace(model, sequences, length)
    except Exception as error:  # whatever a model does that meta tensors cannot: it has no list
        saved = _UNITS_BY_RULE * shapes.layers * sequences * length * shapes.hidden * 2
        return Traced(saved, 0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")


def _trace(model: nn.Module, sequences: int, length: int) -> Traced:
    """The whole batch; or, for a model that loops over tokens in Python (state-space layers), which would take minutes,
    two short forwards and the line through them. Such a model keeps more tensors of more tokens."""
    if length > 2 * _SHORT:
        (some, number), (more, greater) = (_kept(model, 1, tokens) for tokens in (_SHORT, 2 * _SHORT))
        if greater > number:
            a_token = (more - some) / _SHORT
            saved = some + a_token * (sequences * length - _SHORT)
            return Traced(int(saved), 2 * _SHORT)
    return Traced(_kept(model, sequences, length)[0], sequences * length)


def _kept(model: nn.Module, sequences: int, length: int) -> tuple[int, int]:
    """Bytes and number of the tensors that one forward keeps."""
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # alive, so that no two storages have one address

    def keep(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage()._cdata
        if at not in weights:
            kept[at] = tensor
        return tensor

    tokens = torch.zeros(sequences, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=tokens, use_cache=False)
    if (logits := getattr(output, "logits", None)) is not None:
        kept.pop(logits.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), len(kept)


def _adapt(model: nn.Module, rank: int) -> None:
    """Freeze the model, and give attention's linear layers a change of low rank."""
    model.requires_grad_(False)
    for linear in attention_linears(model):
        linear.low_rank = nn.Sequential(
            nn.Linear(linear.in_features, rank, bias=False, device="meta", dtype=torch.bfloat16),
            nn.Linear(rank, linear.out_features, bias=False, device="meta", dtype=torch.bfloat16),
        )
        linear.forward = types.MethodType(_adapted_forward, linear)


def _adapted_forward(self: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, self.weight, self.bias) + self.low_rank(x) * 2.0


class _Experts(torch.autograd.Function):
    """[T, H] to [T, H], differentiable, and nothing kept."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, *others: Tensor) -> Tensor:
        return torch.empty_like(hidden_states)


def _experts_forward(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
    differentiable = [t for t in (*others, *named.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    return _Experts.apply(hidden_states, *differentiable)


class _Attention(torch.autograd.Function):
    """A flash kernel, as far as memory goes: it keeps q, k, v and its output [batch, tokens, heads, size]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, out)
        return out


def _attention_forward(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    return _Attention.apply(q, k, v), None


@contextlib.contextmanager
def _fused_attention(model: Any) -> Iterator[None]:
    """`_attention_forward` in transformers' attention interface, in use by `model`. There is no mask function of its
    name, so transformers makes no mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention_forward)
    try:
        model.set_attn_implementation(_ATTENTION)
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_ATTENTION, None)

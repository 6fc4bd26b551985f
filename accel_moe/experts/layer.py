"""The forward of a swapped experts module: tokens to their experts' ranks, the experts, sums back to the tokens' ranks.

The registered experts function is called not on the module but on an `ExpertsView` of it, which answers with local
tensors and local counts; FSDP2 must go on seeing the module's own DTensors. ep 1 takes the same path, with a dispatcher
that sends nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from accel_moe.dispatch.base import RoutedTokens
from accel_moe.dispatch.chunks import in_chunks
from accel_moe.experts import in_graph
from accel_moe.experts.state import LayerState
from accel_moe.experts.view import SHIMS, is_decorated
from accel_moe.experts.work import LayerWork, compute_dtype
from accel_moe.kernels.scattermoe import road_of


class ScatterMoE(nn.Module):
    """The forward that every swapped experts module gets, mixed in before the module's own class."""

    _accel_moe_layer: LayerState

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H] in hidden_states' dtype. A collective over the ep group when ep > 1."""
        layer = self._accel_moe_layer
        tokens = RoutedTokens(hidden_states.to(compute_dtype(self, hidden_states)), top_k_index, top_k_weights)
        if layer.ep == 1 or not torch.compiler.is_dynamo_compiling():
            out = self.exchange_and_compute(tokens)
        else:
            out = in_graph.sharded(self, tokens) if layer.fsdp_ignores_it else _uncompiled(self, tokens)
        return out.to(hidden_states.dtype)

    def exchange_and_compute(self, tokens: RoutedTokens) -> torch.Tensor:
        """[T, H] in the rows' dtype: tokens to their experts' ranks, the experts, sums back."""
        layer = self._accel_moe_layer
        experts, work = experts_function(layer.kernel, self), LayerWork(self, tokens)

        def one_pass(tokens: RoutedTokens) -> torch.Tensor:
            sent = layer.dispatcher.dispatch(tokens, work)
            view = work.view(sent)
            with view.keeping:
                rows = experts(view, work.rows(sent), sent.local_index, sent.local_weights)
            return layer.dispatcher.combine(rows.to(tokens.rows.dtype), sent, work)

        return in_chunks(one_pass, tokens, layer.chunk_tokens, layer.dispatcher.group)

    def extra_repr(self) -> str:
        layer = self._accel_moe_layer
        own = super().extra_repr()
        held = next(self.parameters(), None)
        kernel = road_of(held.device) if layer.kernel == "scattermoe" and held is not None else layer.kernel
        text = f"experts={layer.num_experts}, local={layer.num_local_experts}, ep={layer.ep}, kernel={kernel}"
        text += f", weights={layer.prepared.quantize}" if layer.packed else ""
        return f"{own}, {text}" if own else text


@torch.compiler.disable(reason="the ranks of an ep group exchange tokens here, between hooks of FSDP")
def _uncompiled(module: ScatterMoE, tokens: RoutedTokens) -> torch.Tensor:
    """The same, where torch.compile breaks its graph: FSDP gathers these experts in hooks around them, which break it
    anyway. What is around the experts is compiled."""
    return module.exchange_and_compute(tokens)


def experts_function(kernel: str, module: nn.Module) -> Callable[..., torch.Tensor]:
    if kernel == "eager":
        return _eager_forward(next(c for c in type(module).__mro__ if ScatterMoE in c.__bases__))
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[kernel]


@functools.cache
def _eager_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor]:
    """The family's own loop, behind ours and behind the decorator's dispatch."""
    own = next(
        c
        for c in cls.__mro__
        if "forward" in vars(c) and not issubclass(c, ScatterMoE) and (is_decorated(c) or c.__name__ in SHIMS)
    )
    return inspect.unwrap(own.forward)

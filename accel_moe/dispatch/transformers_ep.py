"""Our exchange under transformers' own expert parallelism (5.23 on), by name:

    DistributedConfig(ep_size=8, fsdp_size=8, ep_implementation="accel_moe")

transformers' `all_to_all` sends a row for each (token, expert) pair. Ours sends a row once to each rank that needs it,
or every row to every rank where most ranks need most rows (dispatch/automatic.py). Weights, sharding and checkpoints
stay transformers'.
"""

from __future__ import annotations

import torch
from transformers.distributed.expert_parallel import EPImplementation

from accel_moe.dispatch import make_dispatcher
from accel_moe.dispatch.base import RoutedTokens


class AccelMoEExchange(EPImplementation):
    """transformers makes one for each experts module.

    Raises:
        ValueError: the ranks of a tensor-parallel group share a batch, of which each would send every token.
    """

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(
                f"ep_implementation='accel_moe' needs tp_size=1, and found {tp_mesh.size()}: the ranks of a "
                "tensor-parallel group share one batch. Set tp_size=1, or ep_implementation='all_to_all'."
            )
        self._dispatcher = make_dispatcher("auto", ep_mesh.get_group(), self.num_local_experts * ep_mesh.size())

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]. A collective over the ep group, which may have other numbers of tokens."""
        sent = self._dispatcher.dispatch(RoutedTokens(hidden_states, top_k_index, top_k_weights))
        rows = self.experts_forward(sent.rows.contiguous(), sent.local_index, sent.local_weights)
        return self._dispatcher.combine(rows.to(hidden_states.dtype), sent)

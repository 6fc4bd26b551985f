"""Identity experts (longcat_flash): expert numbers past those with weights pass the token through. ep 1 only."""

from __future__ import annotations

import torch

from accel_moe.experts.layer import ScatterMoE


class WithIdentityExperts(ScatterMoE):
    """Slots of identity experts become sentinels of weight 0. Their part of the output is added here."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        sentinel = self._accel_moe_layer.num_experts
        identity, nobody = top_k_index >= sentinel, top_k_index < 0
        passed = top_k_weights.masked_fill(~identity, 0.0).sum(-1, keepdim=True)
        top_k_index = top_k_index.clamp(max=sentinel).masked_fill(nobody, sentinel)
        top_k_weights = top_k_weights.masked_fill(identity | nobody, 0.0)
        out = super().forward(hidden_states, top_k_index, top_k_weights)
        return out + (hidden_states * passed).to(hidden_states.dtype)

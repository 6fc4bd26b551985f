"""No exchange: all experts are on this rank (ep 1), or they were never sharded.

That one rank takes the same path as many is torchtitan's idea (models/common/token_dispatcher.py,
LocalTokenDispatcher).
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from accel_moe.dispatch.base import NO_OVERLAP, Dispatched, Overlap, RoutedTokens


class LocalDispatcher:
    """The tokens as they are.

    Our kernels skip a slot whose number is no expert's. Of transformers' functions grouped_mm takes a number below zero
    for a row of work, and shifts every row; the others stop at the first one, on a GPU with the whole device. For
    these, `skips_strays` is False: such a slot becomes one of expert 0 with weight 0, which adds nothing and has no
    gradient.

    Attributes:
        num_experts: numbers from here on are no expert's; None for a loop that knows larger ones.
    """

    group: ProcessGroup | None = None

    def __init__(self, num_experts: int | None, skips_strays: bool):
        self._num_experts, self._skips_strays = num_experts, skips_strays

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        rows, index, weights = tokens
        if not self._skips_strays:
            strays = index < 0
            if self._num_experts is not None:
                strays = strays | (index >= self._num_experts)
            index, weights = index.masked_fill(strays, 0), weights.masked_fill(strays, 0.0)
        return Dispatched(rows, index, weights, None)

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        return rows


class NotSharded:
    """Holds the place of a dispatcher until `accelerator.prepare` has sharded the experts (ep > 1)."""

    group: ProcessGroup | None = None

    def __init__(self, layer: str, ep: int):
        self._layer, self._ep = layer, ep

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        raise RuntimeError(
            f"{self._layer} runs with moe_ep_degree={self._ep} but its experts were never sharded. "
            "Pass the model through accelerator.prepare(model, optimizer) with FSDP2 before its first forward."
        )

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        raise AssertionError("nothing was dispatched")

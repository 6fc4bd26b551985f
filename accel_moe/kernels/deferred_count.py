"""Numbers that the GPU finds and the host learns later: how they come, and what is done until they are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MARGIN = 9 / 8


def copied_to_host(tensor: Tensor) -> Callable[[], list[Any]]:
    """Start copying to the host, and return what waits for the copy, and for nothing after it, and gives its list."""
    if not tensor.is_cuda:
        return tensor.tolist
    on_host = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[Any]:
        copied.synchronize()
        return on_host.tolist()

    return wait


@dataclass(frozen=True)
class DeferredCount:
    """How many (row, expert) pairs a forward has, where the host learns it after it launched that forward.

    The forward's passing buffers then hold the most that could be; of the pre-activation it keeps the rows that are
    likely, if any; and backward, which knows the number, computes again what was not kept. The same rows are kept
    whatever came before: a forward that activation checkpointing runs again must save tensors of the same sizes.

    Attributes:
        wait: for the number.
        share: of the most that could be, what an even routing brings.
    """

    wait: Callable[[], int]
    share: float

    def likely(self, most: int) -> int:
        """An even routing's share, and an eighth more."""
        return min(most, int(most * self.share * _MARGIN) + 1)

"""Weights in the compute dtype: made when they are needed or a little before, and kept no longer."""

from __future__ import annotations

import torch
from torch import Tensor


class Casts:
    """Casts of parameters that are stored in another dtype, fp32 master weights under bf16 compute say, for a forward.

    Backward needs them, too. Kept until then, those of every layer would lie in memory together (half of the fp32
    weights' size); they are made again instead. `prepare` makes them ahead, while the GPU would wait for something
    else; `take` hands them out once, making them where nobody did.

    Attributes:
        of_module: the parameters are the module's own, which live as long as it does, and backward may take from here;
            otherwise it casts what autograd saved.
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype, of_module: bool = False):
        self.of_module = of_module
        self._parameters = parameters
        self._dtype = dtype
        self._made: list[Tensor] | None = None

    def prepare(self) -> None:
        if self._made is None:
            self._made = self._make()

    def take(self) -> list[Tensor]:
        """In the parameters' order."""
        made, self._made = self._made, None
        return self._make() if made is None else made

    def _make(self) -> list[Tensor]:
        return [p.detach().to(self._dtype) for p in self._parameters]

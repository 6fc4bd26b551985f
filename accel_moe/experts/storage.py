"""How the weights of experts are stored. To add a storage, write one file with a class of this shape and one line in
`STORAGES`, there or from outside.

A weight is one parameter whose first dimension counts experts, so that ep and FSDP can split it whatever its other
dimensions mean. A storage gives the dense weights of a rank's own experts for the length of a forward. It is for frozen
weights: a gradient ends at them.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Storage(Protocol):
    """One way to store weights."""

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is stored so. Reads dtype and type alone; the tensor may be on meta."""
        ...

    def dense(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[e, ...] as the experts interface knows it, in `dtype`, from this rank's e experts of a stored weight."""
        ...


class Dense:
    """Floating point numbers of 16 bits or more, as they are. Trained or frozen."""

    def holds(self, weight: torch.Tensor) -> bool:
        return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2

    def dense(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return weight.to(dtype)


DENSE = Dense()
STORAGES: dict[str, Storage] = {"dense": DENSE}
"""By name. A weight that none of them holds is refused."""


def storage_of(weight: torch.Tensor) -> Storage | None:
    """The storage that holds `weight`, or None."""
    for storage in STORAGES.values():
        if storage.holds(weight):
            return storage
    return None

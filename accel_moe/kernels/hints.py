"""What a caller knows of one forward beyond the experts interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .casts import Casts
from .deferred_count import DeferredCount
from .glu import Glu


class LowRank(NamedTuple):
    """A change of one weight of every expert: scale * outer[e].T @ inner[e], [out, in].

    Attributes:
        inner: [e, r, in].
        outer: [e, r, out].
        scale: a number.
    """

    inner: Tensor
    outer: Tensor
    scale: float = 1.0


class Hints(NamedTuple):
    """Found as `hints` on the view that an experts function gets in place of the module. All of it is optional.

    Attributes:
        weight_grad_scale: multiplies the gradient of every expert parameter, and nothing else.
        num_pairs: how many slots are not sentinels: a number, or a count that the host learns later. None: unknown.
        casts: make the parameters in the rows' dtype. The parameters may then have another dtype, and so do their
            gradients.
        glu: the module's gate, if `glu_of` was asked before.
        on_input_grads: called in backward with the gradients of the rows and of their weights (without elements if not
            needed), before those of the parameters are computed.
        changes: of the up-projection and of the down-projection, or None. Added to the products, not to the weights.
            Their gradients know no `weight_grad_scale`.
        recompute_up: compute the up-projection again in backward, to the same bits, instead of keeping it.
    """

    weight_grad_scale: float = 1.0
    num_pairs: int | DeferredCount | None = None
    casts: Casts | None = None
    glu: Glu | None = None
    on_input_grads: Callable[[Tensor, Tensor], None] | None = None
    changes: tuple[LowRank | None, LowRank | None] = (None, None)
    recompute_up: bool = False


NO_HINTS = Hints()

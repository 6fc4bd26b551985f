"""Tensors on meta that know which weight of the files they stand for, until accelerator.prepare reads its values.

A model of `accel_moe.from_pretrained` has no values yet, and a user may edit it before accelerator.prepare. A name
does not tell what became of a weight: layers are swapped or dropped, heads replaced, modules copied. So every weight
that the files have becomes a `DeferredTensor`, which carries its `Origin` wherever it goes:

    moved, tied, deep-copied, cloned, detached, wrapped in nn.Parameter again   the same origin
    cast (`model.bfloat16()`)                                                   the same origin, one more cast
    given real values (`p.data = tensor`)                                       an ordinary tensor with these values
    changed in place, resized, or the result of any other operation             no origin: its values cannot be known

An edit in place is seen by torch's version counter, which counts on meta, too. `p.data` hides such an edit from the
counter of an ordinary parameter; here it shares the counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Origin:
    """The weight of the files whose values a tensor has.

    Attributes:
        name: the weight's name when the files were planned.
        shape: its shape.
        casts: the dtypes that it was cast to since, in order.
    """

    name: str
    shape: torch.Size
    casts: tuple[torch.dtype, ...] = ()


_seem_real = False


@contextmanager
def seeming_real() -> Iterator[None]:
    """Within it, deferred tensors say that they are on the CPU: what is made for them is made there, with values."""
    global _seem_real
    before, _seem_real = _seem_real, True
    try:
        yield
    finally:
        _seem_real = before


class DeferredTensor(torch.Tensor):
    """A parameter or buffer on meta with an `Origin`. `defer` makes one, in place; `settle` undoes that.

    A parameter stays one (`isinstance(p, nn.Parameter)`), by the flag that torch has for custom tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    _origin: Origin | None
    _stamp: tuple[int, Any] | None
    _plain_class: type

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cpu") if _seem_real and self.is_meta else super().device

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.is_meta:
            torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
            _note(self, origin_of(value))
            return
        is_param, requires_grad = isinstance(self, nn.Parameter), self.requires_grad
        # torch refuses real data for a tensor on meta. Swapping keeps the object, which modules and optimizers hold.
        torch.utils.swap_tensors(self, nn.Parameter(value, requires_grad) if is_param else value.detach())

    def type(self, *args: Any, **options: Any) -> Any:
        return self._same_values(super().type(*args, **options)) if args or options else super().type()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy = torch.empty_like(self, device="meta", requires_grad=self.requires_grad)
            memo[id(self)] = _defer(copy, origin_of(self), self._plain_class, isinstance(self, nn.Parameter))
        return memo[id(self)]

    def _same_values(self, result: torch.Tensor) -> torch.Tensor:
        """`result`, of an operation that keeps the values or casts them, with this tensor's origin."""
        if result is self or not result.is_meta:
            return result
        origin = origin_of(self)
        if origin is not None and result.dtype != self.dtype:
            origin = replace(origin, casts=(*origin.casts, result.dtype))
        return _defer(result, origin, torch.Tensor, False)


def _keeping_values(name: str) -> Any:
    plain = getattr(torch.Tensor, name)
    return lambda self, *args, **options: self._same_values(plain(self, *args, **options))


for _name in ("detach", "clone", "contiguous", "to", "float", "double", "half", "bfloat16"):
    setattr(DeferredTensor, _name, _keeping_values(_name))


def defer(tensor: torch.Tensor, name: str) -> None:
    """Let a parameter or buffer on meta stand for the weight `name` of the files. It stays the same object.

    Edits count from `watch` on: transformers, too, touches the model while it loads.
    """
    _defer(tensor, Origin(name, tensor.shape), type(tensor), isinstance(tensor, nn.Parameter))
    tensor._stamp = None


def _defer(tensor: torch.Tensor, origin: Origin | None, plain_class: type, is_param: bool) -> torch.Tensor:
    tensor.__class__ = DeferredTensor
    tensor._plain_class = plain_class
    if is_param:
        tensor._is_param = True
    _note(tensor, origin)
    return tensor


def _note(tensor: torch.Tensor, origin: Origin | None) -> None:
    tensor._origin = origin
    tensor._stamp = _version(tensor), tensor.untyped_storage()


def watch(tensor: torch.Tensor) -> None:
    """From here on, a change in place costs a deferred tensor its origin."""
    if isinstance(tensor, DeferredTensor):
        _note(tensor, tensor._origin)


def is_deferred(tensor: torch.Tensor) -> bool:
    """Whether it is, or was before an edit, a weight of the files."""
    return isinstance(tensor, DeferredTensor)


def origin_of(tensor: torch.Tensor) -> Origin | None:
    """The source of its values; None for an ordinary tensor, and for one that was changed since."""
    if not isinstance(tensor, DeferredTensor) or (origin := tensor._origin) is None:
        return None
    if tensor._stamp is None:
        return origin
    version, storage = tensor._stamp
    same = tensor.untyped_storage()._cdata == storage._cdata and _version(tensor) == version
    return origin if same and tensor.shape == origin.shape else None


def settle(tensor: torch.Tensor) -> None:
    """Make a deferred tensor an ordinary one on meta again, in place."""
    if not isinstance(tensor, DeferredTensor):
        return
    is_param = isinstance(tensor, nn.Parameter)
    plain = tensor._plain_class
    for name in ("_origin", "_stamp", "_plain_class", "_is_param"):
        tensor.__dict__.pop(name, None)
    tensor.__class__ = nn.Parameter if is_param and plain is torch.Tensor else plain


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

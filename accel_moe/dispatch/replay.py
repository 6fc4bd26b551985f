"""What an exchange brought, kept until backward: activation checkpointing runs a forward again, and the exchange with
it unless somebody kept its result.

`kept_exchanges` is a `context_fn` for torch.utils.checkpoint. Between its two contexts a function given to `replayed`
runs the first time only; when the forward is run again, its first result comes back instead. Everything
else of the layer (attention, norms, router, the experts' GEMMs) is computed again, as checkpointing wants it. What is
kept belongs to the checkpoint's own frame, and goes with the autograd graph.

Which results are worth keeping is decided by torch.utils.checkpoint's selective policies, too; they act on every
operator by a dispatch mode, where this acts on a handful of Python calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Run = Callable[[Callable[[], Any], bool], Any]  # what replayed() does with its arguments at present
_thread = threading.local()  # backward, and so the second run, has a thread of its own on a GPU


def replayed(compute: Callable[[], T], *, handed_out: bool = False) -> T:
    """compute(), or its first result when checkpointing runs a kept forward again.

    Tensors come back without the autograd history they got since: call it inside an autograd function's forward, or
    under no_grad. `handed_out`: the result leaves our hands, and may be changed in place there; a copy is kept.
    """
    stack = _stack()
    return stack[-1](compute, handed_out) if stack else compute()


def runs_again() -> bool:
    """Whether checkpointing will run this forward again before its backward, as far as is known here."""
    return bool(_stack())


def kept_exchanges() -> tuple[Any, Any]:
    """The contexts of a forward that keeps and of its second run, for `torch.utils.checkpoint(context_fn=...)`."""
    values: list[Any] = []
    return _keep(values), _Replay(values)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it, `replayed` only computes."""
    with _pushed(lambda compute, _: compute()):
        yield


@contextlib.contextmanager
def _keep(values: list[Any]) -> Iterator[None]:
    def run(compute, handed_out):
        value = compute()
        values.append(_detached(value, copy=handed_out))
        return value

    with _pushed(run):
        yield


class _Replay:
    """A context that can be entered more than once: with retain_graph a forward is run again for each backward."""

    def __init__(self, values: list[Any]):
        self._values = values

    def __enter__(self) -> None:
        left = iter(self._values)

        def run(compute, handed_out):
            try:
                return _detached(next(left), copy=handed_out)
            except StopIteration:
                raise RuntimeError(
                    "A checkpointed forward exchanged more often when it was run again than the first time. It must "
                    "do the same both times; or set moe_keep_exchanged: false."
                ) from None

        self._pushed = _pushed(run)
        self._pushed.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._pushed.__exit__(*exception)


@contextlib.contextmanager
def _pushed(run: Run) -> Iterator[None]:
    stack = _stack()
    stack.append(run)
    try:
        yield
    finally:
        stack.pop()


def _stack() -> list[Run]:
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    return _thread.stack


def _detached(value: Any, copy: bool = False) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if copy else value.detach()
    if type(value) is tuple:
        return tuple(_detached(part, copy) for part in value)
    return value

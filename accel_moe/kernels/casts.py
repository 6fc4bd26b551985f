"""Weights in the compute dtype: made when they are needed or a little before, and kept no longer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

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
        before: the casts of the layer whose backward comes after this one's, if anybody said so.
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype, of_module: bool = False):
        self.of_module = of_module
        self.before: weakref.ref[Casts] | None = None
        self.dtype = dtype
        self._parameters = parameters
        self._made: list[Tensor] | None = None
        self._aside: tuple[Pass, torch.cuda.Event | None] | None = None

    def prepare(self) -> None:
        if self._made is None:
            self._made = self._make()

    def prepare_aside(self) -> None:
        """`prepare`, beside what the caller's stream does from now on. They serve the forward or the backward that runs
        now; after it they are cast again, for weights may have changed. Outside of both, nothing is made."""
        now = current_pass()
        if self._made is not None or now == NO_PASS:
            return
        try:
            # in memory of the caller's stream, which takes them, and which alone may have it again
            made = [torch.empty_like(p, dtype=self.dtype) for p in self._parameters]
        except torch.OutOfMemoryError:
            return  # the layer itself may come to need less
        with _beside(made[0].device) as done:
            for cast, parameter in zip(made, self._parameters, strict=True):
                cast.copy_(parameter.detach())
        self._made, self._aside = made, (now, done)

    def take(self) -> list[Tensor]:
        """In the parameters' order."""
        made, self._made = self._made, None
        if self._aside is not None:
            made_in, done = self._aside
            self._aside = None
            if done is not None:
                done.wait()
            if made_in != current_pass():
                made = None
        return self._make() if made is None else made

    def prepare_next_in_backward(self) -> None:
        """Aside, those of the layer whose backward comes after this one's."""
        before = None if self.before is None else self.before()
        if before is not None:
            before.prepare_aside()

    def _make(self) -> list[Tensor]:
        return [p.detach().to(self.dtype) for p in self._parameters]

    def __del__(self):
        if self._made is not None and self._aside is not None and self._aside[1] is not None:
            # their memory goes back while they may still be written
            torch.cuda.current_stream(self._made[0].device).wait_event(self._aside[1])


class Pass(NamedTuple):
    """A forward of a whole model, or a backward, by their numbers."""

    forward: int
    backward: int


NO_PASS = Pass(0, -1)
_forwards = itertools.count(1)
_running: list[int] = []
"""The forwards of whole models that run now; the last one is the innermost."""
_outer = threading.local()


def current_pass() -> Pass:
    backward = getattr(_outer, "backward", None)
    return Pass(_running[-1] if _running else 0, torch._C._current_graph_task_id() if backward is None else backward)


def begin_forward() -> None:
    """A whole model's forward begins. Between its layers no optimizer steps."""
    _running.append(next(_forwards))


def end_forward() -> None:
    if _running:
        _running.pop()


@contextlib.contextmanager
def one_backward() -> Iterator[None]:
    """A backward that is started within another one is part of it (in_graph.py)."""
    before = getattr(_outer, "backward", None)
    _outer.backward = current_pass().backward
    try:
        yield
    finally:
        _outer.backward = before


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[torch.cuda.Event | None]:
    """What is launched inside runs beside the caller's later work, and after its earlier. -> when it is done; None on a
    CPU, where it is done at once."""
    if device.type != "cuda":
        yield None
        return
    stream, done = _stream_of(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield done
        done.record(stream)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

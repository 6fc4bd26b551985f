"""Weights in the compute dtype: made when they are needed or a little before, and kept no longer."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator

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
        self._parameters = parameters
        self._dtype = dtype
        self._made: list[Tensor] | None = None
        self._aside: tuple[torch.cuda.Event | None, list[int]] | None = None

    def prepare(self) -> None:
        if self._made is None:
            self._made = self._make()

    def prepare_aside(self) -> None:
        """`prepare`, beside what the caller's stream does from now on. Parameters that change until they are taken are
        cast again."""
        if self._made is not None:
            return
        # in memory of the caller's stream, which takes them, and which alone may have it again
        self._made = [torch.empty_like(p, dtype=self._dtype) for p in self._parameters]
        versions = [p._version for p in self._parameters]
        with _beside(self._made[0].device) as done:
            for made, parameter in zip(self._made, self._parameters, strict=True):
                made.copy_(parameter.detach())
        self._aside = done, versions

    def next_in_backward(self) -> Casts | None:
        return None if self.before is None else self.before()

    def take(self) -> list[Tensor]:
        """In the parameters' order."""
        made, self._made = self._made, None
        if self._aside is not None:
            (done, versions), self._aside = self._aside, None
            if done is not None:
                done.wait()
            if versions != [p._version for p in self._parameters]:
                made = None
        return self._make() if made is None else made

    def _make(self) -> list[Tensor]:
        return [p.detach().to(self._dtype) for p in self._parameters]

    def __del__(self):
        if self._aside is not None and self._aside[0] is not None:
            self._aside[0].wait()  # their memory goes back while they may still be written


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

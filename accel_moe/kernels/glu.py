"""What stands between the two projections: its description, and how it is recognised in a module.

A family may define its own gate (`_apply_gate`): clamped, scaled, shifted, interleaved. It is not looked up by the
family's name: the module's function is tried on a grid of numbers, and described by the `Glu` that gives the same
result everywhere. A gate that no description fits is refused by name.

No Triton here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import ACTIVATIONS, activation_name

# the attributes in which families keep a gate's numbers
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


@dataclass(frozen=True, repr=False)
class Glu:
    """act(gate) * (up + shift), gate and up clamped: h [P, 2I] -> a [P, I]; or, not gated, act(h), [P, I] -> [P, I].

    A constant of the kernels (activation.glu, activation.activation).
    """

    act: str = "silu"
    gated: bool = True
    interleaved: bool = False  # gate and up columns by turns, as in gpt_oss, not in two halves
    alpha: float = 1.0  # silu is x * sigmoid(alpha * x)
    shift: float = 0.0  # added to up
    limit: float = 0.0  # up to +-limit, gate to at most limit; 0: no clamp
    late: bool = False  # gate is clamped after its activation

    def __call__(self, h: Tensor) -> Tensor:
        """The meaning, in torch."""
        if not self.gated:
            return self._activated(h)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        if self.limit:
            up = up.clamp(-self.limit, self.limit)
        if self.limit and not self.late:
            gate = gate.clamp(max=self.limit)
        gate = self._activated(gate)
        if self.limit and self.late:
            gate = gate.clamp(max=self.limit)
        return gate * (up + self.shift)

    def _activated(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.act].torch(x, self.alpha)

    @property
    def formula(self):
        """The activation and its derivative as a function of Triton."""
        return ACTIVATIONS[self.act].triton()

    def __repr__(self) -> str:
        """Triton's caches on disk know a constant by this text. The formula's hash is of its source."""
        source = getattr(self.formula, "cache_key", "interpreted")
        return f"Glu({self.act!r}, gated={self.gated}, {self.numbers}, formula={source!r})"

    @classmethod
    def of(cls, act: str, gated: bool, numbers: Sequence[float]) -> "Glu":
        """From what a custom op can be given: `numbers` is `self.numbers`, or empty for a plain gate."""
        if not numbers:
            return cls(act, gated)
        interleaved, alpha, shift, limit, late = numbers
        return cls(act, gated, bool(interleaved), alpha, shift, limit, bool(late))

    @property
    def numbers(self) -> list[float]:
        """See `of`."""
        return [float(self.interleaved), self.alpha, self.shift, self.limit, float(self.late)]

    def describe(self) -> str:
        """In words, for a table: "silu gate, clamped at 7"."""
        words = [f"{self.act} gate" if self.gated else f"{self.act}, no gate"]
        words += [f"alpha {self.alpha:g}"] if self.alpha != 1 else []
        words += [f"up + {self.shift:g}"] if self.shift else []
        words += [f"clamped{' late' if self.late else ''} at {self.limit:g}"] if self.limit else []
        return ", ".join(words)


def has_default_glu(module) -> bool:
    """Whether its gate is the one of transformers' decorator: act_fn(first half) * second half."""
    gate = getattr(module, "_apply_gate", None)
    return getattr(gate, "__name__", "_default_apply_gate") == "_default_apply_gate"


def glu_of(module) -> Glu | None:
    """The module's gate as the kernels can compute it, or None. A gate of the module's own is tried once."""
    act = activation_name(getattr(module, "act_fn", None))
    if not module.has_gate:
        return Glu(act, gated=False) if act else None
    if has_default_glu(module):
        return Glu(act) if act else None
    owner = getattr(module._apply_gate, "__self__", module)
    numbers = [_number(module, names) for names in (_LIMITS, _ALPHAS)]
    key = (getattr(module._apply_gate, "__func__", module._apply_gate), act, *numbers)
    known = getattr(owner, "_scattermoe_gate", None)
    if known is None or known[0] != key:
        known = key, _recognise(module._apply_gate, act, *numbers)
        owner._scattermoe_gate = known
    return known[1]


def _number(module, names: Sequence[str]) -> float:
    found = (getattr(module, name, None) for name in names)
    return next((float(n) for n in found if isinstance(n, int | float) and n == n and 0 < n < float("inf")), 0.0)


def _recognise(apply_gate, act: str | None, limit: float, alpha: float) -> Glu | None:
    """The first description that agrees with `apply_gate` on a grid in fp32, gradient included."""
    with torch.inference_mode(False):
        return _first_that_agrees(apply_gate, act, limit, alpha)


def _first_that_agrees(apply_gate, act: str | None, limit: float, alpha: float) -> Glu | None:
    h, upstream = _grid(limit or 1.0)
    try:
        wanted = _value_and_gradient(apply_gate, h, upstream)
    except Exception:  # a gate that needs more than rows
        return None
    acts = dict.fromkeys([act, "silu"] if act else ["silu"])
    choices = itertools.product(
        acts, (False, True), {1.0: None, alpha or 1.0: None}, (0.0, 1.0), {limit: None, 0.0: None}, (False, True)
    )
    for name, interleaved, scale, shift, bound, late in choices:
        gate = Glu(name, True, interleaved, scale, shift, bound, late)
        found = _value_and_gradient(gate, h, upstream)
        if all(w.shape == f.shape and torch.allclose(w, f, rtol=1e-5, atol=1e-5) for w, f in zip(wanted, found)):
            return gate
    return None


def _grid(limit: float) -> tuple[Tensor, Tensor]:
    """h [n, 8]: random numbers and pairs of all sides of the limit; and an upstream gradient."""
    here = {"device": "cpu", "dtype": torch.float32}  # whatever the caller's defaults are
    random = {"generator": torch.Generator("cpu").manual_seed(0), **here}
    sides = torch.tensor([-8.0, -3.0, -1.01, -0.5, -0.01, 0.0, 0.02, 0.6, 0.99, 1.2, 4.0], **here) * limit
    pairs = torch.cartesian_prod(sides, sides)
    far = torch.tensor([-1e4, -1e3, -1e2, -30.0, 1.0, 30.0, 1e2, 1e3, 1e4], **here)  # limits that nobody told us
    pairs = torch.cat([pairs, torch.cartesian_prod(far, far)])
    rows = torch.cat([pairs.repeat(1, 4), pairs.repeat_interleave(4, 1), 6 * torch.randn(64, 8, **random)])
    return rows, torch.randn(len(rows), 4, **random)


def _value_and_gradient(function, h: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    # hooks of its own: inside a checkpointed forward, that forward's would count and unpack what is saved here
    own = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), own:
        h = h.clone().requires_grad_()
        value = function(h)
        return value.detach(), torch.autograd.grad(value, h, upstream)[0]

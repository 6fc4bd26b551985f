"""Whether a named experts function computes these experts: tried, before anything is trained with it.

transformers' interface takes any function under any name, and leaves to it what it reads of a module. `sonicmoe` reads
the activation's name and not the gate: gpt_oss and every other clamped, scaled or shifted gate would train as plain
SwiGLU, without an error. `deepgemm` has no backward: the experts would learn nothing. A function of the user's own may
forget the biases, the routing weights' gradient, or the slots of other ranks.

So a function that this package has not tested is called once, on experts of the module's own layout, gate and dtype but
small, with random numbers. Output and every gradient are compared with the interface's meaning in plain torch.
Milliseconds, no collective, and no trace: the module, its gradients, the random state and the modes of autograd stay as
they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_moe.experts.view import ExpertsView, as_interface
from accel_moe.kernels import scattermoe
from accel_moe.kernels.glu import glu_of
from accel_moe.kernels.hints import Hints

TESTED = ("transformers.integrations.moe", "accel_moe.kernels.scattermoe")
"""Where functions live that the tests compare with every family's own loop."""

_SIDE, _EXPERTS, _TOKENS = 128, 8, 24
"""The most of a width, experts and tokens. Kernels ask for multiples of 128."""
_SCALES = (0.3, 1.0, 4.0, 30.0)
"""Of rows, by turns: a gate's limit is passed by some of them and not by others."""
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""Of a row. fp32 may be multiplied as TF32. Right kernels were seen 0.8% off in bf16, wrong ones by 100% and more."""


class _Wrong(Exception):
    """What the function gets wrong, in words."""


@dataclass(frozen=True)
class _Small:
    """A module's experts on a small scale.

    Attributes:
        parameters: by name, as the module stores them, in the compute dtype.
        index: [T, K]; `num_experts` is a slot without an expert, of weight 0.
    """

    view: ExpertsView
    parameters: dict[str, torch.Tensor]
    hidden_states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    upstream: torch.Tensor


def refusal(modules: dict[str, nn.Module], kernel: str, *, ep_degree: int, trains: bool) -> tuple[str, str] | None:
    """(the module's name, why `kernel` is not to run it), for the first one that it does not compute, or None.

    trains: whether gradients are needed. Not a collective; every rank finds the same.
    """
    if kernel == "eager":
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    function, seen = ALL_EXPERTS_FUNCTIONS[kernel], set()
    if getattr(function, "__module__", None) in TESTED:
        return None
    for name, module in modules.items():
        if (kind := _kind(module)) in seen:
            continue
        seen.add(kind)
        if (why := _try(function, module, ep_degree, trains)) is not None:
            return name, f"moe_kernel={kernel} {why}. Use moe_kernel: auto"
    return None


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that a function treats alike: class, layout, numbers and activation."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and n != "layer_idx"}
    dtypes = {p.dtype for p in module.parameters()}
    own = vars(module).get("_apply_gate")
    return type(module), tuple(sorted(plain.items())), repr(getattr(module, "act_fn", None)), own, frozenset(dtypes)


def _try(function: Callable[..., torch.Tensor], module: nn.Module, ep_degree: int, trains: bool) -> str | None:
    """Why not, or None. In fp32, which tells most; a kernel that refuses that is given the module's dtype, and bf16."""
    stored, why = next(module.parameters()).dtype, None
    for dtype in dict.fromkeys([torch.float32, stored, torch.bfloat16]):
        try:
            return fault(function, module, dtype, ep_degree=ep_degree, trains=trains)
        except Exception as error:
            why = why or f"fails on a small copy of it: {type(error).__name__}: {_first_line(error)}"
    return why


def fault(
    function: Callable[..., torch.Tensor],
    module: nn.Module,
    dtype: torch.dtype,
    *,
    ep_degree: int,
    trains: bool = True,
    side: int = _SIDE,
) -> str | None:
    """Why `function` does not compute experts of this module's layout and gate, in words, or None.

    Args:
        module: on any device, "meta" included; its weights are not read.
        side: the most of a width.

    Raises whatever the function raises, but ImportError.
    """
    device = _device()
    try:
        with _leaving_no_trace(device):
            for empty in (False, True) if ep_degree > 1 else (False,):
                small = _small(module, device, dtype, strays=ep_degree > 1, empty=empty, side=side)
                _compare(function, small, trains)
    except ImportError as error:
        return f"cannot run here: {_first_line(error)}"
    except _Wrong as wrong:
        gate = glu_of(as_interface(module))
        own = f" (its gate: {gate.describe()})" if gate is not None else ""
        return f"does not compute it{own}: {wrong}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _device() -> torch.device:
    """This rank's accelerator, whether or not anybody chose it already; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", rank if rank < torch.cuda.device_count() else torch.cuda.current_device())


@contextlib.contextmanager
def _leaving_no_trace(device: torch.device) -> Iterator[None]:
    """Autograd as in training, whatever the caller's modes are; random states and the current device come back."""
    on_gpu = device.type == "cuda"
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # the caller's would see what we save
    with contextlib.ExitStack() as stack:
        for context in (
            torch.random.fork_rng(devices=[device.index] if on_gpu else []),
            torch.cuda.device(device) if on_gpu else contextlib.nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device(device),
            hooks,
        ):
            stack.enter_context(context)
        yield


def _small(
    module: nn.Module, device: torch.device, dtype: torch.dtype, *, strays: bool, empty: bool, side: int
) -> _Small:
    """strays: some slots, and all of some rows, belong to other ranks. empty: one row, without an expert."""
    layout: Any = as_interface(module)
    random = torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32)

    sizes, hidden, intermediate = _sizes(layout, side)
    experts = min(layout.num_experts, _EXPERTS)
    parameters = {}
    for name in scattermoe.parameter_names(layout):
        up = (2 if layout.has_gate else 1) * intermediate, hidden
        shape = (hidden, intermediate) if name.startswith("down_proj") else up
        value = numbers(experts, shape[0]) if name.endswith("_bias") else numbers(experts, *shape) / shape[1] ** 0.5
        value = value.mT.contiguous() if layout.is_transposed and value.dim() == 3 else value
        parameters[name] = value.to(device, dtype).requires_grad_()
    tokens, top_k = (1 if empty else _TOKENS), min(3, experts)
    index = numbers(tokens, experts).argsort(1)[:, :top_k].contiguous()
    if strays:
        index[1::3, 0] = experts
        index[2::5] = experts
    if empty:
        index[:] = experts
    weights = (numbers(tokens, top_k).abs() + 0.1).masked_fill(index == experts, 0.0)
    scales = torch.tensor(_SCALES, device="cpu", dtype=torch.float32).repeat(_TOKENS)[:tokens, None]
    answers: dict[str, Any] = {n: sizes[v] for n, v in vars(module).items() if type(v) is int and v in sizes}
    answers |= {"num_experts": experts, "_is_expert_parallel": strays, **parameters}
    return _Small(
        view=ExpertsView(layout, Hints(num_pairs=int((index < experts).sum())), **answers),
        parameters=parameters,
        hidden_states=(numbers(tokens, hidden) * scales).to(device, dtype).requires_grad_(),
        index=index.to(device),
        weights=weights.to(device).requires_grad_(),
        upstream=numbers(tokens, hidden).to(device, dtype),
    )


def _sizes(layout: Any, side: int) -> tuple[dict[int, int], int, int]:
    """What the module's own widths become, where attributes have them; and the small hidden and intermediate size."""
    hidden, intermediate = layout.down_proj.shape[1:] if not layout.is_transposed else layout.down_proj.shape[:0:-1]
    small = min(intermediate, side)
    wide = 2 * small if hidden == 2 * intermediate else small if hidden == intermediate else min(hidden, side)
    return {2 * intermediate: 2 * small, intermediate: small, hidden: wide}, wide, small


def _meaning(small: _Small) -> torch.Tensor:
    """The interface's maths, one expert after the other, in fp32."""
    view: Any = small.view
    up = "gate_up_proj" if view.has_gate else "up_proj"
    own = {name: value.float() for name, value in small.parameters.items()}
    rows, out = small.hidden_states.float(), torch.zeros_like(small.upstream, dtype=torch.float32)
    for expert in range(view.num_experts):
        token, k = torch.where(small.index == expert)
        h = _linear(rows[token], own, up, expert, view.is_transposed)
        a = view._apply_gate(h) if view.has_gate else view.act_fn(h)
        y = _linear(a, own, "down_proj", expert, view.is_transposed)
        out = out.index_add(0, token, y * small.weights[token, k, None].float())
    return out


def _linear(
    rows: torch.Tensor, parameters: dict[str, torch.Tensor], name: str, expert: int, transposed: bool
) -> torch.Tensor:
    weight, bias = parameters[name][expert], parameters.get(f"{name}_bias")
    product = rows @ (weight if transposed else weight.mT)
    return product if bias is None else product + bias[expert]


def _compare(function: Callable[..., torch.Tensor], small: _Small, trains: bool) -> None:
    """Raises _Wrong."""
    learning = {"hidden_states": small.hidden_states, "top_k_weights": small.weights, **small.parameters}
    wanted = _meaning(small)
    found = function(small.view, small.hidden_states, small.index, small.weights)
    if found.shape != wanted.shape:
        raise _Wrong(f"its output is {tuple(found.shape)}, not {tuple(wanted.shape)}")
    _judge("its output", found, wanted, small)
    if not trains:
        return
    gradients = torch.autograd.grad(wanted, list(learning.values()), small.upstream.float(), allow_unused=True)
    if not found.requires_grad:
        raise _Wrong("it has no backward: nothing before it, and no expert, would learn")
    own = torch.autograd.grad(found, list(learning.values()), small.upstream.to(found.dtype), allow_unused=True)
    away = small.index == small.view.num_experts
    for (name, tensor), gradient, expected in zip(learning.items(), own, gradients, strict=True):
        expected = torch.zeros_like(tensor) if expected is None else expected
        if gradient is None:
            if expected.any():
                raise _Wrong(f"it has no gradient of {name}, which would not learn")
            continue
        if name == "top_k_weights":  # what is left in slots of other ranks is never read
            gradient, expected = gradient.masked_fill(away, 0.0), expected.masked_fill(away, 0.0)
        _judge(f"its gradient of {name}", gradient, expected, small)


def _judge(what: str, found: torch.Tensor, wanted: torch.Tensor, small: _Small) -> None:
    """Row by row (of a weight, expert by expert), so that a large row does not hide a small one's error.

    Most rows of each scale must be right but for rounding. A few gradients may be off by more: rounding takes a value
    across a gate's limit, where its gradient ends.
    """
    found, wanted = (t.detach().float().flatten(1) for t in (found, wanted))
    size = wanted.norm(dim=1)
    off = (found - wanted).norm(dim=1) / size.clamp(min=1e-3 * max(1e-6, float(size.max())))
    off = off.nan_to_num(float("inf"), posinf=float("inf"))
    allowed = _TOLERANCE.get(small.hidden_states.dtype, 2e-2)
    if bool((off[size == 0] > allowed).any()):
        raise _Wrong(f"{what} is not zero in rows that belong to other ranks, or for an expert without a token")
    by_scale = [off[i :: len(_SCALES)] for i in range(len(_SCALES))] if len(off) == _TOKENS else [off]
    worst = max([float(off.max()) - 0.5, *(float(part.median()) for part in by_scale)])
    if worst > allowed:
        raise _Wrong(f"{what} is off by {float(off.max()):.1%} of its right value")

"""The forward registered with transformers as experts_implementation="scattermoe": from a module to the
kernels.

`scattermoe_experts_forward(module, hidden_states[T,H], top_k_index[T,K], top_k_weights[T,K]) -> [T,H]` takes
any experts module of transformers v5 (or a view of one) whose maths `unsupported_reason` does not refuse.
Triton is imported at the first call, so this file imports anywhere. It leaves alone: the router, shared
experts, and every collective.
"""

import torch
from torch import Tensor

from .glu import Glu, glu_of, has_default_glu
from .hints import NO_HINTS, Hints


def unsupported_reason(module) -> str | None:
    """Why scattermoe cannot compute this experts module, in words for an error message; None when it can.

    Reads attributes only, and tries the gate on a few numbers: no device, no Triton. What it does not know, it refuses.
    """
    name = type(module).__name__
    missing = [a for a in ("has_gate", "has_bias", "is_transposed", "is_concatenated") if not hasattr(module, a)]
    if missing:
        return f"{name} is not an experts module of transformers v5: it has no {', '.join(missing)}"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} normalises each expert's output (has_post_expert_norm=True)"
    up = "gate_up_proj" if module.has_gate else "up_proj"
    for weight, dims in ((up, 3), ("down_proj", 3), (f"{up}_bias", 2), ("down_proj_bias", 2)):
        if dims == 2 and not module.has_bias:
            continue
        if getattr(getattr(module, weight, None), "ndim", None) != dims:
            return f"{name}.{weight} is not one {dims}-dimensional tensor"
    if module.has_gate and not module.is_concatenated and has_default_glu(module):
        return f"{name} interleaves gate and up columns (is_concatenated=False) and has no _apply_gate that says how"
    if glu_of(module) is None:
        own = "_apply_gate" if module.has_gate and not has_default_glu(module) else "act_fn"
        return f"{name}.{own} computes a gate that the kernels do not know"
    return None


def road_of(device: torch.device) -> str:
    """Which kernels compute on this device, for a table: "scattermoe", or with Gluon's among them."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        from .roads import gluon_road

        if gluon_road() is not None:
            return "scattermoe (Gluon)"
    return "scattermoe"


def parameter_names(module) -> list[str]:
    """What an experts module computes with: up-projection, down-projection, and their biases if it has any."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])


def scattermoe_experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts layer, [T, H] in hidden_states' dtype, differentiable in hidden_states, parameters and top_k_weights.

    self: an experts module, or a view that answers its attributes and may have `hints` (Hints). A slot with top_k_index
    outside 0..num_experts-1 is a sentinel: no work, no contribution, gradient exactly 0. No host sync, no collective.

    Raises:
        ValueError: the module is one that unsupported_reason refuses, or tensors do not fit together.
    """
    from .autograd import ExpertWeights, experts  # the first call imports Triton

    hints: Hints = getattr(self, "hints", NO_HINTS)
    glu = hints.glu
    if glu is None:
        reason, *kind = _look_at(self)
        if reason:
            raise ValueError(
                f"scattermoe does not support this experts layer: {reason}. Choose "
                f"experts_implementation='grouped_mm' (or 'eager')."
            )
        glu = Glu.of(*kind)
    x, parameters = hidden_states, [getattr(self, name) for name in parameter_names(self)]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as F.linear would; differentiable
        if hints.casts is None:
            parameters = [p.to(x.dtype) for p in parameters]
    weights = ExpertWeights(*parameters, transposed=self.is_transposed)
    return experts(x, weights, top_k_index, top_k_weights, glu, hints).to(hidden_states.dtype)


@torch.compiler.assume_constant_result
def _look_at(module) -> tuple[str, str, bool, list[float]]:
    """Why not, or ""; and the arguments of Glu.of. Plain values, which torch.compile can keep."""
    if reason := unsupported_reason(module):
        return reason, "", False, []
    glu = glu_of(module)
    assert glu is not None
    return "", glu.act, glu.gated, glu.numbers

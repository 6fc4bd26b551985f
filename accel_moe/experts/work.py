"""One forward's own work: the weights as the experts function sees them, their casts, and the counting of tokens.

Nothing of it needs the exchange, so a dispatcher may overlap the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from accel_moe.dispatch.base import Dispatched, Overlap, RoutedTokens
from accel_moe.dispatch.replay import runs_again
from accel_moe.experts.expert_counts import count_tokens
from accel_moe.experts.packing import KeptPacked, Unpacked
from accel_moe.experts.state import LayerState
from accel_moe.experts.storage import DENSE, storage_of
from accel_moe.experts.view import KNOWN_PARAMETERS, ExpertsView, as_interface, shim_answers
from accel_moe.kernels import scattermoe
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.hints import Hints, LowRank


class LayerWork(Overlap):
    """The work of one forward of one layer."""

    def __init__(self, module: Any, tokens: RoutedTokens):
        self._module, self._layer = module, module._accel_moe_layer
        self._dtype, self._index = tokens.rows.dtype, tokens.index
        # now: a dispatcher may ask for the work inside an autograd function, which records no gradients
        self._evaluates = not (module.training or torch.is_grad_enabled())
        self._view: ExpertsView | None = None
        self._ready = False
        if self._layer.chunk_tokens:
            self.prepare_weights()  # backward runs the chunks again, when PEFT lends nothing any more

    @property
    def bytes_per_pair(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The activation [I] of one (row, expert) pair, and with a backward to come the pre-activation, [2I] or [I],
        too, whether it is kept for it or computed again."""
        layer = self._layer
        if layer.pair_widths is None:
            layout: Any = as_interface(self._module)
            down = layer.packed["down_proj"].matrix if layer.packed else layout.down_proj.shape
            intermediate: int = down[-2 if layout.is_transposed else -1]
            layer.pair_widths = intermediate, (3 if layout.has_gate else 2) * intermediate
        return layer.pair_widths[torch.is_grad_enabled()] * self._dtype.itemsize

    @property
    def bytes_of_weights(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Bytes this rank's expert weights take once cast to the compute dtype; weights already in it count as 0."""
        layer, dtype = self._layer, self._dtype
        if dtype not in layer.cast_bytes:
            stored = {name: p for name, p in parameters_of(self._module).items() if p.dtype != dtype}
            values = sum(layer.values_of(name, p) for name, p in stored.items())
            layer.cast_bytes[dtype] = values // layer.ep * dtype.itemsize
        return layer.cast_bytes[dtype]

    def prepare_weights(self) -> None:
        if self._view is None:
            self._view = view_of(self._module, self._layer, self._dtype)
            count_tokens(self._layer, self._index, self._evaluates)
        if (casts := self._view.hints.casts) is not None:
            casts.prepare()
        self._ready = True

    def for_backward(self) -> Callable[[], None] | None:
        casts = None if self._view is None else self._view.hints.casts
        # a forward that is run again makes casts of its own, and these would lie beside them
        return None if casts is None or runs_again() else casts.prepare

    def view(self, sent: Dispatched) -> ExpertsView:
        """The module as the experts function sees it, for the rows that were sent."""
        if not self._ready:
            self.prepare_weights()
        self._ready = False  # each chunk has casts of its own
        assert self._view is not None
        return self._view.with_hints(num_pairs=sent.num_pairs, on_input_grads=sent.on_input_grads)

    def rows(self, sent: Dispatched) -> torch.Tensor:
        """[R, H]; contiguous for other kernels than ours, which take rows with a stride."""
        return sent.rows if self._layer.kernel == "scattermoe" else sent.rows.contiguous()


class _LocalParts(torch.autograd.Function):
    """This rank's part of each weight; a gradient of it becomes this rank's part of the weight's gradient.

    `DTensor.to_local` does that, too, for one weight at a time, and derives a gradient's layout in every backward: a
    tenth of a millisecond a weight.
    """

    @staticmethod
    def forward(ctx, *weights: DTensor):
        ctx.layouts = [(w.device_mesh, w.placements, w.shape, w.stride()) for w in weights]
        ctx.set_materialize_grads(False)
        parts = [w.to_local() for w in weights]  # no gradients are recorded here
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: torch.Tensor | None):
        return tuple(_part_of(g, *layout) for g, layout in zip(gradients, ctx.layouts, strict=True))


def _part_of(gradient: torch.Tensor | None, mesh: Any, placements: Any, shape: Any, stride: Any) -> DTensor | None:
    if gradient is None:
        return None
    whole = {"shape": shape, "stride": stride} if gradient.is_contiguous() else {}
    return DTensor.from_local(gradient, mesh, placements, run_check=False, **whole)


def _local_parts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's part of each weight that is sharded, and the others as they are."""
    sharded = {name: w for name, w in weights.items() if isinstance(w, DTensor)}
    learning = [name for name, w in sharded.items() if w.requires_grad and w.is_contiguous()]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        learning = []
    parts = {name: w.to_local() for name, w in sharded.items() if name not in learning}
    if learning:
        parts.update(zip(learning, _LocalParts.apply(*(sharded[name] for name in learning))))
    return {name: parts.get(name, w) for name, w in weights.items()}


class _ScaleWeightGradients(torch.autograd.Function):
    """Identity on a group of weights; multiplies their gradients."""

    @staticmethod
    def forward(ctx, scale: float, *weights: torch.Tensor):
        ctx.scale = scale
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        return None, *(g * ctx.scale for g in gradients)


def view_of(module: Any, layer: LayerState, dtype: torch.dtype) -> ExpertsView:
    """The rank's own experts in `dtype`, under the 1/ep gradient scale.

    A rank's expert gradient is a sum over the tokens of its whole ep group, while the loss of each rank is a mean over
    its own tokens and FSDP averages over efsdp alone: without the factor expert gradients are ep times too large, and
    the gradient norm with them. Our kernels apply the factor in the epilogue of their weight gradient.
    """
    scale, weights = 1.0 / layer.ep, parameters_of(module)
    local = _local_parts(weights)
    if layer.prepared.quantize is not None and not layer.packed:
        raise RuntimeError(
            f"moe_quantize_experts={layer.prepared.quantize}: the experts are not quantised yet. accelerator.prepare("
            "model, optimizer) does that; call it before the first forward."
        )
    casts, stored = _casts_of(module, layer, local, dtype), local
    if casts is None:
        local = {name: (layer.packed.get(name) or storage_of(w) or DENSE).dense(w, dtype) for name, w in local.items()}
    else:  # our kernels ask packed weights for their shapes only
        local = local | {name: how.stand_in(local[name], dtype) for name, how in layer.packed.items()}
    fused = layer.kernel == "scattermoe"
    if layer.ep > 1 and not fused:
        trained = [name for name, weight in local.items() if weight.requires_grad]
        if trained:
            local.update(zip(trained, _ScaleWeightGradients.apply(scale, *(local[name] for name in trained))))
        scale = 1.0
    changes = _low_rank_changes(layer, weights, dtype)
    if changes and not fused:
        _add_to_weights(changes, local, as_interface(module).is_transposed)
    answers: dict[str, Any] = {**local, **(shim_answers(module, layer.shim) if layer.shim is not None else {})}
    if layer.ep > 1:
        answers.update(num_experts=layer.num_local_experts, _is_expert_parallel=True)
    elif layer.splits_identity_experts:
        # identity slots are sentinels now, which grouped_mm must skip
        answers.update(gate_up_proj=local["gate_up_proj"][: layer.num_experts], _is_expert_parallel=True)
    if casts is None and layer.packed and not torch.compiler.is_compiling():
        unchanged = {name: how for name, how in layer.packed.items() if name not in layer.deltas}
        answers["keeping"] = KeptPacked(local, stored, unchanged)
    hints = Hints(scale, casts=casts, glu=layer.glu, recompute_up=layer.recompute_up)
    if fused and changes:
        up, down = scattermoe.parameter_names(as_interface(module))[:2]
        hints = hints._replace(changes=(changes.get(up), changes.get(down)))
    return ExpertsView(module, hints, **answers)


def _low_rank_changes(layer: LayerState, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, LowRank]:
    """By parameter, the change of this rank's part of it, of all active adapters.

    lora_A and lora_B are dense: FSDP averages them over every rank, of which one per ep group has the gradient of an
    expert, summed over the group. That is the mean over ranks: no factor here.
    """
    changes = {}
    for name, lent in layer.deltas.items():
        at = weights[name].device_mesh.get_local_rank("ep") if layer.ep > 1 else 0  # pyright: ignore
        own = slice(at * layer.num_local_experts, (at + 1) * layer.num_local_experts)
        parts = [LowRank(one.inner[own].to(dtype), one.outer[own].to(dtype), one.scale) for one in lent]
        if len(parts) > 1:
            inner = torch.cat([one.inner for one in parts], 1)
            parts = [LowRank(inner, torch.cat([one.outer * one.scale for one in parts], 1))]
        changes.update((name, one) for one in parts)
    return changes


def _add_to_weights(changes: dict[str, LowRank], local: dict[str, torch.Tensor], transposed: bool) -> None:
    """For kernels that know no low-rank changes."""
    for name, (inner, outer, scale) in changes.items():
        left, right = (inner.mT, outer) if transposed else (outer.mT, inner)
        local[name] = torch.baddbmm(local[name], left, right, alpha=scale)


def _casts_of(module: Any, layer: LayerState, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Casts | None:
    """Casts for our kernels, which take weights as they are stored and write their gradients in that dtype. None if all
    weights are in `dtype`, and for other kernels, whose weights are cast under autograd."""
    if torch.compiler.is_compiling() or all(w.dtype == dtype for w in weights.values()):
        return None
    if layer.glu is None or layer.shim is not None:
        return None
    names = scattermoe.parameter_names(module)
    if layer.packed:
        return Unpacked({name: weights[name] for name in names}, layer.packed, dtype)
    if any(storage_of(w) is not DENSE for w in weights.values()):
        return None
    # with ep 1, PEFT computes the weights for the length of a forward
    return Casts([weights[name] for name in names], dtype, of_module=layer.ep > 1)


def parameters_of(module: Any) -> dict[str, torch.Tensor]:
    """The weights as they read: with ep 1, PEFT parametrises them for the length of a forward."""
    found = ((name, getattr(module, name, None)) for name in sorted(KNOWN_PARAMETERS))
    return {name: p for name, p in found if isinstance(p, torch.Tensor)}


def compute_dtype(module: Any, hidden_states: torch.Tensor) -> torch.dtype:
    """autocast's dtype under autocast; else the weights' own, which FSDP2's mixed precision has already cast."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return torch.get_autocast_dtype(hidden_states.device.type)
    if module._accel_moe_layer.compute_dtype is not None:
        return module._accel_moe_layer.compute_dtype
    weight = module.down_proj  # not of _parameters: PEFT's LoRA on experts makes it a property
    return weight.dtype if DENSE.holds(weight) else hidden_states.dtype

"""PEFT's LoRA on the experts themselves (`target_parameters`), lent to the layer instead of added to the weights.

PEFT's own parametrisation adds a whole matrix to a weight. That cannot be done to a shard (ep > 1), nor to bytes
(packing.py), and is slow: our kernels take the factors as they are (kernels/low_rank.py).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from accel_moe.experts.recognise import FoundExperts
from accel_moe.kernels.hints import LowRank
from accel_moe.patching import install, patch, patches_of


class LendsLowRank(nn.Module):
    """Mixed into a PEFT wrapper of an experts parameter.

    The factors are lent to the layer for a forward, which takes the part of its own experts. Rank, alpha, scaling and
    active adapters stay PEFT's; so do the names and shapes of lora_A and lora_B, which are dense weights.
    """

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        deltas = self.get_base_layer()._accel_moe_layer.deltas
        deltas[self.parameter_name] = [self._lent(a) for a in active_adapters if a in self.lora_A]
        try:
            yield
        finally:
            del deltas[self.parameter_name]

    def _lent(self, adapter: str) -> LowRank:
        """The factors of all experts, as they are: PEFT's own `get_delta_factors` casts them to the weight's dtype."""
        wrapper: Any = self
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight  # [r * E, in] and [out, r * E]
        inner = a.reshape(wrapper.num_experts, -1, a.shape[1])
        outer = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 1, 0)
        return LowRank(inner, outer, wrapper.scaling[adapter])

    def get_param(self) -> torch.Tensor:
        """The weight; for a packed one a stand-in, which PEFT asks for the dense weight's shape, dtype and device."""
        weight = super().get_param()  # pyright: ignore[reportAttributeAccessIssue]
        how = self.get_base_layer()._accel_moe_layer.packed.get(self.parameter_name)
        return weight if how is None else how.stand_in(weight)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's change of the whole weight, as the weight itself lies: merge and unmerge add and take it.

        A collective where FSDP shards lora_A and lora_B, as merging is in plain FSDP2.

        Raises:
            ValueError: the weight is packed.
        """
        if (how := self.get_base_layer()._accel_moe_layer.packed.get(self.parameter_name)) is not None:
            raise ValueError(
                f"{self.parameter_name} is packed (moe_quantize_experts={how.scheme}), and an adapter merges into a "
                "dense weight only. Save the adapter (save_pretrained), and merge it into the dense base: "
                "peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()."
            )
        change, weight = super().get_delta_weight(adapter_name, *args, **kwargs), self.get_param()  # pyright: ignore
        return _sharded_like(change, weight) if isinstance(weight, DTensor) else change


def _sharded_like(whole: torch.Tensor, weight: DTensor) -> DTensor:
    """`whole`, which every rank can have, as this rank's part of a DTensor like `weight`."""
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    own = whole[tuple(slice(first, first + size) for first, size in zip(offset, shape))]
    local = weight.to_local()
    return DTensor.from_local(
        own.to(local.device, local.dtype),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


@patch(
    "peft.tuners.lora.layer.ParamWrapper._activate_lora",
    why="Its parametrisation adds a whole matrix to a weight: our kernels do not need that, and it cannot be done to a "
    "shard or to bytes if PEFT wraps experts after they were sharded or packed.",
    tested="peft 0.21.2",
)
def _activate_lora(original, self, active_adapters):
    layer = getattr(self.get_base_layer(), "_accel_moe_layer", None)
    if layer is None or (layer.ep == 1 and not layer.packed and not _fits_kernels(self, layer)):
        return original(self, active_adapters)
    if layer.packed:
        raise ValueError(
            f"PEFT wrapped {self.parameter_name} after accelerator.prepare() had quantised it "
            f"(moe_quantize_experts={layer.prepared.quantize}), and took the bytes for a matrix. Call "
            "peft.get_peft_model(model, ...) before accelerator.prepare()."
        )
    if layer.ep > 1:
        _check_adapter(self, "moe_ep_degree > 1")
    self.__class__ = _lending_class(self.__class__)
    return self._activate_lora(active_adapters)


def _fits_kernels(adapter: Any, layer: Any) -> bool:
    """Whether our kernels compute with its factors."""
    stack = _has_factors(adapter) and adapter.get_param().dim() == 3 and adapter.num_experts > 1
    return stack and layer.kernel == "scattermoe"


def _has_factors(adapter: Any) -> bool:
    """Whether it is LoRA's ParamWrapper, as peft 0.17 to 0.21 have it."""
    return all(hasattr(adapter, name) for name in ("_activate_lora", "get_delta_factors", "lora_A", "lora_B"))


def patch_peft() -> None:
    """Install the patch above where PEFT was imported; its older versions have no ParamWrapper."""
    if hasattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper"):
        install(patches_of(_activate_lora))


def adopt_adapters(found: FoundExperts, because: str = "moe_ep_degree > 1") -> None:
    """Let the PEFT wrappers around experts work with shards and packed weights. A second call changes nothing.

    `because` names the option that needs it, for the error.

    Raises:
        ValueError: one of them cannot be trained so; none is changed then.
    """
    for adapter in found.adapters:
        _check_adapter(adapter, because)
    for adapter in found.adapters:
        adapter.__class__ = _lending_class(adapter.__class__)


def _check_adapter(adapter: nn.Module, because: str) -> None:
    """LoRA's ParamWrapper, on a 3-D weight; anything else is refused."""
    kind = f"{type(adapter).__name__} on {adapter.parameter_name}"
    if not _has_factors(adapter):
        raise ValueError(f"{because} with {kind} is not supported. Use LoRA (LoraConfig.target_parameters).")
    if adapter.get_param().dim() != 3:
        raise ValueError(
            f"{because} with LoRA on {adapter.parameter_name}, which is not a stack of matrices, is not "
            "supported. Leave it out of target_parameters."
        )


@functools.cache
def _lending_class(cls: type[nn.Module]) -> type[nn.Module]:
    return (
        cls
        if issubclass(cls, LendsLowRank)
        else type(cls.__name__, (LendsLowRank, cls), {"__module__": cls.__module__})
    )

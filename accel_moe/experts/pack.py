"""A model's frozen experts are packed (packing.py): before they are sharded, in place, or while they are read.

A model in memory is packed inside `accelerator.prepare`. One of `accel_moe.from_pretrained` gets packed parameters on
meta there, and weights/fill.py packs each matrix as it is read. PEFT has read the dense shapes by then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from accel_moe.experts.packing import BLOCK, Packing
from accel_moe.experts.state import PreparedState, swapped_layers
from accel_moe.experts.storage import DENSE
from accel_moe.patching import install_fitting, patch, patches_of

_STACKS = ("gate_up_proj", "up_proj", "down_proj")


def packable(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of an experts module that are packed: its stacks of matrices, and not its biases."""
    for name in _STACKS:
        if (parameter := layer._parameters.get(name)) is not None:
            yield name, parameter


@torch.no_grad()
def pack_experts(model: nn.Module, state: PreparedState | None, device: torch.device) -> None:
    """Pack the experts of a model with `moe_quantize_experts` in place, one matrix at a time, each on `device`.

    A weight on meta stays there, with its packed shape. The parameters stay the same objects, which optimizers hold. A
    second call changes nothing. Not a collective.
    """
    if state is None or state.quantize is None:
        return
    install_fitting(patches_of(_init_sharded_param, _init_dtype_attrs))
    done: dict[int, Packing] = {}
    for _, layer in swapped_layers(model):
        packed = layer._accel_moe_layer.packed
        for name, parameter in packable(layer):
            if name in packed:
                continue
            if id(parameter) not in done:  # experts may be tied
                done[id(parameter)] = how = Packing(state.quantize, parameter.shape[1:], parameter.dtype)
                parameter.data = _packed(parameter, how, device)
            packed[name] = done[id(parameter)]
    for module in model.modules():
        if hasattr(module, "save_pretrained") and not hasattr(module, "peft_config"):  # PEFT saves the adapter alone
            module.save_pretrained = functools.partial(_refuse_to_save, state.quantize)


@patch(
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam._init_sharded_param",
    why="Old FSDP2 makes a parameter that asks for a gradient of every shard, which integers cannot. Newer ones, whose "
    "function has other parameters, are left alone.",
    tested="torch 2.11.0",
)
def _init_sharded_param(original, self, param, device, shard_placement_fn):
    if param.is_floating_point():
        return original(self, param, device, shard_placement_fn)
    whole = _fsdp_param.nn
    _fsdp_param.nn = _FrozenParameters()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return original(self, param, device, shard_placement_fn)
    finally:
        _fsdp_param.nn = whole


@patch(
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam.init_dtype_attrs",
    why="Old FSDP2 casts every parameter to the mixed-precision dtype, and packed bytes are no numbers.",
    tested="torch 2.11.0, 2.13.0",
)
def _init_dtype_attrs(original, self, mp_policy):
    if not self.sharded_param.is_floating_point():
        mp_policy = dataclasses.replace(mp_policy, param_dtype=None)
    return original(self, mp_policy)


class _FrozenParameters:
    """torch.nn, whose parameters ask for no gradient."""

    Parameter = staticmethod(functools.partial(nn.Parameter, requires_grad=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


def _refuse_to_save(scheme: str, *args: Any, **kwargs: Any) -> None:
    """In place of a packed model's save_pretrained, which would write the bytes as if they were weights."""
    raise ValueError(
        f"The experts are packed (moe_quantize_experts={scheme}), which is no form of the Hub's: save_pretrained would "
        "write bytes for weights. Save the adapter (PeftModel.save_pretrained), or a checkpoint "
        "(accelerator.save_state)."
    )


def _packed(weight: torch.Tensor, how: Packing, device: torch.device) -> torch.Tensor:
    rows = torch.empty((weight.shape[0], how.row_bytes), dtype=torch.uint8, device=weight.device)
    if not weight.is_meta:
        for row, matrix in zip(rows, weight, strict=True):
            row.copy_(how.pack(matrix.to(device)))
    return rows


def packings(model: nn.Module) -> dict[str, Packing]:
    """By the parameter's name in a state dict, how each packed weight of `model` is packed."""
    layers = swapped_layers(model)
    return {f"{name}.{weight}": how for name, m in layers for weight, how in m._accel_moe_layer.packed.items()}


def check_packable(model: nn.Module, state: PreparedState, device: torch.device) -> None:
    """Whether the experts can be packed, on this rank. Not a collective.

    Raises:
        ValueError: they are trained, or no floats; or this machine lacks the library, or its kernels for `device`.
    """
    if state.quantize is None:
        return
    asked = f"moe_quantize_experts={state.quantize} ({state.resolved.sources['moe_quantize_experts']})"
    for prefix, layer in swapped_layers(model):
        for name, parameter in packable(layer):
            if parameter.requires_grad:
                raise ValueError(
                    f"{asked} needs frozen experts, and {prefix}.{name} is trained: quantised weights take no "
                    "gradient. Train an adapter (peft.get_peft_model freezes the rest), freeze the experts "
                    "(requires_grad_(False)), or remove moe_quantize_experts."
                )
            if not DENSE.holds(parameter):
                raise ValueError(
                    f"{asked} quantises float32, bfloat16 or float16, and {prefix}.{name} is {parameter.dtype} "
                    "already. Give a dequantised base, or remove moe_quantize_experts."
                )
    if why := _fails_on(state.quantize, device):
        raise ValueError(f"{asked} {why}")


def _fails_on(scheme: str, device: torch.device) -> str | None:
    """Why nothing can be packed so on `device`, or None: a block is tried, there and back."""
    how = Packing(scheme, torch.Size([1, BLOCK]), torch.float32)
    values = torch.linspace(-1, 1, BLOCK, device=device)
    other = "Use moe_quantize_experts: int8, which needs no library, or remove it."
    try:
        found = how.dense(how.pack(values)[None], torch.float32).view(-1)
    except ImportError as error:
        return f"needs bitsandbytes, and it is not there ({error}). pip install 'accel_moe[quantize]'. {other}"
    except Exception as error:  # a library without kernels for a device fails in ways of its own
        line = (str(error).strip().splitlines() or [""])[0]
        return f"needs bitsandbytes on {device}, where it fails ({type(error).__name__}: {line}). {other}"
    if not (found - values).abs().max() < 0.2:  # NF4's widest gap between two codes is 0.31
        return f"needs bitsandbytes on {device}, where it gives other values back than it was given. {other}"
    return None

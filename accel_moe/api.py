"""`prepare`: the one call. Read it as a table of contents; each line's story is in the module it names."""

from __future__ import annotations

import logging
import os
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from accel_moe import config, experts, hooks

logger = logging.getLogger("accel_moe")

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, **options: object) -> Model:
    """Make the experts of `model` run as ScatterMoE layers, and under expert parallelism if it was asked for.

    Call it before `accelerator.prepare`; before or after `Accelerator()` is the same. Not a collective: the ranks'
    settings are compared, and the experts sharded, inside `accelerator.prepare`.

    Args:
        model: a transformers model whose experts are on transformers' experts interface, on any device.
        options: fields of `MoEConfig` (`moe_ep_degree=2`); they win over the environment and the YAML.

    Returns:
        The same object. Weights, names and shapes are untouched. A second call with the same settings does nothing.

    Raises:
        ValueError: an option is unknown or wrong; the model has no experts, has some that are refused, was
            already prepared with other settings, or has been through `accelerator.prepare`.
    """
    resolved = config.resolve(options)
    layers = experts.find_experts(model)
    if experts.prepared_state(model) is not None:
        return _already_prepared(model, resolved)
    _refuse_wrapped(model)
    kernel = experts.choose_kernel(resolved.config.moe_kernel, layers)
    _refuse_unsupported(model, layers, kernel, resolved.config.moe_ep_degree)
    hooks.install()
    state = experts.PreparedState(
        resolved=resolved,
        kernel=kernel,
        base_model=getattr(model.config, "_name_or_path", None) or None,
        model_type=getattr(model.config, "model_type", type(model).__name__),
        num_layers=len(layers),
    )
    experts.swap(layers, state)
    model._accel_moe = state
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info("%s; %d experts layers run %s", resolved.describe(), len(layers), kernel)
    return model


def _already_prepared(model: Model, resolved: config.ResolvedConfig) -> Model:
    before = experts.prepared_state(model).resolved.config
    if before != resolved.config:
        raise ValueError(
            f"This model was already prepared with {before}; prepare() was called again with {resolved.config}. "
            "Prepare a model once, or load it anew to change the settings."
        )
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = isinstance(model, DistributedDataParallel) or any(isinstance(m, FSDPModule) for m in model.modules())
    if wrapped or getattr(model, "_is_accelerate_prepared", False):
        raise ValueError(
            "accel_moe.prepare() was called on a model that has been through accelerator.prepare() "
            f"({type(model).__name__}). Call accel_moe.prepare(model) first, accelerator.prepare(model, optimizer) then."
        )


def _refuse_unsupported(model: nn.Module, layers: dict[str, nn.Module], kernel: str, ep_degree: int) -> None:
    family = getattr(model.config, "model_type", type(model).__name__)
    for name, module in layers.items():
        if why := experts.refusal(module, kernel=kernel, ep_degree=ep_degree):
            raise ValueError(f"{family}: cannot prepare {name} ({type(module).__name__}): {why}.")

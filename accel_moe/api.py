"""`prepare` and `from_pretrained`. Read them as tables of contents: each line names the module that does the work."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from accel_moe import config, dispatch, hooks, ranks
from accel_moe.experts import forwards, probe, recognise
from accel_moe.experts.state import PreparedState, prepared_state
from accel_moe.experts.swap import recompute_refusal, swap
from accel_moe.weights import plan, request

logger = logging.getLogger("accel_moe")

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, **options: object) -> Model:
    """Make the experts of `model` run as ScatterMoE layers, under expert parallelism if `moe_ep_degree` is above 1.

    Call it before `accelerator.prepare`, and before or after `Accelerator()`. Not a collective: `accelerator.prepare`
    compares the ranks' settings and shards the experts.

    Args:
        model: a transformers model whose experts are on transformers' experts interface, on any device.
        options: fields of `MoEConfig` (`moe_ep_degree=2`). They win over the environment and the YAML.

    Returns:
        The same object with the same weights, names and shapes. A second call with the same settings does nothing.

    Raises:
        ValueError: an option is unknown or wrong; the model has no experts, has unsupported experts, was already
            prepared with other settings, or has been through `accelerator.prepare`.
    """
    resolved = config.resolve(options)
    dispatch.known_dispatcher(resolved.config.moe_dispatcher)
    forwards.adopt_liger_experts(model)
    layers = recognise.find_experts(model)
    if prepared_state(model) is not None:
        return _already_prepared(model, resolved)
    _refuse_wrapped(model)
    forwards.take_back(model)
    kernel = recognise.choose_kernel(resolved.config.moe_kernel, layers)
    _refuse_unsupported(model, layers, kernel, resolved.config)
    hooks.install()
    state = PreparedState(
        resolved=resolved,
        kernel=kernel,
        base_model=getattr(model.config, "_name_or_path", None) or None,
        model_type=getattr(model.config, "model_type", type(model).__name__),
        num_layers=len(layers),
    )
    swap(layers, state)
    forwards.watch_first_forwards(model)
    model._accel_moe = state
    if ranks.is_rank0():
        logger.info("%s; %d experts layers run %s", resolved.describe(), len(layers), kernel)
        if resolved.config.moe_ep_degree > 1 and (saved := plan.memory_saved(model)):
            logger.info(saved)
    return model


def from_pretrained(model_name_or_path: str | os.PathLike, *args: Any, model_class: Any = None, **kwargs: Any) -> Any:
    """transformers' `from_pretrained`, but `accelerator.prepare` reads the weights, straight into the shards.

        model = accel_moe.from_pretrained("Qwen/Qwen3-30B-A3B", dtype=torch.bfloat16)
        model = accel_moe.prepare(model)
        model, optimizer = accelerator.prepare(model, optimizer)

    In an FSDP2 launch the model is returned on the meta device: the files are checked, but not read. Each rank reads
    only its own shards once the model is sharded. An optimizer may be built before that. Expert parallelism may be
    off. In one process without FSDP, and under DeepSpeed or FSDP1, which need the whole model, it loads at once; but
    not in one process if the environment or the YAML sets moe_quantize_experts: then the experts are quantised while
    they are read. Not a collective.

    Args:
        model_name_or_path: a Hub id or a folder.
        model_class: the (auto) class; AutoModelForCausalLM by default.
        args, kwargs: passed on (dtype, revision, attn_implementation, config, ignore_mismatched_sizes, ...).

    Returns:
        The return value of `model_class.from_pretrained`.

    Raises:
        ValueError: the path is an adapter, a training checkpoint or a run's folder; the checkpoint is quantised, not
            safetensors, truncated, lacks a file, or does not fit its config; or an argument (device_map, gguf_file,
            ...) does not work with shards.
        OSError: the folder does not exist, or the Hub does not give the model.
    """
    if model_class is None:
        from transformers import AutoModelForCausalLM as model_class
    if not request.deferred(os.environ, _quantises()):
        with request.named(model_name_or_path):
            return model_class.from_pretrained(model_name_or_path, *args, **kwargs)
    request.refuse_arguments(kwargs)
    request.refuse_other_folders(model_name_or_path, kwargs)
    request.refuse_quantised(str(model_name_or_path), request.read_config(model_name_or_path, kwargs))
    hooks.install()
    with request.named(model_name_or_path), request.quiet_but_rank_0(), hooks.planning_loads():
        loaded = model_class.from_pretrained(model_name_or_path, *args, **kwargs)
    plan.watch_edits(loaded)
    return loaded


def _quantises() -> bool:
    """Whether the environment or the YAML sets moe_quantize_experts. What else they do wrong, `prepare` tells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config.resolve().config.moe_quantize_experts != "none"


def _already_prepared(model: Model, resolved: config.ResolvedConfig) -> Model:
    before = prepared_state(model).resolved.config
    if before != resolved.config:
        raise ValueError(
            f"This model was already prepared with {before}; prepare() was called again with {resolved.config}. "
            "Prepare a model once. To change the settings, load the model again."
        )
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = isinstance(model, DistributedDataParallel) or any(isinstance(m, FSDPModule) for m in model.modules())
    if wrapped or getattr(model, "_is_accelerate_prepared", False):
        raise ValueError(
            "accel_moe.prepare() was called on a model that has been through accelerator.prepare() "
            f"({type(model).__name__}). Call accel_moe.prepare(model) first, then accelerator.prepare(model, "
            "optimizer)."
        )


def _refuse_unsupported(
    model: nn.Module, layers: dict[str, nn.Module], kernel: str, settings: config.MoEConfig
) -> None:
    family = getattr(model.config, "model_type", type(model).__name__)
    recompute = settings.moe_recompute_up_projection
    for name, module in layers.items():
        why = recognise.refusal(module, kernel=kernel, ep_degree=settings.moe_ep_degree)
        if why := why or (recompute_refusal(kernel) if recompute else None):
            raise ValueError(f"{family}: cannot prepare {name} ({type(module).__name__}): {why}.")
    trains = any(p.requires_grad for p in model.parameters())
    if found := probe.refusal(layers, kernel, ep_degree=settings.moe_ep_degree, trains=trains):
        name, why = found
        raise ValueError(f"{family}: cannot prepare {name} ({type(layers[name]).__name__}): {why}.")

"""A model's sizes, from its config alone: the model is made on meta, where a parameter has a shape and no memory.

Parameter counts are therefore exact for every family of transformers. Experts are recognised as `prepare()` recognises
them (experts/recognise.py); there is no table of architectures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel_moe.errors import HubFormatError
from accel_moe.experts.packing import Packing
from accel_moe.experts.recognise import FoundExperts, find_experts
from accel_moe.experts.view import as_interface
from accel_moe.weights.hub_config import first_line, meta_model

TOP_K_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k",
    "top_k_experts", "num_selected_experts", "moe_router_topk",
)  # fmt: skip
"""The config fields that hold K, in the order in which they are asked for."""


@dataclass(frozen=True)
class Shapes:
    """Numbers of values, unless said otherwise.

    Attributes:
        layers, moe_layers: decoder layers, and experts modules.
        experts: of the module that has the fewest.
        width: of the pre-activation of one (row, expert) pair: 2I, or I without a gate.
        inner: I.
        dense: of the layers, without experts, embeddings and head.
        dense_layer: the most of one layer.
        routed, routed_layer: of all experts, and the most of one layer.
        matrices: for each stack of expert matrices, its number of experts and the shape of one.
        embedding, head: the input and the output embedding; a tied head counts as 0.
        attention: heads x head size.
        attention_edges, experts_edges: in + out of the linear layers of attention, and of all expert matrices: a LoRA
            adapter has that many weights for each rank.
    """

    model_type: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    vocabulary: int
    width: int
    inner: int
    dense: int
    dense_layer: int
    routed: int
    routed_layer: int
    matrices: tuple[tuple[int, torch.Size], ...]
    embedding: int
    head: int
    attention: int
    attention_edges: int
    experts_edges: int

    @property
    def parameters(self) -> int:
        return self.dense + self.routed + self.embedding + self.head

    def adapters(self, rank: int, experts: bool) -> int:
        """Weights of a LoRA adapter on attention, and on the experts too."""
        return rank * (self.attention_edges + (self.experts_edges if experts else 0))

    def packed_bytes(self, scheme: str) -> int:
        """Bytes of all experts under `moe_quantize_experts`; their biases stay as they are and count in bf16."""
        packed = sum(count * Packing(scheme, matrix, torch.bfloat16).row_bytes for count, matrix in self.matrices)
        biases = self.routed - sum(count * matrix.numel() for count, matrix in self.matrices)
        return packed + 2 * biases


def open_model(name: str) -> nn.Module:
    """The model of a folder or a Hub id, on meta. Only config.json is read.

    Raises:
        HubFormatError: there is no config that this transformers can read, or the Hub cannot be asked.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise HubFormatError(f"{name} is not a folder. Give a folder with a config.json, or a Hub id.")
        folder = _from_hub(name)
    try:
        return meta_model(folder)
    except HubFormatError:
        raise
    except Exception as error:  # transformers' own, for a config that names what it cannot build
        raise HubFormatError(f"The model of {name} cannot be made from its config: {first_line(error)}") from None


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the client raises its own, requests' and httpx' errors
        raise HubFormatError(
            f"{name} is no local folder, and its config.json could not be had from the Hub ({type(error).__name__}: "
            f"{first_line(error)}). Give a folder with a config.json, or a Hub id that you can reach."
        ) from None


def shapes_of(model: nn.Module) -> Shapes:
    """Raises ValueError: the model has no experts, or K cannot be found in its config, or is more than the experts."""
    found = find_experts(model)
    config = text_config(model)
    layouts: list[Any] = [as_interface(module) for module in found.values()]
    down = [(m.down_proj.shape[-2:], m.is_transposed) for m in layouts]
    inner = max(shape[0 if transposed else 1] for shape, transposed in down)
    routed_of = [_size(module) for module in found.values()]
    embedding, head = _embeddings(model)
    layers = decoder_layers(model, found)
    outside = _size(model) - sum(routed_of) - embedding - head
    stacks = [p for module in found.values() for p in module.parameters() if p.dim() == 3]
    heads = _field(config, "num_attention_heads") or 1
    head_dim = _field(config, "head_dim") or config.hidden_size // heads
    return Shapes(
        model_type=model.config.model_type,
        layers=len(layers),
        moe_layers=len(found),
        experts=min(layout.num_experts for layout in layouts),
        top_k=_top_k(config, min(layout.num_experts for layout in layouts)),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        width=max((2 if layout.has_gate else 1) * inner for layout in layouts),
        inner=inner,
        dense=outside,
        dense_layer=max(_size(layer) - sum(_size(m) for m in _inside(layer, found)) for layer in layers),
        routed=sum(routed_of),
        routed_layer=max(routed_of),
        matrices=tuple((p.shape[0], p.shape[1:]) for p in stacks),
        embedding=embedding,
        head=head,
        attention=heads * head_dim,
        attention_edges=sum(sum(linear.weight.shape) for linear in attention_linears(model)),
        experts_edges=sum(p.shape[0] * sum(p.shape[1:]) for p in stacks),
    )


def decoder_layers(model: nn.Module, found: FoundExperts) -> list[nn.Module]:
    """The blocks of every ModuleList whose blocks hold experts, dense ones among them; else the experts themselves."""
    outermost: dict[int, nn.Module] = {}
    for name in found:
        module: Any = model
        for part in name.split("."):
            if isinstance(module, nn.ModuleList):
                break
            module = getattr(module, part)
        outermost[id(module)] = module
    return [
        block for module in outermost.values() for block in (module if isinstance(module, nn.ModuleList) else [module])
    ]


def attention_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that examples/lora.py adapts."""
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [linear for name, linear in named if "attn" in name or "attention" in name]


def text_config(model: nn.Module) -> Any:
    """The config of the decoder: the model's own, or the part of it that is for text."""
    get = getattr(model.config, "get_text_config", None)
    return get() if isinstance(get, Callable) else model.config


def _inside(layer: nn.Module, found: FoundExperts) -> list[nn.Module]:
    ids = {id(module) for module in found.values()}
    return [module for module in layer.modules() if id(module) in ids]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _embeddings(model: Any) -> tuple[int, int]:
    """Values of the input embedding and of a head of its own."""
    ends = [getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings")]
    weights = [getattr(end, "weight", None) for end in ends]
    first, last = (0 if weight is None else weight.numel() for weight in weights)
    return first, 0 if weights[0] is weights[1] else last


def _field(config: Any, name: str) -> int:
    """A positive number of the config, the greatest where it has one for each layer; 0 if it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers' own, where a field differs from layer to layer
        return 0
    value = max(value) if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) and value > 0 else 0


def _top_k(config: Any, experts: int) -> int:
    for name in TOP_K_NAMES:
        if value := _field(config, name):
            if value > experts:
                raise ValueError(f"The config of {config.model_type} has {name}={value}, and {experts} experts.")
            return value
    raise ValueError(
        f"The config of {config.model_type} has none of {', '.join(TOP_K_NAMES)}: the number of experts that a token "
        "goes to is not known."
    )

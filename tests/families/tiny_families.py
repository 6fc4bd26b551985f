"""A tiny random model of every MoE family of the installed transformers, made from its config class.

`SHRINK` gives each known config field its small value; it is passed to the config's constructor, so that what the
config derives (layer types, rope parameters) is derived from the small values. `OVERRIDES` is for the families that
need more. A family that cannot be built is listed with the reason by the sweep, never dropped.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType

import torch
import transformers
from torch import nn

from accel_moe import catalogue
from accel_moe.experts import view

VOCAB = 64
TOKENS = (2, 6)
SHRINK = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "zero_expert_num": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "chunk_size": 4,
    "mamba_chunk_size": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_dense_layers": 1,
    "mlp_only_layers": [],
    "mlp_layer_types": ["dense", "sparse"],
    "n_groups": 1,
    "mamba_n_groups": 1,
    "router_hidden_size": 16,
    "share_expert_dim": 24,
    "swiglu_limit": 0.5,
    "moe_hidden_size": 32,
    "swa_head_dim": 8,
    "use_cache": False,
    "attention_dropout": 0.0,
}
NO_VALUE = "leave it to the config"
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
OVERRIDES: dict[str, dict[str, object]] = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4}, "ffn_config": NO_VALUE, "d_model": 48, "n_heads": 48, "n_layers": 2},
    "doge": {"is_moe": True},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": MROPE,
    },
    "gemma4": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24},
    "glm4v_moe": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm5_next": {
        "index_topk": 4,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "hy_v4_vl": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}},
    "inkling2": {"unpadded_vocab_size": VOCAB - 4},
    # one layer before the loop, two in it, one behind; each a block of its own
    "inkling2_loop": {
        "unpadded_vocab_size": VOCAB - 4,
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "linear_attn_config": NO_VALUE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": NO_VALUE, "qk_head_dim": NO_VALUE},
    "step3p7": {"pad_token_id": 1, "sliding_window": 4, "swiglu_limits": [None, 0.5]},
    "vitpose_backbone": {"num_experts": 2, "part_features": 8},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Tiny:
    """One family's smallest model: `build()` makes it, on the CPU in float32.

    `model_class` is what reads its checkpoints: of a family without a modeling file, transformers' auto class.
    """

    family: str
    model_class: type
    config: object

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = _make(self.model_class, self.config).float()
        randomise(model, seed)
        return model.train()


def _make(model_class: type, config: object) -> nn.Module:
    return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def families() -> list[catalogue.Source]:
    return [s for s in catalogue.sources() if s.decorated or any(name in view.SHIMS for _, name in s.lookalikes)]


def classes_of(source: catalogue.Source) -> tuple[tuple[str, str], ...]:
    return source.decorated or tuple((m, n) for m, n in source.lookalikes if n in view.SHIMS)


def tiny_config(cls: type, family: str, **more):
    """`cls` with every field of SHRINK that it has, sub-configs likewise."""
    default = cls()
    overrides = {**OVERRIDES.get(family, {}), **more}
    values = {}
    for name, value in vars(default).items():
        if name in overrides:
            values[name] = copy.deepcopy(overrides[name])
        elif hasattr(value, "model_type"):
            values[name] = tiny_config(type(value), family).to_dict()
        elif name in SHRINK:
            values[name] = copy.deepcopy(SHRINK[name])
    values = {name: value for name, value in values.items() if value != NO_VALUE}
    config = cls(**values)
    config._attn_implementation = "eager"
    return config


@functools.cache
def tiny(family: str) -> Tiny:
    """The smallest model class of a family that holds its experts.

    Raises:
        ValueError: none can be built; each attempt's error is in the message.
    """
    source = next(s for s in families() if s.name == family)
    failures = []
    names = {name for _, name in classes_of(source)}
    for module_name in dict.fromkeys(module for module, _ in classes_of(source)):
        for model_class, config_class in _models_of(source, module_name):
            try:
                config = tiny_config(config_class, family)
                with torch.device("meta"):
                    model = _make(model_class, config)
            except Exception as error:
                failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
                continue
            if any(type(m).__name__ in names for m in model.modules()):
                return Tiny(family, model_class, config)
            failures.append(f"{model_class.__name__}: no experts in it")
    raise ValueError("; ".join(failures))


def _models_of(source: catalogue.Source, module_name: str) -> list[tuple[type, type]]:
    """(class that makes and reads the model, class of its config), the ones to be preferred first."""
    if source.model_type:
        (config_class,) = catalogue.config_classes(source, module_name)
        return [(auto, config_class) for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel)]
    return [(cls, cls.config_class) for cls in _model_classes(importlib.import_module(module_name))]


def _model_classes(module: ModuleType) -> list[type]:
    """The file's models, the ones to be preferred first: text with a head, text alone, then the rest."""
    from transformers import PreTrainedModel

    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is not None
        and not name.endswith("PreTrainedModel")
    ]
    order = ("ForCausalLM", "TextModel", "ForTokenClassification", "ForConditionalGeneration", "Model")

    def rank(cls: type) -> int:
        return next((i for i, end in enumerate(order) if cls.__name__.endswith(end)), len(order))

    return sorted(found, key=rank)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights of one size for every family, large enough that routing varies: numbers depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def use_own_loop(model: nn.Module) -> None:
    """Let every layer run its family's eager loop."""
    if hasattr(model, "set_experts_implementation") and any(hasattr(m, "is_concatenated") for m in model.modules()):
        model.set_experts_implementation("eager")


def token_ids(seed: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, TOKENS, generator=torch.Generator().manual_seed(seed))


def output_of(model: nn.Module, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The model's logits, or its last hidden state where it has no head."""
    out = model(input_ids=token_ids() if input_ids is None else input_ids)
    found = getattr(out, "logits", None)
    return found if found is not None else out.last_hidden_state


def off_interface_model(source: catalogue.Source) -> nn.Module:
    """A model, on meta, of a family that has experts off the interface."""
    names = {name for _, name in source.lookalikes}
    failures = []
    for module_name in dict.fromkeys(module for module, _ in source.lookalikes):
        for model_class in _model_classes(importlib.import_module(module_name)):
            try:
                with torch.device("meta"):
                    model = model_class(tiny_config(model_class.config_class, source.name))
            except Exception as error:
                failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
                continue
            if any(type(m).__name__ in names for m in model.modules()):
                return model
            failures.append(f"{model_class.__name__}: no experts in it")
    raise ValueError("; ".join(failures))

"""A model's config, cut to two small layers: same class, same flags, same gate, same kinds of layers.

    in:   the config of a model of any size
    out:  a config of the same class, whose model has some hundred thousand parameters

Only sizes change. A size is a field whose name is in `SMALL`; a field that is None or 0 is a flag, and stays. A list
with one entry for each layer keeps the entries of the two layers that are kept. Everything else is the user's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

LAYERS, VOCAB, HEADS, HEAD_DIM = 2, 64, 4, 8

SMALL: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "unpadded_vocab_size": VOCAB - 4,
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "d_model"), HEADS * HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24
    ),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads"), HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), HEAD_DIM),
    "qk_head_dim": 2 * HEAD_DIM,
    "max_position_embeddings": 64,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "index_kpool", "indexer_compress_ratio"), 2),
    **dict.fromkeys(("index_topk", "indexer_budget"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("ssm_state_size", "mamba_d_state", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "zero_expert_num", "sliding_window"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
}
"""The small value of each size. A value that is smaller already stays."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
OF_FILES = ("quantization_config", "dtype", "auto_map")
"""Fields that tell how the weights' files are to be read. The small model has none, and is fp32."""
OF_EXPERTS = ("moe", "sparse", "expert")
"""Words in a list of layer kinds that name a layer with experts."""


def shrunk(config: Any, num_experts: int = 8) -> Any:
    """The small config, of the same class. Sub-configs are cut likewise. `config` stays as it is.

    Raises:
        ValueError: the class does not accept the small values; the text has its error.
    """
    values = dict(_small_values(config, num_experts))
    own = {n: v for n, v in config.to_diff_dict().items() if n in vars(config) and n not in OF_FILES}
    try:
        small = type(config)(**{**copy.deepcopy(own), **values})
    except Exception as error:  # whatever a family's config checks
        raise ValueError(
            f"{type(config).__name__} cannot be cut to {LAYERS} small layers ({type(error).__name__}: {error})."
        ) from error
    small._attn_implementation = "eager"
    return small


def _small_values(config: Any, num_experts: int) -> Iterator[tuple[str, Any]]:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    count = next((n for name in LAYER_COUNTS if isinstance(n := getattr(config, name, None), int)), 0)
    per_layer = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and count > LAYERS and len(v) == count}
    kept = layers_to_keep(per_layer, count)
    for name, value in fields.items():
        if hasattr(value, "model_type"):
            yield name, shrunk(value, num_experts).to_dict()
        elif name.endswith("source_layers") and name in per_layer:
            yield name, [kept.index(value[i]) if value[i] in kept else place for place, i in enumerate(kept)]
        elif name in per_layer:
            yield name, [value[i] for i in kept]
        elif name in EXPERTS and isinstance(value, int):
            yield name, min(value, num_experts)
        elif name == "num_key_value_heads" and isinstance(value, int):
            grouped = value < (fields.get("num_attention_heads") or value)
            yield name, min(value, HEADS // 2 if grouped else HEADS)
        elif name == "head_dim" and value and value == _sum_of(fields, "qk_nope_head_dim", "qk_rope_head_dim"):
            yield name, 2 * HEAD_DIM
        elif name in SMALL and isinstance(value, list):
            yield name, [min(one, SMALL[name]) for one in value]
        elif name in SMALL and isinstance(value, int):
            yield name, min(value, SMALL[name])
        elif name in TOKENS and value is not None:
            yield name, [1] if isinstance(value, list) else 1
        elif name == "mlp_only_layers":
            yield name, [0] if value and count not in (0, len(value)) else value
        elif name.startswith("rope_") and isinstance(value, Mapping):
            yield name, _small_rope(value, config)
    yield "use_cache", False
    if "attention_dropout" in fields:
        yield "attention_dropout", 0.0


def _sum_of(fields: Mapping[str, Any], *names: str) -> int:
    return sum(fields.get(name) or 0 for name in names)


def layers_to_keep(per_layer: Mapping[str, Any], count: int) -> tuple[int, int]:
    """(i, j), i < j: a layer with experts, as far as the lists tell, and one of another kind, if there is any."""
    rows = [str([values[i] for values in per_layer.values()]) for i in range(count)]
    if len(rows) < LAYERS:
        return (0, 1)
    with_experts = [i for i, row in enumerate(rows) if any(word in row for word in OF_EXPERTS)]
    last = with_experts[-1] if with_experts else len(rows) - 1
    other = next((i for i, row in enumerate(rows) if row != rows[last]), 0 if last else 1)
    first, second = sorted((other, last))
    return first, second


def _small_rope(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Sections and factors of each frequency, as many as a small head has."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            value = _small_rope(value, config)
        elif name == "mrope_section" and isinstance(value, list):
            half = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1.0)) // 2
            value = _sections(value, half)
        elif name in ("long_factor", "short_factor") and isinstance(value, list):
            value = value[: HEAD_DIM // 2]
        small[name] = value
    return small


def _sections(own: list[int], total: int) -> list[int]:
    """`own` in proportion, with the sum `total`."""
    sections = [size * total // sum(own) for size in own]
    sections[-1] += total - sum(sections)
    return sections


def small_model(config: Any) -> nn.Module:
    """The model of a config on the CPU in fp32, in training mode; the same numbers in every process.

    Raises:
        ValueError: transformers builds no model with experts from it.
    """
    model_class = class_with_experts(config)
    torch.manual_seed(0)
    model = build(model_class, config).float()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that routing varies
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.tie_weights()
    return model.train()


def class_with_experts(config: Any) -> Any:
    """The (auto) class that makes a model with experts of this config: with a head, if there is one.

    Raises:
        ValueError: there is none; the text says what the first of them lacks, or why none could be built.
    """
    import transformers

    from accel_moe.experts.recognise import find_experts

    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    auto = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForTokenClassification", "AutoModel")
    failures, without_experts = [], ""
    for model_class in filter(None, [*named, *(getattr(transformers, name) for name in auto)]):
        try:
            with torch.device("meta"):
                model = build(model_class, config)
        except Exception as error:  # whatever a family's constructor raises
            failures.append(f"{model_class.__name__}: {' '.join(str(error).split())[:200]}")
            continue
        try:
            find_experts(model)
            return model_class
        except ValueError as error:
            without_experts = without_experts or str(error)
    raise ValueError(f"no model with experts comes of {type(config).__name__}: {without_experts or failures[0]}")


def build(model_class: Any, config: Any) -> nn.Module:
    """A model with fresh weights, of an auto class or a model's own."""
    config = copy.deepcopy(config)
    return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
